"""Experiments, xmanager-style: a config, its sweep and an executor.

    python -m launch.xm_launch --executor=local --config=configs/tiny.py
        --workdir=runs/sweep [--parallel=2] [--config.num_steps=10]

A config file may define `sweep()`, which returns dicts {leaf: value}: one job
each, in a folder of --workdir that is named by them. Without it there is one
job. The same command again finishes what has not finished.

    local    processes of this machine, through xmanager where that is installed
             (launch/requirements-xmanager.txt) and plainly where it is not
    tpu_vm   `launch/tpu_vm.sh run --keep_alive` for each job on a TPU of its
             own, which is deleted at the end; the flags that say which TPU
             (--zone, --project, --topology, --spot, …) are given here as well
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import sys
import time
from typing import Any

from launch import tpu_vm
from stepsearch import config as config_lib

# bash -c SCRIPT LOG COMMAND…: the same process, with its output in a file.
_LOGGED = ('-c', 'exec "$@" >>"$0" 2>&1')


@dataclasses.dataclass(frozen=True)
class Job:
  """A point of the sweep.

  Attributes:
    name: its values, as text; '' for the only job of a config without a sweep.
    workdir: where the trainer keeps everything.
    command: what runs, as a list of arguments.
    log: gets what the command prints.
  """

  name: str
  workdir: str
  command: tuple[str, ...]
  log: pathlib.Path


def read_sweep(path_with_arg: str) -> list[dict[str, str]]:
  """The points of the `sweep()` of a config file, values as override texts.

  Raises:
    ValueError: no such file, or `sweep()` returns something else than dicts.
  """
  module, _ = config_lib.load_file(path_with_arg)
  if not hasattr(module, 'sweep'):
    return [{}]
  points = list(module.sweep())
  if not points or not all(isinstance(point, Mapping) for point in points):
    raise ValueError(
        f'--config={path_with_arg}: its sweep() has to return one or more '
        f"dicts such as {{'seed': 1}}, not {points!r}.")
  return [{leaf: _text(value) for leaf, value in point.items()}
          for point in points]


def _text(value: Any) -> str:
  """A value as the command line takes it."""
  if value is None or isinstance(value, bool):
    return str(value).lower()
  return value if isinstance(value, str) else repr(value)


def make_jobs(
    flags: argparse.Namespace, machine: Sequence[str]
) -> list[Job]:
  """The jobs of an experiment, checked before any of them starts.

  Args:
    flags: executor, config, overrides, workdir, experiment.
    machine: flags of tpu_vm.sh that say which TPU.

  Raises:
    ValueError: a flag, a leaf or a value will not do, for any of the jobs.
  """
  points = read_sweep(flags.config)
  logs = pathlib.Path(
      f'runs/launch/{flags.experiment}' if '://' in flags.workdir
      else flags.workdir)
  fixed = {override.partition('=')[0] for override in flags.overrides}
  jobs = []
  for i, point in enumerate(points):
    twice = sorted(fixed & point.keys())
    if twice:
      raise ValueError(
          f'--config.{twice[0]} is what sweep() of {flags.config} varies: drop '
          'it, or change the sweep.')
    values = [f'{leaf}={text}' for leaf, text in point.items()]
    config_lib.load(flags.config, [*flags.overrides, *values])
    name = re.sub(r'[^\w.=,+-]+', '_', ','.join(values))
    workdir = '/'.join(filter(None, [flags.workdir.rstrip('/'), name]))
    training = [
        f'--config={flags.config}', f'--workdir={workdir}',
        *(f'--config.{value}' for value in [*flags.overrides, *values])]
    if flags.executor == 'local':
      command = [sys.executable, '-m', 'stepsearch.train', *training]
    else:
      number = f'-{i}' if point else ''
      command = [
          'launch/tpu_vm.sh', 'run', '--keep_alive', '--delete_when_done',
          f'--name={flags.experiment}{number}', *machine, *training]
      tpu_vm.parse(command[1:])
    jobs.append(Job(
        name, workdir, tuple(command), logs / f'{name or "train"}.log'))
  names = [job.name for job in jobs]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(
          f'sweep() of {flags.config} has {names.count(name)} points that are '
          f'called {name}: their runs would share a workdir.')
  return jobs


def launch(jobs: Sequence[Job], parallel: int, experiment: str) -> list[Job]:
  """Runs the jobs, `parallel` at a time, to their ends.

  Returns:
    those that failed; each was reported with its command and its log.
  """
  for job in jobs:
    job.log.parent.mkdir(parents=True, exist_ok=True)
  by_xmanager = importlib.util.find_spec('xmanager') is not None
  run = _through_xmanager if by_xmanager else _through_processes
  how = 'xmanager' if by_xmanager else 'processes (xmanager is not installed)'
  print(f'{experiment}: {len(jobs)} jobs, {parallel} at a time, by {how}',
        flush=True)
  return asyncio.run(run(jobs, parallel, experiment))


async def _through_processes(jobs, parallel, experiment):
  del experiment

  async def execute(job):
    process = await asyncio.create_subprocess_exec(
        'bash', *_LOGGED, str(job.log), *job.command)
    try:
      code = await process.wait()
    except asyncio.CancelledError:
      process.terminate()
      await process.wait()
      raise
    return f'exit status {code}' if code else ''

  return await _all(jobs, parallel, execute)


async def _through_xmanager(jobs, parallel, experiment):
  from absl import flags
  from xmanager import xm
  from xmanager import xm_local

  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['xm_launch'])
  failed = None
  try:
    async with xm_local.create_experiment(experiment) as context:
      [executable] = context.package([xm.Packageable(
          xm.Binary(shutil.which('bash')), xm_local.Local.Spec())])

      async def execute(job):
        unit = await context.add(xm.Job(
            executable, xm_local.Local(experimental_stream_output=False),
            args=[*_LOGGED, str(job.log), *job.command]))
        try:
          await unit.wait_until_complete()
        except xm.ExperimentUnitFailedError as error:
          return str(error)
        return ''

      failed = await _all(jobs, parallel, execute)
  except RuntimeError:
    if not failed:  # on leaving, xmanager raises again what was reported
      raise
  return failed


async def _all(
    jobs: Sequence[Job],
    parallel: int,
    execute: Callable[[Job], Awaitable[str]],
) -> list[Job]:
  """Runs jobs through `execute`, which returns what went wrong; says so."""
  turn = asyncio.Semaphore(parallel)
  failed = []

  async def one(i, job):
    title = f'[{i}/{len(jobs)}] {job.name or job.workdir}'
    async with turn:
      print(f'{title}: started, log in {job.log}', flush=True)
      start = time.monotonic()
      problem = await execute(job)
      minutes, seconds = divmod(round(time.monotonic() - start), 60)
    if problem:
      failed.append(job)
      end = job.log.read_text(errors='replace').splitlines()[-15:]
      print(f'{title}: FAILED after {minutes}:{seconds:02d}, {problem}\n'
            f'  command: {shlex.join(job.command)}\n'
            f'  the end of {job.log}:\n    ' + '\n    '.join(end), flush=True)
    else:
      print(f'{title}: done in {minutes}:{seconds:02d}{_result(job)}',
            flush=True)

  await asyncio.gather(*(one(i, job) for i, job in enumerate(jobs, start=1)))
  return failed


def _result(job: Job) -> str:
  """Exact match before and after, of a finished run on this disk."""
  path = pathlib.Path(job.workdir) / 'eval.json'
  if not path.exists():
    return ''
  stored = json.loads(path.read_text())
  before, after = (
      stored[when]['greedy']['em'] for when in ('before', 'after'))
  return f' | EM {before:.3f} to {after:.3f}'


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Flags of this module, and those that say which TPU."""
  parser = tpu_vm.Parser(
      prog='python -m launch.xm_launch', allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      description=__doc__.partition('\n\n')[2])
  add = parser.add_argument
  add('--executor', choices=('local', 'tpu_vm'), default='local')
  add('--config', required=True, metavar='PATH.py[:variant]',
      help='--config.leaf=value overrides a leaf in all jobs')
  add('--workdir', required=True, help='folder of the folders of the jobs')
  add('--experiment', default='', help='name; default: that of the config')
  add('--parallel', type=int, default=0,
      help='jobs at a time; default: 1 of local, all of tpu_vm')
  add('--dry_run', action='store_true',
      help='print the commands, a line each, and run nothing')
  argv, overrides = config_lib.split_overrides(argv)
  flags, machine = parser.parse_known_args(argv)
  flags.overrides = overrides
  if machine and flags.executor == 'local':
    parser.error(f'the local executor knows no {machine[0]}')
  if flags.parallel < 0:
    raise ValueError(f'--parallel={flags.parallel}: give a positive number.')
  if not flags.experiment:
    name = pathlib.Path(flags.config.replace(':', '-').replace(',', '-'))
    flags.experiment = re.sub(
        r'[^a-z0-9]+', '-', name.name.replace('.py', '').lower())
  return flags, machine


def main(argv: Sequence[str]) -> None:
  """Runs one command line; exits with 1 if anything failed."""
  try:
    flags, machine = _parse(argv)
    jobs = make_jobs(flags, machine)
  except ValueError as error:
    raise SystemExit('error: ' + ' '.join(str(error).split())) from error
  if flags.dry_run:
    for job in jobs:
      if flags.executor == 'tpu_vm':
        tpu_vm.main([*job.command[1:], '--dry_run'])
      else:
        print(shlex.join(job.command))
    return
  parallel = flags.parallel or (1 if flags.executor == 'local' else len(jobs))
  try:
    failed = launch(jobs, parallel, flags.experiment)
  except KeyboardInterrupt:
    raise SystemExit(130) from None
  if failed:
    raise SystemExit(
        f'{len(failed)} of {len(jobs)} jobs failed: '
        + ', '.join(job.name or job.workdir for job in failed))


if __name__ == '__main__':
  main(sys.argv[1:])
