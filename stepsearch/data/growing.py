"""A file of rows that grows: what has been killed goes on where it was.

    NAME.jsonl          rows, in any order while it grows
    NAME.report.json    the settings that it is made with; at the end a report
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import fcntl
import json
import os
from typing import Any, BinaryIO

from stepsearch import paths


class File:
  """Rows with an id, appended; one process at a time.

  Attributes:
    rows: by id, the lines that are there.
  """

  def __init__(self, path: paths.Address, settings: Mapping[str, Any]):
    """Opens the file, or begins it.

    Args:
      path: JSON lines, on a disk.
      settings: all that decides on the rows, JSON.

    Raises:
      ValueError: it has rows that were made with other settings, is another
        kind of file, or is being written by another process.
    """
    self._path = os.fspath(path)
    self._card = f'{self._path.removesuffix(".jsonl")}.report.json'
    self._settings = json.loads(json.dumps(settings))
    if paths.is_remote(path):
      raise ValueError(
          f'--output={path}: rows are appended as they come, which no store '
          'offers: name a file on a disk, and copy it when it is whole.')
    self.rows: dict[str, bytes] = {}
    with paths.explained(path):
      os.makedirs(os.path.dirname(self._path) or '.', exist_ok=True)
      self._file = self._locked()
      # Without rows there is nothing that other settings would spoil.
      if os.path.getsize(self._path):
        self._check()
      else:
        paths.write(self._card, self._text(None))
      self._read()

  def append(self, rows) -> None:
    """Adds rows at the end; a kill leaves whole ones and perhaps a torn one."""
    lines = [
        (row['id'], json.dumps(row, ensure_ascii=False).encode() + b'\n')
        for row in rows]
    self.rows |= lines
    with paths.explained(self._path):
      self._file.write(b''.join(line for _, line in lines))
      self._file.flush()

  def finish(self, order: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Puts the rows in the order of their questions and gives them."""
    lines = [self.rows[i] for i in order if i in self.rows]
    paths.write(self._path, b''.join(lines))
    self._file.close()
    return map(json.loads, lines)

  def close(self, report: Mapping[str, Any]) -> None:
    """Puts a report, JSON, beside the file."""
    paths.write(self._card, self._text(report))

  def _locked(self) -> BinaryIO:
    while True:
      file = open(self._path, 'ab+')
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(
            f'--output={self._path}: another process is writing it: wait for '
            'it, or name another file.') from None
      # One that has just finished puts another file in the place of this one.
      if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
        return file
      file.close()

  def _check(self) -> None:
    try:
      with open(self._card, encoding='utf-8') as file:
        begun = json.load(file)['settings']
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      raise ValueError(
          f'--output={self._path}: there is a file of another kind, or '
          f'{self._card} beside it is lost: name a new one.') from None
    for name in [*begun, *self._settings]:
      before, now = begun.get(name), self._settings.get(name)
      if before != now:
        raise ValueError(
            f'--output={self._path} was begun with {name} = {before!r}, and '
            f'this is {now!r}: pass the old value to go on, or name another '
            'file.')

  def _read(self) -> None:
    whole = 0
    self._file.seek(0)
    for number, line in enumerate(self._file, 1):
      if not line.endswith(b'\n'):
        break  # torn by a kill
      try:
        self.rows[json.loads(line)['id']] = line
      except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{self._path}, line {number} has no row with an id: name '
            'another file.') from None
      whole += len(line)
    self._file.truncate(whole)

  def _text(self, report) -> str:
    return json.dumps(
        {'settings': self._settings, 'report': report}, indent=2,
        ensure_ascii=False) + '\n'
