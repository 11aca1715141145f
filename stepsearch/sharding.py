"""The device mesh, and how logical axes and host rows land on it.

One mesh with axes `data, fsdp, tensor`. Model code names its axes logically
(`embed`, `heads`, ...); the rules of a `Layout` say on which mesh axes each of
them lies, one set for the update and one for decoding (`config.sharding`):

    update   weights and optimizer are split over every axis; a layer gathers
             what it uses along `embed`, in the computation's dtype
    decode   weights stay where they are; where an axis splits both a weight and
             the batch, it is the activations that are gathered
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
HOST = 'pinned_host'  # memory beside the device, which copies from it directly
# Logical axes that rules may name; all others are never split.
LOGICAL = ('batch', 'vocab', 'embed', 'heads', 'kv_heads', 'mlp')
Rules = tuple[tuple[str, tuple[str, ...]], ...]
UPDATE: Rules = (
    ('batch', ('data', 'fsdp')), ('vocab', ('tensor',)), ('embed', ('fsdp',)),
    ('heads', ('tensor',)), ('kv_heads', ('tensor',)), ('mlp', ('tensor',)))
DECODE: Rules = tuple(
    (name, () if name == 'embed' else axes) for name, axes in UPDATE)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and the mesh axes on which each logical axis lies; hashable."""

  mesh: Mesh
  rules: Rules = UPDATE

  @property
  def platform(self) -> str:
    """Of the mesh's devices, which need not be the default ones."""
    return self.mesh.devices.flat[0].platform

  @property
  def shards(self) -> int:
    """Parts that rows are split into."""
    return self.size('batch')

  @property
  def rows(self) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch."""
    return self.named('batch')

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def axes(self, name: str | None) -> tuple[str, ...]:
    """Mesh axes of a logical axis."""
    return dict(self.rules).get(name, ())

  def size(self, name: str) -> int:
    """Parts that a logical axis is split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

  def spec(
      self, *names: str | None, beside: str | None = None
  ) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these logical names.

    A mesh axis can split one dimension only: the batch gives way to the others.

    Args:
      *names: one for each dimension; None: not split.
      beside: a further logical axis to which the batch gives way, that of what
        the array is multiplied with.
    """
    others = {
        axis for name in (*names, beside) if name != 'batch'
        for axis in self.axes(name)}
    return PartitionSpec(*(_entry(tuple(
        axis for axis in self.axes(name)
        if name != 'batch' or axis not in others)) for name in names))

  def named(
      self, *names: str | None, beside: str | None = None
  ) -> NamedSharding:
    """`spec` on the mesh."""
    return NamedSharding(self.mesh, self.spec(*names, beside=beside))

  def place(self, axes: Any) -> Any:
    """`NamedSharding`s of a pytree of `PartitionSpec`s of logical names."""
    return jax.tree.map(
        lambda spec: self.named(*spec), axes,
        is_leaf=lambda x: isinstance(x, PartitionSpec))

  def constrain(
      self, x: jax.Array, *names: str | None, beside: str | None = None
  ) -> jax.Array:
    """Lays out an array inside a jitted function; arguments as of `spec`.

    A dimension that cannot be split, as that of a single row, is not.
    """
    if self.mesh.size == 1:
      return x
    spec = PartitionSpec(*(
        None if size % _count(self.mesh, entry) else entry
        for size, entry in zip(x.shape, self.spec(*names, beside=beside))))
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(self.mesh, spec))

  def by_vocabulary(self, size: int) -> Layout:
    """For products with the unembedding [D, V]: V takes the axes of `embed`.

    Gathering the matrix, and summing its gradient for every chunk of logits,
    moves far more than gathering the few hidden states it is multiplied with.

    Args:
      size: V; where it cannot be split so finely, the layout itself.
    """
    axes = (*self.axes('vocab'), *self.axes('embed'))
    wide = Layout(self.mesh, tuple(sorted(
        (dict(self.rules) | {'vocab': axes, 'embed': ()}).items())))
    return self if size % wide.size('vocab') else wide

  def gather(self, x: jax.Array, *names: str | None) -> jax.Array:
    """A weight as a layer uses it: whole along `embed`.

    Called on the weight in the computation's dtype, so that half as much is
    moved as in float32; its gradient is summed in that dtype too, and scattered
    back.
    """
    if self.mesh.size == 1 or self.size('embed') == 1:
      return x
    return _gather(self, names, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(layout, names, x):
  return layout.constrain(
      x, *(None if name == 'embed' else name for name in names))


def _gather_forward(layout, names, x):
  return _gather(layout, names, x), None


def _gather_backward(layout, names, _, gradient):
  # Left to itself XLA sums the gradient whole on every device.
  return (layout.constrain(gradient, *names),)


_gather.defvjp(_gather_forward, _gather_backward)


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


def rules(table: Mapping[str, Sequence[str]], field: str) -> Rules:
  """Checks one set of rules, a section of `config.sharding`.

  Args:
    table: mesh axes by logical axis.
    field: name of the section, for messages.

  Raises:
    ValueError: an axis that does not exist, or one used twice by one array.
  """
  for name, axes in table.items():
    if name not in LOGICAL:
      raise ValueError(
          f'config.{field}.{name}: there is no such logical axis; those that '
          f'can be split are {", ".join(LOGICAL)}.')
    for axis in axes:
      if axis not in AXES or list(axes).count(axis) > 1:
        raise ValueError(
            f'config.{field}.{name} = {tuple(axes)!r}: give each of the mesh '
            f'axes {AXES} at most once.')
  for one, other in (
      ('embed', 'vocab'), ('embed', 'heads'), ('embed', 'kv_heads'),
      ('embed', 'mlp')):
    shared = set(table.get(one, ())) & set(table.get(other, ()))
    if shared:
      raise ValueError(
          f'config.{field}: {one} = {tuple(table[one])!r} and {other} = '
          f'{tuple(table[other])!r} are the two sides of one weight and both '
          f'name {sorted(shared)[0]!r}: a mesh axis can split one of them.')
  return tuple(sorted((name, tuple(axes)) for name, axes in table.items()))


def shapes(tree: Any, shardings: Any) -> Any:
  """Arrays, or their shapes, as `jax.ShapeDtypeStruct`s that are laid out."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def has_host_memory(layout: Layout) -> bool:
  """Whether arrays of the mesh can lie in `HOST` memory."""
  return any(
      memory.kind == HOST
      for memory in layout.mesh.devices.flat[0].addressable_memories())


def on_host(shardings: Any) -> Any:
  """A pytree of shardings with their arrays in `HOST` memory."""
  return jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)


def on_device(tree: Any, donate: bool = False) -> Any:
  """Copies arrays that lie in `HOST` memory to their devices.

  Args:
    tree: of arrays; those on a device are returned as they are.
    donate: frees what lay in host memory, once it is copied.
  """

  def move(x):
    if x.sharding.memory_kind != HOST:
      return x
    [default] = {d.default_memory().kind for d in x.sharding.device_set}
    y = jax.device_put(x, x.sharding.with_memory_kind(default))
    if donate:
      x.delete()
    return y

  return jax.tree.map(move, tree)


def put(array: Any, where: NamedSharding) -> jax.Array:
  """A host array as a global one; each process places what its devices hold.

  Not `jax.device_put`, which first compares the array between processes, by a
  program on all devices.
  """
  if not isinstance(array, jax.Array):
    array = np.asarray(array)
  return jax.make_array_from_callback(
      array.shape, where, lambda index: array[index])


def shard_batch(tree: Any, layout: Layout) -> Any:
  """Places host arrays [B, ...] on the mesh, rows split over the batch axes.

  Several processes call it with the same arrays.

  Raises:
    ValueError: B is not a multiple of the shards.
  """
  shards = layout.shards

  def place(array):
    if array.shape[0] % shards:
      raise ValueError(
          f'a batch of {array.shape[0]} rows cannot be split over {shards} '
          f'shards (mesh {dict(layout.mesh.shape)}): choose a batch size that '
          f'is a multiple of {shards}.')
    return put(array, layout.rows)

  return jax.tree.map(place, tree)


def local_rows(layout: Layout, count: int) -> list[int]:
  """The rows of a batch of `count` that this process answers for.

  Those that its devices hold. Rows that several processes hold, as with a
  `tensor` axis across them, are dealt out in equal parts, so that every row is
  one process' own.
  """
  holders = [set() for _ in range(count)]
  for device, index in layout.rows.devices_indices_map((count,)).items():
    for row in range(count)[index[0]]:
      holders[row].add(device.process_index)
  shared = collections.defaultdict(list)
  for row, processes in enumerate(holders):
    shared[tuple(sorted(processes))].append(row)
  mine = []
  for processes, held in shared.items():
    if jax.process_index() in processes:
      place = processes.index(jax.process_index())
      first, last = (
          len(held) * i // len(processes) for i in (place, place + 1))
      mine += held[first:last]
  return sorted(mine)


def _entry(axes):
  return None if not axes else axes[0] if len(axes) == 1 else axes


def _count(mesh, entry):
  if entry is None:
    return 1
  axes = (entry,) if isinstance(entry, str) else entry
  return math.prod(mesh.shape[axis] for axis in axes)
