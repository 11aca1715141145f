"""Qwen2, Qwen2.5, Qwen3 and Llama dense decoders in Linen: hidden states.

One definition serves rollout and update. Layers are stacked by `nn.scan`; the
key/value cache is an argument, and new keys and values are a result, so that
prefill, appending an observation and decoding are the same function, `feed`,
with T = prompt, chunk and 1, each row at its own position.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import sharding
from stepsearch.models import attention
from stepsearch.models import cache as cache_lib
from stepsearch.models import lora
from stepsearch.models.cache import Cache


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched to contexts beyond the trained one."""

  kind: str  # linear | yarn (arXiv 2309.00071) | llama3
  factor: float
  original_length: int = 0  # positions of the pre-training: yarn, llama3
  beta_fast: float = 32.0  # yarn: rotations above which nothing is stretched
  beta_slow: float = 1.0  # yarn: rotations below which all is
  truncate: bool = True  # yarn: the ramp's ends lie on whole dimensions
  attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3


# What the forward pass keeps of each layer, of what is between its input and
# its output; the backward pass computes the rest again.
REMAT = {
    'off': None,  # everything is kept
    'full': jax.checkpoint_policies.nothing_saveable,
    'attention': jax.checkpoint_policies.save_only_these_names(
        attention.RESULT),
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.RESULT)),
}


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
  output_bias: bool = False  # on the attention's output
  qk_norm: bool = False  # RMSNorm on each head of q and k: Qwen3
  rope_scaling: RopeScaling | None = None
  windows: tuple[int, ...] = ()  # positions each layer sees, 0 = all; () = all
  max_length: int = 32768  # positions the model was made for
  dtype: str = 'float32'  # of the computation
  remat: str = 'off'  # what the backward pass recomputes: `REMAT`
  attention: str = 'plain'  # plain | splash | cudnn: `attention.resolve`
  lora: lora.Config | None = None  # of adapters, where there are any

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
    if self.remat not in REMAT:
      raise ValueError(
          f'config.model.remat = {self.remat!r}: choose one of '
          f'{", ".join(REMAT)}.')
    if self.head_dim % 2:
      raise ValueError(
          f'config.model.head_dim = {self.head_dim}: rotary positions pair '
          'the dimensions of a head, choose an even number.')
    if self.windows and len(self.windows) != self.layers:
      raise ValueError(
          f'config.model.windows has {len(self.windows)} entries for '
          f'{self.layers} layers: one is needed for each.')


def empty_cache(
    config: Config, batch: int, size: int, unrolled: bool = False,
    parts: int = 1,
) -> Cache:
  """A zeroed cache for `batch` rows of at most `size` positions.

  Args:
    config: of the decoder.
    batch: B.
    size: S.
    unrolled: one array a layer instead of stacked ones, as of `cache`.
    parts: that the heads are split into, on as many devices.
  """
  # A TPU moves whole lanes: two heads of 64 share a row, or half is padding.
  shared = 1 if unrolled else math.gcd(
      config.kv_heads // parts, attention.LANES // config.head_dim or 1)
  shape = (
      batch, config.kv_heads // shared, size, config.head_dim * shared)

  def entries():
    if unrolled:
      return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
    return jnp.zeros((config.layers, *shape), config.dtype)

  return Cache(entries(), entries())


def _logical(init, *names):
  return nn.with_logical_partitioning(init, names)


def _used(layout, weight, dtype, *names):
  """A weight as it is multiplied: `dtype` first, so that half is gathered."""
  weight = weight.astype(dtype)
  return weight if layout is None else layout.gather(weight, *names)


def _adapted(module, name, x, y, *names):
  """y = x W with what the adapters of W add, if the module is given any.

  Args:
    module: with `config` and `layout`.
    name: of W.
    x: [B, T, inputs...].
    y: [B, T, outputs...].
    *names: logical axes of W.
  """
  pair = module.get_variable('lora', name)
  if pair is None:
    return y
  count = lora.INPUTS[name]
  a, b = (
      _used(module.layout, weight, x.dtype, *its) for weight, its in (
          (pair['a'], (*names[:count], 'rank')),
          (pair['b'], ('rank', *names[count:]))))
  low = jnp.tensordot(x, a, count)  # [B, T, rank]
  return y + module.config.lora.scale * jnp.tensordot(low, b, 1)


def _laid(layout, x, *names, beside=None):
  """Activations where the layout wants them."""
  return x if layout is None else layout.constrain(x, *names, beside=beside)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, in float32."""

  eps: float
  axis: str = 'norm'  # of a whole hidden state: never split

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


def frequencies(config: Config) -> np.ndarray:
  """Radians per position of each pair of dimensions, [H / 2] float32.

  In float32 throughout, as the checkpoints were trained with: the last bit of
  a frequency is 1e-4 radians after a few thousand positions.
  """
  pairs = np.arange(0, config.head_dim, 2, dtype=np.float32)
  plain = np.float32(1) / (
      np.float32(config.rope_theta)**(pairs / np.float32(config.head_dim)))
  scaling = config.rope_scaling
  if scaling is None:
    return plain
  stretched = plain / np.float32(scaling.factor)
  if scaling.kind == 'linear':
    return stretched
  if scaling.kind == 'yarn':
    # The dimension that turns `rotations` times over the original context.
    dimension = lambda rotations: (
        config.head_dim * math.log(
            scaling.original_length / (rotations * 2 * math.pi))
        / (2 * math.log(config.rope_theta)))
    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = np.clip(
        (pairs / 2 - np.float32(low)) / np.float32(high - low or 1e-3), 0, 1)
    return (stretched * ramp + plain * (1 - ramp)).astype(np.float32)
  if scaling.kind == 'llama3':
    turns = scaling.original_length * plain / (2 * math.pi)
    share = np.clip(
        (turns - scaling.low_freq_factor)
        / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return ((1 - share) * stretched + share * plain).astype(np.float32)
  raise ValueError(
      f'rope scaling {scaling.kind!r}: linear, yarn and llama3 are known.')


def _rotary(positions: jax.Array, config: Config):
  """cos and sin [B, T, 1, H / 2] float32 of rotary position embedding."""
  angle = positions[:, :, None, None].astype(jnp.float32) * frequencies(
      config)[None, None, None, :]
  factor = 1.0
  if config.rope_scaling is not None:
    factor = config.rope_scaling.attention_factor
  return factor * jnp.cos(angle), factor * jnp.sin(angle)


def _rotate(x, rotary):
  cos, sin = rotary
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin],
      axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Projections, rotation and bias around `attention.attend`."""

  config: Config
  layout: sharding.Layout | None

  @nn.compact
  def __call__(self, x, cache, window, rotary, cache_length, segments):
    """x [B, T, D], one layer's cache [B, K, S, H] -> [B, T, D], new entries.

    Of a `cache.Layer`, that layer with the new entries in it.
    """
    c = self.config
    init = nn.initializers.normal(c.embed**-0.5)

    def bias(name, shape, *axes):
      value = self.param(
          f'{name}_bias', _logical(nn.initializers.zeros, *axes), shape)
      return value.astype(x.dtype)[None, None]

    def project(name, heads, axis):
      names = ('embed', axis, 'head_dim')
      kernel = self.param(
          name, _logical(init, *names), (c.embed, heads, c.head_dim))
      y = jnp.einsum(
          'btd,dnh->btnh', x, _used(self.layout, kernel, x.dtype, *names))
      y = _adapted(self, name, x, y, *names)
      if c.attention_bias:
        y += bias(name, (heads, c.head_dim), axis, 'head_dim')
      return y

    q = project('q', c.heads, 'heads')
    k = project('k', c.kv_heads, 'kv_heads')
    v = project('v', c.kv_heads, 'kv_heads')
    if c.qk_norm:
      q = RMSNorm(c.rms_norm_eps, 'head_dim', name='q_norm')(q)
      k = RMSNorm(c.rms_norm_eps, 'head_dim', name='k_norm')(k)
    q, k = _rotate(q, rotary), _rotate(k, rotary)
    new = Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))  # [B, K, T, H]
    if isinstance(cache, cache_lib.Layer):
      new = cache.add(new, cache_length)
      if cache.fresh:
        cache = None
      else:
        k = v = None
        cache = new.seen()
    mixed = attention.attend(
        q, k, v, cache=cache, cache_length=cache_length, segments=segments,
        window=window, kind=c.attention, layout=self.layout)
    names = ('heads', 'head_dim', 'embed')
    kernel = self.param(
        'o', _logical(init, *names), (c.heads, c.head_dim, c.embed))
    y = jnp.einsum(
        'btnh,nhd->btd', mixed, _used(self.layout, kernel, x.dtype, *names))
    y = _adapted(self, 'o', mixed, y, *names)
    if c.output_bias:
      y += bias('o', (c.embed,), 'embed')
    return y, new


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  config: Config
  layout: sharding.Layout | None

  @nn.compact
  def __call__(self, x):
    """[B, T, D] -> [B, T, D]."""
    c = self.config
    init = nn.initializers.normal(c.embed**-0.5)

    def project(name, x, size, *names):
      kernel = self.param(
          name, _logical(init, *names), (x.shape[-1], size))
      y = jnp.einsum(
          'bti,io->bto', x, _used(self.layout, kernel, x.dtype, *names))
      return _adapted(self, name, x, y, *names)

    # In decoding the MLP may be split over the batch's axes too.
    x = _laid(self.layout, x, 'batch', None, None, beside='mlp')
    hidden = nn.silu(project('gate', x, c.mlp, 'embed', 'mlp'))
    hidden *= project('up', x, c.mlp, 'embed', 'mlp')
    hidden = _laid(self.layout, hidden, 'batch', None, 'mlp')
    y = project('down', hidden, c.embed, 'mlp', 'embed')
    return _laid(self.layout, y, 'batch', None, None)


class Layer(nn.Module):
  """Pre-norm attention and MLP with residuals; the body of the layer scan."""

  config: Config
  layout: sharding.Layout | None

  @nn.compact
  def __call__(self, x, cache, window, *context):
    """As `Attention`, with residuals."""
    c = self.config
    if window is None and c.windows:
      window = c.windows[0]
    with jax.named_scope('attention'):
      y, new = Attention(c, self.layout, name='attention')(
          RMSNorm(c.rms_norm_eps, name='attention_norm')(x), cache, window,
          *context)
    x += y
    with jax.named_scope('mlp'):
      x += Mlp(c, self.layout, name='mlp')(
          RMSNorm(c.rms_norm_eps, name='mlp_norm')(x))
    return x, new


class Qwen(nn.Module):
  """The decoder. Parameters are float32; computation is in `config.dtype`.

  The layout is needed on several devices only. Adapters are the collection
  `lora`, which may be left out (`lora.variables`).
  """

  config: Config
  layout: sharding.Layout | None = None

  def setup(self):
    """Declares embedding, layers, final norm and, untied, the output matrix."""
    c = self.config
    self.embedding = self.param(
        'embedding', _logical(
            nn.initializers.normal(c.embed**-0.5), 'vocab', 'embed'),
        (c.vocab_size, c.embed))
    layer = Layer
    if c.remat != 'off':
      layer = nn.remat(Layer, prevent_cse=False, policy=REMAT[c.remat])
    self.layers = nn.scan(
        layer,
        variable_axes={'params': 0, 'lora': 0},
        split_rngs={'params': True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=c.layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, self.layout)
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
      segments: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Hidden states after the final norm, and the new keys and values.

    Without `segments` rows are left-aligned: padding follows the tokens, so
    the causal mask alone keeps it from being seen.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32, absolute; they start anew with every segment.
      cache: earlier keys and values [L, B, K, S, H], or None.
      cache_length: [B] int32, entries of the cache that each row may see.
      segments: [B, T] int32, which of several sequences packed into the row a
        token belongs to, 0 = padding; not together with a cache.

    Returns:
      hidden [B, T, D] of `config.dtype`, and a `Cache` of the T new entries.
    """
    c = self.config
    x = _embed(c, self.layout, self.embedding, tokens)
    # Windows that differ go through the scan; one that all layers share stays
    # a constant, which the kernels need.
    windows = None
    if len(set(c.windows)) > 1:
      windows = jnp.asarray(c.windows, jnp.int32)
    x, new = self.layers(
        x, cache, windows, _rotary(positions, c), cache_length, segments)
    return self.final_norm(x), new


class Critic(nn.Module):
  """The same trunk with a scalar head that starts at zero."""

  config: Config
  layout: sharding.Layout | None = None

  @nn.compact
  def __call__(self, tokens, positions, segments=None):
    """Values [B, T] float32 read off each position's hidden state."""
    hidden, _ = Qwen(
        dataclasses.replace(self.config, tie_embeddings=True), self.layout,
        name='trunk')(tokens, positions, segments=segments)
    kernel = self.param(
        'head', _logical(nn.initializers.zeros, 'norm'), (self.config.embed,))
    return jnp.einsum(
        'btd,d->bt', hidden, kernel.astype(hidden.dtype),
        preferred_element_type=jnp.float32)


def _embed(config, layout, table, tokens):
  """Rows of the embedding [V, D], [B, T, D] in the computation's dtype.

  Every device looks up all tokens in its part of the table, since the table is
  larger than what is looked up.
  """
  tokens = _laid(layout, tokens, 'batch', None, beside='embed')
  x = jnp.take(table, tokens, axis=0).astype(config.dtype)
  x = _laid(layout, x, 'batch', None, 'embed')
  return _laid(layout, x, 'batch', None, None)


def feed(
    config: Config, layout: sharding.Layout | None, params: Any,
    tokens: jax.Array, cache: Cache, start: jax.Array,
    rows: jax.Array | None = None, shards: int = 1, fresh: bool = False,
) -> tuple[jax.Array, Cache]:
  """Runs T tokens of n rows, each at its own place, and keeps their entries.

  Args:
    config: of the decoder.
    layout: as of `Qwen`.
    params: of an actor; its layers stacked or unrolled (`unroll`), as those of
      the cache.
    tokens: [n, T] int32.
    cache: of B rows, S positions.
    start: [n] int32, position of each row's first token; those before it are
      in the cache.
    rows: [n] int32, the rows of the cache, as of `cache.pick`; None: all B.
    shards: as of `cache.pick`.
    fresh: nothing precedes the tokens (start is 0), so that the kernels of
      `attention` can be used.

  Returns:
    hidden [n, T, D] after the final norm, and the cache with the new entries.
  """
  c = config
  length = tokens.shape[1]
  positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  if not isinstance(params['layers'], tuple):
    seen = None if fresh else cache_lib.pick(cache, rows, shards)
    hidden, new = Qwen(c, layout).apply(
        {'params': params}, tokens, positions, seen,
        None if seen is None else start)
    return hidden, cache_lib.write(cache, new, start, rows, shards)
  x = _embed(c, layout, params['embedding'], tokens)
  rotary = _rotary(positions, c)
  layers = []
  for i, layer in enumerate(params['layers']):
    x, entry = Layer(c, layout).apply(
        {'params': layer}, x,
        cache_lib.Layer(cache.k[i], cache.v[i], rows, shards, fresh),
        c.windows[i] if c.windows else None, rotary, start, None)
    layers.append(entry)
  hidden = RMSNorm(c.rms_norm_eps).apply({'params': params['final_norm']}, x)
  return hidden, Cache(
      tuple(layer.k for layer in layers), tuple(layer.v for layer in layers))


def unroll(params: Any) -> Any:
  """An actor's parameters with a tuple of layers instead of stacked ones."""
  [count] = {x.shape[0] for x in jax.tree.leaves(params['layers'])}
  return params | {'layers': tuple(
      jax.tree.map(lambda x, i=i: x[i], params['layers'])
      for i in range(count))}


def unembedding(params: Any) -> jax.Array:
  """The output matrix [D, V] of an actor's parameters, tied or not."""
  if 'lm_head' in params:
    return params['lm_head']
  return params['embedding'].T


def compact(config: Config, params: Any) -> Any:
  """Parameters in the computation's dtype, for a model that is not trained.

  They compute what the float32 ones do, bit for bit: a weight is cast before it
  is used anyway, and the scales of the norms, which are not, stay as they are.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x if path[-1].key == 'scale' else x.astype(config.dtype),
      params)


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
