"""Files of rows: JSON lines, JSON lists, tables and parquet, plain or packed.

    .jsonl .json .csv .tsv .parquet, plain, .gz, in a .zip ─▶ Row, Fault

What is wrong with a file is raised at once: line and field of every bad row, up
to a number of them. Of a large file little is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import csv
import gzip
import io
import json
import os
import re
from typing import Any, BinaryIO
import zipfile
import zlib

from stepsearch import paths

SUFFIXES = ('.jsonl', '.json', '.parquet', '.csv', '.tsv')

_SHOWN = 20  # faults of a file
_TICK = 512  # rows between two looks at the progress
_CHUNK = 1 << 20  # characters read at a time from a list of objects
_SPACE = re.compile(r'\s*')
_REQUIRED = object()


class Fault(ValueError):
  """What is wrong with one row: where in its file, and what."""

  def __init__(self, path: str, where: str, problem: str):
    super().__init__(f'{path}, {where}: {problem}.')
    self.short = f'{where}: {problem}'


class Faults:
  """The faults of a file; counts them all and remembers the first ones."""

  def __init__(self, path: paths.Address):
    self._path = path
    self._first: list[Fault] = []
    self._count = 0

  def add(self, fault: Fault) -> None:
    """Counts a row that cannot be used."""
    self._count += 1
    if len(self._first) < _SHOWN:
      self._first.append(fault)

  def check(self) -> None:
    """Raises what was added.

    Raises:
      ValueError: names each row and field, up to a number of them.
    """
    if self._count == 1:
      raise ValueError(str(self._first[0]))
    if self._count:
      shown = '; '.join(fault.short for fault in self._first)
      more = self._count - len(self._first)
      more = f'; and {more:,} more' if more else ''
      raise ValueError(
          f'{self._path}: {self._count:,} rows are malformed: {shown}{more}.')


class Row:
  """One object of a file, with accessors that say where a fault is."""

  def __init__(
      self, path: paths.Address, where: str, values: Any, within: str = '',
      start: int = 0, number: int = 0,
  ):
    self.path = path
    self.where = where  # 'line 3', 'row 3'
    self.start = start  # its first byte in the file
    self.number = number  # counted from 1
    self._within = within
    if not isinstance(values, dict):
      raise Fault(
          path, where + (within and f', field {within}'),
          f'expected an object {{…}}, found {_kind(values)}')
    self.values = values

  def __contains__(self, field: str) -> bool:
    return self.values.get(field) is not None

  def error(self, field: str, problem: str) -> Fault:
    """A fault of one field."""
    name = f'{self._within}.{field}' if self._within else field
    return Fault(self.path, f'{self.where}, field {name}', problem)

  def part(self, field: str, values: Any) -> Row:
    """A row for an object inside this one."""
    within = f'{self._within}.{field}' if self._within else field
    return Row(self.path, self.where, values, within, self.start, self.number)

  def holding(self, values: Any) -> Row:
    """A row at the same place with other fields."""
    return Row(
        self.path, self.where, values, self._within, self.start, self.number)

  def id(self, field: str = 'id', value: Any = _REQUIRED) -> str:
    """An id, as text."""
    value = self._value(field, value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
      found = _kind(value)
      raise self.error(field, f'expected text or an integer, found {found}')
    if value == '':
      raise self.error(field, 'it is empty')
    return str(value)

  def text(
      self, field: str, *, blank: bool = False, value: Any = _REQUIRED
  ) -> str:
    """A text; only with `blank` may it have no words."""
    value = self._value(field, value)
    if not isinstance(value, str):
      raise self.error(field, f'expected text, found {_kind(value)}')
    if not blank and not value.strip():
      raise self.error(field, 'it is empty')
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise self.error(
          field, 'it holds half of a character, '
          f'{value[error.start]!r}, which no file can hold') from None
    return value

  def list(
      self, field: str, default: Any = _REQUIRED, *, value: Any = _REQUIRED
  ) -> list:
    """A list of anything; `default` where the field is absent or null."""
    if default is not _REQUIRED and field not in self:
      return default
    value = self._value(field, value)
    if not isinstance(value, list):
      raise self.error(field, f'expected a list, found {_kind(value)}')
    return value

  def texts(
      self, field: str, *, empty: bool = False, value: Any = _REQUIRED
  ) -> tuple[str, ...]:
    """A list of texts without repeats; only with `empty` may it have none."""
    values = self.list(field, value=value)
    if not values and not empty:
      raise self.error(field, 'it is empty; at least one text is needed')
    return tuple(dict.fromkeys(
        self.text(f'{field}[{i}]', value=item)
        for i, item in enumerate(values)))

  def _value(self, field: str, value: Any):
    if value is not _REQUIRED:
      return value
    if field not in self.values:
      fields = ', '.join(map(str, self.values))
      raise self.error(field, f'it is missing; the row has {fields}')
    return self.values[field]


def read(
    path: paths.Address, faults: Faults,
    tick: Callable[[int], None] | None = None,
) -> Iterator[Row]:
  """Yields the objects of a file; what is not one becomes a fault.

  Args:
    path: on disk or gs://; `ARCHIVE.zip/MEMBER` where an archive has several
      files of data.
    faults: where rows go that cannot be parsed.
    tick: is told now and then how many hundredths of the file are read.

  Raises:
    ValueError: there is no such file, or it cannot be unpacked.
  """
  with opened(path) as (file, name, packed):
    found = _unpacked(path, file, name, faults)
    if tick is None:
      yield from found
      return
    size = max(os.fstat(packed.fileno()).st_size, 1)
    for number, row in enumerate(found):
      if number % _TICK == 0:
        tick(min(99, 100 * packed.tell() // size))
      yield row
    tick(100)


@contextlib.contextmanager
def opened(
    path: paths.Address
) -> Iterator[tuple[BinaryIO, str, BinaryIO]]:
  """A file's bytes, unpacked; its name without .gz or .zip; the file itself.

  Raises:
    ValueError: there is no such file, or an archive holds several.
  """
  archive, inside = _split(path)
  local = paths.local_copy(archive)
  with paths.explained(path), contextlib.ExitStack() as stack:
    file = packed = stack.enter_context(open(local, 'rb'))
    name = os.fspath(path)
    if archive.endswith('.zip'):
      try:
        unpacked = stack.enter_context(zipfile.ZipFile(file))
      except zipfile.BadZipFile as error:
        raise ValueError(f'{archive} is no archive ({error}).') from error
      name = inside or _only(archive, unpacked)
      if name not in unpacked.namelist():
        raise ValueError(
            f'{archive} holds no {name}; it holds '
            f'{", ".join(members(unpacked)) or "no data"}.')
      file = stack.enter_context(unpacked.open(name))
    if name.endswith('.gz'):
      file, name = gzip.open(file), name.removesuffix('.gz')
    yield file, name, packed


def is_list(file: BinaryIO) -> bool:
  """Whether a file, of which nothing is read yet, holds one JSON list."""
  return file.peek(_CHUNK).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'[')


def members(archive: zipfile.ZipFile) -> list[str]:
  """The files of data in an archive, sorted."""
  return sorted(
      name for name in archive.namelist()
      if name.removesuffix('.gz').endswith(SUFFIXES)
      and not os.path.basename(name).startswith('.')
      and not name.startswith('__MACOSX'))


def _unpacked(path, file, name, faults):
  try:
    if name.endswith('.parquet'):
      yield from _parquet(path, file)
    elif name.endswith(('.csv', '.tsv')):
      yield from _table(
          path, file, faults, '\t' if name.endswith('tsv') else ',')
    else:
      read = _array if is_list(file) else _lines
      yield from read(path, file, faults)
  except (gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile) as e:
    raise ValueError(
        f'{path} cannot be unpacked ({e}): it is damaged or incomplete; '
        'fetch it again.') from e
  except UnicodeDecodeError as error:
    raise ValueError(
        f'{path} is not text in UTF-8 ({error}): fetch it again, or convert '
        'it.') from error


def _lines(path, file, faults) -> Iterator[Row]:
  """JSON lines; empty ones may only stand at the end."""
  empty = start = 0
  for line, content in enumerate(file, 1):
    if not content.strip():
      empty = empty or line
      continue
    if empty:
      faults.add(Fault(
          path, f'line {empty}',
          'it is empty; every line must hold one JSON object'))
      empty = 0
    try:
      yield Row(
          path, f'line {line}', json.loads(content), start=start, number=line)
    except Fault as fault:
      faults.add(fault)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      if line == 1 and content.strip() == b'{':
        faults.add(Fault(
            path, 'line 1', 'an object over many lines is no row; one object a '
            'line is expected, or one list of all'))
        return
      faults.add(Fault(
          path, f'line {line}',
          f'it is not JSON ({error}); every line must hold one JSON object'))
    start += len(content)


def _array(path, file, faults) -> Iterator[Row]:
  """The objects of one JSON list, of which a little is in memory at a time."""
  stream = io.TextIOWrapper(file, 'utf-8-sig')
  decode = json.JSONDecoder().raw_decode
  text, at, line, ended = stream.read(_CHUNK), 0, 1, False
  number = 0
  wanted = '['  # [, value or separator

  while True:
    beginning = _SPACE.match(text, at).end()
    line += text.count('\n', at, beginning)
    at = beginning
    value, after = None, -1
    if at < len(text) and wanted != 'value':
      if text[at] == ']' and wanted == 'separator':
        break
      if text[at] != {'[': '[', 'separator': ','}[wanted]:
        faults.add(Fault(
            path, f'line {line}',
            f'expected a comma or the end of the list, found {text[at]!r}'))
        return
      at, wanted = at + 1, 'value'
      continue
    if at < len(text):
      if text[at] == ']':
        break
      try:
        value, after = decode(text, at)
      except json.JSONDecodeError as error:
        if ended:
          line += text.count('\n', at, error.pos)
          faults.add(Fault(
              path, f'line {line}', f'it is not JSON ({error.msg})'))
          return
    if after < 0:
      if ended:
        faults.add(Fault(
            path, f'line {line}', 'the list has no end; the file is cut off'))
        return
      chunk = stream.read(max(_CHUNK, len(text) - at))
      text, at, ended = text[at:] + chunk, 0, not chunk
      continue
    number += 1
    try:
      yield Row(path, f'row {number} (line {line})', value, number=number)
    except Fault as fault:
      faults.add(fault)
    line += text.count('\n', at, after)
    at, wanted = after, 'separator'

  rest = text[at + 1:]
  while rest:
    if rest.strip():
      line += rest[:_SPACE.match(rest).end()].count('\n')
      faults.add(Fault(
          path, f'line {line}',
          f'the list has ended, found {rest.strip()[0]!r}: several lists in a '
          'file cannot be read; join them'))
      return
    line += rest.count('\n')
    rest = stream.read(_CHUNK)


def _parquet(path, file) -> Iterator[Row]:
  import pyarrow
  from pyarrow import parquet

  if not file.seekable():
    file = io.BytesIO(file.read())
  try:
    table = parquet.ParquetFile(file)
    number = 0
    for batch in table.iter_batches(1024):
      for values in batch.to_pylist():
        number += 1
        yield Row(path, f'row {number}', values, number=number)
  except pyarrow.ArrowInvalid as error:
    raise ValueError(
        f'{path} cannot be read as parquet ({error}): fetch it again.'
    ) from error


def _table(path, file, faults, separator) -> Iterator[Row]:
  stream = io.TextIOWrapper(file, 'utf-8-sig', newline='')
  csv.field_size_limit(1 << 30)
  # Not strict, a quote without its partner would swallow rows.
  reader = csv.DictReader(stream, delimiter=separator, strict=True)
  try:
    for number, values in enumerate(reader, 1):
      where = f'line {reader.line_num}'
      if values.pop(None, None):
        faults.add(Fault(
            path, where, 'it has more fields than the header; one with a '
            f'{separator!r} in it must be in quotes'))
        continue
      yield Row(path, where, values, number=number)
  except csv.Error as error:
    faults.add(Fault(
        path, f'line {reader.line_num + 1}',
        f'it is no row of a table ({error}); a field that begins with a quote '
        'must end with one, and quotes inside it are doubled'))


def _split(path: paths.Address) -> tuple[str, str]:
  """`ARCHIVE.zip/MEMBER` apart; the member is '' where there is none."""
  path = os.fspath(path)
  archive, found, inside = path.partition('.zip/')
  return (f'{archive}.zip', inside) if found else (path, '')


def _only(archive: str, unpacked: zipfile.ZipFile) -> str:
  names = members(unpacked)
  if len(names) != 1:
    raise ValueError(
        f'{archive} holds {len(names)} files of data '
        f'({", ".join(names) or "none"}): name one, as '
        f'{archive}/{names[0] if names else "FILE.jsonl"}.')
  return names[0]


def _kind(value: Any) -> str:
  names = {
      dict: 'an object',
      list: 'a list',
      str: 'text',
      bool: 'true or false',
      type(None): 'null',
  }
  return names.get(type(value), 'a number')
