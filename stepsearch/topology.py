"""TPU slices by name: devices to compile for, on a machine that has none.

    'v5e:4x4' ─▶ libtpu's compiler ─▶ 16 devices that cannot run anything

Names count chips. libtpu 0.0.42 goes with jax 0.10.2: newer ones compile too,
but crash when they print a program for v5p or v6e.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
# The slices that are offered, smallest first.
KNOWN = {
    'v5e': _FLAT,
    'v5p': (
        '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8',
        '8x8x8', '8x8x16'),
    'v6e': _FLAT,
}


def split(name: str) -> tuple[str, tuple[int, ...]]:
  """Generation and chips along each axis of a name such as v5e:4x4.

  Raises:
    ValueError: it is none of `KNOWN`.
  """
  generation, _, shape = name.partition(':')
  if shape not in KNOWN.get(generation, ()):
    known = '; '.join(
        f'{generation}: {" ".join(shapes)}'
        for generation, shapes in KNOWN.items())
    raise ValueError(
        f'--topology={name} is no TPU slice that can be compiled for: write '
        f'generation:shape, as v5e:4x4. Known are {known}.')
  return generation, tuple(map(int, shape.split('x')))


def host(name: str) -> str:
  """The slice that the chips of one host make by themselves.

  Programs of one host's chips do not compile for them as a part of a slice
  whose chips route for each other.
  """
  generation, shape = split(name)
  alone = '2x2x1' if generation == 'v5p' else '2x2'
  return name if math.prod(shape) <= 4 else f'{generation}:{alone}'


def larger(name: str) -> list[str]:
  """The known slices of the same generation with more chips."""
  generation, shape = split(name)
  return [
      f'{generation}:{other}' for other in KNOWN[generation]
      if math.prod(map(int, other.split('x'))) > math.prod(shape)]


def devices(name: str) -> list[Any]:
  """The devices of a slice, for `lower().compile()` only.

  From here on this process computes on the CPU, and the compiler prints
  nothing. Call it before anything else asks for devices.

  Raises:
    ValueError: there is no such slice, or no libtpu.
  """
  _, shape = split(name)
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
        '--topology needs the TPU compiler, which is not installed: pip '
        'install -r launch/requirements-compile.txt (libtpu 0.0.42, Linux on '
        'x86-64; no TPU is needed).')
  for variable, value in {
      'TPU_SKIP_MDS_QUERY': '1',  # no metadata server to be asked
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
      # Beside a run that has the TPU, or a second compile.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_STDERR_LOG_LEVEL': '3',
      'TPU_MIN_LOG_LEVEL': '3'}.items():
    os.environ.setdefault(variable, value)
  jax.config.update('jax_platforms', 'cpu')
  one = {'chips_per_host_bounds': (1, 1, 1)} if math.prod(shape) == 1 else {}
  return list(topologies.get_topology_desc(
      topology_name=name, platform='tpu', **one).devices)
