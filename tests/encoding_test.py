import dataclasses
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
import tokenizers

from stepsearch import build_index
from stepsearch import encode
from stepsearch import passages
from stepsearch import paths
from stepsearch.models import encoder
from stepsearch.retrieval import encoders
from stepsearch.retrieval import encoding
from stepsearch.retrieval import index
from stepsearch.retrieval import retriever
from stepsearch.types import Document

_ROOT = pathlib.Path(__file__).parents[1]
_WORDS = ('alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi')


def _corpus(size):
  rng = np.random.default_rng(0)
  text = lambda: ' '.join(rng.choice(_WORDS, rng.integers(1, 9)))
  return [Document(str(i), f't{i}', text()) for i in range(size)]


_CORPUS = _corpus(23)


class _Killed(Exception):
  pass


class _Encoder:
  """Unit vectors of a text's letters; dies after so many calls."""

  dimensions = 8
  fingerprint = 'letters'

  def __init__(self, calls=None):
    self.calls = calls

  def embed_passages(self, texts):
    if self.calls == 0:
      raise _Killed
    self.calls = self.calls and self.calls - 1
    x = np.array(
        [[1 + text.count(c) for c in 'abcdefgh'] for text in texts], np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _expected():
  return _Encoder().embed_passages(
      [retriever.passage_text(document) for document in _CORPUS])


def _bytes(folder):
  return {
      pathlib.PurePath(file).name: paths.Path(file).read_bytes()
      for file in paths.files(folder)}


def test_any_number_of_processes_makes_the_same_files(tmp_path):
  made = {}
  for count in (1, 3):
    folder = tmp_path / str(count)
    for p in reversed(range(count)):
      encoding.encode(_CORPUS, _Encoder(), folder, rows=4, shard=(p, count))
    made[count] = _bytes(folder)
  assert made[1] == made[3] and len(made[1]) == 6 + 1
  np.testing.assert_array_equal(
      encoding.gather(tmp_path / '3'), _expected())


@pytest.mark.parametrize('count', [1, 2, 3, 5, 23])
def test_shards_of_an_index_are_every_pth_vector(tmp_path, count):
  encoding.encode(_CORPUS, _Encoder(), tmp_path, rows=4)
  for p in range(count):
    np.testing.assert_array_equal(
        encoding.gather(tmp_path, (p, count)), _expected()[p::count])


@pytest.fixture(params=['disk', 'store'])
def folder(request, tmp_path):
  if request.param == 'disk':
    return tmp_path / 'vectors'
  return request.getfixturevalue('bucket') + '/vectors'


def test_a_killed_job_goes_on_with_what_is_missing(folder, tmp_path):
  encoding.encode(_CORPUS, _Encoder(), tmp_path / 'whole', rows=4)
  with pytest.raises(_Killed):
    encoding.encode(_CORPUS, _Encoder(calls=2), folder, rows=4)
  kept = _bytes(folder)
  assert len(kept) == 2 + 1
  with pytest.raises(ValueError, match='4 of 6 files .* vectors-00002-of-'):
    encoding.gather(folder)
  again, seen = _Encoder(calls=4), []  # exactly what is missing
  encoding.encode(
      _CORPUS, again, folder, rows=4, on_file=lambda *told: seen.append(told))
  assert seen == [
      (2, 6, 0), (3, 6, 4), (4, 6, 8), (5, 6, 12), (6, 6, 15)]
  assert _bytes(folder) == _bytes(tmp_path / 'whole')
  encoding.encode(_CORPUS, _Encoder(calls=0), folder, rows=4)  # nothing is left
  np.testing.assert_array_equal(encoding.gather(folder), _expected())


@pytest.mark.parametrize('change, named', [
    (dict(corpus=_corpus(22)), 'corpus'), (dict(rows=5), 'rows'),
    (dict(fingerprint='other'), 'embedder')])
def test_a_folder_of_something_else_is_refused(tmp_path, change, named):
  encoding.encode(_CORPUS, _Encoder(calls=6), tmp_path, rows=4)
  made = _Encoder()
  made.fingerprint = change.get('fingerprint', made.fingerprint)
  with pytest.raises(index.IndexMismatchError, match=f'made with {named} = '):
    encoding.encode(
        change.get('corpus', _CORPUS), made, tmp_path,
        rows=change.get('rows', 4))


def test_damaged_folders_are_named(tmp_path):
  with pytest.raises(ValueError, match='holds no vectors'):
    encoding.gather(tmp_path)
  plan = encoding.encode(_CORPUS, _Encoder(), tmp_path, rows=4)
  file = tmp_path / plan.files[3]
  good = file.read_bytes()
  file.write_bytes(good[:-5])
  with pytest.raises(ValueError, match='vectors-00003-of-00006.*is damaged'):
    encoding.gather(tmp_path)
  np.save(file, np.zeros([3, 8], np.float32))
  with pytest.raises(ValueError, match=r'damaged \(it holds \(3, 8\) float32'):
    encoding.gather(tmp_path)
  file.write_bytes(good)
  (tmp_path / 'plan.json').write_text('{"size": 3}')
  with pytest.raises(ValueError, match='plan.json is no plan'):
    encoding.gather(tmp_path)


def _write_encoder(folder):
  """A tiny BERT of random weights."""
  folder.mkdir()
  config = encoder.Config(
      vocab_size=12, embed=16, layers=2, heads=2, mlp=16, positions=40)
  (folder / 'config.json').write_text(json.dumps(dict(
      model_type='bert', vocab_size=12, hidden_size=16, num_hidden_layers=2,
      num_attention_heads=2, intermediate_size=16, max_position_embeddings=40,
      type_vocab_size=2, layer_norm_eps=1e-12, hidden_act='gelu')))
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *_WORDS]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  shapes = jax.eval_shape(lambda: encoder.init(config, jax.random.key(0)))
  rng, tensors = np.random.default_rng(0), {}
  for path, tensor in encoder.tensors().items():
    leaf = shapes
    for name in path:
      leaf = leaf[name]
    for layer in range(2 if tensor.stacked else 1):
      shape = tensor.shape(leaf.shape) or (
          leaf.shape[1:] if tensor.stacked else leaf.shape)
      tensors[tensor.name.format(layer)] = rng.normal(
          float(path[-1] == 'scale'), 0.3, shape).astype(np.float32)
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return folder


def test_the_commands_survive_a_kill_and_make_the_same_index(tmp_path, capsys):
  model = _write_encoder(tmp_path / 'model')
  corpus = tmp_path / 'corpus.jsonl'
  documents = _corpus(1000)
  passages.write(corpus, documents)

  def start(output):
    return subprocess.Popen(
        [sys.executable, '-m', 'stepsearch.encode', f'--corpus={corpus}',
         f'--embedder={model}', f'--output={output}', '--rows=20'],
        cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  vectors = tmp_path / 'vectors'
  killed = start(vectors)
  while not list(vectors.glob('vectors-00002-*')):
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.01)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  kept = {file.name for file in vectors.glob('vectors-*')}
  assert 2 < len(kept) < 50  # it was killed half-way
  dates = {name: (vectors / name).stat().st_mtime_ns for name in kept}
  again = start(vectors)
  out, err = again.communicate()
  assert again.returncode == 0 and err == ''
  assert f'{len(kept)}/50 files were there' in out
  assert re.search(r'50/50 files \| [\d,.]+ passages/s \| ETA 0:00:00', out)
  assert all(
      (vectors / name).stat().st_mtime_ns == date
      for name, date in dates.items())
  whole = encoders.load(model)
  encoding.encode(documents, whole, tmp_path / 'whole', rows=20)
  last = 'vectors-00049-of-00050.npy'
  # Here eight devices share a batch, so its sums are rounded otherwise.
  np.testing.assert_allclose(
      np.load(vectors / last), np.load(tmp_path / 'whole' / last), atol=1e-5)
  made = (tmp_path / 'whole' / last).read_bytes()
  (tmp_path / 'whole' / last).unlink()
  encoding.encode(documents, whole, tmp_path / 'whole', rows=20)
  assert (tmp_path / 'whole' / last).read_bytes() == made

  recall = build_index.run(
      str(corpus), str(tmp_path / 'index'), vectors=str(vectors),
      index='exact')
  assert recall == 1
  loaded = retriever.load(
      tmp_path / 'index', documents=documents, embedder=whole, index='exact')
  np.testing.assert_array_equal(
      loaded.index.vectors, encoding.gather(vectors))
  capsys.readouterr()
  passages.write(corpus, documents[:-1])
  with pytest.raises(ValueError, match='--vectors=.* are of another corpus'):
    build_index.run(
        str(corpus), str(tmp_path / 'index'), vectors=str(vectors))


def test_the_cost_on_a_slice_is_that_of_the_encoders_arithmetic(capsys):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu (launch/requirements-compile.txt) is not installed')
  found = encode.estimate(16_000_000, 'v5e:4x4', tokens=130)
  c, length = encoders.E5_BASE, 144  # the next width
  weights = c.layers * (4 * c.embed**2 + 2 * c.embed * c.mlp)
  flops = 2 * weights * length + 4 * c.layers * c.embed * length**2
  assert found['flops'] == pytest.approx(flops, rel=0.02)
  # A million passages a chip, at 197 TFLOPs a second.
  least = 1e6 * flops / 197e12 / 3600
  assert found['least'] == pytest.approx(least, rel=0.02)
  assert found['compiler'] > found['least']
  assert 'bound by compute' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, message', [
    (dict(method='bm25', embedder='e5'), '--method=bm25 takes no'),
    (dict(method='bm25', shard=(0, 2)), '--method=bm25 takes no'),
    (dict(vectors='v', embedder='e5'), '--embedder=e5: --vectors=v'),
])
def test_flags_that_do_not_go_together(arguments, message):
  given = dict(
      method='dense', vectors=None, shard=(0, 1), embedder='lexical')
  with pytest.raises(ValueError, match=message):
    build_index._check(**given | arguments)


def test_a_plan_counts_its_files():
  plan = encoding.Plan('c', 'e', 21_015_324, 768, 16_384)
  assert len(plan.files) == 1283
  assert plan.files[-1] == 'vectors-01282-of-01283.npy'
  assert sum(len(plan.span(i)) for i in range(1283)) == plan.size
  assert dataclasses.replace(plan, size=16_384).files == [
      'vectors-00000-of-00001.npy']
