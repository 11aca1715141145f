import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import paths
from stepsearch.models import cache as cache_lib
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf
from stepsearch.models import qwen

ROPE = {'rope_type': 'default', 'rope_theta': 1e4}
# name -> architecture, options of transformers' config
SHAPES = {
    'qwen2': ('Qwen2', dict(tie_word_embeddings=True)),
    'qwen2-untied': ('Qwen2', dict(num_key_value_heads=4)),
    'qwen2-one-kv-head': ('Qwen2', dict(num_key_value_heads=1)),
    'qwen2-window': ('Qwen2', dict(
        use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    'qwen2-all-windows': ('Qwen2', dict(
        use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    'qwen2-eps': ('Qwen2', dict(rms_norm_eps=1e-3)),
    'qwen3': ('Qwen3', dict(head_dim=16, tie_word_embeddings=True)),
    'qwen3-bias': ('Qwen3', dict(head_dim=12, attention_bias=True)),
    'qwen3-window': ('Qwen3', dict(
        head_dim=16, use_sliding_window=True, sliding_window=4,
        layer_types=['sliding_attention', 'full_attention',
                     'sliding_attention'])),
    'llama': ('Llama', dict(tie_word_embeddings=True)),
    'llama-bias': ('Llama', dict(attention_bias=True, head_dim=6)),
    'theta': ('Qwen2', dict(
        rope_parameters={'rope_type': 'default', 'rope_theta': 5e5})),
    'linear': ('Qwen2', dict(
        rope_parameters=ROPE | {'rope_type': 'linear', 'factor': 2.5})),
    'yarn': ('Qwen2', dict(rope_parameters=ROPE | {
        'rope_type': 'yarn', 'factor': 4.0,
        'original_max_position_embeddings': 16})),
    'yarn-all-fields': ('Qwen3', dict(head_dim=16, rope_parameters=ROPE | {
        'rope_type': 'yarn', 'factor': 3.0, 'beta_fast': 8.0, 'beta_slow': 0.5,
        'mscale': 0.8, 'mscale_all_dim': 0.3, 'truncate': False,
        'original_max_position_embeddings': 24})),
    'yarn-attention-factor': ('Qwen2', dict(rope_parameters=ROPE | {
        'rope_type': 'yarn', 'factor': 2.0, 'attention_factor': 0.7,
        'original_max_position_embeddings': 32})),
    'llama3': ('Llama', dict(rope_parameters=ROPE | {
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 16})),
}
BASE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rms_norm_eps=1e-6, tie_word_embeddings=False, rope_parameters=ROPE,
    attention_dropout=0.0, eos_token_id=2, pad_token_id=0)


def make_theirs(name, folder=None, dtype='float32', **saved):
  """transformers' random model; written to a folder."""
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  import transformers

  transformers.logging.set_verbosity_error()
  kind, options = SHAPES[name]
  config = getattr(transformers, f'{kind}Config')(**(BASE | options))
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # norms and biases too
      parameter.add_(0.2 * torch.randn_like(parameter))
  model = model.to(getattr(torch, dtype))
  if folder is not None:
    model.save_pretrained(folder, **saved)
  return model



def logits(config, params, tokens):
  positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, _ = qwen.Qwen(config).apply(
      {'params': params}, jnp.asarray(tokens), positions)
  return np.asarray(hidden @ qwen.unembedding(params))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A small Qwen2 in several bfloat16 shards, with nothing but numpy."""
  path = tmp_path_factory.mktemp('hf') / 'model'
  config = qwen.Config(
      vocab_size=62, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8,
      mlp=48, rope_theta=1e4, tie_embeddings=False)
  params = qwen.init(config, jax.random.key(0))
  hf.save(path, config, params, Words(), dtype='bfloat16',
          max_shard_bytes=10_000)
  return path


class Words:
  """As much of a tokenizer as a card needs."""

  eos_ids, pad_id = (2, 1), 0

  def save(self, path):
    (path / 'tokenizer.json').write_text('{}')


def edit(folder, tmp_path, remove=(), **fields):
  """A copy of the folder with another config.json."""
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  raw = json.loads((copy / 'config.json').read_text()) | fields
  for name in remove:
    del raw[name]
  (copy / 'config.json').write_text(json.dumps(raw))
  return copy


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize('name', SHAPES)
def test_logits_are_those_of_transformers(name, tmp_path):
  theirs = make_theirs(name, tmp_path / 'model')
  import torch

  config, params = hf.load(tmp_path / 'model')
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  # Longer than every window and every original context above.
  tokens = np.random.default_rng(1).integers(0, 61, (2, 50))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(
      logits(config, params, tokens), expected, rtol=0, atol=1e-4)
  assert np.abs(expected).max() > 1


@pytest.mark.parametrize('name', ['qwen2-window', 'yarn', 'qwen3-window'])
def test_cached_append_is_the_full_forward(name, tmp_path):
  make_theirs(name, tmp_path / 'model')
  config, params = hf.load(tmp_path / 'model')
  tokens = jnp.asarray(np.random.default_rng(2).integers(0, 61, (2, 24)))
  expected = logits(config, params, tokens)
  cache = qwen.empty_cache(config, 2, 32)
  length = jnp.zeros(2, jnp.int32)
  module = qwen.Qwen(config)
  for start, width in ((0, 10), (10, 9), (19, 1), (20, 4)):
    positions = start + jnp.broadcast_to(jnp.arange(width)[None], (2, width))
    hidden, new = module.apply(
        {'params': params}, tokens[:, start:start + width], positions, cache,
        length)
    cache = cache_lib.write(cache, new, length)
    length += width
    np.testing.assert_allclose(
        hidden @ qwen.unembedding(params),
        expected[:, start:start + width], atol=1e-4)


def test_packed_rows_are_the_rows_alone(folder):
  config, params = hf.load(folder)
  rng = np.random.default_rng(3)
  rows = [rng.integers(0, 61, n) for n in (5, 9, 3)]
  tokens = np.zeros((1, 20), np.int32)
  segments, positions = np.zeros((2, 1, 20), np.int32)
  start = 0
  for i, row in enumerate(rows):
    where = np.s_[0, start:start + len(row)]
    tokens[where], segments[where] = row, i + 1
    positions[where] = np.arange(len(row))
    start += len(row)
  hidden, _ = qwen.Qwen(config).apply(
      {'params': params}, jnp.asarray(tokens), jnp.asarray(positions),
      segments=jnp.asarray(segments))
  found = np.asarray(hidden @ qwen.unembedding(params))[0]
  start = 0
  for row in rows:
    np.testing.assert_allclose(
        found[start:start + len(row)], logits(config, params, row[None])[0],
        atol=1e-5)
    start += len(row)


# -- there and back ------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_folder_of_transformers_comes_back_byte_for_byte(dtype, tmp_path):
  make_theirs('qwen3', tmp_path / 'model', dtype)
  config, params = hf.load(tmp_path / 'model')
  hf.save(tmp_path / 'again', config, params, source=tmp_path / 'model')
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
  for name in ('config.json', 'generation_config.json', 'model.safetensors'):
    assert digest(tmp_path / 'model' / name) == digest(
        tmp_path / 'again' / name), name


def untyped(folder, tmp_path, kind):
  """A copy in one file whose config.json names no type of the weights."""
  from safetensors import numpy as safetensors

  copy = edit(folder, tmp_path, remove=['torch_dtype'])
  source = folder_lib.Folder(folder)
  for path in copy.glob('model*'):
    path.unlink()
  safetensors.save_file(
      {name: source.read(name).astype(
          'float32' if name.endswith('norm.weight') else kind)
       for name in source.tensors}, copy / 'model.safetensors')
  return copy


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_without_a_named_type_most_tensors_decide(folder, tmp_path, kind):
  copy = untyped(folder, tmp_path, kind)
  config, params = hf.load(copy)
  hf.save(tmp_path / 'again', config, params, source=copy)
  again, source = (
      folder_lib.Folder(path) for path in (tmp_path / 'again', copy))
  assert again.config == source.config | {'torch_dtype': kind}
  for name in source.tensors:
    assert again.kind(name) == {'float32': 'F32', 'bfloat16': 'BF16'}[kind]
    np.testing.assert_array_equal(
        again.read(name), source.read(name).astype(kind))
  # What a run keeps of the folder names the type too: `export` sees no more.
  (tmp_path / 'card').mkdir()
  hf.write_card(tmp_path / 'card', config, source=copy)
  assert folder_lib.Folder(tmp_path / 'card').dtype() == kind


def test_a_card_keeps_the_type_that_is_named(folder, tmp_path):
  config = hf.read_config(folder_lib.Folder(folder))
  hf.write_card(tmp_path, config, source=folder)
  assert (tmp_path / 'config.json').read_bytes() == (
      folder / 'config.json').read_bytes()
  assert folder_lib.Folder(tmp_path).dtype() == 'bfloat16'


def test_a_type_that_is_not_written_is_named(folder, tmp_path):
  copy = edit(folder, tmp_path, torch_dtype='float8_e4m3fn')
  config, params = hf.load(copy)
  match = r"config\.json: torch_dtype = 'float8_e4m3fn'.*--dtype"
  with pytest.raises(ValueError, match=match):
    hf.save(tmp_path / 'again', config, params, source=copy)


def test_transformers_reads_what_was_saved(folder, tmp_path):
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  import transformers

  config, params = hf.load(folder)
  tokens = np.random.default_rng(4).integers(0, 61, (1, 12))
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, output_loading_info=True)
  assert not any(info.values())
  assert theirs.generation_config.eos_token_id == [2, 1]
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(
      logits(config, params, tokens), expected, atol=1e-5)


def test_shards_are_bounded_and_indexed(folder):
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  files = set(index['weight_map'].values())
  assert len(files) > 3
  # The tensors of 48 x 32 and less fit a shard of 10,000 bytes several times.
  sizes = [(folder / name).stat().st_size for name in files]
  assert max(sizes) < 10_000 + 2_000  # the header comes on top
  assert index['metadata']['total_size'] == sum(
      np.prod(shape) * 2
      for shape in folder_lib.Folder(folder).tensors.values())


@pytest.mark.parametrize('change', [
    dict(), dict(tie_embeddings=True), dict(qk_norm=True, attention_bias=False),
    dict(qk_norm=True, output_bias=True), dict(attention_bias=False),
    dict(output_bias=True), dict(windows=(0, 9, 9)),
    dict(rope_scaling=qwen.RopeScaling('linear', 2.0)),
    dict(rope_scaling=qwen.RopeScaling(
        'yarn', 4.0, 16, 16.0, 2.0, False, 1.25)),
    dict(attention_bias=False, rope_scaling=qwen.RopeScaling(
        'llama3', 8.0, 16, low_freq_factor=2.0, high_freq_factor=3.0)),
], ids=str)
def test_config_json_says_the_whole_config(change, tmp_path):
  config = qwen.Config(
      vocab_size=61, embed=32, layers=3, heads=4, kv_heads=2, head_dim=16,
      mlp=48, rope_theta=3e4, rms_norm_eps=1e-5, tie_embeddings=False,
      max_length=128)
  config = dataclasses.replace(config, **change)
  hf.write_card(tmp_path, config, Words())
  (tmp_path / 'config.json').write_text(
      (tmp_path / 'config.json').read_text())
  assert hf.read_config(folder_lib.Folder(tmp_path)) == config
  assert hf.special_ids(folder_lib.Folder(tmp_path)) == ((2, 1), 0)


def test_a_config_of_no_architecture_cannot_be_written(tmp_path):
  config = qwen.Config(
      vocab_size=61, embed=32, layers=3, heads=4, kv_heads=2, head_dim=16,
      mlp=48, attention_bias=True, qk_norm=True)
  with pytest.raises(ValueError, match='qk_norm = True.*output_bias = False'):
    hf.write_card(tmp_path, config, Words())


def test_sharded_over_eight_devices(folder, eight):
  config, params = hf.load(folder)
  _, sharded = hf.load(folder, eight)
  placed = eight.place(qwen.axes(config)[0])
  jax.tree.map(np.testing.assert_array_equal, params, sharded)
  jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(), sharded, placed)


def test_saving_from_eight_devices(folder, eight, tmp_path):
  config, params = hf.load(folder, eight)
  hf.save(tmp_path / 'again', config, params, source=folder,
          max_shard_bytes=10_000)
  for path in sorted(folder.iterdir()):
    assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes()


def test_loading_holds_no_second_copy(tmp_path):
  config = qwen.Config(
      vocab_size=8192, embed=512, layers=16, heads=8, kv_heads=8, head_dim=64,
      mlp=2048)
  params = jax.tree.map(
      lambda x: jnp.full(x.shape, 0.1),
      jax.eval_shape(lambda: qwen.init(config, jax.random.key(0))))
  hf.save(tmp_path / 'model', config, params, Words(), dtype='bfloat16',
          max_shard_bytes=60_000_000)
  done = subprocess.run(
      [sys.executable, '-c', 'import json, sys; '
       'from tests.benchmarks import loading; '
       'print(json.dumps(loading.measure(sys.argv[1])))',
       str(tmp_path / 'model')],
      check=True, capture_output=True, text=True,
      cwd=pathlib.Path(__file__).parents[1],
      env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'})
  found = json.loads(done.stdout)
  assert found['live'] > 4 * found['shard']
  over = found['peak'] - found['before'] - found['live']
  assert 0 < over < 1.3 * found['shard'], found


def test_a_bucket_is_written_and_read(folder, bucket, monkeypatch):
  config, params = hf.load(folder)
  path = f'{bucket}/runs/model'
  save = lambda path: hf.save(
      path, config, params, source=folder, max_shard_bytes=10_000)
  save(path)
  again, found = hf.load(path)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params, found)
  with pytest.raises(ValueError, match='not empty'):
    save(path)
  with pytest.raises(ValueError, match='no such folder'):
    hf.load(f'{bucket}/runs/nothing')

  # And when it fails in the middle, nothing is left of it, but of the others.
  from gcsfs import retry
  store = paths._store(bucket)
  real = store.put_file
  for error, raised, match in (
      (retry.HttpError({'code': 403, 'message': 'no'}), ValueError,
       'other is not open to this account .no, 403.: grant it'),
      (KeyboardInterrupt(), KeyboardInterrupt, None)):
    copied = []

    def dies(local, remote, error=error, copied=copied):
      if len(copied) == 3:
        raise error
      copied.append(paths.Path(remote))
      real(local, remote)
      assert copied[-1].exists()

    with monkeypatch.context() as patch:
      patch.setattr(store, 'put_file', dies)
      with pytest.raises(raised, match=match):
        hf.save(f'{bucket}/runs/other', config, params, Words(),
                max_shard_bytes=10_000)
    assert len(copied) == 3 and copied[0].parent.name == 'other'
    assert [path.name for path in paths.Path(f'{bucket}/runs').iterdir()] == [
        'model']


def test_old_names_and_tied_copies_are_accepted(folder, tmp_path):
  from safetensors import numpy as safetensors

  copy = edit(folder, tmp_path, tie_word_embeddings=True)
  source = folder_lib.Folder(folder)
  tensors = {name: source.read(name) for name in source.tensors}
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(
      4, np.float32)
  for path in copy.glob('model*'):
    path.unlink()
  safetensors.save_file(tensors, copy / 'model.safetensors')
  config, params = hf.load(copy)
  assert config.tie_embeddings and 'lm_head' not in params

  # A model without a head, as embedders are stored.
  bare = {name.removeprefix('model.'): x for name, x in tensors.items()
          if name != 'lm_head.weight'}
  safetensors.save_file(bare, copy / 'model.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params, hf.load(copy)[1])

  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  nan = tensors[embedding].copy()
  nan[-1, -1] = np.nan
  missing = {name: x for name, x in tensors.items() if name != embedding}
  for changed, match in (
      (tensors | {head: tensors[head] + 1}, f'{head} differs'),
      (tensors | {head: tensors[head].astype('float32')}, f'{head} differs'),
      (tensors | {head: tensors[head].astype('int8')}, f'{head} differs'),
      (tensors | {embedding: nan, head: nan},
       f'{embedding} holds values that are not finite'),
      (missing, f'the tensor {embedding} .62, 32. is missing')):
    safetensors.save_file(changed, copy / 'model.safetensors')
    with pytest.raises(ValueError, match=match):
      hf.load(copy)


# -- what is refused -----------------------------------------------------------


@pytest.mark.parametrize(('fields', 'match'), [
    (dict(model_type='mixtral'), "model_type = 'mixtral' is not implemented"),
    (dict(architectures=['Qwen2ForSequenceClassification']),
     'architectures = Qwen2ForSequenceClassification'),
    (dict(hidden_act='gelu'), "hidden_act = 'gelu'"),
    (dict(attention_dropout=0.1), 'attention_dropout = 0.1'),
    (dict(logit_softcapping=30.0), 'logit_softcapping = 30.0'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}),
     "rope_scaling.rope_type = 'dynamic' is refused: its frequencies depend"),
    (dict(rope_scaling={'rope_type': 'longrope', 'factor': 2.0}), 'longrope'),
    (dict(rope_scaling={'rope_type': 'linear'}), 'lacks factor'),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': 2, 'mscale': 1}),
     'rope_scaling.mscale = 1'),
    (dict(rope_parameters={'full_attention': {'rope_theta': 1e4}}),
     'one set for all layers'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor = 0.5'),
    (dict(use_sliding_window=True, sliding_window=4),
     'max_window_layers is missing'),
    (dict(layer_types=['chunked_attention'] * 3), 'layer_types'),
    (dict(num_key_value_heads=3), 'kv_heads = 3'),
    (dict(rope_scaling={'type': 'linear', 'factor': 2},
          rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}),
     'rope_scaling = .*linear.* and rope_parameters = .*default.* contradict'),
    (dict(rope_scaling={'type': 'linear', 'factor': 2},
          rope_parameters={'rope_type': 'linear', 'rope_theta': 5e4,
                           'factor': 2}), 'contradict'),
    (dict(layer_types=['sliding_attention'] * 3, sliding_window=4),
     'use_sliding_window = None'),
    (dict(layer_types=['sliding_attention'] * 3, sliding_window=4,
          use_sliding_window=False), 'use_sliding_window = False'),
    (dict(model_type='llama', architectures=['LlamaForCausalLM'],
          layer_types=['sliding_attention'] * 3, use_sliding_window=True,
          sliding_window=4), 'a Llama has no sliding windows'),
    # Of another type than it has to be.
    (dict(rope_scaling='yarn'), "rope_scaling = 'yarn' must be an object"),
    (dict(rope_scaling={'type': 'linear', 'factor': '2'}),
     "rope_scaling.factor = '2' must be a number"),
    (dict(rope_scaling={'type': [], 'factor': 2}), 'rope_type = .. is not'),
    (dict(rope_theta='1e4'), "rope_theta = '1e4' must be a number"),
    (dict(rms_norm_eps='1e-6'), "rms_norm_eps = '1e-6' must be a number"),
    (dict(hidden_size='32'), "hidden_size = '32' must be a whole number"),
    (dict(num_hidden_layers=3.0), 'num_hidden_layers = 3.0 must be a whole'),
    (dict(num_attention_heads=True), 'num_attention_heads = True must be'),
    (dict(num_attention_heads=0, head_dim=None), 'num_attention_heads = 0'),
    (dict(vocab_size=-1), 'vocab_size = -1 must be a whole number'),
    (dict(tie_word_embeddings='no'), "= 'no' must be true or false"),
    (dict(layer_types='full_attention'), 'must be a list'),
    (dict(layer_types=[[]] * 3), 'layer_types'),
    (dict(model_type=['qwen2']), 'model_type = .*is not implemented'),
    (dict(architectures='Qwen2Model'), 'architectures = .*must be a list'),
])
def test_what_is_not_implemented_is_named(folder, tmp_path, fields, match):
  copy = edit(folder, tmp_path, **fields)
  with pytest.raises(ValueError, match=match) as error:
    hf.load(copy)
  assert str(error.value).count('config.json:') == 1


def test_two_ways_to_say_the_same_are_accepted(folder, tmp_path):
  rope = {'factor': 2.0, 'original_max_position_embeddings': None}
  copy = edit(
      folder, tmp_path, rope_scaling={'type': 'linear'} | rope,
      rope_parameters={'rope_type': 'linear', 'rope_theta': 10_000} | rope)
  config = hf.read_config(folder_lib.Folder(copy))
  assert config.rope_scaling == qwen.RopeScaling('linear', 2.0)


def test_windows_without_a_width_are_refused_by_transformers_too():
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  import transformers

  config = transformers.Qwen2Config(**BASE | dict(
      layer_types=['sliding_attention'] * 3, sliding_window=4))
  model = transformers.Qwen2ForCausalLM(config)
  with pytest.raises(ValueError, match='sliding_window'):
    model(torch.zeros((1, 8), dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(('fields', 'expected'), [
    (dict(pad_token_id=-1), ((2, 1), None)),
    (dict(eos_token_id=5, pad_token_id=3), ((2, 1, 5), 3)),
    (dict(pad_token_id=62), 'pad_token_id = 62 is no token of .*size = 62'),
    (dict(eos_token_id=[2, 70]), 'eos_token_id = 70 is no token'),
    (dict(eos_token_id=-1), 'eos_token_id = -1 is no token'),
    (dict(eos_token_id='</s>'), "eos_token_id = '</s>' is no token"),
])
def test_special_ids_are_rows_of_the_embedding(
    folder, tmp_path, fields, expected):
  copy = edit(folder, tmp_path, **fields)
  # generation_config.json comes first, and says eos only.
  (copy / 'generation_config.json').write_text('{"eos_token_id": [2, 1]}')
  if isinstance(expected, tuple):
    assert hf.special_ids(folder_lib.Folder(copy)) == expected
    return
  with pytest.raises(ValueError, match=expected) as error:
    hf.special_ids(folder_lib.Folder(copy))
  assert str(copy / 'config.json') in str(error.value)


@pytest.mark.parametrize('field', [
    'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size',
    'intermediate_size', 'num_key_value_heads', 'rms_norm_eps', 'rope_theta',
    'max_position_embeddings'])
def test_a_missing_field_is_named(folder, tmp_path, field):
  copy = edit(folder, tmp_path, remove=[field])
  with pytest.raises(ValueError, match=f'{field} is missing'):
    hf.load(copy)


@pytest.mark.parametrize('windows', [
    dict(sliding_window=4096, max_window_layers=3),
    # transformers takes no width for no limit.
    dict(sliding_window=None, max_window_layers=0, use_sliding_window=True)])
def test_fields_that_switch_nothing_on_are_accepted(folder, tmp_path, windows):
  copy = edit(
      folder, tmp_path, use_mrope=False, some_new_field=None, use_cache=True,
      **windows)
  found, expected = (
      hf.read_config(folder_lib.Folder(path)) for path in (copy, folder))
  assert found == expected


def damaged(folder, tmp_path, how):
  """A copy with something wrong, and what the error must say."""
  from safetensors import numpy as safetensors

  copy = edit(folder, tmp_path)
  index = json.loads((copy / 'model.safetensors.index.json').read_text())
  name = 'model.layers.1.mlp.up_proj.weight'
  shard = copy / index['weight_map'][name]
  tensors = safetensors.load_file(shard)
  if how == 'missing shard':
    shard.unlink()
    return copy, f'{shard.name} is missing'
  if how == 'truncated':
    shard.write_bytes(shard.read_bytes()[:-1])
    return copy, f'{shard.name} has .* bytes where its header announces'
  if how == 'pointer':
    shard.write_text('version https://git-lfs.github.com/spec/v1\n')
    return copy, f'{shard.name} is cut short or no safetensors file'
  if how == 'missing tensor':
    del tensors[name]
    match = f'{shard.name} lacks the tensor {name}'
  if how == 'wrong shape':
    tensors[name] = tensors[name][:-1].copy()
    match = (f'{shard.name}: {name} is .47, 32., and config.json makes it '
             '.48, 32.')
  if how == 'extra tensor':
    tensors['model.extra'] = np.ones(3, np.float32)
    match = f'{shard.name}: the tensor model.extra .3. has no place'
  if how == 'nan':
    tensors[name][3, 3] = np.nan
    match = f'{shard.name}: {name} holds values that are not finite'
  if how == 'quantised':
    tensors[name] = tensors[name].astype(np.int8)
    match = f'{shard.name}: {name} is of type I8'
  safetensors.save_file(tensors, shard)
  return copy, match


@pytest.mark.parametrize('how', [
    'missing shard', 'truncated', 'pointer', 'missing tensor', 'wrong shape',
    'extra tensor', 'nan', 'quantised'])
def test_damage_is_named(folder, tmp_path, how):
  copy, match = damaged(folder, tmp_path, how)
  with pytest.raises(ValueError, match=match):
    hf.load(copy)
  if how != 'nan':
    with pytest.raises(ValueError, match=match):
      hf.check(folder_lib.Folder(copy))


@pytest.mark.parametrize('header', [
    [], 3, {'a': []}, {'a': {'dtype': 'F32', 'shape': [1]}},
    {'a': {'dtype': 'F32', 'shape': 1, 'data_offsets': [0, 4]}},
    {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0]}},
    {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': ['x', 4]}},
    {'a': {'shape': [1], 'data_offsets': [0, 4]}}], ids=str)
def test_damaged_headers_are_named(folder, tmp_path, header):
  copy = edit(folder, tmp_path)
  for path in copy.glob('model*'):
    path.unlink()
  text = json.dumps(header).encode()
  (copy / 'model.safetensors').write_bytes(
      len(text).to_bytes(8, 'little') + text + bytes(4))
  with pytest.raises(
      ValueError, match=r'model\.safetensors is cut short or no safetensors'):
    hf.load(copy)


@pytest.mark.parametrize('placed', [[], {'a': 3}, {'a': ['b']}], ids=str)
def test_damaged_indices_are_named(folder, tmp_path, placed):
  copy = edit(folder, tmp_path)
  (copy / folder_lib.INDEX).write_text(json.dumps({'weight_map': placed}))
  with pytest.raises(ValueError, match='index.json has no weight_map'):
    hf.load(copy)


def test_what_is_no_model_is_named(tmp_path):
  with pytest.raises(ValueError, match='no such folder'):
    hf.load(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match=r'holds no config\.json'):
    hf.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match=r'config\.json is not JSON'):
    hf.load(tmp_path)


def test_pickles_are_not_read(folder, tmp_path):
  copy = edit(folder, tmp_path)
  for path in copy.glob('model*'):
    path.unlink()
  (copy / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='never pickles'):
    hf.load(copy)


def test_nothing_half_written_is_left(folder, tmp_path, monkeypatch):
  config, params = hf.load(folder)
  params['layers']['mlp']['up'] = params['layers']['mlp']['up'].at[1].set(
      jnp.inf)
  target = tmp_path / 'out' / 'model'
  with pytest.raises(
      ValueError, match=r'layers\.1\.mlp\.up_proj\.weight is not finite'):
    hf.save(target, config, params, source=folder)
  assert not list(target.parent.iterdir())

  target.mkdir()
  (target / 'mine').write_text('')
  with pytest.raises(ValueError, match='not empty'):
    hf.save(target, config, params, source=folder)
  assert [path.name for path in target.iterdir()] == ['mine']

  import safetensors
  from safetensors import numpy as safetensors_numpy

  config, params = hf.load(folder)
  for error, raised in (
      (OSError(28, 'No space left on device'), ValueError),
      (safetensors.SafetensorError('I/O error: No space left'), ValueError),
      (KeyboardInterrupt('No space'), KeyboardInterrupt)):
    def full(*_, error=error, **__):
      raise error

    monkeypatch.setattr(safetensors_numpy, 'save_file', full)
    with pytest.raises(raised, match='No space'):
      hf.save(tmp_path / 'other', config, params, source=folder)
    assert not list(tmp_path.glob('*other*'))


def test_values_too_large_for_a_type_are_not_blamed_on_the_run(
    folder, tmp_path):
  config, params = hf.load(folder)
  params['layers']['mlp']['up'] = params['layers']['mlp']['up'].at[1].set(1e5)
  with pytest.raises(
      ValueError, match=r'1\.mlp\.up.* too large for --dtype=float16: use bf'):
    hf.save(tmp_path / 'out', config, params, source=folder, dtype='float16')
  hf.save(tmp_path / 'out', config, params, source=folder, dtype='bfloat16')
