"""preemption: SIGTERM at once, at the next check, and where it is not heard."""

import os
import signal
import threading

import pytest

from stepsearch import preemption


def _terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def test_the_signal_stops_at_once_until_it_is_deferred():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(preemption.Stopped), preemption.listening():
    _terminate()
    signal.pause()
  with preemption.listening() as stop:
    stop.deferred = True
    stop.check()
    _terminate()
    while not stop.requested(0):
      pass
    for _ in range(2):  # whoever went on is told again
      with pytest.raises(preemption.Stopped):
        stop.check()
  assert signal.getsignal(signal.SIGTERM) == before
  assert not issubclass(preemption.Stopped, Exception)


def test_checks_are_counted_so_that_processes_can_agree():
  told, asked = [], []

  def agreed(tick):
    asked.append(tick)
    return bool(told) and tick == 3

  with preemption.listening((lambda: told.append(1), agreed)) as stop:
    _terminate()
    while not told:
      pass
    stop.check()
    stop.check()
    with pytest.raises(preemption.Stopped):
      stop.check()
  assert asked == [1, 2, 3] and told == [1]


def test_other_threads_can_listen_but_hear_nothing():
  before, said = signal.getsignal(signal.SIGTERM), []

  def listen():
    with preemption.listening() as stop:
      stop.check()
      said.append(signal.getsignal(signal.SIGTERM) == before)

  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert said == [True]
