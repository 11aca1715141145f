"""Several processes, one run: how they meet, talk, agree and part.

    --coordinator=HOST:PORT --num_processes=N --process_id=I, or --distributed
        │ meet: who is there, and who is not
        ▼
    exchange: small host objects to all, while the devices compute
    barrier · first · agree · share: made of it
        ▼
    the way out: all wait for the last, or hear at once which of them failed

Arrays travel between devices inside jitted functions; this module moves what
the hosts know. It uses the key-value store of jax's coordination service and
not `multihost_utils`, which is made of device programs: those would queue
behind the chunk that is being decoded, and must not be started by two threads.

Values are pickled, and the coordinator's port believes whoever reaches it: it
belongs on a private network.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import json
import os
import pickle
import secrets
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed

from stepsearch import paths
from stepsearch import rendezvous

FLAGS = (
    'coordinator', 'num_processes', 'process_id', 'distributed',
    'barrier_timeout')
TIMEOUT = 300.0  # seconds that processes wait for one another
_PULSE = 1.0  # seconds after which a wait looks whether the run goes on
_ROOM = 'stepsearch'  # of our keys
_GRACE = 10.0  # seconds that a process has to end once another has failed
# What is said between processes, besides why one has failed:
_ENDED = 'ended'  # on the way out of a run that went well
_STOP = 'stop'


class _Run:
  """This process among the others, from `joined` on.

  Process 0 keeps a connection to each of them. All that is ever said there is
  that all should stop, and how a process ends; one that is killed says nothing,
  but its connection ends with it, so that the others know at once.
  """

  def __init__(self, client: Any, index: int, hosts: list[str],
               links: dict[int, socket.socket], timeout: float):
    self.client = client
    self.index = index
    self.hosts = hosts
    self.timeout = timeout
    self.broken: str | None = None  # why the run cannot go on
    self.code = 0  # that this process ends with
    self._links = links
    self._sequence: dict[str, int] = {}  # exchanges by channel
    self._ticking = threading.Lock()
    self._tick = 0
    self._stopping = False
    self._stop_at: int | None = None  # tick
    self._ended = threading.Event()
    self._listeners = [
        threading.Thread(target=self._listen, args=item, daemon=True)
        for item in links.items()]
    for thread in self._listeners:
      thread.start()

  def name(self, index: int) -> str:
    return f'process {index} on {self.hosts[index]}'

  def exchange(self, value, channel, timeout):
    sequence = self._sequence[channel] = self._sequence.get(channel, -1) + 1
    key = lambda i, s=sequence: f'{_ROOM}/{channel}/{s}/{i}'
    everyone = range(len(self.hosts))
    deadline = time.monotonic() + timeout
    found = {self.index: value}
    try:
      self.client.key_value_set_bytes(key(self.index), pickle.dumps(value))
      while missing := [i for i in everyone if i not in found]:
        late, broken = time.monotonic() > deadline, self.broken
        for i in missing if late else missing[:1]:
          got = self._get(key(i))
          if got is not None:
            found[i] = pickle.loads(got)
          elif broken:
            raise ValueError(broken)
        if late and missing == [i for i in everyone if i not in found]:
          raise ValueError(
              f'{" and ".join(map(self.name, missing))} did not arrive at '
              f'"{channel}" within {timeout:.0f} s: look at what was printed '
              'there; if it is only slow, raise --barrier_timeout.')
      if sequence:
        # Whoever has written this exchange has read the one before.
        self.client.key_value_delete(key(self.index, sequence - 1))
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(self.broken or (
          f'{self.name(0)} does not answer any more: look at what was printed '
          'there, and start all processes again.')) from error
    return [found[i] for i in everyone]

  def _get(self, key):
    """The value of a key, None if it has not come within a pulse."""
    try:
      return self.client.blocking_key_value_get_bytes(key, int(_PULSE * 1000))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' in str(error):
        return None
      raise

  def _listen(self, other, link):
    while (said := rendezvous.receive(link)) == _STOP:
      self._begin_to_stop()
    if said != _ENDED and not self._ended.is_set():
      reason = said or (
          f'{self.name(other)} is gone: it was killed, or its host is down; '
          'look at what was printed there, and start all processes again.')
      if not said and self.index:
        # jax, whose service was there, is about to abort with a stack trace.
        self._exit(reason)
      self._break(reason)
    while said is not None:  # `linger` waits for the end of the connection
      said = rendezvous.receive(link)

  def _break(self, reason):
    if self.broken:
      return
    self.broken = reason
    self._say(reason)
    # The main thread may wait for a device program that others have left.
    if not self._ended.wait(_GRACE):
      self._exit(reason)

  def _say(self, text):
    for link in self._links.values():
      rendezvous.send(link, text)

  def _exit(self, reason):
    print('error:', reason, file=sys.stderr, flush=True)
    os._exit(1)

  def ask_to_stop(self) -> None:
    if self.index:
      self._say(_STOP)  # process 0 passes it on
    else:
      self._begin_to_stop()

  def _begin_to_stop(self):
    if self._stopping:
      return
    self._stopping = True
    if self.index == 0:
      self._say(_STOP)
    threading.Thread(target=self._find_where_to_stop, daemon=True).start()

  def _find_where_to_stop(self):
    # Not in the main thread, which may need another process to go on before it
    # comes to its next tick. The lock keeps all at the ticks that they tell.
    with self._ticking, contextlib.suppress(ValueError):
      self._stop_at = 1 + max(self.exchange(self._tick, 'stop', self.timeout))

  def stop_requested(self, tick: int) -> bool:
    with self._ticking:
      self._tick = tick
      return self._stop_at is not None and tick >= self._stop_at

  def end(self) -> None:
    """Leaves a run that went well."""
    self._ended.set()
    self._say(_ENDED)

  def fail(self, error: BaseException) -> None:
    """Tells the others why this process ends."""
    self.code = 130 if isinstance(error, KeyboardInterrupt) else 1
    text = ' '.join(str(error).split())
    if not isinstance(error, (ValueError, FloatingPointError, OSError)):
      text = f'{type(error).__name__} {text}'
    self._ended.set()
    self._say(self.broken or f'{self.name(self.index)} has stopped: {text}')
    # Python, on its way out, may wait for a thread that waits for the others.
    timer = threading.Timer(3 * _GRACE, os._exit, [self.code])
    timer.daemon = True
    timer.start()

  def linger(self) -> None:
    """Keeps process 0, with jax' service in it, until the others have ended."""
    deadline = time.monotonic() + 2 * _GRACE
    for thread in self._listeners if self.index == 0 else ():
      thread.join(max(deadline - time.monotonic(), 0))


_RUN: _Run | None = None


def index() -> int:
  """Which of the processes this is; asking does not start the devices."""
  return _RUN.index if _RUN else 0


def count() -> int:
  """How many processes have joined."""
  return len(_RUN.hosts) if _RUN else 1


def exchange(
    value: Any, channel: str = 'main', timeout: float | None = None
) -> list[Any]:
  """Gives every process the values of all of them, by process.

  Args:
    value: anything that pickles, up to some megabytes.
    channel: exchanges are matched by their order within a channel, one thread
      at a time; threads that run beside each other need channels of their own.
    timeout: seconds to wait for the others, --barrier_timeout by default.

  Raises:
    ValueError: names the processes, and their hosts, that did not arrive, or
      have failed, or are gone.
  """
  if _RUN is None:
    return [value]
  return _RUN.exchange(value, channel, timeout or _RUN.timeout)


def barrier(name: str, timeout: float | None = None) -> None:
  """Returns once all processes are here; arguments, errors as of `exchange`."""
  exchange(None, name, timeout)


@contextlib.contextmanager
def first(name: str) -> Iterator[None]:
  """Process 0 runs the body first, however long it takes, then all others.

  They find what it has made.
  """
  if index():
    barrier(name, float('inf'))
  yield
  if not index():
    barrier(name)


def agree(what: str, value: Mapping[str, Any]) -> None:
  """Refuses processes that were not started alike.

  Args:
    what: the value is, for the message.
    value: JSON; mappings may hold mappings.

  Raises:
    ValueError: names the process, the first leaf that differs, both values.
  """
  text = json.dumps(value, sort_keys=True)
  if len(set(exchange(hashlib.sha256(text.encode()).hexdigest()))) == 1:
    return
  read = [json.loads(text) for text in exchange(text)]
  for other, theirs in enumerate(read):
    if found := _difference(what, read[0], theirs):
      name, first_value, other_value = found
      raise ValueError(
          f'{name} is {other_value} in {_RUN.name(other)} and {first_value} in '
          f'{_RUN.name(0)}: start all processes with the same code, files and '
          'flags, --process_id apart.')


def _difference(name, one, other) -> tuple[str, str, str] | None:
  """Name and texts of the first leaf in which two JSON values differ."""
  if one == other:
    return None
  if not isinstance(one, dict) or not isinstance(other, dict):
    return name, json.dumps(one), json.dumps(other)
  for key in sorted(one.keys() | other.keys()):
    if key not in one or key not in other:
      return f'{name}.{key}', *(
          json.dumps(x[key]) if key in x else 'absent' for x in (one, other))
    if found := _difference(f'{name}.{key}', one[key], other[key]):
      return found
  return None


def ask_to_stop() -> None:
  """Lets `stop_requested` become true in all processes; for signal handlers."""
  _RUN.ask_to_stop()


def stop_requested(tick: int) -> bool:
  """Whether several processes are to stop at this tick, for one was asked to.

  All of them come here at every tick, counted from 1, and are told to stop at
  the same: the one after the latest that any of them had reached.

  `multihost_utils.reached_preemption_sync_point` would do the same, were it not
  that Orbax calls it too, with numbers of its own, at every save.
  """
  return _RUN.stop_requested(tick)


def share(directory: paths.Path, flag: str) -> None:
  """Refuses a directory that not all processes see.

  Args:
    directory: exists, as process 0 sees it.
    flag: that named it.

  Raises:
    ValueError: names the processes that do not see it.
  """
  if _RUN is None:
    return
  token, probe = exchange(secrets.token_hex(8))[0], directory / '.shared'
  if _RUN.index == 0:
    paths.write(probe, token)
  barrier('share')
  try:
    with paths.explained(probe):
      sees = probe.exists() and probe.read_text() == token
  except ValueError as error:
    sees = str(error)
  found = exchange(sees)
  blind = [i for i, x in enumerate(found) if not x]
  if _RUN.index == 0:
    with paths.explained(probe):
      probe.unlink()
  for i, x in enumerate(found):
    if isinstance(x, str):
      raise ValueError(f'--{flag}={directory}: in {_RUN.name(i)} {x}')
  if blind:
    raise ValueError(
        f'--{flag}={directory}: {" and ".join(map(_RUN.name, blind))} cannot '
        f'see what {_RUN.name(0)} writes there; several processes need one '
        'directory for all: on a file system that they share, or '
        'gs://bucket/path.')


def define_flags() -> Callable[[], contextlib.AbstractContextManager[None]]:
  """Defines the flags of an entry point; returns `joined` as they say."""
  from absl import flags

  coordinator = flags.DEFINE_string(
      'coordinator', None, 'HOST:PORT of process 0, where several processes '
      'meet; with --num_processes and --process_id.')
  num_processes = flags.DEFINE_integer(
      'num_processes', None, 'Processes of this run.')
  process_id = flags.DEFINE_integer(
      'process_id', None, 'Which of them this is, from 0.')
  automatic = flags.DEFINE_bool(
      'distributed', False, 'Take these three from the environment: a TPU VM, '
      'Slurm, Open MPI.')
  timeout = flags.DEFINE_float(
      'barrier_timeout', TIMEOUT, 'Seconds that processes wait for one another '
      'before the run ends and names those that are missing.')
  return lambda: joined(
      coordinator.value, num_processes.value, process_id.value,
      automatic=automatic.value, timeout=timeout.value)


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None,
    *, automatic: bool = False, timeout: float = TIMEOUT,
) -> Iterator[None]:
  """Joins the other processes for the body, before jax touches its devices.

  With neither the three numbers nor `automatic` there are no others. At the end
  of the body all wait for the last one; where it raises, the others are told
  why, and end too.

  Args:
    coordinator: HOST:PORT, at which process 0 listens.
    num_processes: all of them.
    process_id: of this one, from 0.
    automatic: find the three in the environment, as jax does.
    timeout: seconds, here and by default in `exchange`.

  Raises:
    ValueError: arguments that are missing, out of range or taken; processes
      that do not arrive, by number.
  """
  global _RUN
  coordinator, num_processes, process_id = _arguments(
      coordinator, num_processes, process_id, automatic, timeout)
  if num_processes == 1:
    yield
    return
  hosts, links = rendezvous.meet(
      coordinator, num_processes, process_id, timeout)
  # It would take SIGTERM for itself.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      coordinator, num_processes, process_id,
      coordinator_bind_address=(
          coordinator if rendezvous.is_loopback(coordinator) else None))
  run = _RUN = _Run(
      jax_distributed.global_state.client, process_id, hosts, links, timeout)
  atexit.register(_leave, run)
  try:
    try:
      yield
    except SystemExit as error:
      if error.code:
        raise
    barrier('end')
  except jax.errors.JaxRuntimeError as error:
    # A device program that another process has left? Then we hear of it.
    until = time.monotonic() + 2 * _PULSE
    while not run.broken and time.monotonic() < until:
      time.sleep(_PULSE / 10)
    run.fail(error)
    if run.broken:
      raise ValueError(run.broken) from error
    raise
  except BaseException as error:
    run.fail(error)
    raise
  else:
    run.end()
  finally:
    _RUN = None


def _leave(run):
  """Ends a process that has failed; jax would wait for the others first."""
  if run.code:
    run.linger()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(run.code)


def _arguments(coordinator, num_processes, process_id, automatic, timeout):
  named = {'coordinator': coordinator, 'num_processes': num_processes,
           'process_id': process_id}
  given = [f'--{name}' for name, value in named.items() if value is not None]
  missing = [f'--{name}' for name, value in named.items() if value is None]
  if automatic:
    if given:
      raise ValueError(
          f'--distributed finds out itself what {" and ".join(given)} would '
          'say: leave one or the other out.')
    coordinator, num_processes, process_id, _ = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None, None,
            int(timeout)))
    if None in (coordinator, num_processes, process_id):
      raise ValueError(
          '--distributed: this is none of the environments that jax knows (a '
          'TPU VM, Slurm, Open MPI, Kubernetes): give --coordinator, '
          '--num_processes and --process_id.')
    return coordinator, num_processes, process_id
  if not given:
    return None, 1, 0
  if missing:
    raise ValueError(
        f'{" and ".join(given)} without {" and ".join(missing)}: several '
        'processes need all three, a single one none.')
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise ValueError(
        f'--process_id={process_id} --num_processes={num_processes}: processes '
        'are numbered from 0 to num_processes - 1.')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(
        f'--coordinator={coordinator}: HOST:PORT is expected, the address of '
        'process 0 and a free port there.')
  return coordinator, num_processes, process_id
