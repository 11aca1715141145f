"""BERT encoders in Linen (E5, BGE, MiniLM): tokens → one unit vector a text.

    tokens, lengths ── Bert ──▶ hidden states ── pool ──▶ unit vectors
    tokens, lengths, segments ── CrossEncoder ──▶ one score a pair of texts

`Bert` is the post-norm encoder of arXiv 1810.04805 with exact (erf) GELU;
`pool` also serves decoders that embed by their last token. Layers are stacked
by `nn.scan`, like those of `models.qwen`, whose einsum letters are used here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from stepsearch import sharding
from stepsearch.models import folder as folder_lib
from stepsearch.models.folder import Tensor

POOLINGS = ('mean', 'cls', 'lasttoken')
_MASKED = -1e30  # finite, so that a row of nothing but padding has no NaN


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of one encoder."""

  vocab_size: int
  embed: int
  layers: int
  heads: int
  mlp: int
  positions: int
  types: int = 2  # segments; of a pair the second text is of segment 1
  eps: float = 1e-12
  dtype: str = 'float32'  # of the computation

  def __post_init__(self):
    if self.embed % self.heads:
      raise ValueError(
          f'hidden_size = {self.embed} is not a multiple of '
          f'num_attention_heads = {self.heads}: the heads share it equally.')


def _logical(init, *names):
  return nn.with_logical_partitioning(init, names)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, float32."""

  eps: float

  @nn.compact
  def __call__(self, x):
    """Normalises x [B, T, D]."""
    shape = (x.shape[-1],)
    scale = self.param('scale', _logical(nn.initializers.ones, 'embed'), shape)
    bias = self.param('bias', _logical(nn.initializers.zeros, 'embed'), shape)
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(
        jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return (wide * scale[None, None] + bias[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Attention of every token to every token that is not padding."""

  config: Config

  @nn.compact
  def __call__(self, x, mask):
    """x [B, T, D], mask [B, 1, 1, S] bool -> [B, T, D]."""
    c = self.config
    size = c.embed // c.heads
    init = nn.initializers.normal(c.embed**-0.5)

    def project(name):
      kernel = self.param(
          name, _logical(init, 'embed', 'heads', 'head_dim'),
          (c.embed, c.heads, size))
      bias = self.param(
          f'{name}_bias',
          _logical(nn.initializers.zeros, 'heads', 'head_dim'), (c.heads, size))
      y = jnp.einsum('btd,dnh->btnh', x, kernel.astype(x.dtype))
      return y + bias.astype(x.dtype)[None, None]

    q, k, v = project('q'), project('k'), project('v')
    scores = jnp.einsum(
        'btnh,bsnh->bnts', q * size**-0.5, k,
        preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
    y = jnp.einsum('bnts,bsnh->bnth', weights.astype(x.dtype), v)
    kernel = self.param(
        'o', _logical(init, 'heads', 'head_dim', 'embed'),
        (c.heads, size, c.embed))
    bias = self.param(
        'o_bias', _logical(nn.initializers.zeros, 'embed'), (c.embed,))
    y = jnp.einsum('bnth,nhd->btd', y, kernel.astype(x.dtype))
    return y + bias.astype(x.dtype)[None, None]


class Mlp(nn.Module):
  """down(gelu(up x))."""

  config: Config

  @nn.compact
  def __call__(self, x):
    """[B, T, D] -> [B, T, D]."""
    c = self.config
    init = nn.initializers.normal(c.embed**-0.5)
    zeros = nn.initializers.zeros
    up = self.param('up', _logical(init, 'embed', 'mlp'), (c.embed, c.mlp))
    up_bias = self.param('up_bias', _logical(zeros, 'mlp'), (c.mlp,))
    down = self.param('down', _logical(init, 'mlp', 'embed'), (c.mlp, c.embed))
    down_bias = self.param('down_bias', _logical(zeros, 'embed'), (c.embed,))
    hidden = jnp.einsum('btd,df->btf', x, up.astype(x.dtype))
    hidden += up_bias.astype(x.dtype)[None, None]
    # By erf: jax.nn.gelu goes by erfc, which costs XLA's CPU backend more.
    hidden *= 0.5 * (1 + jax.lax.erf(hidden * math.sqrt(0.5)))
    y = jnp.einsum('btf,fd->btd', hidden, down.astype(x.dtype))
    return y + down_bias.astype(x.dtype)[None, None]


class Layer(nn.Module):
  """Attention and MLP, each normalised after its residual: the scan's body."""

  config: Config

  @nn.compact
  def __call__(self, x, mask):
    """As `Attention`, with residuals; no output but the carry."""
    c = self.config
    x += Attention(c, name='attention')(x, mask)
    x = LayerNorm(c.eps, name='attention_norm')(x)
    x += Mlp(c, name='mlp')(x)
    return LayerNorm(c.eps, name='mlp_norm')(x), None


class Bert(nn.Module):
  """The encoder. Computation is in `config.dtype`."""

  config: Config

  @nn.compact
  def __call__(
      self, tokens: jax.Array, lengths: jax.Array,
      segments: jax.Array | None = None,
  ) -> jax.Array:
    """Hidden states [B, T, D] of `config.dtype`; those of padding mean nothing.

    Args:
      tokens: [B, T] int32, T <= config.positions, padding behind the text.
      lengths: [B] int32, tokens of each row; a row of 0 gives no NaN.
      segments: [B, T] int32, which text of a pair each token is of; None: 0.
    """
    c = self.config

    def table(name, axis, size):
      return self.param(
          name, _logical(nn.initializers.normal(0.02), axis, 'embed'),
          (size, c.embed))

    width = tokens.shape[1]
    x = jnp.take(table('embedding', 'vocab', c.vocab_size), tokens, axis=0)
    x += table('position_embedding', None, c.positions)[None, :width]
    types = table('type_embedding', None, c.types)
    x += types[None, :1] if segments is None else jnp.take(
        types, segments, axis=0)
    x = LayerNorm(c.eps, name='embedding_norm')(x.astype(c.dtype))
    mask = jnp.arange(width)[None] < lengths[:, None]
    x, _ = nn.scan(
        Layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=c.layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, name='layers')(x, mask[:, None, None])
    return x


class CrossEncoder(nn.Module):
  """How well the second text of a pair answers the first: a `Bert` with a head.

  score = w tanh(W h + b) + c, with h the hidden state of the first token.
  """

  config: Config

  @nn.compact
  def __call__(
      self, tokens: jax.Array, lengths: jax.Array, segments: jax.Array
  ) -> jax.Array:
    """Scores [B] float32; arguments as of `Bert`."""
    c = self.config
    h = Bert(c, name='bert')(tokens, lengths, segments)[:, 0]
    init, zeros = nn.initializers.normal(c.embed**-0.5), nn.initializers.zeros
    pooler = self.param(
        'pooler', _logical(init, 'embed', None), (c.embed, c.embed))
    pooler_bias = self.param('pooler_bias', _logical(zeros, None), (c.embed,))
    head = self.param('head', _logical(init, 'embed', None), (c.embed, 1))
    head_bias = self.param('head_bias', _logical(zeros, None), (1,))
    h = jnp.tanh(h.astype(jnp.float32) @ pooler + pooler_bias[None])
    return (h @ head + head_bias[None])[:, 0]


def pool(hidden: jax.Array, lengths: jax.Array, pooling: str) -> jax.Array:
  """Unit vectors [B, D] float32 of hidden states [B, T, D].

  Args:
    hidden: any float dtype, padding behind the tokens.
    lengths: [B] int32, tokens of each row; a row of 0 counts as one of 1.
    pooling: mean of the tokens, the first (cls) or the last (lasttoken).
  """
  hidden = hidden.astype(jnp.float32)
  lengths = jnp.maximum(lengths, 1)
  if pooling == 'mean':
    mask = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
    y = jnp.sum(jnp.where(mask[:, :, None], hidden, 0), axis=1)
    y /= lengths[:, None]
  else:
    at = lengths - 1 if pooling == 'lasttoken' else jnp.zeros_like(lengths)
    y = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
  norm = jnp.linalg.norm(y, axis=-1, keepdims=True)
  return y / jnp.maximum(norm, 1e-12)


def init(config: Config, key: jax.Array) -> Any:
  """Random float32 parameters."""
  boxed = Bert(config).init(
      key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))
  return nn.unbox(boxed['params'])


def init_cross_encoder(config: Config, key: jax.Array) -> Any:
  """Random float32 parameters of `CrossEncoder`."""
  one = jnp.zeros((1, 1), jnp.int32)
  boxed = CrossEncoder(config).init(key, one, jnp.ones((1,), jnp.int32), one)
  return nn.unbox(boxed['params'])


def load(
    folder: folder_lib.Folder,
    mesh: jax.sharding.Mesh,
    dtype: str = 'float32',
) -> tuple[Config, Any]:
  """Reads an encoder; every device of the mesh holds it whole.

  Args:
    folder: of model_type bert.
    mesh: where the parameters lie.
    dtype: of the parameters and the computation.

  Returns:
    the config and the parameters of `Bert`.

  Raises:
    ValueError: as of `read_config` and `folder.stream`.
  """
  config = dataclasses.replace(read_config(folder), dtype=dtype)
  inside = 'bert.embeddings.word_embeddings.weight' in folder.tensors
  shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
  # The pooler and the heads of pre-training take no part in an embedding.
  ignore = (r'^(bert\.)?pooler\.', r'^(bert\.)?embeddings\.position_ids$',
            r'^cls\.')
  table = tensors('bert.' if inside else '')
  return config, folder_lib.stream(folder, table, shapes, whole, dtype, ignore)


def load_cross_encoder(
    folder: folder_lib.Folder, mesh: jax.sharding.Mesh
) -> tuple[Config, Any]:
  """Reads a BertForSequenceClassification with one label, in float32.

  Every device of the mesh holds it whole.

  Returns:
    the config and the parameters of `CrossEncoder`.

  Raises:
    ValueError: as of `read_config` and `folder.stream`; no head, or one of
      several labels.
  """
  config = read_config(folder)
  head = folder.tensors.get('classifier.weight')
  if head is None:
    raise ValueError(
        f'{folder.path}: there is no classifier.weight, so this model embeds '
        'texts and scores no pairs: a reranker is a '
        'BertForSequenceClassification, such as '
        'cross-encoder/ms-marco-MiniLM-L6-v2.')
  if head[0] != 1:
    raise ValueError(
        f'{folder.path}: classifier.weight has {head[0]} labels, and '
        'nothing says which of them means that a passage answers a query: a '
        'reranker has one.')
  shapes = jax.eval_shape(
      lambda: init_cross_encoder(config, jax.random.key(0)))
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
  table = {('bert', *leaf): tensor for leaf, tensor in tensors('bert.').items()}
  table |= {
      ('pooler',): Tensor('bert.pooler.dense.weight', 1),
      ('pooler_bias',): Tensor('bert.pooler.dense.bias'),
      ('head',): Tensor('classifier.weight', 1),
      ('head_bias',): Tensor('classifier.bias')}
  ignore = (r'^bert\.embeddings\.position_ids$',)
  return config, folder_lib.stream(folder, table, shapes, whole, ignore=ignore)


def tensors(prefix: str = '') -> folder_lib.Table:
  """How Hugging Face names the parameters of `Bert`."""
  table = {}

  def norm(leaf, name):
    for ours, theirs in (('scale', 'weight'), ('bias', 'bias')):
      table[*leaf, ours] = Tensor(f'{prefix}{name}.LayerNorm.{theirs}')

  def dense(block, leaf, name, split=1):
    name = f'{prefix}encoder.layer.{{}}.{name}'
    table['layers', block, leaf] = Tensor(f'{name}.weight', split)
    table['layers', block, f'{leaf}_bias'] = Tensor(f'{name}.bias')

  for leaf, name in (('', 'word'), ('position_', 'position'),
                     ('type_', 'token_type')):
    table[f'{leaf}embedding',] = Tensor(
        f'{prefix}embeddings.{name}_embeddings.weight')
  norm(('embedding_norm',), 'embeddings')
  for leaf, name in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    dense('attention', leaf, f'attention.self.{name}')
  dense('attention', 'o', 'attention.output.dense', split=2)
  norm(('layers', 'attention_norm'), 'encoder.layer.{}.attention.output')
  dense('mlp', 'up', 'intermediate.dense')
  dense('mlp', 'down', 'output.dense')
  norm(('layers', 'mlp_norm'), 'encoder.layer.{}.output')
  return table


# Fields of config.json that do not change the hidden states.
_INERT = frozenset((
    '_name_or_path', 'architectures', 'attention_probs_dropout_prob',
    'bos_token_id', 'chunk_size_feed_forward', 'classifier_dropout',
    'directionality', 'dtype', 'eos_token_id', 'finetuning_task',
    'gradient_checkpointing', 'hidden_dropout_prob', 'id2label',
    'initializer_range', 'label2id', 'model_type', 'num_labels',
    'pad_token_id', 'problem_type', 'sbert_ce_default_activation_function',
    'sentence_transformers', 'tie_word_embeddings', 'torch_dtype',
    'transformers_version', 'use_cache'))
# Fields with a meaning, and the one value of it that is implemented.
_FIXED = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute'}
_SIZES = {
    'vocab_size': 'vocab_size', 'embed': 'hidden_size',
    'layers': 'num_hidden_layers', 'heads': 'num_attention_heads',
    'mlp': 'intermediate_size', 'positions': 'max_position_embeddings',
    'types': 'type_vocab_size', 'eps': 'layer_norm_eps'}


def read_config(folder: folder_lib.Folder) -> Config:
  """What config.json says, whole.

  Raises:
    ValueError: an architecture or a field that is not implemented, or a field
      that is missing; names file, field and value.
  """
  raw, file = folder.config, folder.path / folder_lib.CONFIG
  if raw.get('model_type') != 'bert':
    raise ValueError(
        f'{file}: model_type = {raw.get("model_type")!r} is not implemented '
        'here. Embedders may be bert (E5, BGE, MiniLM) and decoders that embed '
        'by their last token (qwen3, qwen2, llama), rerankers bert (the '
        'ms-marco cross-encoders, unlike bge-reranker, which is xlm-roberta).')
  for field, value in raw.items():
    if field in _FIXED and value != _FIXED[field]:
      raise ValueError(f'{file}: {field} = {value!r} is not implemented; '
                       f'{_FIXED[field]!r} is.')
    known = field in _INERT or field in _FIXED or field in _SIZES.values()
    # pooler_*: sizes of a part that takes no part.
    if not known and not field.startswith('pooler_') and value:
      raise ValueError(
          f'{file}: {field} = {value!r} is not implemented. If it does not '
          'change what the model computes, remove it from the file.')
  for field in ('hidden_act', *_SIZES.values()):
    if raw.get(field) is None:
      raise ValueError(f'{file}: the field {field} is missing: take the '
                       'config.json that the weights came with.')
  try:
    return Config(**{ours: raw[theirs] for ours, theirs in _SIZES.items()})
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error
