"""Asks a trained searcher, and shows how it comes to its answer.

    python -m stepsearch.ask --checkpoint=WORKDIR [--question=TEXT] [--json]

    question ─▶ a Collector's batch of one ─▶ turns while they grow ─▶ terminal
                                           ╰▶ transcript ─▶ one JSON object

The checkpoint is the workdir of a run, whose config and index are then used,
or a Hugging Face folder, which needs --config and --index or --corpus. Without
--question it asks for one after the other: Ctrl-C ends an answer, Ctrl-D (or
Ctrl-C once more) the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any, TextIO
import unicodedata

import jax
import ml_collections
import numpy as np

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import engine as engine_lib
from stepsearch import methods
from stepsearch import paths
from stepsearch import protocol
from stepsearch import types
from stepsearch.data import datasets
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever

_CHUNK = 4  # tokens between two looks: a tenth of a second on a laptop
_INDENT = 8
_LABELS = {'': 'writes', 'information': 'invents'}  # outside of what is asked
_COLOURS = {'think': '2', 'search': '36', 'answer': '1;32'}
_WARNING = '33'


class Searcher:
  """A checkpoint and its search engine; plays one question at a time.

  Only the first question compiles: those that follow have its shapes.
  """

  def __init__(
      self, config: ml_collections.ConfigDict, checkpoint: str, *,
      index: str | None = None, corpus: str | None = None,
      k: int | None = None, temperature: float = 0.0, step: int | None = None,
      method: str = methods.AGENT,
      say: Callable[[str], None] = print,
  ):
    """Loads both.

    Args:
      config: of the run, or what suits a Hugging Face folder.
      checkpoint: as of `assembly.Checkpoint`.
      index: folder of an index, with its passages, for the engine of
        `config.retriever`; None: the run's own, if there is one. It is built
        from the corpus where there is none.
      corpus: JSONL of passages; None: those of the index or of the config.
      k: passages a search; None: config.rollout.k.
      temperature: of sampling; 0: the most likely tokens.
      step: of the checkpoint; the newest by default.
      method: of `stepsearch.methods`: how it is told to search and answer.
      say: prints a line of progress.

    Raises:
      ValueError: one paragraph naming flag or field, value and remedy.
    """
    if temperature < 0:
      raise ValueError(
          f'--temperature={temperature}: 0 takes the most likely tokens, and '
          'more than 0 samples.')
    source = assembly.Checkpoint(checkpoint, step)
    config = config.copy_and_resolve_references()
    # Nobody else decodes meanwhile, so nothing is gained by waiting.
    config.rollout.update(dict(chunk=_CHUNK, lag=0, slots=0))
    config.rollout.k = config.rollout.k if k is None else k
    self._greedy = temperature == 0
    if not self._greedy:
      config.rollout.temperature = float(temperature)
    # Of an index that is kept nowhere; goes with this object.
    self._scratch = tempfile.TemporaryDirectory(prefix='stepsearch-')
    _search_here(config, source, index, corpus, self._scratch.name)
    player = source.player(config, say=say)
    passages = ()
    if config.data.corpus:
      passages = datasets.read_corpus(
          config.data.corpus, config.data.directory)
      datasets.check([], passages, turn_rewards=False, k=config.rollout.k)
    self._search = engine_lib.build(config, passages, self._scratch.name, say)
    self._protocol = player.protocol
    if method != methods.AGENT:
      config_lib.require(
          config.rollout.protocol == 'full', 'rollout.protocol',
          config.rollout.protocol, f'--method={method} is for models of real '
          'language, which take the full texts.')
      self._protocol = methods.make(method).protocol
    self._collect = player.collector(self._protocol, self._search.search)
    self._ends = [
        player.tokenizer.byte_strings[i].decode()
        for i in player.tokenizer.eos_ids]
    self._key = jax.random.key(config.seed)
    self._params, step = source.actor(player, self._key)
    self._asked = 0
    say(str(source.root) if step is None else f'step {step} of {source.root}')

  def __call__(
      self, question: str,
      on_turn: Callable[[types.Turn], None] = lambda turn: None,
  ) -> dict[str, Any]:
    """Plays a question.

    Args:
      question: any text.
      on_turn: as of `collect.Collector`.

    Returns:
      question, answer (None without one), turns of thought, query (None where
      nothing was searched), documents and the policy's own text; searches,
      tokens that the policy wrote, seconds.

    Raises:
      ValueError: its prompt is too long, or the engine does not answer.
    """
    start = time.perf_counter()
    example = types.Example(id='', question=question, answers=())
    trajectory, [transcript] = self._collect(
        self._params, [example], self._key, first_episode=self._asked,
        greedy=self._greedy,
        on_turn=lambda _, turn: on_turn(self._words(turn)))
    self._asked += 1
    turns = [self._words(turn) for turn in transcript.turns]
    return {
        'question': question,
        'answer': self._protocol.prediction(turns[-1].text),
        'turns': [_turn(turn) for turn in turns],
        'searches': transcript.searches,
        'tokens': int(np.sum(trajectory.loss_mask)),
        'seconds': round(time.perf_counter() - start, 3),
    }

  def _words(self, turn: types.Turn) -> types.Turn:
    """The turn without the token that ends a sequence."""
    text = turn.text
    for end in self._ends:
      text = text.removesuffix(end)
    return dataclasses.replace(turn, text=text)


def _search_here(config, source, index, corpus, scratch):
  """Points the config to the passages and the index that are meant."""
  data, c = config.data, config.retriever
  elsewhere = c.url or c.web or c.factory
  if elsewhere and not (index or corpus):
    data.corpus = ''
    return
  c.update(dict(
      url='', web='', web_url='', web_key='', factory='', cache='',
      per_second=0.0))
  if corpus:
    # An index of other passages may lie beside the run.
    c.directory, data.corpus = index or scratch, corpus
    return
  c.directory = index or c.directory or (
      str(source.root / 'index') if source.trained else scratch)
  if indexing.exists(c.directory):
    data.corpus = str(paths.Path(c.directory) / retriever.CORPUS)
  elif index:
    raise ValueError(
        f'--index={index}: there is no index here; name the folder that a run '
        'or stepsearch.build_index has written, or give --corpus too, and it '
        'is built there.')
  elif not data.corpus:
    raise ValueError(
        f'--checkpoint={source.root}: there is nothing to search in; give '
        '--index=DIR, the folder of an index, or --corpus=FILE, JSONL of '
        '{id, title, text}.')


def _turn(turn):
  thought = ' '.join(
      words.strip() for kind, words in protocol.spans(turn.text)
      if kind == 'think')
  return {
      'thought': thought,
      'query': turn.query,
      'documents': [
          {'id': d.id, 'title': d.title, 'text': d.text, 'score': d.score}
          for d in turn.documents],
      'text': turn.text,
  }


class Screen:
  """Writes an episode while it is played: a label, then words as they come.

  On a terminal in colour and cut to its width; elsewhere plain, without a
  control character, each stretch on one line.
  """

  def __init__(self, out: TextIO):
    self._out = out
    self._terminal = out.isatty()
    self._coloured = self._terminal and 'NO_COLOR' not in os.environ
    self._column = 0
    self._notice = False  # whether the line gives way to the next
    self._told: dict[int, int] = {}  # words by span of the newest turn

  def question(self, text: str) -> None:
    """The question, where nobody has typed it."""
    self._line('asked', text, '1')

  def notice(self, text: str) -> None:
    """Something that gives way to what comes next, on a terminal."""
    self._line('', text, _COLOURS['think'])
    self._notice = self._terminal
    self._out.flush()

  def turn(self, turn: types.Turn) -> None:
    """What is new of the newest turn; as `on_turn` of `Searcher`."""
    ended = turn.query is not None or bool(turn.observation)
    self._spans(turn.text, growing=not ended)
    if turn.observation or turn.documents:
      self._observed(turn)
      self._told.clear()
    self._out.flush()

  def end(self, found: dict[str, Any]) -> None:
    """The rest of the last turn, and a line of figures."""
    text = found['turns'][-1]['text']
    self._spans(text, growing=False)
    if found['answer'] is None:
      self._line('answer', 'none', _WARNING)
    elif not any(kind == 'answer' for kind, _ in protocol.spans(text)):
      self._line('answer', found['answer'], _COLOURS['answer'])
    searches = found['searches']
    self._line(
        '', f'{searches} search{"es" if searches != 1 else ""}, '
        f'{found["tokens"]} tokens, {found["seconds"]:.1f} s',
        _COLOURS['think'])
    self.stop()

  def stop(self, why: str = '') -> None:
    """Ends the line, wherever the episode is."""
    if why:
      self._line('', why, _WARNING)
    self._out.write('\n' if self._column else '')
    self._out.flush()
    self._column = 0
    self._told.clear()

  def _spans(self, text, growing):
    spans = [
        (kind, words) for kind, words in protocol.spans(text, growing=growing)
        if words.strip()]
    for i, (kind, text) in enumerate(spans):
      words, told = text.split(), self._told.get(i, 0)
      if growing and i == len(spans) - 1 and not text[-1].isspace():
        words.pop()  # more of it may come
      for number in range(told, len(words)):
        if not number:
          self._label(_LABELS.get(kind, kind))
        self._write(words[number], _COLOURS.get(kind, _WARNING))
      self._told[i] = max(told, len(words))

  def _observed(self, turn):
    if turn.query is None:
      self._line('', 'neither a search nor an answer', _WARNING)
    elif not turn.query:
      self._line('search', 'for nothing', _WARNING)
    elif not turn.documents:
      self._line('', 'nothing found', _WARNING)
    for i, document in enumerate(turn.documents, start=1):
      text = ' '.join((document.title.strip() or document.text).split())
      room = self._width() - _INDENT - 4
      if _columns(text) > room:
        while _columns(text) >= room:
          text = text[:-1]
        text += '…'
      self._line('', f'{i}  {text}', '')

  def _line(self, label, text, colour):
    self._label(label)
    for word in text.split(' '):
      self._write(word, colour)

  def _label(self, label):
    if self._notice:
      self._out.write('\r' + ' ' * self._column + '\r')
    elif self._column:
      self._out.write('\n')
    self._notice = False
    self._out.write(label.ljust(_INDENT - 1))
    self._column = _INDENT - 1

  def _write(self, text, colour):
    text = ''.join(filter(str.isprintable, text))  # no passage's escape codes
    if self._terminal and self._column >= _INDENT and (
        self._column + 1 + _columns(text) > self._width()):
      self._label('')
    if self._coloured and colour and text:
      self._out.write(f' \x1b[{colour}m{text}\x1b[0m')
    else:
      self._out.write(f' {text}')
    self._column += 1 + _columns(text)

  def _width(self):
    return shutil.get_terminal_size().columns if self._terminal else 100


def _columns(text: str) -> int:
  """Columns of a terminal: two of a wide character, none of a mark."""
  return sum(
      0 if unicodedata.combining(c) else
      1 + (unicodedata.east_asian_width(c) in 'WF') for c in text)


def ask(
    searcher: Searcher, questions: Iterator[str], *, as_json: bool = False,
    one: bool = False, typed: bool = False,
) -> None:
  """Answers questions on stdout.

  Args:
    searcher: what answers.
    questions: texts.
    as_json: one JSON object a question, and nothing else.
    one: there is but one; its failure is the caller's.
    typed: they come from a prompt, at which Ctrl-C leads back.

  Raises:
    ValueError: a question had no answer for a reason that is not ours; in the
      end, where there are several.
  """
  out = sys.stdout
  screen = Screen(out)
  failed = count = 0
  for count, question in enumerate(questions, start=1):
    if not as_json and not typed:
      screen.question(question)
    if not as_json and count == 1:
      screen.notice('compiling…')
    try:
      # An engine says there what it has to say.
      with contextlib.redirect_stdout(
          sys.stderr if as_json else out), _held() as check:

        def show(turn):
          check()
          if not as_json:
            screen.turn(turn)

        found = searcher(question, show)
        check()
    except KeyboardInterrupt:
      if not typed:
        raise
      screen.stop('stopped')
      continue
    except ValueError as error:
      if one or not config_lib.is_users(error):
        raise
      failed += 1
      found = dict(question=question, error=' '.join(str(error).split()))
    if as_json:
      print(json.dumps(found, ensure_ascii=False), file=out, flush=True)
    elif 'error' in found:
      screen.stop(found['error'])
    else:
      screen.end(found)
  if failed and not typed:
    raise ValueError(f'{failed} of {count} questions could not be asked.')


@contextlib.contextmanager
def _held() -> Iterator[Callable[[], None]]:
  """Holds Ctrl-C back until the check that this gives, but not a second one.

  Raised while XLA compiles, it can crash the program when that ends (seen in 4
  of 11 tries).
  """
  came = False

  def hold(*_):
    nonlocal came
    if came:
      raise KeyboardInterrupt
    came = True

  def check():
    if came:
      raise KeyboardInterrupt

  before = signal.signal(signal.SIGINT, hold)
  try:
    yield check
  finally:
    signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
  """Questions from a prompt, until Ctrl-D or Ctrl-C."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (arrows and history)
  while True:
    try:
      yield input('\nask:    ')
    except (EOFError, KeyboardInterrupt):
      print()
      return


if __name__ == '__main__':
  from absl import flags

  _CHECKPOINT = flags.DEFINE_string(
      'checkpoint', None,
      'Workdir of a training run, or a Hugging Face folder.', required=True)
  _STEP = flags.DEFINE_integer(
      'step', None, 'Step of the checkpoint; the newest by default.')
  _QUESTION = flags.DEFINE_string(
      'question', None, 'What to ask; else it is asked for.')
  _JSON = flags.DEFINE_bool('json', False, 'One JSON object a question.')
  _INDEX = flags.DEFINE_string(
      'index', None, "Folder of an index, with its passages; the run's own by "
      'default.')
  _CORPUS = flags.DEFINE_string(
      'corpus', None, 'JSONL of passages to search in instead.')
  _K = flags.DEFINE_integer('k', None, 'Passages a search.', lower_bound=1)
  _METHOD = flags.DEFINE_enum(
      'method', methods.AGENT, list(methods.METHODS),
      'How the model is told to search and answer, as of evaluate; other '
      "systems' checkpoints have methods of their own.")
  _TEMPERATURE = flags.DEFINE_float(
      'temperature', 0.0, 'Of sampling; 0: the most likely tokens.')

  def _main(config):
    assembly.tune_host()
    as_json, one = _JSON.value, _QUESTION.value is not None
    if one and not _QUESTION.value.strip():
      raise ValueError('--question is empty: write one, or leave it out.')
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
      searcher = Searcher(
          config, _CHECKPOINT.value, index=_INDEX.value, corpus=_CORPUS.value,
          k=_K.value, temperature=_TEMPERATURE.value, step=_STEP.value,
          method=_METHOD.value,
          say=(lambda line: None) if as_json else print)
    typed = not one and sys.stdin.isatty()
    if not one:
      sys.stdin.reconfigure(errors='surrogateescape')  # in every locale
    questions = (
        [_QUESTION.value] if one else _typed() if typed else sys.stdin)
    # Bytes that are no UTF-8 come as surrogates, which are no text.
    questions = (
        q.encode(errors='surrogateescape').decode(errors='replace').strip()
        for q in questions)
    ask(searcher, filter(None, questions), as_json=as_json,
        one=one, typed=typed)

  config_lib.main(
      _main, otherwise=lambda overrides: assembly.Checkpoint(
          _CHECKPOINT.value).config(overrides))
