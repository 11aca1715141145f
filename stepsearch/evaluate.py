"""Evaluates a checkpoint: greedy, every question exactly once.

    python -m stepsearch.evaluate --config=… --checkpoint=WORKDIR --output=DIR
        --datasets=musique,hotpotqa --corpus=corpora/{dataset}.jsonl

The checkpoint is the workdir of a run, or a Hugging Face folder: a pretrained
model, or what `export` wrote. Writes DIR/eval.json, numbers by set and what
they were measured with, and DIR/transcripts.jsonl, a line a question, while it
plays; the same command again plays what is missing. Without --datasets the
held-out questions of the config are played, as training plays them.

`python -m stepsearch.evaluate retrieval` measures search engines alone,
`… compare` puts evaluations beside published numbers, and `… transcripts`
scores stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import time
from typing import Any

import jax
import ml_collections

from stepsearch import assembly
from stepsearch import benchmark
from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import engine as engine_lib
from stepsearch import evaluate_retrieval
from stepsearch import evaluate_stored
from stepsearch import evaluation
from stepsearch import methods as methods_lib
from stepsearch import metrics
from stepsearch import paths
from stepsearch import types
from stepsearch.data import datasets as datasets_lib
from stepsearch.data import prepared
from stepsearch.retrieval import retriever as retriever_lib

Results = dict[str, dict[str, Any]]


def evaluate(
    config: ml_collections.ConfigDict, checkpoint: str, output: str,
    step: int | None = None, *, sampled: bool = False,
) -> dict[str, dict[str, float]]:
  """Plays the held-out questions of the config with a trained actor.

  Args:
    config: of the run; its held-out questions and engine are used. What the
      model is and its tokenizer are read from the run.
    checkpoint: the workdir of a run, or its checkpoints folder; or a Hugging
      Face folder, on disk or gs://.
    output: on disk or gs://; receives eval.json and transcripts.jsonl.
    step: of the checkpoint; the newest by default.
    sampled: at T = config.rollout.temperature instead of greedy.

  Returns:
    `evaluation.summary` by dataset, and over all of them as 'all'.

  Raises:
    ValueError: no such checkpoint, or one of another shape; a bad config.
  """
  source, out = _begin(
      config, checkpoint, output, step=step, sampled=sampled)
  progress = metrics.Progress(0)
  parts = source.build(config, out, say=progress.line)
  key = jax.random.key(config.seed)
  params, step = source.actor(parts, key)
  name = str(source.root) if step is None else f'step {step} of {source.root}'

  with progress.phase('questions', len(parts.eval)) as tick:
    _, rows = evaluation.evaluate(
        parts.collect, parts.score, params, parts.eval,
        config.eval.batch_size, key, greedy=not sampled,
        on_batch=lambda rows: tick(
            len(rows), em=evaluation.summary(rows)['em']))
  results = {
      name: evaluation.summary([r for r in rows if r['dataset'] == name])
      for name in sorted({r['dataset'] for r in rows})}
  results['all'] = evaluation.summary(rows)
  if distributed.index() == 0:
    paths.write(out / 'transcripts.jsonl', benchmark.lines(rows))
    paths.write(out / 'eval.json', json.dumps(
        {'checkpoint': str(source.root), 'step': step,
         'decoding': 'sampled' if sampled else 'greedy', 'results': results},
        indent=2) + '\n')
  progress.line(name)
  _warn(parts.retriever.failed, progress)
  for name, found in results.items():
    progress.line(
        f'{name:>12}: EM {found["em"]:.3f}  F1 {found["f1"]:.3f}  searches '
        f'{found["searches"]:.2f}  gold recall {found["gold_recall"]:.3f}  '
        f'({found["questions"]:.0f} questions)')
  progress.line(f'written: {out / "eval.json"}, {out / "transcripts.jsonl"}')
  return results


def _begin(config, checkpoint, output, **flags):
  """What is played, and a folder that can be written."""
  assembly.tune_host()
  source = assembly.Checkpoint(checkpoint, flags['step'])
  with distributed.first('output'):
    out = config_lib.check_workdir(output, 'output')
  distributed.share(out, 'output')
  assembly.agree(config, checkpoint=checkpoint, **flags)
  return source, out


def _warn(failed, progress):
  if failed:
    progress.line(
        f'{failed} searches failed and found nothing: what follows is too low')


# ── Benchmarks ───────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Set:
  """Questions that are asked, and what is searched for them."""

  name: str
  examples: list[types.Example]
  engine: retriever_lib.Engine
  settings: dict[str, Any]  # for eval.json


def run_benchmarks(
    config: ml_collections.ConfigDict, checkpoint: str, output: str,
    sources: Sequence[str], corpus: str = '', step: int | None = None, *,
    methods: Sequence[str] = (methods_lib.AGENT,), questions: int = 0,
    prompt: str = '', system: str = '', sampled: bool = False,
) -> dict[str, Results]:
  """Plays sets of questions by one or several methods.

  Args:
    config: of the run, as of `evaluate`; of data its directory of prepared
      sets counts, and the corpus where none is given.
    checkpoint: as of `evaluate`.
    output: on disk or gs://; receives eval.json and transcripts.jsonl, of
      several methods each in a folder of its own.
    sources: of the questions, as of `data.datasets.read_questions`; a bare name
      is the development split of a prepared set.
    corpus: of passages, as of `data.datasets.read_corpus`; '{dataset}' in it
      stands for the name of a set, which then has its own. config.data.corpus
      by default.
    step: of the checkpoint; the newest by default.
    methods: of `stepsearch.methods`.
    questions: of each set, drawn with config.seed; 0: all.
    prompt: a text file that takes the place of the prompt of the one method.
    system: a text file with a system message for it.
    sampled: at T = config.rollout.temperature instead of greedy.

  Returns:
    by method and set, `benchmark.measure`.

  Raises:
    ValueError: as of `evaluate`; the output is of another evaluation.
  """
  source, out = _begin(
      config, checkpoint, output, step=step, sampled=sampled,
      sources=list(sources), corpus=corpus, methods=list(methods),
      questions=questions, prompt=prompt, system=system)
  begun = time.monotonic()
  progress = metrics.Progress(0)
  player = source.player(config, say=progress.line)
  chosen = _methods(methods, prompt, system, player, config)
  sets = _sets(
      config, sources, corpus or config.data.corpus, questions, out,
      progress.line)
  current: list[Set] = []
  collectors = {}
  for name, method in chosen.items():
    collectors[name] = player.collector(
        method.protocol,
        lambda queries, k: current[0].engine.search(queries, k))
    collectors[name].prepare(e.question for s in sets for e in s.examples)
  key = jax.random.key(config.seed)
  params, step = source.actor(player, key)

  shared = _settings(config, source, step, player, sets, sampled)
  distributed.agree('evaluation', shared)
  records = {}
  auto = 'on' if player.tokenizer.chats else 'off'
  for name, method in chosen.items():
    chat = collectors[name].chat
    records[name] = benchmark.Record(
        out / name if len(chosen) > 1 else out,
        {'method': name, 'does': method.does, 'differs': method.differs,
         'prompt': method.protocol.instruction,
         'chat': auto if chat == 'auto' else chat,
         'system': method.protocol.system, 'prompt_file': prompt or None
         } | shared)
  ends = [
      player.tokenizer.byte_strings[i].decode()
      for i in player.tokenizer.eos_ids]
  shards = player.decode.shards
  most = min(config.eval.batch_size, max(len(s.examples) for s in sets))
  size = -(-most // shards) * shards  # one for all sets, to compile once
  for one in sets:
    current[:] = [one]
    for name, collect in collectors.items():
      if not records[name].finished:
        _play(
            one, collect, chosen[name].protocol, params, key, records[name],
            size, ends, sampled, progress)
  results = {
      name: record.finish(config.seed, time.monotonic() - begun)
      for name, record in records.items()}
  _warn(sum(record.failed for record in records.values()), progress)
  for line in benchmark.table(results):
    progress.line(line)
  progress.line('written: ' + ', '.join(
      str(record.folder / 'eval.json') for record in records.values()))
  return results


def _methods(names, prompt, system, player, config):
  for name in names or ['']:
    methods_lib.make(name)  # a name that is none is said so first
  config_lib.require(
      config.rollout.protocol == 'full' or list(names) == [methods_lib.AGENT],
      'rollout.protocol', config.rollout.protocol,
      f'only --method={methods_lib.AGENT} can do with the short texts: set it '
      'to full, with a model of real language.')
  if len(set(names)) < len(names):
    raise ValueError(f'--method={",".join(names)}: each only once.')
  if (prompt or system) and len(names) > 1:
    raise ValueError(
        f'--prompt={prompt} --system_prompt={system}: these are of one method, '
        f'but --method names {len(names)}.')
  texts = []
  for path in (prompt, system):
    with paths.explained(path):
      texts.append(paths.Path(path).read_text() if path else '')
  if config.rollout.protocol == 'short':
    if any(texts):
      raise ValueError(
          f'--prompt={prompt} --system_prompt={system}: a policy with '
          'config.rollout.protocol = short knows no other prompt.')
    method = methods_lib.make(methods_lib.AGENT)
    return {methods_lib.AGENT: dataclasses.replace(
        method, protocol=player.protocol)}
  return {name: methods_lib.make(name, *texts) for name in names}


def _sets(config, sources, corpus, questions, out, say) -> list[Set]:
  """Reads all questions and makes all engines, before anything is played."""
  remote = config.retriever.url or config.retriever.web
  config_lib.require(
      corpus or remote, 'data.corpus', corpus,
      'name the passages that are searched: --corpus=FILE.')
  read: dict[str, Any] = {}  # sets by name
  passages: dict[str, Any] = {}  # by where they are
  for source in sources:
    if source in prepared.CONFIGS:
      source += ':test' if source == 'bamboogle' else ':dev'
    with paths.explained(source):
      there = prepared.parse(source) or paths.Path(source).exists()
    if not there:
      raise ValueError(
          f'--datasets={source}: there is no such file, and no set of this '
          f'name; sets are {", ".join(prepared.CONFIGS)}, or with a split, '
          'such as musique:dev.')
    name = datasets_lib.name(source)
    if name in read:
      raise ValueError(
          f'--datasets names {name} twice: evaluate them one after the other.')
    where = corpus.replace('{dataset}', name)
    if where and where not in passages:
      passages[where] = datasets_lib.read_corpus(where, config.data.directory)
    examples = datasets_lib.read_questions(
        source, passages[where].by_id if where else None, dataset=name,
        directory=config.data.directory)
    asked = benchmark.sample(examples, questions, config.seed)
    say(f'{name}: {len(asked):,} of {len(examples):,} questions of {source}')
    read[name] = source, where, len(examples), asked
  engines: dict[str, Any] = {}
  sets = []
  for name, (source, where, size, asked) in read.items():
    documents = passages.get(where, ())
    if where not in engines:
      datasets_lib.check(
          [], None if remote else documents, turn_rewards=False,
          k=config.rollout.k)
      of_set = config.copy_and_resolve_references()
      folder = config.retriever.directory or str(
          out / 'index' / ('{dataset}' if '{dataset}' in corpus else ''))
      of_set.retriever.directory = folder.replace('{dataset}', name)
      engines[where] = engine_lib.build(of_set, documents, out, say, [
          document for _, other, _, examples in read.values() if other == where
          for e in examples for document in e.gold_documents])
    engine = engines[where]
    fingerprint = getattr(engine, 'corpus', None)
    if fingerprint is None and documents:
      fingerprint = retriever_lib.corpus_fingerprint(documents)
    known = prepared.parse(source)
    sets.append(Set(name, asked, engine, {
        'questions': source, 'split': known.split if known else None,
        'size': size, 'asked': len(asked),
        'drawn_with_seed': config.seed if len(asked) < size else None,
        'f1_rule': benchmark.f1_rule(name),
        'digest': assembly.digest([(e.id, e.question) for e in asked]),
        'corpus': where or remote, 'passages': len(documents) or None,
        'corpus_fingerprint': fingerprint}))
  return sets


def _settings(config, source, step, player, sets, sampled) -> dict[str, Any]:
  """What the numbers of all methods depend on, for eval.json."""
  decoding = {'kind': 'greedy'}
  if sampled:
    decoding = {'kind': 'sampled', 'seed': config.seed} | {
        name: config.rollout[name]
        for name in ('temperature', 'top_p', 'top_k')}
  return {
      'checkpoint': str(source.root), 'step': step,
      'fingerprint': source.fingerprint(step), 'decoding': decoding,
      'budgets': {name: config.rollout[name] for name in (
          'k', 'max_turns', 'prompt_length', 'response_length',
          'observation_length', 'max_length')},
      'retriever': config.retriever.to_dict(),
      'computed_in': player.model.dtype,
      'averaging': 'plain mean over questions, whatever their hops',
      'datasets': {s.name: s.settings for s in sets},
      'versions': assembly.versions()}


def _play(
    one: Set, collect: Any, protocol: Any, params: Any, key: jax.Array,
    record: benchmark.Record, size: int, ends: Sequence[str], sampled: bool,
    progress: metrics.Progress,
) -> None:
  """Plays what is missing of a set, each question once."""
  count = len(one.examples)
  if sampled:  # which draws a question gets follows from its batch
    record.cut(one.name, count, size)
  todo = [n for n in range(count) if n not in record.done(one.name)]
  if not todo:
    return
  before = count - len(todo)
  failed = lambda: getattr(one.engine, 'failed', 0)
  counted = failed()
  with progress.phase(
      f'{one.name} {record.settings["method"]}', len(todo)) as tick:
    for start in range(0, len(todo), size):
      numbers = todo[start:start + size]
      # Filled up by repeats that do not count, so that nothing is compiled.
      batch = [one.examples[numbers[i % len(numbers)]] for i in range(size)]

      def ended(i, transcript, tokens, numbers=numbers, batch=batch):
        nonlocal counted
        if i >= len(numbers):
          return
        row = benchmark.row(
            batch[i], transcript, tokens, protocol, ends, collect.config.k)
        now = failed()
        record.add(numbers[i], row | {'failed_searches': now - counted})
        counted = now
        tick(len(record.done(one.name)) - before,
             em=record.running_em(one.name))

      collect(
          params, batch, key, first_episode=numbers[0], greedy=not sampled,
          on_end=ended)
      record.flush()


def _command(argv: Sequence[str]) -> None:
  """The command without a name: its flags, then what they ask for."""
  from absl import flags

  checkpoint = flags.DEFINE_string(
      'checkpoint', None,
      'Workdir of the training run, or a Hugging Face folder.',
      required=True)
  output = flags.DEFINE_string(
      'output', None, 'Where eval.json and transcripts.jsonl go.',
      required=True)
  step = flags.DEFINE_integer(
      'step', None, 'Step of the checkpoint; the newest by default.')
  sampled = flags.DEFINE_bool(
      'sampled', False, 'Sample at rollout.temperature instead of greedy.')
  datasets = flags.DEFINE_list(
      'datasets', [], 'Sets of questions: files, or prepared sets such as '
      'musique (musique:dev). Without it: the held-out ones of the config.')
  corpus = flags.DEFINE_string(
      'corpus', '', 'Passages of --datasets; {dataset} in it stands for the '
      'name of each. config.data.corpus by default.')
  method = flags.DEFINE_list(
      'method', [methods_lib.AGENT], 'How --datasets are answered, one or '
      'several: ' + '; '.join(
          f'{name} {method.does}'
          for name, method in methods_lib.METHODS.items()) + '.')
  questions = flags.DEFINE_integer(
      'questions', 0, 'Questions of each of --datasets, drawn with '
      'config.seed; 0: all.', lower_bound=0)
  prompt = flags.DEFINE_string(
      'prompt', '', 'Text file with {question}: the prompt of the --method.')
  system_prompt = flags.DEFINE_string(
      'system_prompt', '', 'Text file: the system message of the --method, '
      'instead of the one in the chat template.')
  compare = flags.DEFINE_bool(
      'compare', False, 'Also write comparison.md: the numbers of --datasets '
      'beside published ones, and what was measured differently.')
  data_dir = flags.DEFINE_string(
      'data_dir', '', 'Of prepared sets; config.data.directory by default.')
  joined = distributed.define_flags()

  def main(config):
    with joined():
      if data_dir.value:
        with config.unlocked():
          config.data.directory = data_dir.value
      if datasets.value:
        run_benchmarks(
            config, checkpoint.value, output.value, datasets.value,
            corpus.value, step.value, methods=method.value,
            questions=questions.value, prompt=prompt.value,
            system=system_prompt.value, sampled=sampled.value)
        if compare.value and distributed.index() == 0:
          folders = [paths.Path(output.value)]
          if len(method.value) > 1:
            folders = [folders[0] / name for name in method.value]
          table = evaluate_stored.compare(folders)
          print(f'\n{table}', end='', flush=True)
          paths.write(paths.Path(output.value) / 'comparison.md', table)
        return
      for name in (
          'corpus', 'method', 'questions', 'prompt', 'system_prompt',
          'compare'):
        if flags.FLAGS[name].present:
          raise ValueError(
              f'--{name}={flags.FLAGS[name].value}: this is of --datasets, '
              'which is not given.')
      evaluate(
          config, checkpoint.value, output.value, step.value,
          sampled=sampled.value)

  config_lib.main(
      main, argv=argv, otherwise=lambda overrides: assembly.Checkpoint(
          checkpoint.value).config(overrides))


if __name__ == '__main__':
  config_lib.commands(
      {'retrieval': evaluate_retrieval.command,
       'compare': evaluate_stored.compare_command,
       'transcripts': evaluate_stored.transcripts_command},
      otherwise=_command)
