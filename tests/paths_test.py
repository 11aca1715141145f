"""paths: whole or not at all, on disk and in a store; what errors say."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from stepsearch import paths


@pytest.fixture(params=['disk', 'store'])
def place(request, tmp_path):
  """Where things are written."""
  if request.param == 'disk':
    return paths.Path(tmp_path)
  return paths.Path(request.getfixturevalue('bucket'))


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(place):
  file = place / 'new' / 'file.txt'
  paths.write(file, 'ä')
  assert file.read_bytes() == 'ä'.encode()
  with pytest.raises(KeyError), paths.replacing(file) as draft:
    draft.write(b'half')
    draft.flush()
    raise KeyError
  assert file.read_text() == 'ä'
  paths.write(file, b'')
  assert file.read_bytes() == b'' and _names(place / 'new') == ['file.txt']


def _fill(folder, text, last='index.json'):
  (folder / 'part').mkdir()
  (folder / 'part' / 'data').write_text(text)
  (folder / last).write_text(text)


def test_a_folder_appears_whole_or_not_at_all(place):
  made = place / 'runs' / 'index'
  new = lambda **options: paths.new_folder(made, 'index.json', **options)
  with pytest.raises(KeyboardInterrupt), new() as draft:
    _fill(draft, 'never')
    raise KeyboardInterrupt
  assert not made.exists()
  with new() as draft:
    _fill(draft, 'first')
  assert (made / 'part' / 'data').read_text() == 'first'
  assert paths.occupied(made, 'index.json')
  with new() as draft:  # of two at once the quicker one is kept
    _fill(draft, 'second')
  assert (made / 'index.json').read_text() == 'first'
  with new(replace=True) as draft:
    (draft / 'index.json').write_text('third')
  assert (made / 'index.json').read_text() == 'third'
  assert _names(place / 'runs') == ['index']


def test_what_a_kill_leaves_in_a_store_is_overwritten(bucket):
  made = paths.Path(bucket) / 'index'

  class Killed(BaseException):
    pass

  store = paths._store(made)
  with pytest.MonkeyPatch.context() as patch:
    real, put = store.put_file, []

    def dies(local, remote):
      if put:
        raise Killed
      put.append(remote)
      real(local, remote)

    patch.setattr(store, 'put_file', dies)
    patch.setattr(type(made), 'rmtree', lambda *_, **__: None)  # nor tidies up
    with pytest.raises(Killed), paths.new_folder(made, 'index.json') as draft:
      _fill(draft, 'first')
  assert put and not put[0].endswith('index.json')
  assert (made / 'part' / 'data').exists()
  assert not paths.occupied(made, 'index.json')
  with paths.new_folder(made, 'index.json') as draft:
    _fill(draft, 'second')
  assert (made / 'part' / 'data').read_text() == 'second'
  assert _names(made) == ['index.json', 'part']
  # Somebody else's files are not taken for that.
  paths.write(paths.Path(bucket) / 'photos' / 'cat.jpg', b'')
  assert paths.occupied(paths.Path(bucket) / 'photos', 'index.json')


def test_copies_on_this_disk_follow_what_they_were_made_of(
    bucket, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  folder = paths.Path(bucket) / 'index'
  with paths.new_folder(folder, 'index.json') as draft:
    _fill(draft, 'first')
  paths.write(paths.Path(bucket) / 'index-2' / 'other', '')
  first = paths.local_copy(folder)
  assert sorted(p.name for p in first.rglob('*')) == [
      'data', 'index.json', 'part']
  assert paths.local_copy(folder) == first
  paths.write(folder / 'part' / 'data', 'longer')
  second = paths.local_copy(folder)
  assert (second / 'part' / 'data').read_text() == 'longer'
  assert not first.exists()
  file = paths.local_copy(folder / 'index.json')
  assert file.name == 'index.json' and file.read_text() == 'first'
  assert paths.local_copy(str(file)) == file
  with pytest.raises(ValueError, match='index/none cannot be reached'):
    paths.local_copy(folder / 'none')


def test_a_mirror_follows(place):
  mirror = paths.Mirror(place / 'events')
  mirror.local.mkdir(exist_ok=True)
  with (mirror.local / 'file').open('w') as file:
    for text in ('one', 'two'):
      file.write(text)
      file.flush()
      mirror.copy()
  assert (place / 'events' / 'file').read_text() == 'onetwo'
  mirror.close()
  assert mirror.local.exists() == (not paths.is_remote(place))


def _answer(status, message):
  """What gcsfs raises for an answer of the store."""
  from gcsfs import retry

  def fail():
    retry.validate_response(
        status, f'{{"error": {{"message": "{message}"}}}}', 'b/x/o/y')

  return fail


def _unreachable():
  import aiohttp
  raise aiohttp.ClientConnectionError('no route to host')


def _no_credentials():
  from google.auth import exceptions
  raise exceptions.DefaultCredentialsError('none were found')


def _tensorstore():
  raise ValueError(
      "PERMISSION_DENIED: Error writing \"x\": Forbidden "
      "[http_response_code='403'] [tensorstore_spec='{...}']")


@pytest.mark.parametrize('fail, words', [
    (_answer(404, 'no'), ('no bucket gs://b-1,', 'create the bucket')),
    (_answer(401, 'Anonymous caller'), ('without credentials (Anonymous caller',
                                        'gcloud auth application-default')),
    (_no_credentials, ('without credentials (none were found)', 'log in')),
    (_answer(403, 'no storage.objects.create'), (
        'storage.objects.create', 'roles/storage.objectAdmin on gs://b-1')),
    (_tensorstore, ('is not open to this account (PERMISSION_DENIED',)),
    (_unreachable, ('cannot be reached (no route to host)', 'network')),
])
def test_what_a_store_refuses_is_one_paragraph(fail, words):
  with pytest.raises(ValueError) as error, paths.explained('gs://b-1/runs/x'):
    fail()
  message = str(error.value)
  assert message.startswith('gs://b-1/runs/x ') and '\n' not in message
  for word in words:
    assert word in message, message


def test_a_bucket_that_is_not_there_is_named(bucket):
  with pytest.raises(ValueError, match='there is no bucket gs://no-such,'):
    paths.write('gs://no-such/runs/x', '')


def test_what_a_disk_refuses_is_one_paragraph(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'file/x cannot be .*\(File exists'):
    paths.write(tmp_path / 'file' / 'x', '')
  with pytest.raises(ValueError, match='x cannot be written .*No space left'):
    with paths.explained(tmp_path / 'x'):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  # Failures of others are not ours to explain.
  with pytest.raises(FileNotFoundError), paths.explained(tmp_path / 'x'):
    open('/no/such/file').close()
  with pytest.raises(ValueError, match='^bad$'), paths.explained('gs://b-1/x'):
    raise ValueError('bad')


_COMPILE = """
import sys
import jax
from stepsearch import paths
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.config.update('jax_compilation_cache_dir', sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
for _ in range(2):
  jax.jit(lambda x: x + 1)(1.0)
  jax.clear_caches()
print(events.count('/jax/compilation_cache/cache_hits'))
"""


def test_compiled_programs_are_kept_in_a_store(bucket):
  done = subprocess.run(
      [sys.executable, '-c', _COMPILE, f'{bucket}/compiled'],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      timeout=120, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, '1\n', '')
