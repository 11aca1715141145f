import json
import pathlib

import pytest

from stepsearch import paths
from stepsearch.data import datasets
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

_SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'


def _write(path, *rows):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text('\n'.join(lines) + '\n')
  return path


_CORPUS = {
    '3': Document('3', 'Push', 'A series by Ben Affleck.'),
    '4': Document('4', 'Dazed', 'Affleck played Fred.'),
}
_QUESTION = {
    'id': 'x',
    'question': 'Who did the creator of Push play in Dazed?',
    'answers': ['Fred', "Fred O'Bannion", 'Fred'],
    'gold': [3, 4],
    'decomposition': [
        {'question': 'Push >> creator', 'answer': 'Ben Affleck', 'gold': 3},
        {'question': 'who did #1 play in #2 or #12', 'answer': 'F', 'gold': 4},
    ],
}
_RELEASED = {
    'question': 'Who?',
    'final_answer': 'Fred',
    'answer_aliases': ['Fred', 'F. O.'],
    'sub_searchs': [['creator of Push', 'Push creator'], ['Affleck in Dazed']],
    'sub_support_docs': [
        {'title': 'Push', 'paragraph_text': 'A series by Ben Affleck.'},
        {'title': 'Other', 'paragraph_text': 'Not in the corpus.'},
    ],
}


def test_corpus_in_both_forms(tmp_path):
  path = _write(
      tmp_path / 'corpus.jsonl',
      {'id': 0, 'title': 'Café', 'text': 'One\ntwo'},
      {'id': 'b', 'contents': '"A "quoted" title"\nText\nmore'},
      {'id': 2, 'contents': 'no title'},
      {'id': 3, 'contents': '""Heroes" (album)"\nText'},
      {'id': 4, 'contents': 'The "Heroes"\nText'},
      '',
  )
  assert list(datasets.read_corpus(path)) == [
      Document('0', 'Café', 'One\ntwo'),
      Document('b', 'A "quoted" title', 'Text\nmore'),
      Document('2', '', 'no title'),
      Document('3', '"Heroes" (album)', 'Text'),
      Document('4', 'The "Heroes"', 'Text'),
  ]


@pytest.mark.parametrize(
    'rows, message',
    [
        ([], 'holds no documents'),
        (['{"id": 1,'], 'line 1: it is not JSON'),
        ([{'id': 1, 'title': '', 'text': 'x'}, '[1]'], 'line 2: .* a list'),
        ([{'id': 1, 'text': 'x'}], 'line 1, field title: it is missing'),
        ([{'id': 1, 'title': 'x'}], 'line 1, field text: it is missing'),
        ([{'id': 1, 'title': 'x', 'text': ' '}], 'field text: it is empty'),
        ([{'id': 1, 'title': 'x', 'text': 3}], 'field text: .* a number'),
        ([{'id': 1, 'contents': '"x"\n'}], 'contents: nothing follows its'),
        ([{'id': None, 'title': 'x', 'text': 'y'}], 'field id: .* null'),
        (['', {'id': 1, 'title': 'x', 'text': 'y'}], 'line 1: it is empty'),
        (
            [{'id': i, 'title': 'x', 'text': 'y'} for i in ('7', 8, 7)],
            'id "7" is on line 1 and again on line 3',
        ),
    ],
)
def test_bad_corpus(tmp_path, rows, message):
  path = _write(tmp_path / 'corpus.jsonl', *rows)
  with pytest.raises(ValueError, match=message) as error:
    datasets.read_corpus(path)
  assert str(path) in str(error.value)


def test_bytes_that_are_not_text(tmp_path):
  path = tmp_path / 'corpus.jsonl'
  path.write_bytes(b'{"id": 1, "title": "\xff", "text": "x"}\n')
  with pytest.raises(ValueError, match='line 1: it is not JSON'):
    datasets.read_corpus(path)


def test_a_corpus_in_a_store(bucket):
  rows = [{'id': i, 'title': f't{i}', 'text': f'text {i}'} for i in range(3)]
  path = paths.Path(bucket) / 'corpus.jsonl'
  paths.write(path, '\n'.join(map(json.dumps, rows)))
  assert [(d.id, d.title, d.text) for d in datasets.read_corpus(path)] == [
      (str(r['id']), r['title'], r['text']) for r in rows]
  paths.write(path, '{}')
  with pytest.raises(ValueError, match='corpus.jsonl, line 1, field id'):
    datasets.read_corpus(str(path))


def test_absent_file(tmp_path):
  with pytest.raises(ValueError, match=r'\(No such file or directory\)'):
    datasets.read_corpus(tmp_path / 'none.jsonl')


def test_derived_question(tmp_path):
  path = _write(tmp_path / 'q.jsonl', _QUESTION)
  assert datasets.read_questions(path, _CORPUS, dataset='m') == [
      Example(
          id='x',
          question=_QUESTION['question'],
          answers=('Fred', "Fred O'Bannion"),
          gold_documents=(_CORPUS['3'], _CORPUS['4']),
          search_keys=(
              ('Push >> creator',),
              ('who did Ben Affleck play in #2 or #12',),
          ),
          hops=2,
          dataset='m',
          sub_questions=(
              SubQuestion('Push >> creator', 'Ben Affleck', ('3',)),
              SubQuestion(
                  'who did Ben Affleck play in #2 or #12', 'F', ('4',)),
          ),
          source='q.jsonl',
      )
  ]
  (example,) = datasets.read_questions(path)
  assert example.gold_documents == () and example.hops == 2
  assert [sub.gold for sub in example.sub_questions] == [(), ()]


def test_question_without_gold_or_decomposition(tmp_path):
  row = {'id': 1, 'question': 'q', 'answers': ['a']}
  path = _write(tmp_path / 'q.jsonl', row)
  assert datasets.read_questions(path, _CORPUS) == [
      Example('1', 'q', ('a',), source='q.jsonl')]


def test_released_record(tmp_path):
  path = _write(tmp_path / 'q.jsonl', _RELEASED)
  (example,) = datasets.read_questions(path, _CORPUS)
  assert example == Example(
      id='1',
      question='Who?',
      answers=('Fred', 'F. O.'),
      gold_documents=(
          _CORPUS['3'],  # found by its text, so that ids can be compared
          Document('1/1', 'Other', 'Not in the corpus.'),
      ),
      search_keys=(('creator of Push', 'Push creator'), ('Affleck in Dazed',)),
      hops=2,
      source='q.jsonl',
  )


@pytest.mark.parametrize(
    'change, message',
    [
        ({'gold': [3, 99]}, 'field gold: "99" is not the id'),
        ({'gold': [[3]]}, r'field gold\[0\]: .* a list'),
        ({'answers': []}, 'field answers: it is empty'),
        ({'answers': ['']}, r'field answers\[0\]: it is empty'),
        ({'answers': 'Fred'}, 'field answers: expected a list, found text'),
        ({'question': None}, 'field question: expected text, found null'),
        ({'decomposition': ['x']}, r'decomposition\[0\]: expected an object'),
        (
            {'decomposition': [{'question': 'x'}]},
            r'field decomposition\[0\]\.answer: it is missing',
        ),
    ],
)
def test_bad_question(tmp_path, change, message):
  path = _write(tmp_path / 'q.jsonl', _QUESTION, _QUESTION | change)
  with pytest.raises(ValueError, match=message) as error:
    datasets.read_questions(path, _CORPUS)
  assert f'{path}, line 2' in str(error.value)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'sub_searchs': [['']]}, r'field sub_searchs\[0\]\[0\]: it is empty'),
        ({'sub_searchs': [['a', 1]]}, r'field sub_searchs\[0\]\[1\]: expected'),
        (
            {'sub_support_docs': [{'title': 'x'}]},
            r'field sub_support_docs\[0\]\.paragraph_text: it is missing',
        ),
        ({'final_answer': ''}, 'field final_answer: it is empty'),
    ],
)
def test_bad_released_record(tmp_path, change, message):
  path = _write(tmp_path / 'q.jsonl', _RELEASED | change)
  with pytest.raises(ValueError, match=message):
    datasets.read_questions(path, _CORPUS)


def test_demonstrations(tmp_path):
  path = _write(tmp_path / 'd.jsonl', {'question': 'q', 'text': '<think>'})
  assert datasets.read_demonstrations(path) == [('q', '<think>')]
  _write(path, {'question': 'q'})
  with pytest.raises(ValueError, match='line 1, field text: it is missing'):
    datasets.read_demonstrations(path)


def test_check():
  gold = Example('g', 'q', ('a',), gold_documents=tuple(_CORPUS.values()))
  bare = [Example(f'b{i}', 'q', ('a',)) for i in range(7)]
  datasets.check([gold], _CORPUS, turn_rewards=True, k=2)
  datasets.check([gold, *bare], _CORPUS, turn_rewards=False, k=2)
  with pytest.raises(ValueError, match=r'7 of 8 .*b0, b1, .*config\.reward'):
    datasets.check([gold, *bare], _CORPUS, turn_rewards=True, k=2)
  for k in (0, 3):
    with pytest.raises(ValueError, match=f'k = {k} .* corpus of 2'):
      datasets.check([gold], _CORPUS, turn_rewards=True, k=k)


@pytest.mark.parametrize(
    'name, passages, questions',
    [
        ('musique', 11338, 440),
        ('2wiki', 6119, 500),
        ('hotpotqa', 18910, 891),
        ('bamboogle', 755, 125),
    ],
)
def test_real_files(name, passages, questions):
  folder = _SHARED / name
  if not folder.exists():
    pytest.skip('the real data sets are not beside this checkout')
  corpus = datasets.read_corpus(folder / 'corpus.jsonl').by_id
  examples = datasets.read_questions(folder / 'questions.jsonl', corpus)
  assert (len(corpus), len(examples)) == (passages, questions)
  if name == 'musique':
    hops = [example.hops for example in examples]
    assert [hops.count(n) for n in (2, 3, 4)] == [289, 102, 49]
    datasets.check(examples, corpus, turn_rewards=True, k=3)
    assert examples[0].search_keys[1] == (
        'Who was the first president of American Psychological Association ?',
    )
