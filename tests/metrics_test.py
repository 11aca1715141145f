"""metrics: rows, resume, the late flush, the stop, timings and progress."""

import importlib.util
import io
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import metrics
from stepsearch import paths


def _read(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_writes_for_a_step_merge_into_one_row(tmp_path):
  writer = metrics.Writer(tmp_path, tensorboard=False)
  writer.write(1, {'reward/answer': np.float32(0.5), 'rollout/turns': 2})
  writer.write(1, {'eval/em': jnp.float32(0.25)})
  writer.write(2, {'reward/answer': jnp.bfloat16(1.5), 'x': math.nan})
  assert not (tmp_path / 'metrics.jsonl').exists()
  writer.flush(1)
  rows = _read(tmp_path)
  assert rows == [
      {'step': 1, 'reward/answer': 0.5, 'rollout/turns': 2.0, 'eval/em': 0.25}]
  assert isinstance(rows[0]['step'], int)
  assert all(isinstance(v, float) for k, v in rows[0].items() if k != 'step')
  writer.close()
  assert _read(tmp_path)[1] == {'step': 2, 'reward/answer': 1.5, 'x': None}
  with pytest.raises(RuntimeError, match='step 2 was flushed'):
    writer.write(2, {'late': 1.0})


def test_cut_back_keeps_rows_up_to_the_restored_step(tmp_path):
  writer = metrics.Writer(tmp_path, tensorboard=False)
  for step in range(5):
    writer.write(step, {'a': step})
  writer.flush()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "a"')  # killed while writing
  resumed = metrics.Writer(tmp_path, tensorboard=False)
  resumed.cut_back(2)
  assert [row['step'] for row in _read(tmp_path)] == [0, 1, 2]
  resumed.write(3, {'a': 30})
  resumed.flush()
  assert [row['a'] for row in _read(tmp_path)] == [0, 1, 2, 30]
  assert metrics.read(tmp_path / 'metrics.jsonl') == _read(tmp_path)
  resumed.cut_back(-1)
  assert not _read(tmp_path)
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2'):
    metrics.Writer(tmp_path, tensorboard=False).cut_back(1)
  assert 'nonsense' in path.read_text()


def test_delayed_returns_the_previous_step():
  step_fn = jax.jit(lambda x: {'ppo/loss': x * 2})
  delayed = metrics.Delayed()
  assert delayed.push(1, step_fn(1.0)) is None
  assert delayed.push(2, step_fn(2.0)) == (1, {'ppo/loss': 2.0})
  assert delayed.drain() == (2, {'ppo/loss': 4.0})
  assert delayed.drain() is None


def test_a_loss_that_is_not_finite_stops_the_run():
  metrics.check_finite(1, {'ppo/policy_loss': 0.1, 'eval/em': math.nan}, 'w')
  for name, value in (
      ('ppo/policy_loss', math.nan), ('critic/loss', math.inf),
      ('ppo/grad_norm', math.inf), ('ppo/approx_kl', math.nan)):
    with pytest.raises(FloatingPointError) as error:
      metrics.check_finite(7, {name: value}, 'runs/x', last_checkpoint=5)
    message = str(error.value)
    assert '\n' not in message
    for part in ('step 7', name, 'runs/x', 'step 5', 'lower learning rate'):
      assert part in message


def test_timer_accumulates_and_starts_anew():
  now = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
  timer = metrics.Timer(clock=lambda: next(now))
  for _ in range(2):
    with timer.section('rollout'):
      pass
  with pytest.raises(KeyError), timer.section('update'):
    raise KeyError
  assert timer.flush() == {'time/rollout': 3.5, 'time/update': 0.25}
  assert not timer.flush()


def test_progress_line():
  now = [0.0]
  out = io.StringIO()
  progress = metrics.Progress(60, out=out, clock=lambda: now[0])
  progress.start()
  for step in (1, 2, 3):
    now[0] += 62.0
    em = 0.4 if step < 3 else None
    progress.step(step, {'answer': 0.5, 'gain': 0.25}, 1234.6, em=em)
  lines = out.getvalue().splitlines()
  assert lines[0].startswith('step  1/60 | reward answer 0.500 gain 0.250 | ')
  assert lines[2].endswith('EM 0.400 | 1,235 tokens/s | ETA 0:58:54')
  assert '\r' not in out.getvalue()


def test_phase_prints_at_most_ten_lines_into_a_file():
  now = [0.0]
  out = io.StringIO()
  progress = metrics.Progress(60, out=out, clock=lambda: now[0])
  with progress.phase('warm-up', 500) as tick:
    for done in range(1, 501):
      now[0] += 0.5
      tick(done, loss=1.0 / done)
  lines = out.getvalue().splitlines()
  assert len(lines) == 10
  assert lines[0] == 'warm-up 50/500 | loss 0.020 | ETA 0:03:45'
  assert lines[-1] == 'warm-up 500/500 | loss 0.002 | ETA 0:00:00'
  assert '\r' not in out.getvalue()


def test_phase_overwrites_its_line_on_a_terminal():
  out = io.StringIO()
  out.isatty = lambda: True
  progress = metrics.Progress(60, out=out)
  with progress.phase('warm-up', 2) as tick:
    tick(1)
    tick(2)
  assert out.getvalue().count('\r') == 2 and out.getvalue().endswith('\n')


_PROGRAM = """
import sys
{before}
from stepsearch import metrics
for workdir in sys.argv[1:]:
  writer = metrics.Writer(workdir)
  for step in range(2):
    writer.write(step, dict(a=step + 0.5))
    writer.flush()
  writer.amend(dict(b=2))
  writer.close()
"""


def _run(*workdirs, before=''):
  return subprocess.run(
      [sys.executable, '-c', _PROGRAM.format(before=before),
       *map(str, workdirs)],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      timeout=120, check=False,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def test_rows_in_a_store_are_gone_on_with_and_cut_back(bucket):
  workdir = paths.Path(bucket)
  for steps in (range(3), range(3, 5)):
    writer = metrics.Writer(workdir, tensorboard=False)
    for step in steps:
      writer.write(step, {'a': math.nan if step == 1 else step})
      writer.flush()
  assert [row['a'] for row in _read(workdir)] == [0, None, 2, 3, 4]
  resumed = metrics.Writer(workdir, tensorboard=False)
  resumed.cut_back(1)
  resumed.amend({'b': 1})
  resumed.write(2, {'a': 20})
  resumed.close()
  assert _read(workdir) == [
      {'step': 0, 'a': 0}, {'step': 1, 'a': None, 'b': 1},
      {'step': 2, 'a': 20}]


def _events(directory):
  """Reads (tag, step, value) from the one event file, without TensorFlow."""
  from tensorboard.compat.proto import event_pb2
  (path,) = directory.iterdir()
  data, events = path.read_bytes(), []
  while data:  # a record: length, its checksum, payload, its checksum
    (size,) = struct.unpack_from('<Q', data)
    event = event_pb2.Event.FromString(data[12:12 + size])
    data = data[12 + size + 4:]
    for value in event.summary.value:
      (number,) = struct.unpack('<f', value.tensor.tensor_content) if (
          value.tensor.tensor_content) else value.tensor.float_val
      events.append((value.tag, event.step, number))
  return events


def test_tensorboard_events_hold_the_rows_and_stderr_stays_empty(
    tmp_path, bucket):
  if importlib.util.find_spec('tensorflow') is None:
    pytest.skip('no TensorFlow: JSONL only')
  workdirs = [tmp_path, paths.Path(bucket) / 'run']
  done = _run(*workdirs)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
  for workdir in workdirs:
    assert _events(workdir / 'tensorboard') == [
        ('a', 0, 0.5), ('a', 1, 1.5), ('b', 1, 2)]
    assert _read(workdir) == [
        {'step': 0, 'a': 0.5}, {'step': 1, 'a': 1.5, 'b': 2}]


def test_without_tensorflow_there_is_a_notice_and_jsonl(tmp_path):
  done = _run(tmp_path, before="sys.modules['tensorflow'] = None")
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.count('\n') == 1 and 'metrics.jsonl only' in done.stdout
  assert len(_read(tmp_path)) == 2
