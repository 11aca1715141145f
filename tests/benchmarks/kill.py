"""Kills runs at random moments; they must end as the one that was left alone.

    python -m tests.benchmarks.kill --times=5 [--gs] [--seed=0]

The cut-down tiny config (`tests.micro`) is run once to its end. Then the same
command is stopped again and again, and goes on each time: in turn by SIGKILL
while Orbax is writing, by SIGKILL at a random moment, and by SIGTERM, after
which it has to exit with 0 within 30 seconds. Parameters, optimizer states,
metrics.jsonl (times and rates excepted), evaluations and transcripts are then
compared bit for bit. With --gs all of it, compiled programs too, lies in an
emulated store.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings

from absl import app
from absl import flags
from absl import logging

from tests import emulator
from tests import micro

_ROOT = pathlib.Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds that SIGTERM is given
# Everything that was compiled is kept.
_QUICK = {
    'JAX_PLATFORMS': 'cpu', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
_NOISE = 'google_auth_provider'  # TensorStore says how it was told to log in


class _Run:
  """A process of `stepsearch.train`, watched."""

  def __init__(self, workdir: str, compiled: str, environment: dict[str, str]):
    self.lines: list[str] = []
    self.begun = threading.Event()  # a first line was printed, or it has ended
    self.start = 0.0  # when
    self._process = subprocess.Popen(
        [sys.executable, '-m', 'stepsearch.train', '--config=configs/tiny.py',
         f'--workdir={workdir}', f'--config.compilation_cache={compiled}',
         *(f'--config.{leaf}' for leaf in micro.OVERRIDES),
         '--config.checkpoint.every=1'],
        cwd=_ROOT, env=environment | _QUICK, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    self._errors: list[str] = []
    self._readers = [
        threading.Thread(target=read, args=pipe, daemon=True)
        for read, pipe in (
            (self._read, (self._process.stdout, self.lines)),
            (self._read, (self._process.stderr, self._errors)))]
    for reader in self._readers:
      reader.start()

  def _read(self, pipe, lines):
    for line in pipe:
      lines.append(line)
      self._begin(lines)
    self._begin(lines)

  def _begin(self, lines):
    if lines is self.lines and not self.begun.is_set():
      self.start = time.monotonic()
      self.begun.set()

  def wait(self, seconds: float) -> bool:
    """Waits; returns whether it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(seconds)
    return self._process.returncode is not None

  def send(self, number: int) -> None:
    """Sends a signal."""
    self._process.send_signal(number)

  def end(self, *expected: int, seconds: float = 900.0) -> int:
    """Waits for the end, which must be quiet and with one of these codes."""
    try:
      code = self._process.wait(seconds)
    finally:
      self._process.kill()
      for reader in self._readers:
        reader.join()
    errors = ''.join(line for line in self._errors if _NOISE not in line)
    assert code in expected and (not errors or code == -signal.SIGKILL), (
        code, errors, self.lines[-3:])
    return code


def saving(workdir: str, environment: dict[str, str]) -> set[str]:
  """The checkpoints that are being written, or were when a run was killed."""
  if '://' not in workdir:
    root = pathlib.Path(workdir)
    return {
        path.name for folder in (root, root / 'checkpoints')
        for path in folder.glob('*.orbax-checkpoint-tmp*')}
  bucket, _, prefix = workdir.removeprefix('gs://').partition('/')
  with urllib.request.urlopen(
      f'{environment["STORAGE_EMULATOR_HOST"]}/storage/v1/b/{bucket}/o',
      timeout=30) as answer:
    names = [item['name'] for item in json.load(answer).get('items', ())]
  step = re.compile(rf'{prefix}/(?:reference|checkpoints/\d+)/')
  begun = {match[0] for name in names if (match := step.match(name))}
  return {name for name in begun if f'{name}commit_success.txt' not in names}


@dataclasses.dataclass
class Stop:
  """A way to stop a run.

  Attributes:
    number: of the signal.
    due: run -> whether now is the moment; asked every 20 ms.
    when: in words.
  """

  number: int
  due: Callable[[_Run], bool]
  when: str

  def __call__(self, run: _Run) -> bool:
    """Stops it; returns whether it had not ended before."""
    run.begun.wait()
    while not self.due(run):
      if run.wait(0.02):
        return False
    run.send(self.number)
    if self.number == signal.SIGKILL:
      return run.end(-signal.SIGKILL, 0) != 0
    code = run.end(0, -signal.SIGTERM, seconds=_PATIENCE)
    if run.lines[-1].startswith('or:'):
      return False  # too late: it was on its way out
    assert code == 0, code
    assert 'stopped: the same command' in run.lines[-1], run.lines[-3:]
    return True


def while_saving(
    workdir: str, environment: dict[str, str], skip: int
) -> Callable[[_Run], bool]:
  """The moment at which Orbax writes, after so many other such moments."""
  known = saving(workdir, environment)
  seen: list[str] = []

  def due(_):
    fresh = saving(workdir, environment) - known
    known.update(fresh)
    seen.extend(fresh)
    return len(seen) > skip

  return due


def _random_stop(
    workdir: str, environment: dict[str, str], dice: random.Random,
    seconds: float, number: int,
) -> Stop:
  if number % 3 == 0:
    skip = dice.randrange(4)
    return Stop(
        signal.SIGKILL, while_saving(workdir, environment, skip),
        f'in its save {skip + 1}')
  moment = dice.uniform(0, seconds)
  return Stop(
      signal.SIGKILL if number % 3 == 1 else signal.SIGTERM,
      lambda run: time.monotonic() > run.start + moment,
      f'{moment:.1f} s after its first line')


def _outcome(workdir: str) -> dict[str, object]:
  """All that has to be equal, by name."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  from stepsearch import metrics
  from stepsearch import paths

  root = paths.Path(workdir)
  steps = [int(path.name) for path in (root / 'checkpoints').iterdir()]
  with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of shardings, which numpy has not
    state = reader.restore(root / 'checkpoints' / str(max(steps)) / 'state')
    reference = reader.restore(root / 'reference')
  array = lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes())
  found = {
      f'state{jax.tree_util.keystr(path)}': array(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  assert jax.tree.map(array, state['actor']['params']) != jax.tree.map(
      array, reference), 'nothing was learnt'
  for row in metrics.read(root / 'metrics.jsonl'):
    found[f'row {row["step"]}'] = {
        name: value for name, value in row.items()
        if not name.startswith(micro.UNREPEATABLE)}
  for path in (root / 'transcripts').iterdir():
    found[path.name] = path.read_bytes()
  for name in ('before.json', 'eval.json'):
    found[name] = (root / name).read_text()
  return found


def compare(
    workdir: str, new_workdir: Callable[[], str], compiled: str,
    environment: dict[str, str], times: int, next_stop: Callable[..., Stop],
    say: Callable[[str], None] = print,
) -> None:
  """Stops runs and compares what they end as with one that was left alone.

  Args:
    workdir: of the run that was left alone.
    new_workdir: makes a place for one more run.
    compiled: folder of compiled programs.
    environment: of the processes.
    times: how often to stop.
    next_stop: (workdir, number) -> how to do it next.
    say: prints a line.

  Raises:
    AssertionError: a run ended otherwise.
  """
  expected = _outcome(workdir)
  stopped = 0
  while stopped < times:
    workdir = new_workdir()
    while stopped < times:
      stop = next_stop(workdir, stopped)
      start = time.monotonic()
      if not stop(_Run(workdir, compiled, environment)):
        break
      stopped += 1
      say(f'{signal.Signals(stop.number).name} {stopped}: {stop.when}, '
          f'{time.monotonic() - start:.1f} s after its start')
    else:
      _Run(workdir, compiled, environment).end(0)
    found = _outcome(workdir)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
      assert found[name] == value, f'{name} differs in {workdir}'
    say(f'ended: {len(found)} values are equal to those of the run that was '
        'left alone')


def alone(workdir: str, compiled: str, environment: dict[str, str]) -> float:
  """Runs to the end; returns the seconds since the first line."""
  run = _Run(workdir, compiled, environment)
  run.begun.wait()
  run.end(0)
  return time.monotonic() - run.start


def main(_) -> None:
  """Runs the command."""
  logging.set_verbosity(logging.FATAL)
  say = lambda line: print(line, flush=True)
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    environment = dict(os.environ) | {'XDG_CACHE_HOME': f'{folder}/cache'}
    if flags.FLAGS.gs:
      store = stack.enter_context(emulator.running())
      environment |= store
      os.environ.update(store)
      new_workdir = lambda: emulator.new_bucket(store) + '/run'
    else:
      new_workdir = lambda: tempfile.mkdtemp(dir=folder)
    compiled, workdir = new_workdir(), new_workdir()
    say(f'left alone: {alone(workdir, compiled, environment):.1f} s')
    seconds = alone(new_workdir(), compiled, environment)
    say(f'again, with what was compiled: {seconds:.1f} s')
    dice = random.Random(flags.FLAGS.seed)
    compare(
        workdir, new_workdir, compiled, environment, flags.FLAGS.times,
        lambda workdir, number: _random_stop(
            workdir, environment, dice, seconds, number), say)


if __name__ == '__main__':
  flags.DEFINE_integer('times', 5, 'How often to stop a run.', lower_bound=1)
  flags.DEFINE_bool('gs', False, 'In an emulated store instead of on disk.')
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  app.run(main)
