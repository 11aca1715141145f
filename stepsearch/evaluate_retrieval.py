"""`python -m stepsearch.evaluate retrieval`: search engines, without a model.

    python -m stepsearch.evaluate retrieval --questions=… --corpus=…
        --engines=lexical,bm25,dense:ENCODER@INDEX,fusion:bm25+dense:ENCODER@INDEX
        [--k=3,5,10] [--queries=sub_questions] [--output=DIR]

prints a table of what each engine finds of the gold passages, and for dense
ones how near ScaNN comes to exact search; DIR/retrieval.json holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib.metadata
import importlib.util
import json
from typing import Any, NoReturn

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import metrics
from stepsearch import paths
from stepsearch.data import datasets
from stepsearch.retrieval import engines as engines_lib
from stepsearch.retrieval import measure
from stepsearch.retrieval import retriever

_REGIMES = ('hashed', 'tree')
_LEAST = 256  # passages from which ScaNN can learn its codes


def run(
    questions: str,
    corpus: str,
    engines: str,
    *,
    ks: Sequence[int] = (3, 5, 10),
    queries: str = 'questions',
    output: str | None = None,
    directory: str = '',
) -> dict[str, Any]:
  """Measures engines on questions with gold passages.

  Args:
    questions: as of `datasets.read_questions`.
    corpus: as of `datasets.read_corpus`.
    engines: texts of `engines.make`, joined by commas.
    ks: numbers of documents that are looked at.
    queries: one of `measure.MODES`.
    output: a folder that receives retrieval.json; None: nothing is written.
    directory: where `prepare` put what NAME:SPLIT and NAME:corpus name.

  Returns:
    What retrieval.json holds.

  Raises:
    ValueError: no questions with gold passages; a bad file or engine.
  """
  assembly.tune_host()
  specs = engines_lib.split(engines)
  if output is not None:
    config_lib.check_workdir(output, 'output')
  progress = metrics.Progress(0)
  documents = datasets.read_corpus(corpus, directory)
  if not ks or not all(1 <= k <= len(documents) for k in ks):
    raise ValueError(
        f'--k={",".join(map(str, ks))}: numbers from 1 to {len(documents)}, the'
        ' passages of the corpus, are expected.')
  examples = datasets.read_questions(
      questions, documents.by_id, directory=directory)
  asked, without = measure.queries(examples, queries)
  what = 'gold passages'
  if queries == 'sub_questions':
    what = 'sub-questions with gold passages each'
  if not asked:
    raise ValueError(
        f'--questions={questions}: none of {len(examples)} questions has {what}'
        ', so there is nothing to find.')
  progress.line(
      f'{len(documents):,} passages; {len(examples) - without:,} questions, '
      f'{len(asked):,} queries' + (
          f'; {without:,} questions without {what} are left out'
          if without else ''))
  known = [d for example in examples for d in example.gold_documents]
  made, results, scann = {}, {}, {}
  for spec in specs:
    engine = engines_lib.make(
        spec, documents, k=max(ks), known=known, made=made)
    with progress.phase(spec, len(asked)) as tick:
      results[spec] = measure.measure(engine, asked, ks, tick)
    if results[spec]['failed']:
      progress.line(
          f'{spec}: {results[spec]["failed"]:.0f} queries were not answered:'
          ' what it finds is more')
  if importlib.util.find_spec('scann') and len(documents) >= _LEAST:
    scann = {
        f'{spec}, {regime}': measure.approximation(engine, asked, ks, regime)
        for spec, engine in made.items()
        if isinstance(engine, retriever.Retriever) for regime in _REGIMES}
  progress.line(measure.table(results, ks))
  for name, values in scann.items():
    ratios = ' '.join(f'@{k} {values[f"ratio@{k}"]:.4f}' for k in sorted(ks))
    progress.line(
        f'ScaNN ({name}) against exact search: overlap@10 '
        f'{values["overlap@10"]:.4f}, recall of gold {ratios} of it; '
        f'{values["scann_per_second"]:,.0f} against '
        f'{values["exact_per_second"]:,.0f} queries/s')
  report = {
      'questions': questions,
      'corpus': retriever.corpus_fingerprint(documents),
      'queries': queries,
      'size': {
          'questions': len(examples) - without, 'queries': len(asked),
          'left_out': without},
      'k': sorted(ks),
      'engines': {
          spec: {'embedder': getattr(
              made[spec], 'fingerprints', {}).get('embedder')} | values
          for spec, values in results.items()},
      'scann': scann,
      'versions': {
          name: importlib.metadata.version(name)
          for name in ('bm25s', 'jax', 'numpy')}}
  if output is not None:
    file = paths.Path(output) / 'retrieval.json'
    paths.write(file, json.dumps(report, indent=2, ensure_ascii=False) + '\n')
    progress.line(f'written: {file}')
  return report


def command(argv: Sequence[str]) -> NoReturn:
  """The command: its flags, then `run`."""
  from absl import flags

  asked = flags.DEFINE_string(
      'questions', None, 'Questions with gold passages.', required=True)
  corpus = flags.DEFINE_string('corpus', None, 'Their corpus.', required=True)
  engines = flags.DEFINE_string(
      'engines', 'lexical,bm25,fusion:bm25+lexical',
      'Joined by commas: lexical, bm25, dense:ENCODER[@INDEX], fusion:…+…, '
      'http://host:port.')
  ks = flags.DEFINE_list('k', ['3', '5', '10'], 'Documents looked at.')
  queries = flags.DEFINE_enum(
      'queries', 'questions', measure.MODES,
      'Each question as one query, or each of its sub-questions.')
  output = flags.DEFINE_string(
      'output', None, 'Folder that receives retrieval.json.')

  directory = flags.DEFINE_string(
      'data_dir', '', 'Where `prepare` put what NAME:SPLIT names.')

  def main():
    try:
      numbers = [int(k) for k in ks.value]
    except ValueError:
      raise ValueError(
          f'--k={",".join(ks.value)}: numbers joined by commas are expected,'
          ' such as 3,5,10.') from None
    run(asked.value, corpus.value, engines.value, ks=numbers,
        queries=queries.value, output=output.value,
        directory=directory.value)

  config_lib.main(main, takes_config=False, argv=argv)
