"""Adapters: merged as beside their kernels, trained alone, gone on export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import evaluate
from stepsearch import evaluation
from stepsearch import export
from stepsearch import metrics
from stepsearch import sharding
from stepsearch import train
from stepsearch.models import hf
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rollout import sampler as sampler_lib
from tests import train_test

ALL = lora.Config(rank=3, alpha=6.0)
SOME = lora.Config(rank=2, alpha=8.0, targets=('k', 'o', 'down'))
BLOCKS = dict(
    q='attention', k='attention', v='attention', o='attention', gate='mlp',
    up='mlp', down='mlp')


def random_adapters(config, actor, seed=0):
  """Both matrices matter, as if they had been trained for long."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype),
      jax.eval_shape(lambda: lora.init(config, actor, jax.random.key(0))))


def merged_by_numpy(config, base, adapters):
  """Kernel by kernel and layer by layer, as float64 matrices."""
  new = jax.tree.map(np.array, base)
  for name in config.targets:
    kernel = new['layers'][BLOCKS[name]][name]
    pair = adapters['layers'][BLOCKS[name]][name]
    for layer, (a, b) in enumerate(zip(
        np.asarray(pair['a'], np.float64), np.asarray(pair['b'], np.float64))):
      added = a.reshape(-1, config.rank) @ b.reshape(config.rank, -1)
      kernel[layer] += (
          config.alpha / config.rank * added).reshape(kernel[layer].shape)
  return new


def close(found, expected, **tolerance):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found,
      expected)


@pytest.mark.parametrize('config', [ALL, SOME], ids=['all', 'some'])
def test_merged_kernels_compute_what_adapters_add(model, params, config):
  model = dataclasses.replace(model, lora=config)
  adapters = random_adapters(config, params)
  names = {name for block in adapters['layers'].values() for name in block}
  assert names == set(config.targets)
  adapted = lora.Adapted(params, adapters)
  expected = merged_by_numpy(config, params, adapters)
  close(lora.merge(config, adapted, jnp.float32), expected, atol=1e-6)

  tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, 9))
  places = np.broadcast_to(np.arange(9), (2, 9))
  hidden = jax.jit(lambda p: qwen.Qwen(model).apply(
      lora.variables(p), tokens, places)[0])
  found = hidden(adapted)
  np.testing.assert_allclose(
      found, hidden(jax.tree.map(jnp.asarray, expected)), atol=2e-5)
  assert np.abs(found - hidden(params)).max() > 0.02


def test_adapters_start_as_nothing(model, params):
  adapters = lora.init(ALL, params, jax.random.key(1))
  pairs = [
      pair for block in adapters['layers'].values() for pair in block.values()]
  assert not any(pair['b'].any() for pair in pairs)
  for pair in pairs:
    inputs = pair['a'][0, ..., 0].size
    assert np.std(pair['a']) * inputs**0.5 == pytest.approx(1, abs=0.25)
  # None is drawn twice.
  seen = [float(pair['a'].ravel()[0]) for pair in pairs]
  assert len(set(seen)) == len(seen) == 7


@pytest.mark.parametrize('eight_decoding', [
    ((2, 2, 2), {}, {}), ((1, 4, 2), {}, dict(mlp=('fsdp', 'tensor')))],
    indirect=True)
def test_decoding_gets_merged_weights_from_wherever_the_base_lies(
    model, params, eight_decoding):
  config = dataclasses.replace(model, lora=ALL, dtype='bfloat16')
  adapters = random_adapters(ALL, params)
  update = sharding.Layout(eight_decoding.mesh)
  base = jax.device_put(
      qwen.compact(config, params),
      sharding.on_host(update.place(qwen.axes(model)[0])))
  adapters = jax.device_put(
      adapters, update.place(lora.axes(ALL, qwen.axes(model)[0])))
  found = sampler_lib.Sampler(config, eight_decoding, 8, (1,)).weights(
      lora.Adapted(base, adapters))
  expected = qwen.unroll(jax.tree.map(
      jnp.asarray, merged_by_numpy(ALL, jax.tree.map(
          lambda x: np.asarray(x, np.float32), base), adapters)))
  for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert x.sharding.memory_kind == 'device'
    # The last bit may fall either way.
    np.testing.assert_allclose(
        np.asarray(x, np.float32), y, rtol=2**-8, atol=1e-6)
  shape = found['layers'][0]['mlp']['up'].addressable_shards[0].data.shape
  assert shape == (model.embed, model.mlp // eight_decoding.size('mlp'))


# ── A run ────────────────────────────────────────────────────────────────────

RANK = 4
RUN = (
    'num_steps=2', 'checkpoint.every=1', 'eval.sampled=false',
    f'lora.rank={RANK}', 'warmup.steps=12', 'warmup.learning_rate=0.02',
    'ppo.actor_lr=5e-3')


@pytest.fixture(scope='module')
def one_device():
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_: devices)
    yield


@pytest.fixture(scope='module')
def run(one_device, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('lora')
  train.train(train_test._config(*RUN), str(workdir))
  return workdir


@pytest.fixture(scope='module')
def stored(run):
  """Model, last state and reference of the run, as numpy."""
  parts = assembly.build(
      train_test._config(*RUN), run, say=lambda _: None)
  whole = jax.eval_shape(lambda: qwen.init(parts.model, jax.random.key(0)))
  state, _ = checkpoints.restore(
      run / 'checkpoints',
      jax.eval_shape(parts.learner.init, jax.random.key(0)))
  reference = checkpoints.restore_once(run / 'reference', whole)
  return parts, state, reference


def test_a_run_trains_adapters_and_nothing_else(run, stored):
  parts, state, reference = stored
  first, *rows = metrics.read(run / 'metrics.jsonl')
  for row in rows:
    assert row['ppo/sampler_mismatch'] < 1e-4
    assert row['ppo/grad_norm'] > 0 and row['critic/grad_norm'] > 0
  # The policy starts as the base, which is the reference, and leaves it.
  assert abs(rows[0]['ppo/reference_kl']) < 1e-6
  assert rows[1]['ppo/reference_kl'] > 1e-5
  # Inputs and outputs of q, k, v, o, gate, up and down in two layers.
  numbers = 2 * RANK * (64 + 48 + 48 + 64 + 3 * 64)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(state.actor.params) == numbers
  assert count(state.critic.params) == numbers + 32
  assert count(state.actor.opt_state) == 2 * numbers + 1
  # The warm-up has trained adapters too: the reference is merged of them.
  start = jax.device_get(assembly.parameters(
      parts, jax.random.fold_in(jax.random.key(0), 0)))
  changed = jax.tree.map(np.subtract, reference, start)
  for name, block in BLOCKS.items():
    split = lora.INPUTS[name]
    for kernel in changed['layers'][block].pop(name):
      inputs = int(np.prod(kernel.shape[:split]))
      values = np.linalg.svd(kernel.reshape(inputs, -1))[1]
      assert values[RANK - 1] > 1e-4 and values[RANK] < 1e-6
  assert not any(x.any() for x in jax.tree.leaves(changed))


def test_a_run_resumes_bitwise(run, tmp_path, monkeypatch):
  """Stopped in the middle of step 2, after the checkpoint of step 1."""
  real, calls = evaluation.rollout_metrics, []

  def dies(*args):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(evaluation, 'rollout_metrics', dies)
  with pytest.raises(KeyboardInterrupt):
    train.train(train_test._config(*RUN), str(tmp_path))
  monkeypatch.setattr(evaluation, 'rollout_metrics', real)
  train.train(
      train_test._config(*RUN, 'offload=reference,optimizer'), str(tmp_path))
  assert train_test._rows(tmp_path) == train_test._rows(run)


def test_an_export_is_merged_and_plays_as_the_run(run, stored, tmp_path):
  _, state, reference = stored
  export.export(str(run), str(tmp_path / 'model'))
  _, found = hf.load(tmp_path / 'model')
  close(found, merged_by_numpy(
      lora.Config(RANK), reference, state.actor.params), atol=1e-6)
  last = json.loads((run / 'eval.json').read_text())['after']['greedy']
  for path, name in ((run, 'run'), (tmp_path / 'model', 'folder')):
    # Whether there are adapters is told by the run, not by the config.
    played = evaluate.evaluate(
        train_test._config(), str(path), str(tmp_path / name))
    assert played['all'] == pytest.approx(last)
  assert (tmp_path / 'run/transcripts.jsonl').read_text() == (
      tmp_path / 'folder/transcripts.jsonl').read_text()
