"""What summing gradients over the mesh in bfloat16 does to an update.

    python -m tests.benchmarks.gathering

A layer gathers its weights in the computation's dtype, so that their gradients
are summed over the mesh in it too (`sharding.Layout.gather`). Here the gradient
of every shard is computed by itself, and the sum is taken in both ways: the
distance from the float32 gradient, relative to its norm, and the cosine to it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch.models import qwen
from stepsearch.rl import policy

_SHARDS, _ROWS, _LENGTH = 16, 2, 128
_MODEL = qwen.Config(
    vocab_size=2048, embed=256, layers=4, heads=4, kv_heads=2, head_dim=64,
    mlp=704)


@functools.partial(jax.jit, static_argnums=0)
def gradient(dtype, params, tokens, weights):
  """Of a weighted sum of log-probs, as the policy's; of `dtype`'s making."""
  model = qwen.Qwen(dataclasses.replace(_MODEL, dtype=dtype))

  def loss(params):
    logprobs, _ = policy.next_token_logprobs(model, params, tokens, 1.0, 64)
    return jnp.sum(logprobs * weights)

  # The dtype in which a layer uses a weight is that of its gradient.
  return jax.grad(loss)(qwen.compact(model.config, params))


def flat(tree):
  """All entries of a pytree, float64."""
  return np.concatenate([
      np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def pairwise(trees, dtype):
  """The sum of pytrees, halves first, every partial sum rounded to `dtype`."""
  while len(trees) > 1:
    trees = [
        jax.tree.map(
            lambda x, y: (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(
                dtype), *pair)
        for pair in zip(trees[::2], trees[1::2])]
  return trees[0]


def main() -> None:
  """Prints one line a way of summing."""
  rng = np.random.default_rng(0)
  params = qwen.init(_MODEL, jax.random.key(0))
  shape = (_SHARDS, _ROWS, _LENGTH)
  tokens = rng.integers(0, _MODEL.vocab_size, shape).astype(np.int32)
  # Advantages of either sign, so that much of the sum cancels.
  weights = rng.normal(size=shape).astype(np.float32)
  exact, half = (
      [gradient(dtype, params, *pair) for pair in zip(tokens, weights)]
      for dtype in ('float32', 'bfloat16'))
  target = flat(pairwise(exact, jnp.float32))
  for name, dtype in (('float32', jnp.float32), ('bfloat16', jnp.bfloat16)):
    found = flat(pairwise(half, dtype))
    norm = np.linalg.norm
    print(
        f'{_SHARDS} shards of bfloat16, summed in {name}: distance '
        f'{norm(found - target) / norm(target):.4f}, cosine '
        f'{found @ target / norm(found) / norm(target):.6f}')


if __name__ == '__main__':
  main()
