import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepsearch import evaluate_retrieval
from stepsearch.retrieval import measure
from stepsearch.retrieval import retriever
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

_ROOT = pathlib.Path(__file__).parents[1]

_DOCUMENTS = [
    Document('a', 'Ada Lovelace', 'Ada was born in London, England.'),
    Document('b', 'Alan Turing', 'The mathematician was born in Maida Vale.'),
    Document('c', 'Paris', 'Paris is the capital of France.'),
    Document('d', 'Rome', 'Rome is the capital of Italy.'),
    Document('e', 'London', 'London, the capital of England.'),
]


def _example(name, gold, parts=()):
  return Example(
      name, f'question {name}?', ('x',),
      tuple(d for d in _DOCUMENTS if d.id in gold), sub_questions=tuple(
          SubQuestion(question, 'x', tuple(of)) for question, of in parts))


def test_measures_by_hand():
  asked = [
      measure.Query('one', frozenset('ab'), 0),
      measure.Query('two', frozenset('c'), 1),
      measure.Query('three', frozenset('d'), 1),
      measure.Query('four', frozenset('e'), 2)]
  found = [['x', 'a', 'b'], ['c', 'y'], ['y', 'z', 'w', 'd'], []]
  values = measure.score(asked, found, [3, 2])
  assert values == pytest.approx({
      'recall@2': (0.5 + 1 + 0 + 0) / 4, 'all_gold@2': 0,
      'recall@3': (1 + 1 + 0 + 0) / 4, 'all_gold@3': 1 / 3,
      'mrr': (1 / 2 + 1 + 0 + 0) / 4})
  # Of sub-questions all of one question have to be found.
  assert measure.score(asked, found, [4])['all_gold@4'] == pytest.approx(2 / 3)


def test_what_is_asked_of_questions_and_of_sub_questions():
  examples = [
      _example('1', 'ab', [('first?', 'a'), ('second?', 'b')]),
      _example('2', ''),
      _example('3', 'c', [('first?', 'c'), ('second?', '')])]
  asked, without = measure.queries(examples)
  assert without == 1
  assert asked == [
      measure.Query('question 1?', frozenset('ab'), 0),
      measure.Query('question 3?', frozenset('c'), 2)]
  asked, without = measure.queries(examples, 'sub_questions')
  assert without == 2
  assert asked == [
      measure.Query('first?', frozenset('a'), 0),
      measure.Query('second?', frozenset('b'), 0)]


def test_an_engine_is_asked_in_batches(monkeypatch):
  monkeypatch.setattr(measure, 'BATCH', 2)
  calls, done = [], []

  class Engine:
    failed = 3

    def search(self, queries, k):
      calls.append((len(queries), k))
      self.failed += len(calls) == 2
      return [_DOCUMENTS[:k] for _ in queries]

  asked = [measure.Query(str(i), frozenset('b'), i) for i in range(3)]
  values = measure.measure(Engine(), asked, [1, 2], done.append)
  assert calls == [(2, 2), (1, 2)] * 2 and done == [2, 3]
  assert values['failed'] == 1
  assert values['recall@1'] == 0 and values['recall@2'] == 1
  assert values['mrr'] == 0.5 and values['queries_per_second'] > 0


def test_scann_is_compared_with_exact_search():
  pytest.importorskip('scann.scann_ops.py.scann_ops_pybind')
  rng = np.random.default_rng(0)
  words = [f'w{i}' for i in range(400)]
  documents = [
      Document(str(i), words[i % 400], ' '.join(rng.choice(words, 8)))
      for i in range(2000)]
  engine = retriever.build(documents, dimensions=256)
  assert not engine.index.approximate
  asked = [
      measure.Query(documents[i].text, frozenset([documents[i].id]), i)
      for i in range(0, 2000, 50)]
  values = measure.approximation(engine, asked, [1, 10], 'hashed')
  assert values['ratio@1'] == 1 and values['overlap@10'] > 0.9
  # A tree that looks into a fifth of its leaves misses some.
  assert measure.approximation(engine, asked, [1, 10], 'tree')['overlap@10'] < (
      values['overlap@10'])
  # The comparison is with what numpy finds.
  vectors = engine.index.vectors
  queries = engine.embed([query.text for query in asked])
  wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :1]
  exact, _ = engine.index.exact_search(queries, 1)
  np.testing.assert_array_equal(exact, wanted)


def _files(tmp_path):
  corpus, questions = tmp_path / 'corpus.jsonl', tmp_path / 'questions.jsonl'
  corpus.write_text(''.join(
      json.dumps({'id': d.id, 'title': d.title, 'text': d.text}) + '\n'
      for d in _DOCUMENTS))
  rows = [
      {'id': 1, 'question': 'What is the capital of France?',
       'answers': ['Paris'], 'gold': ['c']},
      {'id': 2, 'question': 'What is the capital of Italy?',
       'answers': ['Rome'], 'gold': ['d']},
      {'id': 3, 'question': 'Why?', 'answers': ['…'], 'gold': []}]
  questions.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(corpus), str(questions)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
  corpus, questions = _files(tmp_path)
  out = tmp_path / 'out'
  done = subprocess.run(
      [sys.executable, '-m', 'stepsearch.evaluate', 'retrieval',
       f'--questions={questions}', f'--corpus={corpus}', '--k=1,2',
       '--engines=bm25,fusion:bm25+lexical', f'--output={out}'],
      capture_output=True, text=True, cwd=_ROOT)
  assert done.returncode == 0 and done.stderr == ''
  assert '1 questions without gold passages are left out' in done.stdout
  assert '| bm25 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |' in done.stdout
  report = json.loads((out / 'retrieval.json').read_text())
  assert report['size'] == {'questions': 2, 'queries': 2, 'left_out': 1}
  assert set(report['engines']) == {'bm25', 'fusion:bm25+lexical'}
  assert report['engines']['bm25']['recall@1'] == 1
  assert report['corpus'] == retriever.corpus_fingerprint(_DOCUMENTS)


@pytest.mark.parametrize('change, message', [
    (dict(ks=[0]), '--k=0: numbers from 1 to 5'),
    (dict(ks=[6]), '--k=6: numbers from 1 to 5'),
    (dict(engines='bm52'), "'bm52' is no search engine"),
    (dict(queries='sub_questions'), 'none of 3 questions has sub-questions'),
])
def test_bad_requests_are_refused(tmp_path, change, message):
  corpus, questions = _files(tmp_path)
  arguments = dict(engines='bm25', ks=[1]) | change
  with pytest.raises(ValueError, match=message):
    evaluate_retrieval.run(questions, corpus, **arguments)


def test_a_table_has_a_line_an_engine():
  values = {
      'recall@1': 0.25, 'all_gold@1': 0.5, 'mrr': 0.125,
      'queries_per_second': 1234.4}
  assert measure.table({'bm25': values}, [1]).splitlines()[-1] == (
      '| bm25 | 0.250 | 0.500 | 0.125 | 1,234 |')
