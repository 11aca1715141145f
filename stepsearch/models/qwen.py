"""Qwen2, Qwen2.5 and Qwen3 dense decoders in Linen: hidden states and logits.

One definition serves rollout and update. Layers are stacked by `nn.scan`; the
key/value cache is an argument, and new keys and values are a result, so that
prefill, appending an observation and decoding are the same function with
T = prompt, chunk and 1. The cache is read inside the layer scan and written
once after it (`write`), each row at its own position.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without a visible key has no NaN


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and switches of one decoder; the names are the field's."""

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = True
  attention_bias: bool = True  # on q, k and v: Qwen2; off: Qwen3
  qk_norm: bool = False  # RMSNorm on each head of q and k: Qwen3
  dtype: str = 'float32'  # of the computation
  remat: bool = False  # recompute each layer in the backward pass

  def __post_init__(self):
    for field in ('vocab_size', 'embed', 'layers', 'heads', 'kv_heads',
                  'head_dim', 'mlp'):
      if getattr(self, field) < 1:
        raise ValueError(
            f'config.model.{field} = {getattr(self, field)}: must be at '
            'least 1.')
    if self.heads % self.kv_heads:
      raise ValueError(
          f'config.model.heads = {self.heads} is not a multiple of '
          f'config.model.kv_heads = {self.kv_heads}: every key/value head '
          'serves the same number of query heads.')
    if self.head_dim % 2:
      raise ValueError(
          f'config.model.head_dim = {self.head_dim}: rotary positions pair '
          'the dimensions of a head, choose an even number.')


@struct.dataclass
class Cache:
  """Keys (rotated) and values of every layer."""

  k: jax.Array  # [L, B, K, S, H] of the computation's dtype
  v: jax.Array  # [L, B, K, S, H]


def empty_cache(config: Config, batch: int, size: int) -> Cache:
  """A zeroed cache for `batch` rows of at most `size` positions."""
  shape = (config.layers, batch, config.kv_heads, size, config.head_dim)
  return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write(cache: Cache, new: Cache, position: jax.Array) -> Cache:
  """Writes T new entries of each row at that row's own position.

  The caller allocates S >= position + T for every row: a write past the end is
  clamped by XLA and would overwrite valid entries.

  Args:
    cache: [L, B, K, S, H].
    new: [L, B, K, T, H].
    position: [B] int32, where each row's first new entry goes.
  """

  def vectorised(cache, new, position):
    def row(old, fresh, start):  # [L, K, S, H], [L, K, T, H]
      return jax.lax.dynamic_update_slice(old, fresh, (0, 0, start, 0))

    put = jax.vmap(row, in_axes=(1, 1, 0), out_axes=1)
    return jax.tree.map(lambda x, y: put(x, y, position), cache, new)

  def looped(cache, new, position):
    def row(i, cache):
      def put(old, fresh):
        fresh = jax.lax.dynamic_slice_in_dim(fresh, i, 1, axis=1)
        return jax.lax.dynamic_update_slice(
            old, fresh, (0, i, 0, position[i], 0))

      return jax.tree.map(put, cache, new)

    return jax.lax.fori_loop(0, position.shape[0], row, cache)

  # XLA's CPU backend copies the whole cache for the vectorised form: 20 ms a
  # decoding step of the tiny run against 8.
  return jax.lax.platform_dependent(
      cache, new, position, cpu=looped, default=vectorised)


def _logical(init, *names):
  return nn.with_logical_partitioning(init, names)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, in float32."""

  eps: float
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x):
    """Normalises x [..., D]."""
    scale = self.param(
        'scale', _logical(nn.initializers.ones, self.axis), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(
        jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
    return (wide * scale).astype(x.dtype)


def _rotary(positions: jax.Array, head_dim: int, theta: float):
  """cos and sin [B, T, 1, H / 2] float32 of rotary position embedding."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, jnp.float32) / head_dim)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency[
      None, None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def _rotate(x, rotary):
  cos, sin = rotary
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin],
      axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention over [cache ; new] with one softmax."""

  config: Config

  @nn.compact
  def __call__(self, x, cache, rotary, new_mask, cache_mask):
    """x [B, T, D], one layer's cache [B, K, S, H] -> [B, T, D], new entries."""
    c = self.config
    groups = c.heads // c.kv_heads
    init = nn.initializers.normal(c.embed**-0.5)

    def project(name, heads, axis):
      kernel = self.param(
          name, _logical(init, 'embed', axis, 'head_dim'),
          (c.embed, heads, c.head_dim))
      y = jnp.einsum('btd,dnh->btnh', x, kernel.astype(x.dtype))
      if c.attention_bias:
        bias = self.param(
            f'{name}_bias',
            _logical(nn.initializers.zeros, axis, 'head_dim'),
            (heads, c.head_dim))
        y += bias.astype(x.dtype)[None, None]
      return y

    q = project('q', c.heads, 'heads')
    k = project('k', c.kv_heads, 'kv_heads')
    v = project('v', c.kv_heads, 'kv_heads')
    if c.qk_norm:
      q = RMSNorm(c.rms_norm_eps, 'head_dim', name='q_norm')(q)
      k = RMSNorm(c.rms_norm_eps, 'head_dim', name='k_norm')(k)
    q, k = _rotate(q, rotary), _rotate(k, rotary)
    new = Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))  # [B, K, T, H]

    q = q.reshape(*q.shape[:2], c.kv_heads, groups, c.head_dim)
    q *= c.head_dim**-0.5
    scores = jnp.einsum(
        'btkgh,bkuh->bkgtu', q, new.k, preferred_element_type=jnp.float32)
    scores = jnp.where(new_mask, scores, MASKED)
    if cache is not None:
      old = jnp.einsum(
          'btkgh,bksh->bkgts', q, cache.k, preferred_element_type=jnp.float32)
      scores = jnp.concatenate(
          [jnp.where(cache_mask, old, MASKED), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    if cache is None:
      y = jnp.einsum('bkgtu,bkuh->btkgh', weights, new.v)
    else:
      size = cache.k.shape[2]
      y = jnp.einsum('bkgts,bksh->btkgh', weights[..., :size], cache.v)
      y += jnp.einsum('bkgtu,bkuh->btkgh', weights[..., size:], new.v)
    y = y.reshape(*y.shape[:2], c.heads, c.head_dim)
    kernel = self.param(
        'o', _logical(init, 'heads', 'head_dim', 'embed'),
        (c.heads, c.head_dim, c.embed))
    return jnp.einsum('btnh,nhd->btd', y, kernel.astype(x.dtype)), new


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  config: Config

  @nn.compact
  def __call__(self, x):
    """[B, T, D] -> [B, T, D]."""
    c = self.config
    init = nn.initializers.normal(c.embed**-0.5)
    gate, up = (
        self.param(name, _logical(init, 'embed', 'mlp'), (c.embed, c.mlp))
        for name in ('gate', 'up'))
    down = self.param('down', _logical(init, 'mlp', 'embed'), (c.mlp, c.embed))
    hidden = nn.silu(jnp.einsum('btd,df->btf', x, gate.astype(x.dtype)))
    hidden *= jnp.einsum('btd,df->btf', x, up.astype(x.dtype))
    return jnp.einsum('btf,fd->btd', hidden, down.astype(x.dtype))


class Layer(nn.Module):
  """Pre-norm attention and MLP with residuals; the body of the layer scan."""

  config: Config

  @nn.compact
  def __call__(self, x, cache, rotary, new_mask, cache_mask):
    """As `Attention`, with residuals."""
    eps = self.config.rms_norm_eps
    with jax.named_scope('attention'):
      y, new = Attention(self.config, name='attention')(
          RMSNorm(eps, name='attention_norm')(x), cache, rotary, new_mask,
          cache_mask)
    x += y
    with jax.named_scope('mlp'):
      x += Mlp(self.config, name='mlp')(RMSNorm(eps, name='mlp_norm')(x))
    return x, new


class Qwen(nn.Module):
  """The decoder. Parameters are float32; computation is in `config.dtype`."""

  config: Config

  def setup(self):
    """Declares embedding, layers, final norm and, untied, the output matrix."""
    c = self.config
    self.embedding = self.param(
        'embedding', _logical(
            nn.initializers.normal(c.embed**-0.5), 'vocab', 'embed'),
        (c.vocab_size, c.embed))
    layer = nn.remat(Layer, prevent_cse=False) if c.remat else Layer
    self.layers = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=c.layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c)
    self.final_norm = RMSNorm(c.rms_norm_eps)
    if not c.tie_embeddings:
      self.lm_head = self.param(
          'lm_head', _logical(
              nn.initializers.normal(c.embed**-0.5), 'embed', 'vocab'),
          (c.embed, c.vocab_size))

  def __call__(
      self,
      tokens: jax.Array,
      positions: jax.Array,
      cache: Cache | None = None,
      cache_length: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Hidden states after the final norm, and the new keys and values.

    Rows are left-aligned: padding follows the tokens, so the causal mask alone
    keeps it from being seen.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32, absolute.
      cache: earlier keys and values [L, B, K, S, H], or None.
      cache_length: [B] int32, entries of the cache that each row may see.

    Returns:
      hidden [B, T, D] of `config.dtype`, and a `Cache` of the T new entries.
    """
    length = tokens.shape[1]
    x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
    rotary = _rotary(positions, self.config.head_dim, self.config.rope_theta)
    new_mask = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
    cache_mask = None
    if cache is not None:
      visible = jnp.arange(cache.k.shape[3])[None] < cache_length[:, None]
      cache_mask = visible[:, None, None, None]
    x, new = self.layers(x, cache, rotary, new_mask, cache_mask)
    return self.final_norm(x), new


class Critic(nn.Module):
  """The same trunk with a scalar head that starts at zero."""

  config: Config

  @nn.compact
  def __call__(self, tokens, positions):
    """Values [B, T] float32 read off each position's hidden state."""
    hidden, _ = Qwen(
        dataclasses.replace(self.config, tie_embeddings=True), name='trunk')(
            tokens, positions)
    kernel = self.param(
        'head', _logical(nn.initializers.zeros, 'embed'), (self.config.embed,))
    return jnp.einsum(
        'btd,d->bt', hidden, kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32)


def unembedding(params: Any) -> jax.Array:
  """The output matrix [D, V] of an actor's parameters, tied or not."""
  if 'lm_head' in params:
    return params['lm_head']
  return params['embedding'].T


def init(config: Config, key: jax.Array) -> Any:
  """Random float32 parameters of an actor."""
  return nn.unbox(_boxed(Qwen(config), key))


def init_critic(config: Config, actor: Any) -> Any:
  """Parameters of a critic: a copy of the actor's trunk, and a zero head."""
  trunk = {name: x for name, x in actor.items() if name != 'lm_head'}
  return {
      'trunk': jax.tree.map(jnp.copy, trunk),
      'head': jnp.zeros((config.embed,), jnp.float32),
  }


def axes(config: Config) -> tuple[Any, Any]:
  """Logical axis names of an actor's and a critic's parameters.

  Returns:
    two pytrees of `PartitionSpec`, one name (or None) per dimension.
  """
  return tuple(
      nn.get_partition_spec(
          jax.eval_shape(lambda m=module: _boxed(m, jax.random.key(0))))
      for module in (Qwen(config), Critic(config)))


def _boxed(module, key):
  tokens = jnp.zeros((1, 1), jnp.int32)
  return module.init(key, tokens, tokens)['params']
