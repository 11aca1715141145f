"""LoRA (arXiv 2106.09685): small trained matrices beside frozen kernels.

    y = x W + scale (x A) B,   scale = alpha / rank

W is the base, which is also the reference; A and B are the adapters, all that
an optimizer sees. B starts at zero, so that the policy starts as the base.
Decoding and export know nothing of it: they use W + scale A B, from `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

# The kernels that may have adapters, and how many of their dimensions are
# summed over; they are called the same in `qwen`.
INPUTS = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}


@dataclasses.dataclass(frozen=True)
class Config:
  """The leaves of `config.lora`."""

  rank: int
  alpha: float = 16.0
  targets: tuple[str, ...] = tuple(INPUTS)

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(
          f'config.lora.rank = {self.rank}: 0 is off, and adapters have at '
          'least rank 1.')
    if self.alpha <= 0:
      raise ValueError(
          f'config.lora.alpha = {self.alpha}: what the adapters add is '
          'multiplied by alpha / rank, choose a positive number.')
    if not self.targets or not set(self.targets) <= set(INPUTS):
      raise ValueError(
          f'config.lora.targets = {tuple(self.targets)!r}: name one or more of '
          f'{", ".join(INPUTS)}.')

  @property
  def scale(self) -> float:
    """What the adapters add is multiplied by it."""
    return self.alpha / self.rank


@struct.dataclass
class Adapted:
  """Parameters of an actor whose base does not learn."""

  base: Any  # of the actor
  adapters: Any  # {'layers': {block: {kernel: {'a', 'b'}}}}, float32


def variables(params: Any) -> dict[str, Any]:
  """What `qwen.Qwen` is applied to; of an `Adapted` or plain parameters."""
  if not isinstance(params, Adapted):
    return {'params': params}
  return {'params': params.base, 'lora': params.adapters}


def init(config: Config, actor: Any, key: jax.Array) -> Any:
  """Float32 adapters of an actor's parameters, or of their shapes: B is zero.

  A is normal with the deviation of one over the square root of its inputs.
  """

  def pair(name, kernel):
    layers, *sizes = kernel.shape
    inputs, outputs = _split(name, sizes)
    a = jax.random.normal(
        jax.random.fold_in(key, list(INPUTS).index(name)),
        (layers, *inputs, config.rank))
    return {
        'a': a / np.sqrt(np.prod(inputs)),
        'b': jnp.zeros((layers, config.rank, *outputs))}

  return _each(config, pair, actor)


def axes(config: Config, actor: Any) -> Any:
  """Logical axis names of adapters, from those of the actor's parameters."""

  def pair(name, spec):
    layers, *names = spec
    inputs, outputs = _split(name, names)
    return {
        'a': PartitionSpec(layers, *inputs, 'rank'),
        'b': PartitionSpec(layers, 'rank', *outputs)}

  return _each(config, pair, actor)


def merge(config: Config, params: Adapted, dtype: Any) -> Any:
  """Plain parameters: W + scale A B, summed in float32, in `dtype`.

  Everything else is that of the base, as it is.
  """

  def merged(_, kernel, pair):
    # Not layer by layer: XLA would gather a kernel whole for every layer.
    added = jax.vmap(lambda a, b: jnp.tensordot(
        a, b, 1, precision=jax.lax.Precision.HIGHEST))(pair['a'], pair['b'])
    return (kernel.astype(jnp.float32) + config.scale * added).astype(dtype)

  new = _each(config, merged, params.base, params.adapters)
  return params.base | {'layers': params.base['layers'] | {
      block: params.base['layers'][block] | kernels
      for block, kernels in new['layers'].items()}}


def _split(name, dimensions):
  """Those of a kernel that are summed over, and the others."""
  return dimensions[:INPUTS[name]], dimensions[INPUTS[name]:]


def _each(config, function, *trees):
  """function(name, *kernels) for the targets in trees like an actor's."""
  blocks = {}
  for block, kernels in trees[0]['layers'].items():
    if isinstance(kernels, Mapping):
      found = {
          name: function(name, *(tree['layers'][block][name] for tree in trees))
          for name in kernels if name in config.targets}
      if found:
        blocks[block] = found
  return {'layers': blocks}
