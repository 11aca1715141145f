"""Rows and shapes: every published form of questions and corpora."""

import collections
import csv
import gzip
import io
import json
import pathlib
import random
import zipfile

import pyarrow
from pyarrow import parquet
import pytest

from stepsearch.data import datasets
from stepsearch.data import formats
from stepsearch.data import rows
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

_SHARED = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
_RAW = _SHARED / 'raw'
_HERE = pytest.mark.skipif(
    not _RAW.exists(), reason='the real data sets are not beside this checkout')

_TEXTS = [('Green', 'An album by Steve Hillage.'), ('Other', 'Nothing.'),
          ('Hillage', 'His wife is Miquette.')]
_MUSIQUE = {
    'id': '2hop__1_2',
    'question': 'Who is the spouse of the Green performer?',
    'answer': 'Miquette', 'answer_aliases': ['M. Giraudy'], 'answerable': True,
    'paragraphs': [
        {'idx': i, 'title': title, 'paragraph_text': text,
         'is_supporting': i != 1} for i, (title, text) in enumerate(_TEXTS)],
    'question_decomposition': [
        {'id': 1, 'question': 'Green >> performer', 'answer': 'Hillage',
         'paragraph_support_idx': 0},
        {'id': 2, 'question': '#1 >> spouse', 'answer': 'Miquette',
         'paragraph_support_idx': 2}]}
_TITLES = _MUSIQUE | {'question_decomposition': [
    _MUSIQUE['question_decomposition'][0] | {'document_id': 'Green_0'},
    _MUSIQUE['question_decomposition'][1] | {'document_id': 'Hillage_3'}]}
del _TITLES['paragraphs']
_SUBS = (
    SubQuestion('Green >> performer', 'Hillage', ('2hop__1_2/0',)),
    SubQuestion('Hillage >> spouse', 'Miquette', ('2hop__1_2/2',)))
_HOTPOT = {
    '_id': 'h', 'question': 'Who?', 'answer': 'Fred', 'type': 'bridge',
    'level': 'hard',
    'supporting_facts': [['B', 0], ['A', 1], ['B', 2]],
    'context': [['A', ['One.', ' Two.']], ['C', ['x']], ['B', ['Three. ']]]}
_FACES = {
    'id': 'h', 'question': 'Who?', 'answer': 'Fred', 'type': 'bridge',
    'level': 'hard',
    'supporting_facts': {'title': ['B', 'A', 'B'], 'sent_id': [0, 1, 2]},
    'context': {
        'title': ['A', 'C', 'B'],
        'sentences': [['One.', ' Two.'], ['x'], ['Three. ']]}}
_TWO = {
    '_id': 'w', 'type': 'compositional', 'question': 'When was he born?',
    'answer': '1987', 'supporting_facts': [['Get Low (song)', 0], ['Dil', 0]],
    'evidences': [['Get Low', 'performer', 'Dil'], ['Dil', 'born', '1987']],
    'context': [['Get Low (song)', ['A song.']], ['Dil', ['A man.']]]}
_VERL = {
    'data_source': 'x/bamboogle', 'ability': 'QA',
    'prompt': [{'role': 'user', 'content': 'Who?'}],
    'reward_model': {'ground_truth': 'Fred', 'style': 'rule'},
    'extra_info': {'index': 3, 'split': 'test'}}
_SEARCH_R1 = {
    'data_source': 'nq', 'prompt': [
        {'role': 'user', 'content': 'Answer it. Question: Who?\n'}],
    'reward_model': {
        'ground_truth': {'target': ['Fred', 'F.']}, 'style': 'rule'}}


def _write(path, *values):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(
      (v if isinstance(v, str) else json.dumps(v)) + '\n' for v in values))
  return path


def _one(tmp_path, row, **kwargs):
  (found,) = datasets.read_questions(
      _write(tmp_path / 'q.jsonl', row), **kwargs)
  return found


def _gold(example):
  return [(d.title, d.text) for d in example.gold_documents]


def test_musique(tmp_path):
  found = _one(tmp_path, _MUSIQUE)
  assert found == Example(
      id='2hop__1_2', question=_MUSIQUE['question'],
      answers=('Miquette', 'M. Giraudy'),
      gold_documents=(
          Document('2hop__1_2/0', *_TEXTS[0]),
          Document('2hop__1_2/2', *_TEXTS[2])),
      search_keys=(('Green >> performer',), ('Hillage >> spouse',)), hops=2,
      sub_questions=_SUBS, source='q.jsonl', licence='CC BY 4.0')


def test_paragraphs_go_by_their_number(tmp_path):
  mixed = _MUSIQUE | {'paragraphs': _MUSIQUE['paragraphs'][::-1]}
  assert _one(tmp_path, mixed) == _one(tmp_path, _MUSIQUE)


def test_gold_documents_become_those_of_the_corpus(tmp_path):
  corpus = {
      str(i): Document(str(i), *text) for i, text in enumerate(_TEXTS)}
  found = _one(tmp_path, _MUSIQUE, corpus_by_id=corpus)
  assert found.gold_documents == (corpus['0'], corpus['2'])
  assert [sub.gold for sub in found.sub_questions] == [('0',), ('2',)]
  # Without texts the titles tell, where they can.
  assert _one(tmp_path, _TITLES).gold_documents == ()
  assert _one(tmp_path, _TITLES, corpus_by_id=corpus) == found
  # Two passages of a title: that with the sub-question's answer in it.
  corpus['9'] = Document('9', 'Hillage', 'Another page of him.')
  assert _one(tmp_path, _TITLES, corpus_by_id=corpus) == found
  corpus['8'] = Document('8', 'Hillage', 'Miquette and he met.')
  vague = _one(tmp_path, _TITLES, corpus_by_id=corpus)
  assert vague.gold_documents == ()  # all or none
  assert [sub.gold for sub in vague.sub_questions] == [(), ()]


def test_ids_of_another_corpus_name_no_passage(tmp_path):
  row = {'id': 'q', 'question': 'Who?', 'answer': 'Fred', 'gold': [
      {'id': 3, 'title': 'A', 'text': 'One.'},
      {'id': 4, 'title': 'B', 'text': 'Two.'}], 'decomposition': [
          {'question': 'what', 'answer': 'x', 'gold': [3]}]}
  corpus = {
      '3': Document('3', 'Z', 'Quite another.'),
      '7': Document('7', 'B', 'Two.')}
  found = _one(tmp_path, row, corpus_by_id=corpus)
  assert found.gold_documents == (
      Document('q/3', 'A', 'One.'), corpus['7'])
  assert found.sub_questions[0].gold == ('q/3',)


def test_an_id_tells_passages_of_one_title_apart(tmp_path):
  row = {'question': 'Who?', 'answer': 'Fred', 'gold': [
      {'id': 4, 'title': 'A'}, {'id': 5, 'text': 'Three.'}]}
  corpus = {
      i: Document(i, title, text) for i, title, text in (
          ('3', 'A', 'One.'), ('4', 'A', 'Two.'), ('5', 'B', 'Three.'))}
  found = _one(tmp_path, row, corpus_by_id=corpus)
  assert found.gold_documents == (corpus['4'], corpus['5'])
  row['gold'][0]['title'] = 'B'  # that of another
  found = _one(tmp_path, row, corpus_by_id=corpus)
  assert found.gold_documents == (corpus['5'],)


@pytest.mark.parametrize('row', [_HOTPOT, _FACES, {
    'id': 'h', 'question': 'Who?', 'golden_answers': ['Fred'],
    'metadata': {key: _FACES[key] for key in (
        'supporting_facts', 'type', 'level')} | {'context': {
            'title': _FACES['context']['title'],
            'content': _FACES['context']['sentences']}}}, {
    **_HOTPOT, 'context': json.dumps(_HOTPOT['context'])}])
def test_hotpotqa_as_its_carriers_store_it(tmp_path, row):
  found = _one(tmp_path, row)
  assert (found.id, found.answers, found.hops) == ('h', ('Fred',), 2)
  assert _gold(found) == [('B', 'Three.'), ('A', 'One. Two.')]
  assert found.licence == 'CC BY-SA 4.0' and found.sub_questions == ()


def test_fullwiki_has_no_text_of_what_was_not_retrieved(tmp_path):
  row = {**_HOTPOT, 'context': _HOTPOT['context'][:2]}  # A, not B
  assert _one(tmp_path, row).gold_documents == ()
  corpus = {'b': Document('b', 'B', 'Three.')}
  found = _one(tmp_path, row, corpus_by_id=corpus)
  assert _gold(found) == [('B', 'Three.'), ('A', 'One. Two.')]
  assert found.gold_documents[0].id == 'b'


def test_2wiki_and_its_questions(tmp_path):
  found = _one(tmp_path, _TWO)
  assert found.sub_questions == (
      SubQuestion('Get Low >> performer', 'Dil', ('w/0',)),
      SubQuestion('Dil >> born', '1987', ('w/1',)))
  assert found.hops == 2 and found.licence == 'Apache-2.0'
  lists = [dict(zip(('fact', 'relation', 'entity'), e))
           for e in _TWO['evidences']]
  assert _one(tmp_path, _TWO | {'evidences': lists}) == found
  lists = {name: [e[name] for e in lists] for name in lists[0]}
  assert _one(tmp_path, _TWO | {'evidences': lists}) == found
  pairs = [{'question': 'Who sang it?', 'answer': 'Dil sang it.'},
           {'question': 'When was #1 born?', 'answer': 'In 1987.'}]
  found = _one(tmp_path, _TWO | {'qa_pairs': pairs})
  assert found.sub_questions == (
      SubQuestion('Who sang it?', 'Dil', ('w/0',)),
      SubQuestion('When was Dil sang it. born?', '1987', ('w/1',)))
  assert found.search_keys[0] == ('Who sang it?',)


def test_flashrag_verl_and_search_r1(tmp_path):
  row = {'id': 'test_3', 'question': 'Who?', 'golden_answers': ['Fred']}
  assert _one(tmp_path, row) == Example(
      'test_3', 'Who?', ('Fred',), source='q.jsonl')
  found = _one(tmp_path, _VERL)
  assert found == Example(
      'test_3', 'Who?', ('Fred',), source='x/bamboogle', licence='MIT')
  found = _one(tmp_path, _SEARCH_R1)
  assert found == Example('1', 'Who?', ('Fred', 'F.'), source='nq')


def test_what_search_r1_trains_on(tmp_path):
  metadata = {
      key: _FACES[key] for key in ('supporting_facts', 'context', 'level')}
  row = _SEARCH_R1 | {
      'id': 'train_7', 'question': 'Who?', 'golden_answers': ['Fred', 'F.'],
      'data_source': 'hotpotqa', 'extra_info': {'index': 7}}
  nq = row | {'data_source': 'nq', 'metadata': None}
  path = _write(
      tmp_path / 'nq_hotpotqa_train' / 'train.jsonl', nq,
      row | {'metadata': metadata})
  found, hotpot = datasets.read_questions(path)
  # The folder's name is no reason to think that it is HotpotQA's.
  assert found == Example('train_7', 'Who?', ('Fred', 'F.'), source='nq')
  assert _gold(hotpot) == [('B', 'Three.'), ('A', 'One. Two.')]
  assert hotpot.source == 'hotpotqa' and hotpot.licence == 'CC BY-SA 4.0'


def test_musique_as_flashrag_stores_it(tmp_path):
  steps = [
      {**step, 'paragraph_support_idx': None, 'support_paragraph':
       _MUSIQUE['paragraphs'][step['paragraph_support_idx']]}
      for step in _MUSIQUE['question_decomposition']]
  row = {
      'id': 'dev_0', 'question': 'Who?', 'golden_answers': ['Miquette'],
      'metadata': {'id': '2hop__1_2', 'metadata': {
          'answerable': True, 'question_decomposition': steps}}}
  found = _one(tmp_path, row)
  assert _gold(found) == [_TEXTS[0], _TEXTS[2]]
  assert (found.id, found.answers) == ('dev_0', ('Miquette',))
  assert found.sub_questions[1] == SubQuestion(
      'Hillage >> spouse', 'Miquette', ('dev_0/1',))


def test_own_rows_in_all_their_fields(tmp_path):
  plain = {'question': 'Who?', 'answer': 'Fred'}
  assert _one(tmp_path, plain) == Example(
      '1', 'Who?', ('Fred',), source='q.jsonl')
  assert _one(tmp_path, plain | {'answer': ['Fred', 'F.']}).answers == (
      'Fred', 'F.')
  assert _one(tmp_path, plain | {'context': 'A text.'}).answers == ('Fred',)
  row = {
      'id': 7, 'question': 'Who?', 'answers': ['Fred'], 'hops': 3,
      'gold': [{'title': 'A', 'text': 'One.'}, {'id': 'b', 'text': 'Two.'}],
      'search_keys': [['a', 'b'], ['c']], 'dataset': 'mine',
      'source': 'me', 'licence': 'CC0'}
  found = _one(tmp_path, row)
  assert found == Example(
      '7', 'Who?', ('Fred',),
      (Document('7/0', 'A', 'One.'), Document('b', '', 'Two.')),
      (('a', 'b'), ('c',)), 3, 'mine', source='me', licence='CC0')


def test_gold_passages_of_sub_questions_are_the_questions(tmp_path):
  row = {'question': 'Who?', 'answer': 'Fred', 'gold': ['a'], 'decomposition': [
      {'question': 'x', 'answer': 'y', 'gold': 'b'},
      {'question': '#1?', 'answer': 'Fred', 'gold': ['a', 'b']}]}
  corpus = {i: Document(i, i, 'One.') for i in 'ab'}
  found = _one(tmp_path, row, corpus_by_id=corpus)
  assert found.gold_documents == (corpus['a'], corpus['b'])
  assert [sub.gold for sub in found.sub_questions] == [('b',), ('a', 'b')]
  del corpus['b']
  with pytest.raises(ValueError, match='field gold: "b" is not the id'):
    _one(tmp_path, row, corpus_by_id=corpus)


def test_fields_that_are_null(tmp_path):
  row = {
      'id': None, 'question': 'Who?', 'answers': None, 'answer': 'Fred',
      'gold': None, 'search_keys': None, 'evidences': None, 'hops': None,
      'source': None, 'metadata': None}
  assert _one(tmp_path, row) == Example(
      '1', 'Who?', ('Fred',), source='q.jsonl')
  with pytest.raises(ValueError, match='answer: expected text, found null'):
    _one(tmp_path, row | {'answer': None})
  with pytest.raises(ValueError, match='answer: expected text, found a number'):
    _one(tmp_path, row | {'answer': 1987})


def test_the_licence_of_a_set_is_not_given_to_others(tmp_path):
  row = {'question': 'Who?', 'answer': 'Fred', 'level': 'hard',
         'evidences': [['a', 'b', 'c']]}
  assert _one(tmp_path, row).licence == ''


def test_a_resolved_reference_is_not_resolved_again(tmp_path):
  row = {'question': 'q', 'answer': 'x', 'decomposition': [
      {'question': 'a', 'answer': 'The #1 Hit'},
      {'question': '#1 >> performer', 'answer': 'x'}]}
  written = _one(tmp_path, row)
  assert written.sub_questions[1].question == 'The #1 Hit >> performer'
  datasets.write_questions(tmp_path / 'out.jsonl', [written])
  assert datasets.read_questions(tmp_path / 'out.jsonl') == [written]
  # Nor needs a sub-question an answer once nothing refers to it.
  row = {'question': 'q', 'answer': 'x', 'sub_questions': [{'question': 'a'}]}
  written = _one(tmp_path, row)
  datasets.write_questions(tmp_path / 'out.jsonl', [written])
  assert datasets.read_questions(tmp_path / 'out.jsonl') == [written]
  assert written.sub_questions == (SubQuestion('a'),)


def test_written_questions_are_read_back(tmp_path):
  written = [
      _one(tmp_path, row) for row in (_MUSIQUE, _HOTPOT, _TWO, _VERL)]
  datasets.write_questions(tmp_path / 'out' / 'q.jsonl', written)
  assert datasets.read_questions(tmp_path / 'out' / 'q.jsonl') == written


def test_references(tmp_path):
  rows_ = [{
      'question': 'q', 'answers': ['x'], 'decomposition': [
          {'question': f'a of {first}', 'answer': 'one #2 hit'},
          {'question': '#1 b', 'answer': 'two'},
          {'question': '#2 of #1 and #12', 'answer': 'three'}]}
      for first in ('it', '#1')]
  good, bad = (_one(tmp_path, row) for row in rows_)
  assert [sub.question for sub in good.sub_questions] == [
      'a of it', 'one #2 hit b', 'two of one #2 hit and #12']
  # What an answer brought is no reference, #12 and #1 in the first are.
  assert formats.unresolved(good) == ['two of one #2 hit and #12']
  assert formats.unresolved(bad)[0] == 'a of #1'


def _packed(tmp_path, kind, values):
  lines = ''.join(json.dumps(v) + '\n' for v in values).encode()
  path = tmp_path / f'q.{kind}'
  if kind == 'jsonl':
    path.write_bytes(lines)
  elif kind == 'json':
    path.write_text(json.dumps(values, indent=1))
  elif kind == 'jsonl.gz':
    path.write_bytes(gzip.compress(lines))
  elif kind == 'zip':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('data/train.jsonl', lines)
      archive.writestr('__MACOSX/._train.jsonl', 'x')
  elif kind == 'parquet':
    parquet.write_table(
        pyarrow.Table.from_pylist(values), path, row_group_size=2)
  else:
    with path.open('w', newline='') as file:
      table = csv.DictWriter(file, values[0])
      table.writeheader()
      table.writerows(values)
  return path


@pytest.mark.parametrize(
    'kind', ['jsonl', 'json', 'jsonl.gz', 'zip', 'parquet', 'csv'])
def test_containers(tmp_path, kind):
  values = [
      {'id': f'q{i}', 'question': f'Who, "é" {i}?\nWell?', 'answer': f'a{i}'}
      for i in range(5)]
  ticks = []
  path = _packed(tmp_path, kind, values)
  found = [row.values for row in rows.read(
      path, rows.Faults(path), ticks.append)]
  assert found == values and ticks[-1] == 100
  assert [e.id for e in datasets.read_questions(path)] == [
      v['id'] for v in values]


def test_one_file_of_an_archive(tmp_path):
  path = tmp_path / 'raw.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name, row in (('a.jsonl', _MUSIQUE), ('b/c.json', [_HOTPOT])):
      archive.writestr(name, json.dumps(row))
  with pytest.raises(ValueError, match=r'holds 2 files .*a\.jsonl, b/c\.json'):
    datasets.read_questions(path)
  with pytest.raises(ValueError, match=r'holds no x\.json; it holds a\.jsonl'):
    datasets.read_questions(f'{path}/x.json')
  assert datasets.read_questions(f'{path}/b/c.json')[0].id == 'h'


@pytest.mark.parametrize('name, data, problem', [
    ('q.jsonl.gz', b'no', 'cannot be unpacked'),
    ('q.jsonl.gz', gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20],
     'incomplete'),
    ('q.zip', b'no', 'is no archive'),
    ('q.parquet', b'PAR1 no PAR1', 'as parquet'),
    ('q.json', b'[{"question": "\xff"}]', 'not text in UTF-8'),
])
def test_damaged_files(tmp_path, name, data, problem):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(ValueError, match=problem) as error:
    datasets.read_questions(path)
  assert str(path) in str(error.value)


def test_a_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
  rng = random.Random(0)
  values = [
      {'id': i, 'text': 'x' * rng.randrange(40), 'deep': [{'a': '[],{'}] * (
          i % 4)} for i in range(30)]
  path = tmp_path / 'q.json'
  path.write_text(json.dumps(values, indent=2))
  for chunk in (1, 7, 64, 1 << 20):
    monkeypatch.setattr(rows, '_CHUNK', chunk)
    found = list(rows.read(path, rows.Faults(path)))
    assert [row.values for row in found] == values
    lines = path.read_text().split('\n')
    assert [row.number for row in found] == list(range(1, 31))
    for row in found:  # the line at which the object begins
      line = row.where.partition('(line ')[2].removesuffix(')')
      assert lines[int(line) - 1].strip() == '{'


def test_rows_of_a_list_on_one_line_are_told_apart(tmp_path):
  path = tmp_path / 'q.json'
  path.write_text('[{"question": "q", "answer": "a"},'
                  ' {"question": "r", "answer": "b"}]')
  assert [e.id for e in datasets.read_questions(path)] == ['1', '2']
  path.write_text('[{"question": "q", "answer": "a"}, {"question": "r"}]')
  with pytest.raises(ValueError, match=r'row 2 \(line 1\), field answers'):
    datasets.read_questions(path)


@pytest.mark.parametrize('text, problem', [
    ('[{"question": "q", "answer": "a"}', 'line 1: the list has no end'),
    ('[\n{"question": "q"\n"answer": "a"}]', 'line 3: it is not JSON'),
    ('[{"question": "q", "answer": "a"}\n{}]', "line 2: expected a comma"),
    ('[1, {"question": "q", "answer": "a"}]',
     r'row 1 \(line 1\): expected an object'),
    ('[{"question": "q", "answer": "a"}]\n\n[{"question": "r"}]',
     r"line 3: the list has ended, found '\['"),
    ('[]' + ' ' * 60 + '\n' * 60 + 'x', "line 61: the list has ended"),
    ('[]', 'holds no questions'),
    ('{\n "data": [\n {"question": "q", "answer": "a"}]}',
     r'json, line 1: an object over many lines is no row; .* of all\.$'),
])
def test_bad_lists(tmp_path, text, problem, monkeypatch):
  monkeypatch.setattr(rows, '_CHUNK', 50)
  path = tmp_path / 'q.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=problem):
    datasets.read_questions(path)


def test_every_bad_row_is_named_up_to_a_number(tmp_path):
  good = {'question': 'q', 'answers': ['a']}
  path = _write(
      tmp_path / 'q.jsonl', good, {'question': 'q'}, '{"question', good, [1],
      _MUSIQUE | {'paragraphs': [{'title': 'x'}]}, {'prompt': 'x'})
  with pytest.raises(ValueError) as error:
    datasets.read_questions(path)
  text = str(error.value)
  assert text.startswith(f'{path}: 5 rows are malformed: ')
  for part in (
      'line 2, field answers: it is missing; the row has question',
      'line 3: it is not JSON', 'line 5: expected an object',
      'line 6, field paragraphs[0].paragraph_text: it is missing',
      'line 7, field question: it is missing; the row has prompt'):
    assert part in text
  path = _write(tmp_path / 'q.jsonl', *[{'question': 'q'}] * 25)
  with pytest.raises(ValueError, match='25 rows .*line 20, .*; and 5 more'):
    datasets.read_questions(path)
  parquet.write_table(
      pyarrow.Table.from_pylist([{'question': 'q'}]), tmp_path / 'q.parquet')
  with pytest.raises(ValueError, match='row 1, field answers: it is missing'):
    datasets.read_questions(tmp_path / 'q.parquet')


def test_marks_and_ends_of_lines(tmp_path):
  path = tmp_path / 'q.jsonl'
  lines = [json.dumps({'id': i, 'title': '', 'text': f'é{i}'}) for i in '12']
  path.write_text('\ufeff' + '\r\n'.join(lines) + '\r\n', newline='')
  assert list(datasets.read_corpus(path)) == [
      Document('1', '', 'é1'), Document('2', '', 'é2')]


@pytest.mark.parametrize('text, problem', [
    ('question,answer\nWho?,a\nWho, x?,Fred\n',
     "line 3: it has more fields than the header; one with a ','"),
    ('question,answer\nWho?\n', 'line 2, field answer: .*found null'),
    ('question,answer\n"Who?,a\nWhen?,b\n', 'line 2: it is no row of a table'),
    ('question,answer\n"A" and b?,a\n', 'line 2: it is no row of a table'),
])
def test_bad_tables(tmp_path, text, problem):
  path = tmp_path / 'q.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=problem):
    datasets.read_questions(path)


@pytest.mark.parametrize('row, problem', [
    (_MUSIQUE | {'answerable': False}, 'field answerable: .*MuSiQue-Ans'),
    (_MUSIQUE | {'question_decomposition': [
        _MUSIQUE['question_decomposition'][0] | {
            'paragraph_support_idx': 3}]}, r'idx: 3 is none of the 3'),
    (_HOTPOT | {'context': [['A']]}, r'field context\[0\]: expected \[title'),
    (_HOTPOT | {'context': '[['}, 'field context: it is not JSON'),
    (_FACES | {'context': {'title': ['A']}}, 'two lists of one length'),
    (_TWO | {'evidences': [['a', 'b']]}, r'evidences\[0\]: expected \[subj'),
    (_TWO | {'evidences': {'fact': ['a'], 'relation': [], 'entity': []}},
     'field evidences: expected three lists of one length'),
    (_TWO | {'evidences': 3}, 'field evidences: expected a list'),
    (_VERL | {'prompt': []}, 'no message in it has the role user'),
    (_SEARCH_R1 | {'reward_model': {'ground_truth': {'target': []}}},
     r'field reward_model\.ground_truth\.target: it is empty'),
    ({'question': 'q \ud83d', 'answers': ['a']},
     r"field question: it holds half of a character, '\\ud83d'"),
    ({'question': 'q', 'answers': ['a'], 'hops': 'two'}, 'field hops: expec'),
    ({'question': 'q', 'answers': ['a'], 'search_keys': ['a']},
     r'search_keys\[0\]: expected a list'),
])
def test_bad_fields(tmp_path, row, problem):
  with pytest.raises(ValueError, match=problem):
    _one(tmp_path, row)


def _documents(path):
  return [(d.id, d.title, d.text) for d in datasets.read_corpus(path)]


def test_corpora_of_other_kinds(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  wanted = [('7', 'Push', 'A series.'), ('9', 'Dazed', 'A "film".')]
  lines = [{'id': i, 'contents': f'"{t}"\n{x}'} for i, t, x in wanted]
  path = tmp_path / 'wiki-18.jsonl.gz'
  path.write_bytes(gzip.compress(
      ''.join(json.dumps(v) + '\n' for v in lines).encode()))
  assert _documents(path) == wanted
  made = list((tmp_path / 'cache').rglob('corpus.jsonl'))
  assert len(made) == 1 and _documents(path) == wanted
  assert list((tmp_path / 'cache').rglob('corpus.jsonl')) == made
  path.write_bytes(gzip.compress(json.dumps(lines[0]).encode()))
  said = []
  assert len(datasets.read_corpus(path, say=said.append)) == 1
  assert len(said) == 1 and 'is written as lines to' in said[0]
  (again,) = (tmp_path / 'cache').rglob('corpus.jsonl')
  assert again != made[0]  # which is gone
  table = io.StringIO()
  out = csv.writer(table, delimiter='\t')
  out.writerows([('id', 'text', 'title'), *((i, x, t) for i, t, x in wanted)])
  (tmp_path / 'psgs_w100.tsv').write_text(table.getvalue())
  assert _documents(tmp_path / 'psgs_w100.tsv') == wanted
  for begin in '', '\ufeff', '\n\n':
    (tmp_path / 'c.json').write_text(begin + json.dumps(lines))
    assert _documents(tmp_path / 'c.json') == wanted
  path.write_bytes(gzip.compress(b'{"id": 1}\n{"id": 2, "text": 3}\n'))
  with pytest.raises(ValueError, match='2 rows are malformed: line 1, f'):
    datasets.read_corpus(path)


def test_paragraphs_of_questions_are_pooled(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  path = _write(tmp_path / 'q.jsonl', _MUSIQUE, _MUSIQUE, _HOTPOT)
  wanted = [*_TEXTS, ('A', 'One. Two.'), ('C', 'x'), ('B', 'Three.')]
  corpus = datasets.read_corpus(path)
  assert [(d.title, d.text) for d in corpus] == wanted
  assert [d.id for d in corpus] == list('012345')
  found = datasets.read_questions(path, corpus.by_id)
  assert [d.id for d in found[0].gold_documents] == ['0', '2']
  assert [d.id for d in found[2].gold_documents] == ['5', '3']


_FILES = {  # rows, hops
    'raw/2wiki_dev_200_official_shape.json': (200, {2: 138, 3: 3, 4: 58, 5: 1}),
    'raw/2wiki_train_500_with_subquestions.json': (500, {2: 408, 4: 92}),
    'raw/bamboogle_125_flashrag_shape.jsonl': (125, {0: 125}),
    'raw/bamboogle_125_verl_shape.jsonl': (125, {0: 125}),
    'raw/hotpotqa_dev_100_official_shape.json': (100, {2: 100}),
    'raw/hotpotqa_dev_300_huggingface_shape.jsonl': (300, {2: 300}),
    'raw/musique_dev_200_native.jsonl': (200, {2: 145, 3: 32, 4: 23}),
    'raw/musique_dev_2417_decompositions.json': (
        2417, {2: 1252, 3: 760, 4: 405}),
    'raw/musique_train_100_native.json': (100, {2: 68, 3: 27, 4: 5}),
    'raw/musique_train_19938_questions.parquet': (19938, {0: 19938}),
    'raw/search_r1_3b_instruct_bamboogle_transcripts.json': (125, {0: 125}),
    '2wiki/questions.jsonl': (500, {2: 373, 3: 2, 4: 124, 5: 1}),
    'bamboogle/questions.jsonl': (125, {0: 125}),
    'hotpotqa/questions.jsonl': (891, {2: 891}),
    'musique/questions.jsonl': (440, {2: 289, 3: 102, 4: 49}),
}


@_HERE
@pytest.mark.parametrize('name', _FILES)
def test_all_real_files(name):
  found = datasets.read_questions(_SHARED / name)
  size, hops = _FILES[name]
  assert len(found) == size and len({e.id for e in found}) == size
  assert collections.Counter(e.hops for e in found) == hops
  assert not any(formats.unresolved(e) for e in found)
  assert {e.licence for e in found} == {formats.LICENCES[next(
      n for n in formats.LICENCES if n in name)]}


@_HERE
def test_the_list_of_real_files_is_whole():
  there = {
      str(path.relative_to(_SHARED)) for path in _SHARED.glob('*/*.*')
      if path.name != 'corpus.jsonl'}
  assert there == set(_FILES)


@_HERE
def test_questions_agree_in_all_shapes():
  flashrag, verl, transcripts = map(datasets.read_questions, (
      _RAW / 'bamboogle_125_flashrag_shape.jsonl',
      _RAW / 'bamboogle_125_verl_shape.jsonl',
      _RAW / 'search_r1_3b_instruct_bamboogle_transcripts.json'))
  assert [(e.id, e.question, e.answers) for e in flashrag] == [
      (e.id, e.question, e.answers) for e in verl] == [
      (e.id, e.question, e.answers) for e in transcripts]
  native = {e.id: e for e in datasets.read_questions(
      _RAW / 'musique_dev_200_native.jsonl')}
  titles = {e.id: e for e in datasets.read_questions(
      _RAW / 'musique_dev_2417_decompositions.json')}
  both = native.keys() & titles.keys()
  assert len(both) == 200
  for key in both:
    assert native[key].answers == titles[key].answers
    assert native[key].search_keys == titles[key].search_keys


@_HERE
def test_real_gold_titles_find_their_passages(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  path = _RAW / 'musique_dev_200_native.jsonl'
  corpus = datasets.read_corpus(path).by_id
  native = {e.id: e for e in datasets.read_questions(path, corpus)}
  titles = {e.id: e for e in datasets.read_questions(
      _RAW / 'musique_dev_2417_decompositions.json', corpus)}
  found = [key for key in native if titles[key].gold_documents]
  assert len(found) >= 150  # of 200; the others' titles have several passages
  assert [titles[key].gold_documents for key in found] == [
      native[key].gold_documents for key in found]
