import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import default
from stepsearch import assembly
from stepsearch import build_index
from stepsearch import config as config_lib
from stepsearch import engine as engine_lib
from stepsearch import passages
from stepsearch import serve
from stepsearch.retrieval import bm25
from stepsearch.retrieval import engines
from stepsearch.retrieval import fusion
from stepsearch.retrieval import index
from stepsearch.retrieval import rerank
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service
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


class _Listed:
  """An engine that finds what it was told to, by query."""

  failed = 0

  def __init__(self, found):
    self._found = found
    self.asked = []

  def search(self, queries, k):
    self.asked.append(k)
    return [
        [Document(name, name, '', 1.0) for name in self._found.get(q, [])[:k]]
        for q in queries]


class _Lengths:
  """Scores a document by its length."""

  fingerprint = 'lengths'

  def score(self, pairs):
    return np.array([float(len(text)) for _, text in pairs])


# ---- bm25


def _bm25_by_hand(documents, query, k1=1.5, b=0.75):
  """Scores by dictionaries, as the module's equation has them."""
  stop = set(('a an and are as at be but by for if in into is it no not of on '
              'or such that the their then there these they this to was will '
              'with').split())
  split = lambda text: [
      w for w in re.findall('[a-z0-9]+', text.lower()) if w not in stop]
  rows = [split(f'{d.title}\n{d.text}') for d in documents]
  mean = sum(map(len, rows)) / len(rows)
  scores = []
  for row in rows:
    counts = collections.Counter(row)
    score = 0
    for word in split(query):
      df = sum(word in other for other in rows)
      idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
      tf = counts[word]
      score += idf * tf / (tf + k1 * (1 - b + b * len(row) / mean))
    scores.append(score)
  return scores


@pytest.mark.parametrize('query', [
    'capital of England', 'Who was born in London?', 'London London Paris'])
def test_bm25_scores_as_its_equation(query):
  engine = bm25.build(_DOCUMENTS)
  expected = _bm25_by_hand(_DOCUMENTS, query)
  [found] = engine.search([query], 5)
  assert [d.score for d in found] == pytest.approx(
      sorted((s for s in expected if s > 0), reverse=True), abs=1e-6)
  for document in found:
    row = [d.id for d in _DOCUMENTS].index(document.id)
    assert document.score == pytest.approx(expected[row], abs=1e-6)
    assert document.text == _DOCUMENTS[row].text


def test_bm25_finds_only_what_holds_a_word_and_orders_equals_by_row():
  engine = bm25.build(_DOCUMENTS)
  found = engine.search(['', 'the of', 'Zanzibar', 'capital!'], 4)
  assert [[d.id for d in row] for row in found] == [[], [], [], ['c', 'd', 'e']]
  assert found[3][0].score == found[3][1].score  # of equal length
  with pytest.raises(ValueError, match='k = 6 documents a query'):
    engine.search(['capital'], 6)


@pytest.mark.parametrize('block', [1, 2, 7, 4096])
def test_bm25_finds_the_best_of_all_blocks(block, monkeypatch):
  rng = np.random.default_rng(0)
  words = np.array([f'w{i}' for i in range(30)])
  documents = [
      Document(str(i), '', ' '.join(rng.choice(words, rng.integers(1, 9))))
      for i in range(200)]
  engine = bm25.build(documents)
  monkeypatch.setattr(bm25, '_BLOCK', block)
  for query in ('w1 w2 w3', 'w4', ' '.join(words)):
    scores = np.array(_bm25_by_hand(documents, query)).round(5)
    order = np.argsort(-scores, kind='stable')
    for k in (1, 5, 200):
      [found] = engine.search([query], k)
      expected = scores[order[:k]]
      np.testing.assert_allclose(
          [d.score for d in found], expected[expected > 0], atol=2e-5)


def test_bm25_is_loaded_for_its_corpus_and_settings_only(tmp_path, capfd):
  folder = tmp_path / 'bm25'
  built = bm25.build(_DOCUMENTS, directory=folder)
  loaded = bm25.load(folder)
  assert isinstance(loaded._scorer.scores['data'], np.memmap)
  queries = ['capital of England', 'born']
  assert loaded.search(queries, 3) == built.search(queries, 3)
  assert list(loaded.documents) == _DOCUMENTS
  assert loaded.fingerprints == built.fingerprints
  again = bm25.build(_DOCUMENTS, directory=folder)
  assert again.search(queries, 3) == built.search(queries, 3)
  with pytest.raises(index.IndexMismatchError, match='another corpus'):
    bm25.build(_DOCUMENTS[:4], directory=folder)
  with pytest.raises(index.IndexMismatchError, match='k1=1.5.*k1=0.9'):
    bm25.build(_DOCUMENTS, directory=folder, k1=0.9)
  other = bm25.build(_DOCUMENTS, directory=folder, k1=0.9, replace=True)
  assert other.parameters['k1'] == bm25.load(folder).parameters['k1'] == 0.9
  (folder / 'data.csc.index.npy').write_bytes(b'nothing')
  with pytest.raises(ValueError, match='is damaged'):
    bm25.load(folder)
  assert capfd.readouterr().err == ''


def test_kinds_of_indexes_are_told_apart(tmp_path):
  dense = retriever.build(_DOCUMENTS, directory=tmp_path / 'dense')
  bm25.build(_DOCUMENTS, directory=tmp_path / 'bm25')
  with pytest.raises(ValueError, match='holds a BM25 index and no vectors'):
    retriever.load(tmp_path / 'bm25')
  with pytest.raises(ValueError, match='holds a dense index and no BM25'):
    bm25.load(tmp_path / 'dense')
  with pytest.raises(index.IndexMismatchError, match='lexical dimensions'):
    bm25.build(_DOCUMENTS, directory=tmp_path / 'dense')
  assert retriever.load(tmp_path / 'dense').fingerprints == dense.fingerprints


def test_bm25_leaves_jax_as_it_is():
  program = (
      'from stepsearch.retrieval import bm25\n'
      'from stepsearch.types import Document\n'
      'bm25.build([Document("a", "Rome", "is in Italy")])\n'
      'import jax\n'
      'assert not jax._src.xla_bridge._backends\n')
  subprocess.run(
      [sys.executable, '-c', program], check=True, cwd=_ROOT,
      env=os.environ | {'PYTHONPATH': str(_ROOT)})


def test_bm25_of_nothing_is_refused():
  with pytest.raises(ValueError, match='no documents'):
    bm25.build([])
  with pytest.raises(ValueError, match='no words'):
    bm25.build([Document('a', 'The', '…')])


# ---- fusion


def test_fusion_adds_reciprocal_ranks():
  one = _Listed({'q': ['a', 'b', 'c']})
  two = _Listed({'q': ['c', 'd', 'a']})
  fused = fusion.Fusion([one, two], constant=60)
  [found, nothing] = fused.search(['q', 'unknown'], 3)
  assert nothing == []
  # a: 1/61 + 1/63, c: 1/63 + 1/61, b and d: 1/62; of equals the first engine's.
  assert [d.id for d in found] == ['a', 'c', 'b']
  assert [d.score for d in found] == pytest.approx(
      [1 / 61 + 1 / 63, 1 / 63 + 1 / 61, 1 / 62], abs=1e-8)
  assert one.asked == two.asked == [100]
  # With a small constant two good ranks are worth less than the best one.
  shallow = fusion.Fusion([one, two], constant=0, depth=1)
  assert [d.id for d in shallow.search(['q'], 1)[0]] == ['a']
  assert one.asked[-1] == 1


class _Failing(_Listed):
  """Has no answer to the query 'odd', and gives two documents at most."""

  most = 2

  def search(self, queries, k):
    assert k <= self.most
    found = super().search(queries, k)
    if 'odd' in queries:
      raise retriever.PartlyFailed(
          'no answer', [
              None if query == 'odd' else row
              for query, row in zip(queries, found)])
    return found


@pytest.mark.parametrize('outer', [
    lambda failing: fusion.Fusion(
        [_Listed({'q': ['a'], 'odd': ['a']}), failing]),
    lambda failing: rerank.Reranked(failing, _Lengths(), 3)])
def test_what_a_part_has_no_answer_to_has_none(outer):
  failing = _Failing({'q': ['b', 'ccc', 'd']})
  engine = outer(failing)
  [alone] = engine.search(['q'], 2)
  assert failing.asked == [2] and len(alone) == 2
  with pytest.raises(retriever.PartlyFailed, match='no answer') as error:
    engine.search(['odd', 'q'], 2)
  assert error.value.found == [None, alone]
  assert config_lib.is_users(error.value)


def test_fusion_is_as_large_as_what_it_can_ask():
  dense = retriever.build(_DOCUMENTS, dimensions=512)
  fused = fusion.Fusion([_Listed({}), bm25.build(_DOCUMENTS), dense])
  assert len(fused) == 5 and fused.failed == 0
  assert fused.fingerprints['corpus'] == dense.corpus
  np.testing.assert_array_equal(fused.embed(['Rome']), dense.embed(['Rome']))
  assert fused.search(['capital of Italy'], 1)[0][0].id == 'd'
  with pytest.raises(ValueError, match='k = 6'):
    fused.search(['q'], 6)
  unknown = fusion.Fusion([_Listed({})])
  assert retriever.size(unknown) is None and not hasattr(unknown, 'embed')
  with pytest.raises(ValueError, match='different corpora'):
    fusion.Fusion([dense, bm25.build(_DOCUMENTS[:3])])


# ---- engines


def test_engines_are_made_of_texts_and_shared():
  made = {}
  fused = engines.make('fusion:bm25+lexical', _DOCUMENTS, made=made)
  assert set(made) == {'fusion:bm25+lexical', 'bm25', 'lexical'}
  assert engines.make('bm25', _DOCUMENTS, made=made) is made['bm25']
  [found] = fused.search(['capital of France'], 2)
  assert found[0].id == 'c'
  assert found[0].score == pytest.approx(2 / 61)


@pytest.mark.parametrize('spec', [
    'dence:models/e5', 'dense', 'fusion:bm25', 'fusion', '', 'bm25+lexical'])
def test_a_text_that_is_no_engine_is_refused(spec):
  with pytest.raises(ValueError, match='is no search engine'):
    engines.make(spec, _DOCUMENTS)


def test_an_encoder_that_is_none_is_named(tmp_path):
  with pytest.raises(ValueError, match=f'dense:{tmp_path}.*no usable encoder'):
    engines.make(f'dense:{tmp_path}', _DOCUMENTS)


def test_engines_of_a_flag():
  assert engines.split('bm25, fusion:bm25+dense:m@i') == [
      'bm25', 'fusion:bm25+dense:m@i']
  for wrong in ('', ' ,', 'bm25,bm25'):
    with pytest.raises(ValueError, match='at least one'):
      engines.split(wrong)


@pytest.mark.parametrize('name, at_3, at_5', [
    ('musique', 0.412, 0.464), ('2wiki', 0.607, 0.652)])
def test_bm25_finds_what_was_measured_elsewhere(name, at_3, at_5):
  folder = _SHARED / name
  if not folder.is_dir():
    pytest.skip(f'{folder} is not there')
  rows = lambda file: [
      json.loads(line) for line in (folder / file).read_text().splitlines()]
  documents = [
      Document(str(row['id']), row['title'], row['text'])
      for row in rows('corpus.jsonl')]
  questions = [row for row in rows('questions.jsonl') if row['gold']]
  found = bm25.build(documents).search([q['question'] for q in questions], 5)

  def recall(k):
    return np.mean([
        np.isin(q['gold'], [int(d.id) for d in row[:k]]).mean()
        for q, row in zip(questions, found)])

  assert recall(3) == pytest.approx(at_3, abs=0.03)
  assert recall(5) == pytest.approx(at_5, abs=0.03)


# ---- the engine of a config


def _config(**leaves):
  config = default.get_config()
  config.retriever.update(dict(dimensions=64, index='exact') | leaves)
  return config


def test_the_config_names_the_method(tmp_path):
  said = []
  make = lambda config, folder: engine_lib.build(
      config, _DOCUMENTS, tmp_path / folder, said.append)
  words = make(_config(method='bm25'), 'words')
  assert words.search(['capital'], 5) == bm25.build(_DOCUMENTS).search(
      ['capital'], 5)
  assert 'BM25 index of 5 passages' in said[-1]
  fused = make(_config(method='fusion', fusion_constant=2.0), 'both')
  assert isinstance(fused, fusion.Fusion)
  assert fused.search(['capital of France'], 1)[0][0].score == pytest.approx(
      1 / 3 + 1 / 3)
  assert {path.name for path in (tmp_path / 'both').iterdir()} == {
      'index', 'index-bm25'}
  # What build_index makes is loaded.
  corpus = tmp_path / 'corpus.jsonl'
  passages.write(corpus, _DOCUMENTS)
  build_index.run(str(corpus), str(tmp_path / 'built'), method='bm25')
  before = (tmp_path / 'built' / 'index.json').stat().st_mtime_ns
  make(_config(method='bm25', directory=str(tmp_path / 'built')), 'unused')
  assert (tmp_path / 'built' / 'index.json').stat().st_mtime_ns == before
  assert not (tmp_path / 'unused').exists()


def test_either_kind_of_index_is_served(tmp_path):
  bm25.build(_DOCUMENTS, directory=tmp_path / 'bm25')
  retriever.build(_DOCUMENTS, directory=tmp_path / 'dense')
  served = serve._load(tmp_path / 'bm25', None, None, None)
  assert service.describe(served) == {
      'size': 5, 'corpus': retriever.corpus_fingerprint(_DOCUMENTS),
      'embedder': 'bm25 k1=1.5 b=0.75 stop_words=english', 'max_topk': 5,
      'max_queries': service.MAX_QUERIES}
  assert served.search(['Rome'], 1)[0][0].id == 'd'
  dense = serve._load(tmp_path / 'dense', None, None, None)
  assert isinstance(dense, retriever.Retriever)
  with pytest.raises(ValueError, match='--embedder=e5: .*a BM25 index'):
    serve._load(tmp_path / 'bm25', 'e5', None, None)


def test_rewards_need_vectors_that_bm25_has_not(tmp_path):
  config = _config(method='bm25')
  config.reward.similarity = 'retriever'
  engine = engine_lib.build(config, _DOCUMENTS, tmp_path, lambda _: None)
  with pytest.raises(ValueError, match='BM25 .*has no vectors: use tfidf'):
    assembly._score(config, assembly._reward(config), engine)
  config.retriever.method = 'fusion'
  config.retriever.directory = str(tmp_path / 'both')
  engine = engine_lib.build(config, _DOCUMENTS, tmp_path, lambda _: None)
  assembly._score(config, assembly._reward(config), engine)


@pytest.mark.parametrize('leaves, message', [
    (dict(method='tfidf'), "method = 'tfidf' is none of"),
    (dict(method='bm25', embedder='models/e5'), 'embedder = .*embeds nothing'),
    (dict(method='bm25', placement='sharded'), 'placement = .*mapped'),
    (dict(method='bm25', url='http://a:1'), 'method = .*of their own'),
    (dict(method='fusion', factory='a:b'), 'method = .*of their own'),
    (dict(fusion_depth=0), 'fusion_depth = 0: must be at least 1'),
    (dict(fusion_constant=-1.0), 'fusion_constant = -1.0'),
    (dict(rerank_candidates=0), 'rerank_candidates = 0'),
    (dict(reranker='models/none'), 'reranker = .*no usable cross-encoder'),
])
def test_configs_that_are_refused(tmp_path, leaves, message):
  with pytest.raises(ValueError, match='config.retriever.' + message):
    engine_lib.build(_config(**leaves), _DOCUMENTS, tmp_path, print)
