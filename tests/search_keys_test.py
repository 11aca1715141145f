"""From questions to keys: what is kept, what faults cost, kills, bad input."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import client
from stepsearch.data import datasets
from stepsearch.data import growing
from stepsearch.data import language_model
from stepsearch.data import search_keys
from stepsearch.models import hf
from stepsearch.models import qwen
from stepsearch.retrieval import retriever
from stepsearch.rl import rewards
from stepsearch.rollout import generate
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion
from stepsearch.types import Transcript
from stepsearch.types import Turn
from tests import fake_services

_ROOT = pathlib.Path(__file__).parents[1]
_PLACES = ['Arlo', 'Brent', 'Corin', 'Delph']


class _Table:
  """An engine that finds what a table says, by query."""

  def __init__(self, table):
    self.table = table
    self.asked = []

  def search(self, queries, k):
    self.asked += queries
    return [self.table.get(query, [])[:k] for query in queries]


class _Scripted:
  """A writer that answers by task and question, in turn."""

  name = 'scripted'

  def __init__(self, table):
    self.table = collections.defaultdict(list)
    for key, texts in table.items():
      self.table[key] = list(texts)
    self.requests = []

  def write(self, requests):
    self.requests += requests
    return [
        language_model.Written(self.table[
            request.task, request.fields['question']].pop(0), 10, 2)
        for request in requests]


_GOLD = Document('g', 'Push', 'Push is a novel by Sapphire.')
_OTHER = Document('o', 'Sapphire', 'Sapphire wrote Push.')
_NONE = Document('n', 'Rome', 'Rome is old.')


def _example(**fields):
  values = dict(
      id='q', question='Who played the author of Push?', answers=('Ada', 'A.'),
      gold_documents=(_GOLD, _NONE), hops=2, sub_questions=(
          SubQuestion('Who wrote Push?', 'Sapphire', ('g',)),
          SubQuestion('Is Rome old?', 'yes', ('n',))))
  return Example(**values | fields)


def _run(tmp_path, examples, writer, engines, **config):
  return search_keys.run(
      examples, writer, {name: lambda e=e: e for name, e in engines.items()},
      search_keys.Config(**config),
      tmp_path / 'keys.jsonl', sources={}, say=lambda _: None)


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize('valid, engines, kept', [
    # One engine of three finds it: two are needed.
    ('either', 'abb', {'x': 'a', 'y': 'abb', 'z': 'bb'}),
    ('gold', 'abb', {'x': 'a', 'y': 'abb'}),
    ('answer', 'abb', {'x': 'a', 'y': 'abb', 'z': 'bb'}),
    ('gold', 'ab', {'x': 'a', 'y': 'ab'}),  # of two, one suffices
    ('gold', 'b', {'y': 'b'}),
])
def test_a_query_is_kept_where_half_of_the_engines_find_it_valid(
    tmp_path, valid, engines, kept):
  finds = {
      'a': {'x': [_GOLD], 'y': [_NONE, _GOLD], 'z': [_NONE],
            'old': [_NONE, _NONE, _NONE, _NONE]},
      'b': {'y': [_GOLD], 'z': [_OTHER], 'x': [_NONE, _NONE, _NONE, _GOLD]}}
  made = {f'{name}{i}': _Table(finds[name]) for i, name in enumerate(engines)}
  writer = _Scripted({
      ('queries', 'Who wrote Push?'): ['1. x\n2. y\n3. z\n4. by Sapphire'],
      ('queries', 'Is Rome old?'): ['1. old\n2. Rome, old: yes or no']})
  report = _run(tmp_path, [_example()], writer, made, valid=valid)
  (row,) = _rows(tmp_path / 'keys.jsonl')
  need = -(-len(engines) // 2)
  assert row['sub_searchs'][0] == [
      query for query, names in kept.items() if len(names) >= need]
  assert row['queries'][0][3] == {
      'query': 'by Sapphire', 'kept': False, 'engines': [], 'leak': True}
  assert 'by Sapphire' not in made[f'{engines[0]}0'].asked
  # Yes is no evidence, but the gold passage is.
  assert row['sub_searchs'][1] == (
      ['old'] if valid != 'answer' and 'a' in engines and need == 1 else [])
  assert report.sub_questions == 2 and report.written == 6
  assert report.leaks == 1 and report.kept == sum(map(len, row['sub_searchs']))
  assert report.unjudged == (valid == 'answer')
  assert (report.prompt_tokens, report.completion_tokens) == (20, 4)
  assert sum(report.per_sub_question.values()) == 2


def test_rows_are_read_as_training_reads_them(tmp_path):
  table = _Table({'x': [_GOLD]})
  writer = _Scripted({
      ('queries', 'Who wrote Push?'): ['1. x\n2. nothing'],
      ('queries', 'Is Rome old?'): ['* "nothing"']})
  report = _run(tmp_path, [_example()], writer, {'t': table})
  (read,) = datasets.read_questions(
      tmp_path / 'keys.jsonl', {d.id: d for d in (_GOLD, _NONE)})
  assert dataclasses.replace(
      read, search_keys=(), source='', licence='') == _example()
  assert read.search_keys == (('x',), ())
  assert report.per_sub_question == {0: 1, 1: 1}
  assert report.keyless_questions == 0
  # Half of r_key cannot be earned, and nothing breaks.
  transcript = Transcript('', (Turn('<search>x</search>', 'x', (_GOLD,)),))
  (score,) = rewards.score([read], [transcript], rewards.Config())
  assert score.search_key == 0.5


def test_where_nothing_is_kept_the_sub_question_is_a_key_only_if_asked_for(
    tmp_path):
  for keep, keys in ((False, [[], []]), (
      True, [['Who wrote Push?'], ['Is Rome old?']])):
    folder = tmp_path / str(keep)
    folder.mkdir()
    report = _run(
        folder, [_example()], language_model.Rules(), {'t': _Table({})},
        keep_sub_question=keep)
    (row,) = _rows(folder / 'keys.jsonl')
    assert row['sub_searchs'] == keys
    assert report.keyless_questions == 1 and report.kept == 0


def test_unusable_answers_are_asked_again_and_then_listed(tmp_path):
  question = 'Who played the author of Push?'
  steps = '1. Who wrote Push? | Sapphire\n2. Who played Sapphire? | Ada'
  writer = _Scripted({
      ('decompose', question): [
          'Let me see.', '1. Who wrote Push?', '1. Who wrote Push? | Ed',
          steps],
      ('queries', 'Who wrote Push?'): ['-', '1. ' + 'word ' * 60, '1) x'],
      ('queries', 'Who played Sapphire?'): ['no', 'no', 'no', 'no', '1. y']})
  bare = _example(sub_questions=())
  report = _run(
      tmp_path, [bare], writer, {'t': _Table({'x': [_OTHER]})}, tries=4)
  (row,) = _rows(tmp_path / 'keys.jsonl')
  assert row['sub_searchs'] == [['x'], []]
  assert row['unusable'] == ['queries: it is not a numbered list']
  assert report.unusable == ['q, queries: it is not a numbered list']
  faults = [r.faults for r in writer.requests if r.task == 'decompose'][-1]
  assert [problem for _, problem in faults] == [
      'it is not a numbered list',
      "'Who wrote Push?' has no ' | ' between question and answer",
      "the last answer is 'Ed', not 'Ada'"]
  prompts = language_model.Prompts(search_keys.TASKS)
  texts = prompts.messages(dataclasses.replace(
      writer.requests[0], faults=faults))
  assert texts[1::2] == [text for text, _ in faults] and (
      "the last answer is 'Ed'" in texts[-1]) and question in texts[0]


def test_the_datas_own_steps_can_be_worded_anew(tmp_path):
  own = _example(sub_questions=(
      SubQuestion('Push >> author', 'Sapphire', ('g',)),))
  writer = _Scripted({
      ('rewrite', own.question): [
          '1. a | b\n2. c | d', '1. Who is the author of Push? | Ed'],
      ('queries', 'Who is the author of Push?'): ['1. x']})
  _run(tmp_path, [own], writer, {'t': _Table({'x': [_GOLD]})}, rewrite=True)
  (row,) = _rows(tmp_path / 'keys.jsonl')
  assert row['sub_questions'] == [{
      'question': 'Who is the author of Push?', 'answer': 'Sapphire',
      'gold': [0]}]
  assert '1. Push >> author | Sapphire' in writer.requests[0].fields['steps']


@pytest.mark.parametrize('question, expected', [
    ('Who was the first president of American Psychological Association ?', [
        'Who was the first president of American Psychological Association',
        'American Psychological Association first president',
        'first president American Psychological Association',
        'the first president of American Psychological Association',
        'American Psychological Association']),
    ('Hello Love >> performer', [
        'performer of Hello Love', 'Hello Love performer',
        'performer Hello Love', 'Hello Love']),
    ("When was Lady Godiva's birthplace abolished?", [
        "When was Lady Godiva's birthplace abolished",
        'Lady Godiva birthplace abolished',
        "Lady Godiva's birthplace abolished", 'Lady Godiva']),
    ('why?', ['why']),
])
def test_queries_without_a_model(question, expected):
  assert language_model.queries(question) == expected


# ---- an endpoint that fails at times


def _data(tmp_path, count):
  """Questions without steps, a corpus, and what a perfect model would say."""
  documents, questions = [], []
  for i in range(count):
    place = f'{_PLACES[i % 4]}{i}'
    documents += [
        Document(f'p{i}', f'Person{i}', f'Person{i} was born in {place}.'),
        Document(f'c{i}', place, f'{place} is led by Mayor{i}.')]
    questions.append({
        'id': f'q{i}', 'question': f'Who leads the birthplace of Person{i}?',
        'answers': [f'Mayor{i}'], 'gold': [f'p{i}', f'c{i}']})
  (tmp_path / 'corpus.jsonl').write_text(''.join(
      json.dumps({'id': d.id, 'title': d.title, 'text': d.text}) + '\n'
      for d in documents))
  (tmp_path / 'questions.jsonl').write_text(''.join(
      json.dumps(row) + '\n' for row in questions))
  return documents, questions


def _model(messages):
  prompt = messages[0]['content']
  question = re.search(r'^Question: (.*)$', prompt, re.MULTILINE)[1]
  if prompt.startswith('Write'):
    if question.endswith('born?') and '7' in question and len(messages) == 1:
      return 'Of course! Here are some.'
    return '<think>1. hm</think>\n' + '\n'.join(
        f'{i}. {text}' for i, text in enumerate(
            [question, question.rstrip('?').split()[-1], f'about {question}',
             'nothing at all'], 1))
  i = int(re.search(r'Person(\d+)', question)[1])
  place = f'{_PLACES[i % 4]}{i}'
  return (f'1. In which place was Person{i} born? | {place}\n'
          f'2. Who leads {place}? | Mayor{i}')


def _command(tmp_path, server, output, *more):
  return [
      sys.executable, '-m', 'stepsearch.prepare', 'keys',
      f'--questions={tmp_path}/questions.jsonl',
      f'--corpus={tmp_path}/corpus.jsonl', f'--output={output}',
      f'--engines=lexical,bm25,serper:{server.url}/search',
      '--writer=endpoint', f'--base_url={server.url}/v1', '--model=fake',
      '--key_variable=FAKE_KEY', '--timeout=1.5', '--retries=8',
      '--retry_wait=0.05', '--concurrency=6', '--price_in=1',
      '--price_out=2', '--show=1', *more]


def _start(command):
  return subprocess.Popen(
      command, cwd=_ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env=os.environ | {
          'FAKE_KEY': fake_services.KEY, 'SERPER_API_KEY': fake_services.KEY,
          'JAX_PLATFORMS': 'cpu'})


def test_a_tenth_of_faults_and_a_kill_lose_nothing_and_ask_nothing_twice(
    tmp_path):
  documents, questions = _data(tmp_path, 48)
  options = dict(
      pages=documents, write=_model, slow=2.0, faults=0.1, retry_after=0)
  with fake_services.running(**options) as server:
    output = tmp_path / 'whole.jsonl'
    whole = _start(_command(tmp_path, server, output))
    said, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, said
    requests = len(server.answered)
    assert requests > 300
    assert f'={output} --config.data.corpus={tmp_path}/corpus.jsonl' in said
    told = re.findall(r'(endpoint|serper), this run: (\d+) requests', said)
    assert [name for name, _ in told] == ['endpoint', 'serper']
    assert sum(int(count) for _, count in told) == requests
    assert set(server.answered.values()) == {1}  # each once, all of them
    assert set(server.answered) == set(server.asked)
    assert set(server.faulty) == set(fake_services.FAULTS)
  rows = _rows(output)
  assert [row['id'] for row in rows] == [row['id'] for row in questions]
  for i, row in enumerate(rows):
    place = f'{_PLACES[i % 4]}{i}'
    assert [s['question'] for s in row['sub_questions']] == [
        f'In which place was Person{i} born?', f'Who leads {place}?']
    assert all(len(keys) >= 2 for keys in row['sub_searchs'])
    assert 'nothing at all' not in row['sub_searchs'][0]
  assert '48 questions, 96 sub-questions: 384 queries' in said
  assert re.search(r'\$0\.\d{4}; all rows: \$0\.\d{4}', said) and 'ETA' in said

  killed = tmp_path / 'killed.jsonl'
  with fake_services.running(**options) as server:
    server.delay = 0.02
    process = _start(_command(tmp_path, server, killed))
    end = time.monotonic() + 60
    while len(server.answered) < 0.7 * requests and time.monotonic() < end:
      time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 0.7 * requests <= len(server.answered) < requests
    # What was on its way when it was killed is asked again; nothing else is.
    last = _start(_command(tmp_path, server, killed))
    told, _ = last.communicate(timeout=120)
    assert last.returncode == 0, told
    assert sum(server.answered.values()) - requests <= 8
    assert len(server.answered) == requests
  assert killed.read_bytes() == output.read_bytes()
  for text in (said, told):
    assert fake_services.KEY not in text
  for file in tmp_path.iterdir():
    assert fake_services.KEY.encode() not in file.read_bytes(), file


def test_what_fails_for_good_is_listed_and_asked_again(tmp_path, monkeypatch):
  documents, _ = _data(tmp_path, 6)
  examples = datasets.read_questions(
      tmp_path / 'questions.jsonl', {d.id: d for d in documents})
  monkeypatch.setenv('FAKE_KEY', fake_services.KEY)
  engines = {'t': _Table({})}
  with fake_services.running(write=_model) as server:

    def run():
      writer = language_model.Endpoint(
          f'{server.url}/v1', 'fake', language_model.Prompts(search_keys.TASKS),
          key_variable='FAKE_KEY', cache=tmp_path / 'cache', wait=0.01)
      return _run(tmp_path, examples, writer, engines, block=4)

    server.bad = ('Person2?', 'Person5 born')
    report = run()
    assert [line.partition(':')[0] for line in report.failed] == ['q2', 'q5']
    assert all('HTTP 400' in line for line in report.failed)
    assert report.questions == 4
    server.bad = ()
    before = dict(server.answered)
    report = run()
    assert report.failed == [] and report.questions == 6
    assert all(server.answered[name] == n for name, n in before.items())
  assert [row['id'] for row in _rows(tmp_path / 'keys.jsonl')] == [
      f'q{i}' for i in range(6)]


def test_an_endpoint_that_is_gone_ends_the_run_soon(tmp_path):
  examples = [
      _example(id=str(i), sub_questions=()) for i in range(60)]

  class Down(_Scripted):

    def write(self, requests):
      self.requests += requests
      return [client.Failed('no answer') for _ in requests]

  writer = Down({})
  with pytest.raises(ValueError, match='last 32 questions .* no answer'):
    _run(tmp_path, examples, writer, {'t': _Table({})})
  assert len(writer.requests) == 32


@pytest.mark.parametrize('patient', [False, True])
def test_an_engine_that_fails_costs_the_question_and_not_its_keys(
    tmp_path, patient):
  class Failing(_Table):
    failed = 0

    def search(self, queries, k):
      found = super().search(queries, k)
      if patient:  # as `retriever.Patient`, which tells how many
        self.failed += 1
        return found
      raise retriever.PartlyFailed('one failed', [None, *found[1:]])

  examples = [_example(), _example(id='r', sub_questions=(
      SubQuestion('Who wrote Push?', 'Sapphire', ('g',)),))]
  writer = _Scripted({
      ('queries', 'Who wrote Push?'): ['1. x', '1. y'],
      ('queries', 'Is Rome old?'): ['1. old']})
  report = _run(tmp_path, examples, writer, {'e': Failing({'y': [_GOLD]})})
  assert report.failed == [
      "q: e has no answer to 'x'" + ('' if patient else ': one failed')]
  (row,) = _rows(tmp_path / 'keys.jsonl')
  assert row['id'] == 'r' and row['sub_searchs'] == [['y']]


def test_the_key_of_an_endpoint(tmp_path, monkeypatch):
  prompts = language_model.Prompts(search_keys.TASKS)
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  with pytest.raises(ValueError, match='OPENAI_API_KEY, which is not set'):
    language_model.Endpoint('http://127.0.0.1:1/v1', 'm', prompts)
  with pytest.raises(ValueError, match='--model is missing'):
    language_model.Endpoint('http://127.0.0.1:1/v1', '', prompts)
  monkeypatch.setenv('OPENAI_API_KEY', 'sk-wrong')
  with fake_services.running(write=_model) as server:
    writer = language_model.Endpoint(f'{server.url}/v1', 'm', prompts)
    with pytest.raises(client.Refused, match='HTTP 401') as error:
      _run(tmp_path, [_example(sub_questions=())], writer, {'t': _Table({})})
  assert 'sk-wrong' not in str(error.value)


def test_a_file_that_was_begun_otherwise_is_refused(tmp_path):
  rules, engines = language_model.Rules(), {'t': _Table({})}
  _run(tmp_path, [_example()], rules, engines)
  before = (tmp_path / 'keys.jsonl').read_bytes()
  # What is whole needs no engine.
  search_keys.run(
      [_example()], rules, {'t': None}, search_keys.Config(block=1),
      tmp_path / 'keys.jsonl', sources={}, say=lambda _: None)
  assert (tmp_path / 'keys.jsonl').read_bytes() == before
  with pytest.raises(ValueError, match='begun with k = 3, and this is 4'):
    _run(tmp_path, [_example()], rules, engines, k=4)
  other_run = growing.File(tmp_path / 'other.jsonl', {})
  with pytest.raises(ValueError, match='another process is writing it'):
    growing.File(tmp_path / 'other.jsonl', {})
  other_run.close({})
  with pytest.raises(ValueError, match="the id 'q'"):
    _run(tmp_path, [_example(), _example()], rules, engines)
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'keys.jsonl').write_text('mine\n')
  with pytest.raises(ValueError, match='a file of another kind'):
    _run(other, [_example()], rules, engines)
  assert (other / 'keys.jsonl').read_text() == 'mine\n'


def test_a_file_without_rows_may_be_begun_otherwise(tmp_path):
  # As after a wrong model or address, with which nothing was written.
  path = tmp_path / 'new' / 'keys.jsonl'
  assert list(growing.File(path, {'model': 'a'}).finish([])) == []
  file = growing.File(path, {'model': 'b'})
  file.append([{'id': 'q'}])
  assert [row['id'] for row in file.finish(['q'])] == ['q']
  with pytest.raises(ValueError, match="begun with model = 'b', and this is"):
    growing.File(path, {'model': 'a'})


@pytest.mark.parametrize('cut', [1, 9, 200])
def test_a_row_that_a_kill_has_torn_is_made_again(tmp_path, cut):
  path = tmp_path / 'keys.jsonl'
  examples = [_example(id=name) for name in 'abc']
  make = lambda: _run(
      tmp_path, examples, language_model.Rules(), {'t': _Table({})}, block=2)
  make()
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  make()
  assert path.read_bytes() == whole


def test_rows_come_into_the_file_that_another_process_has_just_finished(
    tmp_path, monkeypatch):
  path = tmp_path / 'keys.jsonl'
  first = growing.File(path, {})
  first.append([{'id': 'a'}])
  lock, waiting = growing.fcntl.flock, [first]

  def late(file, how):  # the first ends between opening and locking
    if waiting:
      waiting.pop().finish(['a'])
    lock(file, how)

  monkeypatch.setattr(growing.fcntl, 'flock', late)
  growing.File(path, {}).append([{'id': 'b'}])
  assert [row['id'] for row in _rows(path)] == ['a', 'b']


def test_questions_are_told_apart_by_all_that_rows_have_of_them():
  name = search_keys.fingerprint([_example()])
  assert name.startswith('1 questions, ')
  assert name == search_keys.fingerprint([_example(search_keys=(('x',),))])
  for change in (
      dict(id='r'), dict(answers=('Ada',)), dict(gold_documents=(_GOLD,)),
      dict(sub_questions=()), dict(hops=3), dict(licence='CC0')):
    assert search_keys.fingerprint([_example(**change)]) != name, change


def test_prompts_are_files_that_can_be_changed(tmp_path):
  folder = tmp_path / 'prompts'
  with pytest.raises(ValueError, match=r'decompose\.txt is missing'):
    language_model.Prompts(search_keys.TASKS, folder)
  folder.mkdir()
  for file in language_model.PROMPTS.iterdir():
    (folder / file.name).write_text(file.read_text())
  ours = language_model.Prompts(search_keys.TASKS)
  assert language_model.Prompts(
      search_keys.TASKS, folder).fingerprint == ours.fingerprint
  request = language_model.Request(
      'queries', dict(question='a {number} b', number='5'))
  (folder / 'queries.txt').write_text('{"n": {number}} for {question}\n')
  changed = language_model.Prompts(search_keys.TASKS, folder)
  assert changed.messages(request) == ['{"n": 5} for a {number} b']
  assert changed.fingerprint != ours.fingerprint
  (folder / 'queries.txt').write_text('{quest}')
  with pytest.raises(ValueError, match=r'queries\.txt: the field {quest}'):
    language_model.Prompts(search_keys.TASKS, folder)


# ---- a model of our own


def test_a_line_that_the_budget_has_cut_is_no_query():
  prompts = language_model.Prompts(search_keys.TASKS)
  request = language_model.Request(
      'queries', dict(question='a', number='2'), (('1. ', 'it is empty'),))
  asked = []

  def generate(texts):
    asked.extend(texts)
    return [
        'no room', *(('1. one\n2. tw', ended) for ended in (True, False))]

  local = language_model.Local('ours', generate, prompts)
  failed, *written = local.write([request] * 3)
  assert isinstance(failed, client.Failed) and str(failed) == 'no room'
  assert [w.text for w in written] == ['1. one\n2. tw', '1. one']
  assert 'Question: a' in asked[0] and 'it is empty' in asked[0]
  for reason, text in (('stop', '1. one\n2. tw'), ('length', '1. one')):
    assert language_model._written({'choices': [{
        'finish_reason': reason,
        'message': {'content': '<think>1. no</think>1. one\n2. tw'}}]}
    ).text == text


@pytest.mark.parametrize('made, ended, text', [
    ('<think>\n1. no\n</think>\n1. one', True, '\n1. one'),
    ('1. no\n</think>1. one\n2. tw', False, '1. one'),  # a template began it
    ('<think>\n1. no\n2. n', False, ''),
    ('<think>\n1. no', True, ''),
])
def test_thoughts_are_no_queries(made, ended, text):
  prompts = language_model.Prompts(search_keys.TASKS)
  local = language_model.Local('ours', lambda texts: [(made, ended)], prompts)
  request = language_model.Request('queries', dict(question='a', number='2'))
  assert local.write([request]) == [language_model.Written(text)]
  assert language_model._written({'choices': [{
      'finish_reason': 'stop' if ended else 'length',
      'message': {'content': made}}]}).text == text


def test_our_model_writes_what_a_loop_over_whole_sequences_writes(
    tmp_path, model, params, tokenizer):
  hf.save(tmp_path / 'model', model, params, tokenizer)
  prompts = ['who is alba', 'born in', 'the mayor of bero ? is efra',
             *['cuna dilo'] * 8]
  too_long, *written = generate.Generator(
      tmp_path / 'model', slots=8, longest=70)(['alba ' * 40_000, *prompts])
  room = model.max_length - 70
  assert re.fullmatch(
      rf'a prompt of \d{{5}} tokens, .* room for {room} before a text of 70',
      too_long)
  ends = tokenizer.eos_ids

  @jax.jit
  def hidden(tokens):
    positions = jnp.arange(128, dtype=jnp.int32)[None]
    return qwen.Qwen(model).apply({'params': params}, tokens, positions)[0]

  for prompt, (text, ended) in list(zip(prompts, written))[:4]:
    ids = tokenizer.prompt(prompt, '{question}')
    start = len(ids)
    while len(ids) < start + 70 and ids[-1] not in ends:
      padded = np.full([1, 128], tokenizer.pad_id, np.int32)
      padded[0, :len(ids)] = ids
      logits = hidden(padded)[0, len(ids) - 1] @ params['lm_head']
      ids.append(int(jnp.argmax(logits)))
    assert ended == (ids[-1] in ends)
    assert text == tokenizer.decode(ids[start:len(ids) - ended])
  assert len(set(written[3:])) == 1

  drawing = generate.Generator(
      tmp_path / 'model', slots=8, longest=70, temperature=1.0)
  drawn = drawing(prompts)
  assert drawn != written and len(set(drawn[3:])) == 1
  assert drawing(prompts[2:0:-1]) == drawn[2:0:-1]
