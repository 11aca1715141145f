"""One path layer: files on disk and at gs:// addresses, written alike.

    write, replacing ─▶ a file, whole or not at all
    new_folder       ─▶ a folder, likewise
    local_copy       ─▶ a folder's files on this disk, for what reads no gs://
    Mirror           ─▶ a local folder whose files follow to an address
    explained        ─▶ what a disk or a store refuses, as one paragraph

On disk a draft is renamed. In a store an object appears once it is whole, and
nothing can be renamed: a folder there counts once its last file is there.
Everything else, such as `exists` and `read_text`, is `Path`'s own.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from typing import Any, BinaryIO

# epath would read gs:// through TensorFlow where that is installed: another
# path than the tested one, and one that knows no emulator.
os.environ.setdefault('EPATH_USE_TF', 'false')

from etils import epath  # noqa: E402
from etils.epath import backend  # noqa: E402

Path = epath.Path
Address = str | os.PathLike[str]

_UNFINISHED = '.unfinished'  # in a store: a folder that is being written


def is_remote(path: Address) -> bool:
  """Whether it is the address of a store, such as gs://bucket/folder."""
  return '://' in os.fspath(path)


def write(path: Address, data: str | bytes) -> None:
  """Writes a file, and the folders that it lies in; whole or not at all.

  Raises:
    ValueError: as of `explained`.
  """
  with replacing(path) as file:
    file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Address) -> Iterator[BinaryIO]:
  """A file that becomes `path` when all went well; a store gets it then.

  Raises:
    ValueError: as of `explained`.
  """
  path = Path(path)
  with explained(path):
    if is_remote(path):
      with tempfile.TemporaryDirectory() as folder:
        draft = os.path.join(folder, 'draft')
        with open(draft, 'wb') as file:
          yield file
        _store(path).put_file(draft, str(path))
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    try:
      with open(draft, 'wb') as file:
        yield file
      os.replace(draft, path)
    finally:
      draft.unlink(missing_ok=True)


def occupied(path: Address, last: str) -> bool:
  """Whether something lies there besides what a killed `new_folder` left.

  Args:
    path: a folder, or its future place.
    last: as of `new_folder`.
  """
  path = Path(path)
  with explained(path):
    if not path.is_dir():
      return path.exists()
    names = {file.name for file in path.iterdir()}
    return bool(names) and (last in names or _UNFINISHED not in names)


@contextlib.contextmanager
def new_folder(
    path: Address, last: str, *, replace: bool = False
) -> Iterator[pathlib.Path]:
  """An empty local folder that becomes `path` when all went well.

  Where another process has put a whole folder there in the meantime, its work
  is kept and this one's dropped, so that several may start at once. In a store
  the files are put one after the other; what a kill leaves of them is
  overwritten by the next `new_folder`.

  Args:
    path: absent, empty, or with `replace` a folder that gives way.
    last: the file without which the folder counts for nothing; put last.
    replace: in a store, a failure loses both the old folder and the new.

  Raises:
    ValueError: as of `explained`.
  """
  path = Path(path)
  remote = is_remote(path)
  draft = None
  try:
    with explained(path):
      if not remote:
        path.parent.mkdir(parents=True, exist_ok=True)
      draft = pathlib.Path(tempfile.mkdtemp(
          prefix=f'.{path.name}-', dir=None if remote else path.parent))
      draft.chmod(0o755)  # mkdtemp's 0700 would shut other users out
      yield draft
      (_upload if remote else _rename)(draft, path, last, replace)
  finally:
    if draft is not None:
      shutil.rmtree(draft, ignore_errors=True)


def cache() -> pathlib.Path:
  """The folder of what can be made again: ~/.cache/stepsearch by default."""
  folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(folder) / 'stepsearch'


def local_copy(path: Address) -> pathlib.Path:
  """A file or folder on this disk: itself, or the copy that is kept of it.

  Copies lie in ~/.cache/stepsearch (or below $XDG_CACHE_HOME), one for each
  address, made anew once a file there has another size or date.

  Raises:
    ValueError: as of `explained`; nothing lies there.
  """
  path = Path(path)
  if not is_remote(path):
    return pathlib.Path(path)
  with explained(path):
    found = _store(path).find(str(path), detail=True)
    bare = os.fspath(path).partition('://')[2].rstrip('/')
    if not found:
      raise FileNotFoundError(bare)
  files = {
      name: (info['size'], str(info.get('updated')))
      for name, info in sorted(found.items())
      # Objects that stand for folders end in a slash.
      if not name.endswith((_UNFINISHED, '/'))
      and (name == bare or name.startswith(f'{bare}/'))}
  digest = lambda value: hashlib.blake2b(
      repr(value).encode(), digest_size=8).hexdigest()
  kept = cache() / digest(bare)
  copy = kept / digest(files) / path.name
  if not copy.exists():
    with new_folder(copy.parent, path.name) as draft, explained(path):
      for name in files:
        target = draft / (path.name + name.removeprefix(bare))
        target.parent.mkdir(parents=True, exist_ok=True)
        _store(path).get_file(name, str(target))
    for other in kept.iterdir():
      if other != copy.parent and not other.name.startswith('.'):
        shutil.rmtree(other, ignore_errors=True)
  return copy


def files(folder: Address) -> list[str]:
  """All files below a folder, sorted.

  Raises:
    ValueError: as of `explained`; there is no such folder.
  """
  path = Path(folder)
  with explained(path):
    if is_remote(path):
      scheme = os.fspath(path).partition('://')[0]
      found = [f'{scheme}://{name}' for name in _store(path).find(str(path))]
    else:
      found = [
          str(file) for file in pathlib.Path(path).rglob('*')
          if file.is_file()]
    if not found and not path.is_dir():
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
  return sorted(found)


class Mirror:
  """A local folder, for what cannot write to a store; `copy` follows it there.

  Attributes:
    local: where to write; the folder itself where that is on disk.
  """

  def __init__(self, folder: Address):
    self._folder = Path(folder)
    self._copied: dict[pathlib.Path, tuple[int, int]] = {}
    self.local = pathlib.Path(folder)
    if is_remote(folder):
      self.local = pathlib.Path(tempfile.mkdtemp(prefix='stepsearch-'))

  def copy(self) -> None:
    """Copies the files that have changed since the last time.

    Raises:
      ValueError: as of `explained`.
    """
    if not is_remote(self._folder):
      return
    with explained(self._folder):
      for file in sorted(self.local.rglob('*')):
        now = file.stat().st_size, file.stat().st_mtime_ns
        if file.is_file() and self._copied.get(file) != now:
          _store(self._folder).put_file(
              str(file), str(self._folder / file.relative_to(self.local)))
          self._copied[file] = now

  def close(self) -> None:
    """Copies, and removes the local files where they were copied."""
    try:
      self.copy()
    finally:
      if is_remote(self._folder):
        shutil.rmtree(self.local, ignore_errors=True)


@contextlib.contextmanager
def explained(path: Address) -> Iterator[None]:
  """Turns a failure of a disk or a store into a ValueError about `path`.

  A failure that names a file elsewhere passes through as it is, and so does
  any other exception.

  Raises:
    ValueError: one paragraph: the path, what is wrong, what to do.
  """
  try:
    yield
  except Exception as error:
    why = _problem(Path(path), error)
    if why is None:
      raise
    raise ValueError(f'{path} {why}') from error


def _problem(path, error) -> str | None:
  """What an exception says of a path; None if nothing."""
  text = ' '.join(str(error).split())
  # TensorStore has no classes of errors, but these in its messages.
  codes = dict(re.findall(r"(os_error_code|http_response_code)='(\d+)'", text))
  code = getattr(error, 'errno', None) or int(codes.get('os_error_code', 0))
  named = getattr(error, 'filename', None)
  if named:
    named, folder = os.path.abspath(named), os.path.abspath(path.parent)
    if is_remote(path) or (
        os.path.commonpath([named, folder]) not in (named, folder)):
      return None
  if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return (f'cannot be written ({os.strerror(code)}): free space and run the '
            'same command again, or choose another place.')
  if not is_remote(path):
    return code and (
        f'cannot be read or written ({os.strerror(code)}): check the path and '
        'its permissions, or choose another.') or None
  errors = _store_errors()
  if not (isinstance(error, errors) or 'tensorstore_spec=' in text):
    return None
  status = int(
      codes.get('http_response_code') or getattr(error, 'code', None)
      or getattr(error, 'status', None) or 0)
  text = text.partition(" [")[0] or type(error).__name__
  bucket = '/'.join(os.fspath(path).split('/')[:3])
  if isinstance(error, FileNotFoundError) or status == 404:
    return (f'cannot be reached: there is no bucket {bucket}, or nothing of '
            'this name in it. Correct the address, or create the bucket.')
  if isinstance(error, errors[-1]) or status == 401:
    return (f'cannot be reached without credentials ({text}): log in with '
            '`gcloud auth application-default login`, or give this machine a '
            'service account that may use the bucket.')
  if status == 403 or text.startswith('Forbidden'):
    return (f'is not open to this account ({text}): grant it '
            f'roles/storage.objectAdmin on {bucket}, or choose another bucket.')
  return (f'cannot be reached ({text}): check the network, and run the same '
          'command again.')


def _store(path: Address) -> Any:
  """The fsspec file system that `Path` itself uses for an address."""
  return backend.fsspec_backend.fs(path)


def _store_errors() -> tuple[type[Exception], ...]:
  """What gcsfs raises, that for missing credentials last."""
  import aiohttp
  from gcsfs import retry
  from google.auth import exceptions

  return (OSError, retry.HttpError, retry.ChecksumError, aiohttp.ClientError,
          exceptions.GoogleAuthError)


def _rename(draft, path, last, replace):
  """Makes the draft `path`, on disk."""
  if replace and path.exists():
    retired = draft.with_name(draft.name + '-old')
    os.rename(path, retired)
    os.rename(draft, path)
    shutil.rmtree(retired)
    return
  try:
    os.rename(draft, path)
  except OSError as error:
    lost_race = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    if not (lost_race and (path / last).exists()):
      raise


def _upload(draft, path, last, replace):
  """Copies the draft to `path`, in a store."""
  if (path / last).exists():
    if not replace:
      return
    (path / last).unlink()
  store = _store(path)
  mark = path / _UNFINISHED
  try:
    store.pipe_file(str(mark), b'')
    for file in sorted(
        draft.rglob('*'), key=lambda file: (file.name == last, file)):
      if file.is_file():
        store.put_file(str(file), str(path / file.relative_to(draft)))
    mark.unlink()
  except BaseException:  # Ctrl-C too
    # The mark stays where even this fails, so that nothing is mistaken.
    with contextlib.suppress(Exception):
      path.rmtree(missing_ok=True)
    raise
