"""Who writes texts for data: an endpoint, a model of our own, or rules.

    Request(task, fields) ── TASK.txt ──▶ prompt ──▶ Written(text, tokens)

`Endpoint` asks any server of OpenAI's chat completions, `Local` a function from
prompts to texts (`rollout.generate`), `Rules` nobody. Prompts are files: TASK
.txt with {field} where a field of the request belongs, and again.txt for an
answer that could not be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import re
import threading
from typing import Any, Protocol

from stepsearch import client as client_lib
from stepsearch import paths

PROMPTS = paths.Path(__file__).parent / 'prompts'
_FIELD = re.compile(r'\{(\w+)\}')
_AGAIN = 'again'
_PATIENCE = 60.0  # seconds more than a request may take
Failed = client_lib.Failed


@dataclasses.dataclass(frozen=True)
class Request:
  """One text that is wanted."""

  task: str  # name of the prompt
  fields: Mapping[str, str]
  # Answers so far that could not be used, each with what was wrong.
  faults: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Written:
  """What was written, and the tokens that it took."""

  text: str
  prompt_tokens: int = 0
  completion_tokens: int = 0


class Writer(Protocol):
  """Writes texts; the three classes below."""

  name: str  # with what decides on the texts

  def write(self, requests: Sequence[Request]) -> list[Written | Failed]:
    """One text a request, or why there is none.

    Raises:
      client.Refused: nothing can be written at all.
    """


class Prompts:
  """The prompt files of a folder."""

  def __init__(
      self, tasks: Mapping[str, Sequence[str]],
      directory: paths.Address = PROMPTS,
  ):
    """Reads and checks them.

    Args:
      tasks: the fields of each task.
      directory: holds TASK.txt for each, and again.txt.

    Raises:
      ValueError: a file that is missing or empty, or names another field.
    """
    self._texts = {}
    for task, fields in {**tasks, _AGAIN: ('problem',)}.items():
      file = paths.Path(directory) / f'{task}.txt'
      with paths.explained(file):
        if not file.is_file():
          raise ValueError(
              f'{file} is missing: a folder of prompts holds '
              f'{", ".join(f"{name}.txt" for name in (*tasks, _AGAIN))}. Copy '
              'those in stepsearch/data/prompts and change them.')
        text = self._texts[task] = file.read_text().strip()
      unknown = set(_FIELD.findall(text)) - set(fields)
      if unknown or not text:
        raise ValueError(
            f'{file}: ' + (f'the field {{{min(unknown)}}} is none of' if unknown
                           else 'it is empty; write a prompt with')
            + f' {", ".join(f"{{{name}}}" for name in fields)}.')
    self.fingerprint = hashlib.sha256(
        repr(sorted(self._texts.items())).encode()).hexdigest()[:16]

  def messages(self, request: Request) -> list[str]:
    """The prompt; after it each unusable answer, and what is said to it."""
    texts = [self._filled(request.task, request.fields)]
    for answer, problem in request.faults:
      texts += [answer, self._filled(_AGAIN, {'problem': problem})]
    return texts

  def _filled(self, task, fields) -> str:
    # In one pass: what a field holds is not looked at again.
    return _FIELD.sub(lambda match: fields[match[1]], self._texts[task])


class Endpoint:
  """A server of OpenAI's chat completions, and what it costs.

  Attributes:
    tokens: [2], prompt and completion tokens that this process has paid for;
      answers from the cache cost nothing.
    unmetered: answers that did not say how many tokens they took.
  """

  def __init__(
      self, base_url: str, model: str, prompts: Prompts, *,
      key_variable: str = 'OPENAI_API_KEY', temperature: float | None = None,
      max_tokens: int = 1024, **options: Any,
  ):
    """Reads the key; connects to nothing yet.

    Args:
      base_url: what /chat/completions follows: https://api.openai.com/v1.
      model: its name there.
      prompts: what is asked.
      key_variable: the environment variable that holds the key; '': none is
        needed.
      temperature: None: the model's own.
      max_tokens: that an answer may have; 0: as many as the model likes.
      **options: of `client.Client`: cache, per_second, concurrency, timeout,
        retries, wait.

    Raises:
      ValueError: no model or key, or as of `client.Client`.
    """
    if not model:
      raise ValueError(
          '--model is missing: name the model that the endpoint '
          f'{base_url} is to use.')
    key = client_lib.key_of(key_variable, '--key_variable')
    headers = {'Authorization': f'Bearer {key}'} if key else {}
    self._client = client_lib.Client(
        base_url.rstrip('/') + '/chat/completions', headers=headers,
        secret=key, paid=self._pay, **options)
    # Of an endpoint that is down not every request has to find that out.
    self._patience = options.get('timeout', 60.0) + _PATIENCE
    self._prompts = prompts
    self._settings = {'model': model}
    if temperature is not None:
      self._settings['temperature'] = temperature
    if max_tokens:
      self._settings['max_tokens'] = max_tokens
    self.name = f'{self._client.url} {self._settings} {prompts.fingerprint}'
    self.tokens = [0, 0]
    self.unmetered = 0
    self._lock = threading.Lock()

  @property
  def counts(self) -> dict[str, int]:
    """Requests so far, as of `client.Client`."""
    return self._client.counts

  def write(self, requests: Sequence[Request]) -> list[Written | Failed]:
    """As of `Writer`."""
    return self._client.ask_all(
        [self._payload(request) for request in requests], _written,
        patience=self._patience)

  def _payload(self, request) -> dict[str, Any]:
    return self._settings | {'messages': [
        {'role': ('user', 'assistant')[i % 2], 'content': text}
        for i, text in enumerate(self._prompts.messages(request))]}

  def _pay(self, answer) -> None:
    written = _written(answer)
    spent = written.prompt_tokens, written.completion_tokens
    with self._lock:
      self.tokens = [a + b for a, b in zip(self.tokens, spent)]
      self.unmetered += not any(spent)


def _written(answer) -> Written:
  """Reads an answer of the protocol."""
  try:
    choice = answer['choices'][0]
    text = _said(
        choice['message']['content'] or '',
        choice.get('finish_reason') != 'length')
    usage = answer.get('usage') or {}
    spent = [usage.get(f'{kind}_tokens') or 0
             for kind in ('prompt', 'completion')]
    return Written(text, *map(int, spent))
  except (AttributeError, IndexError, KeyError, TypeError) as error:
    raise ValueError(
        f'{error!r} where choices[0].message.content should be') from None


def _said(text: str, ended: bool) -> str:
  """Without thoughts, and the last line where the budget of tokens cut it."""
  _, thought, said = text.rpartition('</think>')
  if '<think>' in text and not thought:
    return ''
  return said if ended else said.rpartition('\n')[0]


class Local:
  """A model of our own, as a function from prompts to texts."""

  def __init__(
      self, name: str,
      generate: Callable[[Sequence[str]], list[tuple[str, bool] | str]],
      prompts: Prompts,
  ):
    """Takes the function, such as a `rollout.generate.Generator`."""
    self._generate = generate
    self._prompts = prompts
    self.name = f'{name} {prompts.fingerprint}'

  def write(self, requests: Sequence[Request]) -> list[Written | Failed]:
    """As of `Writer`; an answer that could not be used is not shown again."""
    prompts = []
    for request in requests:
      first, *rest = self._prompts.messages(request)
      prompts.append('\n\n'.join([first, *rest[-1:]]))
    return [
        Failed(made) if isinstance(made, str) else Written(_said(*made))
        for made in self._generate(prompts)]


# ---- without a model

_BEGINNING = re.compile(
    r'^(?:(?:in|on|at|to|from|for|of|by|with|during) )?'
    r'(?:who|whom|whose|what|which|when|where|why|how(?: (?:many|much|long|'
    r'old|far|often|large|big|tall|high))?)\b\s*(?:(?:is|are|was|were)\b\s*)?',
    re.IGNORECASE)
_FILLERS = frozenset(
    'a an the is are was were be been being do does did has have had of in on '
    'at to from for by with as and or that this these those it its his her '
    'their there he she they him them i you we who whom whose what which when '
    'where why how can could will would during into name named called'.split())
_NAME = re.compile(
    r'"[^"]+"|(?:[A-Z0-9][\w.\'&-]*)(?:(?: (?:of|the|and|de|von|van|for|in|&))*'
    r' [A-Z0-9][\w.\'&-]*)*')


class Rules:
  """Queries from the words of the question; breaks no question up."""

  name = 'template'

  def write(self, requests: Sequence[Request]) -> list[Written | Failed]:
    """As of `Writer`, in the form that the prompts ask for."""
    return [Written('\n'.join(
        f'{i}. {line}' for i, line in enumerate(self._lines(request), 1)))
        for request in requests]

  def _lines(self, request) -> list[str]:
    fields = request.fields
    if request.task == 'queries':
      return queries(fields['question'])[:int(fields['number'])]
    if request.task == 'decompose':
      return [f'{fields["question"]} | {fields["answer"]}']
    # The steps, worded as far as rules can.
    steps = (line.partition('. ')[2].rpartition(' | ')
             for line in fields['steps'].split('\n'))
    return [f'{as_question(step)} | {answer}' for step, _, answer in steps]


def as_question(step: str) -> str:
  """'Hello Love >> performer' as words: 'performer of Hello Love'."""
  subject, arrow, relation = step.partition('>>')
  if not arrow:
    return step.strip()
  return f'{relation.strip()} of {subject.strip()}'


def queries(question: str) -> list[str]:
  """Up to five queries, the most literal first.

  The question; its names and then its other key words; its key words in
  their order; what follows the question word; its names alone.
  """
  asked = ' '.join(as_question(question).split()).rstrip(' ?.')
  rest = _BEGINNING.sub('', asked)
  names = [_bare(name) for name in _NAME.findall(rest)
           if _bare(name).lower() not in _FILLERS]
  words = [_bare(word) for word in rest.split()
           if _bare(word).lower() not in _FILLERS]
  within = {_bare(word) for name in names for word in name.split()}
  others = [word for word in words if word not in within]
  unique: dict[str, str] = {}
  for text in (
      asked, ' '.join([*names, *others]), ' '.join(words), rest,
      ' '.join(names)):
    if text:
      unique.setdefault(text.lower(), text)
  return list(unique.values())


def _bare(word: str) -> str:
  return word.strip('"\'(),;:').removesuffix("'s").removesuffix('’s')
