"""Searches by several processes, played by threads, against one process'."""

import importlib.util
import json
import threading

import numpy as np
import pytest

from configs import default
from stepsearch import build_index
from stepsearch import distributed
from stepsearch import engine as engine_lib
from stepsearch import passages
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever
from stepsearch.retrieval import shards
from stepsearch.types import Document


def _corpus(size=203):
  """Passages of few words, so that many score alike, and some are equal."""
  rng = np.random.default_rng(0)
  words = np.array([f'w{i}' for i in range(40)])
  texts = [' '.join(rng.choice(words, 6)) for _ in range(size)]
  texts[1::9] = texts[0::9][:len(texts[1::9])]  # neighbours: in other shards
  texts[27::27] = [texts[0]] * len(texts[27::27])
  return [Document(f'd{i}', f't{i % 5}', text) for i, text in enumerate(texts)]


_LOCK = threading.RLock()
_CORPUS = _corpus()
_QUERIES = ['w1 w2', ' ', 'w3', _CORPUS[0].text, 'xyzzy', 't1 w7 w7 w8',
            *(d.text for d in _CORPUS[5:12])]


def _processes(count, work):
  """Runs work(index, exchange) in threads; results, or what they raised.

  What is exchanged goes through JSON: it is data, whatever carries it.
  """
  barrier = threading.Barrier(count, timeout=20)
  slots, results = [None] * count, [None] * count

  def run(index):
    def exchange(value):
      slots[index] = json.dumps(value)
      barrier.wait()
      found = [json.loads(slot) for slot in slots]
      barrier.wait()
      return found

    try:
      results[index] = work(index, exchange)
    except Exception as error:
      results[index] = error

  threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


_HAS_SCANN = importlib.util.find_spec('scann') is not None


@pytest.mark.parametrize('backend', ['exact'] + ['scann'] * _HAS_SCANN)
@pytest.mark.parametrize('count', [2, 5])
def test_shards_find_what_one_index_finds(backend, count):
  whole = retriever.build(_CORPUS, dimensions=64, index=backend)

  def search(index, exchange):
    shard = retriever.build(
        _CORPUS, dimensions=64, index=backend, shard=(index, count))
    engine = shards.distribute(shard, exchange, index, count)
    assert len(engine) == len(_CORPUS)
    return [engine.search(_QUERIES, k) for k in (1, 3, 60, len(_CORPUS))], (
        engine.embed(['w1 w2']))

  vectors = whole.embed(['w1 w2'])
  expected = [whole.search(_QUERIES, k) for k in (1, 3, 60, len(_CORPUS))]
  for found, embedded in _processes(count, search):
    assert found == expected  # documents, their order, and scores to the bit
    # Its idf is that of the whole corpus.
    np.testing.assert_array_equal(embedded, vectors)


def test_shards_that_are_approximate():
  """They are smaller than the whole, and find no less of the nearest."""
  if not _HAS_SCANN:
    pytest.skip('scann has no wheel for this platform')
  settings = dict(dimensions=64, exact_below=10, reorder=20)
  exact = retriever.build(_CORPUS, dimensions=64, index='exact')
  whole = retriever.build(_CORPUS, **settings)

  def search(index, exchange):
    shard = retriever.build(_CORPUS, shard=(index, 2), **settings)
    assert shard.index.approximate
    return shards.distribute(shard, exchange, index, 2).search(_QUERIES, 10)

  def found_of(rows):
    return sum(
        len({d.id for d in row} & {d.id for d in best})
        for row, best in zip(rows, exact.search(_QUERIES, 10)))

  first, second = _processes(2, search)
  assert first == second
  assert found_of(first) >= found_of(whole.search(_QUERIES, 10))


def test_a_shard_has_a_folder_of_its_own(tmp_path, monkeypatch):
  def build(p, count, corpus=_CORPUS, name=None):
    return retriever.build(
        corpus, dimensions=32, index='exact', shard=(p, count),
        directory=tmp_path / (name or f'{p}-of-{count}'))

  built = [build(p, 3) for p in range(3)]
  assert [len(b) for b in built] == [68, 68, 67]
  assert list(built[1].documents) == _CORPUS[1::3]
  monkeypatch.setattr(indexing, 'build', None)  # from here on all are loaded
  loaded = build(1, 3)
  assert loaded.nearest(_QUERIES, 5) == built[1].nearest(_QUERIES, 5)
  assert (loaded.shard, loaded.corpus) == ((1, 3), built[1].corpus)
  for other in ((0, 3), (1, 2)):
    with pytest.raises(indexing.IndexMismatchError, match='shard 1 of 3'):
      build(*other, name='1-of-3')
  with pytest.raises(indexing.IndexMismatchError, match='200 documents'):
    build(1, 3, _CORPUS[:200])
  with pytest.raises(indexing.IndexMismatchError):
    retriever.load(tmp_path / '1-of-3', documents=_CORPUS)
  alone = retriever.load(tmp_path / '1-of-3')  # what it holds, as a corpus
  assert 'shard 1 of 3' in alone.fingerprints['corpus']
  with pytest.raises(ValueError, match='2 documents .* into 3 shards'):
    build(1, 3, _CORPUS[:2], name='new')


class _Engine:
  """Echoes its queries; fails when it is told to."""

  def __init__(self, error=None):
    self.asked, self.failed, self.error = [], 0, error

  def search(self, queries, k):
    self.asked.append(list(queries))
    if self.error:
      raise self.error
    self.failed += queries.count('none')
    return [
        [] if query == 'none' else [Document(query, 'ü', f'{k}', 0.1)] * k
        for query in queries]


def test_replicas_share_the_queries():
  queries = ['a', 'none', 'b', 'c', 'none', 'd', 'e']
  engines = [_Engine() for _ in range(3)]

  def search(index, exchange):
    engine = shards.distribute(engines[index], exchange, index, 3)
    assert not hasattr(engine, 'embed')
    found = engine.search(queries, 2), engine.search(['f'], 1)
    assert engine.search([], 1) == []
    return found, engine.failed

  alone = _Engine()
  expected = (alone.search(queries, 2), alone.search(['f'], 1)), 2
  assert _processes(3, search) == [expected] * 3
  assert engines[0].asked == [['a', 'c', 'e'], ['f']]
  assert engines[1].asked == [['none', 'none']]


def test_replicas_of_an_index():
  whole = retriever.build(_CORPUS, dimensions=64, index='exact')
  found = _processes(3, lambda index, exchange: shards.distribute(
      whole, exchange, index, 3).search(_QUERIES, 4))
  assert found == [whole.search(_QUERIES, 4)] * 3


@pytest.mark.parametrize('error, kind', [
    (retriever.Unavailable('it is down'), retriever.Unavailable),
    (OSError('it is down'), RuntimeError)])
def test_where_one_fails_all_do(error, kind):
  def search(index, exchange):
    engine = shards.distribute(
        _Engine(error if index == 1 else None), exchange, index, 3)
    return engine.search(['a', 'b', 'c'], 1)

  for raised in _processes(3, search):
    assert type(raised) is kind and str(raised) == 'process 1: it is down'


def test_processes_share_what_is_scored():
  class Scorer:
    fingerprint = 'lengths'
    asked = []

    def score(self, pairs):
      self.asked.append(len(pairs))
      return np.array([len(a + b) for a, b in pairs], np.float32)

  pairs = [('a' * i, 'b') for i in range(7)]
  found = _processes(3, lambda index, exchange: shards.Divided(
      Scorer(), exchange, index, 3).score(pairs))
  np.testing.assert_array_equal(found, [range(1, 8)] * 3)
  assert sorted(Scorer.asked) == [2, 2, 3]


@pytest.mark.parametrize('placement', ['replicated', 'sharded'])
def test_a_fusion_of_processes_is_that_of_one(placement, tmp_path, monkeypatch):
  config = default.get_config()
  config.retriever.update(dict(
      dimensions=64, index='exact', method='fusion', placement=placement,
      fusion_depth=20, directory=str(tmp_path / 'alone')))
  alone = engine_lib.build(config, _CORPUS, tmp_path, lambda _: None)
  expected = alone.search(_QUERIES, 5)
  assert (tmp_path / 'alone-bm25' / 'index.json').exists()
  config.retriever.directory = str(tmp_path / 'index')
  process = threading.local()
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'index', lambda: process.index)
  monkeypatch.setattr(distributed, 'first', lambda _: _LOCK)
  monkeypatch.setattr(distributed, 'barrier', lambda *_: None)
  monkeypatch.setattr(
      distributed, 'exchange', lambda value, channel: process.exchange(value))

  def search(index, exchange):
    process.index, process.exchange = index, exchange
    engine = engine_lib.build(config, _CORPUS, tmp_path, lambda _: None)
    return engine.search(_QUERIES, 5)

  assert _processes(2, search) == [expected] * 2


class _Broken(list):
  """Documents that cannot be read."""

  def __getitem__(self, row):
    raise OSError('the disk is gone')


@pytest.mark.parametrize('where', ['documents', 'embedder'])
def test_where_one_shard_fails_all_do(where):
  def search(index, exchange):
    shard = retriever.build(
        _CORPUS, dimensions=32, index='exact', shard=(index, 2))
    engine = shards.distribute(shard, exchange, index, 2)
    if index == 1:
      setattr(shard, where, _Broken(_CORPUS) if where == 'documents' else None)
    return engine.search([_CORPUS[1].text, _CORPUS[2].text], 2)

  for raised in _processes(2, search):
    assert type(raised) is RuntimeError
    assert str(raised).startswith('process 1: ')


def test_processes_that_do_not_fit_together():
  def search(index, exchange):
    engine = shards.distribute(_Engine(), exchange, index, 2)
    return engine.search([f'query {index}'], 1)

  for raised in _processes(2, search):
    assert 'different things' in str(raised)

  def shard(p, corpus=_CORPUS, count=2):
    return retriever.build(
        corpus, dimensions=32, index='exact', shard=(p, count))

  for second, words in (
      (shard(0), 'shards 0 of 2, 0 of 2'), (shard(2, count=3), '2 of 3'),
      (shard(1, _CORPUS[:99]), '99 documents')):
    engines = shard(0), second
    for raised in _processes(2, lambda i, exchange, e=engines: (
        shards.distribute(e[i], exchange, i, 2))):
      assert type(raised) is ValueError and words in str(raised)


def test_one_process_searches_alone():
  engine = _Engine()
  assert shards.distribute(engine, None, 0, 1) is engine


def test_build_index_makes_the_shards_of_a_run(tmp_path, monkeypatch, capsys):
  passages.write(tmp_path / 'corpus.jsonl', _CORPUS)
  recall = build_index.run(
      str(tmp_path / 'corpus.jsonl'), str(tmp_path / 'index'), dimensions=32,
      index='exact', shard=(1, 2))
  assert recall == 1.0 and 'shard-00001-of-00002' in capsys.readouterr().out
  monkeypatch.setattr(indexing, 'build', None)
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'index', lambda: 1)
  config = default.get_config()
  config.retriever.update(dict(
      dimensions=32, index='exact', directory=str(tmp_path / 'index'),
      placement='sharded'))
  monkeypatch.setattr(shards, 'distribute', lambda engine, *_: engine)
  engine = engine_lib.build(config, _CORPUS, tmp_path, lambda _: None)
  assert (len(engine), engine.shard) == (len(_CORPUS) // 2, (1, 2))


def test_the_config_says_where_the_index_is(tmp_path, monkeypatch):
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'index', lambda: 1)
  config = default.get_config()
  config.retriever.update(dict(dimensions=32, index='exact'))
  monkeypatch.setattr(shards, 'distribute', lambda engine, *_: engine)
  make = lambda: engine_lib.build(config, _CORPUS, tmp_path, lambda _: None)
  assert (len(make()), make().shard) == (len(_CORPUS), (0, 1))
  config.retriever.placement = 'sharded'
  assert (len(make()), make().shard) == (len(_CORPUS) // 2, (1, 2))
  assert (tmp_path / 'index' / 'shard-00001-of-00002' / 'index.json').exists()
  config.retriever.url = 'http://127.0.0.1:1'
  with pytest.raises(ValueError, match='config.retriever.placement .*url'):
    make()
  config.retriever.placement = 'split'
  with pytest.raises(ValueError, match='placement .*replicated.*sharded'):
    make()
