"""GGUF files to Hugging Face folders.

GGUF holds quantised weights, the configuration and the tokenizer of a model
in one file. This reads what `fetch_models` needs of it: Llama- and Qwen2-shaped
models with the byte-level BPE tokenizers of SmolLM2 and Qwen2, whose embedding
and output matrix are one. Block formats and their dequantisation are those of
the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import ml_dtypes
import numpy as np

_ARCHITECTURES = {
    'llama': {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'attention_bias': False,
        'mlp_bias': False,
    },
    'qwen2': {
        'architectures': ['Qwen2ForCausalLM'],
        'model_type': 'qwen2',
        'use_sliding_window': False,
    },
}

_TENSORS = {
    'token_embd': 'model.embed_tokens',
    'output': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}

# Kinds of token in GGUF's tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# GGUF calls these control tokens. In the official tokenizer, decoding without
# special tokens keeps them.
_NOT_SPECIAL = re.compile(r'<\|(fim_\w+|repo_name|file_sep)\|>')
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def convert(
    gguf_path: str | os.PathLike,
    folder: str | os.PathLike,
    eos_ids: tuple[int, ...],
):
  """Writes a GGUF file as a Hugging Face folder in bfloat16.

  Works a tensor at a time, so that memory holds the largest one only.

  Args:
    gguf_path: the file. Where it has both an embedding and an output matrix,
      two versions of what was one, the output's is written.
    folder: an existing folder, which gets model.safetensors, config.json,
      generation_config.json, tokenizer.json and tokenizer_config.json.
    eos_ids: for generation_config.json; the first one for config.json.

  Raises:
    ValueError: an architecture, tensor or tokenizer that is not known here.
  """
  import gguf

  folder = pathlib.Path(folder)
  reader = gguf.GGUFReader(gguf_path)

  def metadata(key: str) -> Any:
    if key not in reader.fields:
      raise ValueError(f'{gguf_path} has no {key} in its metadata.')
    return reader.fields[key].contents()

  config = _config(metadata, eos_ids)
  names = {tensor.name for tensor in reader.tensors}
  entries = {}
  for tensor in reader.tensors:
    if tensor.name == 'token_embd.weight' and 'output.weight' in names:
      continue
    name = _tensor_name(tensor.name)
    # GGUF lists dimensions innermost first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    entries[name] = shape, lambda tensor=tensor, shape=shape: _values(
        gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape),
        tensor.name,
        config,
    )
  _write_safetensors(folder / 'model.safetensors', entries)
  ids = {
      'bos_token_id': config['bos_token_id'],
      'eos_token_id': list(eos_ids) if len(eos_ids) > 1 else eos_ids[0],
      'pad_token_id': metadata('tokenizer.ggml.padding_token_id'),
  }
  tokenizer, settings = _tokenizer(metadata, eos_ids[0], ids['pad_token_id'])
  settings['model_max_length'] = config['max_position_embeddings']
  for name, content in (
      ('config.json', config),
      ('generation_config.json', ids),
      ('tokenizer.json', tokenizer),
      ('tokenizer_config.json', settings),
  ):
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / name).write_text(text + '\n', encoding='utf-8')


def _tensor_name(name: str) -> str:
  """The name in Hugging Face's models of a GGUF tensor."""
  match = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
  stem = match and _TENSORS.get(match[2])
  if not stem:
    raise ValueError(f'{name} in the GGUF file is a tensor not known here.')
  layer = '' if match[1] is None else f'model.layers.{match[1]}.'
  return f'{layer}{stem}.{match[3]}'


def _values(
    values: np.ndarray, name: str, config: dict[str, Any]
) -> np.ndarray:
  """Values of a GGUF tensor as the Hugging Face model has them, bfloat16.

  Llama's GGUF pairs neighbours (2i, 2i + 1) in the rotary embedding, Hugging
  Face's model i and i + H/2: the rows of a head are ordered accordingly.
  """
  heads = {
      'attn_q': config['num_attention_heads'],
      'attn_k': config['num_key_value_heads'],
  }.get(name.split('.')[-2])
  if config['model_type'] == 'llama' and heads:
    shape = values.shape
    values = values.reshape(heads, -1, 2, *shape[1:])
    values = values.swapaxes(1, 2).reshape(shape)
  return values.astype(ml_dtypes.bfloat16)


def _write_safetensors(
    path: pathlib.Path,
    entries: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
):
  """Writes bfloat16 tensors, given as shape and a function that makes them."""
  header = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for name, (shape, _) in entries.items():
    end = offset + 2 * math.prod(shape)
    header[name] = {
        'dtype': 'BF16', 'shape': shape, 'data_offsets': (offset, end)
    }
    offset = end
  encoded = json.dumps(header).encode()
  encoded += b' ' * (-len(encoded) % 8)
  shown = time.monotonic()
  with path.open('wb') as file:
    file.write(len(encoded).to_bytes(8, 'little') + encoded)
    for i, (_, make) in enumerate(entries.values(), start=1):
      file.write(make().tobytes())
      if time.monotonic() - shown > 5 or i == len(entries):
        shown = time.monotonic()
        print(f'converted {i} of {len(entries)} tensors', flush=True)


def _config(
    metadata: Callable[[str], Any], eos_ids: tuple[int, ...]
) -> dict[str, Any]:
  """config.json of a GGUF model."""
  kind = metadata('general.architecture')
  if kind not in _ARCHITECTURES:
    raise ValueError(
        f'general.architecture of the GGUF file is {kind!r}, not one of'
        f' {sorted(_ARCHITECTURES)}.'
    )
  own = lambda key: metadata(f'{kind}.{key}')
  # Through the shortest decimals of the float32: 1e-06, not 9.99999997e-07.
  decimal = lambda key: float(str(np.float32(own(key))))
  return _ARCHITECTURES[kind] | {
      'hidden_size': own('embedding_length'),
      'intermediate_size': own('feed_forward_length'),
      'num_hidden_layers': own('block_count'),
      'num_attention_heads': own('attention.head_count'),
      'num_key_value_heads': own('attention.head_count_kv'),
      'max_position_embeddings': own('context_length'),
      'rms_norm_eps': decimal('attention.layer_norm_rms_epsilon'),
      'rope_theta': decimal('rope.freq_base'),
      'vocab_size': len(metadata('tokenizer.ggml.tokens')),
      'hidden_act': 'silu',
      'attention_dropout': 0.0,
      'initializer_range': 0.02,
      'tie_word_embeddings': True,
      'bos_token_id': metadata('tokenizer.ggml.bos_token_id'),
      'eos_token_id': eos_ids[0],
      'torch_dtype': 'bfloat16',
      'use_cache': True,
  }


def _tokenizer(
    metadata: Callable[[str], Any], eos_id: int, pad_id: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """tokenizer.json and tokenizer_config.json of a GGUF model."""
  split = metadata('tokenizer.ggml.pre')
  byte_level = {
      'type': 'ByteLevel',
      'add_prefix_space': False,
      'trim_offsets': False,
      'use_regex': split == 'smollm',
  }
  first = {
      'smollm': {'type': 'Digits', 'individual_digits': True},
      'qwen2': {
          'type': 'Split',
          'pattern': {'Regex': _QWEN_SPLIT},
          'behavior': 'Isolated',
          'invert': False,
      },
  }
  if metadata('tokenizer.ggml.model') != 'gpt2' or split not in first:
    raise ValueError(
        'The tokenizer of the GGUF file is'
        f' {metadata("tokenizer.ggml.model")!r} with splits {split!r}, not'
        f" 'gpt2' with one of {sorted(first)}."
    )
  tokens = metadata('tokenizer.ggml.tokens')
  kinds = metadata('tokenizer.ggml.token_type')
  # What follows the last normal token is added to the vocabulary from outside;
  # the unused rows that pad the matrix are no tokens.
  size = 1 + max(i for i, kind in enumerate(kinds) if kind == _NORMAL)
  added = [
      {
          'id': i,
          'content': token,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
          'special': kind == _CONTROL and not _NOT_SPECIAL.fullmatch(token),
      }
      for i, (token, kind) in enumerate(zip(tokens, kinds))
      if kind in (_CONTROL, _USER_DEFINED)
  ]
  tokenizer = {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': added,
      'normalizer': {'type': 'NFC'} if split == 'qwen2' else None,
      'pre_tokenizer': {
          'type': 'Sequence', 'pretokenizers': [first[split], byte_level]
      },
      'post_processor': byte_level | {'use_regex': False},
      'decoder': byte_level | {'use_regex': False},
      'model': {
          'type': 'BPE',
          'dropout': None,
          'unk_token': None,
          'continuing_subword_prefix': '',
          'end_of_word_suffix': '',
          'fuse_unk': False,
          'byte_fallback': False,
          'vocab': {token: i for i, token in enumerate(tokens[:size])},
          'merges': metadata('tokenizer.ggml.merges'),
      },
  }
  settings = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'add_prefix_space': False,
      'clean_up_tokenization_spaces': False,
      'bos_token': None,
      'eos_token': tokens[eos_id],
      'pad_token': tokens[pad_id],
      'chat_template': metadata('tokenizer.chat_template'),
  }
  return tokenizer, settings
