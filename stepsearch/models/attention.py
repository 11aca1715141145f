"""Causal grouped-query attention: one function, computed in three ways.

    y_t = sum_u softmax_u(q_t . k_u / sqrt(H)) v_u   over the u that t may see

`attend` is that sum. 'plain' leaves it to XLA and can do everything; 'splash'
(Pallas, TPU) and 'cudnn' (NVIDIA) never hold the T x T scores of the heads in
memory, and serve what has no cache: the update, and prompts that share no
beginning. `resolve` picks. With segments 'cudnn' takes a boolean mask
[B, 1, T, T], which is held.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stepsearch import sharding

RESULT = 'attention'  # what rematerialisation knows the result by
MASKED = -1e30  # finite, so that a row without a visible key has no NaN
BLOCK = 512  # at most so many queries by keys in one step of the splash kernel
LANES = 128  # of a TPU's registers; blocks are multiples of it


def resolve(
    kind: str,
    device: Any,
    *,
    head_dim: int,
    dtype: Any,
    windows: tuple[int, ...],
) -> str:
  """Chooses how attention is computed on the devices of a mesh.

  Args:
    kind: `config.model.attention`: auto, plain, splash or cudnn.
    device: one of the mesh's, which need not be the default ones.
    head_dim: H.
    dtype: of the computation.
    windows: the layers' sliding windows, 0 for a layer that sees everything;
      () when all do.

  Returns:
    plain, splash or cudnn: what `attend` takes.

  Raises:
    ValueError: there is no such kind, or it cannot compute this model here.
  """
  kinds = ('auto', 'plain', 'splash', 'cudnn')
  if kind not in kinds:
    raise ValueError(
        f'config.model.attention = {kind!r}: must be one of {kinds}.')
  best = {'tpu': 'splash', 'gpu': 'cudnn', 'cuda': 'cudnn'}
  platform = device.platform
  wanted = best.get(platform, 'plain') if kind == 'auto' else kind
  if wanted == 'plain':
    return wanted
  dtype = jnp.dtype(dtype).name
  home, dtypes = {
      'splash': ('tpu', ('bfloat16', 'float32')),
      'cudnn': ('gpu', ('bfloat16', 'float16')),
  }[wanted]
  obstacle = None
  if best.get(platform) != wanted:
    obstacle = f'it runs on {home} and the devices of the mesh are {platform}'
  elif wanted == 'cudnn' and not _nvidia_ampere(device):
    obstacle = (
        'it needs NVIDIA devices of compute capability 8.0 or more, and those '
        f'of the mesh are {getattr(device, "device_kind", platform)}')
  elif dtype not in dtypes:
    obstacle = (
        f'it computes in {" or ".join(dtypes)} and config.model.dtype is '
        f'{dtype}')
  elif wanted == 'cudnn' and (head_dim % 8 or head_dim > 128):
    obstacle = (
        'it takes heads of up to 128 dimensions, a multiple of 8, and this '
        f'model has config.model.head_dim = {head_dim}')
  elif len(set(windows)) > 1:
    obstacle = (
        'its window is fixed when it is compiled, once for all layers, and '
        f'the layers of this model have the windows {sorted(set(windows))}')
  if obstacle is None:
    return wanted
  if kind == 'auto':
    return 'plain'
  raise ValueError(
      f'config.model.attention = {kind!r} cannot be used: {obstacle}. Use '
      "'plain', or 'auto' for the fastest kind that works.")


def _nvidia_ampere(device):
  """Whether a GPU is one on which cuDNN has fused attention."""
  # '9.0' by CUDA; ROCm's devices, of the platform gpu too, say 'gfx90a'.
  major = str(getattr(device, 'compute_capability', '')).partition('.')[0]
  return major.isdecimal() and int(major) >= 8


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    *,
    cache: Any = None,
    cache_length: jax.Array | None = None,
    segments: jax.Array | None = None,
    window: int | jax.Array | None = None,
    kind: str = 'plain',
    layout: sharding.Layout | None = None,
) -> jax.Array:
  """Attention of T new tokens over the cache and over themselves.

  A cached slot s is position s; the new token t of row b is at position
  cache_length[b] + t. A token sees itself and what precedes it: the first
  cache_length[b] slots, the new tokens up to itself, of both only what is less
  than `window` positions back, and of its own segment.

  With a cache every kind is computed plainly: joining the kernel's result with
  the cache's would need its log-sum-exp. On CPU devices 'splash' is interpreted
  and 'cudnn' left to XLA, both slowly: for tests, `resolve` refuses them there.

  Args:
    q: [B, T, N, H], rotated, not scaled.
    k: [B, T, K, H], rotated; K divides N. None: it is in the cache already,
      at slots cache_length[b] + t.
    v: [B, T, K, H], or None as k.
    cache: one layer's earlier keys and values, `.k` and `.v` [B, K, S, H], or
      [B, K / p, S, p H] where p heads share a row.
    cache_length: [B] int32, entries of the cache that each row may see.
    segments: [B, T] int32, which of the row's packed sequences a token belongs
      to, 0 for padding; without it a row is one sequence followed by padding,
      which the causal mask hides. Not together with a cache.
    window: as the field's `sliding_window` (transformers' masking_utils: the
      token itself counts); None, 0 and less: no limit. Traced only for 'plain'.
    kind: plain, splash or cudnn, see `resolve`.
    layout: where the arrays lie. Needed by the kernels on several devices.

  Returns:
    [B, T, N, H] of q's dtype; scores and softmax are float32.

  Raises:
    ValueError: both a cache and segments.
  """
  if cache is not None and segments is not None:
    raise ValueError('packed segments have no cache: pass one of the two.')
  if not isinstance(window, jax.Array) and (window or 0) <= 0:
    window = None
  if cache is not None or kind == 'plain':
    return checkpoint_name(
        _plain(q, k, v, cache, cache_length, segments, window), RESULT)
  platform = jax.default_backend() if layout is None else layout.platform
  kernel = functools.partial(
      {'splash': _splash, 'cudnn': _cudnn}[kind], window=window,
      emulate=platform == 'cpu')
  if layout is not None and layout.mesh.size > 1:
    # A batch that does not split, as in `init`, is computed on every device.
    batch = None if q.shape[0] % layout.shards else 'batch'
    spec = layout.spec(batch, None, 'heads')
    kernel = jax.shard_map(
        kernel, mesh=layout.mesh,
        in_specs=(spec, spec, spec, PartitionSpec(*spec[:1])),
        out_specs=spec, check_vma=False)
  return kernel(q, k, v, segments)


def _plain(q, k, v, cache, cache_length, segments, window):
  batch, length, heads, dim = q.shape
  kv_heads = cache.k.shape[1] if k is None else k.shape[2]
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
  t = jnp.arange(length)

  def near(distance):
    return (distance < window) | (jnp.asarray(window) <= 0)

  def joined(*parts):
    """One softmax over several (keys, values [B, K, U, H], visible).

    Not over one array of all scores: S + T of them would be no multiple of a
    TPU's lanes, which costs a third of a decoding step.
    """

    def dots(keys):  # [B, K, G, T, U]
      shared = keys.shape[-1] // dim
      if shared > 1:
        found = _dot('bkgth,bkuh->bkgtu', _beside_zeros(q, shared), keys)
        return found.reshape(*q.shape[:-1], -1)
      if length > 1:
        return _dot('bkgth,bkuh->bkgtu', q, keys)
      # In this order it takes XLA's CPU backend two thirds of the time.
      return jnp.moveaxis(_dot('bkuh,bkgth->bkugt', keys, q), 2, -1)

    def mixed(weights, values):  # [B, K, G, T, H]
      shared = values.shape[-1] // dim
      if shared == 1:
        return _dot('bkgtu,bkuh->bkgth', weights, values)
      y = _dot(
          'bkgtu,bkuh->bkgth', weights.reshape(
              batch, kv_heads // shared, -1, length, weights.shape[-1]),
          values)
      y = y.reshape(
          batch, kv_heads // shared, shared, -1, length, shared, dim)
      own = jnp.eye(shared, dtype=y.dtype)[None, None, :, None, None, :, None]
      return jnp.sum(y * own, axis=-2).reshape(q.shape)

    scores = [
        jnp.where(visible[:, None, None], dots(keys) * dim**-0.5, MASKED)
        for keys, _, visible in parts]
    top = jax.lax.stop_gradient(functools.reduce(
        jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores]))
    weights = [jnp.exp(x - top) for x in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    y = sum(
        mixed(w.astype(q.dtype), values)
        for w, (_, values, _) in zip(weights, parts))
    y = (y / total).astype(q.dtype).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads, dim)

  q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
  if cache is not None:
    cache_length = cache_length[:, None, None]
    at = cache_length + t[None, :, None]
    slot = jnp.arange(cache.k.shape[2])[None, None]
    before = slot < cache_length if k is not None else slot <= at
    if window is not None:
      before &= near(at - slot)
    if k is None:
      return joined((cache.k, cache.v, before))

  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], as in the cache
  back = (t[:, None] - t[None])[None]
  visible = back >= 0
  if window is not None:
    visible &= near(back)
  if cache is not None:
    return joined((cache.k, cache.v, before), (k, v, visible))
  if segments is not None:
    visible &= segments[:, :, None] == segments[:, None]
  return joined((k, v, visible))


def _beside_zeros(q, shared):
  """q [B, K, G, T, H] as [B, K / p, p G, T, p H], for keys that share rows.

  What a head does not use of a row it multiplies by zero: a TPU's product is no
  wider than the row anyway.
  """
  batch, heads, group, length, dim = q.shape
  q = q.reshape(batch, heads // shared, shared, group, length, 1, dim)
  q *= jnp.eye(shared, dtype=q.dtype)[None, None, :, None, None, :, None]
  return q.reshape(
      batch, heads // shared, shared * group, length, shared * dim)


def _dot(equation, x, y):
  """einsum that accumulates and returns float32."""
  direct = functools.partial(
      jnp.einsum, equation, preferred_element_type=jnp.float32)
  if x.dtype == jnp.float32:
    return direct(x, y)
  # XLA's CPU backend has no such product of bfloat16 for every shape.
  return jax.lax.platform_dependent(
      x, y, default=direct,
      cpu=lambda x, y: direct(x.astype(jnp.float32), y.astype(jnp.float32)))


def _splash(q, k, v, segments, *, window, emulate):
  # Here, since only a TPU needs what this imports.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads, dim = q.shape[1:]
  blocks = -(-length // BLOCK)
  block = -(-length // (blocks * LANES)) * LANES
  size = blocks * block

  # In float32: a bfloat16 1 / sqrt(H) would be another temperature.
  q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
  # [B, N or K, size, H]
  q, k, v = (_pad(x, size).swapaxes(1, 2) for x in (q, k, v))
  if segments is not None:
    segments = _pad(segments, size)
    segments = splash.SegmentIds(segments, segments)
  if window is None:
    mask = splash.CausalMask((size, size))
  else:
    mask = splash.LocalMask((size, size), (window - 1, 0), 0)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads),
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
          block_q_dq=block, block_kv_dq=block),
      head_shards=1, q_seq_shards=1, interpret=emulate,
      residual_checkpoint_name=RESULT)
  y = jax.vmap(kernel)(q, k, v, segments)
  return y.swapaxes(1, 2)[:, :length]


def _cudnn(q, k, v, segments, *, window, emulate):
  length = q.shape[1]
  size = length + length % 2  # jax 0.10 refuses to differentiate odd lengths
  mask = None
  if segments is not None:
    segments = _pad(segments, size)
    mask = (segments[:, :, None] == segments[:, None])[:, None]
  y = jax.nn.dot_product_attention(
      *(_pad(x, size) for x in (q, k, v)), mask=mask, is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation='xla' if emulate else 'cudnn')
  return y[:, :length]


def _pad(x, size):
  """x [B, T, ...] followed by zeros, which nothing before them can see."""
  return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
