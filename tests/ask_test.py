"""Questions to a checkpoint: what is searched, shown, told and refused."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest

from stepsearch import ask
from stepsearch import config as config_lib
from stepsearch import export
from stepsearch import types
from stepsearch.rollout import collect
from tests import micro

_ROOT = pathlib.Path(__file__).parents[1]
_DOCUMENTS = (
    types.Document('1', 'Kibufi\x1b\x07 Dusovu', 'a town'),
    types.Document('2', '', 'a passage without a title, and a long one, ' * 4))
TURNS = (
    types.Turn(
        '<think> the mayor\nof it </think>\n<search>mayor of it</search>',
        'mayor of it', _DOCUMENTS, 'seen'),
    types.Turn('<think>again</think><search>mayor</search>', 'mayor', (), 'n'),
    types.Turn('<search></search>', '', (), 'nothing'),
    types.Turn('it is</think>', None, (), 'warned'),
    types.Turn('<think>so</think><answer>Bure Fanavi</answer>'))
_PLAIN = """\
asked   who ?
        compiling…
think   the mayor of it
search  mayor of it
        1  Kibufi Dusovu
        2  a passage without a title, and a long one, a passage without a \
title, and a long one, a…
think   again
search  mayor
        nothing found
search  for nothing
writes  it is</think>
        neither a search nor an answer
think   so
answer  Bure Fanavi
        3 searches, 7 tokens, 1.2 s
"""


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a run."""
  workdir = tmp_path_factory.mktemp('run')
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *_: devices)
    micro.searcher(workdir)
  return workdir


@pytest.fixture(scope='module')
def folder(run, tmp_path_factory):
  """The same actor as a Hugging Face folder."""
  path = tmp_path_factory.mktemp('folder') / 'model'
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *_: devices)
    export.export(str(run), str(path))
  return path


def _searcher(workdir, **options):
  return ask.Searcher(
      config_lib.stored(workdir), str(workdir), say=lambda line: None,
      **options)


class Terminal(io.StringIO):
  """What is written, as a terminal that knows \\r, and every write."""

  def isatty(self):
    return True

  def lines(self):
    rows = re.sub('\x1b\\[[0-9;]*m', '', self.getvalue()).split('\n')
    shown = []
    for row in rows:
      line = ''
      for part in row.split('\r'):
        line = part + line[len(part):]
      shown.append(line.rstrip())
    return shown


def _grow(turn, step=3):
  """The calls of a collector for one turn."""
  for end in range(step, len(turn.text) + step, step):
    yield types.Turn(turn.text[:end])
  if turn.observation:
    yield types.Turn(turn.text, turn.query)
    yield turn


class Stub:
  """Plays `TURNS`, whatever is asked."""

  def __init__(self, seen=lambda turn: None):
    self.seen = seen

  def __call__(self, question, on_turn):
    for turn in TURNS:
      for told in _grow(turn):
        on_turn(told)
        self.seen(told)
    return dict(question=question, answer='Bure Fanavi', turns=[
        dict(text=turn.text) for turn in TURNS], searches=3, tokens=7,
        seconds=1.23)


def test_a_run_needs_nothing_but_its_workdir(run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(run, tmp_path / 'moved')
  heard = []
  found = _searcher(tmp_path / 'moved')('who is what ?', heard.append)
  assert found.pop('seconds') > 0
  turns = found.pop('turns')
  # What `micro.searcher` writes: two words, twice, and a third.
  assert found == dict(
      question='who is what ?', answer='the', searches=2, tokens=15)
  assert [(t['thought'], t['query'], len(t['documents'])) for t in turns] == [
      ('what', 'is', 2), ('what', 'is', 2), ('', None, 0)]
  assert turns[0]['text'] == '<think> what</think><search> is</search>'
  assert turns[0]['documents'][0].keys() == {'id', 'title', 'text', 'score'}
  # The chunks in between were heard while they came.
  assert [t.text for t in heard[:3]] == [
      '<think> what</think><search>', turns[0]['text'], turns[0]['text']]
  assert not any((tmp_path / name).exists() for name in ('index', 'model'))


def test_only_the_first_question_compiles(run):
  searcher = _searcher(run, temperature=1.0)
  compiled = []

  def note(event, _, **__):
    compiled.append('backend_compile' in event)

  searcher('who ?')
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    searcher('what is the birthplace of the mayor of the capital of what ?')
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert not any(compiled)


def test_another_answer_each_time_at_a_temperature(run, monkeypatch):
  searcher = _searcher(run, temperature=0.5)
  seen = []

  def noted(self, *_, **options):
    seen.append((options['greedy'], options['first_episode'],
                 self.config.temperature))
    raise ValueError('seen')

  with monkeypatch.context() as patch:
    patch.setattr(collect.Collector, '__call__', noted)
    with pytest.raises(ValueError, match='seen'):
      searcher('who ?')
    searcher._asked = 1
    with pytest.raises(ValueError, match='seen'):
      searcher('who ?')
    with pytest.raises(ValueError, match='seen'):
      _searcher(run)('who ?')
  assert seen == [(False, 0, 0.5), (False, 1, 0.5), (True, 0, 1.0)]


def test_a_folder_searches_in_what_it_is_given(run, folder, tmp_path):
  config = config_lib.stored(run, ['data.source=jsonl'])
  corpus = tmp_path / 'corpus.jsonl'
  corpus.write_text(''.join(
      json.dumps(dict(id=i, title=f'T{i}', text=text)) + '\n'
      for i, text in enumerate(('who is in', 'the place', 'of'))))

  def titles(k=None, **options):
    searcher = ask.Searcher(
        config, str(folder), k=k, say=lambda line: None, **options)
    return [d['title'] for d in searcher('who ?')['turns'][0]['documents']]

  # The query is 'is'.
  assert titles(k=1, corpus=str(corpus)) == ['T0']
  index = tmp_path / 'index'
  assert titles(k=1, corpus=str(corpus), index=str(index)) == ['T0']
  corpus.unlink()
  assert titles(k=1, index=str(index)) == ['T0']
  assert titles(index=str(run / 'index')) == ['', '']
  # Beside a run, another corpus leaves its index alone.
  before = (run / 'index' / 'index.json').read_text()
  corpus.write_text('{"id": 1, "title": "mine", "text": "is is"}\n')
  found = _searcher(run, corpus=str(corpus), k=1)('who ?')
  assert found['turns'][0]['documents'][0]['title'] == 'mine'
  assert (run / 'index' / 'index.json').read_text() == before


def test_other_methods(run):
  with pytest.raises(ValueError, match='rollout.protocol = .short.*=rag'):
    _searcher(run, method='rag')
  config = config_lib.stored(run, [
      'rollout.protocol=full', 'rollout.prompt_length=400',
      'rollout.max_length=560', 'rollout.observation_length=96'])
  heard = []
  found = ask.Searcher(
      config, str(run), method='rag', say=lambda line: None)(
          'what is in the of ?', heard.append)
  # What stands in the prompt was found first, for the question.
  first, last = found['turns']
  assert len(first['documents']) == 2 and first['query'] == found['question']
  assert [d.title for d in heard[0].documents] == [
      d['title'] for d in first['documents']] and not heard[0].text
  assert found['searches'] == 1
  # By the rule of the method: the first line, without a tag.
  assert found['answer'] == (last['text'].split('\n')[0].strip() or None)


@pytest.mark.parametrize('options, said', [
    (dict(temperature=-1.0), '--temperature=-1.0'),
    (dict(index='no/such'), '--index=no/such: there is no index here'),
    (dict(corpus='no/such.jsonl'), 'no/such.jsonl'),
    (dict(k=641), 'k = 641'),
    (dict(step=7), 'no checkpoint 7; steps present: 0'),
])
def test_what_cannot_be_asked_is_said(run, options, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    _searcher(run, **options)


def test_a_folder_without_passages_and_a_prompt_that_is_too_long(run, folder):
  config = config_lib.stored(run, ['data.source=jsonl'])
  with pytest.raises(ValueError, match='--index=DIR.*--corpus=FILE'):
    ask.Searcher(config, str(folder), say=lambda line: None)
  with pytest.raises(ValueError, match='prompt_length = 32') as error:
    _searcher(run)('who ' * 40)
  assert str(error.value).count('who') == 20


def test_plain_output(capsys):
  ask.ask(Stub(), ['who ?'])
  out, err = capsys.readouterr()
  assert out == _PLAIN and not err


def test_a_terminal_shows_what_is_known_at_once(monkeypatch):
  out = Terminal()
  monkeypatch.setattr(sys, 'stdout', out)
  monkeypatch.setenv('COLUMNS', '30')
  monkeypatch.delenv('NO_COLOR', raising=False)
  known = []
  stub = Stub(lambda turn: known.append((turn.text, out.lines())))
  ask.ask(stub, ['who ?'])
  lines = out.lines()
  assert 'compiling' not in out.lines()[1]
  assert all(len(line) <= 30 for line in lines)
  # Cut to the width, and wrapped at it.
  assert '        2  a passage without…' in lines
  assert lines[lines.index('        3 searches, 7 tokens,') + 1] == (
      '        1.2 s')
  # A word is there as soon as the next one has begun, and no tag ever.
  lines = dict(known)['<think> the may']
  assert lines[-1] == 'think   the'
  assert not any('<' in line for _, seen in known[:15] for line in seen)
  assert '\x1b[1;32mBure\x1b[0m' in out.getvalue()
  monkeypatch.setenv('NO_COLOR', '1')
  out.truncate(0)
  ask.ask(Stub(), ['who ?'], typed=True)
  assert '\x1b' not in out.getvalue()


def test_wide_characters_take_two_columns(monkeypatch):
  out = Terminal()
  monkeypatch.setattr(sys, 'stdout', out)
  monkeypatch.setenv('COLUMNS', '30')
  title = '東京' * 10
  screen = ask.Screen(out)
  screen.turn(types.Turn(
      '', '東京', (types.Document('1', title, ''),
                 types.Document('2', 'e\u0301' * 18, '')), 'seen'))
  screen.question('東京 ' * 5)
  screen.stop()
  lines = out.lines()
  # 8 of indentation, the number and two spaces, 8 characters of two and a dot.
  assert lines[0] == f'        1  {title[:8]}…'
  assert lines[1] == '        2  ' + 'e\u0301' * 18
  assert lines[2:4] == ['asked   東京 東京 東京 東京', '        東京']


def test_documents_of_a_prompt_and_answers_without_tags(capsys):
  def play(question, on_turn):
    on_turn(types.Turn('', question, _DOCUMENTS[:1]))
    on_turn(types.Turn('Bure Fan'))
    return dict(
        question=question, answer='Bure Fanavi', searches=1, tokens=2,
        seconds=0.04, turns=[dict(text=''), dict(text='Bure Fanavi\n')])

  ask.ask(play, ['who ?'])
  assert capsys.readouterr().out.splitlines()[2:] == [
      '        1  Kibufi Dusovu', 'writes  Bure Fanavi', 'answer  Bure Fanavi',
      '        1 search, 2 tokens, 0.0 s']


def test_ctrl_c_ends_an_answer_and_errors_end_none(capsys):
  class Fails(Stub):
    def __call__(self, question, on_turn):
      on_turn(types.Turn('<think>half a'))
      if question == 'stop':
        raise KeyboardInterrupt
      if question == 'bad':
        ask.config_lib.require(False, 'x', 1, 'bad.')
      if question == 'bug':
        raise ValueError('not ours: raised by a test')
      return super().__call__(question, on_turn)

  ask.ask(Fails(), ['stop', 'bad', 'who ?'], typed=True)
  out = capsys.readouterr().out
  assert out.count('think   half') == 3 and 'stopped\n' in out
  assert 'config.x = 1: bad.\n' in out and 'Bure Fanavi' in out
  with pytest.raises(KeyboardInterrupt):
    ask.ask(Fails(), ['stop'])
  with pytest.raises(ValueError, match='config.x'):
    ask.ask(Fails(), ['bad'], one=True)
  with pytest.raises(ValueError, match='not ours'):
    ask.ask(Fails(), ['bug'], typed=True)
  capsys.readouterr()
  with pytest.raises(ValueError, match='1 of 2 questions'):
    ask.ask(Fails(), ['bad', 'who ?'], as_json=True)
  first, second = map(json.loads, capsys.readouterr().out.splitlines())
  assert first == dict(question='bad', error='config.x = 1: bad.')
  assert second['answer'] == 'Bure Fanavi'


def test_ctrl_c_waits_for_a_chunk_and_the_second_for_nothing(capsys):
  reached = []

  def play(question, on_turn):
    for _ in range(2 if question == 'twice' else 1):
      os.kill(os.getpid(), signal.SIGINT)
      reached.append(question)  # as if XLA compiled
    on_turn(types.Turn('<think>half'))
    reached.append('not this')

  before = signal.getsignal(signal.SIGINT)
  ask.ask(play, ['once', 'twice'], typed=True)
  assert reached == ['once', 'twice']
  assert capsys.readouterr().out.count('stopped') == 2
  assert signal.getsignal(signal.SIGINT) is before


def test_the_prompt_ends_with_either_key(monkeypatch, capsys):
  for key in (EOFError, KeyboardInterrupt):
    typed = iter(['who ?', '', key])

    def read(_, typed=typed):
      value = next(typed)
      if isinstance(value, str):
        return value
      raise value

    monkeypatch.setattr('builtins.input', read)
    assert list(ask._typed()) == ['who ?', '']
  assert capsys.readouterr().out == '\n\n'


def test_a_run_of_an_older_version(run, tmp_path):
  shutil.copytree(run, tmp_path / 'old')
  path = tmp_path / 'old' / 'config.json'
  config = json.loads(path.read_text())
  del config['retriever']['placement']
  path.write_text(json.dumps(config))
  done = _command(f'--checkpoint={tmp_path}/old', '--question=who ?')
  assert done.returncode == 1
  assert re.fullmatch(
      'error: .*another version.*placement.*--config=.*\n', done.stderr)


def _command(*arguments, **options):
  return subprocess.run(
      [sys.executable, '-m', 'stepsearch.ask', *arguments], cwd=_ROOT,
      env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu',
           'HOME': os.environ.get('HOME', '/')},
      capture_output=True, text=True, timeout=120, check=False, **options)


def test_the_command(run, folder):
  done = _command(
      f'--checkpoint={run}', '--json', '--config.rollout.max_turns=1',
      input=f'who ?\n\n{"who " * 40}\nwhat \udcff?\n',
      errors='surrogateescape')
  assert done.returncode == 1
  assert done.stderr == 'error: 1 of 3 questions could not be asked.\n'
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row.get('answer') for row in rows] == ['the', None, 'the']
  assert 'prompt_length' in rows[1]['error'] and rows[2]['searches'] == 1
  assert rows[2]['question'] == 'what \ufffd?'
  done = _command(f'--checkpoint={run}', '--question= ')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith('error: --question is empty')
  done = _command(f'--checkpoint={folder}', '--question=who ?')
  assert (done.returncode, done.stdout) == (1, '')
  assert re.fullmatch(
      'error: .* Hugging Face folder.*--config.*\n', done.stderr)
