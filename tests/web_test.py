"""Web search APIs against a local server that fails at times."""

import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sqlite3
import threading
import time

import pytest

from configs import default
from stepsearch import assembly
from stepsearch import client
from stepsearch import config as config_lib
from stepsearch import engine as engine_lib
from stepsearch.retrieval import engines
from stepsearch.retrieval import retriever
from stepsearch.retrieval import web
from stepsearch.types import Document
from tests import fake_services
from tests import micro

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = [
    Document('a', 'Ada Lovelace', 'Ada was born in London'),
    Document('b', 'Heroes', 'a song of David Bowie'),
    Document('c', 'London', 'the capital of England'),
    Document('d', 'Rome', 'the capital of Italy, „è“'),
]


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
  monkeypatch.setenv('SERPER_API_KEY', fake_services.KEY)
  monkeypatch.setenv('BING_API_KEY', fake_services.KEY)


def _engine(server, api='serper', **options):
  options = dict(wait=0.01, timeout=2.0) | options
  return web.WebSearch(api, url=f'{server.url}/search', **options)


@pytest.mark.parametrize('api', ['serper', 'bing'])
def test_pages_become_documents_in_order(api):
  with fake_services.running(pages=_PAGES) as server:
    engine = _engine(server, api)
    found = engine.search(['capital of Italy', ' ', 'xyzzy', 'Ada'], 2)
  assert found == [
      [Document('https://a.test/d', 'Rome', 'the capital of Italy, „è“'),
       Document('https://a.test/c', 'London', 'the capital of England')],
      [], [],
      [Document('https://a.test/a', 'Ada Lovelace', 'Ada was born in London')]]


def test_faults_cost_time_and_nothing_else(tmp_path):
  queries = [f'Ada {i}' for i in range(60)] + ['Ada 0', 'Ada 7']
  with fake_services.running(pages=_PAGES, faults=0.3, slow=3.0) as server:
    options = dict(cache=tmp_path / 'web.db', timeout=2.0, retries=8)
    first = _engine(server, **options).search(queries, 3)
    assert [row[0].id for row in first] == ['https://a.test/a'] * 62
    assert set(server.answered.values()) == {1} and len(server.answered) == 60
    assert set(server.faulty) == set(fake_services.FAULTS)
    before = server.total
    again = _engine(server, **options)
    assert again.search(queries, 3) == first and server.total == before
    assert again.counts['cached'] == 60
  stored = sqlite3.connect(tmp_path / 'web.db').execute(
      'SELECT * FROM answers').fetchall()
  assert len(stored) == 60 and fake_services.KEY not in str(stored)


def test_no_more_requests_a_second_and_at_once_than_asked_for():
  with fake_services.running(pages=_PAGES) as server:
    server.delay = 0.1
    _engine(server, concurrency=3).search([f'Ada {i}' for i in range(9)], 1)
    assert server.most_inside == 3
    server.times.clear()
    server.delay = 0.0
    _engine(server, per_second=20).search([f'Ada {i}' for i in range(9)], 1)
    assert server.times[-1] - server.times[0] >= 8 / 20 - 0.05


def test_the_same_question_in_flight_is_asked_once():
  with fake_services.running(pages=_PAGES) as server:
    server.delay = 0.3
    engine = _engine(server)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.search(['Ada'], 1)))
        for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert server.total == 1 and len(found) == 4 and found[0] == found[3]


def test_retry_after_is_heeded():
  name = json.dumps(['/search', {'q': 'Ada', 'num': 1}], sort_keys=True)
  with fake_services.running(pages=_PAGES, faults=0.5) as server:

    def faults(seed):
      server.seed = seed
      draws = [server.chance(name, time) for time in (1, 2)]
      return [
          draw.random() < 0.5 and draw.choice(fake_services.FAULTS)
          for draw in draws]

    server.seed = next(s for s in range(999) if faults(s) == ['429', False])
    start = time.monotonic()
    assert len(_engine(server, wait=0.0).search(['Ada'], 1)[0]) == 1
    assert server.total == 2 and time.monotonic() - start > 0.9


def test_a_short_retry_after_does_not_shorten_the_backoff(monkeypatch):
  monkeypatch.setattr(client, '_retry_after', lambda response: 0.01)
  with fake_services.running(pages=_PAGES) as server:
    server.refuse = {'/search': 429}
    start = time.monotonic()
    with pytest.raises(retriever.PartlyFailed, match='after 4 requests'):
      _engine(server, wait=0.1, retries=3).search(['Ada'], 1)
  assert time.monotonic() - start > 0.75 * (0.1 + 0.2 + 0.4)


def test_a_query_that_fails_alone_has_no_results_and_is_counted(capsys):
  with fake_services.running(pages=_PAGES) as server:
    patient = web.patient(
        'serper', 1, url=f'{server.url}/search', timeout=1.0, retries=1,
        give_up=0.0, wait=0.01)
    server.bad = ('odd',)
    found = patient.search(['Ada', 'odd', 'Rome'], 1)
  assert [len(row) for row in found] == [1, 0, 1] and patient.failed == 1
  printed = capsys.readouterr().out
  assert 'not answered 1 of 3 queries' in printed and 'HTTP 400' in printed
  assert server.asked[json.dumps(
      ['/search', {'num': 1, 'q': 'odd'}], sort_keys=True)] == 1


def test_a_service_that_is_gone_ends_a_run_only_in_the_end():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{free.getsockname()[1]}/search'
  engine = web.WebSearch('serper', url=url, retries=1, wait=0.01)
  assert retriever.Patient(engine, timeout=None, retries=0).search(
      ['a', 'b'], 1) == [[], []]
  impatient = retriever.Patient(engine, timeout=None, retries=0, give_up=0)
  with pytest.raises(retriever.Unavailable, match='not answered 2 of 2'):
    impatient.search(['a', 'b'], 1)
  with pytest.raises(ValueError, match='web_url'):
    web.patient('serper', 1, url=url, timeout=1, retries=0, give_up=1)


def test_a_service_that_refuses_all_ends_a_run_at_once():
  # Its refusals come quickly: seconds of searches would be many steps.
  with fake_services.running(pages=_PAGES) as server:
    patient = web.patient(
        'serper', 1, url=f'{server.url}/search', timeout=1.0, retries=1,
        give_up=60.0, wait=0.01)
    server.refuse = {'/search': 402}
    with pytest.raises(retriever.Unavailable, match='no use any more.*402'):
      patient.search(['Ada'], 1)


def test_a_wrong_key_is_told_without_showing_it(monkeypatch):
  other = 'sk-another-key'
  monkeypatch.setenv('OTHER_KEY', other)
  with fake_services.running(pages=_PAGES) as server:
    with pytest.raises(client.Refused, match=r'HTTP 401.*\[key\]') as error:
      _engine(server, key_variable='OTHER_KEY').search(['Ada'], 1)
  assert other not in str(error.value) and server.total == 1


def test_a_key_is_struck_out_also_as_json_has_it():
  asked = client.Client('http://a.test', secret='sk/ab"cdef')
  for text in ('sk/ab"cdef', r'sk/ab\"cdef', r'sk\/ab\"cdef'):
    assert asked._struck(f'<{text}>') == '<[key]>'


def test_a_placeholder_for_a_key_leaves_answers_alone(monkeypatch):
  monkeypatch.setattr(fake_services, 'KEY', 'capital')
  monkeypatch.setenv('SERPER_API_KEY', 'capital')
  with fake_services.running(pages=_PAGES) as server:
    ((found,),) = _engine(server).search(['Italy'], 1)
  assert found.text == 'the capital of Italy, „è“'


def test_a_service_that_has_moved_ends_the_run():
  with fake_services.running(pages=_PAGES) as server:
    server.refuse = {'/search': 301}
    with pytest.raises(client.Refused, match='HTTP 301.*look at the address'):
      _engine(server).search(['Ada'], 1)
  assert server.total == 1


@pytest.mark.parametrize('value, problem', [
    (None, 'SERPER_API_KEY, which is not set'),
    ('sk-two words', 'holds spaces'), ('sk-schlüssel', 'holds spaces')])
def test_a_key_that_cannot_be_is_refused(monkeypatch, value, problem):
  monkeypatch.delenv('SERPER_API_KEY')
  if value:
    monkeypatch.setenv('SERPER_API_KEY', value)
  with pytest.raises(ValueError, match=problem) as error:
    web.WebSearch('serper')
  assert value is None or value not in str(error.value)


@pytest.mark.parametrize('url', [
    'ftp://a/b', 'https://', 'https://me:secret@a/b', 'https://:secret@a/b',
    'https://a/b?key=secret', 'http://a:99999', 'http://[::1',
    'me:secret@a/b'])
def test_an_address_with_a_key_in_it_is_refused(url):
  with pytest.raises(ValueError, match='an address such as') as error:
    web.WebSearch('serper', url=url)
  assert 'secret' not in str(error.value)
  with pytest.raises(ValueError, match="^'a.test:80/v1': an address such as"):
    client.Client('a.test:80/v1')


def test_other_bad_input(tmp_path):
  with pytest.raises(ValueError, match="'google' is no web search API"):
    web.WebSearch('google')
  with pytest.raises(ValueError, match='between 1 and 100'):
    web.WebSearch('serper').search(['a'], 101)
  (tmp_path / 'x').write_text('text that is no database' * 50)
  with pytest.raises(ValueError, match='cannot be used as a cache'):
    web.WebSearch('serper', cache=tmp_path / 'x')
  with pytest.raises(ValueError, match='no store offers'):
    client.Cache('gs://bucket/x')


def test_the_engine_of_a_config_and_of_a_text(tmp_path):
  config = default.get_config()
  with fake_services.running(pages=_PAGES) as server:
    config.retriever.update(dict(
        web='bing', web_url=f'{server.url}/search', per_second=100.0,
        cache=str(tmp_path / 'web.db')))
    said = []
    engine = engine_lib.build(config, [], tmp_path, said.append)
    micro_config = config_lib.load(
        str(_ROOT / 'configs' / 'tiny.py'), [
            *micro.OVERRIDES, 'mesh=(8, 1, 1)', 'retriever.web=bing',
            f'retriever.web_url={server.url}/search',
            f'retriever.cache={tmp_path}/web.db'])
    parts = assembly.build(
        micro_config, tmp_path / 'run', training=False, say=said.append)
    found = engine.search(['Ada', 'Ada'], 1)
    assert parts.retriever.search(['Ada', 'Ada'], 1) == found
    assert not (tmp_path / 'run').exists()  # no index is built
    assert found == [[Document(
        'https://a.test/a', 'Ada Lovelace', 'Ada was born in London')]] * 2
    assert 'bing' in said[0] and fake_services.KEY not in said[0]
    spec = f'bing:{server.url}/search'
    before = server.total
    same = engines.make(
        spec, [], limits=dict(cache=tmp_path / 'web.db', per_second=0))
    assert same.search(['Ada'], 1) == found[:1] and server.total == before
    # Another k is another request.
    assert same.search(['Ada'], 3) == found[:1] and server.total == before + 1
  for field, value, problem in (
      ('factory', 'a:b', 'leave one out'), ('placement', 'sharded', 'split'),
      ('web', 'google', 'none of')):
    wrong = config.copy_and_resolve_references()
    wrong.retriever[field] = value
    with pytest.raises(ValueError, match=problem):
      engine_lib.build(wrong, [], tmp_path, said.append)
  config.retriever.web = ''
  with pytest.raises(ValueError, match='retriever.cache'):
    engine_lib.build(config, [], tmp_path, said.append)


def _fill(path, first, ready):
  cache = client.Cache(path)
  ready.put(os.getpid())
  for i in range(first, 1_000_000):
    cache.keep(['q', i % 400], {'a': i % 400, 'long': 'x' * 3000})


def test_several_processes_share_a_cache_and_survive_a_kill(tmp_path):
  context = multiprocessing.get_context('spawn')
  ready = context.Queue()
  processes = [
      context.Process(target=_fill, args=(tmp_path / 'c', first, ready))
      for first in (0, 100)]
  for process in processes:
    process.start()
  for _ in processes:
    ready.get(timeout=60)
  cache = client.Cache(tmp_path / 'c')
  end = time.monotonic() + 30
  while len(cache) < 400 and time.monotonic() < end:
    time.sleep(0.02)
  for process in processes:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
  assert len(cache) == 400
  again = client.Cache(tmp_path / 'c')
  assert all(again.find(['q', i])['a'] == i for i in range(400))
  assert again.find(['q', 400]) is None
