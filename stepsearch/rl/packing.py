"""Packing: several short trajectories share a row of the update.

    lengths ─▶ rows ─▶ source [N, R, W]: which (trajectory, position) each slot
                       of pass n, row r holds

Everything per trajectory (rewards, KL, GAE, whitening) is done before; packing
only moves tokens. A packed row keeps its trajectories apart by segment ids, and
positions start anew with each.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def plan(
    lengths: np.ndarray, members: Sequence[int], width: int, rows: int,
    passes: int,
) -> tuple[np.ndarray, int]:
  """Puts trajectories into as few rows as first-fit decreasing finds.

  Args:
    lengths: [B] int, tokens of each trajectory, at most `width`.
    members: which trajectories to pack.
    width: slots of a row, W; that of the trajectories' arrays.
    rows: of one pass over the model, R.
    passes: N, enough for one trajectory a row.

  Returns:
    source [N, R, W] int32: trajectory * W + position, -1 where a slot is empty;
    and how many of the passes hold anything.
  """
  contents: list[list[int]] = []
  room: list[int] = []
  for member in sorted(members, key=lambda i: (-lengths[i], i)):
    need = lengths[member]
    row = next((r for r, free in enumerate(room) if free >= need), len(room))
    if row == len(room):
      contents.append([])
      room.append(width)
    contents[row].append(member)
    room[row] -= need
  source = np.full((passes * rows, width), -1, np.int32)
  for row, packed in enumerate(contents):
    start = 0
    for member in packed:
      length = lengths[member]
      source[row, start:start + length] = member * width + np.arange(length)
      start += length
  return source.reshape(passes, rows, width), -(-len(contents) // rows)


def gather(x: jax.Array, source: jax.Array) -> jax.Array:
  """Values of x [B, W] at the slots of `source` [...]; 0 in empty ones."""
  return jnp.take(
      x.reshape(-1), _in_bounds(source, x.size), mode='fill', fill_value=0)


def scatter(packed: jax.Array, source: jax.Array, shape: tuple[int, int]):
  """Inverse of `gather`: [B, W] = shape, 0 where nothing was packed."""
  size = shape[0] * shape[1]
  flat = jnp.zeros((size,), packed.dtype).at[_in_bounds(source, size)].set(
      packed, mode='drop')
  return flat.reshape(shape)


def places(source: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions within the trajectory, and segment ids (0 = empty), int32."""
  width = source.shape[-1]
  filled = source >= 0
  return (
      jnp.where(filled, source % width, 0),
      jnp.where(filled, source // width + 1, 0))


def _in_bounds(source, size):
  # Negative indices would count from the end.
  return jnp.where(source < 0, size, source)
