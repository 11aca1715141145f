"""The plain way to roll out: all rows of a batch wait for the slowest.

A second implementation of `rollout.collect` and `rollout.sampler`: each turn is
one prefill or append over all rows, one decoding loop until the last row has
stopped, and one search. What it samples must be what they sample.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import protocol as protocol_lib
from stepsearch import sharding
from stepsearch import types
from stepsearch.models import cache as cache_lib
from stepsearch.models import qwen
from stepsearch.rollout import sampler as sampler_lib
from stepsearch.rollout.sampler import ANSWER
from stepsearch.rollout.sampler import BUDGET
from stepsearch.rollout.sampler import EOS
from stepsearch.rollout.sampler import RUNNING
from stepsearch.rollout.sampler import SEARCH


@struct.dataclass
class State:
  """B episodes in flight; S positions, R turns."""

  tokens: jax.Array  # [B, S] int32
  length: jax.Array  # [B] int32, tokens of each row, the pending one included
  loss_mask: jax.Array  # [B, S] float32, 1 iff sampled here
  logprobs: jax.Array  # [B, S] float32, log-softmax(logits / temperature)
  turn_ends: jax.Array  # [B, R] int32, where search turn r was closed, or -1
  stop: jax.Array  # [B] int32, a code of `rollout.sampler`
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
  layout: sharding.Layout | None = None
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
  return qwen.Qwen(sampler.model, sampler.layout).apply(
      {'params': params}, tokens, positions, cache,
      None if cache is None else start)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(sampler, params, tokens, length):
  batch, width = tokens.shape
  zeros = jnp.zeros((batch,), jnp.int32)
  _, new = _model(sampler, params, tokens, zeros)
  cache = cache_lib.write(
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
  cache = cache_lib.write(state.cache, new, start)

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
        sampler_lib.draw(
            jnp.exp(logprobs), draws, sampler.top_k, sampler.top_p))
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
        cache=cache_lib.write(state.cache, new, start))
    return state, after

  return jax.lax.while_loop(running, step, (state, automaton))[0]


class Collector:
  """Rolls out questions; one instance per model shape and tokenizer."""

  def __init__(
      self, model: qwen.Config, config: Any, tokenizer: Any,
      protocol: protocol_lib.Protocol, search: Any,
      layout: sharding.Layout,
  ):
    """Checks the budgets and builds the stop table.

    Args:
      model: the decoder's sizes.
      config: the leaves of `config.rollout`.
      tokenizer: a `tokenizer.Tokenizer`.
      protocol: the texts around the policy's turns.
      search: (queries, k) -> one list of documents a query.
      layout: rows are split over its batch axes.

    Raises:
      ValueError: a budget that cannot hold a turn, sampling out of range.
    """
    self.config = config
    self._tokenizer = tokenizer
    self._protocol = protocol
    self._search = search
    self._layout = layout
    self._sampler = Sampler(
        model=model,
        size=(_bucket(config.max_length, config.length_multiple)
              + config.observation_length),
        turns=config.max_turns + 1,
        eos_ids=tokenizer.eos_ids,
        layout=layout,
        top_k=config.top_k,
        top_p=config.top_p)
    table = protocol_lib.stop_table(
        tokenizer.byte_strings, model.vocab_size).next_state
    self._table = jax.device_put(table, layout.replicated)
    self._cache: dict[str, np.ndarray] = {}

  def prompt(self, question: str) -> list[int]:
    """Prompt tokens of a question.

    Raises:
      ValueError: they do not fit `config.rollout.prompt_length`.
    """
    ids = self._tokenizer.prompt(
        question, self._protocol.instruction, self.config.chat)
    if len(ids) > self.config.prompt_length:
      raise ValueError(
          f'config.rollout.prompt_length = {self.config.prompt_length}, but '
          f'the prompt of the question {question!r} has {len(ids)} tokens: '
          f'raise it to at least {len(ids)}, or drop the question.')
    return ids

  def __call__(
      self, params: Any, examples: Sequence[types.Example], key: jax.Array, *,
      first_episode: int = 0, greedy: bool = False,
  ) -> tuple[types.Trajectory, list[types.Transcript]]:
    """Plays one episode per example.

    Args:
      params: actor parameters.
      examples: B questions.
      key: of the step; a token is drawn with (key, episode, position).
      first_episode: global index of the first example.
      greedy: take the most likely token.

    Returns:
      the arrays [B, T] and the texts, both in the order of the examples.
    """
    config = self.config
    prompts = [self.prompt(example.question) for example in examples]
    width = self._width(prompts, config.prompt_length)
    pad = self._tokenizer.pad_id
    tokens, length = _pad(prompts, width, pad)
    keys = _fold(
        key, np.arange(first_episode, first_episode + len(examples)))
    place = lambda *arrays: sharding.shard_batch(arrays, self._layout)
    tokens, length, keys = place(tokens, length, keys)
    state = self._sampler.prefill(params, tokens, length)
    episodes = [_Episode(len(prompt)) for prompt in prompts]

    for turn in range(config.max_turns + 1):
      state = self._sampler.decode(
          params, state, self._table, keys, turn, config.response_length,
          config.temperature, greedy=greedy)
      written, stop = jax.device_get((state.tokens, state.stop))
      length = jax.device_get(state.length)
      observations = self._answer(episodes, written, length, stop)
      if not any(observations):
        break
      width = self._width(observations, config.observation_length)
      state = self._sampler.append(
          params, state, *place(*_pad(observations, width, pad)))

    transcripts = [
        types.Transcript(self._tokenizer.decode(prompt), tuple(episode.turns))
        for prompt, episode in zip(prompts, episodes)]
    width = min(
        _bucket(int(length.max()), config.length_multiple), self._sampler.size)
    return _trajectory(state, width, pad), transcripts

  def _width(self, rows, budget) -> int:
    """What rows are padded to: few widths, since each is compiled."""
    multiple = min(self.config.length_multiple, budget)
    return min(_bucket(max(map(len, rows)), multiple), budget)

  def _answer(self, episodes, tokens, length, stop) -> list[list[int]]:
    """Reads the turn that each live row wrote; returns what to append."""
    turns: dict[int, types.Turn] = {}
    for row, episode in enumerate(episodes):
      if episode.over:
        continue
      end = int(length[row])
      text = self._tokenizer.decode(tokens[row, episode.length:end])
      episode.length = end
      action = protocol_lib.parse(text)
      query = None
      if stop[row] == sampler_lib.SEARCH and action.kind == 'search':
        query = action.content
      if episode.last or stop[row] in (
          sampler_lib.ANSWER, sampler_lib.EOS):
        episode.turns.append(types.Turn(text))
        episode.over = True
      else:
        turns[row] = types.Turn(text, query)

    asked = [row for row, turn in turns.items() if turn.query]
    found = {}
    if asked:
      found = dict(zip(asked, self._search(
          [turns[row].query for row in asked], self.config.k)))
    observations: list[list[int]] = [[] for _ in episodes]
    for row, turn in turns.items():
      episode = episodes[row]
      episode.last = self._last_turn_is_next(episode)
      arguments = dict(last_turn=episode.last, cache=self._cache)
      if turn.query is None:
        ids, shown = protocol_lib.warning_tokens(
            self._protocol, self._tokenizer, self.config.observation_length,
            **arguments)
      else:
        ids, shown = protocol_lib.observation_tokens(
            self._protocol, self._tokenizer, found.get(row, []),
            self.config.observation_length, **arguments)
      observations[row] = ids
      episode.length += len(ids)
      episode.turns.append(dataclasses.replace(
          turn, documents=shown, observation=self._tokenizer.decode(ids)))
    return observations

  def _last_turn_is_next(self, episode) -> bool:
    """Whether turns or tokens are spent up to one answer.

    Another search is granted only if after it a whole answer would still fit,
    so that the forced last turn always has its full budget.
    """
    config = self.config
    room = config.max_length - episode.length - config.observation_length
    needed = config.response_length * 2 + config.observation_length
    return len(episode.turns) + 1 >= config.max_turns or room < needed


@dataclasses.dataclass
class _Episode:
  """What the host knows of a row."""

  length: int  # tokens so far
  turns: list[types.Turn] = dataclasses.field(default_factory=list)
  last: bool = False  # the next turn is the forced last one
  over: bool = False


@jax.jit
def _fold(key, episodes):
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(episodes)


def _bucket(length: int, multiple: int) -> int:
  return -(-length // multiple) * multiple


def _pad(rows, width, pad):
  tokens = np.full((len(rows), width), pad, np.int32)
  for row, ids in zip(tokens, rows):
    row[:len(ids)] = ids
  return tokens, np.asarray([len(ids) for ids in rows], np.int32)


def _trajectory(state, width, pad) -> types.Trajectory:
  inside = jnp.arange(width)[None] < state.length[:, None]
  return types.Trajectory(
      tokens=jnp.where(inside, state.tokens[:, :width], pad),
      token_mask=inside.astype(jnp.float32),
      loss_mask=state.loss_mask[:, :width],
      logprobs=state.logprobs[:, :width],
      turn_ends=state.turn_ends)
