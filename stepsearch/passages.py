"""Passages on disk: a file of JSON lines, mapped, each parsed when it is read.

    {id, title, text}  or  {id, contents: '"title"⏎text'} as Search-R1 has them

A process keeps 24 bytes a passage, where documents as objects take 270 more
than their text; the texts are in the system's cache of files, once for all
processes of a machine. The file must not change meanwhile.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import json
import mmap
import os
from typing import Any

import numpy as np

from stepsearch.types import Document


class Passages(Sequence[Document]):
  """The documents of a file; slices are views of the same file."""

  def __init__(
      self, mapped: mmap.mmap, starts: Sequence[int],
      hashes: Sequence[int] = (),
  ):
    """Takes rows that have been checked.

    Args:
      mapped: the file.
      starts: the byte at which each row begins.
      hashes: hash(id) of each row; needed for `by_id` and `repeated`.
    """
    self._map = mapped
    self._starts = np.asarray(starts, np.int64)
    self._hashes = np.asarray(hashes, np.int64)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, row):
    if isinstance(row, slice):
      return Passages(self._map, self._starts[row], self._hashes[row])
    start = int(self._starts[row])
    end = self._map.find(b'\n', start)
    return document(json.loads(self._map[start : end if end >= 0 else None]))

  @functools.cached_property
  def by_id(self) -> _ById:
    """The documents by their id."""
    return _ById(self)

  def repeated(self) -> tuple[int, int] | None:
    """The first row whose id an earlier one has, after that one; or None."""
    order = self.by_id.order
    hashes = self._hashes[order]
    alike = np.flatnonzero(hashes[1:] == hashes[:-1])
    seen: dict[str, int] = {}
    for row in np.unique(order[np.concatenate([alike, alike + 1])]).tolist():
      first = seen.setdefault(self[row].id, row)
      if first != row:
        return first, row
    return None


class _ById(Mapping[str, Document]):
  """Finds ids by bisection in their sorted hashes."""

  def __init__(self, passages: Passages):
    self._passages = passages
    self.order = np.argsort(passages._hashes, kind='stable')

  def __len__(self) -> int:
    return len(self._passages)

  def __iter__(self) -> Iterator[str]:
    return (document.id for document in self._passages)

  def values(self) -> Passages:
    """All documents, each parsed once."""
    return self._passages

  def __getitem__(self, document_id: str) -> Document:
    hashes, wanted = self._passages._hashes, hash(document_id)
    i = np.searchsorted(hashes, wanted, sorter=self.order)
    while i < len(self.order) and hashes[self.order[i]] == wanted:
      found = self._passages[self.order[i]]
      if found.id == document_id:
        return found
      i += 1  # two ids share a hash
    raise KeyError(document_id)


def write(path: str | os.PathLike[str], documents: Iterable[Document]) -> None:
  """Writes documents as rows of {id, title, text}."""
  with open(path, 'w', encoding='utf-8') as file:
    file.writelines(map(line, documents))


def line(document: Document) -> str:
  """A document as its row."""
  row = {'id': document.id, 'title': document.title, 'text': document.text}
  return json.dumps(row, ensure_ascii=False) + '\n'


def read(path: str | os.PathLike[str]) -> Passages:
  """Maps what `write` wrote; `data.datasets.read_corpus` reads other files."""
  starts = array.array('q')
  start = 0
  with open(path, 'rb') as file:
    for line in file:
      starts.append(start)
      start += len(line)
  return Passages(mapped(path), starts)


def mapped(path: str | os.PathLike[str]) -> mmap.mmap:
  """The bytes of a file that is not empty."""
  with open(path, 'rb') as file:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def document(row: Mapping[str, Any]) -> Document:
  """The document of a row that has been checked."""
  if 'contents' in row and 'text' not in row:
    return from_contents(str(row['id']), row['contents'])
  return Document(str(row['id']), row['title'], row['text'])


def contents(document: Document) -> str:
  """Title and text in one field."""
  return f'"{document.title}"\n{document.text}'


def from_contents(document_id: str, field: str) -> Document:
  """The document of one field; what has no second line has no title."""
  title, separator, text = field.partition('\n')
  if not separator:
    title, text = '', field
  title = title.strip()
  if len(title) > 1 and title[0] == title[-1] == '"':
    title = title[1:-1]  # only these: '""Heroes" (album)"' is "Heroes" (album)
  return Document(document_id, title, text)
