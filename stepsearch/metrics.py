"""What a run reports: metrics.jsonl, TensorBoard, timings, progress lines.

    device metrics of step n ─▶ Delayed (fetched after n + 1 is dispatched)
        ─▶ check_finite ─▶ Writer ─▶ workdir/metrics.jsonl, TensorBoard events
    host timings ─▶ Timer ─▶ Writer;   everything for the eye ─▶ Progress

A row of metrics.jsonl is `{"step": n, "reward/answer": 0.4, ...}`, floats all;
a value that is not finite is null there.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import sys
import time
from typing import Any, TextIO

import jax

from stepsearch import paths

# A non-finite value in a metric whose last name part contains one of these
# stops the run: from there on the parameters are lost.
_FATAL = ('loss', 'grad_norm', 'kl')


class Writer:
  """Appends one row per step to metrics.jsonl and to TensorBoard events.

  Several `write`s for one step make one row, written by `flush`. In a run of
  several processes only process 0 writes. Nothing is appended to an object of a
  store: there each `flush` writes both files anew.
  """

  def __init__(self, workdir: paths.Address, tensorboard: bool = True):
    self._path = paths.Path(workdir) / 'metrics.jsonl'
    self._rows = {}  # step -> {metric: float}, not yet written
    self._last = None  # last step written by this object
    self._active = jax.process_index() == 0
    self._text: str | None = None  # of an object in a store, once it is known
    self._tensorboard = None
    if self._active and tensorboard:
      self._events = paths.Mirror(self._path.parent / 'tensorboard')
      self._tensorboard = _tensorboard(self._events.local)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Adds scalars (Python, numpy or jax) to the row of `step`.

    Raises:
      RuntimeError: the row of this step or of a later one has been written.
    """
    if self._last is not None and step <= self._last:
      raise RuntimeError(
          f'metrics of step {step} came after step {self._last} was flushed')
    row = self._rows.setdefault(int(step), {})
    row.update({name: float(value) for name, value in metrics.items()})

  def flush(self, step: int | None = None) -> None:
    """Writes the rows up to and including `step`, all of them by default."""
    due = sorted(s for s in self._rows if step is None or s <= step)
    rows = [(s, self._rows.pop(s)) for s in due]
    if not rows:
      return
    self._last = due[-1]
    if not self._active:
      return
    self._append(''.join(_line(s, row) for s, row in rows))
    self._draw(rows)

  def amend(self, metrics: Mapping[str, Any]) -> None:
    """Adds metrics to the last row of the file, atomically."""
    if not self._active:
      return
    metrics = {name: float(value) for name, value in metrics.items()}
    *before, last = read(self._path)
    step = last.pop('step')
    self._rewrite([*before, {'step': step} | last | metrics])
    self._draw([(step, metrics)])

  def cut_back(self, step: int) -> None:
    """Drops the rows after `step` (on resume; -1 drops all), atomically.

    TensorBoard events stay: a resumed run repeats the same values.

    Raises:
      ValueError: metrics.jsonl holds a line that is not a row.
    """
    self._rows.clear()
    self._last = None
    if not self._active or not self._path.exists():
      return
    self._rewrite([row for row in read(self._path) if row['step'] <= step])

  def close(self) -> None:
    """Writes what is left and closes the event file."""
    self.flush()
    if self._tensorboard is not None:
      self._tensorboard.close()
      self._events.close()

  def _append(self, text):
    if not paths.is_remote(self._path):
      with self._path.open('a') as file:
        file.write(text)
      return
    if self._text is None:
      self._text = self._path.read_text() if self._path.exists() else ''
    self._text += text
    paths.write(self._path, self._text)

  def _rewrite(self, rows):
    self._text = ''.join(_line(row['step'], row) for row in rows)
    paths.write(self._path, self._text)

  def _draw(self, rows):
    """Writes (step, row) pairs as TensorBoard events."""
    if self._tensorboard is not None:
      for step, row in rows:
        self._tensorboard.write_scalars(step, row)
      self._tensorboard.flush()
      self._events.copy()


def _line(step, row):
  finite = {
      name: None if value is None or not math.isfinite(value) else value
      for name, value in row.items()}
  return json.dumps({'step': step} | finite) + '\n'


def read(path: paths.Address) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; a torn last line (a killed run) is ignored.

  Raises:
    ValueError: a line before the last is not a JSON object with a step.
  """
  lines = paths.Path(path).read_text().splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      row['step'] + 0
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break
      raise ValueError(
          f'{path}, line {number} is not a row of metrics ({line[:40]!r}): '
          'remove the line or choose another working directory.') from error
    rows.append(row)
  return rows


class Timer:
  """Accumulates wall seconds by section, as metrics `time/<section>`."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds = collections.defaultdict(float)

  @contextlib.contextmanager
  def section(self, name: str) -> Iterator[None]:
    """Times its body, also where that raises."""
    start = self._clock()
    try:
      yield
    finally:
      self._seconds[f'time/{name}'] += self._clock() - start

  def flush(self) -> dict[str, float]:
    """The seconds since the last flush."""
    seconds = dict(self._seconds)
    self._seconds.clear()
    return seconds


class Delayed:
  """Fetches the device metrics of a step after the next one is dispatched.

  Fetching waits for the device; one step late, it waits for work that the next
  step has already queued behind, and the device never idles. Drain it before
  a checkpoint is saved, so that a state that diverged is not.
  """

  def __init__(self):
    self._pending = None

  def push(
      self, step: int, metrics: Any
  ) -> tuple[int, dict[str, float]] | None:
    """Takes step n's device metrics, returns those of step n - 1 as floats."""
    previous = self.drain()
    self._pending = (step, metrics)
    return previous

  def drain(self) -> tuple[int, dict[str, float]] | None:
    """Fetches what is pending, if anything is."""
    if self._pending is None:
      return None
    step, metrics = self._pending
    self._pending = None
    fetched = jax.device_get(metrics)
    return step, {name: float(value) for name, value in fetched.items()}


class Profile:
  """Traces some steps with jax.profiler, for TensorBoard's profile tab."""

  def __init__(self, steps: Sequence[int], folder: paths.Address):
    """Takes the first and the last step, or () for none, and where to write."""
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._folder = folder
    self._written: paths.Mirror | None = None  # while a trace is under way

  @contextlib.contextmanager
  def step(self, step: int, state: Callable[[], Any]) -> Iterator[None]:
    """Marks its body as a step of the trace.

    Args:
      step: its number; the trace starts with the first that is asked for.
      state: what is computed last; waited for before the trace ends.
    """
    if step in self._steps and self._written is None:
      self._written = paths.Mirror(self._folder)
      jax.profiler.start_trace(self._written.local)
    with jax.profiler.StepTraceAnnotation('step', step_num=step):
      yield
      if step == max(self._steps, default=None):
        jax.block_until_ready(state())
        self.close()

  def close(self) -> None:
    """Ends a trace that is under way and writes it."""
    if self._written is not None:
      written, self._written = self._written, None
      jax.profiler.stop_trace()
      written.close()


def check_finite(
    step: int,
    metrics: Mapping[str, float],
    workdir: paths.Address,
    last_checkpoint: int | None = None,
) -> None:
  """Stops a run whose loss, gradient norm or KL is NaN or infinite.

  Args:
    step: the step that the metrics belong to.
    metrics: host floats by name.
    workdir: where the run lives, for the message.
    last_checkpoint: step of the latest checkpoint, if there is one.

  Raises:
    FloatingPointError: one paragraph: step, metric, and what to do.
  """
  for name, value in metrics.items():
    last = name.rsplit('/', 1)[-1]
    if any(word in last for word in _FATAL) and not math.isfinite(value):
      saved = (
          'no checkpoint was saved' if last_checkpoint is None else
          f'the last checkpoint, of step {last_checkpoint}, is sound and the '
          'same command resumes from it')
      raise FloatingPointError(
          f'step {step}: {name} is {value}, so the run in {workdir} has '
          f'diverged and was stopped; {saved}. Look at the rows before step '
          f'{step} in metrics.jsonl for what grew first, and start again in '
          'another working directory with a lower learning rate or more '
          'warm-up.')


class Progress:
  """Prints one line per step: rewards, EM, tokens/s and time left.

  On a terminal the lines of a `phase` overwrite each other; elsewhere (a file,
  a pipe) at most ten are printed and there are no control characters.
  """

  def __init__(
      self,
      num_steps: int,
      out: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    self._num_steps = num_steps
    self._out = out or sys.stdout
    self._clock = clock
    self._active = jax.process_index() == 0
    self._times = collections.deque(maxlen=21)  # of the last 20 steps
    self._em = None

  def start(self, em: float | None = None) -> None:
    """Marks the beginning of the first step; `em` is the last one known."""
    self._times.append(self._clock())
    self._em = em

  def step(
      self,
      step: int,
      rewards: Mapping[str, float],
      tokens_per_s: float,
      em: float | None = None,
  ) -> None:
    """Prints the line of a finished step.

    Args:
      step: number of finished steps.
      rewards: short name -> mean, in the order to be shown.
      tokens_per_s: sampled tokens per second.
      em: held-out exact match, where this step was evaluated; else the line
        repeats the last one known.
    """
    self._times.append(self._clock())
    self._em = self._em if em is None else em
    width = len(str(self._num_steps))
    shown = ' '.join(f'{name} {value:.3f}' for name, value in rewards.items())
    accuracy = '-' if self._em is None else f'{self._em:.3f}'
    self.line(
        f'step {step:{width}d}/{self._num_steps} | reward {shown} | '
        f'EM {accuracy} | {tokens_per_s:,.0f} tokens/s | '
        f'ETA {self._left(self._num_steps - step)}')

  @contextlib.contextmanager
  def phase(self, name: str, total: int) -> Iterator[Callable[..., None]]:
    """Progress of something that is not a step, such as warm-up.

    Yields:
      `tick(done, **values)`, to be called with the number of finished units.
    """
    terminal = self._out.isatty()
    start = self._clock()
    shown = [-math.inf, 0]  # when, and how many tenths were done

    def tick(done, **values):
      now = self._clock()
      tenths = 10 * done // total
      due = now - shown[0] >= 0.2 if terminal else tenths > shown[1]
      if not (due or done == total):
        return
      shown[:] = now, tenths
      left = (now - start) / max(done, 1) * (total - done)
      text = ' '.join(f'{key} {value:.3f}' for key, value in values.items())
      line = ' | '.join(filter(
          None, (f'{name} {done}/{total}', text, f'ETA {_duration(left)}')))
      if terminal and self._active:
        self._out.write(f'\r\x1b[K{line}')
        self._out.flush()
      elif not terminal:
        self.line(line)

    try:
      yield tick
    finally:
      if terminal and self._active and shown[0] > -math.inf:
        self._out.write('\n')

  def line(self, text: str) -> None:
    """Prints a line of its own."""
    if self._active:
      print(text, file=self._out, flush=True)

  def _left(self, steps: int) -> str:
    if len(self._times) < 2:
      return '-'
    rate = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
    return _duration(rate * steps)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def _tensorboard(directory: os.PathLike[str]) -> Any | None:
  """A clu writer, or None with a notice where TensorFlow is missing."""
  # TensorFlow prints its CPU features to stderr otherwise. Imported here
  # because it takes 5-6 CPU seconds.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  try:
    from clu import metric_writers
  except ImportError as error:
    print(
        f'No TensorBoard events ({error.name} cannot be imported): metrics go '
        'to metrics.jsonl only.', flush=True)
    return None
  return metric_writers.SummaryWriter(str(directory))
