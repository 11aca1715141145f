"""The loss terms of PPO: pure array maths, per token.

Every function returns per-token terms [B, T]; how they are averaged (`weights`)
is one decision for all of them: the paper takes the mean over trajectories of
token means (Eq. 1 of arXiv 2505.15107), the released code the token mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch import sharding


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float,
    chunk: int,
    layout: sharding.Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
  """log pi(target) and entropy per token, without ever holding [B, T, V].

  Logits are made `chunk` positions at a time, forward and backward.

  Args:
    hidden: [B, T, D], the state from which each target is predicted.
    unembedding: [D, V].
    targets: [B, T] int32.
    temperature: the logits are divided by it.
    chunk: positions of a row per piece; T need not be a multiple.
    layout: of the update; needed on several devices.

  Returns:
    logprobs [B, T] and entropy [B, T], float32, in nats.
  """
  batch, length, _ = hidden.shape
  size = unembedding.shape[1]
  several = layout is not None and layout.mesh.size > 1
  wide = lambda x, *names, **more: x
  if several:
    wide = layout.by_vocabulary(size).constrain
  chunk = min(chunk, length)
  pieces = -(-length // chunk)
  pad = pieces * chunk - length
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, pad)))
  # Its gradient is summed over the pieces in float32, if it is of that type.
  matrix = wide(unembedding, None, 'vocab')

  @jax.checkpoint
  def piece(_, x):
    states, labels = x  # [B, C, D], [B, C]
    states = wide(states, 'batch', None, None, beside='vocab')
    logits = wide(
        jnp.einsum(
            'bcd,dv->bcv', states, matrix.astype(states.dtype),
            preferred_element_type=jnp.float32), 'batch', None, 'vocab')
    logits /= temperature
    norm = jax.nn.logsumexp(logits, axis=-1)
    if several:  # a gather would need whole rows
      here = jnp.arange(size)[None, None] == labels[..., None]
      picked = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    else:
      picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    mean = jnp.sum(
        jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return None, tuple(
        wide(x, 'batch', None) for x in (picked - norm, norm - mean))

  split = lambda x: jnp.moveaxis(
      x.reshape(batch, pieces, chunk, *x.shape[2:]), 1, 0)
  _, (logprobs, entropy) = jax.lax.scan(
      piece, None, (split(hidden), split(targets)))
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
  return join(logprobs), join(entropy)


def kl(logprobs: jax.Array, other: jax.Array, kind: str) -> jax.Array:
  """Per-token estimate of KL(pi || other) from tokens sampled by pi.

  With r = log other - log pi: k1 = -r, k2 = r^2 / 2, k3 = e^r - r - 1.

  Args:
    logprobs: [B, T] log pi.
    other: [B, T] log-probabilities of the other policy.
    kind: 'k1', 'k2' or 'k3'.
  """
  ratio = other - logprobs
  if kind == 'k1':
    return -ratio
  if kind == 'k2':
    return 0.5 * ratio * ratio
  if kind == 'k3':
    return jnp.expm1(ratio) - ratio
  raise ValueError(f'kl kind {kind!r}: choose k1, k2 or k3.')


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    clip_eps: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """Clipped surrogate of PPO, negated; Eq. (1) of arXiv 2505.15107.

  Returns:
    the loss per token, and 1 where the clipped branch is the smaller one.
  """
  ratio = jnp.exp(logprobs - old_logprobs)
  free = ratio * advantages
  clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps) * advantages
  return -jnp.minimum(free, clipped), (clipped < free).astype(jnp.float32)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    value_clip: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """Half the larger of the plain and the clipped squared error, per token.

  The prediction may move by `value_clip` from the recorded one before the
  clipped branch stops rewarding it.
  """
  clipped = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
  plain_error = (values - returns)**2
  clipped_error = (clipped - returns)**2
  return 0.5 * jnp.maximum(plain_error, clipped_error), (
      clipped_error > plain_error).astype(jnp.float32)


def weights(mask: jax.Array, average: str) -> jax.Array:
  """Weights [B, T] that sum to 1 over a minibatch and average token terms.

  Args:
    mask: [B, T] float32 over the *whole* minibatch.
    average: 'trajectory' (paper: mean over trajectories of token means) or
      'token' (released code: mean over all tokens).
  """
  if average == 'token':
    return mask / jnp.maximum(jnp.sum(mask), 1.0)
  if average == 'trajectory':
    counts = jnp.sum(mask, axis=-1, keepdims=True)
    rows = jnp.maximum(jnp.sum(counts > 0), 1)
    return mask / jnp.maximum(counts, 1.0) / rows
  raise ValueError(f'average {average!r}: choose trajectory or token.')
