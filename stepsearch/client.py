"""JSON over HTTP, asked of services that are limited, fail and cost money.

    payload ─▶ cache ─▶ the same one in flight ─▶ limiter ─▶ HTTP ─▶ cache
                                                     ╰─ retries ─╯

An answer is on disk before it is used, so that what is killed and started
again asks nothing twice. A key travels in a header only: neither the cache nor
a message holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import hashlib
import json
import os
import queue
import random
import re
import sqlite3
import threading
import time
from typing import Any
import urllib.parse

import urllib3

from stepsearch import paths

_LONGEST = 120.0  # seconds that one retry waits at most
_CONNECT = 10.0  # seconds
_AGAIN = (408, 425, 429)  # and 5xx
# What no other request to the service would fare better with: it has moved;
# wrong key, no credit, no such model or page.
_FATAL = (301, 302, 307, 308, 401, 402, 403, 404, 405)
# Letters of a key; fewer are what is put where no key is asked for, and may be
# a word of an answer.
_KEY = 8


class Failed(ConnectionError):
  """One request has got no usable answer; says why."""


class Refused(ValueError):
  """The service takes no request at all: key, credit or address are wrong."""


class Cache:
  """Answers by request, in an SQLite file on a disk of this machine.

  Any number of threads and processes may share it, and any may be killed.
  """

  def __init__(self, path: paths.Address):
    """Opens the file, or makes it and the folders that it lies in.

    Raises:
      ValueError: it cannot be opened, or is something else.
    """
    self._path = os.fspath(path)
    if paths.is_remote(path):
      raise ValueError(
          f'{self._path}: a cache has to be locked and written in place, which '
          'no store offers: name a file on a disk of this machine.')
    with paths.explained(path):
      os.makedirs(os.path.dirname(self._path) or '.', exist_ok=True)
    self._lock = threading.Lock()
    with self._explained():
      self._file = sqlite3.connect(
          self._path, timeout=60, check_same_thread=False, isolation_level=None)
      # Many readers beside a writer; a killed process loses nothing.
      self._file.execute('PRAGMA journal_mode = WAL')
      self._file.execute('PRAGMA synchronous = NORMAL')
      self._file.execute(
          'CREATE TABLE IF NOT EXISTS answers'
          ' (name TEXT PRIMARY KEY, request TEXT, answer TEXT)')

  def __len__(self) -> int:
    with self._lock, self._explained():
      return self._file.execute('SELECT COUNT(*) FROM answers').fetchone()[0]

  def find(self, request: Any) -> Any | None:
    """The answer to a request, both JSON; None: there is none yet."""
    with self._lock, self._explained():
      row = self._file.execute(
          'SELECT answer FROM answers WHERE name = ?', (name(request),)
      ).fetchone()
    return None if row is None else json.loads(row[0])

  def keep(self, request: Any, answer: Any) -> None:
    """Stores an answer, in place of the one that was there."""
    row = name(request), _text(request), _text(answer)
    with self._lock, self._explained():
      self._file.execute('INSERT OR REPLACE INTO answers VALUES (?, ?, ?)', row)

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as error:
      raise ValueError(
          f'{self._path} cannot be used as a cache of answers ({error}): name '
          'a file of a cache, or one that is not there yet, with space on its '
          'disk.') from error


class Limiter:
  """Spaces requests evenly, whichever thread they come from."""

  def __init__(self, per_second: float = 0.0):
    """Allows so many requests a second; 0: any number."""
    self._gap = 1 / per_second if per_second else 0.0
    self._next = 0.0
    self._lock = threading.Lock()

  def wait(self) -> None:
    """Returns when the next request may be sent."""
    with self._lock:
      now = time.monotonic()
      at = max(self._next, now)
      self._next = at + self._gap
    if at > now:
      time.sleep(at - now)

  def pause(self, seconds: float) -> None:
    """Holds back all requests to come."""
    with self._lock:
      self._next = max(self._next, time.monotonic() + seconds)


class Client:
  """One address of a service that takes and gives JSON.

  Attributes:
    counts: `answered`, requests that got a usable answer from the service;
      `repeated`, those sent again after a fault; `cached`, answers that needed
      no request; `failed`, requests given up.
  """

  def __init__(
      self, url: str, *, method: str = 'POST',
      headers: Mapping[str, str] | None = None, secret: str = '',
      cache: paths.Address = '', per_second: float = 0.0, concurrency: int = 8,
      timeout: float = 60.0, retries: int = 6, wait: float = 1.0,
      most: int = 16 * 2**20,
      paid: Callable[[Any], None] = lambda answer: None,
  ):
    """Connects to nothing yet.

    Args:
      url: http:// or https://; redirects are not followed, lest they take the
        key elsewhere.
      method: POST sends a payload as a JSON body, GET as the query.
      headers: sent with every request, the key's among them.
      secret: the key, which is struck out of all that is kept or said, unless
        it is a mere placeholder of less than 8 letters.
      cache: file of `Cache`; '' keeps nothing.
      per_second: requests a second, over all threads; 0: no limit.
      concurrency: requests in flight at once (`ask_all`).
      timeout: seconds until an answer is there as a whole.
      retries: requests after the first that fails.
      wait: seconds before the first retry; doubled for each one more. A
        Retry-After that asks for longer is heeded, up to two minutes.
      most: bytes that an answer may have.
      paid: called with every usable answer that the service has given.

    Raises:
      ValueError: something that is not a URL, or a file that is no cache.
    """
    if not is_address(url):
      raise ValueError(
          f'{shown(url)}: an address such as https://host/path is expected, '
          'without user, password or query: a key is given by an environment '
          'variable.')
    self.url = url
    self.counts = dict(answered=0, repeated=0, cached=0, failed=0)
    self._method = method
    self._headers = {'Accept': 'application/json', **(headers or {})}
    # Also with the backslashes that JSON may have in it.
    self._secret = re.compile(r'\\?'.join(map(re.escape, secret))) if (
        len(secret) >= _KEY) else None
    self._cache = Cache(cache) if cache else None
    self._limiter = Limiter(per_second)
    self._concurrency = concurrency
    self._timeout, self._retries, self._wait = timeout, retries, wait
    self._most = most
    self._paid = paid
    self._lock = threading.Lock()
    self._flying: dict[str, futures.Future] = {}
    self._pool = urllib3.PoolManager(
        maxsize=concurrency, retries=False,
        timeout=urllib3.Timeout(connect=min(timeout, _CONNECT), read=timeout))

  def ask(
      self, payload: Mapping[str, Any], read: Callable[[Any], Any]
  ) -> Any:
    """Asks one thing, unless it has been asked before or is being asked.

    Args:
      payload: what is sent.
      read: (the answer's JSON) -> what is returned; a `ValueError` means that
        the answer is not as the protocol says, which counts as a fault.

    Raises:
      Failed: no usable answer after all retries, or a request of which the
        service says that it is wrong.
      Refused: the service takes no request of ours.
    """
    request = [self._method, self.url, payload]
    key = name(request)
    with self._lock:
      flying = self._flying.get(key)
      mine = flying is None
      if mine:
        flying = self._flying[key] = futures.Future()
    if not mine:
      answer = flying.result()
      self._count('cached')
      return read(answer)
    try:
      answer = self._known(request, read)
      if answer is None:
        answer = self._fetch(payload, read)
        self._paid(answer)
        if self._cache is not None:
          self._cache.keep(request, answer)
        self._count('answered')
      flying.set_result(answer)
    except BaseException as error:  # raised where it is waited for
      flying.set_exception(error)
      raise
    finally:
      with self._lock:
        del self._flying[key]
    return read(answer)

  def ask_all(
      self, payloads: Sequence[Mapping[str, Any]], read: Callable[[Any], Any],
      patience: float = float('inf'),
  ) -> list[Any]:
    """Asks many things, `concurrency` at once.

    Args:
      payloads: as of `ask`, each.
      read: as of `ask`.
      patience: seconds without any answer after which what is left fails.

    Returns:
      what `read` made of each, or the `Failed` in its place.

    Raises:
      Refused: as of `ask`.
    """
    results: list[Any] = [
        Failed(f'{self.url}: nothing was answered in {patience:g} seconds')
    ] * len(payloads)
    waiting = iter(range(len(payloads)))
    done: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def work():
      while not stopped.is_set():
        with self._lock:
          i = next(waiting, None)
        if i is None:
          return
        try:
          done.put((i, self.ask(payloads[i], read), None))
        except BaseException as error:  # raised where it is waited for
          done.put((i, None, error))

    for _ in range(min(self._concurrency, len(payloads))):
      # Daemons: what waits for a service must not keep the process alive.
      threading.Thread(target=work, daemon=True).start()
    try:
      end = time.monotonic() + patience
      for _ in payloads:
        left = min(max(end - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        i, results[i], error = done.get(timeout=left)
        if error is None:
          end = time.monotonic() + patience
        elif isinstance(error, Failed):
          results[i] = error
        else:
          raise error
    except queue.Empty:
      pass  # the rest has failed
    finally:
      stopped.set()
    return results

  def _known(self, request, read) -> Any | None:
    answer = self._cache.find(request) if self._cache is not None else None
    if answer is None:
      return None
    try:
      read(answer)
    except ValueError:  # an older version may have read it otherwise
      return None
    self._count('cached')
    return answer

  def _fetch(self, payload, read) -> Any:
    for attempt in range(self._retries + 1):
      if attempt:
        self._count('repeated')
      self._limiter.wait()
      answer, problem, pause = self._attempt(payload, read)
      if not problem:
        return answer
      if pause is None:
        break
      if pause:
        self._limiter.pause(pause)
      if attempt < self._retries:
        # At random, so that many that failed together do not return so.
        time.sleep(min(
            self._wait * 2**attempt * random.uniform(0.75, 1.25), _LONGEST))
    self._count('failed')
    raise Failed(f'{self.url}: {problem}, after {attempt + 1} requests')

  def _attempt(self, payload, read) -> tuple[Any, str, float | None]:
    """The answer; or a problem, and how long the service asks to wait.

    None for the latter: another attempt is useless.
    """
    try:
      response, body = self._send(payload)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
      return None, self._struck(reason(error)), 0.0
    text = self._struck(body.decode(errors='replace'))
    status = response.status
    if status in _FATAL:
      raise Refused(
          f'{self.url} answers HTTP {status} ({_detail(text)}): look at the '
          'address, the model, and the key in its environment variable.')
    if status != 200:
      useless = status < 500 and status not in _AGAIN
      return None, f'HTTP {status}, {_detail(text)}', (
          None if useless else _retry_after(response))
    try:
      answer = json.loads(text)
      read(answer)
    except (ValueError, RecursionError) as error:
      return None, f'no answer of the protocol ({error})', 0.0
    return answer, '', 0.0

  def _send(self, payload) -> tuple[urllib3.BaseHTTPResponse, bytes]:
    """One request; its whole answer has to be there in time."""
    end = time.monotonic() + self._timeout
    content = {'fields': payload} if self._method == 'GET' else {
        'json': payload}
    response = self._pool.request(
        self._method, self.url, headers=self._headers,
        preload_content=False, redirect=False, **content)
    try:
      body = b''
      while part := response.read1(2**16):
        body += part
        if len(body) > self._most:
          raise ValueError(f'more than {self._most:,} bytes')
        if time.monotonic() > end:
          raise TimeoutError(f'no whole answer in {self._timeout:g} seconds')
    except BaseException:
      response.close()  # what is left of it must not be read as the next one
      raise
    response.release_conn()
    return response, body

  def _struck(self, text: str) -> str:
    return self._secret.sub('[key]', text) if self._secret else text

  def _count(self, what: str) -> None:
    with self._lock:
      self.counts[what] += 1


def is_address(url: str) -> bool:
  """Whether it is http[s]://host[:port][/path], without a user or a query."""
  try:
    parts = urllib.parse.urlsplit(url)
    return bool(
        parts.scheme in ('http', 'https') and parts.hostname
        and parts.port != 0 and '@' not in parts.netloc and not parts.query)
  except ValueError:  # no such port or host
    return False


def shown(url: str) -> str:
  """An address for a message, without what may be a password or a key."""
  if '@' in url or '?' in url:
    url = f'{"".join(re.findall("^https?://", url))}…'
  return repr(url)


def key_of(variable: str, flag: str) -> str:
  """The key that an environment variable holds; '' where none is named.

  Args:
    variable: its name; '': the service takes no key.
    flag: that named it, for the message.

  Raises:
    ValueError: it is not set, or holds something that no header can.
  """
  if not variable:
    return ''
  key = os.environ.get(variable, '').strip()
  if not key:
    raise ValueError(
        f'{flag} names the environment variable {variable}, which is not set: '
        f'put the key of the service there (export {variable}=…).')
  if not re.fullmatch(r'[!-~]+', key):
    raise ValueError(
        f'The environment variable {variable} ({flag}) holds spaces or letters '
        'that no key has: set it again.')
  return key


def name(request: Any) -> str:
  """What a request is kept under."""
  return hashlib.sha256(_text(request).encode()).hexdigest()


def _text(value) -> str:
  return json.dumps(value, sort_keys=True)


def _retry_after(response) -> float:
  """Seconds that the service asks to wait, 0 where it says nothing."""
  try:
    seconds = urllib3.Retry().get_retry_after(response)
  except (ValueError, urllib3.exceptions.HTTPError):  # neither number nor date
    seconds = None
  return min(seconds or 0.0, _LONGEST)


def _detail(text: str) -> str:
  """The beginning of what an error says, on one line."""
  text = ' '.join(text.split())
  return repr(text[:160] + '…' * (len(text) > 160))


def reason(error: Exception) -> str:
  """urllib3 puts the connection before what went wrong with it."""
  text = re.sub(r'^HTTPS?Connection(Pool)?\(.*?\): ', '', str(error))
  return text or repr(error)
