"""gs:// without Google: gcp-storage-emulator, a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.util
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.request

REASON = 'gcp-storage-emulator (tests/requirements.txt) is not installed'
_NUMBERS = itertools.count()


def installed() -> bool:
  """Whether it can be started."""
  return importlib.util.find_spec('gcp_storage_emulator') is not None


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
  """Starts it on a free loopback port; its objects live in memory.

  Yields:
    the variables that a client needs before it imports anything.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  process = subprocess.Popen(
      [sys.executable, __file__, str(port)], stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  try:
    for _ in range(300):
      try:
        urllib.request.urlopen(url, timeout=5).close()
        break
      except OSError:
        time.sleep(0.1)
    yield {
        'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'anon', 'FSSPEC_GS_TOKEN': 'anon',
        'EPATH_USE_TF': 'false', 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}
  finally:
    process.kill()
    process.wait()


def new_bucket(environment: dict[str, str]) -> str:
  """Makes a bucket; the emulator lists and deletes across a whole one.

  Returns:
    its gs:// address.
  """
  name = f'bucket-{next(_NUMBERS)}'
  request = urllib.request.Request(
      environment['STORAGE_EMULATOR_HOST'] + '/storage/v1/b',
      json.dumps({'name': name}).encode(),
      {'Content-Type': 'application/json'})
  urllib.request.urlopen(request, timeout=30).close()
  return f'gs://{name}'


def _serve(port: int) -> None:
  from gcp_storage_emulator.handlers import objects

  download = objects.download

  def with_generation(request, response, storage, *args, **kwargs):
    # The real store says it, and TensorStore fails now and then without it.
    download(request, response, storage, *args, **kwargs)
    if response.status < 300:
      response['x-goog-generation'] = storage.get_file_obj(
          request.params['bucket_name'], request.params['object_id']
      )['generation']

  objects.download = with_generation
  from gcp_storage_emulator import server

  server.create_server('127.0.0.1', port, in_memory=True).run()


if __name__ == '__main__':
  _serve(int(sys.argv[1]))
