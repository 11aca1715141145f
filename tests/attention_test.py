"""Attention: plain against a loop, the kernels against plain."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import sharding
from stepsearch.models import attention
from stepsearch.models import cache as cache_lib


def looped(q, k, v, cache=None, lengths=None, segments=None, window=0):
  """The module's equation in float64, one query head at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  y = np.zeros_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    head = n // (q.shape[2] // k.shape[2])
    start = 0 if cache is None else int(lengths[b])
    seen = []
    for s in range(start):
      if not window or start + t - s < window:
        seen.append((
            np.asarray(cache.k, np.float64)[b, head, s],
            np.asarray(cache.v, np.float64)[b, head, s]))
    for u in range(t + 1):
      same = segments is None or segments[b, u] == segments[b, t]
      if same and (not window or t - u < window):
        seen.append((k[b, u, head], v[b, u, head]))
    keys, values = (np.stack(x) for x in zip(*seen))
    scores = keys @ q[b, t, n] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    y[b, t, n] = weights @ values / weights.sum()
  return y


def arrays(batch, length, heads=4, kv_heads=2, dim=16, dtype='float32'):
  """q, k, v and a gradient of the result."""
  rng = np.random.default_rng(length)
  return [
      jnp.asarray(1.5 * rng.normal(size=(batch, length, n, dim)), dtype)
      for n in (heads, kv_heads, kv_heads, heads)]


def packed(batch, length):
  """Segments 1, 2, 3 of random lengths, then padding; one row has none."""
  rng = np.random.default_rng(length)
  ids = np.zeros((batch, length), np.int32)
  for row in ids[:-1]:
    cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
    for segment, (start, stop) in enumerate(zip([0, *cuts], cuts)):
      row[start:stop] = segment + 1
  ids[-1] = 1
  return ids


def with_gradients(q, k, v, g, **kwargs):
  """y, dq, dk, dv as float32 arrays."""

  @jax.jit
  def run(q, k, v, g):
    y, back = jax.vjp(
        lambda *x: attention.attend(*x, **kwargs), q, k, v)
    return y, *back(g)

  results = run(q, k, v, g)
  assert all(x.dtype == q.dtype for x in results)
  return [np.asarray(x.astype(jnp.float32)) for x in results]


@pytest.mark.parametrize('window', [None, 0, 1, 4])
@pytest.mark.parametrize('form', ['rows', 'segments', 'cache'])
def test_plain_is_the_equation(form, window):
  q, k, v, _ = arrays(3, 9, dim=6)
  cache = lengths = segments = None
  if form == 'segments':
    segments = packed(3, 9)
  if form == 'cache':
    lengths = np.array([0, 3, 7], np.int32)
    old = np.random.default_rng(1).normal(size=(2, 3, 2, 7, 6))
    cache = python_types.SimpleNamespace(
        k=jnp.asarray(old[0], jnp.float32), v=jnp.asarray(old[1], jnp.float32))
  expected = looped(q, k, v, cache, lengths, segments, window or 0)
  call = functools.partial(
      attention.attend, q, k, v, cache=cache,
      cache_length=None if lengths is None else jnp.asarray(lengths),
      segments=None if segments is None else jnp.asarray(segments))
  y = jax.jit(functools.partial(call, window=window))()
  assert y.shape == q.shape
  np.testing.assert_allclose(y, expected, atol=2e-6)
  # Traced, as inside a layer scan, where each layer has its own.
  y = jax.jit(lambda w: call(window=w))(jnp.int32(window or 0))
  np.testing.assert_allclose(y, expected, atol=2e-6)
  if cache:  # any kind computes this plainly
    y = jax.jit(functools.partial(call, window=window, kind='splash'))()
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize('shared', [2, 4])
@pytest.mark.parametrize('length', [1, 5])
def test_heads_of_a_cache_may_share_rows(shared, length):
  q, k, v, _ = arrays(3, length, heads=8, kv_heads=4, dim=6)
  lengths = jnp.asarray([0, 3, 7])
  old = jnp.asarray(
      np.random.default_rng(1).normal(size=(2, 3, 4, 7, 6)), jnp.float32)
  # [2, B, K, S, H] -> [2, B, K / p, S, p H]
  joined = jnp.concatenate(
      [old[:, :, i::shared] for i in range(shared)], axis=-1)
  call = functools.partial(
      attention.attend, q, k, v, cache_length=lengths, window=4)
  apart, together = (
      call(cache=cache_lib.Cache(*x)) for x in (old, joined))
  np.testing.assert_allclose(together, apart, atol=2e-6)
  # So are they written.
  entries = jnp.stack([k, v]).swapaxes(2, 3)  # [2, B, K, T, H]
  room = ((0, 0),) * 3 + ((0, length), (0, 0))
  apart, together = (
      cache_lib.write(jnp.pad(x, room), entries, lengths)
      for x in (old, joined))
  np.testing.assert_array_equal(
      together, jnp.concatenate(
          [apart[:, :, i::shared] for i in range(shared)], axis=-1))


def test_window_is_that_of_transformers():
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  from transformers import masking_utils

  q, k, v, _ = arrays(1, 12, heads=2, kv_heads=2)
  at = torch.arange(12)
  rule = masking_utils.sliding_window_causal_mask_function(5)
  mask = rule(0, 0, at[:, None], at[None])
  expected = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(np.asarray(x)).swapaxes(1, 2) for x in (q, k, v)),
      attn_mask=mask).swapaxes(1, 2)
  y = attention.attend(q, k, v, window=5)
  np.testing.assert_allclose(y, expected.numpy(), atol=2e-6)


def test_segments_and_a_cache_exclude_each_other():
  q, k, v, _ = arrays(1, 2)
  cache = python_types.SimpleNamespace(
      k=k.swapaxes(1, 2), v=v.swapaxes(1, 2))
  with pytest.raises(ValueError, match='segments'):
    attention.attend(
        q, k, v, cache=cache, cache_length=jnp.ones(1, jnp.int32),
        segments=jnp.ones((1, 2), jnp.int32))


def test_packed_rows_are_independent_and_padding_is_finite():
  q, k, v, g = arrays(2, 9)
  segments = packed(2, 9)
  g = jnp.where(jnp.asarray(segments > 0)[:, :, None, None], g, 0)
  call = functools.partial(with_gradients, segments=jnp.asarray(segments))
  whole = call(q, k, v, g)
  assert all(np.isfinite(x).all() for x in whole)
  one = jnp.asarray(segments == 2)[:, :, None, None]
  changed = [jnp.where(one, x, 7 * x + 1) for x in (q, k, v)]
  for x, y in zip(whole, call(*changed, g)):
    rows = segments == 2
    np.testing.assert_allclose(x[rows], y[rows], atol=1e-6)
  for x in whole[1:]:
    assert not x[segments == 0].any()


@pytest.mark.parametrize('window', [None, 37])
@pytest.mark.parametrize('segmented', [False, True])
def test_splash_is_plain(segmented, window, monkeypatch):
  monkeypatch.setattr(attention, 'BLOCK', 128)  # two by two blocks, padded
  inputs = arrays(2, 200)
  segments = jnp.asarray(packed(2, 200)) if segmented else None
  call = functools.partial(
      with_gradients, *inputs, segments=segments, window=window)
  for x, y in zip(call(kind='splash'), call()):
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_splash_in_bfloat16_is_as_exact_as_plain():
  inputs = arrays(2, 130, dim=64, dtype='bfloat16')
  call = functools.partial(
      with_gradients, segments=jnp.asarray(packed(2, 130)), window=50)
  exact = call(*(x.astype(jnp.float32) for x in inputs))
  splash, plain = call(*inputs, kind='splash'), call(*inputs)
  for x, y, z in zip(exact, splash, plain):
    assert 0 < np.linalg.norm(y - x) < 1.5 * np.linalg.norm(z - x)


@pytest.mark.parametrize('batch', [4, 3])
@pytest.mark.parametrize('eight', [((2, 2, 2), {}, {})], indirect=True)
def test_splash_on_a_mesh_is_plain(eight, batch):
  inputs = arrays(batch, 64)
  segments = jnp.asarray(packed(batch, 64))
  call = functools.partial(with_gradients, *inputs, segments=segments)
  for x, y in zip(call(kind='splash', layout=eight, window=0), call()):
    np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize('window', [None, 5])
@pytest.mark.parametrize('segmented', [False, True])
def test_the_call_of_cudnn_means_plain(eight, segmented, window):
  inputs = arrays(8, 33)
  segments = jnp.asarray(packed(8, 33)) if segmented else None
  call = functools.partial(
      with_gradients, *inputs, segments=segments, window=window)
  for x, y in zip(call(kind='cudnn', layout=eight), call()):
    np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize('window', [None, 50])
@pytest.mark.parametrize('segmented', [False, True])
def test_cudnn_on_a_gpu_is_as_exact_as_plain(segmented, window):
  try:
    layout = sharding.Layout(
        sharding.make_mesh((1, 1, 1), jax.devices('gpu')[:1]))
  except RuntimeError:
    pytest.skip('no GPU, or JAX_PLATFORMS (set it to cuda,cpu) hides it')
  with jax.default_device(layout.mesh.devices.flat[0]):
    inputs = arrays(2, 201, dim=64, dtype='bfloat16')
    segments = jnp.asarray(packed(2, 201)) if segmented else None
    call = functools.partial(
        with_gradients, segments=segments, window=window)
    with jax.default_matmul_precision('highest'):
      exact = call(*(x.astype(jnp.float32) for x in inputs))
    cudnn, plain = call(*inputs, kind='cudnn', layout=layout), call(*inputs)
  for x, y, z in zip(exact, cudnn, plain):
    assert 0 < np.linalg.norm(y - x) < 2 * np.linalg.norm(z - x)


QWEN = {'head_dim': 128, 'dtype': 'bfloat16', 'windows': ()}


@pytest.mark.parametrize('kind, platform, model, expected', [
    ('auto', 'cpu', {}, 'plain'),
    ('auto', 'tpu', {}, 'splash'),
    ('auto', 'gpu', {}, 'cudnn'),
    ('auto', 'cuda', {}, 'cudnn'),
    ('auto', 'rocm', {}, 'plain'),
    ('auto', 'gpu gfx942', {}, 'plain'),
    ('auto', 'gpu 7.5', {}, 'plain'),
    ('auto', 'cuda 12.0', {}, 'cudnn'),
    ('auto', 'gpu', {'dtype': jnp.float16}, 'cudnn'),
    ('auto', 'gpu', {'dtype': 'float32'}, 'plain'),
    ('auto', 'gpu', {'head_dim': 256}, 'plain'),
    ('auto', 'gpu', {'head_dim': 12}, 'plain'),
    ('auto', 'tpu', {'dtype': jnp.float32, 'head_dim': 12}, 'splash'),
    ('auto', 'tpu', {'windows': (64, 64)}, 'splash'),
    ('auto', 'tpu', {'windows': (0, 0)}, 'splash'),
    ('auto', 'tpu', {'windows': (0, 64)}, 'plain'),
    ('auto', 'gpu', {'windows': (64, 32)}, 'plain'),
    ('plain', 'tpu', {'windows': (0, 64)}, 'plain'),
    ('splash', 'tpu', {}, 'splash'),
    ('cudnn', 'cuda', {}, 'cudnn'),
    ('splash', 'cpu', {}, 'runs on tpu and the devices of the mesh are cpu'),
    ('splash', 'gpu', {}, 'runs on tpu'),
    ('cudnn', 'tpu', {}, 'runs on gpu'),
    ('cudnn', 'gpu 7.5', {}, 'capability 8.0 or more, .* are the device'),
    ('cudnn', 'gpu gfx90a', {}, 'NVIDIA devices'),
    ('cudnn', 'gpu', {'dtype': 'float32'}, 'config.model.dtype is float32'),
    ('cudnn', 'gpu', {'head_dim': 136}, 'config.model.head_dim = 136'),
    ('splash', 'tpu', {'windows': (0, 64)}, r'\[0, 64\]'),
    ('flash', 'tpu', {}, "one of .*'plain'"),
])
def test_resolve(kind, platform, model, expected):
  platform, _, capability = platform.partition(' ')
  device = python_types.SimpleNamespace(
      platform=platform, device_kind='the device')
  if platform in ('gpu', 'cuda'):
    device.compute_capability = capability or '8.0'
  call = functools.partial(attention.resolve, kind, device, **QWEN | model)
  if expected in ('plain', 'splash', 'cudnn'):
    assert call() == expected
    return
  with pytest.raises(ValueError, match=expected) as error:
    call()
  assert f"config.model.attention = '{kind}'" in str(error.value)
  assert "'auto'" in str(error.value)


COMPILE = """
import jax
from jax.experimental import topologies
from stepsearch import sharding
from stepsearch.models import attention

devices = topologies.get_topology_desc(
    topology_name='v5e:4x4', platform='tpu').devices
for heads, kv_heads, dim, tensor in ((16, 2, 128, 2), (9, 3, 64, 1)):
  layout = sharding.Layout(sharding.make_mesh((1, -1, tensor), devices))
  place = layout.named('batch', 'length', 'heads', 'head_dim')
  q, k = (
      jax.ShapeDtypeStruct((16, 4096, n, dim), 'bfloat16', sharding=place)
      for n in (heads, kv_heads))
  segments = jax.ShapeDtypeStruct(
      (16, 4096), 'int32', sharding=layout.rows)

  def step(q, k, v, segments, g):
    attend = lambda *x: attention.attend(
        *x, segments=segments, kind='splash', layout=layout)
    y, back = jax.vjp(attend, q, k, v)
    return y, back(g)

  compiled = jax.jit(step).trace(q, k, k, segments, q).lower().compile()
  peak = compiled.memory_analysis().peak_memory_in_bytes
  print(compiled.as_text().count('custom_call_target="tpu_custom_call"'), peak)
"""


def test_splash_compiles_for_tpu():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu (0.0.42.* with jax 0.10.2) is not installed')
  environment = os.environ | {
      'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
      'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16', 'XLA_FLAGS': ''}
  done = subprocess.run(
      [sys.executable, '-c', COMPILE], env=environment, text=True,
      capture_output=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  scores = (2 * 8 * 4096**2 * 4, 9 * 4096**2 * 4)  # bytes a device, in plain
  for line, plain in zip(done.stdout.split('\n'), scores, strict=False):
    kernels, peak = map(int, line.split())
    assert kernels == 3  # forward, dq, dk with dv
    assert peak < plain / 4
