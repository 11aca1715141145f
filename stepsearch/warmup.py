"""Supervised warm-up on demonstrations, before any reward.

    (question, text) ─▶ tokens + mask ─▶ cross-entropy on the searcher's words

Small models need it to know the format; what the environment wrote is masked,
as it is in RL. Warm-up updates are not steps: step 0 is the warmed-up policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepsearch import protocol as protocol_lib
from stepsearch import sharding
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rl import policy

_GROUP = 8  # updates whose rows are sorted by length together


@dataclasses.dataclass(frozen=True)
class Config:
  """The leaves of `config.warmup`."""

  steps: int = 0  # 0 = no warm-up
  batch_size: int = 32
  learning_rate: float = 1e-5  # peak; linear ramp, then cosine to a tenth
  ramp: float = 0.05  # share of the steps
  weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """Tokenised demonstrations, left-aligned and padded with 0."""

  tokens: np.ndarray  # [n, T] int32
  mask: np.ndarray  # [n, T] float32, 1 on the searcher's own words
  length: np.ndarray  # [n] int32


def tokenize(
    rows: Sequence[tuple[str, str]], tokenizer: Any,
    protocol: protocol_lib.Protocol, max_length: int, chat: str = 'auto',
) -> Demonstrations:
  """Encodes demonstrations, each stretch of policy or environment apart.

  Args:
    rows: (question, text with tags) pairs.
    tokenizer: a `tokenizer.Tokenizer`.
    protocol: gives the prompt.
    max_length: longest demonstration with its prompt, in tokens.
    chat: as of `config.rollout.chat`.

  Raises:
    ValueError: no rows, one that is too long, one that breaks the format.
  """
  if not rows:
    raise ValueError(
        'config.warmup: there are no demonstrations to learn from.')
  cache: dict[str, list[int]] = {}

  def encode(text):
    if text not in cache:
      cache[text] = tokenizer.encode(text)
    return cache[text]

  encoded = []
  for number, (question, text) in enumerate(rows):
    if not protocol_lib.format_ok(protocol_lib.split_transcript(text)):
      raise ValueError(
          f'demonstration {number} ({question!r}) breaks the format that the '
          'rewards ask for: rounds of think and search tags, and one answer '
          'pair at the end.')
    ids = list(tokenizer.prompt(question, protocol.instruction, chat))
    mask = [0.0] * len(ids)
    for piece, written in protocol.pieces(text):
      fresh = encode(piece)
      ids += fresh
      mask += [float(written)] * len(fresh)
    if len(ids) > max_length:
      raise ValueError(
          f'demonstration {number} ({question!r}) has {len(ids)} tokens and '
          f'config.rollout.max_length = {max_length}: shorten it or raise the '
          'budget.')
    encoded.append((ids, mask))
  width = max(len(ids) for ids, _ in encoded)
  tokens = np.zeros((len(encoded), width), np.int32)
  masks = np.zeros((len(encoded), width), np.float32)
  for row, (ids, mask) in enumerate(encoded):
    tokens[row, :len(ids)] = ids
    masks[row, :len(ids)] = mask
  return Demonstrations(
      tokens, masks, np.asarray([len(i) for i, _ in encoded], np.int32))


def train(
    params: Any, demonstrations: Demonstrations, model: qwen.Config,
    config: Config, layout: sharding.Layout, seed: int, *,
    length_multiple: int = 64, logprob_chunk: int = 256,
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Any:
  """Trains actor parameters by cross-entropy; returns the new ones.

  With adapters it is these that are trained, and merged at the end.

  Args:
    params: actor parameters, donated.
    demonstrations: from `tokenize`.
    model: sizes.
    config: the leaves of `config.warmup`.
    layout: of the update.
    seed: orders the rows, drives `augment` and draws adapters.
    length_multiple: rows are padded to a multiple of it.
    logprob_chunk: positions of a row whose logits exist at a time.
    augment: tokens [B, T], generator -> tokens; renames entities, say.
    on_step: called after each update with its number (from 1) and metrics.

  Raises:
    FloatingPointError: the loss is not finite.
  """
  actor = qwen.Qwen(model, layout)
  tx = policy.optimizer('adamw', 0.9, 0.95, config.weight_decay, 1.0)
  ramp = max(round(config.ramp * config.steps), 1)
  schedule = optax.schedules.warmup_cosine_decay_schedule(
      config.learning_rate / ramp, config.learning_rate, ramp,
      max(config.steps, ramp + 1), 0.1 * config.learning_rate)

  # What learns, and how it and the rest make an actor.
  fresh, axes = lambda p: p, qwen.axes(model)[0]
  whole = lambda trained, _: trained
  if model.lora is not None:
    key = jax.random.fold_in(jax.random.key(seed), 6)
    fresh = lambda p: lora.init(model.lora, p, key)
    axes = lora.axes(model.lora, axes)
    whole = lambda trained, base: lora.Adapted(base, trained)

  def loss(trained, base, tokens, mask):
    logprobs, _ = policy.next_token_logprobs(
        actor, whole(trained, base), tokens, 1.0, logprob_chunk)
    return -jnp.sum(logprobs * mask) / jnp.maximum(jnp.sum(mask), 1.0)

  placed = policy.shardings(tx, jax.eval_shape(fresh, params), axes, layout)
  start = jax.jit(
      lambda p: policy.ModelState(fresh(p), tx.init(fresh(p))),
      out_shardings=placed)

  def step_on(state, base, tokens, mask, rate):
    value, grads = jax.value_and_grad(loss)(state.params, base, tokens, mask)
    return policy.apply_gradients(tx, state, grads, rate), value

  update = jax.jit(
      step_on, donate_argnums=0,
      out_shardings=(placed, layout.replicated))
  state = start(params)
  base = None if model.lora is None else params
  previous = None
  for step in range(config.steps):
    rng = np.random.default_rng((seed, 3, step))
    rows = _rows(
        step, demonstrations.length, config.batch_size, seed)
    width = int(demonstrations.length[rows].max())
    width = -(-width // length_multiple) * length_multiple
    tokens, mask = (
        _fit(x[rows], width)
        for x in (demonstrations.tokens, demonstrations.mask))
    if augment is not None:
      tokens = augment(tokens, rng)
    state, value = update(
        state, base, *sharding.shard_batch((tokens, mask), layout),
        jnp.float32(schedule(step)))
    if previous is not None:
      _report(step, previous, on_step)
    previous = value
  if previous is not None:
    _report(config.steps, previous, on_step)
  if base is None:
    return state.params
  return jax.jit(
      lambda base, adapters: lora.merge(
          model.lora, lora.Adapted(base, adapters), jnp.float32),
      donate_argnums=0, out_shardings=layout.place(qwen.axes(model)[0]))(
          base, state.params)


def _report(step, value, on_step):
  value = float(value)
  if not np.isfinite(value):
    raise FloatingPointError(
        f'the warm-up loss is {value} at update {step}: lower '
        'config.warmup.learning_rate.')
  if on_step is not None:
    on_step(step, {'warmup/loss': value})


def _rows(step, lengths, batch, seed):
  """Row numbers of one update, of like length so that little is padding.

  Every run of `_GROUP` updates takes the next `_GROUP` batches of an endless
  stream of permutations, sorts them by length and deals them out in an order
  of its own.
  """
  group, member = divmod(step, _GROUP)
  size, count = len(lengths), _GROUP * batch
  places = np.arange(group * count, (group + 1) * count)
  rows = np.empty(count, np.int64)
  for epoch in np.unique(places // size):
    order = np.random.default_rng((seed, 4, int(epoch))).permutation(size)
    here = places // size == epoch
    rows[here] = order[places[here] % size]
  rows = rows[np.argsort(lengths[rows], kind='stable')].reshape(_GROUP, batch)
  dealt = np.random.default_rng((seed, 5, group)).permutation(_GROUP)
  return rows[dealt[member]]


def _fit(array, width):
  """Cuts or zero-pads [B, T] to [B, width]."""
  array = array[:, :width]
  return np.pad(array, ((0, 0), (0, width - array.shape[1])))
