"""Files → documents, examples and demonstrations.

Everything is JSON lines, UTF-8, one object a line, on disk or gs://. Each
reader checks every row before anything is computed; a bad row is a `ValueError`
that names file, line and field. Ids may be numbers and become text.

    corpus          {id, title, text}  or  {id, contents: '"title"\\ntext'}
    questions       {id, question, answers, gold: [corpus ids],
                     decomposition: [{question, answer, gold}]}
    or, as released with arXiv 2505.15107,
                    {question, final_answer, answer_aliases, sub_searchs,
                     sub_support_docs: [{title, paragraph_text}]}
    demonstrations  {question, text}
"""

from __future__ import annotations

import array
from collections.abc import Iterator, Mapping, Sequence, Sized
import dataclasses
import json
import re
from typing import Any

from stepsearch import passages
from stepsearch import paths
from stepsearch.types import Document
from stepsearch.types import Example

_REFERENCE = re.compile(r'#(\d+)')
_REQUIRED = object()


def read_corpus(path: paths.Address) -> passages.Passages:
  """Checks the passages of a corpus and maps them, in the file's order.

  Raises:
    ValueError: no passages, a malformed row, or an id that occurs twice.
  """
  starts, hashes = array.array('q'), array.array('q')
  for row in _rows(path):
    starts.append(row.start)
    hashes.append(hash(row.id()))
    if 'contents' in row and 'text' not in row:
      row.text('contents')
    else:
      row.text('title', blank=True)
      row.text('text')
  if not starts:
    raise ValueError(f'{path} holds no documents.')
  documents = passages.Passages(
      passages.mapped(paths.local_copy(path)), starts, hashes
  )
  twice = documents.repeated()
  if twice:
    first, again = twice
    raise ValueError(
        f'{path}: the id "{documents[first].id}" is on line {first + 1} and'
        f' again on line {again + 1}; ids must be unique.'
    )
  return documents


def read_questions(
    path: paths.Address,
    corpus: Mapping[str, Document] | None = None,
    *,
    dataset: str = '',
) -> list[Example]:
  """Reads questions in either form that the module describes.

  Each sub-question of a decomposition becomes a search key, with its
  references #k replaced by the answers of the sub-questions before it. The
  number of hops is that of the sub-questions, else of the gold passages.

  Args:
    path: the file.
    corpus: passages by id. None: gold ids are not resolved, and the examples
      have only the gold passages that the file itself spells out.
    dataset: name for `Example.dataset`.

  Raises:
    ValueError: no questions, a malformed row, or a gold id that the corpus
      does not hold.
  """
  examples, released = [], []
  for row in _rows(path):
    if 'final_answer' in row:
      released.append(len(examples))
      examples.append(_released(row, dataset))
    else:
      examples.append(_derived(row, corpus, dataset))
  if not examples:
    raise ValueError(f'{path} holds no questions.')
  if released and corpus is not None:
    known = _known([examples[i] for i in released], corpus)
    for i, example in zip(released, known):
      examples[i] = example
  return examples


def read_demonstrations(
    path: paths.Address,
) -> list[tuple[str, str]]:
  """Reads (question, text) pairs; the text is an episode with its tags.

  Raises:
    ValueError: no demonstrations, or a malformed row.
  """
  pairs = [(row.text('question'), row.text('text')) for row in _rows(path)]
  if not pairs:
    raise ValueError(f'{path} holds no demonstrations.')
  return pairs


def check(
    examples: Sequence[Example], corpus: Sized | None, *, turn_rewards: bool,
    k: int
):
  """Checks that questions, corpus and rewards can work together.

  Args:
    examples: the questions.
    corpus: the passages; only their number matters. None: not known.
    turn_rewards: whether information gain or redundancy is rewarded.
    k: passages retrieved a search.

  Raises:
    ValueError: turn rewards without gold passages, or k larger than the corpus.
  """
  if corpus is not None and not 1 <= k <= len(corpus):
    raise ValueError(
        f'config.rollout.k = {k} documents cannot be retrieved from a corpus'
        f' of {len(corpus)}: k must be between 1 and {len(corpus)}.'
    )
  bare = [example.id for example in examples if not example.gold_documents]
  if turn_rewards and bare:
    first = ', '.join(bare[:5]) + (', …' if len(bare) > 5 else '')
    raise ValueError(
        f'{len(bare)} of {len(examples)} questions have no gold documents'
        f' ({first}), which the turn rewards compare with. Give each question'
        ' its gold documents, or switch the turn rewards off in'
        ' config.reward.*'
    )


def _derived(
    row: _Row, corpus: Mapping[str, Document] | None, dataset: str
) -> Example:
  gold = [row.id('gold', i, g) for i, g in enumerate(row.list('gold', []))]
  earlier: list[str] = []
  keys = []
  for i, part in enumerate(row.list('decomposition', [])):
    field = f'decomposition[{i}]'
    part = _Row(row.path, row.line, part, field)
    keys.append((_fill(part.text('question'), earlier),))
    earlier.append(part.text('answer'))
  documents: tuple[Document, ...] = ()
  if corpus is not None:
    for document_id in gold:
      if document_id not in corpus:
        raise row.error(
            'gold', f'"{document_id}" is not the id of a document of the corpus'
        )
    documents = tuple(corpus[document_id] for document_id in gold)
  return Example(
      id=row.id(),
      question=row.text('question'),
      answers=row.texts('answers'),
      gold_documents=documents,
      search_keys=tuple(keys),
      hops=len(keys) or len(gold),
      dataset=dataset,
  )


def _known(
    examples: Sequence[Example], corpus: Mapping[str, Document]
) -> list[Example]:
  """Puts the corpus' own document wherever one has its title and text.

  In one pass, for a large corpus has no room for a table of all its texts.
  """
  texts = {(d.title, d.text) for e in examples for d in e.gold_documents}
  found = {
      key: d for d in corpus.values() if (key := (d.title, d.text)) in texts}
  return [
      dataclasses.replace(example, gold_documents=tuple(
          found.get((d.title, d.text), d) for d in example.gold_documents))
      for example in examples]


def _released(row: _Row, dataset: str) -> Example:
  example_id = row.id() if 'id' in row else str(row.line)
  aliases = row.texts('answer_aliases', empty=True)
  answers = dict.fromkeys((row.text('final_answer'), *aliases))
  documents = []
  for i, item in enumerate(row.list('sub_support_docs')):
    part = _Row(row.path, row.line, item, f'sub_support_docs[{i}]')
    title, text = part.text('title', blank=True), part.text('paragraph_text')
    documents.append(Document(f'{example_id}/{i}', title, text))
  keys = tuple(
      row.texts(f'sub_searchs[{i}]', value=item)
      for i, item in enumerate(row.list('sub_searchs'))
  )
  return Example(
      id=example_id,
      question=row.text('question'),
      answers=tuple(answers),
      gold_documents=tuple(documents),
      search_keys=keys,
      hops=len(keys) or len(documents),
      dataset=dataset,
  )


def _fill(question: str, answers: Sequence[str]) -> str:
  """Replaces #k by answer k; a # that counts nothing earlier stays."""

  def answer(match: re.Match[str]) -> str:
    k = int(match[1])
    return answers[k - 1] if 1 <= k <= len(answers) else match[0]

  return _REFERENCE.sub(answer, question)


class _Row:
  """One object of a file, with accessors that say where a fault is."""

  def __init__(
      self, path, line: int, values: Any, within: str = '', start: int = 0
  ):
    self.path = path
    self.line = line
    self.start = start  # its first byte in the file
    self._within = within
    if not isinstance(values, dict):
      raise ValueError(
          f'{path}, line {line}{within and ", field " + within}: expected an'
          f' object {{…}}, found {_kind(values)}.'
      )
    self._values = values

  def __contains__(self, field: str) -> bool:
    return field in self._values

  def error(self, field: str, problem: str) -> ValueError:
    """A fault of one field."""
    name = f'{self._within}.{field}' if self._within else field
    where = f'{self.path}, line {self.line}, field {name}'
    return ValueError(f'{where}: {problem}.')

  def id(self, field: str = 'id', i: int | None = None, value=_REQUIRED) -> str:
    """An id, as text."""
    value = self._value(field, value)
    if i is not None:
      field = f'{field}[{i}]'
    if isinstance(value, bool) or not isinstance(value, (str, int)):
      found = _kind(value)
      raise self.error(field, f'expected text or an integer, found {found}')
    if value == '':
      raise self.error(field, 'it is empty')
    return str(value)

  def text(self, field: str, *, blank: bool = False, value=_REQUIRED) -> str:
    """A text; only with `blank` may it have no words."""
    value = self._value(field, value)
    if not isinstance(value, str):
      raise self.error(field, f'expected text, found {_kind(value)}')
    if not blank and not value.strip():
      raise self.error(field, 'it is empty')
    return value

  def list(self, field: str, default=_REQUIRED, *, value=_REQUIRED) -> list:
    """A list of anything; `default` where the field is absent."""
    if default is not _REQUIRED and field not in self._values:
      return default
    value = self._value(field, value)
    if not isinstance(value, list):
      raise self.error(field, f'expected a list, found {_kind(value)}')
    return value

  def texts(
      self, field: str, *, empty: bool = False, value=_REQUIRED
  ) -> tuple[str, ...]:
    """A list of texts without repeats; only with `empty` may it have none."""
    values = self.list(field, value=value)
    if not values and not empty:
      raise self.error(field, 'it is empty; at least one text is needed')
    return tuple(
        dict.fromkeys(
            self.text(f'{field}[{i}]', value=item)
            for i, item in enumerate(values)
        )
    )

  def _value(self, field: str, value):
    if value is not _REQUIRED:
      return value
    if field not in self._values:
      fields = ', '.join(self._values)
      raise self.error(field, f'it is missing; the row has {fields}')
    return self._values[field]


def _rows(path: paths.Address) -> Iterator[_Row]:
  """Yields the rows of a file; empty lines may only stand at its end."""
  empty = start = 0
  local = paths.local_copy(path)
  with paths.explained(path):
    file = open(local, 'rb')
  with file:
    for line, content in enumerate(file, 1):
      if not content.strip():
        empty = empty or line
        continue
      if empty:
        raise ValueError(
            f'{path}, line {empty}: it is empty; every line must hold one JSON'
            ' object.'
        )
      try:
        values = json.loads(content)
      except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f'{path}, line {line}: it is not JSON ({error}); every line must'
            ' hold one JSON object.'
        ) from None
      yield _Row(path, line, values, start=start)
      start += len(content)


def _kind(value: Any) -> str:
  names = {
      dict: 'an object',
      list: 'a list',
      str: 'text',
      bool: 'true or false',
      type(None): 'null',
  }
  return names.get(type(value), 'a number')
