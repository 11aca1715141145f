"""Trains a searcher: `python -m stepsearch.train --config=… --workdir=…`.

    warm-up ─▶ step 0 ─▶ [collect ─▶ score ─▶ make_batch ─▶ update]* ─▶ report

The same command again resumes, bitwise; a finished run says so. SIGTERM stops
a run at the next safe point, with its last finished step saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from typing import Any

import jax
import ml_collections

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import evaluation
from stepsearch import metrics
from stepsearch import paths
from stepsearch import preemption
from stepsearch import report
from stepsearch import sharding
from stepsearch import warmup
from stepsearch.data import loader
from stepsearch.models import qwen
from stepsearch.retrieval import retriever
from stepsearch.rl import rewards as rewards_lib

# What may differ between the runs of one workdir.
_MAY_CHANGE = (
    'topology', 'checkpoint', 'tensorboard', 'profile', 'compilation_cache',
    'offload', 'retriever.url', 'retriever.timeout', 'retriever.retries',
    'retriever.give_up', 'retriever.cache', 'retriever.per_second',
    'retriever.web_url', 'retriever.web_key')


def train(
    config: ml_collections.ConfigDict, workdir: str,
    source: str = '--config=FILE',
) -> dict[str, float] | None:
  """Trains to the end, or on from the last checkpoint.

  Args:
    config: as of configs/default.py.
    workdir: on disk or gs://; receives config.json, metrics.jsonl,
      tensorboard/, index/, model/, reference/, checkpoints/, transcripts/,
      eval.json, learning_curve.png, profile/.
    source: the --config flags, for the command that is shown at the end.

  Returns:
    the final evaluation, as of `evaluation.summary`; None where SIGTERM came
    before it.

  Raises:
    ValueError: a config, file or workdir that cannot work, before any compute;
      a store that cannot be reached.
    FloatingPointError: the run has diverged.
  """
  assembly.tune_host()
  with distributed.first('workdir'):
    root = config_lib.check_workdir(workdir)
  distributed.share(root, 'workdir')
  assembly.agree(config)
  assembly.keep_compiled(config)
  progress = metrics.Progress(config.num_steps)
  if (root / 'config.json').exists() and distributed.index() == 0:
    config_lib.write(config, root, _MAY_CHANGE)
  finished = root / 'eval.json'
  if finished.exists():
    progress.line(f'{root} is a finished run of {config.num_steps} steps.')
  else:
    several = distributed.ask_to_stop, distributed.stop_requested
    with preemption.listening(
        several if distributed.count() > 1 else None) as stop:
      try:
        _train(config, root, progress, stop)
      except preemption.Stopped:
        return None
  stored = json.loads(finished.read_text())
  _conclude(progress, root, stored, source)
  return stored['after']['greedy']


def _train(config, root, progress, stop):
  """All of a run, up to its eval.json."""
  try:
    parts = assembly.build(
        config, root, say=progress.line, on_tick=stop.check)
    # Only now: a config that was refused must not be what a later one is
    # compared with.
    if distributed.index() == 0:
      config_lib.write(config, root, _MAY_CHANGE)
      assembly.write_card(parts, root / 'model')
  except preemption.Stopped:
    progress.line('stopped: the same command begins where this one did')
    raise
  with contextlib.ExitStack() as stack:
    if paths.is_remote(root):
      stack.enter_context(paths.explained(root))
    run = _Run(parts, root, progress, stop, stack)
    try:
      run.begin()
      while run.done < config.num_steps:
        run.step()
        run.after_step()
      run.finish()
    except KeyboardInterrupt:
      progress.line(f'interrupted: the same command {run.resumes()}')
      raise
    except preemption.Stopped:
      run.keep()
      progress.line(f'stopped: the same command {run.resumes()}')
      raise
    except retriever.Unavailable as error:
      run.keep()
      raise ValueError(
          f'{error} The same command {run.resumes()}.') from error


class _Run:
  """A run under way: its state, and what it writes and shows.

  Attributes:
    done: finished steps, of which `state` is the result. Whoever stops a run
      does so where this holds.
  """

  def __init__(self, parts, root, progress, stop, stack):
    config = parts.config
    self._config, self._parts, self._root = config, parts, root
    self._progress, self._stop = progress, stop
    key = jax.random.key(config.seed)
    self._init_key, self._rollout_key, self._update_key, self._eval_key = (
        jax.random.fold_in(key, i) for i in range(4))
    self._each = config.rollouts_per_question
    self._questions = loader.Loader(
        parts.train, config.batch_size // self._each, config.seed)
    self._writes = distributed.index() == 0
    self._timer = metrics.Timer()
    self._delayed = metrics.Delayed()
    self._host: dict[int, dict[str, float]] = {}  # step -> its host metrics
    self._store = stack.enter_context(checkpoints.Checkpoints(
        root / 'checkpoints', keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best))
    self._writer = stack.enter_context(contextlib.closing(
        metrics.Writer(root, config.tensorboard)))
    self._profile = stack.enter_context(contextlib.closing(
        metrics.Profile(config.profile.steps, root / 'profile')))
    self.state: Any = None
    self.done = 0
    self._saved: int | None = None  # step of the newest checkpoint
    self._final: dict[str, Any] | None = None  # the last step's evaluation

  # -- the beginning -----------------------------------------------------------

  def begin(self):
    """Step 0, the warmed-up policy and reference; or the last checkpoint."""
    learner, root = self._parts.learner, self._root
    first = self._store.latest()
    if first is None:
      params = _step_zero(
          self._parts, root, self._init_key, self._progress, self._timer,
          self._stop)
      self._stop.deferred = True  # from now on there is something to keep
      self.state = learner.start(
          params, jax.random.fold_in(self._init_key, 1))
      self._reference = learner.freeze(params)
      del params
      self._writer.cut_back(-1)
      found, row = self._evaluate(ends=True)
      _print_means(self._progress, 'after warm-up', found)
      self._writer.write(0, row | self._timer.flush())
      self._writer.flush()
      self._write(root / 'before.json', json.dumps(found, indent=2))
      self._save(found['greedy'])
    else:
      like = learner.shapes
      self.state, _ = self._store.restore(like)
      self._stop.deferred = True
      self._reference = learner.freeze(checkpoints.restore_once(
          root / 'reference', _step_zero_like(self._parts)))
      self.done = self._saved = first
      self._writer.cut_back(first)
      distributed.barrier('cut back')
      self._progress.line(f'resumed {root} at step {first}')
      self._catch_up()
    known = [
        row['eval/em'] for row in metrics.read(root / 'metrics.jsonl')
        if 'eval/em' in row]
    self._progress.start(known[-1] if known else None)

  def _catch_up(self):
    """The evaluation that the run was stopped in, or ended without."""
    rows = metrics.read(self._root / 'metrics.jsonl')
    if not rows:
      raise ValueError(
          f'{self._root / "metrics.jsonl"} has no row of step {self.done}, '
          'which is saved: restore the file, or choose another --workdir.')
    row = rows[-1]
    missing = self._due() and 'eval/em' not in row
    last = self.done == self._config.num_steps
    if missing or last:
      found, row = self._evaluate(ends=last)
      if missing:
        self._writer.amend(row)
      self._final = found if last else None

  # -- a step ------------------------------------------------------------------

  def step(self):
    """Takes a step, traced where config.profile.steps says so."""
    with self._timer.section('update'):  # the rollout would wait for it anyway
      jax.block_until_ready(self.state.actor.params)
    with self._profile.step(self.done + 1, lambda: self.state):
      self._play_and_learn()

  def _play_and_learn(self):
    """Plays the questions of a step and learns from what was played."""
    step, parts, timer = self.done, self._parts, self._timer
    examples = [
        example for example in self._questions.batch(step)
        for _ in range(self._each)]
    failed, start = parts.retriever.failed, time.perf_counter()
    with timer.section('rollout'):
      trajectory, transcripts = parts.collect(
          parts.learner.policy(self.state, self._reference), examples,
          jax.random.fold_in(self._rollout_key, step))
    seconds = time.perf_counter() - start
    with timer.section('reward'):
      scores = parts.score(examples, transcripts)
      sampled = int(trajectory.loss_mask.sum())
      trajectory, rewards = sharding.shard_batch(
          (trajectory, rewards_lib.place(
              scores, trajectory.loss_mask, trajectory.turn_ends)),
          parts.update)
    self._stop.check()
    with timer.section('update'):
      batch, target_metrics = parts.learner.make_batch(
          self.state, self._reference, trajectory, rewards)
      self.state, update_metrics = parts.learner.update(
          self.state, batch, jax.random.fold_in(self._update_key, step),
          self._reference)
    self.done = step + 1
    self._host[self.done] = evaluation.rollout_metrics(
        transcripts, scores, sampled, seconds)
    self._host[self.done] |= parts.collect.metrics | {
        'rollout/failed_searches': parts.retriever.failed - failed}
    self._show(self._record(
        self._delayed.push(self.done, target_metrics | update_metrics)))

  def after_step(self):
    """What is due after a step: its evaluation, its row, a checkpoint."""
    config, done = self._config, self.done
    last = done == config.num_steps
    keep = last or done % config.checkpoint.every == 0
    row = found = None
    if keep or self._due():
      with self._timer.section('update'):
        row = self._record(self._delayed.drain())
    if self._due():
      found, scores = self._evaluate(ends=last)
      self._writer.write(done, scores)
      self._final = found if last else None
    self._show(row, found and found['greedy']['em'])
    self._writer.write(done, self._timer.flush())
    self._writer.flush(done - 1 if done in self._host else done)
    if keep:
      self._save(found and found['greedy'])
    if not last:
      self._stop.check()

  def _due(self):
    """Whether the step that is done is one to be evaluated."""
    return self.done == self._config.num_steps or (
        self.done % self._config.eval.every == 0)

  def _evaluate(self, ends):
    """Plays the held-out questions; sampled too, at both ends of the run.

    Returns:
      the summaries by kind, and the metrics that go into the step's row.
    """
    config, parts = self._config, self._parts
    found, metrics_row = {}, {}
    kinds = ('greedy', 'sampled') if ends and config.eval.sampled else (
        'greedy',)
    for kind in kinds:
      failed = parts.retriever.failed
      with self._timer.section('eval'):
        found[kind], rows = evaluation.evaluate(
            parts.collect, parts.score,
            parts.learner.policy(self.state, self._reference), parts.eval,
            config.eval.batch_size,
            jax.random.fold_in(self._eval_key, self.done),
            greedy=kind == 'greedy')
      self._write(
          self._root / 'transcripts' / f'step_{self.done:06d}_{kind}.jsonl',
          '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows))
      prefix = 'eval' if kind == 'greedy' else 'eval_sampled'
      shown = found[kind] | {
          'failed_searches': parts.retriever.failed - failed}
      metrics_row |= {f'{prefix}/{name}': x for name, x in shown.items()}
    return found, metrics_row

  def _record(self, ready):
    """Writes the row of a step whose device metrics are there.

    Returns:
      what `_show` shows of it; None without a step.
    """
    if ready is None:
      return None
    step, values = ready
    metrics.check_finite(step, values, self._root, self._saved)
    row = self._host.pop(step)
    self._writer.write(step, values | row)
    return step, {
        'answer': row['reward/answer'], 'key': row['reward/search_key'],
        'gain': row['reward/information_gain'],
        'redundancy': row['reward/redundancy']}, row['rollout/tokens_per_s']

  def _show(self, row, em=None):
    if row is not None:
      self._progress.step(*row, em)

  # -- what is kept ------------------------------------------------------------

  def _save(self, found=None):
    """Starts to save the finished step, with its evaluation if it has one."""
    with self._timer.section('checkpoint'):
      self._store.save(
          self.done, self.state,
          {'step': self.done,
           'next_example': self.done * self._config.batch_size // self._each,
           'config': json.loads(config_lib.to_json(self._config)),
           'model': dataclasses.asdict(self._parts.model)},
          {'eval/em': found['em']} if found else None)
    self._saved = self.done

  def keep(self):
    """Saves the last finished step, unless it is, and waits for it.

    Before the first checkpoint the reference is all that is kept.
    """
    if self._saved is not None and self.done > self._saved:
      self._show(self._record(self._delayed.drain()))
      self._writer.flush(self.done)
      self._save()
    self._store.wait()

  def resumes(self):
    """How the same command goes on."""
    saved = self._store.latest()
    if saved is not None:
      return f'goes on from step {saved}, which is saved'
    if checkpoints.exists_once(self._root / 'reference'):
      return 'goes on from the warmed-up policy, which is saved'
    return 'starts anew'

  def finish(self):
    """Leaves the learning curve and eval.json."""
    if self._final is None:  # there was no step to take
      self._final, _ = self._evaluate(ends=True)
    self._store.wait()
    root = self._root
    if self._writes:
      report.learning_curve(
          metrics.read(root / 'metrics.jsonl'), root / 'learning_curve.png')
      self._write(root / 'eval.json', json.dumps({
          'before': json.loads((root / 'before.json').read_text()),
          'after': self._final, 'dtype': self._config.model.dtype}, indent=2))
    distributed.barrier('finished')

  def _write(self, path, text):
    """Writes a file that all processes could: one of them does."""
    if self._writes:
      paths.write(path, text + '\n')


def _step_zero(parts, root, key, progress, timer, stop):
  """The warmed-up policy; stored, since it is the reference of the run."""
  config = parts.config
  reference_path = root / 'reference'
  if checkpoints.exists_once(reference_path):
    return checkpoints.restore_once(reference_path, _step_zero_like(parts))
  params = assembly.parameters(parts, key)
  if config.warmup.steps:
    with timer.section('warmup'):
      demonstrations = assembly.demonstrations(parts)
      with progress.phase('warm-up', config.warmup.steps) as tick:

        def on_step(step, row):
          tick(step, loss=row['warmup/loss'])
          stop.check()  # its updates are few: it would start anew

        params = warmup.train(
            params, demonstrations, parts.model,
            warmup.Config(**config.warmup.to_dict()), parts.update, config.seed,
            length_multiple=config.rollout.length_multiple,
            logprob_chunk=config.ppo.logprob_chunk,
            augment=assembly.renames(parts), on_step=on_step)
  checkpoints.save_once(reference_path, params)
  return params


def _step_zero_like(parts):
  """Shapes and shardings of what is stored of step 0."""
  return sharding.shapes(
      jax.eval_shape(lambda: qwen.init(parts.model, jax.random.key(0))),
      parts.update.place(qwen.axes(parts.model)[0]))


def _print_means(progress, when, found):
  for kind, row in found.items():
    progress.line(
        f'{when}, {kind}: EM {row["em"]:.3f}  F1 {row["f1"]:.3f}  searches '
        f'{row["searches"]:.2f}  ({row["questions"]:.0f} questions)')


def _conclude(progress, root, stored, source):
  """The table, and what to try next."""
  mismatch = max((
      row['ppo/sampler_mismatch']
      for row in metrics.read(root / 'metrics.jsonl')
      if row.get('ppo/sampler_mismatch') is not None), default=0.0)
  progress.line(
      f'\nrecorded and recomputed log-probs differ by at most {mismatch:.1e}')
  if stored['dtype'] == 'float32' and mismatch > 1e-4:
    progress.line(
        'that is more than 1e-4: do not believe what follows before it is '
        'explained')
  for kind in stored['after']:
    progress.line(f'\nheld-out questions, {kind}:')
    progress.line(report.table(stored['before'][kind], stored['after'][kind]))
  progress.line(
      f'\nplot: {root / "learning_curve.png"}   transcripts: '
      f'{root / "transcripts"}')
  progress.line(
      f'next:  python -m stepsearch.evaluate {source} '
      f'--checkpoint={shlex.quote(str(root))} --output='
      f'{shlex.quote(str(root / "evaluation"))}')
  progress.line(
      'or:    python -m stepsearch.export --checkpoint='
      f'{shlex.quote(str(root))} --output='
      f'{shlex.quote(str(root / "exported"))}')


if __name__ == '__main__':
  from absl import flags

  _WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Where everything of this run is kept.', required=True)
  _JOINED = distributed.define_flags()

  def _main(config):
    with _JOINED():
      train(config, _WORKDIR.value, shlex.join(
          argument for argument in sys.argv[1:]
          if not argument.lstrip('-').startswith(
              ('workdir', *distributed.FLAGS))))

  config_lib.main(_main)
