"""The update against its peers: CPU seconds, temporaries, and MFU on a GPU.

    python -m tests.benchmarks.update --tunix_python=… --hf_python=…
    python -m tests.benchmarks.update --mfu        # of the 1.5B shape, on a GPU

One optimizer step on 32 rows of 64 + 128 tokens, 3.5 M parameters, float32, PPO
loss and AdamW, on one core: ours by the learner's own functions, Tunix's and
transformers' by the scripts in --peers, each in an environment of its own.
Medians of CPU seconds of the process, in alternating rounds. Temporaries are
XLA's own account, with logits made in chunks and all at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

_GPU = '--mfu'
if __name__ == '__main__' and _GPU not in sys.argv:
  # Before numpy and jax start their threads; subprocesses inherit it.
  os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
  os.environ.update(
      JAX_PLATFORMS='cpu', PYTHONWARNINGS='ignore', TF_CPP_MIN_LOG_LEVEL='3',
      OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='0', REPEATS='3')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from stepsearch import assembly  # noqa: E402
from stepsearch import compile as compile_lib  # noqa: E402
from stepsearch import sharding  # noqa: E402
from stepsearch import types  # noqa: E402
from stepsearch.models import attention  # noqa: E402
from stepsearch.models import qwen  # noqa: E402
from stepsearch.rl import learner as learner_lib  # noqa: E402
from stepsearch.rl import losses  # noqa: E402

_PEERS = pathlib.Path(__file__).parents[3] / 'shared/peers'
# The shape of the scripts in --peers.
_SHAPE = qwen.Config(
    vocab_size=2048, embed=256, layers=4, heads=4, kv_heads=2, head_dim=64,
    mlp=704)
_ROWS, _PROMPT, _WRITTEN = 32, 64, 128
_LARGE = qwen.Config(  # Qwen2.5-1.5B
    vocab_size=151936, embed=1536, layers=28, heads=12, kv_heads=2,
    head_dim=128, mlp=8960, dtype='bfloat16', remat='full')
_PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # bfloat16, dense


def make(model: qwen.Config, rows: int, micro: int, chunk: int):
  """A learner of one minibatch on the first device."""
  layout = sharding.Layout(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
  return learner_lib.Learner(
      model, learner_lib.Config(
          minibatch_size=rows, microbatch_size=micro, logprob_chunk=chunk,
          actor_lr=1e-5, actor_warmup=0.0, packing=False),
      layout, rows, 1)


def batch_of(model: qwen.Config, rows: int, prompt: int, written: int):
  """Random tokens and advantages; the prompt carries no loss."""
  rng = np.random.default_rng(0)
  mask = np.zeros((rows, prompt + written), np.float32)
  mask[:, prompt:] = 1
  noise = lambda: (rng.normal(size=mask.shape) * mask).astype(np.float32)
  return jax.tree.map(jnp.asarray, types.Batch(
      tokens=rng.integers(2, model.vocab_size, mask.shape).astype(np.int32),
      token_mask=np.ones_like(mask), loss_mask=mask,
      logprobs=-np.float32(np.log(model.vocab_size)) * mask,
      ref_logprobs=np.zeros_like(mask), values=np.zeros_like(mask),
      advantages=noise(), returns=noise()))


def compiled(learner, batch, names):
  """One optimizer step of the models named, and their states; donated."""

  def step(models, batch, c):
    weights = losses.weights(batch.loss_mask, learner.config.average)
    pieces = learner_lib._split((batch, weights), learner._microbatches), None
    return {
        name: learner._improve(
            name, models[name], None, pieces, learner._microbatches,
            jnp.float32(0), c)[0]
        for name in names}

  state = learner.init(jax.random.key(0))
  models = {name: getattr(state, name) for name in names}
  program = jax.jit(step, donate_argnums=0).lower(
      models, batch, learner._coefficients).compile()
  return program, models


class Ours:
  """An arm: one step a call, with the state that the last one left."""

  def __init__(self, names, micro=4, chunk=64, remat='off'):
    self._learner = make(
        dataclasses.replace(_SHAPE, remat=remat), _ROWS, micro, chunk)
    self._batch = batch_of(_SHAPE, _ROWS, _PROMPT, _WRITTEN)
    self._program, self._models = compiled(self._learner, self._batch, names)
    memory = self._program.memory_analysis()
    self.temporaries = memory.temp_size_in_bytes / 2**20
    self.donated = memory.alias_size_in_bytes / 2**20
    self()

  def __call__(self):
    start = time.process_time()
    self._models = jax.block_until_ready(self._program(
        self._models, self._batch, self._learner._coefficients))
    return time.process_time() - start


def peer(python, script, what, folder):
  """An arm of another process; its own median of three steps."""

  def run():
    done = subprocess.run(
        [python, script, what], cwd=folder, capture_output=True, text=True,
        check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])['cpu_median_s']

  return run


def compare(flags) -> None:
  """Prints medians and ratios of all arms, and the temporaries."""
  actor, both = Ours(('actor',)), Ours(('actor', 'critic'))
  whole = Ours(('actor',), micro=_ROWS, chunk=_PROMPT + _WRITTEN)
  pieces = Ours(('actor',), micro=_ROWS, chunk=32)
  arms = {'ours, actor': actor, 'ours, actor and critic': both}
  if flags.tunix_python:
    for what in ('ppo', 'critic'):
      arms[f'Tunix, {what}'] = peer(
          flags.tunix_python, 'bench_tunix_train.py', what, flags.peers)
  if flags.hf_python:
    arms['torch, ppo'] = peer(
        flags.hf_python, 'bench_hf.py', 'ppo', flags.peers)
  seconds = {name: [] for name in arms}
  for number in range(flags.rounds):
    for name, run in arms.items():
      seconds[name].append(run())
    print(f'round {number + 1}/{flags.rounds}', flush=True)
  medians = {name: statistics.median(x) for name, x in seconds.items()}
  for name, median in medians.items():
    ratio = median / medians['ours, actor']
    print(f'{name:24} {median:.3f} CPU s a step, {ratio:.2f} of our actor')
  print(f'temporaries: {actor.temporaries:.0f} MiB (microbatches of 4, 64 '
        f'positions of logits), {actor.donated:.1f} MiB donated; in one pass '
        f'{pieces.temporaries:.0f} MiB with 32 positions at a time, '
        f'{whole.temporaries:.0f} MiB with all logits')


def mfu(rows: int, length: int, model: qwen.Config) -> None:
  """Prints model FLOPs, seconds and MFU of an actor's step, with the sums."""
  device = jax.devices()[0]
  model = dataclasses.replace(model, attention=attention.resolve(
      'auto', device, head_dim=model.head_dim, dtype=model.dtype, windows=()))
  learner = make(model, rows, min(rows, 4), 256)
  batch = batch_of(model, rows, length // 4, length - length // 4)
  program, models = compiled(learner, batch, ('actor',))
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    models = jax.block_until_ready(
        program(models, batch, learner._coefficients))
    seconds.append(time.perf_counter() - start)
  seconds = statistics.median(seconds[1:])
  tokens = compile_lib.Tokens(rows, length, length, 0)
  # rollout without a shared beginning is one forward pass with all logits.
  flops = 3 * compile_lib.model_flops(model, tokens, 1)['rollout']
  peak = next(
      (x for name, x in _PEAK.items() if name in device.device_kind), None)
  print(f'{rows} rows of {length} tokens, {model.layers} layers of '
        f'{model.embed}: 3 x {flops / 3e12:.2f} TFLOP forward = '
        f'{flops / 1e12:.2f} TFLOP in {seconds:.3f} s = '
        f'{flops / seconds / 1e12:.3f} TFLOP/s'
        + (f' = {flops / seconds / peak:.1%} of {peak / 1e12:.0f}'
           if peak else f' ({device.device_kind}: no peak known)'))


def main() -> None:
  """Runs what the flags ask for."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tunix_python', default='')
  parser.add_argument('--hf_python', default='')
  parser.add_argument('--peers', type=pathlib.Path, default=_PEERS)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(_GPU, action='store_true')
  flags = parser.parse_args()
  assembly.tune_host()
  if not flags.mfu:
    compare(flags)
  elif jax.default_backend() == 'cpu':  # that it works, not how fast it is
    mfu(4, 64, dataclasses.replace(_SHAPE, dtype='bfloat16', remat='full'))
  else:
    mfu(16, 2048, _LARGE)


if __name__ == '__main__':
  main()
