"""Token-level advantages over what the actor sampled.

Owns generalised advantage estimation with holes (retrieved tokens are bridged,
not counted) and masked whitening with a floor on the deviation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x where mask is 1; 0 for an empty mask."""
  return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    gamma: jax.Array | float,
    gae_lambda: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over the tokens where mask is 1.

  For sampled tokens t_1 < t_2 < ... of a row (arXiv 1506.02438, Eq. 16, with
  "next" meaning the next sampled token, however many retrieved ones lie
  between):  delta_i = r_i + gamma V_{i+1} - V_i,
  A_i = delta_i + gamma lambda A_{i+1},  V after the last one is 0.

  Args:
    rewards: [B, T] float32; only entries under the mask count.
    values: [B, T] float32, V before token t.
    mask: [B, T] float32, 1 on sampled tokens.
    gamma: discount per sampled token.
    gae_lambda: the lambda of GAE.

  Returns:
    advantages and returns (advantages + values), [B, T] float32, 0 off mask.
  """

  def back(carry, x):
    next_value, next_advantage = carry
    reward, value, here = x
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * gae_lambda * next_advantage
    carry = (
        jnp.where(here > 0, value, next_value),
        jnp.where(here > 0, advantage, next_advantage),
    )
    return carry, advantage * here

  zeros = jnp.zeros(rewards.shape[0], jnp.float32)
  _, advantages = jax.lax.scan(
      back, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)
  advantages = advantages.T
  return advantages, (advantages + values) * mask


def whiten(x: jax.Array, mask: jax.Array, floor: float) -> jax.Array:
  """Zero mean and unit deviation over the mask; 0 off it.

  The deviation is not taken below `floor`: a batch without reward would
  otherwise have its critic noise scaled to unit variance.

  Args:
    x: [B, T] float32.
    mask: [B, T] float32.
    floor: smallest deviation to divide by, in units of x.
  """
  centred = (x - masked_mean(x, mask)) * mask
  deviation = jnp.sqrt(masked_mean(centred * centred, mask))
  return centred / jnp.maximum(deviation, floor)
