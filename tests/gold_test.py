"""Gold passages that are found, and how sure they are."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepsearch import prepare_gold
from stepsearch.data import datasets
from stepsearch.data import gold
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

_ROOT = pathlib.Path(__file__).parents[1]
_MUSIQUE = _ROOT.parent / 'shared' / 'data' / 'musique'

_A, _B, _C, _D = (
    Document(name, name, text) for name, text in (
        ('a', 'Push is by Ben Affleck.'), ('b', 'Affleck played Fred.'),
        ('c', 'Nothing of note.'), ('d', 'Fredericks is a town.')))
_WHOLE = Example('w', 'who?', ('Fred', 'F. O.'))
_PARTS = Example(
    'p', 'who?', ('Fred', 'F. O.'), hops=2, sub_questions=(
        SubQuestion('Push >> by', 'Ben Affleck'),
        SubQuestion('whom did Ben Affleck play', 'Fred')))


def _engine(**found):
  """Ranks as told, by query; remembers what it was asked."""
  asked = []

  def search(queries, k):
    asked.append((list(queries), k))
    return [found.get(query, [])[:k] for query in queries]

  search.asked = asked
  return search


def test_support_and_confidence_of_a_whole_question():
  one = _engine(**{'who?': [_C, _A, _B], 'who? Fred': [_B, _D]})
  two = _engine(**{'who?': [_B], 'who? Fred': [_B, _C]})
  (found,) = gold.find([_WHOLE], [one, two], k=3)
  # Only b has the answer as a word; 'Fredericks' is another one.
  support = {
      'b': (1 / 3 + 1 + 1 + 1) / 4, 'c': (1 + 1 / 2) / 4 / 2,
      'a': (1 / 2) / 4 / 2, 'd': (1 / 2) / 4 / 2}
  assert [(c.document.id, c.sub_question) for c in found] == [
      ('b', None), ('c', None)]  # two, where hops are unknown
  np.testing.assert_allclose(
      [c.confidence for c in found],
      [support['b'] - support['a'], support['c'] - support['a']])
  assert one.asked == [(['who?', 'who? Fred'], 3)]
  (found,) = gold.find(
      [dataclasses.replace(_WHOLE, hops=1)], [one, two], k=3)
  assert [c.document.id for c in found] == ['b']
  np.testing.assert_allclose(
      found[0].confidence, support['b'] - support['c'])


def test_a_passage_for_each_sub_question():
  engine = _engine(**{
      'Push by': [_A], 'Push by Ben Affleck': [_A, _C],
      'whom did Ben Affleck play': [_C, _B],
      'whom did Ben Affleck play Fred': [_C, _B]})
  (found,) = gold.find([_PARTS], [engine], k=3)
  assert [(c.document.id, c.sub_question) for c in found] == [
      ('a', 0), ('b', 1)]
  np.testing.assert_allclose(
      [c.confidence for c in found], [1 - (1 / 2) / 2 / 4, 1 / 2 - 1 / 4])
  both = gold.with_gold(_PARTS, found, 0.2)
  assert both.gold_documents == (_A, _B) and gold.complete(both)
  assert [sub.gold for sub in both.sub_questions] == [('a',), ('b',)]
  some = gold.with_gold(_PARTS, found, 0.5)
  assert some.gold_documents == (_A,) and not gold.complete(some)
  assert gold.with_gold(_PARTS, found, 1.0).gold_documents == ()


def test_an_alias_counts_for_the_last_sub_question_only():
  alias = Document('e', '', 'It was F. O. himself.')
  engine = _engine(**{
      'Push by': [alias], 'whom did Ben Affleck play': [alias]})
  (found,) = gold.find([_PARTS], [engine], k=3)
  np.testing.assert_allclose([c.confidence for c in found], [1 / 8, 1 / 2])


def test_nothing_found_and_many_questions():
  examples = [dataclasses.replace(_WHOLE, id=str(i)) for i in range(150)]
  done = []
  found = list(gold.find(examples, [_engine()], tick=done.append))
  assert found == [[]] * 150 and done == [64, 128, 150]


def test_precision_and_recall_by_hand():
  known = [dataclasses.replace(_WHOLE, gold_documents=(_A, _B)),
           dataclasses.replace(_WHOLE, gold_documents=(_C,))]
  found = [
      [gold.Candidate(_A, 0.9, 0), gold.Candidate(_A, 0.1, 1),
       gold.Candidate(_D, 0.4, None)],
      [gold.Candidate(_C, 0.4, None)]]
  assert gold.precision_recall(known, found, 0.3) == (2 / 3, 2 / 3, 1 / 2)
  assert gold.precision_recall(known, found, 0.5) == (1.0, 1 / 3, 0.0)
  precision, *rest = gold.precision_recall(known, found, 1.0)
  assert np.isnan(precision) and rest == [0.0, 0.0]


@pytest.fixture
def files(tmp_path):
  """Questions of which one has gold passages, and a corpus of words."""
  corpus = tmp_path / 'corpus.jsonl'
  corpus.write_text(''.join(
      json.dumps({'id': d.id, 'title': d.title, 'text': d.text}) + '\n'
      for d in (
          _A, _B, _C, _D, Document('x', 'Alba', 'The mayor of Alba is Bero.'),
          Document('y', 'Bero', 'Bero was born in Cuna.'))))
  questions = tmp_path / 'questions.jsonl'
  rows = [
      {'id': 'known', 'question': 'q', 'answers': ['z'], 'gold': ['c']},
      {'id': 'parts', 'question': 'q', 'answers': ['Cuna'], 'decomposition': [
          {'question': 'who is the mayor of Alba', 'answer': 'Bero'},
          {'question': 'where was #1 born', 'answer': 'Cuna'}]},
      {'id': 'lost', 'question': 'zzz', 'answers': ['yyy']}]
  questions.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(questions), str(corpus), str(tmp_path / 'gold.jsonl')


def test_questions_get_gold_passages(files, capsys):
  questions, corpus, output = files
  prepare_gold.run(
      questions, corpus, output, engines='bm25,lexical', threshold=0.2, k=3)
  out = capsys.readouterr().out
  assert '1 of 3 questions had gold' in out
  assert '1 have one now for every sub-question or hop, 0 for some, 1 f' in out
  by_id = datasets.read_corpus(corpus).by_id
  known, parts, lost = datasets.read_questions(output, by_id)
  assert [d.id for d in known.gold_documents] == ['c']
  assert [d.id for d in parts.gold_documents] == ['x', 'y']
  assert [sub.gold for sub in parts.sub_questions] == [('x',), ('y',)]
  assert lost.gold_documents == ()
  rows = [json.loads(line) for line in open(output)]
  assert 'confidence' not in rows[0]['gold'][0]
  assert 0.2 <= rows[1]['gold'][0]['confidence'] <= 1
  with pytest.raises(ValueError, match='1 of 3 questions have no gold'):
    datasets.check([known, parts, lost], by_id, turn_rewards=True, k=1)

  prepare_gold.run(
      questions, corpus, output, engines='bm25', threshold=0.2, k=3,
      complete=True)
  assert '1 incomplete questions are left out' in capsys.readouterr().out
  found = datasets.read_questions(output, by_id)
  assert [e.id for e in found] == ['known', 'parts']
  datasets.check(found, by_id, turn_rewards=True, k=1)


def test_what_cannot_be_measured_or_written(files, tmp_path):
  questions, corpus, output = files
  bare = tmp_path / 'bare.jsonl'
  bare.write_text(json.dumps({'question': 'zzz', 'answer': 'yyy'}))
  with pytest.raises(ValueError, match='nothing to measure with'):
    prepare_gold.measure(str(bare), corpus, engines='bm25', k=3)
  with pytest.raises(ValueError, match='none of 1 is complete'):
    prepare_gold.run(str(bare), corpus, output, engines='bm25', threshold=0.2,
                     k=3, complete=True)
  assert not pathlib.Path(output).exists()
  done = subprocess.run(
      [sys.executable, '-m', 'stepsearch.prepare', 'gold',
       f'--questions={questions}', f'--corpus={corpus}'], cwd=_ROOT,
      capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith(
      'error: --output is missing')


@pytest.mark.skipif(
    not _MUSIQUE.exists(),
    reason='the real data sets are not beside this checkout')
def test_real_gold_passages_are_found(tmp_path, capsys):
  questions = tmp_path / 'questions.jsonl'
  lines = (_MUSIQUE / 'questions.jsonl').read_text().splitlines(True)
  questions.write_text(''.join(lines[:100]))
  results = prepare_gold.measure(
      str(questions), str(_MUSIQUE / 'corpus.jsonl'), engines='bm25', k=10)
  decomposed = results['sub-questions and answers']
  assert decomposed[0.2][0] > 0.85 and decomposed[0.2][1] > 0.7
  assert results['question and answer'][0.2][0] > 0.7
  assert 'confidence  precision' in capsys.readouterr().out
