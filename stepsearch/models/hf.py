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
import re
import shutil
import tempfile
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

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
    mesh: jax.sharding.Mesh | None = None, dtype: str = 'float32',
) -> tuple[qwen.Config, Any]:
  """Reads a decoder: Qwen2, Qwen2.5, Qwen3 or Llama-shaped.

  Args:
    path: the folder, on disk or gs://.
    mesh: where the parameters lie, by `sharding.RULES`; None: one device.
    dtype: of the parameters.

  Returns:
    the config and the actor's parameters.

  Raises:
    ValueError: as of `read_config` and `folder.stream`.
  """
  folder = path
  if not isinstance(folder, folder_lib.Folder):
    folder = folder_lib.Folder(path)
  config, table, ignore = _described(folder)
  shardings = None
  if mesh is not None:
    shardings = sharding_lib.shardings(qwen.axes(config)[0], mesh)
  return config, folder_lib.stream(
      folder, table, _shapes(config), shardings, dtype, ignore)


def check(folder: folder_lib.Folder) -> qwen.Config:
  """Reads config.json and the headers of the weights; what `load` would raise.

  Only values that are not finite are found by `load` alone.
  """
  config, table, ignore = _described(folder)
  folder_lib.check_tensors(folder, table, _shapes(config), ignore)
  return config


def _shapes(config):
  return jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))


def _described(folder):
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
    if not np.array_equal(folder.read(head), folder.read(embedding)):
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
_ROPE_FIELDS = {
    'default': set(),
    'linear': {'factor'},
    'yarn': {'factor', 'original_max_position_embeddings', 'attention_factor',
             'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'},
    'llama3': {'factor', 'original_max_position_embeddings', 'low_freq_factor',
               'high_freq_factor'},
}


def read_config(folder: folder_lib.Folder) -> qwen.Config:
  """What config.json says, whole.

  Raises:
    ValueError: an architecture or a field that is not implemented, or a field
      that is needed and missing; names file, field and value.
  """
  raw, file = folder.config, folder.path / folder_lib.CONFIG
  kind = raw.get('model_type')
  classes = {'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'llama': 'Llama'}
  if kind not in classes:
    raise ValueError(
        f'{file}: model_type = {kind!r} is not implemented; '
        f'{", ".join(classes)} are (dense decoders).')
  for name in raw.get('architectures') or ():
    if name not in (f'{classes[kind]}ForCausalLM', f'{classes[kind]}Model'):
      raise ValueError(
          f'{file}: architectures = {name} is not implemented; '
          f'{classes[kind]}ForCausalLM is.')

  def refuse(field, value, why):
    raise ValueError(f'{file}: {field} = {value!r} {why}')

  def need(field):
    if raw.get(field) is None:
      raise ValueError(f'{file}: the field {field} is missing: take the '
                       'config.json that the weights came with.')
    return raw[field]

  for field, value in raw.items():
    if field in _FIXED:
      if value is not None and value != _FIXED[field]:
        refuse(field, value, f'is not implemented; {_FIXED[field]!r} is.')
    elif field not in _INERT and value not in (None, False, [], {}):
      refuse(field, value, 'is not implemented. If it does not change what the '
             'model computes, remove it from the file.')

  heads, embed = need('num_attention_heads'), need('hidden_size')
  layers = need('num_hidden_layers')
  head_dim = raw.get('head_dim')
  if head_dim is None:
    if kind == 'qwen3':
      need('head_dim')  # transformers' default, 128, is seldom embed / heads
    if embed % heads:
      refuse('hidden_size', embed, f'is no multiple of num_attention_heads = '
             f'{heads}, and head_dim is not given.')
    head_dim = embed // heads
  bias = kind == 'qwen2' or bool(raw.get('attention_bias', False))
  theta, scaling = _rope(raw, need, refuse)
  try:
    return qwen.Config(
        vocab_size=need('vocab_size'), embed=embed, layers=layers, heads=heads,
        # Llama's first configs lack it: as many as heads.
        kv_heads=raw.get('num_key_value_heads') or (
            heads if kind == 'llama' else need('num_key_value_heads')),
        head_dim=head_dim, mlp=need('intermediate_size'), rope_theta=theta,
        rms_norm_eps=need('rms_norm_eps'),
        tie_embeddings=bool(raw.get('tie_word_embeddings', False)),
        attention_bias=bias, output_bias=bias and kind != 'qwen2',
        qk_norm=kind == 'qwen3', rope_scaling=scaling,
        windows=_windows(raw, layers, need, refuse),
        max_length=need('max_position_embeddings'))
  except (TypeError, ValueError) as error:
    raise ValueError(f'{file}: {error}') from error


def _windows(raw, layers, need, refuse):
  """Positions that each layer sees, () where all see all."""
  kinds = raw.get('layer_types')
  if kinds is None:
    # max_window_layers counts the layers below that keep full attention.
    first = need('max_window_layers') if raw.get('use_sliding_window') else (
        layers)
    kinds = ['full_attention' if i < first else 'sliding_attention'
             for i in range(layers)]
  unknown = set(kinds) - {'full_attention', 'sliding_attention'}
  if unknown or len(kinds) != layers:
    refuse('layer_types', kinds, f'is not implemented: {layers} times '
           'full_attention or sliding_attention are expected.')
  if 'sliding_attention' not in kinds:
    return ()
  if not raw.get('use_sliding_window', True):
    refuse('layer_types', kinds, 'contradicts use_sliding_window = false.')
  width = need('sliding_window')
  return tuple(
      width if kind == 'sliding_attention' else 0 for kind in kinds)


def _rope(raw, need, refuse):
  """theta and `RopeScaling`, from rope_parameters or the older fields."""
  field = 'rope_parameters'
  rope = raw.get(field)
  if not rope:
    field = 'rope_scaling'
    rope = raw.get(field) or {}
  rope = {key: value for key, value in rope.items() if value is not None}
  if any(isinstance(value, dict) for value in rope.values()):
    refuse(field, rope, 'is not implemented: one set for all layers is.')
  theta = rope.pop('rope_theta', None) or raw.get('rope_theta')
  if theta is None:
    # Llama's first configs lack it.
    theta = 1e4 if raw['model_type'] == 'llama' else need('rope_theta')
  kind = rope.pop('rope_type', rope.pop('type', 'default'))
  rope.pop('type', None)
  if rope.pop('partial_rotary_factor', 1) != 1:
    refuse(field, raw[field], 'is not implemented: partial_rotary_factor 1 is.')
  if kind == 'dynamic':
    refuse(f'{field}.rope_type', kind, 'is refused: its frequencies depend on '
           'the longest sequence in the batch, so that a cached token and a '
           'row on its own would get other logits. Use yarn.')
  if kind not in _ROPE_FIELDS:
    refuse(f'{field}.rope_type', kind, 'is not implemented; '
           f'{", ".join(_ROPE_FIELDS)} are.')
  unknown = sorted(rope.keys() - _ROPE_FIELDS[kind])
  if unknown:
    refuse(f'{field}.{unknown[0]}', rope[unknown[0]],
           f'is not implemented for rope_type {kind}.')
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
  """End-of-sequence ids (all of them) and the padding id that a model names."""
  ends, pad = [], None
  for raw in (folder.json(_GENERATION) or {}, folder.config):
    found = raw.get('eos_token_id')
    ends += found if isinstance(found, list) else [found]
    pad = raw.get('pad_token_id') if pad is None else pad
  return tuple(dict.fromkeys(i for i in ends if i is not None)), pad


# -- writing -------------------------------------------------------------------


def save(
    path: str | os.PathLike[str], config: qwen.Config, params: Any,
    tokenizer: Any = None, *, source: str | os.PathLike[str] | None = None,
    dtype: str | None = None, max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a Hugging Face folder; it appears whole or not at all.

  Args:
    path: local or gs://; absent or empty.
    config: of the actor.
    params: of the actor, jax arrays.
    tokenizer: as of `write_card`.
    source: as of `write_card`.
    dtype: of the weights; None: that of source's config.json, or float32.
    max_shard_bytes: of one safetensors file.

  Raises:
    ValueError: the folder holds files; a parameter is not finite; a config
      that no Hugging Face architecture has.
  """
  from safetensors import numpy as safetensors

  if dtype is None:
    raw = folder_lib.Folder(source).config if source is not None else {}
    dtype = raw.get('dtype') or raw.get('torch_dtype') or 'float32'
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
        array, finite = jax.device_get(
            _taker(split, layer is not None, dtype.name, leaf.sharding)(
                leaf, layer or 0))
        if not finite:
          raise ValueError(
              f'the parameter {name} is not finite (NaN or infinity): the '
              'run diverged before this checkpoint, take an earlier one.')
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
    source: str | os.PathLike[str] | None = None, dtype: str = 'float32',
) -> None:
  """Writes all of a Hugging Face folder but the weights.

  Args:
    path: an existing folder.
    config: of the actor.
    tokenizer: a `tokenizer.Tokenizer`; None: source's files.
    source: the folder that the weights came from: config.json and
      generation_config.json are its own, but for the type of the weights.
    dtype: of the weights.

  Raises:
    ValueError: a config that no Hugging Face architecture has.
  """
  path = epath.Path(path)
  if source is None:
    ends, pad = tokenizer.eos_ids, tokenizer.pad_id
    special = {
        'eos_token_id': ends[0] if len(ends) == 1 else list(ends),
        'pad_token_id': pad}
    _write_json(path / folder_lib.CONFIG, _raw_config(config) | special | {
        'torch_dtype': dtype})
    _write_json(path / _GENERATION, special)
  else:
    source = epath.Path(source)
    raw = folder_lib.Folder(source).config
    if dtype in (raw.get('dtype'), raw.get('torch_dtype')):
      (source / folder_lib.CONFIG).copy(
          path / folder_lib.CONFIG, overwrite=True)
    else:
      name = 'dtype' if 'dtype' in raw else 'torch_dtype'
      _write_json(path / folder_lib.CONFIG, raw | {name: dtype})
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
  """(leaf, layer) -> the tensor as it is stored, and whether it is finite."""

  def take(leaf, layer):
    if stacked:
      leaf = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    if split is not None:
      leaf = leaf.reshape(math.prod(leaf.shape[:split]), -1).T
    elif stacked:
      leaf = leaf.reshape(-1)
    leaf = leaf.astype(dtype)
    return leaf, jnp.all(jnp.isfinite(leaf))

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
  epath.Path(path).write_text(json.dumps(value, indent=2) + '\n')


@contextlib.contextmanager
def _new_folder(path: Any) -> Iterator[str]:
  """A temporary local folder that becomes `path` when all went well."""
  path = epath.Path(path)
  remote = '://' in str(path)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(
        f'{path} exists and is not empty: choose another folder to write to, '
        'or remove it.')
  draft = None
  try:
    if not remote:
      path.parent.mkdir(parents=True, exist_ok=True)
    draft = tempfile.mkdtemp(
        prefix=f'.{path.name}-', dir=None if remote else path.parent)
    yield draft
    if remote:
      # config.json last: a folder without it is no model.
      for name in sorted(
          os.listdir(draft), key=lambda name: name == folder_lib.CONFIG):
        epath.Path(draft, name).copy(path / name, overwrite=True)
    else:
      os.chmod(draft, 0o755)
      if path.exists():
        path.rmdir()
      os.replace(draft, path)
  except OSError as error:
    raise ValueError(
        f'{path} cannot be written ({error.strerror or error}): free space, '
        'check the permissions, or choose another folder. Nothing of it was '
        'left behind.') from error
  finally:
    if draft is not None:
      shutil.rmtree(draft, ignore_errors=True)
