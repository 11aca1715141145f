"""Gold passages for questions: the command `python -m stepsearch.prepare gold`.

    python -m stepsearch.prepare gold --questions=Q --corpus=C --output=O.jsonl
        --engines=bm25,lexical --threshold=0.2
    python -m stepsearch.prepare gold --questions=Q --corpus=C --measure

`data.gold` says what the confidence is. The second form hides the gold
passages that the questions have, and shows what would be found of them.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import time
from typing import NoReturn

from absl import flags

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import metrics
from stepsearch import paths
from stepsearch.data import datasets
from stepsearch.data import formats
from stepsearch.data import gold
from stepsearch.retrieval import engines as engines_lib
from stepsearch.types import Example

_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def run(
    questions: str, corpus: str, output: str, *, engines: str,
    threshold: float, k: int, data_dir: str = '', complete: bool = False,
) -> list[Example]:
  """Writes all questions, those without gold passages with what was found.

  Args:
    questions: as of `datasets.read_questions`.
    corpus: as of `datasets.read_corpus`.
    output: JSON lines of our own shape; a gold passage that was found has a
      `confidence` there.
    engines: as of `engines.split`.
    threshold: least confidence of a gold passage.
    k: passages a query and engine.
    data_dir: of prepared sets.
    complete: leave out questions of which a (sub-)question has no passage.

  Returns:
    The questions written.

  Raises:
    ValueError: one paragraph naming flag or file, value and remedy.
  """
  examples, searches = _read(questions, corpus, engines, data_dir)
  start = time.monotonic()
  bare = [e for e in examples if not e.gold_documents]
  found = dict(zip(
      map(id, bare), _find(bare, searches, k), strict=True))
  written, left_out, whole = [], 0, 0
  with paths.replacing(output) as file:
    for example in examples:
      candidates = found.get(id(example), [])
      if id(example) in found:
        example = gold.with_gold(example, candidates, threshold)
        whole += gold.complete(example)
        if complete and not gold.complete(example):
          left_out += 1
          continue
      row = formats.record(example)
      sure = {}
      for c in candidates:
        sure[c.document.id] = max(
            c.confidence, sure.get(c.document.id, 0.0))
      for document in row.get('gold', []):
        if document['id'] in sure:
          document['confidence'] = round(sure[document['id']], 4)
      file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')
      written.append(example)
    if not written:
      raise ValueError(
          f'{output} has no questions: none of {len(examples):,} is complete '
          f'at --threshold={threshold}; lower it, or leave --complete out.')
  some = sum(
      any(c.confidence >= threshold for c in found[id(e)]) for e in bare)
  print(
      f'\n{len(examples) - len(bare):,} of {len(examples):,} questions had '
      f'gold passages and keep them. Of {len(bare):,} without, {whole:,} have '
      'one now for every sub-question or hop, '
      f'{some - whole:,} for some, {len(bare) - some:,} for none (confidence '
      f'at least {threshold}).')
  if left_out:
    print(f'{left_out:,} incomplete questions are left out (--complete).')
  print(f'written to {output} in {time.monotonic() - start:.1f} s')
  if whole < len(bare) and not complete:
    print('Turn rewards need gold passages of every question: --complete '
          'leaves the others out.')
  print('next: python -m stepsearch.train --config=configs/musique.py '
        '--config.model.pretrained=… --workdir=… '
        f'--config.data.corpus={corpus} --config.data.train={output} '
        '--config.data.eval=…')
  return written


def measure(
    questions: str, corpus: str, *, engines: str, k: int, data_dir: str = ''
) -> dict[str, dict[float, tuple[float, float, float]]]:
  """Prints precision and recall on questions whose gold passages are known.

  Returns:
    By kind of question (with and without its sub-questions) and threshold,
    what `gold.precision_recall` gives.

  Raises:
    ValueError: as of `run`; no question has gold passages.
  """
  examples, searches = _read(questions, corpus, engines, data_dir)
  known = [e for e in examples if e.gold_documents]
  if not known:
    raise ValueError(
        f'{questions}: none of its questions has gold passages in {corpus}, '
        'so there is nothing to measure with.')
  kinds = {
      'question and answer': [
          dataclasses.replace(e, sub_questions=()) for e in known],
      'sub-questions and answers': [
          e for e in known if any(s.answer for s in e.sub_questions)]}
  results = {}
  for kind, asked in kinds.items():
    if not asked:
      continue
    hidden = [dataclasses.replace(e, gold_documents=()) for e in asked]
    found = list(_find(hidden, searches, k))
    results[kind] = {
        t: gold.precision_recall(asked, found, t) for t in _THRESHOLDS}
    print(f'\n{kind}, {len(asked):,} questions, engines {engines}\n'
          'confidence  precision  recall  all gold of a question')
    for t, (precision, recall, whole) in results[kind].items():
      print(f'{t:10.1f} {precision:10.3f} {recall:7.3f} {whole:23.3f}')
  return results


def _read(questions, corpus, engines, data_dir):
  """The questions, and the searches of all engines."""
  assembly.tune_host()
  documents = datasets.read_corpus(corpus, data_dir)
  examples = datasets.read_questions(
      questions, documents.by_id, directory=data_dir)
  known = [d for e in examples for d in e.gold_documents]
  made = []
  for spec in engines_lib.split(engines):
    print(f'engine {spec}', flush=True)
    made.append(engines_lib.make(spec, documents, known=known).search)
  return examples, made


def _find(examples, searches, k):
  if not examples:
    return
  with metrics.Progress(1).phase('searching', len(examples)) as tick:
    yield from gold.find(examples, searches, k=k, tick=tick)


def main(argv: Sequence[str]) -> NoReturn:
  """Defines the flags and runs the command."""
  questions = flags.DEFINE_string(
      'questions', None, 'Questions: a file, or NAME:SPLIT.', required=True)
  corpus = flags.DEFINE_string(
      'corpus', None, 'Passages: a file, or NAME:corpus.', required=True)
  output = flags.DEFINE_string('output', '', 'JSON lines to write.')
  engines = flags.DEFINE_string(
      'engines', 'bm25,lexical', 'Search engines, joined by commas: lexical, '
      'bm25, dense:FOLDER, fusion:bm25+dense:FOLDER, http://host:port.')
  threshold = flags.DEFINE_float(
      'threshold', 0.2, 'Least confidence of a gold passage.',
      lower_bound=0, upper_bound=1)
  k = flags.DEFINE_integer(
      'k', 10, 'Passages a query and engine.', lower_bound=2)
  data_dir = flags.DEFINE_string('data_dir', '', 'Of prepared sets.')
  complete = flags.DEFINE_bool(
      'complete', False, 'Leave out questions of which a sub-question or hop '
      'has no passage that is sure enough.')
  measures = flags.DEFINE_bool(
      'measure', False, 'Hide the gold passages that questions have, and show '
      'how many are found; writes nothing.')

  def run_it():
    common = dict(
        engines=engines.value, k=k.value, data_dir=data_dir.value)
    if measures.value:
      measure(questions.value, corpus.value, **common)
      return
    if not output.value:
      raise ValueError('--output is missing: where the questions go.')
    run(questions.value, corpus.value, output.value,
        threshold=threshold.value, complete=complete.value, **common)

  config_lib.main(run_it, takes_config=False, argv=argv)
