"""Retrieval over HTTP, both sides; the protocol is that of Search-R1's server.

    POST /retrieve   {queries: [text], topk: 3, return_scores: true}
      ─▶ {result: [[{document: {id, title, text, contents}, score}]]}
    GET /health      ─▶ {size, corpus, embedder, max_topk, max_queries}

`topk` may be left out (3). Without `return_scores` the lists hold the documents
themselves; this is what Search-R1 means, its own server then fails. What is
wrong with a request is said by a 4xx with {detail: reason}, as there.

    requests ─▶ queue ─ gathered for 2 ms ─▶ one search a k ─▶ answers

`Remote` is the other side: any such server as a `retriever.Engine`, one that
returns nothing but `contents` too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import json
import queue
import signal
import threading
import time
from typing import Any
import urllib.parse

from aiohttp import web
import urllib3

from stepsearch import client
from stepsearch import passages
from stepsearch import paths
from stepsearch.retrieval import retriever
from stepsearch.types import Document

MAX_QUERIES = 1024  # a request
MAX_TOPK = 100
MAX_DOCUMENTS = 32_768  # queries x topk of a request
MAX_BYTES = 4 * 2**20  # of a request
_TOPK = 3  # Search-R1's default
_GATHER = 0.002  # seconds that a search waits for others to join it
_BATCH = 1024  # queries after which no further request joins
_WAITING = 64  # requests in the queue beyond which they are refused
_READ = 30.0  # seconds for a request to arrive
_FINISH = 10.0  # seconds that requests in flight have once the server stops
_ASKED = 256  # queries a request of `Remote`


# ---- the server


async def _serve(engine, host, port, say):
  stop = asyncio.Event()
  loop = asyncio.get_running_loop()
  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, stop.set)
  async with running(engine, host, port, say) as url:
    about = describe(engine)
    size = about['size']
    say(f'{url}/retrieve answers from '
        + ('an engine of its own' if size is None else f'{size:,} passages')
        + f', up to {about["max_topk"]} a query; {url}/health says what they'
        ' are. Ctrl-C stops it.')
    await stop.wait()
    say('stopping')


def serve(
    engine: retriever.Engine, host: str = '127.0.0.1', port: int = 8000,
    say: Callable[[str], None] = print,
) -> None:
  """Answers requests until SIGTERM or Ctrl-C; those in flight are finished.

  Args:
    engine: called by one thread.
    host: an address of this machine; others than loopback are open to whoever
      reaches them, for the protocol knows no password.
    port: 0 = any that is free.
    say: prints a line.

  Raises:
    ValueError: the address cannot be listened on.
  """
  asyncio.run(_serve(engine, host, port, say))


@contextlib.asynccontextmanager
async def running(
    engine: retriever.Engine, host: str = '127.0.0.1', port: int = 0,
    say: Callable[[str], None] = print,
) -> AsyncIterator[str]:
  """A server for as long as the context lasts; gives its URL."""
  runner = web.AppRunner(
      _application(engine, say), access_log=None, shutdown_timeout=_FINISH)
  await runner.setup()
  try:
    try:
      await web.TCPSite(runner, host, port).start()
    except OSError as error:
      raise ValueError(
          f'{host}:{port} cannot be listened on ({error.strerror}): choose'
          ' another --port, or an address of this machine as --host.'
      ) from error
    port = runner.addresses[0][1]
    yield f'http://{f"[{host}]" if ":" in host else host}:{port}'
  finally:
    await runner.cleanup()


def describe(engine: retriever.Engine) -> dict[str, Any]:
  """What `/health` says; null is what the engine does not know of itself."""
  size = retriever.size(engine)
  fingerprints = getattr(engine, 'fingerprints', {})
  return {
      'size': size,
      'corpus': fingerprints.get('corpus'),
      'embedder': fingerprints.get('embedder'),
      'max_topk': MAX_TOPK if size is None else min(MAX_TOPK, size),
      'max_queries': MAX_QUERIES,
  }


def _application(engine, say) -> web.Application:
  about = describe(engine)
  joined = _Joined(engine)

  async def health(request):
    del request
    return web.json_response(about)

  async def retrieve(request):
    try:
      async with asyncio.timeout(_READ):
        body = await request.read()
    except TimeoutError:
      raise web.HTTPRequestTimeout(
          text=f'the body did not arrive in {_READ:g} seconds') from None
    queries, topk, scores = _parse(body, about['max_topk'])
    try:
      found = await asyncio.wrap_future(joined.search(queries, topk))
    except queue.Full:
      raise web.HTTPServiceUnavailable(
          text=f'{_WAITING} requests are waiting already: try again later',
          headers={'Retry-After': '1'}) from None
    except Exception as error:  # whatever a user's engine may raise
      say(f'a search of {len(queries)} queries failed: {error!r}')
      raise web.HTTPInternalServerError(
          text=f'the search failed: {error!r}') from error
    rows = [[_row(document) for document in row] for row in found]
    if scores:
      rows = [
          [{'document': item, 'score': document.score}
           for item, document in zip(items, row)]
          for items, row in zip(rows, found)]
    return web.json_response({'result': rows})

  app = web.Application(
      client_max_size=MAX_BYTES, middlewares=[_errors_as_json])
  app.router.add_get('/health', health)
  app.router.add_post('/retrieve', retrieve)
  return app


@web.middleware
async def _errors_as_json(request, handler):
  try:
    return await handler(request)
  except web.HTTPException as error:
    headers = {
        name: value for name, value in error.headers.items()
        if name in ('Allow', 'Retry-After')}
    return web.json_response(
        {'detail': error.text}, status=error.status, headers=headers)


def _parse(body: bytes, max_topk: int) -> tuple[list[str], int, bool]:
  """Queries, topk and return_scores of a request, or a 4xx with the reason."""

  def refuse(reason):
    raise web.HTTPBadRequest(text=reason)

  try:
    values = json.loads(body)
  except (ValueError, RecursionError) as error:
    refuse(f'the body is not JSON: {error}')
  if not isinstance(values, dict):
    refuse('the body has to be an object {queries: [text], topk: number}')
  queries = values.get('queries')
  if not isinstance(queries, list) or not all(
      isinstance(query, str) for query in queries):
    refuse('queries has to be a list of texts')
  if len(queries) > MAX_QUERIES:
    refuse(f'{len(queries)} queries in one request: at most {MAX_QUERIES}')
  try:
    ''.join(queries).encode()
  except UnicodeEncodeError as error:
    refuse(f'queries hold what is no text: {error}')
  topk = values.get('topk')
  topk = _TOPK if topk is None else topk
  if isinstance(topk, bool) or not isinstance(topk, int) or not (
      1 <= topk <= max_topk):
    refuse(f'topk = {topk!r}: a number from 1 to {max_topk} is expected')
  if len(queries) * topk > MAX_DOCUMENTS:
    refuse(f'{len(queries)} queries x topk = {topk}: at most {MAX_DOCUMENTS}'
           ' documents in one answer')
  scores = values.get('return_scores', False)
  if not isinstance(scores, bool):
    refuse(f'return_scores = {scores!r}: true or false is expected')
  return queries, topk, scores


def _row(document: Document) -> dict[str, str]:
  return {
      'id': document.id, 'title': document.title, 'text': document.text,
      'contents': passages.contents(document)}


class _Joined:
  """Searches of concurrent requests, joined to one call of the engine."""

  def __init__(self, engine):
    self._engine = engine
    self._waiting = queue.Queue(_WAITING)
    # A daemon: an engine that hangs must not keep the process alive.
    threading.Thread(target=self._work, daemon=True).start()

  def search(self, queries, k) -> futures.Future:
    """Queues a search; raises queue.Full where too many wait already."""
    result = futures.Future()
    self._waiting.put_nowait((queries, k, result))
    return result

  def _work(self):
    while True:
      batch = [self._waiting.get()]
      end = time.monotonic() + _GATHER
      while sum(len(queries) for queries, _, _ in batch) < _BATCH:
        try:
          batch.append(
              self._waiting.get(timeout=max(0.0, end - time.monotonic())))
        except queue.Empty:
          break
      # Not the largest k for all: an index that is approximate would answer
      # the others differently.
      for k in {k for _, k, _ in batch}:
        self._search([job for job in batch if job[1] == k], k)

  def _search(self, jobs, k):
    queries = [query for job in jobs for query in job[0]]
    try:
      found = list(self._engine.search(queries, k)) if queries else []
      if len(found) != len(queries):
        raise ValueError(f'{len(found)} lists for {len(queries)} queries')
    except BaseException as error:  # raised where it is waited for
      for _, _, result in jobs:
        if result.set_running_or_notify_cancel():  # the client may have gone
          result.set_exception(error)
      return
    for asked, _, result in jobs:
      mine, found = found[:len(asked)], found[len(asked):]
      if result.set_running_or_notify_cancel():
        result.set_result(mine)


# ---- the client


def from_url(
    urls: str, k: int, *, timeout: float = 15.0,
    known: Iterable[Document] = (), first: int = 0,
    say: Callable[[str], None] = print, cache: paths.Address = '',
    per_second: float = 0.0, **patience: Any,
) -> retriever.Patient:
  """Makes an engine of servers that speak the protocol, and tries them.

  Args:
    urls: as of `Remote`.
    k: documents a query that will be asked for.
    timeout: seconds that a server may take.
    known: as of `Remote`.
    first: as of `Remote`.
    say: prints a line about each server.
    cache: as of `Remote`.
    per_second: as of `Remote`.
    **patience: of `retriever.Patient`.

  Raises:
    ValueError: no server can be reached, or one answers something else.
  """
  remote = Remote(
      urls, timeout=timeout, known=known, first=first, cache=cache,
      per_second=per_second)
  remote.check(k, say)
  turn = 1 / per_second if per_second else 0.0
  return retriever.Patient(
      remote, name=f'the server of config.retriever.url = {urls!r}',
      # One call may ask every server, each in its turn.
      timeout=(timeout + 1 + turn) * len(remote.urls), **patience)


class Remote:
  """The corpus behind a server, or behind several that serve the same.

  Each call asks one server, and where that fails the next one. The one that
  answered last is asked first, so that one that is down costs once.
  Connections are kept.
  """

  def __init__(
      self, urls: str, *, timeout: float = 15.0,
      known: Iterable[Document] = (), first: int = 0,
      cache: paths.Address = '', per_second: float = 0.0,
  ):
    """Connects to nothing yet.

    Args:
      urls: http://host:port[/retrieve]; several are joined by commas.
      timeout: seconds until an answer has begun, and between two parts of it.
      known: documents whose id is used wherever their title and text are
        found, whatever the server calls them: gold documents are known again.
      first: number of the server that is asked first, modulo their number.
      cache: file that keeps what each query has found (`client.Cache`); ''
        keeps nothing. It does not notice when a server gets another corpus.
      per_second: requests a second; 0: no limit.

    Raises:
      ValueError: something that is not a URL, or a file that is no cache.
    """
    self.urls = tuple(_normalised(url) for url in urls.split(','))
    self._ids = {(d.title, d.text): d.id for d in known}
    self._next = first
    self._cache = client.Cache(cache) if cache else None
    self._limiter = client.Limiter(per_second)
    self._timeout = timeout
    self._pool = urllib3.PoolManager(
        maxsize=4, retries=False,
        timeout=urllib3.Timeout(connect=min(timeout, 5.0), read=timeout))

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """As of `retriever.Engine`.

    Raises:
      ConnectionError: no server has answered, or none as the protocol says;
        names each with what was wrong.
    """
    results: list[list[Document]] = [[] for _ in queries]
    asked = [i for i, query in enumerate(queries) if query.strip()]
    if self._cache is not None:
      kept = {
          i: self._cache.find([*self.urls, queries[i], k]) for i in asked}
      for i, rows in kept.items():
        results[i] = [Document(*fields) for fields in rows or ()]
      asked = [i for i in asked if kept[i] is None]
    for start in range(0, len(asked), _ASKED):
      part = asked[start:start + _ASKED]
      found = self._ask([queries[i] for i in part], k)
      for i, documents in zip(part, found):
        results[i] = documents
        if self._cache is not None:
          self._cache.keep(
              [*self.urls, queries[i], k],
              [dataclasses.astuple(document) for document in documents])
    # After the cache, whose next reader may know others.
    return [list(map(self._renamed, row)) for row in results]

  def check(self, k: int, say: Callable[[str], None] = print) -> None:
    """Asks every server one question, and what it serves.

    Raises:
      ValueError: none can be reached, one answers something else, or two serve
        different passages.
    """
    field = f'config.retriever.url = {",".join(self.urls)!r}'
    corpora, absent = {}, []
    for url in self.urls:
      try:
        self._retrieve(url, ['Who wrote Hamlet?'], k)
      except (OSError, urllib3.exceptions.HTTPError) as error:
        absent.append(f'{url} cannot be reached ({client.reason(error)})')
        continue
      except ValueError as error:
        raise ValueError(
            f'{field}: {url} does not answer as a /retrieve server does:'
            f' {error}. Name a server that `python -m stepsearch.serve` or'
            ' Search-R1 runs.') from error
      about = self._health(url)
      if about.get('corpus'):
        corpora[url] = about['corpus']
      say(f'{url}: {about.get("corpus") or "an unnamed corpus"}')
    if len(absent) == len(self.urls):
      raise ValueError(
          f'{field}: {"; ".join(absent)}. Start it with `python -m'
          ' stepsearch.serve`, wait until it says that it answers, and look at'
          ' host and port.')
    for line in absent:
      say(line)
    if len(set(corpora.values())) > 1:
      raise ValueError(
          f'{field}: these servers have to be replicas, but they serve'
          f' different passages: '
          + '; '.join(f'{url}: {name}' for url, name in corpora.items())
          + '. Start them with the same index.')

  def _ask(self, queries, k):
    failures = []
    for _ in self.urls:
      turn = self._next
      # Whoever comes next asks another server, until this one has answered:
      # the caller may give up before.
      self._next = turn + 1
      url = self.urls[turn % len(self.urls)]
      try:
        found = self._retrieve(url, queries, k)
      except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        failures.append(f'{url}: {client.reason(error)}')
        continue
      self._next = turn
      return found
    raise ConnectionError('; '.join(failures))

  def _retrieve(self, url, queries, k) -> list[list[Document]]:
    self._limiter.wait()
    answer = self._pool.request(
        'POST', url,
        json={'queries': queries, 'topk': k, 'return_scores': True})
    if answer.status != 200:
      raise ValueError(f'HTTP {answer.status}, {_detail(answer.data)}')
    try:
      values = json.loads(answer.data)
    except ValueError as error:
      raise ValueError(f'the answer is not JSON ({error})') from error
    rows = values.get('result') if isinstance(values, dict) else None
    if not isinstance(rows, list) or len(rows) != len(queries) or not all(
        isinstance(row, list) for row in rows):
      raise ValueError(
          f'{_beginning(answer.data)} is not {{result: [[…]]}} with one list a'
          f' query, of which there were {len(queries)}')
    return [[self._document(item) for item in row[:k]] for row in rows]

  def _document(self, item) -> Document:
    score = 0.0
    if isinstance(item, dict) and 'document' in item:
      item, score = item['document'], item.get('score', score)
    field = item.get('contents') if isinstance(item, dict) else None
    title, text = (
        item.get(name) if isinstance(item, dict) else None
        for name in ('title', 'text'))
    if not isinstance(score, (int, float)):
      raise ValueError(f'the score {score!r} is not a number')
    if isinstance(title, str) and isinstance(text, str):
      document = Document('', title, text)
    elif isinstance(field, str):
      document = passages.from_contents('', field)
    else:
      raise ValueError(
          f'{_beginning(json.dumps(item).encode())} is no document: it has to'
          ' have contents, or title and text')
    key = document.title, document.text
    name = item.get('id')
    if isinstance(name, bool) or not isinstance(name, (str, int)) or (
        name == ''):
      # The same text is the same document, in every process.
      name = hashlib.blake2b(
          json.dumps(key).encode(), digest_size=8).hexdigest()
    return Document(str(name), *key, float(score))

  def _renamed(self, document) -> Document:
    name = self._ids.get((document.title, document.text), document.id)
    return dataclasses.replace(document, id=name)

  def _health(self, url) -> dict[str, Any]:
    """What the server says of itself; other servers than ours say nothing."""
    try:
      answer = self._pool.request('GET', urllib.parse.urljoin(url, 'health'))
      values = json.loads(answer.data) if answer.status == 200 else None
    except (OSError, ValueError, urllib3.exceptions.HTTPError):
      values = None
    return values if isinstance(values, dict) else {}


def _normalised(url: str) -> str:
  url = url.strip()
  if not client.is_address(url):
    raise ValueError(
        f'config.retriever.url: {client.shown(url)} is not a URL such as'
        ' http://127.0.0.1:8000/retrieve; several are joined by commas.')
  path = urllib.parse.urlsplit(url).path
  return url if path.strip('/') else url.rstrip('/') + '/retrieve'


def _detail(body: bytes) -> str:
  """The reason that an error carries, ours or FastAPI's."""
  try:
    detail = json.loads(body)['detail']
  except (ValueError, TypeError, KeyError):
    return _beginning(body)
  return detail if isinstance(detail, str) else json.dumps(detail)


def _beginning(body: bytes) -> str:
  text = body[:80].decode(errors='replace')
  return repr(text + '…' * (len(body) > 80))
