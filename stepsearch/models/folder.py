"""A Hugging Face folder: checked files, and tensors streamed to the devices.

Folders are local or gs://. The host holds one tensor at a time, never the
model; each is read once and put where it lies. Only safetensors are read, never
pickles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from stepsearch import paths

CONFIG = 'config.json'
INDEX = 'model.safetensors.index.json'
WRITTEN = ('float32', 'bfloat16', 'float16')
_BLOCK = 2**24  # bytes
_DTYPES = {
    'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where a tensor lies."""

  file: paths.Path
  kind: str  # of numbers, as safetensors spells it
  shape: tuple[int, ...]
  start: int
  size: int


class Folder:
  """A folder with config.json and safetensors.

  Attributes:
    path: paths.Path.
    config: what config.json holds.
  """

  def __init__(self, path: paths.Address):
    """Reads config.json.

    Raises:
      ValueError: no such folder, or no usable config.json in it.
    """
    self.path = paths.Path(path)
    with paths.explained(self.path):
      there = self.path.is_dir()
    if not there:
      raise ValueError(
          f'{self.path}: there is no such folder; give one that holds a '
          'Hugging Face model, with config.json and *.safetensors, on disk or '
          'gs://.')
    self.config = self.json(CONFIG)
    if self.config is None:
      raise ValueError(
          f'{self.path} holds no config.json: it is not a Hugging Face model.')

  def json(self, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder, None where there is no such file."""
    file = self.path / name
    if not file.exists():
      return None
    try:
      value = json.loads(file.read_text())
    except ValueError as error:
      raise ValueError(f'{file} is not JSON ({error}): fetch it again.'
                       ) from error
    if not isinstance(value, dict):
      raise ValueError(f'{file} holds no JSON object: fetch it again.')
    return value

  @functools.cached_property
  def tensors(self) -> dict[str, tuple[int, ...]]:
    """Shapes by name; reads and checks the headers of all files.

    Raises:
      ValueError: a file is missing, cut short or damaged.
    """
    return {name: entry.shape for name, entry in self._entries.items()}

  def file(self, name: str) -> paths.Path:
    """The file that holds a tensor."""
    return self._entries[name].file

  def kind(self, name: str) -> str:
    """The type of a tensor's numbers, as safetensors spells it: F32, I64."""
    return self._entries[name].kind

  def read(self, name: str) -> np.ndarray:
    """One tensor, in the type in which it is stored."""
    entry = self._entries[name]
    raw = np.empty(entry.size, np.uint8)
    with entry.file.open('rb') as file:
      file.seek(entry.start)
      view = memoryview(raw)
      while view:
        count = file.readinto(view)
        if not count:
          raise ValueError(
              f'{entry.file} ended while {name} was read: fetch it again.')
        view = view[count:]
    return raw.view(_DTYPES[entry.kind]).reshape(entry.shape)

  def same(self, first: str, second: str) -> bool:
    """Whether two tensors are stored alike, bit for bit."""
    one, two = self._entries[first], self._entries[second]
    if (one.kind, one.shape, one.size) != (two.kind, two.shape, two.size):
      return False
    with one.file.open('rb') as a, two.file.open('rb') as b:
      a.seek(one.start)
      b.seek(two.start)
      for start in range(0, one.size, _BLOCK):
        size = min(_BLOCK, one.size - start)
        if a.read(size) != b.read(size):
          return False
    return True

  def dtype(self) -> str:
    """The type of the weights: what config.json names, or most are stored in.

    Raises:
      ValueError: config.json names a type that weights are not written in.
    """
    for field in ('dtype', 'torch_dtype'):
      named = self.config.get(field)
      if named is None:
        continue
      if named not in WRITTEN:
        raise ValueError(
            f'{self.path / CONFIG}: {field} = {named!r} is no type that '
            f'weights are written in; choose one of {", ".join(WRITTEN)} by '
            '--dtype.')
      return named
    sizes = dict.fromkeys(WRITTEN, 0)
    for entry in self._entries.values():
      name = _DTYPES[entry.kind].name if entry.kind in _DTYPES else None
      if name in sizes:
        sizes[name] += entry.size
    return max(sizes, key=sizes.get)

  @functools.cached_property
  def _entries(self) -> dict[str, _Entry]:
    index = self.json(INDEX)
    if index is None:
      files = sorted(self.path.glob('*.safetensors'))
    else:
      placed = index.get('weight_map')
      if not isinstance(placed, dict) or not all(
          isinstance(file, str) for file in placed.values()):
        raise ValueError(
            f'{self.path / INDEX} has no weight_map of tensors to files: fetch '
            'it again.')
      files = [self.path / file for file in sorted(set(placed.values()))]
    if not files:
      raise ValueError(
          f'{self.path} holds no *.safetensors. Only safetensors are read, '
          'never pickles (*.bin, *.pt): convert the model once with '
          'save_pretrained(..., safe_serialization=True).')
    entries: dict[str, _Entry] = {}
    for file in files:
      if not file.exists():
        raise ValueError(
            f'{file} is missing, but {INDEX} names it: fetch it again.')
      for name, entry in _header(file):
        if name in entries:
          raise ValueError(
              f'{name} is in {entries[name].file} and in {file}: remove the '
              'file that does not belong to the model.')
        entries[name] = entry
    for name, file in (index or {}).get('weight_map', {}).items():
      if name not in entries or entries[name].file.name != file:
        raise ValueError(
            f'{self.path / file} lacks the tensor {name}, which {INDEX} '
            'expects in it: fetch both files again.')
    return entries


def _header(file: paths.Path) -> Iterator[tuple[str, _Entry]]:
  """The tensors of one safetensors file, checked against its length."""
  length = file.stat().length
  broken = (f'{file} is cut short or no safetensors file ({length:,} bytes; a '
            'Git LFS pointer perhaps): fetch it again.')
  with file.open('rb') as opened:
    size = int.from_bytes(opened.read(8), 'little')
    if length < 8 or size > length - 8:
      raise ValueError(broken)
    try:
      header = json.loads(opened.read(size))
      header.pop('__metadata__', None)
      rows = []
      for name, row in header.items():
        start, stop = map(int, row['data_offsets'])
        shape = tuple(map(int, row['shape']))
        rows.append((name, str(row['dtype']), shape, start, stop))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(broken) from error
  data = 8 + size
  end = data + max((stop for *_, stop in rows), default=0)
  if end != length:
    raise ValueError(
        f'{file} has {length:,} bytes where its header announces {end:,}: it '
        'is cut short or damaged, fetch it again.')
  for name, kind, shape, start, stop in rows:
    if not 0 <= start <= stop or (
        kind in _DTYPES
        and stop - start != math.prod(shape) * _DTYPES[kind].itemsize):
      raise ValueError(
          f'{file}: {name} {list(shape)} has {stop - start:,} bytes: the file '
          'is damaged, fetch it again.')
    yield name, _Entry(file, kind, shape, data + start, stop - start)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """How a folder stores one leaf.

  Attributes:
    name: of the tensor; '{}' stands for the layer of a stacked leaf [L, ...].
    split: None: the tensor is the leaf, reshaped. A number s: with the leaf's
      axes (layers apart) cut into a = axes[:s] and b = axes[s:], the tensor is
      [prod b, prod a], as torch's Linear stores [out, in].
  """

  name: str
  split: int | None = None

  @property
  def stacked(self) -> bool:
    """Whether there is one tensor for each layer."""
    return '{}' in self.name

  def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...] | None:
    """The tensor's shape, None where any of the leaf's size will do."""
    leaf = leaf[1:] if self.stacked else leaf
    if self.split is None:
      return None
    return math.prod(leaf[self.split:]), math.prod(leaf[:self.split])


Table = Mapping[tuple[str, ...], Tensor]


def stream(
    folder: Folder, table: Table, shapes: Any, shardings: Any = None,
    dtype: str = 'float32', ignore: Sequence[str] = (),
) -> Any:
  """Reads the leaves that the table names into device arrays.

  Args:
    folder: where from.
    table: leaf path -> `Tensor`.
    shapes: nested dictionaries of `jax.ShapeDtypeStruct`, the leaves.
    shardings: of the same structure; None: all on the first device.
    dtype: of the result, whatever is stored.
    ignore: regular expressions of names that may be there besides.

  Returns:
    nested dictionaries of jax arrays.

  Raises:
    ValueError: a tensor is missing, unexpected, of another shape or not
      finite; names file, tensor, expected and found.
  """
  check_tensors(folder, table, shapes, ignore)
  everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params: dict[str, Any] = {}
  pending = None  # a tensor under way; the host holds this one and the next
  for path, leaf in _leaves(shapes):
    tensor = table[path]
    placed = everywhere
    if shardings is not None:
      placed = functools.reduce(lambda tree, key: tree[key], path, shardings)
    count = leaf.shape[0] if tensor.stacked else 1
    put = _putter(
        leaf.shape, tensor.split, tensor.stacked, jnp.dtype(dtype).name, placed)
    array = None
    if tensor.stacked:
      array = jax.jit(
          functools.partial(jnp.zeros, leaf.shape, dtype),
          out_shardings=placed)()
    for layer in range(count):
      name = tensor.name.format(layer)
      value = folder.read(name)
      if value.ndim and tensor.split is None:
        value = value.reshape(leaf.shape[1:] if tensor.stacked else leaf.shape)
      value = jax.make_array_from_callback(
          value.shape, _stored_as(placed, tensor),
          lambda index, value=value: np.ascontiguousarray(value[index]))
      array, finite = put(array, value, layer)
      del value
      _check_finite(folder, pending)
      pending = name, finite
    functools.reduce(
        lambda tree, key: tree.setdefault(key, {}), path[:-1], params
    )[path[-1]] = array
  _check_finite(folder, pending)
  return params


@functools.cache
def _putter(shape, split, stacked, dtype, placed):
  """(array or None, stored tensor, layer) -> array with it, is it finite."""
  leaf = shape[1:] if stacked else shape

  def put(array, value, layer):
    finite = jnp.all(jnp.isfinite(value))
    if split is not None:
      value = value.T
    value = value.astype(dtype).reshape(leaf)
    if not stacked:
      return value, finite
    return jax.lax.dynamic_update_index_in_dim(array, value, layer, 0), finite

  return jax.jit(put, donate_argnums=0, out_shardings=(placed, None))


def _stored_as(placed, tensor):
  """The sharding of the stored tensor that needs no data to move."""
  if not isinstance(placed, jax.sharding.NamedSharding):
    return placed
  spec = [*placed.spec][int(tensor.stacked):]
  if tensor.split is not None:
    at = lambda i: spec[i] if i < len(spec) else None
    spec = [at(tensor.split), at(0)]
  return jax.sharding.NamedSharding(
      placed.mesh, jax.sharding.PartitionSpec(*spec))


def check_tensors(
    folder: Folder, table: Table, shapes: Any, ignore: Sequence[str] = ()
) -> None:
  """Compares the headers with the leaves; arguments as of `stream`.

  Raises:
    ValueError: a tensor is missing, unexpected or of another shape.
  """
  leaves = dict(_leaves(shapes))
  assert leaves.keys() == table.keys(), leaves.keys() ^ table.keys()
  expected: dict[str, tuple[int, ...]] = {}
  loose = {}
  for path, tensor in table.items():
    leaf = leaves[path].shape
    for layer in range(leaf[0] if tensor.stacked else 1):
      name = tensor.name.format(layer)
      expected[name] = tensor.shape(leaf) or (
          leaf[1:] if tensor.stacked else leaf)
      loose[name] = tensor.split is None
  problems = []
  for name, shape in expected.items():
    found = folder.tensors.get(name)
    if found is None:
      problems.append(f'the tensor {name} {list(shape)} is missing')
    elif found != shape and not (
        loose[name] and math.prod(found) == math.prod(shape)):
      problems.append(
          f'{folder.file(name).name}: {name} is {list(found)}, and '
          f'config.json makes it {list(shape)}')
    elif folder.kind(name) not in _DTYPES:
      problems.append(
          f'{folder.file(name).name}: {name} is of type {folder.kind(name)}; '
          f'{", ".join(_DTYPES)} are read, and quantised weights have to be '
          'converted first')
  for name in folder.tensors:
    if name not in expected and not any(
        re.search(pattern, name) for pattern in ignore):
      problems.append(
          f'{folder.file(name).name}: the tensor {name} '
          f'{list(folder.tensors[name])} has no place in the model that '
          'config.json describes')
  if problems:
    more = f' (and {len(problems) - 1} more)' if problems[1:] else ''
    raise ValueError(
        f'{folder.path}: {problems[0]}{more}. Config and weights do not belong '
        'together, or a file is incomplete: fetch the folder again.')


def _leaves(shapes):
  """(path of keys, leaf) pairs of nested dictionaries."""
  return [
      (tuple(entry.key for entry in path), leaf)
      for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]]


def _check_finite(folder, pending):
  if pending is not None and not bool(pending[1]):
    name = pending[0]
    raise ValueError(
        f'{folder.file(name)}: {name} holds values that are not '
        'finite (NaN or infinity): the weights are damaged, take an earlier '
        'checkpoint or fetch them again.')
