"""Trains a searcher: `python -m stepsearch.train --config=… --workdir=…`.

    warm-up ─▶ step 0 ─▶ [collect ─▶ score ─▶ make_batch ─▶ update]* ─▶ report

The same command again resumes, bitwise; a finished run says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import time

import jax
import ml_collections

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import evaluation
from stepsearch import metrics
from stepsearch import report
from stepsearch import sharding
from stepsearch import warmup
from stepsearch.data import loader
from stepsearch.models import qwen
from stepsearch.retrieval import retriever
from stepsearch.rl import rewards as rewards_lib

# What may differ between the runs of one workdir.
_MAY_CHANGE = (
    'checkpoint', 'tensorboard', 'compilation_cache', 'retriever.url',
    'retriever.timeout', 'retriever.retries', 'retriever.give_up')


def train(
    config: ml_collections.ConfigDict, workdir: str,
    source: str = '--config=FILE',
) -> dict[str, float]:
  """Trains to the end, or on from the last checkpoint.

  Args:
    config: as of configs/default.py.
    workdir: receives config.json, metrics.jsonl, tensorboard/, index/,
      model/, reference/, checkpoints/, transcripts/, eval.json,
      learning_curve.png.
    source: the --config flags, for the command that is shown at the end.

  Returns:
    the final evaluation, as of `evaluation.summary`.

  Raises:
    ValueError: a config, file or workdir that cannot work, before any compute.
    FloatingPointError: the run has diverged.
  """
  assembly.tune_host()
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
  if '://' in workdir:
    raise ValueError(
        f'--workdir={workdir}: a local directory is needed; copy it to the '
        'object store afterwards.')
  root = pathlib.Path(config_lib.check_workdir(workdir))
  if (root / 'config.json').exists():
    config_lib.write(config, root, _MAY_CHANGE)
  progress = metrics.Progress(config.num_steps)
  finished = root / 'eval.json'
  if finished.exists():
    stored = json.loads(finished.read_text())
    progress.line(f'{root} is a finished run of {config.num_steps} steps.')
    _conclude(progress, root, stored, source)
    return stored['after']['greedy']

  parts = assembly.build(config, root, say=progress.line)
  learner = parts.learner
  # Only now: a config that was refused must not be what a later one is
  # compared with.
  config_lib.write(config, root, _MAY_CHANGE)
  assembly.write_card(parts, root / 'model')
  key = jax.random.key(config.seed)
  init_key, rollout_key, update_key, eval_key = (
      jax.random.fold_in(key, i) for i in range(4))
  each = config.rollouts_per_question
  questions = loader.Loader(
      parts.train, config.batch_size // each, config.seed,
      jax.process_index(), jax.process_count())
  timer = metrics.Timer()

  with contextlib.ExitStack() as stack:
    store = stack.enter_context(checkpoints.Checkpoints(
        root / 'checkpoints', keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best))
    writer = stack.enter_context(contextlib.closing(
        metrics.Writer(root, config.tensorboard)))

    def interrupted(kind, *_):
      if kind is KeyboardInterrupt:
        saved = store.latest()
        progress.line(
            'interrupted: the same command '
            + ('starts anew' if saved is None else f'goes on from step {saved}')
        )

    stack.push(interrupted)

    def evaluated(step, params, ends, record=True):
      """Plays the held-out questions; sampled too, at both ends of the run."""
      found = {}
      kinds = ('greedy', 'sampled') if ends and config.eval.sampled else (
          'greedy',)
      for kind in kinds:
        failed = parts.retriever.failed
        with timer.section('eval'):
          try:
            found[kind], rows = evaluation.evaluate(
                parts.collect, parts.score, params, parts.eval,
                config.eval.batch_size, jax.random.fold_in(eval_key, step),
                greedy=kind == 'greedy')
          except retriever.Unavailable as error:
            raise ValueError(
                f'{error} That was in the evaluation of step {step}: the same '
                'command goes on from the last checkpoint.') from error
        _write_rows(
            root / 'transcripts' / f'step_{step:06d}_{kind}.jsonl', rows)
        if record:
          prefix = 'eval' if kind == 'greedy' else 'eval_sampled'
          shown = found[kind] | {
              'failed_searches': parts.retriever.failed - failed}
          writer.write(
              step, {f'{prefix}/{name}': x for name, x in shown.items()})
      return found

    def saved(step, state, found):
      with timer.section('checkpoint'):
        store.save(
            step, state,
            {'step': step, 'next_example': step * config.batch_size // each,
             'config': json.loads(config_lib.to_json(config)),
             'model': dataclasses.asdict(parts.model)},
            {'eval/em': found['em']} if found else None)

    # -- step 0: the warmed-up policy, which is also the reference -------------
    first = store.latest()
    if first is None:
      params, reference = _step_zero(
          parts, learner, root, init_key, progress, timer)
      state = learner.start(params)
      writer.cut_back(-1)
      found = evaluated(0, state.actor.params, True)
      _show(progress, 'after warm-up', found)
      writer.write(0, timer.flush())
      writer.flush()
      _write_json(root / 'before.json', found)
      saved(0, state, found['greedy'])
      first = 0
    else:
      like = jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
          jax.eval_shape(learner.init, init_key), learner.shardings)
      state, _ = store.restore(like)
      reference = checkpoints.restore_once(
          root / 'reference', like.actor.params)
      writer.cut_back(first)
      progress.line(f'resumed {root} at step {first}')

    # -- StePPO ----------------------------------------------------------------
    delayed = metrics.Delayed()
    host: dict[int, dict[str, float]] = {}
    last_saved = [first]

    def report_step(ready, em=None):
      """Writes and shows the device metrics of a step that has finished."""
      if ready is None:
        return
      step, values = ready
      metrics.check_finite(step, values, root, last_saved[0])
      row = host.pop(step)
      writer.write(step, values | row)
      shown = {'answer': row['reward/answer'], 'key': row['reward/search_key'],
               'gain': row['reward/information_gain'],
               'redundancy': row['reward/redundancy']}
      progress.step(step, shown, row['rollout/tokens_per_s'], em)

    known = [
        row['eval/em'] for row in metrics.read(root / 'metrics.jsonl')
        if 'eval/em' in row]
    progress.start(known[-1] if known else None)
    final = None
    for step in range(first, config.num_steps):
      batch_examples = [
          example for example in questions.batch(step) for _ in range(each)]
      with timer.section('update'):  # the rollout would wait for it anyway
        jax.block_until_ready(state.actor.params)
      start = time.perf_counter()
      with timer.section('rollout'):
        failed = parts.retriever.failed
        try:
          trajectory, transcripts = parts.collect(
              state.actor.params, batch_examples,
              jax.random.fold_in(rollout_key, step))
        except retriever.Unavailable as error:
          if step > last_saved[0]:
            report_step(delayed.drain())
            writer.flush(step)
            saved(step, state, None)
          raise ValueError(
              f'{error} What was learnt up to step {step} is saved, and the '
              'same command goes on from there.') from error
      seconds = time.perf_counter() - start
      with timer.section('reward'):
        scores = parts.score(batch_examples, transcripts)
        mask, turn_ends = jax.device_get(
            (trajectory.loss_mask, trajectory.turn_ends))
        rewards = sharding.shard_batch(
            rewards_lib.place(scores, mask, turn_ends), parts.mesh)
      with timer.section('update'):
        batch, target_metrics = learner.make_batch(
            state, reference, trajectory, rewards)
        state, update_metrics = learner.update(
            state, batch, jax.random.fold_in(update_key, step))
      done = step + 1
      last = done == config.num_steps
      host[done] = evaluation.rollout_metrics(
          transcripts, scores, int(mask.sum()), seconds)
      host[done] |= parts.collect.metrics | {
          'rollout/failed_searches': parts.retriever.failed - failed}
      ready = delayed.push(done, target_metrics | update_metrics)
      report_step(ready)
      found = None
      if last or done % config.eval.every == 0:
        with timer.section('update'):
          ready = delayed.drain()
        found = evaluated(done, state.actor.params, last)
        report_step(ready, found['greedy']['em'])
        final = found if last else None
      elif done % config.checkpoint.every == 0:
        report_step(delayed.drain())
      writer.write(done, timer.flush())
      writer.flush(done - 1 if done in host else done)
      if last or done % config.checkpoint.every == 0:
        saved(done, state, found['greedy'] if found else None)
        last_saved[0] = done

    if final is None:  # no step was left to take; the last row is written
      final = evaluated(config.num_steps, state.actor.params, True, False)
    store.wait()

  before = json.loads((root / 'before.json').read_text())
  stored = {'before': before, 'after': final, 'dtype': config.model.dtype}
  report.learning_curve(
      metrics.read(root / 'metrics.jsonl'), root / 'learning_curve.png')
  _write_json(finished, stored)
  _conclude(progress, root, stored, source)
  return final['greedy']


def _step_zero(parts, learner, root, key, progress, timer):
  """The warmed-up policy, and the frozen copy of it that is the reference."""
  config = parts.config
  reference_path = root / 'reference'
  if reference_path.exists():
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: qwen.init(parts.model, key)),
        learner.shardings.actor.params)
    reference = checkpoints.restore_once(reference_path, like)
    return reference, reference
  params = assembly.parameters(parts, key)
  if config.warmup.steps:
    with timer.section('warmup'):
      demonstrations = assembly.demonstrations(parts)
      with progress.phase('warm-up', config.warmup.steps) as tick:
        params = warmup.train(
            params, demonstrations, parts.model,
            warmup.Config(**config.warmup.to_dict()), parts.mesh, config.seed,
            length_multiple=config.rollout.length_multiple,
            logprob_chunk=config.ppo.logprob_chunk,
            augment=assembly.renames(parts),
            on_step=lambda step, row: tick(step, loss=row['warmup/loss']))
  checkpoints.save_once(reference_path, params)
  return params, params


def _show(progress, when, found):
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


def _write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_suffix('.tmp')
  draft.write_text(''.join(
      json.dumps(row, ensure_ascii=False) + '\n' for row in rows),
                   encoding='utf-8')
  draft.replace(path)


def _write_json(path, value):
  draft = path.with_suffix('.tmp')
  draft.write_text(json.dumps(value, indent=2) + '\n')
  os.replace(draft, path)


if __name__ == '__main__':
  from absl import flags

  _WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Where everything of this run is kept.', required=True)
  config_lib.main(lambda config: train(
      config, _WORKDIR.value, shlex.join(
          argument for argument in sys.argv[1:]
          if not argument.lstrip('-').startswith('workdir'))))
