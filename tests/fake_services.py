"""Services on this machine that speak as paid ones do, and fail at times.

    /search         Serper's and Bing's web search, over a few documents
    /v1/chat/completions   a language model, from a function of the prompt

What each was asked is counted. A fault is drawn for every request from the
seed, the request and how often it has come, whatever the order of threads.
"""

import collections
import contextlib
import hashlib
import http.server
import json
import random
import re
import threading
import time
import urllib.parse

FAULTS = ('429', '500', 'slow', 'cut', 'no_json', 'wrong_shape')
KEY = 'sk-a-key-that-nobody-may-see'


class Services(http.server.ThreadingHTTPServer):
  """The server; `running` starts one."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(
      self, *, pages=(), write=None, faults=0.0, seed=0, slow=5.0,
      retry_after=1):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.pages, self.write = pages, write
    self.faults, self.seed, self.slow = faults, seed, slow
    self.retry_after = retry_after
    self.refuse = {}  # path -> status, for as long as it is set
    self.bad = ()  # texts that no request may hold
    self.delay = 0.0
    self.lock = threading.Lock()
    self.asked = collections.Counter()  # by request
    self.answered = collections.Counter()  # of these, in full
    self.faulty = collections.Counter()  # by fault
    self.times = []
    self.inside = self.most_inside = 0

  def handle_error(self, request, address):
    pass  # clients that have gone

  def chance(self, name, time):
    """Draws for a request that comes so many times."""
    return random.Random(hashlib.sha256(
        f'{self.seed} {name} {time}'.encode()).digest())

  @property
  def total(self):
    return sum(self.asked.values())


@contextlib.contextmanager
def running(**options):
  server = Services(**options)
  thread = threading.Thread(
      target=server.serve_forever, kwargs=dict(poll_interval=0.02))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def do_GET(self):  # noqa: N802
    path, _, query = self.path.partition('?')
    self._answer(path, dict(urllib.parse.parse_qsl(query)))

  def do_POST(self):  # noqa: N802
    length = int(self.headers['Content-Length'])
    self._answer(self.path, json.loads(self.rfile.read(length)))

  def _answer(self, path, asked):
    server = self.server
    name = json.dumps([path, asked], sort_keys=True)
    with server.lock:
      server.times.append(time.monotonic())
      server.asked[name] += 1
      server.inside += 1
      server.most_inside = max(server.inside, server.most_inside)
      chance = server.chance(name, server.asked[name])
    try:
      self._reply(server, path, asked, name, chance)
    finally:
      with server.lock:
        server.inside -= 1

  def _reply(self, server, path, asked, name, chance):
    time.sleep(server.delay)
    key = self.headers['X-API-KEY'] or (
        self.headers['Ocp-Apim-Subscription-Key']) or (
            self.headers.get('Authorization', '').removeprefix('Bearer '))
    if path in server.refuse or key != KEY:
      # As some do, the key is told back.
      return self._send(
          server.refuse.get(path, 401), {'error': f'your key {key} is no good'})
    if any(text in name for text in server.bad):
      return self._send(400, {'error': 'that is not answered here'})
    fault = None
    if chance.random() < server.faults:
      fault = chance.choice(FAULTS)
      with server.lock:
        server.faulty[fault] += 1
    if fault == '429':
      return self._send(
          429, {'error': 'slower'}, {'Retry-After': str(server.retry_after)})
    if fault == '500':
      return self._send(500, {'error': 'a fault of ours'})
    if fault == 'slow':
      time.sleep(server.slow)
      return self.close()
    answer = self._found(server, path, asked, key)
    if fault == 'wrong_shape':
      answer = chance.choice([[], {'organic': 'none'}, {'choices': []}, 'yes'])
    body = json.dumps(answer).encode()
    if fault == 'no_json':
      body = body[:len(body) // 2] + b'\xff}'
    if fault == 'cut':
      self.send_response(200)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body[:len(body) // 2])
      return self.close()
    if fault is None:
      with server.lock:
        server.answered[name] += 1
    return self._send(200, body)

  def close(self):
    self.close_connection = True

  def _send(self, status, body, headers=()):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _found(self, server, path, asked, key):
    if path.endswith('/chat/completions'):
      text = server.write(asked['messages'])
      return {
          'id': 'x', 'object': 'chat.completion', 'note': f'for {key}',
          'choices': [{'index': 0, 'finish_reason': 'stop', 'message': {
              'role': 'assistant', 'content': text}}],
          'usage': {
              'prompt_tokens': sum(
                  len(m['content'].split()) for m in asked['messages']),
              'completion_tokens': len(text.split())}}
    words = lambda text: set(re.findall(r'\w+', text.lower()))
    shared = lambda d: len(words(asked['q']) & words(f'{d.title} {d.text}'))
    ranked = sorted(filter(shared, server.pages), key=lambda d: -shared(d))
    if self.command == 'POST':
      return {'searchParameters': asked, 'organic': [
          {'title': d.title, 'link': f'https://a.test/{d.id}',
           'snippet': d.text, 'position': i}
          for i, d in enumerate(ranked[:asked['num']], 1)]}
    found = [
        {'name': d.title, 'url': f'https://a.test/{d.id}', 'snippet': d.text}
        for d in ranked[:int(asked['count'])]]
    return {'_type': 'SearchResponse'} | (
        {'webPages': {'value': found}} if found else {})
