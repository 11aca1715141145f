"""A gcloud that keeps TPU VMs in a folder: every host is a home directory.

$CLOUD/                 the world, made by the test
  calls                 what was asked, one JSON list a line; written here
  hosts                 how many hosts a node has
  state                 of the one queued resource; absent = there is none
  events                a line for each `describe`: the state from then on
  failures              VERB TIMES: those calls fail, with exit status 1
  node                  state of the node, where it is not READY
  vm/I/                 the home directory of host I while there is a node
  gs/BUCKET/PATH        what is stored
  bin/                  programs of the hosts, before those of this machine

A command for a host runs here, in its home directory. A resource that leaves
the state ACTIVE loses its processes and disks.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ['CLOUD'])


def homes():
  return sorted((CLOUD / 'vm').iterdir())


def state():
  path = CLOUD / 'state'
  return path.read_text() if path.exists() else ''


def enter(new):
  """Puts the resource into another state; '' = there is none."""
  nodes = CLOUD / 'vm'
  if new == 'ACTIVE' and not nodes.exists():
    for i in range(int((CLOUD / 'hosts').read_text())):
      (nodes / str(i)).mkdir(parents=True)
  elif new != 'ACTIVE' and nodes.exists():
    for pid in nodes.glob('*/stepsearch/run/pid'):
      try:
        os.kill(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(nodes)
  (CLOUD / 'state').write_text(new)


def stop(message, code=1):
  print(f'ERROR: (gcloud.{verb}) {message}', file=sys.stderr)
  sys.exit(code)


def flag(name):
  found = [x for x in arguments if x.startswith(f'--{name}=')]
  return found[0].partition('=')[2]


def workers():
  if state() != 'ACTIVE':
    stop('NOT_FOUND: Resource was not found.')
  asked = flag('worker')
  return homes() if asked == 'all' else [homes()[int(asked)]]


arguments = sys.argv[1:]
with (CLOUD / 'calls').open('a') as calls:
  calls.write(json.dumps(arguments) + '\n')
group, verb = arguments[-3:-1] if arguments[0] == 'storage' else arguments[2:4]

failures = CLOUD / 'failures'
if failures.exists():
  failing, times = failures.read_text().split()
  if failing == verb and int(times):
    failures.write_text(f'{failing} {int(times) - 1}')
    stop('quota exceeded, says the test')

if group == 'storage':
  path = CLOUD / 'gs' / arguments[-1].removeprefix('gs://')
  if not path.exists():
    stop('One or more URLs matched no objects.')
  print(arguments[-1])
elif verb == 'create':
  if state():
    stop('ALREADY_EXISTS')
  enter('WAITING_FOR_RESOURCES')
elif verb == 'describe' and group == 'queued-resources':
  events = CLOUD / 'events'
  now, _, rest = events.read_text().partition('\n')
  events.write_text(rest)
  if now and state():
    enter(now)
  if not state():
    stop('NOT_FOUND: Resource was not found.')
  print(state())
elif verb == 'describe':
  node = CLOUD / 'node'
  print(node.read_text() if node.exists() else 'READY')
elif verb == 'delete':
  enter('')
elif verb == 'scp':
  for home in workers():
    shutil.copy(arguments[4], home / arguments[5].partition(':')[2])
elif verb == 'ssh':
  code = 0
  for home in workers():
    environment = os.environ | {
        'HOME': str(home), 'HOST': f'host-{home.name}',
        'PATH': f'{CLOUD / "bin"}:{os.environ["PATH"]}'}
    # Like gcloud, which hands the words to ssh, and ssh to a shell.
    done = subprocess.run(
        ['bash', '-c', ' '.join(flag('command').split(' '))], cwd=home,
        env=environment)
    code = code or done.returncode
  sys.exit(code)
else:
  stop(f'unknown: {arguments}')
