"""TPU VMs by gcloud, and the loop that keeps a run alive.

    launch/tpu_vm.sh COMMAND --name=N --zone=Z --project=P --topology=v5e:4x4 …

    create   a queued resource with one node, both called N
    setup    waits until it is active; code and environment, on every host
    run      python -m stepsearch.train --distributed, detached, on every host;
             with --keep_alive everything: create, setup, run, watch, and again
             after a preemption, until the workdir says that it has finished
    status   of the resource, the trainers and the workdir
    logs     the end of a host's log
    stop     SIGTERM to the trainers, which save, and SIGKILL to those that stay
    delete   the node and the queued resource

Needs the standard library and gcloud only, so that it starts anywhere. What it
runs is data of launch/gcloud.py, which --dry_run prints instead.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

from launch import gcloud

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_COMMANDS = ('create', 'setup', 'run', 'status', 'logs', 'stop', 'delete')

# Queued resources in other states than these and ACTIVE are on their way.
_GONE = ('SUSPENDED', 'FAILED')
# Nodes that were taken away while their queued resource is still ACTIVE.
_LOST_NODE = ('PREEMPTED', 'TERMINATED', 'STOPPED')
# Looks in a row that may fail; twenty minutes without a network, by default.
_MAX_FAILURES = 40
# Seconds; trainers that end after so long have not failed at their start.
_LONG_RUN = 3600


class CommandFailed(ValueError):
  """A command that gcloud, git or a host did not carry out."""


class Launcher:
  """Carries out commands for one TPU."""

  def __init__(self, flags: argparse.Namespace):
    self._flags = flags
    self._commands = gcloud.Commands(flags)
    self._said = ''
    # Of keep_alive: the node has this call's code; a trainer was seen on it.
    self._prepared = self._watched = False
    # There is no queued resource because none was made yet, or we deleted it.
    self._to_create = True
    self._restarts = 0
    self._seen = 0.0  # when trainers were started, or first seen

  def plan(self, command: str) -> list[list[str]]:
    """What `command` runs; of the loop of --keep_alive, what a first pass does.

    Returns:
      argument lists, in their order.
    """
    c, flags = self._commands, self._flags
    if command == 'setup':
      return [c.describe(), c.pack(), c.upload(), c.setup()]
    if command == 'run' and flags.keep_alive:
      return [
          c.pack(), c.finished(), c.describe(), c.create(), c.describe(),
          c.hosts(), c.upload(), c.setup(), c.start()]
    if command == 'status':
      stored = [c.finished()] if flags.workdir.startswith('gs://') else []
      return [c.describe(), c.hosts(), *stored]
    return [{
        'create': c.create, 'run': c.start, 'logs': c.logs, 'stop': c.stop,
        'delete': c.delete}[command]()]

  def run(self, command: str) -> None:
    """Does what `command` says.

    Raises:
      ValueError: a command failed, or the TPU is not as it has to be.
    """
    if not shutil.which('gcloud'):
      raise ValueError(
          'gcloud is not on the PATH: install the Google Cloud CLI and log in, '
          'or add --dry_run to see the commands.')
    if command == 'status':
      self._show_status()
    elif command == 'run' and self._flags.keep_alive:
      self._keep_alive()
    else:
      plan = self.plan(command)
      if command == 'setup':
        self._await_active()
        del plan[0]
      for each in plan:
        _run(each)

  def _say(self, text: str) -> None:
    """Prints what is new since the last call."""
    if text != self._said:
      now = time.strftime('%F %T')
      print(f'{now} {self._flags.name}: {text}', flush=True)
    self._said = text

  def _state(self) -> str | None:
    """State of the queued resource; None if there is none."""
    command = self._commands.describe()
    found = _capture(command)
    if found.returncode == 0:
      return found.stdout.strip()
    if 'NOT_FOUND' in found.stderr:
      return None
    raise _failure(command, found)

  def _hosts(self) -> list[gcloud.Host]:
    """What every host says."""
    command = self._commands.hosts()
    found = _capture(command)
    if found.returncode:
      raise _failure(command, found)
    return gcloud.read_hosts(found.stdout)

  def _finished(self) -> bool:
    """Whether the workdir is that of a finished run."""
    command = self._commands.finished()
    found = _capture(command)
    if found.returncode and 'matched no objects' not in found.stderr:
      raise _failure(command, found)
    return found.returncode == 0

  def _await_active(self) -> None:
    name = self._flags.name
    while (state := self._state()) != 'ACTIVE':
      if state is None:
        raise ValueError(
            f'there is no queued resource {name}: create it first.')
      if state in _GONE:
        raise ValueError(
            f'queued resource {name} is {state} and will not come back: delete '
            'it and create it again, or use run --keep_alive, which does both.')
      self._say(state)
      time.sleep(self._flags.poll)

  def _show_status(self) -> None:
    state = self._state()
    print(f'{self._flags.name}: {state or "there is no such resource"}')
    for host in self._hosts() if state == 'ACTIVE' else []:
      print(f'{host.name}: {host.state} {host.workdir}'.rstrip())
    if self._flags.workdir.startswith('gs://'):
      done = 'finished' if self._finished() else 'not finished'
      print(f'{self._flags.workdir}: {done}')

  # -- run --keep_alive --------------------------------------------------------

  def _keep_alive(self) -> None:
    """Looks at what there is, does what follows from it, and looks again."""
    _run(self._commands.pack())  # once: a preempted run resumes with its code
    failures, proven = 0, False
    while True:
      try:
        if self._finished() and self._conclude() or not self._look():
          return
        failures, proven = 0, True
      except CommandFailed as error:
        failures += 1
        if not proven or failures > _MAX_FAILURES:
          raise
        self._say(str(error))
      time.sleep(self._flags.poll)

  def _conclude(self) -> bool:
    """Whether the trainers of the finished run are gone as well."""
    state = self._state()
    # Process 0 writes the file that says so before the others have ended.
    if state == 'ACTIVE' and any(
        host.state == 'running' for host in self._hosts()):
      return False
    if state:
      self._delete_if_asked()
    self._say(f'{self._flags.workdir} has finished')
    return True

  def _look(self) -> bool:
    """One pass; False where a person has ended what this loop keeps alive."""
    state = self._state()
    if state is None:
      if not self._to_create:
        self._say('deleted by hand, so it is not created again')
        return False
      self._say('creating it')
      _run(self._commands.create())
      self._to_create = False
    elif state in _GONE:
      if state == 'FAILED':
        self._count('the queued resource has failed')
      else:
        self._restarts = 0
      self._replace(state)
    elif state == 'ACTIVE':
      self._to_create = False
      return self._tend()
    else:
      self._say(state)
    return True

  def _replace(self, why: str) -> None:
    """Deletes what was taken away; the next pass creates it."""
    self._say(f'{why}: deleting what is left of it')
    _run(self._commands.delete())
    self._to_create, self._prepared, self._watched = True, False, False

  def _tend(self) -> bool:
    """Starts what an active node lacks; False if it was stopped by hand."""
    c, flags = self._commands, self._flags
    try:
      hosts = self._hosts()
    except CommandFailed:
      node = _capture(c.describe_node())
      if node.stdout.strip() in _LOST_NODE or 'NOT_FOUND' in node.stderr:
        self._restarts = 0
        self._replace(node.stdout.strip() or 'no node')
        return True
      raise
    running = [host for host in hosts if host.state == 'running']
    for host in running:
      if host.workdir != flags.workdir:
        raise ValueError(
            f'{flags.name} is busy with {host.workdir}: stop that, or give '
            'this run another --name.')
    if running:
      # Where some have ended, the others follow as soon as they miss them.
      if not self._watched:
        self._watched, self._seen = True, time.monotonic()
      self._say(f'{len(running)} of {len(hosts)} hosts train')
      return True
    states = {host.state for host in hosts}
    if self._watched and 'stopped' in states:
      self._say('stopped by hand; the same command goes on')
      return False
    try:
      if self._watched:
        self._say('the trainers have ended: ' + ', '.join(sorted(states)))
        if states != {'exit=0'}:
          _run(c.logs(worker='all', lines=20, follow=False))
        if time.monotonic() - self._seen > _LONG_RUN:
          self._restarts = 0
        self._count('the trainers have ended')
      if not self._prepared or 'fresh' in states:
        self._say('setting it up')
        _run(c.upload())
        _run(c.setup())
        self._prepared = True
      _run(c.start())
    except CommandFailed as error:
      self._count(str(error))
    else:
      self._watched, self._seen = True, time.monotonic()
    return True

  def _count(self, why: str) -> None:
    """Counts what is not a preemption; gives up when it is too much."""
    self._restarts += 1
    if self._restarts > self._flags.retries:
      self._delete_if_asked()
      raise ValueError(
          f'{self._flags.name}: {why}; that was once more than --retries='
          f'{self._flags.retries} allows. Mend it, and the same command goes '
          'on; a TPU that is not deleted costs money.')

  def _delete_if_asked(self) -> None:
    if self._flags.delete_when_done:
      self._say('deleting it')
      _run(self._commands.delete())


def _shown(command: list[str]) -> str:
  """A command as messages show it: values of --env may be secrets."""
  return re.sub(
      r'(--command=env) .*? (bash stepsearch)', r'\1 … \2',
      shlex.join(command))


def _run(command: list[str]) -> None:
  """Runs a command in the repository; its output is shown."""
  code = subprocess.run(command, cwd=_ROOT, check=False).returncode
  if code:
    raise CommandFailed(f'exit status {code} of {_shown(command)}')


def _capture(command: list[str]) -> subprocess.CompletedProcess:
  """Runs a command in the repository; its output is in the result."""
  return subprocess.run(
      command, cwd=_ROOT, capture_output=True, text=True, check=False)


def _failure(command, found) -> CommandFailed:
  return CommandFailed(
      f'exit status {found.returncode} of {_shown(command)}: '
      f'{found.stderr.strip() or "it said nothing"}')


# -- flags ---------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
  """A parser whose errors are `ValueError`s."""

  def error(self, message):
    """Raises what is wrong with the command line."""
    raise ValueError(
        f'{message}: every argument is --name=value; --help lists them.')


def _parser() -> Parser:
  parser = Parser(
      prog='launch/tpu_vm.sh', allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      description=__doc__.partition('\n\n')[2].rpartition('\n\n')[0])
  add = parser.add_argument
  add('command', choices=_COMMANDS)
  add('--name', default='', help='of the queued resource and its node')
  add('--zone', default='', help='where, such as us-west4-a')
  add('--project', default='', help='of Google Cloud')
  add('--topology', default='', help='in chips: v5e:4x4, v5p:2x2x2, v6e:2x4')
  add('--dry_run', action='store_true',
      help='print the commands, a line each; of --keep_alive a first pass')
  add('--internal_ip', action='store_true',
      help='no addresses outside the network')
  of = parser.add_argument_group('create, run --keep_alive').add_argument
  of('--spot', action='store_true', help='cheap, and preempted at any time')
  of('--reserved', action='store_true', help='from a reservation')
  of('--runtime_version', default='', help='default: that of the topology')
  of('--valid_until_duration', default='',
     help='how long to queue, such as 6h; default: for ever')
  of('--create_flag', action='append', default=[], metavar='--FLAG=VALUE',
     help='any other flag of gcloud … queued-resources create')
  of = parser.add_argument_group('run').add_argument
  of('--workdir', default='', help='gs://bucket/path; of status as well')
  of('--config', default='',
     help='PATH.py[:variant]; --config.leaf=value overrides a leaf')
  of('--env', action='append', default=[], metavar='NAME=VALUE',
     help='an environment variable of the trainers')
  of('--keep_alive', action='store_true', help='see above')
  of('--poll', type=float, default=30,
     help='seconds between two looks of --keep_alive and of setup')
  of('--retries', type=int, default=3,
     help='restarts of --keep_alive that no preemption explains')
  of('--delete_when_done', action='store_true',
     help='delete the TPU when --keep_alive ends')
  of = parser.add_argument_group('logs, stop').add_argument
  of('--worker', default='0', help='whose log: 0, 1, … or all')
  of('--lines', type=int, default=50, help='of the log')
  of('--follow', action='store_true', help='go on until Ctrl-C')
  of('--grace', type=int, default=120, help='seconds before SIGKILL')
  return parser


def parse(argv: list[str]) -> argparse.Namespace:
  """Reads the command line; `overrides` holds its --config.leaf=value.

  Raises:
    ValueError: something is missing or cannot work; names it and the remedy.
  """
  is_override = re.compile(r'--?config\.').match
  flags = _parser().parse_args([x for x in argv if not is_override(x)])
  flags.overrides = [x for x in argv if is_override(x)]
  for name, form, example in (
      ('name', r'[a-z]([-a-z0-9]{0,61}[a-z0-9])?', 'qwen-3b'),
      ('zone', r'[a-z]+-[a-z]+[0-9]+-[a-z]', 'us-west4-a'),
      ('project', r'[a-z][-a-z0-9.:]{3,}[a-z0-9]', 'my-project')):
    value = getattr(flags, name)
    if not value:
      raise ValueError(f'--{name} is missing: add, say, --{name}={example}.')
    if not re.fullmatch(form, value):
      raise ValueError(
          f'--{name}={value} is not of the form of {example}: small letters, '
          'digits and hyphens.')
  if flags.spot and flags.reserved:
    raise ValueError(
        '--spot and --reserved exclude each other: drop one, or both for '
        'capacity on demand.')
  if flags.poll <= 0 or flags.retries < 0 or flags.grace < 1:
    raise ValueError(
        f'--poll={flags.poll}, --retries={flags.retries}, --grace='
        f'{flags.grace}: poll has to be positive, retries at least 0 and grace '
        'at least 1.')
  if flags.topology:
    gcloud.parse_topology(flags.topology)
  elif flags.command in ('create', 'run'):
    raise ValueError('--topology is missing: add, say, --topology=v5e:4x4.')
  if re.search(r'[\s*?#\[\]]', flags.workdir):
    raise ValueError(
        f'--workdir={flags.workdir}: choose a path without white space and '
        'without the characters * ? # [ ].')
  if flags.command == 'run':
    _check_run(flags)
  if flags.command == 'setup' or flags.keep_alive:
    _check_tree()
  return flags


def _check_run(flags: argparse.Namespace) -> None:
  if not flags.workdir:
    raise ValueError(
        '--workdir is missing: add, say, --workdir=gs://bucket/run.')
  one_host = gcloud.parse_topology(flags.topology).one_host
  stored = re.match(r'gs://[^/]+/+[^/]', flags.workdir)
  if not stored and (flags.keep_alive or not one_host):
    why = ('--keep_alive may lose the machine with its disk' if one_host else
           f'the hosts of {flags.topology} share no disk')
    raise ValueError(
        f'--workdir={flags.workdir}: {why}. Give a folder of a bucket, '
        'gs://bucket/run.')
  for variable in flags.env:
    if not re.match(r'[A-Za-z_][A-Za-z_0-9]*=', variable):
      raise ValueError(f'--env={variable} is not of the form NAME=VALUE.')
  match = re.fullmatch(r'(.+?\.py)(:.*)?', flags.config)
  path = match[1] if match else flags.config
  if not path or not (_ROOT / path).is_file():
    raise ValueError(
        f'--config={flags.config}: there is no such file; give PATH.py or '
        'PATH.py:variant, relative to the repository.')
  if not _git('ls-files', '--cached', '--others', '--exclude-standard', path):
    raise ValueError(
        f'--config={flags.config}: the hosts will not have {path}, because it '
        'lies outside the repository or git ignores it. Move it to configs/.')


def _check_tree() -> None:
  gone = _git('ls-files', '--deleted').split()
  if gone:
    raise ValueError(
        f'{", ".join(gone)}: deleted, but git still lists it, so that the tree '
        'cannot be archived. Say `git add --all`, or restore it.')


def _git(*words: str) -> str:
  found = _capture(['git', *words])
  if found.returncode and 'outside repository' not in found.stderr:
    raise ValueError(
        f'git cannot list what goes to the hosts ({found.stderr.strip()}): '
        'work in a clone of the repository.')
  return found.stdout


def main(argv: list[str]) -> None:
  """Runs one command line; exits with 1 and one paragraph if it cannot."""
  try:
    flags = parse(argv)
    launcher = Launcher(flags)
    if flags.dry_run:
      for command in launcher.plan(flags.command):
        print(shlex.join(command))
    else:
      launcher.run(flags.command)
  except ValueError as error:
    raise SystemExit('error: ' + ' '.join(str(error).split())) from error
  except KeyboardInterrupt:
    print('interrupted: what runs on the hosts goes on', file=sys.stderr)
    raise SystemExit(130) from None


if __name__ == '__main__':
  main(sys.argv[1:])
