"""What packing saves: `python -m tests.benchmarks.packing --workdir=runs/tiny`.

Takes the lengths of a finished tiny run's sampled episodes and the sizes of its
config, makes one batch of random tokens of these lengths, and times learner
steps (make_batch and update) packed and unpacked in alternating rounds, by wall
clock and by CPU time of the process. The two must agree.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax
import numpy as np

from stepsearch import config as config_lib
from stepsearch import sharding
from stepsearch import tokenizer as tokenizer_lib
from stepsearch import types
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf
from stepsearch.rl import learner as learner_lib

_ROOT = pathlib.Path(__file__).parents[2]


def lengths_of(workdir: pathlib.Path) -> np.ndarray:
  """Tokens of the sampled held-out episodes after the last step."""
  tokenizer = tokenizer_lib.load(workdir / 'model')
  path = sorted(workdir.glob('transcripts/*_sampled.jsonl'))[-1]
  return np.asarray([
      len(tokenizer.encode(json.loads(line)['text']))
      for line in path.read_text(encoding='utf-8').splitlines()])


def batch_of(lengths, multiple, vocab_size, layout):
  """A trajectory of random tokens, half of them sampled, and rewards."""
  rng = np.random.default_rng(0)
  width = -(-int(lengths.max()) // multiple) * multiple
  inside = np.arange(width)[None] < lengths[:, None]
  tokens = np.where(inside, rng.integers(0, vocab_size, inside.shape), 0)
  mask = inside & (rng.random(inside.shape) < 0.5)
  mask[:, 0] = False
  trajectory = types.Trajectory(
      tokens=tokens.astype(np.int32), token_mask=inside.astype(np.float32),
      loss_mask=mask.astype(np.float32),
      logprobs=np.zeros(inside.shape, np.float32),
      turn_ends=np.full((len(lengths), 6), -1, np.int32))
  rewards = (rng.normal(size=inside.shape) * mask).astype(np.float32)
  return sharding.shard_batch((trajectory, rewards), layout)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--rounds', type=int, default=7)
  flags = parser.parse_args()
  config = config_lib.load(f'{_ROOT}/configs/tiny.py')
  model = hf.read_config(folder_lib.Folder(flags.workdir / 'model'))
  layout = sharding.Layout(
      sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
  every = lengths_of(flags.workdir)
  lengths = np.random.default_rng(0).choice(
      every, config.batch_size, replace=False)
  trajectory, rewards = batch_of(
      lengths, config.rollout.length_multiple, model.vocab_size, layout)
  print(f'{len(lengths)} episodes of {lengths.min()}-{lengths.max()} tokens, '
        f'mean {lengths.mean():.0f}, in rows of {trajectory.tokens.shape[1]}')

  runs = {}
  for name, changes in (
      ('unpacked', dict(packing=False)),
      ('packed', dict(packing=True, microbatch_size=4))):
    learner = learner_lib.Learner(
        model, learner_lib.Config(**config.ppo.to_dict() | changes), layout,
        config.batch_size, config.num_steps)
    state = learner.init(jax.random.key(0))

    def step(learner=learner, state=state):
      copy = jax.tree.map(lambda x: x.copy(), state)
      batch, _ = learner.make_batch(
          copy, state.actor.params, trajectory, rewards)
      copy, metrics = learner.update(copy, batch, jax.random.key(1))
      return jax.device_get((copy.actor.params, metrics))

    runs[name] = step, step()  # compiled
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3),
      *(found[0] for _, found in runs.values()))
  seconds = {name: [] for name in runs}
  for _ in range(flags.rounds):
    for name, (step, _) in runs.items():
      start = time.perf_counter(), time.process_time()
      step()
      seconds[name].append(
          (time.perf_counter() - start[0], time.process_time() - start[1]))
  rates = {}
  for name, (_, found) in runs.items():
    wall, cpu = (statistics.median(x) for x in zip(*seconds[name]))
    rates[name] = lengths.sum() / cpu
    print(f'{name:>9}: {wall:.2f} s, {cpu:.2f} CPU s, '
          f'{lengths.sum() / wall:,.0f} tokens/s, {rates[name]:,.0f} a CPU s, '
          f'row fill {found[1]["ppo/row_fill"]:.2f}')
  print(f'packed / unpacked: {rates["packed"] / rates["unpacked"]:.2f}x')


if __name__ == '__main__':
  main()
