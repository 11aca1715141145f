"""Being told to stop: SIGTERM, as it comes before a machine is taken away.

    SIGTERM ─▶ listening() ─▶ Stop.check(), at safe points ─▶ Stopped

A learner step donates its state, so nobody may be interrupted anywhere: those
who are at a safe point ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading


class Stopped(BaseException):
  """The process was told to stop; as little of an error as Ctrl-C."""


class Stop:
  """What a process asks at its safe points.

  Attributes:
    requested: `requested(tick)`, whether to stop; ticks count the checks, so
      that several processes can agree on one.
    deferred: whether only `check` raises; before, the signal does at once.
  """

  def __init__(self, requested: Callable[[int], bool]):
    self.requested = requested
    self.deferred = False
    self._tick = 0

  def check(self) -> None:
    """Raises `Stopped` if the process was told to stop."""
    self._tick += 1
    if self.requested(self._tick):
      raise Stopped


@contextlib.contextmanager
def listening(
    several: tuple[Callable[[], None], Callable[[int], bool]] | None = None
) -> Iterator[Stop]:
  """Takes note of SIGTERM instead of dying of it.

  Outside of the main thread, where Python allows no handlers, nothing is
  noted.

  Args:
    several: of one of several processes, which have to stop at the same point:
      what tells all of them, and their common `Stop.requested`. Then no signal
      raises by itself.
  """
  told = []
  tell, requested = several or (
      lambda: told.append(1), lambda tick: bool(told))
  stop = Stop(requested)
  stop.deferred = several is not None

  def note(*_):
    tell()
    if not stop.deferred:
      raise Stopped

  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  previous = signal.signal(signal.SIGTERM, note)
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, previous)
