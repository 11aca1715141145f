"""Which examples belong to which step.

Epoch e visits the examples in the order `default_rng((seed, e)).permutation(n)`
and step s takes places [s B, (s + 1) B) of the epochs laid end to end, so that
a batch may cross from one into the next. Nothing is remembered: a resumed run
asks for its step and gets what it would have got.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stepsearch.types import Example


class Loader:
  """Batches of examples, indexed by step."""

  def __init__(
      self, examples: Sequence[Example], batch_size: int, seed: int
  ):
    """Takes the examples of the whole run.

    Args:
      examples: the same in every process.
      batch_size: questions a step, over all processes.
      seed: of the order.

    Raises:
      ValueError: no examples, or no batch.
    """
    if not examples:
      raise ValueError('The loader was given no examples to train on.')
    if batch_size < 1:
      raise ValueError(f'batch_size = {batch_size} must be at least 1.')
    self._examples = tuple(examples)
    self._batch_size = batch_size
    self._seed = seed
    self._orders: dict[int, np.ndarray] = {}  # epoch -> its permutation

  def batch(self, step: int) -> list[Example]:
    """Returns the batch of one step: of all processes, which play it as one."""
    start = step * self._batch_size
    epochs, places = np.divmod(
        np.arange(start, start + self._batch_size), len(self._examples)
    )
    return [
        self._examples[self._order(epoch)[place]]
        for epoch, place in zip(epochs.tolist(), places.tolist())
    ]

  def _order(self, epoch: int) -> np.ndarray:
    if epoch not in self._orders:
      self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
      generator = np.random.default_rng((self._seed, epoch))
      self._orders[epoch] = generator.permutation(len(self._examples))
    return self._orders[epoch]


def eval_batches(
    examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[Example], int]]:
  """Yields every example once, in order, in batches of one size.

  Args:
    examples: the questions.
    batch_size: length of every batch.

  Yields:
    A batch and how many of its examples count: the last one is filled up by
    repeating its own.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size = {batch_size} must be at least 1.')
  for start in range(0, len(examples), batch_size):
    real = list(examples[start : start + batch_size])
    yield [real[i % len(real)] for i in range(batch_size)], len(real)
