"""What is said to gcloud about TPU VMs: command lines as lists of arguments.

A queued resource asks for one node of the same name; a node has one host or
several, which are reached by ssh. On a host, launch/host.sh does the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex


@dataclasses.dataclass(frozen=True)
class Generation:
  """What Cloud TPU calls a generation of chips.

  Attributes:
    accelerator: of the accelerator type, before the number.
    per_chip: what the number counts: 2, cores, or 1, chips.
    host_chips: chips of the largest slice that one host has.
    runtime: the runtime version of the hosts.
    shapes: the topologies that an accelerator type stands for.
  """

  accelerator: str
  per_chip: int
  host_chips: int
  runtime: str
  shapes: tuple[str, ...]


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
    '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
    '8x8x16', '8x16x16')
_GENERATIONS = {
    'v4': Generation('v4', 2, 4, 'tpu-ubuntu2204-base', _CUBES),
    'v5e': Generation('v5litepod', 1, 8, 'v2-alpha-tpuv5-lite', _FLAT),
    'v5p': Generation('v5p', 2, 4, 'v2-alpha-tpuv5', _CUBES),
    'v6e': Generation('v6e', 1, 8, 'v2-alpha-tpuv6e', _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A topology in Cloud TPU's terms.

  Attributes:
    accelerator: the accelerator type, `v5litepod-16`.
    runtime: the runtime version.
    one_host: whether a single host has all chips.
  """

  accelerator: str
  runtime: str
  one_host: bool


def parse_topology(text: str) -> Slice:
  """Reads a topology as stepsearch.compile names it, in chips: `v5e:4x4`.

  Raises:
    ValueError: not one that Cloud TPU has; names those it has, and the topology
      meant where the text is an accelerator type.
  """
  slices = {}
  for generation, known in _GENERATIONS.items():
    for shape in known.shapes:
      chips = math.prod(map(int, shape.split('x')))
      slices[f'{generation}:{shape}'] = Slice(
          f'{known.accelerator}-{chips * known.per_chip}', known.runtime,
          chips <= known.host_chips)
  if text in slices:
    return slices[text]
  generation = text.partition(':')[0]
  same = [name for name, found in slices.items() if found.accelerator == text]
  if same:
    raise ValueError(
        f'--topology={text} is an accelerator type: write its topology in '
        f'chips, --topology={same[0]}.')
  if generation == 'tpu7x':
    raise ValueError(
        f'--topology={text}: this generation has no TPU VMs, only nodes of '
        'Kubernetes clusters. Choose one of ' + ', '.join(_GENERATIONS) + '.')
  if generation in _GENERATIONS:
    shapes = ', '.join(_GENERATIONS[generation].shapes)
    raise ValueError(
        f'--topology={text}: {generation} comes as {shapes}; give one of these '
        f'after {generation}:.')
  raise ValueError(
      f'--topology={text}: there is no such TPU; give GENERATION:SHAPE in '
      'chips, such as v5e:4x4. Generations: ' + ', '.join(_GENERATIONS) + '.')


@dataclasses.dataclass(frozen=True)
class Host:
  """What host.sh says of a host.

  Attributes:
    name: its host name.
    state: one of those of host.sh, or `fresh`, which is one without our code.
    workdir: of what was started last; '' = nothing was.
  """

  name: str
  state: str
  workdir: str


def read_hosts(output: str) -> list[Host]:
  """Reads what `Commands.hosts` prints; in the order of the names."""
  lines = re.findall(
      r'^stepsearch (\S+) (\S+) ?(.*)$', output, re.MULTILINE)
  return [Host(*line) for line in sorted(lines)]


class Commands:
  """The command lines for one TPU, as lists of arguments."""

  def __init__(self, flags: argparse.Namespace):
    self._flags = flags
    self._where = [f'--project={flags.project}', f'--zone={flags.zone}']
    self._archive = f'runs/launch/{flags.name}.tar.gz'

  def _resource(self, verb: str, *rest: str) -> list[str]:
    return [
        'gcloud', 'compute', 'tpus', 'queued-resources', verb,
        self._flags.name, *self._where, *rest]

  def _node(self, verb: str, *rest: str) -> list[str]:
    return ['gcloud', 'compute', 'tpus', 'tpu-vm', verb, *rest, *self._where]

  def _connect(self, verb: str, *rest: str, worker: str = 'all') -> list[str]:
    inside = ['--internal-ip'] if self._flags.internal_ip else []
    return self._node(verb, *rest, f'--worker={worker}', *inside)

  def _ssh(self, script: str, worker: str = 'all') -> list[str]:
    return self._connect(
        'ssh', self._flags.name, f'--command={script}', worker=worker)

  def _host(self, *words: str, worker: str = 'all', before: str = ''):
    script = shlex.join(['bash', 'stepsearch/code/launch/host.sh', *words])
    return self._ssh(before + script, worker)

  def create(self) -> list[str]:
    """Asks for the queued resource."""
    flags, chosen = self._flags, parse_topology(self._flags.topology)
    return self._resource(
        'create', f'--node-id={flags.name}',
        f'--accelerator-type={chosen.accelerator}',
        f'--runtime-version={flags.runtime_version or chosen.runtime}',
        *(['--spot'] if flags.spot else []),
        *(['--reserved'] if flags.reserved else []),
        *(['--internal-ips'] if flags.internal_ip else []),
        *([f'--valid-until-duration={flags.valid_until_duration}']
          if flags.valid_until_duration else []),
        *flags.create_flag)

  def describe(self) -> list[str]:
    """Prints the state of the queued resource."""
    return self._resource('describe', '--format=value(state.state)')

  def describe_node(self) -> list[str]:
    """Prints the state of the node."""
    return self._node('describe', self._flags.name, '--format=value(state)')

  def delete(self) -> list[str]:
    """Deletes the queued resource and its node."""
    return self._resource('delete', '--force', '--quiet')

  def pack(self) -> list[str]:
    """Archives the working tree as it is, without what git ignores."""
    target = shlex.quote(self._archive)
    return [
        'bash', '-c',
        'set -o pipefail; mkdir -p runs/launch && git ls-files -z --cached '
        '--others --exclude-standard | tar --null -T - -czf ' + target]

  def upload(self) -> list[str]:
    """Copies the archive to every host."""
    return self._connect(
        'scp', self._archive, f'{self._flags.name}:stepsearch.tar.gz')

  def setup(self) -> list[str]:
    """Unpacks the archive and makes the environment."""
    return self._ssh(
        'rm -rf stepsearch/new && mkdir -p stepsearch/new && tar -xzf '
        'stepsearch.tar.gz -C stepsearch/new && '
        'bash stepsearch/new/launch/host.sh setup')

  def start(self) -> list[str]:
    """Starts the trainers."""
    flags = self._flags
    before = shlex.join(['env', *flags.env]) + ' ' if flags.env else ''
    return self._host(
        'start', flags.workdir, '--distributed', f'--config={flags.config}',
        f'--workdir={flags.workdir}', *flags.overrides, before=before)

  def hosts(self) -> list[str]:
    """Prints a line a host: `stepsearch HOST STATE WORKDIR`."""
    return self._ssh(
        'bash stepsearch/code/launch/host.sh status 2>/dev/null || '
        'echo stepsearch "$(hostname)" fresh')

  def logs(self, **changes) -> list[str]:
    """Prints the end of the trainers' logs; `changes` to worker, lines, follow.
    """
    asked = argparse.Namespace(**vars(self._flags) | changes)
    return self._host(
        'log', str(asked.lines), *(['follow'] if asked.follow else []),
        worker=asked.worker)

  def stop(self) -> list[str]:
    """Ends the trainers."""
    return self._host('stop', str(self._flags.grace))

  def finished(self) -> list[str]:
    """Succeeds where the workdir is that of a finished run."""
    workdir = self._flags.workdir.rstrip('/')
    return ['gcloud', 'storage', 'ls', f'{workdir}/eval.json']
