"""Hugging Face folders ↔ parameters on the mesh.

    config.json ──read_config──▶ qwen.Config
    *.safetensors ──load──▶ params, each tensor read once and put where it lies
    params ──save──▶ a folder that transformers, vLLM and SGLang read

Folders are local or gs://; `folder` reads them. What config.json says and this
port does not do is an error, never a silent difference.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import paths
from stepsearch import sharding as sharding_lib
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.models import folder as folder_lib
from stepsearch.models import qwen

_GENERATION = 'generation_config.json'

# -- decoders ------------------------------------------------------------------


def tensors(config: qwen.Config, prefix: str = 'model.') -> folder_lib.Table:
  """How Hugging Face names the parameters of an actor."""
  layer = prefix + 'layers.{}.'
  linear = lambda name, split=1: folder_lib.Tensor(
      f'{layer}{name}.weight', split)
  vector = lambda name: folder_lib.Tensor(layer + name)
  table = {
      ('embedding',): folder_lib.Tensor(f'{prefix}embed_tokens.weight'),
      ('final_norm', 'scale'): folder_lib.Tensor(f'{prefix}norm.weight'),
      ('layers', 'attention_norm', 'scale'): vector('input_layernorm.weight'),
      ('layers', 'mlp_norm', 'scale'): vector(
          'post_attention_layernorm.weight'),
      ('layers', 'attention', 'o'): linear('self_attn.o_proj', 2),
  }
  for name in 'qkv':
    table['layers', 'attention', name] = linear(f'self_attn.{name}_proj')
    if config.attention_bias:
      table['layers', 'attention', f'{name}_bias'] = vector(
          f'self_attn.{name}_proj.bias')
  if config.output_bias:
    table['layers', 'attention', 'o_bias'] = vector('self_attn.o_proj.bias')
  if config.qk_norm:
    for name in 'qk':
      table['layers', 'attention', f'{name}_norm', 'scale'] = vector(
          f'self_attn.{name}_norm.weight')
  for name in ('gate', 'up', 'down'):
    table['layers', 'mlp', name] = linear(f'mlp.{name}_proj')
  if not config.tie_embeddings:
    table['lm_head',] = folder_lib.Tensor('lm_head.weight', 1)
  return table


def load(
    path: str | os.PathLike[str] | folder_lib.Folder,
    layout: sharding_lib.Layout | None = None, dtype: str = 'float32',
) -> tuple[qwen.Config, Any]:
  """Reads a decoder: Qwen2, Qwen2.5, Qwen3 or Llama-shaped.

  Args:
    path: the folder, on disk or gs://.
    layout: where the parameters lie; None: one device.
    dtype: of the parameters.

  Returns:
    the config and the actor's parameters.

  Raises:
    ValueError: as of `read_config` and `folder.stream`.
  """
  folder = path
  if not isinstance(folder, folder_lib.Folder):
    folder = folder_lib.Folder(path)
  config, table, ignore = _checked(folder)
  shardings = None
  if layout is not None:
    shardings = layout.place(qwen.axes(config)[0])
  return config, folder_lib.stream(
      folder, table, _shapes(config), shardings, dtype, ignore)


def check(folder: folder_lib.Folder) -> qwen.Config:
  """Reads config.json and the headers of the weights; what `load` would raise.

  Only values that are not finite are found by `load` alone.
  """
  return _checked(folder)[0]


def _shapes(config):
  return jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))


def _checked(folder):
  """Config, table, and names that may be there besides."""
  config = read_config(folder)
  bare = ('embed_tokens.weight' in folder.tensors
          and 'model.embed_tokens.weight' not in folder.tensors)
  table = tensors(config, '' if bare else 'model.')
  # Old Llama folders carry the frequencies, which config.json determines.
  ignore = [r'rotary_emb\.inv_freq$']
  head, embedding = 'lm_head.weight', table['embedding',].name
  if config.tie_embeddings and head in folder.tensors:
    ignore.append(r'^lm_head\.weight$')
  folder_lib.check_tensors(folder, table, _shapes(config), ignore)
  if config.tie_embeddings and head in folder.tensors and not folder.same(
      head, embedding):
    raise ValueError(
        f'{folder.file(head)}: {head} differs from {embedding}, but '
        'config.json ties them: set tie_word_embeddings to false in it, or '
        'remove the tensor.')
  return config, table, ignore


# Fields of config.json that do not change the hidden states or the logits.
_INERT = frozenset((
    'architectures', 'model_type', 'transformers_version', 'torch_dtype',
    'dtype', 'initializer_range', 'use_cache', 'bos_token_id', 'eos_token_id',
    'pad_token_id', 'unk_token_id', 'sep_token_id', 'attn_implementation',
    '_attn_implementation', '_attn_implementation_autoset', '_name_or_path',
    'is_llama_config', 'rope_interleaved', 'transformers.js_config',
    'unsloth_version', 'unsloth_fixed', 'chunk_size_feed_forward',
    'is_encoder_decoder', 'id2label', 'label2id', 'problem_type',
    'return_dict', 'output_hidden_states', 'output_attentions',
    'max_window_layers', 'sliding_window', 'use_sliding_window', 'layer_types',
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
    'num_attention_heads', 'num_key_value_heads', 'head_dim',
    'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
    'rope_parameters', 'tie_word_embeddings', 'attention_bias'))
# Fields with a meaning, and the one value of it that is implemented.
_FIXED = {
    'hidden_act': 'silu', 'attention_dropout': 0, 'mlp_bias': False,
    'pretraining_tp': 1, 'partial_rotary_factor': 1}
_KINDS = {
    bool: 'true or false', int: 'a whole number, not negative',
    float: 'a number, not negative', list: 'a list', dict: 'an object'}
_ROPE_FIELDS = {
    'default': set(),
    'linear': {'factor'},
    'yarn': {'factor', 'original_max_position_embeddings', 'attention_factor',
             'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'},
    'llama3': {'factor', 'original_max_position_embeddings', 'low_freq_factor',
               'high_freq_factor'},
}


class _Fields:
  """config.json, each field read with its type; errors name it."""

  def __init__(self, folder):
    self.raw, self.file = folder.config, folder.path / folder_lib.CONFIG

  def refuse(self, field, value, why):
    """Raises the error about a field."""
    raise ValueError(f'{self.file}: {field} = {value!r} {why}')

  def typed(self, field, value, kind):
    """The value, if it is of that kind."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float):
      fits = fits and not isinstance(value, bool) and value >= 0
    if not fits:
      self.refuse(field, value, f'must be {_KINDS[kind]}: take the config.json '
                  'that the weights came with.')
    return value

  def need(self, field, kind=int):
    """The value of a field that must be there."""
    if self.raw.get(field) is None:
      raise ValueError(f'{self.file}: the field {field} is missing: take the '
                       'config.json that the weights came with.')
    return self.typed(field, self.raw[field], kind)

  def option(self, field, kind, default=None):
    """The value of a field that may be absent or null."""
    return default if self.raw.get(field) is None else self.need(field, kind)


def read_config(folder: folder_lib.Folder) -> qwen.Config:
  """What config.json says, whole.

  Raises:
    ValueError: an architecture or a field that is not implemented, or a field
      that is needed and missing or of another type; names file, field and
      value.
  """
  fields = _Fields(folder)
  raw, file = fields.raw, fields.file
  refuse, need, option = fields.refuse, fields.need, fields.option
  classes = {'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'llama': 'Llama'}
  kind = raw.get('model_type')
  if kind not in [*classes]:
    refuse('model_type', kind, f'is not implemented; {", ".join(classes)} are '
           '(dense decoders).')
  for name in option('architectures', list, []):
    if name not in (f'{classes[kind]}ForCausalLM', f'{classes[kind]}Model'):
      raise ValueError(
          f'{file}: architectures = {name} is not implemented; '
          f'{classes[kind]}ForCausalLM is.')

  for field, value in raw.items():
    if field in _FIXED:
      if value is not None and value != _FIXED[field]:
        refuse(field, value, f'is not implemented; {_FIXED[field]!r} is.')
    elif field not in _INERT and value not in (None, False, [], {}):
      refuse(field, value, 'is not implemented. If it does not change what the '
             'model computes, remove it from the file.')

  heads, embed = need('num_attention_heads'), need('hidden_size')
  layers = need('num_hidden_layers')
  head_dim = option('head_dim', int)
  if head_dim is None:
    if kind == 'qwen3':
      need('head_dim')  # transformers' default, 128, is seldom embed / heads
    if not heads or embed % heads:
      refuse('hidden_size', embed, f'is no multiple of num_attention_heads = '
             f'{heads}, and head_dim is not given.')
    head_dim = embed // heads
  # Llama's first configs lack it: as many as heads.
  kv_heads = option('num_key_value_heads', int) or (
      heads if kind == 'llama' else need('num_key_value_heads'))
  bias = kind == 'qwen2' or option('attention_bias', bool, False)
  theta, scaling = _rope(fields)
  sizes = dict(
      vocab_size=need('vocab_size'), embed=embed, layers=layers, heads=heads,
      kv_heads=kv_heads, head_dim=head_dim, mlp=need('intermediate_size'),
      rope_theta=theta, rms_norm_eps=need('rms_norm_eps', float),
      tie_embeddings=option('tie_word_embeddings', bool, False),
      attention_bias=bias, output_bias=bias and kind != 'qwen2',
      qk_norm=kind == 'qwen3', rope_scaling=scaling,
      windows=_windows(fields, layers),
      max_length=need('max_position_embeddings'))
  try:
    return qwen.Config(**sizes)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def _windows(fields, layers):
  """Positions that each layer sees, () where all see all."""
  raw, refuse = fields.raw, fields.refuse
  need, option = fields.need, fields.option
  kinds = option('layer_types', list)
  # As in transformers: without use_sliding_window there is no width.
  slides = option('use_sliding_window', bool, False) and not (
      'sliding_window' in raw and raw['sliding_window'] is None)
  if kinds is None:
    # max_window_layers counts the layers below that keep full attention.
    first = need('max_window_layers') if slides else layers
    kinds = ['full_attention' if i < first else 'sliding_attention'
             for i in range(layers)]
  if len(kinds) != layers or any(
      kind not in ('full_attention', 'sliding_attention') for kind in kinds):
    refuse('layer_types', kinds, f'is not implemented: {layers} times '
           'full_attention or sliding_attention are expected.')
  if 'sliding_attention' not in kinds:
    return ()
  if raw['model_type'] == 'llama':
    refuse('layer_types', kinds, 'is not implemented: a Llama has no sliding '
           'windows, and transformers ignores them. Remove layer_types and '
           'use_sliding_window if the model was trained without.')
  if not slides:
    refuse('layer_types', kinds, 'needs a window, and use_sliding_window = '
           f'{raw.get("use_sliding_window")!r}, sliding_window = '
           f'{raw.get("sliding_window")!r} give none: set both, or make all '
           'layers full_attention.')
  width = need('sliding_window')
  return tuple(
      width if kind == 'sliding_attention' else 0 for kind in kinds)


def _rope(fields):
  """theta and `RopeScaling`, from rope_parameters or the older fields."""
  # Releases of transformers differ in which of them counts.
  names = [name for name in ('rope_scaling', 'rope_parameters')
           if fields.option(name, dict)] or ['rope_scaling']
  found = [_rope_of(name, fields) for name in names]
  if found[0] != found[-1]:
    scaling, parameters = (fields.raw[name] for name in names)
    fields.refuse(names[0], scaling, f'and {names[1]} = {parameters!r} '
                  'contradict each other: remove the one that the model was '
                  'not trained with.')
  return found[0]


def _rope_of(field, fields):
  raw, refuse, need = fields.raw, fields.refuse, fields.need
  rope = {key: value for key, value in fields.option(field, dict, {}).items()
          if value is not None}
  if any(isinstance(value, dict) for value in rope.values()):
    refuse(field, rope, 'is not implemented: one set for all layers is.')
  theta = rope.pop('rope_theta', None) or raw.get('rope_theta')
  if theta is None:
    # Llama's first configs lack it.
    theta = 1e4 if raw['model_type'] == 'llama' else need('rope_theta', float)
  fields.typed('rope_theta', theta, float)
  kind = rope.pop('rope_type', rope.pop('type', 'default'))
  rope.pop('type', None)
  if rope.pop('partial_rotary_factor', 1) != 1:
    refuse(field, raw[field], 'is not implemented: partial_rotary_factor 1 is.')
  if kind == 'dynamic':
    refuse(f'{field}.rope_type', kind, 'is refused: its frequencies depend on '
           'the longest sequence in the batch, so that a cached token and a '
           'row on its own would get other logits. Use yarn.')
  if kind not in [*_ROPE_FIELDS]:
    refuse(f'{field}.rope_type', kind, 'is not implemented; '
           f'{", ".join(_ROPE_FIELDS)} are.')
  unknown = sorted(rope.keys() - _ROPE_FIELDS[kind])
  if unknown:
    refuse(f'{field}.{unknown[0]}', rope[unknown[0]],
           f'is not implemented for rope_type {kind}.')
  for name, value in rope.items():
    kind_of = bool if name == 'truncate' else float
    fields.typed(f'{field}.{name}', value, kind_of)
  if kind == 'default':
    return float(theta), None
  missing = {'factor', 'low_freq_factor', 'high_freq_factor'} & (
      _ROPE_FIELDS[kind] - rope.keys())
  if missing:
    refuse(field, raw[field], f'lacks {", ".join(sorted(missing))}.')
  original = rope.pop('original_max_position_embeddings', None)
  if kind != 'linear' and not original:
    original = need('max_position_embeddings')
  mscale, all_dim = rope.pop('mscale', None), rope.pop('mscale_all_dim', None)
  if kind == 'yarn' and 'attention_factor' not in rope:
    growth = 0.1 * math.log(max(rope['factor'], 1.0))
    rope['attention_factor'] = (
        (growth * mscale + 1) / (growth * all_dim + 1) if mscale and all_dim
        else growth + 1)
  return float(theta), qwen.RopeScaling(
      kind=kind, original_length=original or 0, **rope)


def special_ids(
    folder: folder_lib.Folder
) -> tuple[tuple[int, ...], int | None]:
  """End-of-sequence ids (all of them) and the padding id that a model names.

  Raises:
    ValueError: an id that is no row of the embedding.
  """
  size = read_config(folder).vocab_size
  ends, pad = [], None
  for name in (_GENERATION, folder_lib.CONFIG):
    raw = folder.json(name) or {}
    found, padding = raw.get('eos_token_id'), raw.get('pad_token_id')
    ids = [('eos_token_id', i)
           for i in (found if isinstance(found, list) else [found])
           if i is not None]
    if padding not in (None, -1):  # Llama's first configs write -1 for none
      ids.append(('pad_token_id', padding))
    for field, i in ids:
      if type(i) is not int or not 0 <= i < size:
        raise ValueError(
            f'{folder.path / name}: {field} = {i!r} is no token of a model '
            f'with vocab_size = {size}: take the file that the weights came '
            'with, or correct it.')
      if field == 'eos_token_id':
        ends.append(i)
      elif pad is None:
        pad = i
  return tuple(dict.fromkeys(ends)), pad


# -- writing -------------------------------------------------------------------


def save(
    path: str | os.PathLike[str], config: qwen.Config, params: Any,
    tokenizer: Any = None, *, source: str | os.PathLike[str] | None = None,
    dtype: str | None = None, max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a Hugging Face folder; it appears whole or not at all.

  Parameters that `load` read and nothing has changed come back byte for byte,
  if they were stored in `dtype`: a folder of several types gets one. Names are
  those of a whole model ('model.' in front), and a tied model has no
  lm_head.weight, whether or not it was stored with one.

  Args:
    path: local or gs://; absent or empty.
    config: of the actor.
    params: of the actor, jax arrays.
    tokenizer: as of `write_card`.
    source: as of `write_card`.
    dtype: of the weights, one of `folder.WRITTEN`; None: that of source
      (`Folder.dtype`), or float32.
    max_shard_bytes: of one safetensors file.

  Raises:
    ValueError: the folder holds files or cannot be written; a parameter is not
      finite, or too large for `dtype`; a config that no Hugging Face
      architecture has.
  """
  from safetensors import numpy as safetensors

  if dtype is None:
    dtype = 'float32' if source is None else folder_lib.Folder(source).dtype()
  dtype = jnp.dtype(dtype)
  table = tensors(config)
  pieces = [  # in the order of the model: name, leaf, layer, split
      (tensor.name.format(layer), leaf, layer if tensor.stacked else None,
       tensor.split)
      for path_, tensor in table.items()
      for leaf in [functools.reduce(lambda t, k: t[k], path_, params)]
      for layer in range(leaf.shape[0] if tensor.stacked else 1)]
  pieces.sort(key=lambda piece: _natural(piece[0]))
  shards: list[list] = [[]]
  filled = 0
  for piece in pieces:
    _, leaf, layer, _ = piece
    size = dtype.itemsize * (leaf.size // (
        1 if layer is None else leaf.shape[0]))
    if shards[-1] and filled + size > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(piece)
    filled += size

  with _new_folder(path) as folder:
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
      file = 'model.safetensors' if len(shards) == 1 else (
          f'model-{number:05d}-of-{len(shards):05d}.safetensors')
      arrays = {}
      for name, leaf, layer, split in shard:
        array, finite, fits = jax.device_get(
            _taker(split, layer is not None, dtype.name, leaf.sharding)(
                leaf, layer or 0))
        if not finite:
          raise ValueError(
              f'the parameter {name} is not finite (NaN or infinity): the '
              'run diverged before this checkpoint, take an earlier one.')
        if not fits:
          raise ValueError(
              f'the parameter {name} has values too large for --dtype='
              f'{dtype.name}: use bfloat16 or float32.')
        arrays[name] = np.ascontiguousarray(array)
        weight_map[name] = file
        total += array.nbytes
      target = os.path.join(folder, file)
      safetensors.save_file(arrays, target, metadata={'format': 'pt'})
      os.chmod(target, 0o644)  # the library keeps it to its owner
    if len(shards) > 1:
      _write_json(os.path.join(folder, folder_lib.INDEX), {
          'metadata': {'total_size': total}, 'weight_map': weight_map})
    write_card(folder, config, tokenizer, source=source, dtype=dtype.name)


def write_card(
    path: str | os.PathLike[str], config: qwen.Config, tokenizer: Any = None, *,
    source: str | os.PathLike[str] | None = None, dtype: str | None = None,
) -> None:
  """Writes all of a Hugging Face folder but the weights.

  Args:
    path: an existing folder.
    config: of the actor.
    tokenizer: a `tokenizer.Tokenizer`; None: source's files.
    source: the folder that the weights came from: config.json and
      generation_config.json are its own, but for the type of the weights.
    dtype: of the weights; None: what source's config.json names, and where it
      names none, what they are stored in; float32 without source.

  Raises:
    ValueError: a config that no Hugging Face architecture has.
  """
  path = paths.Path(path)
  if source is None:
    ends, pad = tokenizer.eos_ids, tokenizer.pad_id
    special = {
        'eos_token_id': ends[0] if len(ends) == 1 else list(ends),
        'pad_token_id': pad}
    _write_json(path / folder_lib.CONFIG, _raw_config(config) | special | {
        'torch_dtype': dtype or 'float32'})
    _write_json(path / _GENERATION, special)
  else:
    source = paths.Path(source)
    folder = folder_lib.Folder(source)
    raw = folder.config
    named = [raw[name] for name in ('dtype', 'torch_dtype') if raw.get(name)]
    if dtype in named or (named and dtype is None):
      (source / folder_lib.CONFIG).copy(
          path / folder_lib.CONFIG, overwrite=True)
    else:
      name = 'dtype' if 'dtype' in raw else 'torch_dtype'
      _write_json(
          path / folder_lib.CONFIG, raw | {name: dtype or folder.dtype()})
    if (source / _GENERATION).exists():
      (source / _GENERATION).copy(path / _GENERATION, overwrite=True)
  if tokenizer is not None:
    tokenizer.save(path)
  else:
    for name in tokenizer_lib.FILES:
      if (source / name).exists():
        (source / name).copy(path / name, overwrite=True)


def _raw_config(config):
  """config.json of a model that came from no folder, in the older spelling.

  `rope_theta` and `rope_scaling` are read by every version of transformers,
  vLLM and SGLang; `rope_parameters` only by the newer ones.
  """
  if config.qk_norm:
    kind, name, fits = 'qwen3', 'Qwen3', (
        config.attention_bias == config.output_bias)
  elif config.attention_bias and not config.output_bias:
    kind, name, fits = 'qwen2', 'Qwen2', True
  else:
    kind, name, fits = 'llama', 'Llama', (
        config.attention_bias == config.output_bias and not config.windows)
  if not fits:
    raise ValueError(
        f'config.model: qk_norm = {config.qk_norm}, attention_bias = '
        f'{config.attention_bias}, output_bias = {config.output_bias}, windows '
        f'= {config.windows} together are no architecture of Hugging Face: '
        'choose those of Qwen2, Qwen3 or Llama to be able to export.')
  raw = {
      'architectures': [f'{name}ForCausalLM'], 'model_type': kind,
      'vocab_size': config.vocab_size, 'hidden_size': config.embed,
      'intermediate_size': config.mlp, 'num_hidden_layers': config.layers,
      'num_attention_heads': config.heads,
      'num_key_value_heads': config.kv_heads, 'head_dim': config.head_dim,
      'hidden_act': 'silu', 'rms_norm_eps': config.rms_norm_eps,
      'rope_theta': config.rope_theta,
      'max_position_embeddings': config.max_length,
      'tie_word_embeddings': config.tie_embeddings}
  if kind != 'qwen2':
    raw['attention_bias'] = config.attention_bias
  if any(config.windows):
    raw |= {
        'use_sliding_window': True, 'sliding_window': max(config.windows),
        'layer_types': [
            'sliding_attention' if window else 'full_attention'
            for window in config.windows]}
  scaling = config.rope_scaling
  if scaling is not None:
    fields = {
        'factor': scaling.factor,
        'original_max_position_embeddings': scaling.original_length,
        **{name: getattr(scaling, name) for name in (
            'attention_factor', 'beta_fast', 'beta_slow', 'truncate',
            'low_freq_factor', 'high_freq_factor')}}
    raw['rope_scaling'] = {'rope_type': scaling.kind} | {
        name: value for name, value in fields.items()
        if name in _ROPE_FIELDS[scaling.kind]}
  return raw


@functools.cache
def _taker(split, stacked, dtype, placed):
  """(leaf, layer) -> the tensor as stored, is it finite, does dtype hold it."""

  def take(leaf, layer):
    if stacked:
      leaf = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    if split is not None:
      leaf = leaf.reshape(math.prod(leaf.shape[:split]), -1).T
    elif stacked:
      leaf = leaf.reshape(-1)
    stored = leaf.astype(dtype)
    return stored, jnp.all(jnp.isfinite(leaf)), jnp.all(jnp.isfinite(stored))

  if isinstance(placed, jax.sharding.NamedSharding):
    placed = sharding_lib.replicated(placed.mesh)
  return jax.jit(take, out_shardings=placed)


def _natural(name):
  """Sorts layers by number; embedding first, norm and head last."""
  order = 0 if 'embed_tokens' in name else 1 if '.layers.' in name else (
      2 if name.endswith('norm.weight') else 3)
  return order, [
      int(part) if part.isdigit() else part
      for part in re.split(r'(\d+)', name)]


def _write_json(path, value):
  paths.Path(path).write_text(json.dumps(value, indent=2) + '\n')


@contextlib.contextmanager
def _new_folder(path: paths.Address) -> Iterator[pathlib.Path]:
  """A local folder that becomes `path` when all went well."""
  import safetensors

  if paths.occupied(path, folder_lib.CONFIG):
    raise ValueError(
        f'{path} exists and is not empty: choose another folder to write to, '
        'or remove it.')
  try:
    # config.json last: a folder without it is no model.
    with paths.new_folder(path, folder_lib.CONFIG) as draft:
      yield draft
  except safetensors.SafetensorError as error:  # a full disk, say
    raise ValueError(
        f'{path} cannot be written ({error}): free space, check the '
        'permissions, or choose another folder.') from error
