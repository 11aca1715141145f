"""The device mesh, and how logical axes and host rows land on it.

One mesh with axes `data, fsdp, tensor`. Model code names its axes logically
(`embed`, `heads`, ...); `RULES` says on which mesh axis each of them lies.
Batches are split over `data` and `fsdp` together.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')
RULES = {
    'batch': BATCH,
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'layers': None,
    'head_dim': None,
    'length': None,
}


def make_mesh(
    shape: Sequence[int] = (-1, 1, 1), devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the `data, fsdp, tensor` mesh; one -1 takes what is left.

  Args:
    shape: three sizes whose product is the number of devices.
    devices: the devices to use, all of them by default.

  Returns:
    A mesh with automatic axes (Linen fails at gathers with explicit ones).

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = list(shape)
  if len(shape) != 3 or shape.count(-1) > 1 or any(
      size < 1 and size != -1 for size in shape):
    raise ValueError(
        f'config.mesh = {tuple(shape)}: three sizes for {AXES} are needed, '
        'each at least 1, or a single -1 for "what is left".')
  if -1 in shape:
    known = -math.prod(shape)
    shape[shape.index(-1)] = max(len(devices) // known, 1)
  if math.prod(shape) != len(devices):
    raise ValueError(
        f'config.mesh = {tuple(shape)} needs {math.prod(shape)} devices and '
        f'there are {len(devices)}: choose sizes for {AXES} whose product is '
        f'{len(devices)}, or set one of them to -1.')
  return jax.make_mesh(
      tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(axes: Any, mesh: Mesh) -> Any:
  """`NamedSharding`s of a pytree of `PartitionSpec`s of logical axis names."""

  def place(spec):
    return NamedSharding(mesh, PartitionSpec(*(
        None if name is None else RULES[name] for name in spec)))

  return jax.tree.map(
      place, axes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Places host arrays [B, ...] on the mesh, rows split over the batch axes.

  Raises:
    ValueError: B is not a multiple of data x fsdp.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']

  def place(array):
    if not isinstance(array, jax.Array):
      array = np.asarray(array)
    if array.shape[0] % shards:
      raise ValueError(
          f'a batch of {array.shape[0]} rows cannot be split over {shards} '
          f'shards (mesh {dict(mesh.shape)}): choose a batch size that is a '
          f'multiple of {shards}.')
    return jax.device_put(array, rows(mesh))

  return jax.tree.map(place, tree)
