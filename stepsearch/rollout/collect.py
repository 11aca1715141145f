"""The multi-turn loop: think, search, information, until an answer.

    examples ─▶ prefill ─▶ [decode ─▶ parse ─▶ search ─▶ append]* ─▶ Trajectory
                                                                  + Transcripts

The policy's tokens are never encoded again: what was sampled stays in the
arrays, text is only read to find the query. Retrieved text enters as tokens
that the actor did not sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import protocol as protocol_lib
from stepsearch import sharding
from stepsearch import types
from stepsearch.models import qwen
from stepsearch.rollout import sampler as sampler_lib

Search = Callable[[Sequence[str], int], list[list[types.Document]]]


@dataclasses.dataclass(frozen=True)
class Config:
  """Budgets in tokens, turns and sampling; the leaves of `config.rollout`."""

  chat: str = 'auto'  # auto | on | off: as of `Tokenizer.prompt`
  max_turns: int = 5  # searches; one more turn is left for the answer
  k: int = 3  # documents a search
  prompt_length: int = 2048
  response_length: int = 800  # that the policy may write in one turn
  observation_length: int = 800
  max_length: int = 4096  # of a whole episode
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  length_multiple: int = 64  # trajectories are padded to a multiple of this


class Collector:
  """Rolls out questions; one instance per model shape and tokenizer."""

  def __init__(
      self, model: qwen.Config, config: Config, tokenizer: Any,
      protocol: protocol_lib.Protocol, search: Search, mesh: Any,
  ):
    """Checks the budgets and builds the stop table.

    Args:
      model: the decoder's sizes.
      config: the leaves of `config.rollout`.
      tokenizer: a `tokenizer.Tokenizer`.
      protocol: the texts around the policy's turns.
      search: (queries, k) -> one list of documents a query.
      mesh: rows are split over its batch axes.

    Raises:
      ValueError: a budget that cannot hold a turn, sampling out of range.
    """
    _check(config, protocol_lib.minimum_observation(protocol, tokenizer))
    self.config = config
    self._tokenizer = tokenizer
    self._protocol = protocol
    self._search = search
    self._mesh = mesh
    self._sampler = sampler_lib.Sampler(
        model=model,
        size=(_bucket(config.max_length, config.length_multiple)
              + config.observation_length),
        turns=config.max_turns + 1,
        eos_ids=tokenizer.eos_ids,
        mesh=mesh,
        top_k=config.top_k,
        top_p=config.top_p)
    table = protocol_lib.stop_table(
        tokenizer.byte_strings, model.vocab_size).next_state
    self._table = jax.device_put(table, sharding.replicated(mesh))
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
    place = lambda *arrays: sharding.shard_batch(arrays, self._mesh)
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


def _check(config: Config, minimum: int) -> None:
  for field in ('max_turns', 'k', 'prompt_length', 'response_length',
                'length_multiple'):
    value = getattr(config, field)
    if value < 1:
      raise ValueError(f'config.rollout.{field} = {value}: at least 1.')
  if config.observation_length < minimum:
    raise ValueError(
        f'config.rollout.observation_length = {config.observation_length} '
        f'cannot hold the tags and messages of an observation: at least '
        f'{minimum}, plus room for {config.k} documents.')
  needed = (config.prompt_length + 2 * config.response_length
            + config.observation_length)
  if config.max_length < needed:
    raise ValueError(
        f'config.rollout.max_length = {config.max_length} cannot hold one '
        f'search and an answer: prompt_length + 2 x response_length + '
        f'observation_length = {needed}. Raise max_length to that at least, '
        'or lower the others.')
  if config.temperature <= 0:
    raise ValueError(
        f'config.rollout.temperature = {config.temperature}: must be '
        'positive; evaluation is greedy by itself.')
  if not 0 < config.top_p <= 1 or config.top_k < 0:
    raise ValueError(
        f'config.rollout.top_p = {config.top_p}, top_k = {config.top_k}: '
        'top_p lies in (0, 1], 1 for off; top_k is 0 for off.')
