import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch.rl import packing

WIDTH = 12


def first_fit(lengths, width):
  """Rows that first-fit decreasing needs, as sums."""
  rows = []
  for length in sorted(lengths, reverse=True):
    for i, used in enumerate(rows):
      if used + length <= width:
        rows[i] += length
        break
    else:
      rows.append(length)
  return rows


@pytest.mark.parametrize('seed', range(4))
def test_every_token_is_packed_once_and_in_order(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, WIDTH + 1, 20)
  members = rng.permutation(20)[:14]
  source, passes = packing.plan(lengths, members, WIDTH, 2, 7)
  assert source.shape == (7, 2, WIDTH) and source.dtype == np.int32
  rows = len(first_fit(lengths[members], WIDTH))
  assert passes == -(-rows // 2) and (source[passes:] == -1).all()
  found = source[source >= 0]
  expected = {
      i * WIDTH + t for i in members for t in range(lengths[i])}
  assert len(found) == len(expected) and set(found.tolist()) == expected
  positions, segments = jax.tree.map(
      np.asarray, packing.places(jnp.asarray(source)))
  for row, at, kind in zip(
      source.reshape(-1, WIDTH), positions.reshape(-1, WIDTH),
      segments.reshape(-1, WIDTH)):
    for t in range(WIDTH):
      if row[t] < 0:
        assert at[t] == kind[t] == 0
      else:
        assert (kind[t] - 1) * WIDTH + at[t] == row[t]
        # A trajectory starts with its first token and goes on with the next.
        assert at[t] == 0 or row[t - 1] == row[t] - 1


def test_gather_and_scatter_are_inverse():
  rng = np.random.default_rng(9)
  lengths = rng.integers(1, WIDTH + 1, 6)
  x = rng.normal(size=(6, WIDTH)).astype(np.float32)
  x[np.arange(WIDTH)[None] >= lengths[:, None]] = 0
  source, _ = packing.plan(lengths, range(6), WIDTH, 3, 2)
  packed = packing.gather(jnp.asarray(x), jnp.asarray(source))
  for slot, value in zip(source.ravel(), np.asarray(packed).ravel()):
    assert value == (x.ravel()[slot] if slot >= 0 else 0)
  np.testing.assert_array_equal(
      packing.scatter(packed, jnp.asarray(source), x.shape), x)


def test_one_trajectory_a_row_always_fits():
  source, passes = packing.plan(np.full(8, WIDTH), range(8), WIDTH, 4, 2)
  assert passes == 2 and (source >= 0).all()
