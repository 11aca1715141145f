"""What compile compiles is what training calls; what it says of it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import assembly
from stepsearch import compile as compile_lib
from stepsearch import config as config_lib
from stepsearch import costs
from stepsearch import sharding
from stepsearch import topology
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rollout import collect
from stepsearch.rollout import sampler as sampler_lib

_ROOT = pathlib.Path(__file__).parents[1]
MICRO = (
    'batch_size=8', 'mesh=(1, 1, 1)', 'model.embed=32', 'model.layers=2',
    'model.heads=2', 'model.kv_heads=1', 'model.head_dim=16', 'model.mlp=32',
    'world.train_entities=24', 'world.eval_entities=16', 'world.name_words=8',
    'data.train_questions=20', 'data.eval_questions=10',
    'retriever.dimensions=128', 'ppo.minibatch_size=4',
    'ppo.microbatch_size=2')


class Recorder:
  """Stands for a jitted function; keeps what each shape is lowered to."""

  def __init__(self, function):
    self._function = function
    self.lower = function.lower
    self.texts = {}

  def __call__(self, *args):
    shape = str([getattr(x, 'shape', x) for x in jax.tree.leaves(args)])
    if shape not in self.texts:
      self.texts[shape] = self._function.lower(*args).as_text()
    return self._function(*args)


def test_kernels_split_both_kinds_of_heads_alike(monkeypatch):
  monkeypatch.setattr(
      assembly.attention, 'resolve', lambda kind, *_, **__: kind)
  options = [
      *MICRO, 'mesh=(2, 1, 4)', 'model.vocab_size=64', 'model.heads=4',
      'model.kv_heads=2', 'sharding.update.kv_heads=()',
      'sharding.decode.kv_heads=()']
  load = lambda *more: config_lib.load(
      f'{_ROOT}/configs/tiny.py', [*options, *more])
  assembly.machinery(load('model.attention=plain'))
  with pytest.raises(ValueError, match='config.model.attention.*2 cannot be '
                     'split into 4 parts: config.sharding.update.heads'):
    assembly.machinery(load('model.attention=splash'))
  assembly.machinery(load('model.attention=splash', 'mesh=(4, 1, 2)',
                           'ppo.microbatch_size=4'))


@pytest.mark.parametrize('options', [
    (), ('lora.rank=2', 'offload=optimizer,reference')])
def test_training_runs_what_is_compiled(options, tmp_path, monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)
  config = config_lib.load(f'{_ROOT}/configs/tiny.py', [*MICRO, *options])
  parts = assembly.build(config, tmp_path, say=lambda _: None)

  # One width and one size, so that the widest and largest are those that run.
  original = collect.Shapes.of

  def widest(*args):
    shapes = original(*args)
    return collect.Shapes(
        shapes.prompts[-1:], shapes.observations[-1:],
        (8, shapes.cache[-1]), shapes.length, shapes.feed)

  monkeypatch.setattr(collect.Shapes, 'of', widest)
  parts.collect._shapes = widest(
      parts.collect.config, parts.model, parts.decode)
  recorders = {}
  for phase, owner, name in (
      ('weights', sampler_lib, '_weights'), ('grow', sampler_lib, '_grow'),
      ('prefill', sampler_lib, '_start'), ('append', sampler_lib, '_append'),
      ('decode', sampler_lib, '_decode'),
      ('logprobs', parts.learner, '_make_batch'),
      ('update', parts.learner, '_update')):
    recorders[phase] = Recorder(getattr(owner, name))
    monkeypatch.setattr(owner, name, recorders[phase])

  key = jax.random.key(0)
  actor = assembly.parameters(parts, key)
  state = parts.learner.start(actor, key)
  reference = parts.learner.freeze(actor)
  trajectory, _ = parts.collect(
      parts.learner.policy(state, reference), parts.train[:8], key)
  # As long as an episode may be.
  width = parts.collect._shapes.length - trajectory.tokens.shape[1]
  padded = sharding.shard_batch(
      jax.tree.map(
          lambda x: np.pad(x, ((0, 0), (0, width))),
          trajectory.replace(turn_ends=None)), parts.decode)
  trajectory = padded.replace(turn_ends=trajectory.turn_ends)
  rewards = np.zeros(trajectory.tokens.shape, np.float32)
  batch, _ = parts.learner.make_batch(
      state, reference, trajectory,
      sharding.shard_batch(rewards, parts.update))
  parts.learner.update(state, batch, key, reference)

  config = config.copy_and_resolve_references()
  config.model.vocab_size = parts.model.vocab_size
  made = compile_lib.plan(
      config, devices, shared=len(parts.collect._prefix),
      eos_ids=parts.tokenizer.eos_ids)
  for phase in made.phases:
    if phase.name != 'encode':
      texts = recorders[phase.name].texts.values()
      assert phase.lower().as_text() in texts, phase.name


@pytest.mark.parametrize('tied', [True, False])
def test_model_flops_are_those_of_the_products(tied):
  model = qwen.Config(
      vocab_size=96, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8,
      mlp=48, tie_embeddings=tied)
  episodes, length = 5, 6
  tokens = compile_lib.Tokens(episodes, length, sampled=length, shared=0)
  actor, critic = qwen.Qwen(model), qwen.Critic(model)
  params = jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))
  ids = jax.ShapeDtypeStruct((episodes, length), jnp.int32)

  def logits(params, ids):
    hidden, _ = actor.apply({'params': params}, ids, jnp.zeros_like(ids))
    return hidden @ qwen.unembedding(params)

  def values(params, ids):
    return critic.apply(
        {'params': params}, ids, jnp.zeros_like(ids))

  def flops(function, params):
    lowered = jax.jit(function).lower(params, ids)
    # Plain attention computes what is masked, 15 of 36 scores, too.
    masked = 4 * model.layers * model.heads * model.head_dim * 15 * episodes
    return costs.cost(lowered.compile().as_text()).flops - masked

  forward = flops(logits, params)
  critics = flops(values, jax.eval_shape(
      lambda x: qwen.init_critic(model, x), params))
  # The head of the critic is no product of matrices on every backend.
  head = 2 * model.embed * episodes * length
  found = compile_lib.model_flops(model, tokens, epochs=2)
  assert found['rollout'] == forward
  assert found['logprobs'] - 2 * forward in (critics, critics + head)
  assert found['update'] == 2 * 3 * (found['logprobs'] - forward)


def test_frozen_weights_have_no_gradients():
  model = qwen.Config(
      vocab_size=96, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8,
      mlp=48, lora=lora.Config(5))
  episodes, length = 5, 6
  base = jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))
  adapters = jax.eval_shape(
      lambda x: lora.init(model.lora, x, jax.random.key(0)), base)
  ids = jax.ShapeDtypeStruct((episodes, length), jnp.int32)

  def actor(adapters, base, ids):
    hidden, _ = qwen.Qwen(model).apply(
        lora.variables(lora.Adapted(base, adapters)), ids, jnp.zeros_like(ids))
    return jnp.sum(jnp.sin(hidden @ qwen.unembedding(base)))

  def critic(adapters, base, ids):
    values = qwen.Critic(model).apply(
        {'params': {'trunk': base, 'head': jnp.ones(model.embed)},
         'lora': {'trunk': adapters}}, ids, jnp.zeros_like(ids))
    return jnp.sum(jnp.sin(values))

  executed = 0
  for function in (actor, critic):
    lowered = jax.jit(jax.grad(function)).lower(adapters, base, ids)
    executed += costs.cost(lowered.compile().as_text()).flops
    # Plain attention computes what is masked, 15 of 36 scores, too.
    executed -= (
        3 * 4 * model.layers * model.heads * model.head_dim * 15 * episodes)
  tokens = compile_lib.Tokens(episodes, length, sampled=length, shared=0)
  wanted = compile_lib.model_flops(model, tokens, epochs=1)['update']
  assert executed == pytest.approx(wanted, rel=0.001)


def test_causal_attention_is_half_of_a_square():
  model = qwen.Config(
      vocab_size=2, embed=2, layers=1, heads=3, kv_heads=1, head_dim=4, mlp=2)
  few, many = (
      compile_lib.model_flops(
          model, compile_lib.Tokens(1, length, 0, 0), 1)['rollout'] / length
      for length in (1, 2**20))
  # Scores and values of 2**19 tokens more, seen from each.
  assert many - few == pytest.approx(2**19 * 2 * 2 * 3 * 4, rel=1e-5)


def test_topologies(monkeypatch):
  assert topology.split('v5p:2x2x4') == ('v5p', (2, 2, 4))
  assert topology.larger('v6e:8x8') == ['v6e:8x16', 'v6e:16x16']
  for name in ('v5e:3x3', 'v5e', 'v9:2x2', 'v5p:4x4', ''):
    with pytest.raises(ValueError, match='Known are v5e: 1x1 2x2 .*v5p: 2x2x1'):
      topology.split(name)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match='libtpu 0.0.42'):
    topology.devices('v5e:4x4')


def test_the_slice_comes_from_somewhere():
  with pytest.raises(ValueError, match='--topology=v5e:4x4'):
    compile_lib.run(config_lib.load(f'{_ROOT}/configs/tiny.py'), '', '')


def _compile(*flags):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu (tests/requirements-parity.txt) is not installed')
  environment = {
      name: value for name, value in os.environ.items()
      if not name.startswith(('JAX_', 'XLA_', 'TPU_'))}
  return subprocess.run(
      [sys.executable, '-m', 'stepsearch.compile', *flags], cwd=_ROOT,
      env=environment, text=True, capture_output=True, timeout=600, check=False)


def test_a_small_model_compiles_for_four_chips(tmp_path):
  path = tmp_path / 'report.json'
  done = _compile(
      '--config=configs/qwen2_5_3b.py', '--topology=v5e:2x2', f'--json={path}',
      *(f'--config.{x}' for x in (
          'batch_size=16', 'model.vocab_size=1024', 'model.layers=3',
          'model.embed=256', 'model.heads=4', 'model.mlp=512',
          'rollout.prompt_length=128', 'rollout.response_length=64',
          'rollout.observation_length=64', 'rollout.max_turns=2',
          'rollout.max_length=512', 'ppo.minibatch_size=8',
          'ppo.microbatch_size=4', 'warmup.batch_size=4',
          'eval.batch_size=4')))
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert 'bound by' in done.stdout
  found = json.loads(path.read_text())
  assert found['fits'] and found['hbm_gib'] == 15.75 and found['chips'] == 4
  assert found['mesh'] == {'data': 1, 'fsdp': 4, 'tensor': 1}
  phases = found['phases']
  for name in ('prefill', 'append', 'decode', 'logprobs', 'update', 'encode'):
    for figure in ('peak_hbm_gib', 'flops', 'bytes', 'roofline_s'):
      assert phases[name][figure] > 0, (name, figure)
    assert phases[name]['collective_bytes'] >= 0
    assert phases[name]['bound'] in ('compute', 'HBM', 'interconnect')
  # A layer has 1,024 x 256 weights of attention (4 heads of 128, 2 of keys,
  # 2 of values) and 3 x 256 x 512 of the MLP.
  layers = 3 * (256 * 128 * (4 + 2 + 2 + 4) + 3 * 256 * 512)
  trained = 2 * layers + 1024 * 256  # actor and critic, logits
  tokens = 16 * 512 / 4  # of a chip
  matrices = phases['update']['flops'] - phases['update']['kernel_flops']
  # Forward, again for the gradients, and those: 8 a weight, but for what
  # comes last in a layer, which is not computed again.
  assert matrices == pytest.approx(8 * trained * tokens, rel=0.06)
  # Forward, of actor, reference and critic.
  matrices = phases['logprobs']['flops'] - phases['logprobs']['kernel_flops']
  assert matrices == pytest.approx(
      2 * (trained + layers + 1024 * 256) * tokens, rel=0.01)
  assert 0.5 < phases['update']['model_flops_share'] < 1
  assert 0 < found['step']['roofline_mfu'] < 1
  # float32 states of two models with two moments each lie on four chips.
  norms = 3 * 2 * 256 + 256
  biases = 3 * 128 * (4 + 2 + 2)
  parameters = layers + 1024 * 256 + norms + biases
  resident = phases['update']['resident_gib']
  assert sum(
      resident[x] for x in ('actor', 'critic', 'optimizer')) == pytest.approx(
          2 * 3 * 4 * parameters / 4 / 2**30, rel=0.02)
  assert resident['reference'] == pytest.approx(
      2 * parameters / 4 / 2**30, rel=0.02)


def test_what_does_not_fit_says_so():
  done = _compile(
      '--config=configs/qwen2_5_7b.py', '--topology=v5e:2x2',
      '--config.ppo.microbatch_size=4')
  assert done.returncode == 1
  error = done.stderr.strip()
  assert error.startswith('error: does not fit:') and '\n' not in error
  assert 'v5e:2x2 has 15.75; the largest is optimizer' in error
  assert '--topology=v5e:' in error


TOO_LARGE = """
import jax
import jax.numpy as jnp
from stepsearch import compile as compile_lib
from stepsearch import costs
from stepsearch import topology

[device, *_] = topology.devices('v5e:2x2')
x = jax.ShapeDtypeStruct(
    (50_000, 50_000), jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(device))
phase = compile_lib.Phase(
    'update', lambda: jax.jit(lambda x: x + 1).lower(x), ('in',), ('rest',), 1)
compile_lib.measure(
    phase, {'in': 10e9, 'rest': 2 * 2**30}, costs.CHIPS['v5e'])
print(phase.peak / 2**30, phase.cost)
"""


def test_the_compilers_refusal_is_read():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu (tests/requirements-parity.txt) is not installed')
  done = subprocess.run(
      [sys.executable, '-c', TOO_LARGE], cwd=_ROOT, text=True,
      capture_output=True, timeout=300, check=False,
      env=os.environ | {'PYTHONPATH': str(_ROOT), 'XLA_FLAGS': ''})
  assert done.returncode == 0, done.stderr
  peak, cost = done.stdout.split()
  # Its argument and its result, and what lies beside it.
  assert float(peak) == pytest.approx(2 * 1e10 / 2**30 + 2, rel=0.01)
  assert cost == 'None'
