"""Keys and values of rows in flight: where they lie, how they are written.

Two layouts, one for each way to run the layers (`qwen.feed`):

* stacked, [L, B, K, S, H]: the layer scan reads its layer and emits the new
  entries, which are written once, after it. As fast as unrolled layers by the
  TPU compiler, which needs a tenth of the time for it. Of heads narrower than a
  TPU's lanes, p may share a row: [L, B, K / p, S, p H].
* a tuple of L arrays [B, K, S, H]: each layer writes its entries, then reads
  them. Elsewhere a scan copies the layer's part of cache and weights before it
  uses them, which is half the time of a decoding step on a CPU.
"""

from __future__ import annotations

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Cache:
  """Keys (rotated) and values, of the computation's dtype."""

  k: Any  # [L, B, K, S, H] or [L, B, K / p, S, p H], or L times [B, K, S, H]
  v: Any


def write(
    cache: Any, new: Any, position: jax.Array, rows: jax.Array | None = None,
    shards: int = 1,
) -> Any:
  """Writes T new entries of each row at that row's own position.

  The caller allocates S >= position + T for every row: a write past the end is
  clamped by XLA and would overwrite valid entries.

  Args:
    cache: arrays [..., B, K, S, H]; heads may share rows.
    new: arrays [..., n, K, T, H]; or as those of the cache.
    position: [n] int32, where each row's first new entry goes.
    rows: [n] int32, the rows to be written, as of `pick`; None: all B.
    shards: as of `pick`.

  Returns:
    the cache with the entries in it.
  """

  def vectorised(x, fresh):
    def row(x, fresh, start):  # [..., K, S, H], [..., K, T, H]
      return jax.lax.dynamic_update_slice(
          x, fresh, (0,) * (x.ndim - 2) + (start, 0))

    axis = x.ndim - 4
    return jax.vmap(row, in_axes=(axis, axis, 0), out_axes=axis)(
        x, fresh, position)

  def looped(x, fresh, rows, position):
    lead = (0,) * (x.ndim - 4)

    def row(i, x):
      return jax.lax.dynamic_update_slice(
          x, jax.lax.dynamic_slice_in_dim(fresh, i, 1, axis=len(lead)),
          (*lead, rows[i], 0, position[i], 0))

    return jax.lax.fori_loop(0, rows.shape[0], row, x)

  def sequential(x, fresh):
    at = jnp.arange(x.shape[-4]) if rows is None else rows
    if shards == 1:
      return looped(x, fresh, at, position)
    axis = x.ndim - 4
    found = jax.vmap(looped, in_axes=(axis, axis, 0, 0), out_axes=axis)(
        _split(x, shards), _split(fresh, shards), _local(at, x, shards),
        position.reshape(shards, -1))
    return found.reshape(x.shape)

  def leaf(x, fresh):
    shared = x.shape[-1] // fresh.shape[-1]
    if shared > 1:
      *lead, heads, length, size = fresh.shape
      fresh = jnp.moveaxis(
          fresh.reshape(*lead, heads // shared, shared, length, size), -3, -2)
      fresh = fresh.reshape(*lead, heads // shared, length, shared * size)
    if rows is not None:
      return sequential(x, fresh)
    # The vectorised form copies the whole cache on CPU and, once a call, on
    # TPU; a kernel for every row and layer is too much for a GPU's step. The
    # few rows of a start or an append are written one by one everywhere.
    return jax.lax.platform_dependent(
        x, fresh, default=sequential, cuda=vectorised, rocm=vectorised)

  return jax.tree.map(leaf, cache, new)


def pick(cache: Any, rows: jax.Array | None, shards: int = 1) -> Any:
  """Some rows of a cache.

  Args:
    cache: arrays [..., B, K, S, H].
    rows: [n] int32; None: all. With several shards, the j-th of `shards` equal
      parts of `rows` lies in the j-th part of the B rows, so that no device
      needs another's.
    shards: parts that the B rows are split into, on as many devices.
  """

  def leaf(x):
    if rows is None:
      return x
    axis = x.ndim - 4
    if shards == 1:
      return jnp.take(x, rows, axis=axis, mode='clip')
    take = jax.vmap(
        lambda x, rows: jnp.take(x, rows, axis=axis, mode='clip'),
        in_axes=(axis, 0), out_axes=axis)
    found = take(_split(x, shards), _local(rows, x, shards))
    return found.reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])

  return jax.tree.map(leaf, cache)


def _split(x, shards):
  axis = x.ndim - 4
  return x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1:])


def _local(rows, x, shards):
  """Rows as each shard counts them, [shards, n / shards]."""
  return (rows % (x.shape[-4] // shards)).reshape(shards, -1)


@struct.dataclass
class Layer:
  """One layer's cache that is written before it is read; a step of `feed`."""

  k: jax.Array  # [B, K, S, H]
  v: jax.Array  # [B, K, S, H]
  rows: jax.Array | None  # as of `pick`
  shards: int = struct.field(pytree_node=False)
  fresh: bool = struct.field(pytree_node=False)  # nothing precedes the tokens

  def add(self, new: Cache, position: jax.Array) -> Layer:
    """Writes entries [n, K, T, H] at `position` [n]."""
    k, v = write(
        (self.k, self.v), (new.k, new.v), position, self.rows, self.shards)
    return self.replace(k=k, v=v)

  def seen(self) -> Cache:
    """What the n rows may see, [n, K, S, H]."""
    return Cache(*pick((self.k, self.v), self.rows, self.shards))
