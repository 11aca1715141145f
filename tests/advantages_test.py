import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch.rl import advantages


def loop_gae(rewards, values, mask, gamma, lam):
  """GAE over the masked tokens alone, packed together, from the definition."""
  out = np.zeros_like(rewards)
  for row in range(len(rewards)):
    at = np.flatnonzero(mask[row])
    r, v = rewards[row, at], np.append(values[row, at], 0.0)
    delta = r + gamma * v[1:] - v[:-1]
    for i in range(len(at)):
      out[row, at[i]] = sum(
          (gamma * lam)**(j - i) * delta[j] for j in range(i, len(at)))
  return out


def test_gae_hand_table():
  # Sampled at 1, 2, 5; tokens 3 and 4 are retrieved, 0 is the prompt. With
  # gamma 1/2 and lambda 1/2 (so 1/4 a token):
  #   t = 5: delta = 4 - 2 = 2            A = 2
  #   t = 2: delta = 0 + 2/2 - 3 = -2     A = -2 + 2/4 = -1.5
  #   t = 1: delta = 1 + 3/2 - 1 = 1.5    A = 1.5 - 1.5/4 = 1.125
  mask = jnp.asarray([[0, 1, 1, 0, 0, 1.]])
  rewards = jnp.asarray([[9, 1, 0, 9, 9, 4.]])
  values = jnp.asarray([[7, 1, 3, 7, 7, 2.]])
  found, returns = advantages.gae(rewards, values, mask, 0.5, 0.5)
  np.testing.assert_array_equal(found, [[0, 1.125, -1.5, 0, 0, 2]])
  np.testing.assert_array_equal(returns, [[0, 2.125, 1.5, 0, 0, 4]])


@pytest.mark.parametrize(
    ('gamma', 'lam'), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_gae_is_the_loop_with_holes(gamma, lam):
  rng = np.random.default_rng(0)
  shape = (6, 33)
  rewards = rng.normal(size=shape).astype(np.float32)
  values = rng.normal(size=shape).astype(np.float32)
  mask = (rng.random(shape) < 0.5).astype(np.float32)
  mask[0], mask[1] = 0, 1
  expected = loop_gae(rewards, values, mask, gamma, lam)
  found, returns = advantages.gae(
      *map(jnp.asarray, (rewards, values, mask)), gamma, lam)
  assert found.dtype == returns.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_allclose(returns, (expected + values) * mask, atol=1e-5)


def test_undiscounted_advantage_is_reward_to_come_less_value():
  rng = np.random.default_rng(1)
  rewards, values = rng.normal(size=(2, 3, 20)).astype(np.float32)
  mask = (rng.random((3, 20)) < 0.6).astype(np.float32)
  found, returns = advantages.gae(
      *map(jnp.asarray, (rewards, values, mask)), 1.0, 1.0)
  to_come = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1] * mask
  np.testing.assert_allclose(returns, to_come, atol=1e-5)
  np.testing.assert_allclose(found, (to_come - values) * mask, atol=1e-5)


def test_whitening_is_over_the_mask():
  rng = np.random.default_rng(2)
  x = (3 + 2 * rng.normal(size=(5, 40))).astype(np.float32)
  mask = (rng.random((5, 40)) < 0.5).astype(np.float32)
  outside = x + 1e3 * (1 - mask)
  white = np.asarray(advantages.whiten(
      jnp.asarray(outside), jnp.asarray(mask), 0.1))
  inside = x[mask > 0]
  np.testing.assert_allclose(
      white[mask > 0], (inside - inside.mean()) / inside.std(), atol=1e-5)
  assert (white[mask == 0] == 0).all()


def test_whitening_floor():
  # Deviation 1e-3: divided by the floor, and not by itself.
  x = jnp.asarray([[1.001, 0.999, 5.0]])
  mask = jnp.asarray([[1., 1., 0.]])
  white = advantages.whiten(x, mask, 0.1)
  np.testing.assert_allclose(white, [[0.01, -0.01, 0]], atol=1e-6)
  white = advantages.whiten(x, mask, 1e-6)
  np.testing.assert_allclose(white, [[1, -1, 0]], rtol=1e-3)


def test_nothing_sampled_is_zero():
  zeros = jnp.zeros((2, 3))
  assert (advantages.whiten(zeros + 1, zeros, 0.1) == 0).all()
  assert advantages.masked_mean(zeros + 1, zeros) == 0
  assert advantages.masked_mean(
      jnp.asarray([1., 2., 9.]), jnp.asarray([1., 1., 0.])) == 1.5
