"""Processes that meet, talk, agree, fail and die; all of them real."""

from concurrent import futures
import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from stepsearch import distributed
from stepsearch import paths

_ROOT = pathlib.Path(__file__).parents[1]


def _port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def _start(arguments, devices=1, **environment):
  """One process; its output is collected by `_end`."""
  flags = (f'--xla_force_host_platform_device_count={devices} '
           '--xla_cpu_use_fusion_emitters=false')
  return subprocess.Popen(
      [sys.executable, *arguments], cwd=_ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': flags, **environment})


def _end(processes, timeout=120):
  """(exit code, stdout, stderr) of each."""
  with contextlib.ExitStack() as stack:
    for process in processes:
      stack.callback(process.kill)
    with futures.ThreadPoolExecutor() as pool:
      outputs = list(pool.map(
          lambda p: p.communicate(timeout=timeout), processes))
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs)]


# -- one process ---------------------------------------------------------------


def test_alone_there_is_nobody_to_wait_for(tmp_path):
  assert distributed.exchange('x') == ['x']
  assert (distributed.index(), distributed.count()) == (0, 1)
  distributed.barrier('b', 0)
  distributed.agree('config', {'a': 1})
  distributed.share(paths.Path(tmp_path), 'workdir')
  with distributed.first('a'):
    pass
  for arguments in ((None, None, None), ('127.0.0.1:1', 1, 0)):
    with distributed.joined(*arguments):
      assert distributed.count() == 1


@pytest.mark.parametrize('arguments, words', [
    (('h:1', 2, None), ('--coordinator and --num_processes without --process_',
                        'all three')),
    ((None, None, 1), ('--process_id without --coordinator and --num_proc',)),
    (('h:1', 2, 2), ('--process_id=2', 'from 0')),
    (('h:1', 2, -1), ('--process_id=-1',)),
    (('h:1', 0, 0), ('--num_processes=0',)),
    (('host', 2, 0), ('--coordinator=host:', 'HOST:PORT')),
    (('h:0', 2, 0), ('--coordinator=h:0',)),
    (('h:123456', 2, 0), ('--coordinator=h:123456',)),
])
def test_bad_flags_are_refused(arguments, words):
  with pytest.raises(ValueError) as error, distributed.joined(*arguments):
    pass
  for word in words:
    assert word in str(error.value)


def test_an_environment_that_says_nothing_is_refused(monkeypatch):
  monkeypatch.setattr(
      distributed.clusters.ClusterEnv, '_cluster_types', [])
  none = (None, None, None)
  with pytest.raises(ValueError, match='none of the environments'):
    with distributed.joined(*none, automatic=True):
      pass
  with pytest.raises(ValueError, match='--process_id.* leave one or the oth'):
    with distributed.joined(None, None, 1, automatic=True):
      pass


# -- meeting -------------------------------------------------------------------


def _meetings(calls):
  """What `_meet` returns or raises for each (port, count, index, seconds)."""
  def one(call):
    port, *rest = call
    try:
      return distributed._meet(f'127.0.0.1:{port}', *rest)[0]
    except ValueError as error:
      return str(error)

  with futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(one, calls))


def test_all_learn_who_has_come(monkeypatch):
  monkeypatch.setattr(
      socket, 'gethostname', lambda: threading.current_thread().name[-1])
  port = _port()
  found = _meetings([(port, 3, 2, 20), (port, 3, 1, 20), (port, 3, 0, 20)])
  assert found[0] == found[1] == found[2]
  assert sorted(found[0]) == ['0', '1', '2'] and found[0][0] == '2'


def test_who_does_not_come_is_named():
  port, host = _port(), socket.gethostname()
  zero, two = _meetings([(port, 4, 0, 1), (port, 4, 2, 20)])
  assert zero == two
  assert 'number 1, 3 did not come' in zero and f'2 on {host}' in zero


def test_who_comes_twice_or_to_another_run_is_named():
  port = _port()
  found = _meetings([(port, 3, 0, 20), (port, 3, 1, 20), (port, 3, 1, 20)])
  assert len(set(found)) == 1 and '--process_id=1 was given twice' in found[0]
  port = _port()
  found = _meetings([(port, 3, 0, 20), (port, 2, 1, 20)])
  assert len(set(found)) == 1
  assert '--num_processes=2, and process 0' in found[0]


def test_strangers_are_passed_over():
  port = _port()

  def visit():
    for said in (b'GET / HTTP/1.1\r\n', b'7\n', b''):
      for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
          with socket.create_connection(('127.0.0.1', port)) as stranger:
            stranger.sendall(said)
          break
        time.sleep(0.05)

  visitor = threading.Thread(target=visit)
  visitor.start()
  later = threading.Timer(1, lambda: _meetings([(port, 2, 1, 20)]))
  later.start()
  [found] = _meetings([(port, 2, 0, 20)])
  assert found == [socket.gethostname()] * 2
  visitor.join()
  later.join()


def test_a_coordinator_that_cannot_be_reached_is_named():
  port = _port()
  [found] = _meetings([(port, 2, 1, 0.5)])
  assert f'--coordinator=127.0.0.1:{port}' in found
  assert 'could not be reached' in found and 'Connection refused' in found
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    [found] = _meetings([(port, 2, 0, 1)])
    assert f'cannot listen at port {port}' in found
    hang_up = threading.Thread(target=lambda: server.accept()[0].close())
    hang_up.start()
    [found] = _meetings([(port, 2, 1, 5)])
    hang_up.join()
  assert 'a run is under way at this port' in found


# -- two processes -------------------------------------------------------------


def _talk(port, index, folder):
  """What each of two processes runs; prints a JSON list of what it saw."""
  index, folder = int(index), paths.Path(folder)
  seen = []

  def refused(function, *arguments):
    try:
      function(*arguments)
    except ValueError as error:
      seen.append(str(error))

  with distributed.joined(f'127.0.0.1:{port}', 2, index, timeout=60):
    seen.append((distributed.index(), distributed.count()))
    # Two threads, each with a channel of its own, in no common order.
    def several(channel):
      return [distributed.exchange((channel, i, index), channel)
              for i in range(20)]
    with futures.ThreadPoolExecutor() as pool:
      seen += list(pool.map(several, ['a', 'b'] if index else ['b', 'a']))
    arrays = distributed.exchange(np.full([10_000_000], index, np.int32))
    seen.append([(x.shape, int(x.min()), int(x.max())) for x in arrays])
    left = distributed._RUN.client.key_value_dir_get_bytes(
        f'{distributed._ROOM}/a/')
    seen.append(len(left))
    config = {'seed': 0, 'ppo.clip_eps': 0.2}
    distributed.agree('config', config)
    refused(distributed.agree, 'config', config | {
        'ppo.clip_eps': 0.2 + 0.1 * index})
    refused(distributed.agree, 'version', {'jax': 1} | {'orbax': 2} if index
            else {'jax': 1})
    distributed.share(folder, 'workdir')
    mine = folder / str(index)
    mine.mkdir()
    refused(distributed.share, mine, 'workdir')
    with distributed.first('files'):
      time.sleep(0.5 * (1 - index))
      seen.append((folder / 'made').exists())
      (folder / 'made').write_text('')
    distributed.barrier('all')
    if index:
      time.sleep(3)
      refused(distributed.barrier, 'late', 20)
    else:
      refused(distributed.barrier, 'late', 1)
    # A failure of one is told to the other, wherever it waits.
    print(json.dumps(seen), flush=True)
    if index:
      raise ValueError('the disk of this host is full.')
    refused(distributed.barrier, 'never', 60)
    print(json.dumps(seen[-1:]), flush=True)
    raise KeyboardInterrupt


def test_two_processes_talk_agree_and_fail_together(tmp_path):
  port = _port()
  start = time.monotonic()
  zero, one = _end([
      _start(['-c', 'import sys; from tests import distributed_test as t; '
              't._talk(*sys.argv[1:])', str(port), str(i), str(tmp_path)])
      for i in range(2)])
  assert time.monotonic() - start < 60
  host = socket.gethostname()
  lines = zero[1].splitlines()
  assert len(lines) == 2, zero
  for index, seen in enumerate((json.loads(lines[0]), json.loads(one[1]))):
    place, first, second, arrays, left, *rest = seen
    assert place == [index, 2]
    for channel, rows in zip('ab' if index else 'ba', (first, second)):
      assert rows == [
          [[channel, i, 0], [channel, i, 1]] for i in range(20)]
    assert arrays == [[[10_000_000], 0, 0], [[10_000_000], 1, 1]]
    assert left <= 3  # keys: what has been read is deleted
    clip, version, blind, made, *late = rest
    assert 'config.ppo.clip_eps is 0.3' in clip and '0.2 in process 0' in clip
    assert 'version.orbax is 2' in version and 'absent in proc' in version
    assert f'process 1 on {host} cannot see' in blind and '--workdir' in blind
    assert made == bool(index)
    if not index:
      [late] = late
      assert f'process 1 on {host} did not arrive at "late" within 1 s' in late
  [told] = json.loads(lines[1])
  assert told == (
      f'process 1 on {host} has stopped: the disk of this host is full.')
  assert (zero[0], one[0]) == (130, 1)
  assert 'disk of this host' in one[2]
