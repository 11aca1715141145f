"""On-device sampling: prefill, append, and decode until every row has stopped.

Tokens in, tokens out; text never comes here. Rows are left-aligned and
independent: a row's sample depends on its own tokens, its key and the absolute
position only. A row's last token is *pending*: it is in `tokens` but not yet in
the cache, and is fed by whatever comes next. So neither prefill nor append
computes a logit.

When a row has stopped is told by a stop table, an automaton over tokens whose
states 1 and 2 say that a closing search or answer tag has been completed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch.models import qwen

# Why a row is not decoding.
RUNNING, SEARCH, ANSWER, EOS, BUDGET = range(5)


@struct.dataclass
class State:
  """B episodes in flight; S positions, R turns."""

  tokens: jax.Array  # [B, S] int32
  length: jax.Array  # [B] int32, tokens of each row, the pending one included
  loss_mask: jax.Array  # [B, S] float32, 1 iff sampled here
  logprobs: jax.Array  # [B, S] float32, log-softmax(logits / temperature)
  turn_ends: jax.Array  # [B, R] int32, where search turn r was closed, or -1
  stop: jax.Array  # [B] int32, one of the codes above
  cache: qwen.Cache  # [L, B, K, S, H], length - 1 valid entries a row


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Compiled sampling for one model shape; hashable, holds no arrays.

  `size` is S, the positions of the cache. It must hold every row's tokens plus
  the longest appended chunk, since a chunk is written whole, padding included.
  """

  model: qwen.Config
  size: int
  turns: int  # R
  eos_ids: tuple[int, ...]  # any of them ends an episode
  mesh: jax.sharding.Mesh | None = None
  top_k: int = 0  # 0 = off
  top_p: float = 1.0  # 1 = off

  def prefill(self, params: Any, tokens: Any, length: Any) -> State:
    """Starts episodes from prompts.

    Args:
      params: actor parameters.
      tokens: [B, P] int32, left-aligned prompts, at least one token each.
      length: [B] int32.
    """
    return _prefill(self, params, jnp.asarray(tokens), jnp.asarray(length))

  def append(self, params: Any, state: State, chunk: Any, length: Any) -> State:
    """Appends tokens that the actor did not sample (observations).

    Args:
      params: actor parameters.
      state: donated.
      chunk: [B, C] int32, left-aligned.
      length: [B] int32, 0 for rows that get nothing; the others run again.
    """
    return _append(self, params, state, jnp.asarray(chunk), jnp.asarray(length))

  def decode(
      self, params: Any, state: State, table: jax.Array, keys: jax.Array,
      turn: int, budget: int, temperature: float | jax.Array, *,
      greedy: bool = False,
  ) -> State:
    """Samples until every running row has stopped or spent its budget.

    Args:
      params: actor parameters.
      state: donated; rows whose stop code is not RUNNING stay as they are.
      table: [A, V] int, the stop table (`protocol.stop_table`): the automaton's
        next state; a row starts in 0, SEARCH and ANSWER are completed tags.
      keys: [B] PRNG keys of the rows; the token at absolute position t is
        drawn with `fold_in(key, t)`.
      turn: index of this turn, the column of `turn_ends` that is filled.
      budget: tokens that a row may write now.
      temperature: the logits are divided by it, for sampling and log-probs.
      greedy: take the most likely token instead.
    """
    return _decode(
        self, params, state, table, keys, jnp.int32(turn), jnp.int32(budget),
        jnp.float32(temperature), jnp.bool_(greedy))


def _model(sampler, params, tokens, start, cache=None):
  steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  positions = start[:, None] + steps[None]
  return qwen.Qwen(sampler.model, sampler.mesh).apply(
      {'params': params}, tokens, positions, cache,
      None if cache is None else start)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(sampler, params, tokens, length):
  batch, width = tokens.shape
  zeros = jnp.zeros((batch,), jnp.int32)
  _, new = _model(sampler, params, tokens, zeros)
  cache = qwen.write(
      qwen.empty_cache(sampler.model, batch, sampler.size), new, zeros)
  pad = ((0, 0), (0, sampler.size - width))
  return State(
      tokens=jnp.pad(tokens.astype(jnp.int32), pad),
      length=length.astype(jnp.int32),
      loss_mask=jnp.zeros((batch, sampler.size), jnp.float32),
      logprobs=jnp.zeros((batch, sampler.size), jnp.float32),
      turn_ends=jnp.full((batch, sampler.turns), -1, jnp.int32),
      stop=jnp.full((batch,), RUNNING, jnp.int32),
      cache=cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _append(sampler, params, state, chunk, length):
  rows = jnp.arange(chunk.shape[0])
  start = state.length - 1
  pending = state.tokens[rows, start]
  fed = jnp.concatenate([pending[:, None], chunk[:, :-1]], axis=1)
  _, new = _model(sampler, params, fed, start, state.cache)
  cache = qwen.write(state.cache, new, start)

  def put(row, fresh, position, count):
    old = jax.lax.dynamic_slice(row, (position,), fresh.shape)
    keep = jnp.arange(fresh.shape[0]) < count
    return jax.lax.dynamic_update_slice(
        row, jnp.where(keep, fresh, old), (position,))

  return state.replace(
      tokens=jax.vmap(put)(state.tokens, chunk, state.length, length),
      length=state.length + length,
      stop=jnp.where(length > 0, RUNNING, state.stop),
      cache=cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(sampler, params, state, table, keys, turn, budget, temperature,
            greedy):
  rows = jnp.arange(state.length.shape[0])
  limit = jnp.minimum(state.length + budget, sampler.size - 1)
  automaton = jnp.zeros_like(state.length)
  matrix = qwen.unembedding(params)
  ends = jnp.asarray(sampler.eos_ids, jnp.int32)

  def running(carry):
    state, _ = carry
    return jnp.any(state.stop == RUNNING)

  def step(carry):
    state, automaton = carry
    active = state.stop == RUNNING
    start = state.length - 1
    pending = state.tokens[rows, start]
    hidden, new = _model(
        sampler, params, pending[:, None], start, state.cache)
    logits = jnp.einsum(
        'bd,dv->bv', hidden[:, 0], matrix.astype(hidden.dtype),
        preferred_element_type=jnp.float32) / temperature
    logprobs = jax.nn.log_softmax(logits)
    draws = jax.vmap(
        lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(
            keys, state.length)
    token = jnp.where(
        greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32),
        draw(logprobs, draws, sampler.top_k, sampler.top_p))
    logprob = logprobs[rows, token]

    after = table[automaton, token].astype(jnp.int32)
    length = state.length + active
    stop = jnp.where(
        (after == SEARCH) | (after == ANSWER), after,
        jnp.where(
            jnp.any(token[:, None] == ends[None], axis=-1), EOS,
            jnp.where(length >= limit, BUDGET, RUNNING)))
    stop = jnp.where(active, stop, state.stop)
    put = lambda x, y: x.at[rows, state.length].set(
        jnp.where(active, y, x[rows, state.length]))
    closed = active & (stop == SEARCH)
    turn_ends = state.turn_ends.at[:, turn].set(
        jnp.where(closed, state.length, state.turn_ends[:, turn]))
    state = state.replace(
        tokens=put(state.tokens, token),
        loss_mask=put(state.loss_mask, 1.0),
        logprobs=put(state.logprobs, logprob),
        length=length, turn_ends=turn_ends, stop=stop,
        cache=qwen.write(state.cache, new, start))
    return state, after

  return jax.lax.while_loop(running, step, (state, automaton))[0]


def draw(
    logprobs: jax.Array, uniform: jax.Array, top_k: int, top_p: float
) -> jax.Array:
  """Inverse-CDF draw of one token a row from one uniform number a row.

  Args:
    logprobs: [B, V] float32, normalised.
    uniform: [B] float32 in [0, 1).
    top_k: keep the k most likely tokens (ties are kept); 0 = all.
    top_p: then keep the smallest set of most likely tokens that holds this
      share of the probability (ties are kept); 1 = all.

  Returns:
    [B] int32.
  """
  probs = jnp.exp(logprobs)
  size = logprobs.shape[-1]
  if 0 < top_k < size:
    counts = jnp.full(probs.shape[:1], top_k, jnp.float32)
    probs = _keep(probs, jnp.ones_like(probs), counts)
  if top_p < 1.0:
    probs = _keep(probs, probs, top_p * jnp.sum(probs, axis=-1))
  cumulative = jnp.cumsum(probs, axis=-1)
  target = uniform * cumulative[:, -1]
  token = jnp.sum(cumulative <= target[:, None], axis=-1)
  # Rounding can carry the target past the last kept token.
  last = size - 1 - jnp.argmax(jnp.flip(probs > 0, axis=-1), axis=-1)
  return jnp.minimum(token, last).astype(jnp.int32)


def _keep(probs, measure, wanted):
  """Zeroes the tokens below the largest threshold that keeps `wanted`.

  The threshold is bisected on the bits of the float, which for non-negative
  floats are ordered as the numbers are: 31 halvings are exact, and the
  vocabulary is never sorted.
  """
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def halve(_, bounds):
    low, high = bounds  # kept(low) >= wanted, kept(high) < wanted
    middle = low + (high - low) // 2
    kept = jnp.sum(
        jnp.where(bits >= middle[:, None], measure, 0.0), axis=-1)
    enough = kept >= wanted
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros(probs.shape[:1], jnp.int32)
  high = jnp.full_like(low, np.float32(2.0).view(np.int32))
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  return jnp.where(bits >= low[:, None], probs, 0.0)
