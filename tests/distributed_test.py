"""Processes that meet, talk, agree, fail and die; all of them real."""

from concurrent import futures
import contextlib
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import metrics
from stepsearch import passages
from stepsearch import paths
from stepsearch import rendezvous
from stepsearch import train
from stepsearch.data import datasets

_ROOT = pathlib.Path(__file__).parents[1]


SMALL = (
    'num_steps=4', 'batch_size=8', 'tensorboard=false', 'mesh=(4, 2, 1)',
    'model.embed=32', 'model.layers=1', 'model.heads=2', 'model.kv_heads=1',
    'model.head_dim=16', 'model.mlp=32', 'world.train_entities=24',
    'world.eval_entities=16', 'world.name_words=8', 'data.train_questions=40',
    'data.eval_questions=10', 'retriever.dimensions=128',
    'ppo.minibatch_size=8', 'ppo.microbatch_size=8', 'warmup.steps=12',
    'warmup.learning_rate=3e-2', 'warmup.batch_size=16',
    'demonstrations.count=40', 'rollout.lag=1',
    'rollout.length_multiple=288', 'eval.every=4',
    'eval.sampled=false', 'eval.batch_size=8', 'checkpoint.every=2')
# Of the machine.
_UNREPEATABLE = ('time/', 'rollout/tokens_per_s')


def _port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


class _Pair:
  """Two processes of four devices; their output goes to files."""

  def __init__(self, folder, arguments, flags=True, compiled=None):
    port = _port()
    environment = {
        'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu', 'HOME': str(folder),
        'XLA_FLAGS': '--xla_force_host_platform_device_count=4 '
                     '--xla_cpu_use_fusion_emitters=false'}
    if compiled is not None:  # as the suite does, see conftest.py
      environment |= {
          'JAX_COMPILATION_CACHE_DIR': str(compiled),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    self._files = [
        [folder / f'{kind}{i}.txt' for kind in ('out', 'err')]
        for i in range(2)]
    self.processes = []
    for i, (out, err) in enumerate(self._files):
      own = [f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
             f'--process_id={i}'] if flags else [str(port), str(i)]
      self.processes.append(subprocess.Popen(
          [sys.executable, *arguments, *own], cwd=_ROOT, env=environment,
          stdout=out.open('w'), stderr=err.open('w')))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self, index):
    """stdout and stderr so far, but for what gloo says."""
    return [
        # Its threads write into one another's lines.
        ''.join(line for line in file.read_text().splitlines(True)
                if line.strip() and 'Gloo' not in line
                and 'peer ranks' not in line)
        for file in self._files[index]]

  def until(self, line, seconds=400):
    """Returns once process 0 has printed the line."""
    deadline = time.monotonic() + seconds
    while line not in self.said(0)[0]:
      assert self.processes[0].poll() is None, self.said(0)
      assert time.monotonic() < deadline, self.said(0)
      time.sleep(0.1)

  def codes(self, seconds=400):
    """Waits for the end of both."""
    return [process.wait(seconds) for process in self.processes]


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


def test_an_environment_says_who_is_who(monkeypatch):
  for name, value in {
      'JOB_ID': '4711', 'STEP_NODELIST': 'node[03-05]', 'NTASKS': '3',
      'PROCID': '2', 'LOCALID': '0', 'STEP_NUM_NODES': '3'}.items():
    monkeypatch.setenv(f'SLURM_{name}', value)
  coordinator, *numbers = distributed._arguments(None, None, None, True, 5)
  assert coordinator.startswith('node03:') and numbers == [3, 2]


# -- meeting -------------------------------------------------------------------


def _meetings(calls):
  """What `meet` returns or raises for each (port, count, index, seconds)."""
  def one(call):
    port, *rest = call
    try:
      return rendezvous.meet(f'127.0.0.1:{port}', *rest)[0]
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


def _talk(folder, port, index):
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
    # Asked to stop, both do so at one tick, far as one may be ahead.
    for tick in range(1, 200):
      if distributed.stop_requested(tick):
        break
      if tick == 20 and index:
        distributed.ask_to_stop()
      if tick % 3 == 0:
        distributed.exchange(tick, 'ticks')
      time.sleep(0.01 * (1 + 3 * index * (tick % 2)))
    seen.append(distributed.exchange(tick))
    distributed.barrier('all')
    if index:
      time.sleep(3)
      refused(distributed.barrier, 'late', 20)
    else:
      refused(distributed.barrier, 'late', 1)
    refused(train.train, _config(f'seed={index}'), str(folder / 'run'))
    # A failure of one is told to the other, wherever it waits.
    print(json.dumps(seen), flush=True)
    if index:
      raise ValueError('the disk of this host is full.')
    refused(distributed.barrier, 'never', 60)
    print(json.dumps(seen[-1:]), flush=True)
    raise KeyboardInterrupt


def test_two_processes_talk_agree_and_fail_together(tmp_path):
  code = ('import sys; from tests import distributed_test as t; '
          't._talk(*sys.argv[1:])')
  with _Pair(tmp_path, ['-c', code, str(tmp_path)], flags=False) as pair:
    assert pair.codes(120) == [130, 1], [pair.said(0), pair.said(1)]
    zero, one = pair.said(0), pair.said(1)
  host = socket.gethostname()
  lines = zero[0].splitlines()
  for index, seen in enumerate((json.loads(lines[0]), json.loads(one[0]))):
    place, first, second, arrays, left, *rest = seen
    assert place == [index, 2]
    for channel, rows in zip('ab' if index else 'ba', (first, second)):
      assert rows == [
          [[channel, i, 0], [channel, i, 1]] for i in range(20)]
    assert arrays == [[[10_000_000], 0, 0], [[10_000_000], 1, 1]]
    assert left <= 3  # keys: what has been read is deleted
    clip, version, blind, made, (tick, same), *late, seed = rest
    assert 20 < tick == same < 60
    assert 'config.ppo.clip_eps is 0.3' in clip and '0.2 in process 0' in clip
    assert 'version.orbax is 2' in version and 'absent in proc' in version
    assert f'process 1 on {host} cannot see' in blind and '--workdir' in blind
    assert made == bool(index)
    if not index:
      [late] = late
      assert f'process 1 on {host} did not arrive at "late" within 1 s' in late
    assert f'config.seed is 1 in process 1 on {host} and 0 in' in seed
  [told] = json.loads(lines[1])
  assert told == (
      f'process 1 on {host} has stopped: the disk of this host is full.')
  assert 'disk of this host' in one[1]


# -- training ------------------------------------------------------------------


def _config(*overrides):
  return config_lib.load(f'{_ROOT}/configs/tiny.py', [*SMALL, *overrides])


def _rows(workdir):
  return [
      {name: value for name, value in row.items()
       if not name.startswith(_UNREPEATABLE)}
      for row in metrics.read(workdir / 'metrics.jsonl')]


def _check_rows(found, expected):
  """Losses and metrics of two processes are those of one."""
  assert len(found) <= len(expected)
  for row, other in zip(found, expected):
    assert row.keys() == other.keys()
    for name, value in row.items():
      assert value == pytest.approx(other[name], rel=1e-5, abs=3e-6), name


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """A run by this process alone, on eight devices."""
  if len(jax.devices()) < 8:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  workdir = tmp_path_factory.mktemp('one')
  train.train(_config(), str(workdir))
  assert sum(row['rollout/searches'] for row in _rows(workdir)[1:]) > 0
  return workdir


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


def _arguments(module, **flags):
  return ['-m', f'stepsearch.{module}', '--config=configs/tiny.py',
          *(f'--{name}={value}' for name, value in flags.items()),
          *(f'--config.{leaf}' for leaf in SMALL)]


def test_two_processes_train_as_one_and_stop_together(one, compiled, tmp_path):
  """SIGTERM to one of them; what they saved is gone on with by one."""
  run = tmp_path / 'run'
  with _Pair(
      tmp_path, _arguments('train', workdir=run), compiled=compiled) as pair:
    pair.until('step 2/4')
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes() == [0, 0], [pair.said(0), pair.said(1)]
    (out, _), (other, _) = pair.said(0), pair.said(1)
  stopped = len(_rows(run)) - 1
  assert f'goes on from step {stopped}, which is saved' in out
  assert stopped in (2, 3) and not other
  _check_rows(_rows(run), _rows(one))
  train.train(_config(), str(run))
  assert len(_rows(run)) == 5
  _check_rows(_rows(run), _rows(one))
  for step in (0, 4):
    name = f'transcripts/step_{step:06d}_greedy.jsonl'
    found, expected = (
        [json.loads(line)['text'] for line in (path / name).open()]
        for path in (run, one))
    assert found == expected


def test_a_process_that_is_killed_ends_the_run(one, compiled, tmp_path):
  """Two go on with what one has saved, until one of the two is killed."""
  run = shutil.copytree(one, tmp_path / 'run')
  shutil.rmtree(run / 'checkpoints' / '4')
  (run / 'eval.json').unlink()
  with _Pair(
      tmp_path, [*_arguments('train', workdir=run),
                 '--config.checkpoint.every=1'], compiled=compiled) as pair:
    pair.until('step 3/4')
    pair.processes[1].kill()
    assert pair.codes(60)[0] == 1
    out, err = pair.said(0)
  assert f'resumed {run} at step 2' in out
  assert re.fullmatch(
      rf'error: process 1 on {socket.gethostname()} is gone: .*\n', err), err
  assert len(_rows(run)) == 4
  _check_rows(_rows(run), _rows(one))


def test_two_processes_evaluate_with_half_an_index_each(
    one, compiled, tmp_path):
  with _Pair(
      tmp_path, [*_arguments('evaluate', checkpoint=one, output=tmp_path),
                 '--config.retriever.placement=sharded'],
      compiled=compiled) as pair:
    assert pair.codes() == [0, 0], [pair.said(0), pair.said(1)]
    assert not pair.said(1)[0]
  found = json.loads((tmp_path / 'eval.json').read_text())['results']['all']
  stored = json.loads((one / 'eval.json').read_text())['after']['greedy']
  assert found == pytest.approx(stored)
  rows, expected = (
      [json.loads(line) for line in path.open()] for path in (
          tmp_path / 'transcripts.jsonl',
          one / 'transcripts' / 'step_000004_greedy.jsonl'))
  assert rows == expected
  assert len(list((one / 'index').glob('shard-*-of-00002/index.json'))) == 2


def test_two_processes_play_every_question_of_a_set_once(
    one, compiled, tmp_path):
  """Also where they were stopped: what is done is not played again."""
  config = _config()
  parts = assembly.build(config, one, say=lambda _: None)
  (tmp_path / 'set').mkdir()
  passages.write(tmp_path / 'set/corpus.jsonl', parts.world.corpus)
  datasets.write_questions(tmp_path / 'set/questions.jsonl', parts.eval)
  out = tmp_path / 'out'
  arguments = _arguments(
      'evaluate', checkpoint=one, output=out,
      datasets=tmp_path / 'set/questions.jsonl',
      corpus=tmp_path / 'set/corpus.jsonl', compare=True)
  with _Pair(tmp_path, arguments, compiled=compiled) as pair:
    assert pair.codes() == [0, 0], [pair.said(0), pair.said(1)]
    assert not pair.said(1)[0]
  rows, expected = (
      [json.loads(line) for line in path.open()] for path in (
          out / 'transcripts.jsonl',
          one / 'transcripts' / 'step_000004_greedy.jsonl'))
  assert [row['number'] for row in rows] == list(range(10))
  for name in ('id', 'question', 'text', 'prediction', 'em', 'searches'):
    assert [row[name] for row in rows] == [row[name] for row in expected], name
  whole = json.loads((out / 'eval.json').read_text())
  assert whole['results']['set']['questions'] == 10
  assert 'nothing is published of set' in (out / 'comparison.md').read_text()
  # As a kill leaves it.
  paths.write(out / 'eval.json', json.dumps(whole | {'results': None}))
  lines = (out / 'transcripts.jsonl').read_text().splitlines(True)
  paths.write(out / 'transcripts.jsonl', ''.join(lines[4:]) + lines[0][:9])
  with _Pair(tmp_path, arguments, compiled=compiled) as pair:
    assert pair.codes() == [0, 0], [pair.said(0), pair.said(1)]
    assert 'set agent 4/4 | em' in pair.said(0)[0]
  assert (out / 'transcripts.jsonl').read_text() == ''.join(lines)
  again = json.loads((out / 'eval.json').read_text())
  assert again['results'] == whole['results']
