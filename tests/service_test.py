"""`/retrieve` from both sides, and what a run makes of it."""

import asyncio
import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from configs import default
from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import engine as engine_lib
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service
from stepsearch.types import Document

_ROOT = pathlib.Path(__file__).parents[1]
_DOCUMENTS = [
    Document('a', 'Ada Lovelace', 'Ada was born in London, England.'),
    Document('b', '"Heroes"', 'A song\nof David Bowie, recorded in Berlin.'),
    Document('c', 'Paris', 'Paris is the capital of France.'),
    Document('d', '', 'Rome is the capital of Italy. „è“'),
    Document('e', 'Line\nbreak', 'London, the capital of England.'),
]
_QUERIES = ['capital of Italy', ' ', 'Bowie in Berlin', '', 'line break, è',
            'xyzzy', 'Ada']


@contextlib.contextmanager
def _server(engine, say=lambda _: None):
  """Our server, in a thread; yields its URL and a function that stops it."""
  started, url, loops, stop = threading.Event(), [], [], asyncio.Event()

  async def main():
    async with service.running(engine, say=say) as where:
      url.append(where)
      loops.append(asyncio.get_running_loop())
      started.set()
      await stop.wait()

  thread = threading.Thread(target=asyncio.run, args=(main(),))
  thread.start()
  started.wait(10)

  def end():
    if thread.is_alive():
      loops[0].call_soon_threadsafe(stop.set)

  try:
    yield url[0], end
  finally:
    end()
    thread.join()


@pytest.fixture(scope='module')
def engine():
  return retriever.build(_DOCUMENTS, dimensions=256, index='exact')


@pytest.fixture(scope='module')
def url(engine):
  with _server(engine) as (where, _):
    yield where


def _ask(url, body, method='POST', path='/retrieve'):
  """Status and JSON of one request, by another client than ours."""
  connection = http.client.HTTPConnection(*url.split('/')[2].split(':'))
  if not isinstance(body, bytes):
    body = json.dumps(body).encode()
  connection.request(method, path, body)
  answer = connection.getresponse()
  with contextlib.closing(connection):
    return answer.status, json.loads(answer.read())


class _Engine:
  """Answers `query/k`, and only when it may; remembers its calls."""

  def __init__(self):
    self.calls = []
    self.may_answer = threading.Event()

  def search(self, queries, k):
    self.calls.append((tuple(queries), k))
    assert self.may_answer.wait(10)
    if 'fail' in queries:
      raise OSError('the disk is gone')
    return [[Document('1', query, str(k))] for query in queries]


def _wait_for(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.002)


# ---- the server


def test_the_protocol_of_search_r1(url):
  """Its README's request, and the shapes that its client reads."""
  status, found = _ask(url, {
      'queries': ['capital of Italy', 'capital of France'], 'topk': 2,
      'return_scores': True, 'an_extra': 'field'})
  assert status == 200 and list(found) == ['result']
  first, second = found['result']
  assert first[0]['document']['contents'] == f'""\n{_DOCUMENTS[3].text}'
  assert second[0]['document'] == {
      'id': 'c', 'title': 'Paris', 'text': 'Paris is the capital of France.',
      'contents': '"Paris"\nParis is the capital of France.'}
  assert len(first) == len(second) == 2
  assert first[0]['score'] > first[1]['score'] > 0
  _, plain = _ask(url, {'queries': ['capital of France']})
  assert [d['id'] for d in plain['result'][0]][0] == 'c'
  assert len(plain['result'][0]) == 3  # its default topk
  assert _ask(url, {'queries': []}) == (200, {'result': []})


@pytest.mark.parametrize('body, words', [
    (b'{"queries": ["a"', 'not JSON'),
    (b'\xff\xfe', 'not JSON'),
    (b'[' * 100_000, 'not JSON'),
    (['a'], 'has to be an object'),
    ({'topk': 3}, 'list of texts'),
    ({'queries': 'a'}, 'list of texts'),
    ({'queries': ['a', 3]}, 'list of texts'),
    ({'queries': ['\ud800']}, 'no text'),
    ({'queries': ['a'] * 1025}, 'at most 1024'),
    ({'queries': ['a'], 'topk': 0}, 'from 1 to 5'),
    ({'queries': ['a'], 'topk': 6}, 'from 1 to 5'),
    ({'queries': ['a'], 'topk': True}, 'from 1 to 5'),
    ({'queries': ['a'], 'topk': '3'}, 'from 1 to 5'),
    ({'queries': ['a'], 'return_scores': 'yes'}, 'true or false'),
])
def test_a_bad_request_is_told_why(url, body, words):
  status, answer = _ask(url, body)
  assert status == 400 and words in answer['detail']


def test_answers_are_bounded_too(url, monkeypatch):
  monkeypatch.setattr(service, 'MAX_DOCUMENTS', 8)
  assert _ask(url, {'queries': ['a'] * 4, 'topk': 2})[0] == 200
  status, answer = _ask(url, {'queries': ['a'] * 3, 'topk': 3})
  assert status == 400 and 'at most 8 documents' in answer['detail']


def test_other_paths_methods_and_sizes(url, monkeypatch):
  assert _ask(url, b'', path='/search')[0] == 404
  assert _ask(url, b'', method='GET')[0] == 405
  status, answer = _ask(url, b' ' * (service.MAX_BYTES + 1))
  assert status == 413 and str(service.MAX_BYTES) in answer['detail']
  monkeypatch.setattr(service, '_READ', 0.05)
  with socket.create_connection(url.split('/')[2].split(':')) as slow:
    slow.sendall(b'POST /retrieve HTTP/1.1\r\nHost: x\r\n'
                 b'Content-Length: 9\r\n\r\n{')
    assert slow.recv(100).startswith(b'HTTP/1.1 408')


def test_health(url, engine):
  assert _ask(url, b'', 'GET', '/health') == (200, {
      'size': 5, 'corpus': retriever.corpus_fingerprint(_DOCUMENTS),
      'embedder': engine.embedder.fingerprint, 'max_topk': 5,
      'max_queries': 1024})
  assert service.describe(_Engine())['max_topk'] == 100


def test_concurrent_requests_share_a_search():
  engine = _Engine()
  answers = {}

  def ask(name, k):
    answers[name] = _ask(url, {'queries': [name, name + '!'], 'topk': k})

  with _server(engine) as (url, _):
    first = threading.Thread(target=ask, args=('first', 1))
    first.start()
    _wait_for(lambda: engine.calls)
    others = [threading.Thread(target=ask, args=(f'{i}', 1 + i % 2))
              for i in range(6)]
    for thread in others:
      thread.start()
    time.sleep(0.2)  # they wait while the first search goes on
    engine.may_answer.set()
    for thread in (first, *others):
      thread.join()
  assert engine.calls[0] == (('first', 'first!'), 1)
  assert [(len(q), k) for q, k in sorted(engine.calls[1:], key=lambda c: c[1])
          ] == [(6, 1), (6, 2)]
  for name, (status, found) in answers.items():
    k = 1 if name == 'first' else 1 + int(name) % 2
    assert status == 200
    assert [row[0]['contents'] for row in found['result']] == [
        f'"{name}"\n{k}', f'"{name}!"\n{k}']


def test_an_engine_that_fails_is_asked_again():
  engine, said = _Engine(), []
  engine.may_answer.set()
  with _server(engine, said.append) as (url, _):
    status, answer = _ask(url, {'queries': ['fail']})
    assert status == 500 and 'the disk is gone' in answer['detail']
    assert 'the disk is gone' in said[0]
    assert _ask(url, {'queries': ['good']})[0] == 200
    with pytest.raises(ConnectionError, match='HTTP 500.*the disk is gone'):
      service.Remote(url).search(['fail'], 1)


def test_too_many_requests_are_refused(monkeypatch):
  monkeypatch.setattr(service, '_WAITING', 1)
  engine = _Engine()
  with _server(engine) as (url, _):
    waiting = [
        threading.Thread(target=_ask, args=(url, {'queries': [name]}))
        for name in 'ab']
    for thread in waiting:
      thread.start()
      _wait_for(lambda: engine.calls)  # one is searched for, one waits
    time.sleep(0.2)
    status, answer = _ask(url, {'queries': ['c']})
    assert status == 503 and 'try again' in answer['detail']
    engine.may_answer.set()
    for thread in waiting:
      thread.join()


def test_requests_in_flight_are_finished():
  engine, answers = _Engine(), []
  with _server(engine) as (url, stop):
    asking = threading.Thread(
        target=lambda: answers.append(_ask(url, {'queries': ['late']})))
    asking.start()
    _wait_for(lambda: engine.calls)
    stop()
    time.sleep(0.1)
    with pytest.raises(OSError):
      _ask(url, {'queries': ['too late']})
    engine.may_answer.set()
    asking.join()
  assert answers[0][0] == 200


def test_the_command(tmp_path, engine):
  engine.save(tmp_path / 'index')
  process = subprocess.Popen(
      [sys.executable, '-m', 'stepsearch.serve', '--port=0',
       f'--index={tmp_path / "index"}'],
      env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    url = line.split('/retrieve')[0]
    assert '5 passages' in line
    # Noise from the network leaves no trace and does no harm.
    with socket.create_connection(url.split('/')[2].split(':')) as noise:
      noise.sendall(b'\x16\x03\x01 what?\r\n\r\n')
      noise.recv(1000)
    assert service.Remote(url).search(_QUERIES, 3) == engine.search(_QUERIES, 3)
    with pytest.raises(ValueError, match='cannot be listened on.*--port'):
      service.serve(engine, port=int(url.rpartition(':')[2]))
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=15)
  finally:
    process.kill()
  assert (process.returncode, out, errors) == (0, 'stopping\n', '')


# ---- the client


@pytest.mark.parametrize('asked', [256, 2])
def test_the_same_documents_as_here(url, engine, asked, monkeypatch):
  monkeypatch.setattr(service, '_ASKED', asked)
  remote = service.Remote(url)
  found = remote.search(_QUERIES, 3)
  assert found == engine.search(_QUERIES, 3)  # scores to the bit
  assert [len(row) for row in found] == [3, 0, 3, 0, 3, 0, 3]
  assert dataclasses.replace(found[0][0], score=0.0) == _DOCUMENTS[3]
  assert remote.search([' ', ''], 3) == [[], []] and remote.search([], 3) == []


class _Faulty(http.server.ThreadingHTTPServer):
  """Answers each POST as the next of a script says; the last one stays."""

  daemon_threads = True

  def __init__(self, *script):
    self.script, self.requests, self.connections = list(script), [], 0
    super().__init__(('127.0.0.1', 0), _Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    threading.Thread(
        target=self.serve_forever, args=(0.01,), daemon=True).start()

  def get_request(self):
    self.connections += 1
    return super().get_request()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def do_POST(self):  # noqa: N802
    request = json.loads(
        self.rfile.read(int(self.headers['Content-Length'])))
    server = self.server
    server.requests.append(request)
    answer = (
        server.script.pop(0) if len(server.script) > 1 else server.script[0])
    answer(self, request)


def _says(body, status=200, promised=0):
  """An answer; it may promise more bytes than come."""
  body = body if isinstance(body, bytes) else json.dumps(body).encode()

  def answer(handler, request):
    del request
    handler.send_response(status)
    handler.send_header('Content-Length', str(len(body) + promised))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = bool(promised)

  return answer


def _items(*items):
  """The same items for every query, as a server that knows `contents` only."""

  def answer(handler, request):
    _says({'result': [list(items) for _ in request['queries']]})(
        handler, request)

  return answer


def _hangs(handler, request):
  del request
  time.sleep(1)
  handler.close_connection = True


def _hangs_up(handler, request):
  del request
  handler.close_connection = True


def _drips(handler, request):
  del request
  handler.close_connection = True
  handler.send_response(200)
  handler.send_header('Content-Length', '100')
  handler.end_headers()
  with contextlib.suppress(OSError):
    for _ in range(20):
      handler.wfile.write(b' ')
      time.sleep(0.05)


_GOOD = _items({'document': {'contents': '"T"\nx'}, 'score': 0.5})
_FAULTS = {
    'error': (_says({'detail': 'no GPU'}, 500), 'HTTP 500, no GPU'),
    'page': (_says(b'<html>', 502), "HTTP 502, '<html>'"),
    'moved': (_says(b'', 301), 'HTTP 301'),
    'garbage': (_says(b'{"result": [['), 'not JSON'),
    'bytes': (_says(b'\xff'), 'not JSON'),
    'list': (_says([[]]), 'one list a query'),
    'short': (_says({'result': [[]]}), 'of which there were 2'),
    'flat': (_items('text'), 'is no document'),
    'no rows': (_says({'result': [1, 2]}), 'one list a query'),
    'empty': (_items({'document': {'id': 1}, 'score': 1}), 'is no document'),
    'null': (_items({'document': None, 'score': 1}), 'is no document'),
    'score': (_items({'document': {'contents': 'x'}, 'score': 'high'}),
              'not a number'),
    'truncated': (_says({'result': [[], []]}, promised=5), 'IncompleteRead'),
    'hangs up': (_hangs_up, 'closed'),
    'slow': (_hangs, 'timed out'),
}


@pytest.mark.parametrize('fault', _FAULTS)
def test_a_fault_costs_the_search_and_nothing_after_it(fault, capsys):
  answer, words = _FAULTS[fault]
  with _Faulty(answer, answer, _GOOD) as server:
    remote = service.Remote(server.url, timeout=0.2)
    with pytest.raises(ConnectionError, match='http.*/retrieve: ') as error:
      remote.search(['a', 'b'], 2)
    assert words in str(error.value)
    patient = retriever.Patient(remote, retries=0)
    assert patient.search(['a', 'b'], 2) == [[], []]
    assert patient.failed == 2
    assert words in capsys.readouterr().out
    found = patient.search(['a', 'b'], 2)
    assert [(row[0].title, row[0].text) for row in found] == [('T', 'x')] * 2
    assert patient.failed == 2


def test_retries_and_silence(monkeypatch, capsys):
  monkeypatch.setattr(retriever.time, 'sleep', lambda _: None)
  bad = _says(b'', 503)
  with _Faulty(_GOOD, bad, bad, _GOOD, bad) as server:
    patient = service.from_url(
        server.url, 1, timeout=5.0, retries=2, give_up=0.0, say=lambda _: None)
    assert len(patient.search(['a'], 1)[0]) == 1 and not patient.failed
    with pytest.raises(retriever.Unavailable) as error:
      patient.search(['a'], 1)
  for part in ('config.retriever.url', server.url, 'HTTP 503'):
    assert part in str(error.value)


def test_a_server_that_drips_is_given_up():
  with _Faulty(_GOOD, _drips) as server:
    patient = service.from_url(
        server.url, 1, timeout=0.2, retries=0, say=lambda _: None)
    patient._timeout = 0.3
    start = time.monotonic()
    assert patient.search(['a'], 1) == [[]]
    assert time.monotonic() - start < 0.8


def test_what_is_sent_and_that_connections_are_kept():
  with _Faulty(_GOOD) as server:
    remote = service.Remote(server.url)
    for _ in range(5):
      remote.search(['a', ' ', 'b'], 2)
    assert server.connections == 1
    assert server.requests == [
        {'queries': ['a', 'b'], 'topk': 2, 'return_scores': True}] * 5


def test_servers_that_know_contents_only():
  """Search-R1's dense server has ids, its BM25 server has none."""
  items = (
      {'document': {'id': 17, 'contents': '"Paris"\nThe capital.'}, 'score': 2},
      {'document': {'title': 'Rome', 'text': 'Old.', 'contents': '"Rome"\nOld.'
                    }, 'score': 1.5},
      {'document': {'contents': '"Rome"\nOld.'}, 'score': 1.25},
      {'contents': 'one line'},
      {'contents': 'beyond k'})
  with _Faulty(_items(*items)) as server:
    found, = service.Remote(server.url).search(['q'], 4)
    again, = service.Remote(server.url).search(['q'], 4)
    known, = service.Remote(
        server.url, known=[Document('gold', 'Paris', 'The capital.')]
    ).search(['q'], 4)
  assert found == again
  assert found[0] == Document('17', 'Paris', 'The capital.', 2.0)
  assert [(d.title, d.text, d.score) for d in found[1:]] == [
      ('Rome', 'Old.', 1.5), ('Rome', 'Old.', 1.25), ('', 'one line', 0.0)]
  assert found[1].id == found[2].id == hashlib.blake2b(
      b'["Rome", "Old."]', digest_size=8).hexdigest()  # in every process
  assert known == [dataclasses.replace(found[0], id='gold'), *found[1:]]


def test_a_search_has_time_to_wait_for_its_turn():
  item = {'document': {'id': 17, 'contents': 'x'}}
  with _Faulty(_items(item)) as server:
    engine = service.from_url(
        server.url, 1, timeout=0.1, per_second=0.5, retries=0,
        say=lambda _: None)
    (found,) = engine.search(['q'], 1)
  assert [d.id for d in found] == ['17'] and engine.failed == 0


def test_a_cache_keeps_the_ids_of_the_server(tmp_path):
  gold = Document('gold', 'Paris', 'The capital.')
  item = {'document': {'id': 17, 'contents': '"Paris"\nThe capital.'}}
  with _Faulty(_items(item)) as server:
    ids = [
        service.Remote(
            server.url, known=known, cache=tmp_path / 'cache'
        ).search(['q'], 1)[0][0].id for known in ([], [gold], [])]
  assert ids == ['17', 'gold', '17']


def _free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def test_replicas():
  down = f'http://127.0.0.1:{_free_port()}'
  with _Faulty(_GOOD) as a, _Faulty(_GOOD) as b:
    remote = service.Remote(f'{down}, {a.url}/retrieve,{b.url}')
    for _ in range(3):
      assert remote.search(['q'], 1)
    assert (len(a.requests), len(b.requests)) == (3, 0)
    a.script[:] = [_says(b'', 500)]
    for _ in range(3):
      assert remote.search(['q'], 1)
    assert (len(a.requests), len(b.requests)) == (4, 3)
    a.script[:] = [_GOOD]
    b.script[:] = [_hangs_up]
    assert remote.search(['q'], 1)
    assert (len(a.requests), len(b.requests)) == (5, 4)
    a.script[:] = [_hangs_up]
    with pytest.raises(ConnectionError) as error:
      remote.search(['q'], 1)
    for server in (down, a.url, b.url):
      assert server in str(error.value)
    # Another process begins elsewhere.
    b.script[:] = [_GOOD]
    service.Remote(f'{down},{a.url},{b.url}', first=5).search(['q'], 1)
    assert len(b.requests) == 6


def test_after_a_server_that_hangs_another_is_asked():
  """Even if the caller had no time to wait for the first to fail."""
  with _Faulty(_hangs) as a, _Faulty(_GOOD) as b:
    patient = retriever.Patient(
        service.Remote(f'{a.url},{b.url}'), timeout=0.2, retries=1, wait=0.0)
    assert len(patient.search(['q'], 1)[0]) == 1
    assert (len(a.requests), len(b.requests)) == (1, 1)


@pytest.mark.parametrize('url', [
    'localhost:8000', 'ftp://here', 'http://', '', 'http://a:99999',
    'http://here:8000,,', 'http://me:secret@here', 'http://here/a?key=secret'])
def test_what_is_no_url(url):
  with pytest.raises(
      ValueError, match='config.retriever.url: .* not a URL') as error:
    service.Remote(url)
  assert 'secret' not in str(error.value)


def test_servers_are_tried_at_the_start(url, engine):
  down = f'http://127.0.0.1:{_free_port()}'
  with pytest.raises(ValueError, match='cannot be reached .*refused') as error:
    service.from_url(down, 1)
  assert 'config.retriever.url' in str(error.value)
  assert 'stepsearch.serve' in str(error.value)
  said = []
  service.from_url(f'{down},{url}', 3, say=said.append)
  assert retriever.corpus_fingerprint(_DOCUMENTS) in said[0]
  assert down in said[1] and 'refused' in said[1]
  with pytest.raises(ValueError, match='topk = 6: a number from 1 to 5'):
    service.from_url(url, 6)
  with _Faulty(_says(b'welcome')) as server:
    with pytest.raises(ValueError, match='does not answer as a /retrieve'):
      service.from_url(f'{url},{server.url}', 1, say=said.append)
  with _server(retriever.build(_DOCUMENTS[:4], index='exact')) as (other, _):
    with pytest.raises(ValueError, match='different passages.*4 documents'):
      service.from_url(f'{url},{other}', 1, say=said.append)


# ---- a run


def _config(url, **retriever_leaves):
  config = default.get_config()
  config.retriever.update(dict(url=url, **retriever_leaves))
  return config


def test_the_config_names_a_server(url, engine, tmp_path):
  config = _config(url)
  said = []
  remote = engine_lib.build(config, [], tmp_path, said.append)
  assert remote.search(_QUERIES, 3) == engine.search(_QUERIES, 3)
  assert not list(tmp_path.iterdir())  # no index is built
  with pytest.raises(ValueError, match=r'retriever\.url .*leave one out'):
    engine_lib.build(
        _config(url, factory='a:b'), [], tmp_path, said.append)
  config.reward.similarity = 'retriever'
  with pytest.raises(ValueError, match='similarity .*server.*tfidf'):
    assembly._score(config, assembly._reward(config), remote)


def _write(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_with_a_server_the_corpus_is_for_gold_documents_only(tmp_path):
  config = default.get_config()
  config.data.eval = _write(
      tmp_path / 'q.jsonl',
      {'id': 1, 'question': 'Who?', 'answers': ['Ada'], 'gold': ['a']})
  with pytest.raises(ValueError, match='config.data.corpus'):
    assembly._read(config, training=False, say=print)
  config.retriever.url = 'http://127.0.0.1:1'
  corpus, _, (example,) = assembly._read(config, training=False, say=print)
  assert (corpus, example.gold_documents) == ([], ())
  config.data.corpus = _write(
      tmp_path / 'c.jsonl', {'id': 'a', 'title': 'Ada', 'text': 'Born.'})
  corpus, _, (example,) = assembly._read(config, training=False, say=print)
  assert example.gold_documents == (Document('a', 'Ada', 'Born.'),)


def test_the_engine_of_a_config_can_be_served(tmp_path):
  config = config_lib.load(f'{_ROOT}/configs/tiny.py')
  with config.unlocked():
    config.world.update(dict(train_entities=4, eval_entities=4, name_words=20))
  with pytest.raises(ValueError, match='config.retriever.directory'):
    assembly.retriever(config)
  config.retriever.directory = str(tmp_path / 'index')
  served = assembly.retriever(config, lambda _: None)
  with _server(served) as (url, _):
    remote = service.Remote(
        url, cache=tmp_path / 'cache', per_second=1000)
    query = served.documents[3].text
    found = served.search([query], 2)
    assert remote.search([query], 2) == found
  # What has been asked needs no server any more.
  assert remote.search([query, ' '], 2) == [*found, []]
  with pytest.raises(ConnectionError):
    remote.search([query, 'another'], 2)
  config.retriever.url = url
  with pytest.raises(ValueError, match='config.retriever.url.*leave it out'):
    assembly.retriever(config)
