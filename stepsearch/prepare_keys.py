"""Search keys for questions: the command `python -m stepsearch.prepare keys`.

    python -m stepsearch.prepare keys --questions=Q --corpus=C --output=O.jsonl
        --engines=lexical,bm25,dense:FOLDER --writer=template|endpoint|FOLDER

What it does is told in `data.search_keys`. The same command goes on where it
was killed, and asks an endpoint, a server or a web search API nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

from absl import flags

from stepsearch import assembly
from stepsearch import metrics
from stepsearch import paths
from stepsearch.data import datasets
from stepsearch.data import language_model
from stepsearch.data import search_keys
from stepsearch.retrieval import engines as engines_lib
from stepsearch.retrieval import retriever
from stepsearch.retrieval import web

_RESERVED = ('template', 'endpoint')


def run(
    questions: str, corpus: str, output: str, config: search_keys.Config, *,
    engines: str, writer: str, prompts: str = '', data_dir: str = '',
    first: int = 0, cache: str | None = None, endpoint: Mapping[str, Any],
    engine_rate: float = 0.0, slots: int = 8,
    prices: tuple[float, float] = (0.0, 0.0), shown: int = 3,
) -> search_keys.Report:
  """Writes keys and prints what they are like.

  Args:
    questions: as of `datasets.read_questions`.
    corpus: as of `datasets.read_corpus`; '' where no engine searches it.
    output: JSON lines.
    config: what is kept.
    engines: as of `engines.split`.
    writer: template, endpoint, or the folder of a model.
    prompts: folder of prompts; '': ours.
    data_dir: of prepared sets.
    first: only so many questions, from the first on; 0: all.
    cache: file of answers of endpoint, servers and web search APIs; None: one
      beside the output.
    endpoint: arguments of `language_model.Endpoint`; a model of ours heeds
      max_tokens and temperature, servers and web search APIs wait.
    engine_rate: requests a second to each server and web search API.
    slots: texts that a model of ours writes at once.
    prices: US dollars per million prompt and completion tokens.
    shown: questions that are printed in full at the end.

  Raises:
    ValueError: one paragraph naming flag or file, value and remedy; questions
      that have failed.
  """
  assembly.tune_host()
  specs = engines_lib.split(engines)
  here = [s for s in specs if s.partition(':')[0] not in (
      'http', 'https', *web.APIS)]
  if here and not corpus:
    raise ValueError(
        f'--corpus is missing: {here[0]} searches it. Only servers and web '
        'search APIs have a corpus of their own.')
  documents = datasets.read_corpus(corpus, data_dir) if corpus else []
  examples = datasets.read_questions(
      questions, documents.by_id if corpus else None, directory=data_dir)
  examples = examples[:first or None]
  cache = f'{output.removesuffix(".jsonl")}.answers.db' if cache is None else (
      cache)
  texts = language_model.Prompts(
      search_keys.TASKS, prompts or language_model.PROMPTS)
  writes = _writer(writer, texts, cache, endpoint, slots)
  if isinstance(writes, language_model.Local):
    # It takes its time: about as many sub-questions as it writes at once.
    config = dataclasses.replace(config, block=max(slots // 2, 1))
  made = {}

  def make(name, spec):
    print(f'engine {name}: {spec}', flush=True)
    made[name] = engines_lib.make(
        spec, documents, k=config.k,
        limits=dict(
            cache=cache, per_second=engine_rate, wait=endpoint['wait']),
        known=[d for e in examples for d in e.gold_documents])
    return made[name]

  report = search_keys.run(
      examples, writes, {
          name: functools.partial(make, name, spec)
          for name, spec in zip(_names(specs), specs)}, config, output,
      sources={
          'questions': search_keys.fingerprint(examples),
          'corpus': retriever.corpus_fingerprint(documents) if corpus else '',
          'engines': specs},
      say=lambda line: print(line, flush=True),
      progress=metrics.Progress(1).phase)
  print()
  for line in report.lines():
    print(line)
  if isinstance(writes, language_model.Endpoint):
    _print_cost(writes, report, prices)
  for name, engine in made.items():
    if isinstance(engine, web.WebSearch):
      print(f'{name}, this run: {_requests(engine.counts)}')
  print(f'written to {output} in {report.seconds:.0f} s\n')
  for line in search_keys.examples_to_read(output, shown):
    print(line)
  if report.failed:
    raise ValueError(
        f'{len(report.failed)} of {len(examples)} questions have failed and '
        f'are not in {output}: the report beside it names them. The same '
        'command asks them, and only them, again.')
  print('\nnext: python -m stepsearch.train --config=configs/musique.py '
        f'--config.data.train={output}'
        + (f' --config.data.corpus={corpus}' if corpus else '') + ' …')
  return report


def _writer(name, prompts, cache, options, slots):
  if name == 'template':
    return language_model.Rules()
  if name == 'endpoint':
    return language_model.Endpoint(prompts=prompts, cache=cache, **options)
  if not paths.Path(name).is_dir():
    raise ValueError(
        f'--writer={name}: {" or ".join(_RESERVED)} is expected, or the folder '
        'of a model.')
  # Here, because the others need no model.
  from stepsearch.rollout import generate

  made = generate.Generator(
      name, slots=slots, longest=options['max_tokens'] or 512,
      temperature=options['temperature'] or 0.0)
  settings = dict(
      slots=slots, **{k: options[k] for k in ('max_tokens', 'temperature')})
  return language_model.Local(f'{name} {settings}', made, prompts)


def _names(specs: Sequence[str]) -> list[str]:
  """Short names of engines: without folders, where that tells them apart."""
  kinds = [spec.partition(':')[0] for spec in specs]
  return [
      kind if kinds.count(kind) == 1 else spec
      for kind, spec in zip(kinds, specs)]


def _requests(counts: Mapping[str, int]) -> str:
  return (
      f'{counts["answered"]:,} requests answered, {counts["repeated"]:,} sent '
      f'again after a fault, {counts["cached"]:,} answered by the cache, '
      f'{counts["failed"]:,} failed')


def _print_cost(writes, report, prices) -> None:
  dollars = lambda spent: sum(
      tokens * price / 1e6 for tokens, price in zip(spent, prices))
  all_rows = report.prompt_tokens, report.completion_tokens
  print(
      f'endpoint, this run: {_requests(writes.counts)}; '
      f'{writes.tokens[0]:,} + {writes.tokens[1]:,} tokens paid, '
      f'${dollars(writes.tokens):.4f}; all rows: ${dollars(all_rows):.4f}')
  if not any(prices):
    print('Costs need --price_in and --price_out, dollars per million tokens.')
  if writes.unmetered:
    print(f'{writes.unmetered:,} answers did not say how many tokens they took '
          'and count as none.')


def command() -> Callable[[], None]:
  """Defines the flags; gives what runs once they are parsed."""
  text, number, real = (
      flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
  positive, bounded = dict(lower_bound=1), dict(lower_bound=0)
  questions = text(
      'questions', None, 'Questions, a file or NAME:SPLIT.', required=True)
  corpus = text(
      'corpus', '', 'What engines here search, a file or NAME:corpus.')
  output = text('output', None, 'JSON lines to write.', required=True)
  data_dir = text('data_dir', '', 'Where prepared sets lie, for NAME:SPLIT.')
  first = number(
      'first', 0, 'Take the first so many questions; 0: all.', **bounded)
  engines = text(
      'engines', 'lexical,bm25', 'Joined by commas: lexical, bm25, '
      'dense:ENCODER[@INDEX], fusion:A+B, http://host:port, serper[:URL], '
      'bing[:URL].')
  writer = text(
      'writer', 'template', 'template (rules, no model), endpoint, or the '
      'folder of a model.')
  prompts = text(
      'prompts', '', 'Folder of your own prompts; copy those in '
      'stepsearch/data/prompts.')
  queries = number('queries', 5, 'To write for a sub-question.', **positive)
  k = number('k', 3, 'Passages that an engine is asked for.', **positive)
  valid = flags.DEFINE_enum(
      'valid', 'either', ['gold', 'answer', 'either'], 'What has to be among '
      'them: a gold passage of the sub-question, its answer, or either.')
  rewrite = flags.DEFINE_bool(
      'rewrite', False, "Word the data's own sub-questions anew first.")
  keep = flags.DEFINE_bool(
      'keep_sub_question', False, 'Where no query is kept, let the '
      'sub-question itself be the key; otherwise it has none.')
  tries = number(
      'tries', 3, 'Answers to a request until one can be used.', **positive)
  base_url = text(
      'base_url', 'https://api.openai.com/v1', 'Of an endpoint.')
  model = text('model', '', 'Its name at the endpoint.')
  key = text(
      'key_variable', 'OPENAI_API_KEY', 'Environment variable that holds the '
      'key of the endpoint; empty: it takes none.')
  temperature = real(
      'temperature', None, "Default: the endpoint's own; 0 for a folder.")
  max_tokens = number(
      'max_tokens', 512, 'Of an answer; 0: leave it to the endpoint.',
      **bounded)
  cache = text(
      'cache', None, 'File that keeps all answers; default: beside --output; '
      'empty: none.')
  rate = real(
      'per_second', 0.0, 'Requests a second to the endpoint; 0: any.',
      **bounded)
  engine_rate = real(
      'engine_per_second', 0.0, 'The same to each server and web search API.',
      **bounded)
  concurrency = number(
      'concurrency', 8, 'Requests to the endpoint at once.', **positive)
  timeout = real(
      'timeout', 120.0, 'Seconds for an answer of the endpoint.',
      lower_bound=0.1)
  retries = number('retries', 6, 'Requests after one that fails.', **bounded)
  wait = real(
      'retry_wait', 1.0, 'Seconds before the first of them, also to servers '
      'and web search APIs; doubled for each one more.', **bounded)
  slots = number('slots', 8, 'Texts that a folder writes at once.', **positive)
  prices = [
      real(f'price_{way}', 0.0, f'US dollars per million {kind} tokens.')
      for way, kind in (('in', 'prompt'), ('out', 'completion'))]
  shown = number('show', 3, 'Questions to print in full at the end.')

  def start():
    run(
        questions.value, corpus.value, output.value,
        search_keys.Config(
            queries=queries.value, k=k.value, valid=valid.value,
            rewrite=rewrite.value, keep_sub_question=keep.value,
            tries=tries.value),
        engines=engines.value, writer=writer.value, prompts=prompts.value,
        data_dir=data_dir.value, first=first.value, cache=cache.value,
        endpoint=dict(
            base_url=base_url.value, model=model.value,
            key_variable=key.value, temperature=temperature.value,
            max_tokens=max_tokens.value, per_second=rate.value,
            concurrency=concurrency.value, timeout=timeout.value,
            retries=retries.value, wait=wait.value),
        engine_rate=engine_rate.value, slots=slots.value,
        prices=(prices[0].value, prices[1].value), shown=shown.value)

  return start
