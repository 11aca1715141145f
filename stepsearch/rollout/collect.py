"""The multi-turn loop: think, search, information, until an answer.

    examples ─▶ start ─▶ [decode a chunk ─▶ parse ─▶ search ─▶ append]*
                  ▲                            │                  ╭─▶ Trajectory
                  ╰──── the next question ◀────┴─ it has ended ───┴─▶ Transcript

Episodes are played in slots, each at its own pace: a row that searches waits
while the others decode, a row that has ended gives its slot to the next
question. The policy's tokens are never encoded again: what was sampled stays in
the arrays, text is only read to find the query. Retrieved text enters as tokens
that the actor did not sample.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import os
import re
import threading
import time
from typing import Any, NamedTuple

import jax
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
  slots: int = 0  # episodes in flight; 0 = all of a batch
  chunk: int = 16  # tokens that are decoded between two looks at the rows
  lag: int = 1  # chunks that a search may take before the device waits for it


# Tokens a shard that are fed in one call, padding included.
_FEED = {'cpu': 512}
_FEED_ELSEWHERE = 8192
_WORTH_SHARING = 16  # tokens
_FEWEST = 8  # slots of a shard
_ONE = 256  # tokens that a prompt is padded to where it is the only one


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Few widths and sizes, for each is compiled; all ascending."""

  prompts: tuple[int, ...]  # tokens a row that a start feeds
  observations: tuple[int, ...]  # tokens a row that an append feeds
  cache: tuple[int, ...]  # positions
  length: int  # of a trajectory's arrays, at most
  feed: int  # tokens a shard that a call feeds

  @classmethod
  def of(
      cls, config: Config, model: qwen.Config, layout: sharding.Layout
  ) -> Shapes:
    """Those of a rollout."""
    prompts = [config.prompt_length]
    while prompts[0] > 16:
      prompts.insert(0, max(_bucket(prompts[0] // 4, 8), 16))
    observations = _quarters(config.observation_length, 8)
    length = _bucket(config.max_length, config.length_multiple)
    # What is fed is written whole, padding included.
    longest = length + max(prompts[-1], observations[-1])
    return cls(
        tuple(prompts), tuple(observations),
        tuple(_quarters(longest, 128 if longest > 1024 else 8)), length,
        # Scores over the cache are held in float32: a gigabyte at most.
        min(_FEED.get(layout.platform, _FEED_ELSEWHERE),
            2**28 // (longest * model.heads)))

  def rows(self, width: int, local: int) -> int:
    """Rows of a shard of `local` slots that a call feeds `width` tokens."""
    return max(1, min(local // sampler_lib.WAITING, self.feed // width))


def sampler(
    config: Config, model: qwen.Config, layout: sharding.Layout, episodes: int,
    eos_ids: tuple[int, ...],
) -> sampler_lib.Sampler:
  """What plays so many episodes."""
  return sampler_lib.Sampler(
      model=model, layout=layout,
      slots=_bucket(min(config.slots or episodes, episodes), layout.shards),
      eos_ids=eos_ids, top_k=config.top_k, top_p=config.top_p)


def lower(
    config: Config, model: qwen.Config, layout: sharding.Layout, episodes: int,
    params: Any, shared: int, eos_ids: tuple[int, ...] = (0,),
) -> dict[str, Callable[[], Any]]:
  """The programs of a rollout, as of `Sampler.lower`, with the widest calls.

  Args:
    config: the leaves of `config.rollout`.
    model: the decoder's sizes.
    layout: of decoding.
    episodes: of one call of a collector.
    params: what a collector takes: shapes with shardings.
    shared: tokens that all prompts begin with.
    eos_ids: of the tokenizer.
  """
  plays = sampler(config, model, layout, episodes, eos_ids)
  shapes = Shapes.of(config, model, layout)
  calls = {
      name: (shapes.rows(widths[-1], plays.slots // plays.shards)
             * plays.shards, widths[-1])
      for name, widths in (
          ('prompt', shapes.prompts), ('observation', shapes.observations))}
  # Its states follow from the tags alone.
  states, _ = protocol_lib.stop_table([b'']).next_state.shape
  return plays.lower(
      params, jax.ShapeDtypeStruct((states, model.vocab_size), np.int8),
      sizes=shapes.cache, steps=config.chunk, shared=shared, **calls)


class Collector:
  """Rolls out questions; one instance per model shape and tokenizer."""

  def __init__(
      self, model: qwen.Config, config: Config, tokenizer: Any,
      protocol: protocol_lib.Protocol, search: Search,
      layout: sharding.Layout, on_tick: Callable[[], None] | None = None,
  ):
    """Checks the budgets and builds the stop table.

    Args:
      model: the decoder's sizes.
      config: the leaves of `config.rollout`.
      tokenizer: a `tokenizer.Tokenizer`.
      protocol: the texts around the policy's turns.
      search: (queries, k) -> one list of documents a query.
      layout: of decoding.
      on_tick: called after each chunk; what it raises ends the call.

    Raises:
      ValueError: a budget that cannot hold a turn, sampling out of range.
    """
    _check(config, protocol_lib.minimum_observation(protocol, tokenizer))
    self.config = config
    self.metrics: dict[str, float] = {}
    self._tokenizer = tokenizer
    self._protocol = protocol
    self._search = search
    self._last_search = futures.Future()
    self._last_search.set_result([])
    self._layout = layout
    self._on_tick = on_tick or (lambda: None)
    self._model = model
    self._shapes = Shapes.of(config, model, layout)
    table = protocol_lib.stop_table(
        tokenizer.byte_strings, model.vocab_size, protocol.stops).next_state
    self._table = sharding.put(table, layout.replicated)
    self._cache: dict[str, np.ndarray] = {}
    self._prefix = np.zeros([0], np.int32)

  @property
  def chat(self) -> str:
    """As of `Tokenizer.prompt`: the config's, or what the protocol prefers."""
    chat = self.config.chat
    return (self._protocol.chat or chat) if chat == 'auto' else chat

  def prompt(self, question: str, documents: str = '') -> list[int]:
    """Prompt tokens of a question.

    Args:
      question: the question.
      documents: the text that stands for '{documents}' in the instruction.

    Raises:
      ValueError: they do not fit `config.rollout.prompt_length`.
    """
    text, instruction = question, self._protocol.instruction
    if self._protocol.retrieves_first:
      # In one pass, for passages may spell anything.
      fields = {'{question}': question.strip(), '{documents}': documents}
      text, instruction = re.sub(
          r'\{question\}|\{documents\}', lambda found: fields[found[0]],
          instruction), '{question}'
    ids = self._tokenizer.prompt(
        text, instruction, self.chat, self._protocol.system)
    if len(ids) > self.config.prompt_length:
      raise ValueError(
          f'config.rollout.prompt_length = {self.config.prompt_length}, but '
          f'the prompt of the question {question[:80]!r} has {len(ids)} '
          f'tokens: raise it to at least {len(ids)}, or drop the question.')
    return ids

  def prepare(self, questions: Iterable[str]) -> None:
    """Checks all questions of a run, and finds what their prompts share.

    That beginning is computed once a call from then on. It follows from the
    questions of the run, not from those of one call, so that a resumed run
    computes the same; other questions may share more or less, which moves the
    last bits of what is computed.

    Raises:
      ValueError: as of `prompt`.
    """
    shared = None
    for question in questions:
      prompt = self.prompt(question)
      needed = len(prompt)
      if self._protocol.retrieves_first:
        needed += self.config.observation_length
      if needed > self.config.prompt_length:
        raise ValueError(
            f'config.rollout.prompt_length = {self.config.prompt_length}: the '
            f'question {question[:80]!r} and the documents of its prompt '
            f'(config.rollout.observation_length = '
            f'{self.config.observation_length}) take {needed} tokens: raise '
            'the one, or lower the other.')
      shared = prompt if shared is None else os.path.commonprefix(
          [shared, prompt])
    if shared is not None and len(shared) >= _WORTH_SHARING:
      self._prefix = np.asarray(shared, np.int32)

  def __call__(
      self, params: Any, examples: Sequence[types.Example], key: jax.Array, *,
      first_episode: int = 0, greedy: bool = False,
      on_turn: Callable[[int, types.Turn], None] | None = None,
      on_end: Callable[[int, types.Transcript, Tokens], None] | None = None,
  ) -> tuple[types.Trajectory, list[types.Transcript]]:
    """Plays one episode per example.

    Args:
      params: actor parameters, as the learner holds them.
      examples: N questions.
      key: of the step; a token is drawn with (key, episode, position).
      first_episode: global index of the first example.
      greedy: take the most likely token.
      on_turn: called with the number of an example and its newest turn as far
        as it is known: after each chunk with the text so far (which may end
        within a character), once with the query, once with the documents.
        Documents in the prompt are those of a turn without a text.
      on_end: called with the number of an example once its episode has ended.

    Returns:
      the arrays [N, T] and the texts, both in the order of the examples.
      `metrics` then holds figures of this call.
    """
    episodes = self._episodes([example.question for example in examples])
    for number, episode in enumerate(episodes):
      for turn in episode.turns if on_turn else ():
        on_turn(number, turn)
    play = _Play(
        self, params, episodes, key, first_episode, greedy, on_turn, on_end)
    while play.unfinished:
      play.admit()
      play.answer()
      play.gather()
      play.decode()
      play.read()
      self._on_tick()
    self.metrics = play.metrics()
    return play.trajectory(), play.transcripts()

  def _episodes(self, questions) -> list[_Episode]:
    """Episodes at their beginning, with what is found for it."""
    protocol = self._protocol
    forced = protocol.query is None
    if not protocol.retrieves_first:
      return [
          _Episode(self.prompt(question), last=forced)
          for question in questions]
    episodes = []
    forced |= self.config.max_turns == 1  # which these documents are
    for question, found in zip(
        questions, self._search(questions, self.config.k)):
      text, shown = protocol_lib.prompt_documents(
          protocol, self._tokenizer, found, self.config.observation_length,
          cache=self._cache)
      episodes.append(_Episode(
          self.prompt(question, text), last=forced, turn_ends=[-1],
          turns=[types.Turn('', question, shown)]))
    return episodes


class Tokens(NamedTuple):
  """Tokens of an episode."""

  prompt: int
  sampled: int
  observed: int


@dataclasses.dataclass
class _Episode:
  """What the host knows of an episode."""

  prompt: list[int]
  sampled: int = 0  # tokens
  slot: int = -1
  length: int = 0  # tokens so far
  limit: int = 0  # length at which the turn's budget is spent
  start: int = 0  # of what the policy writes now
  since: int | None = None  # the chunk from which on it runs, None: it does not
  turns: list[types.Turn] = dataclasses.field(default_factory=list)
  turn_ends: list[int] = dataclasses.field(default_factory=list)
  last: bool = False  # the next turn is the forced last one


class _Play:
  """One call of a collector: its episodes, its slots, and the clock.

  The clock ticks once a chunk, so that what happens when depends on the
  policy's tokens alone. A row that stops in chunk c takes part again from chunk
  c + 1 + lag; with a lag, the host reads chunk c after chunk c + 1 has been
  dispatched.
  """

  def __init__(
      self, collector, params, episodes, key, first_episode, greedy, on_turn,
      on_end):
    c = self._c = collector
    self._on_turn, self._on_end = on_turn, on_end
    config = self._config = c.config
    self._sampler = sampler(
        config, c._model, c._layout, len(episodes), c._tokenizer.eos_ids)
    count = self._sampler.slots
    self._local = count // self._sampler.shards  # slots of a shard
    self._fewer = [
        n for part in (4, 3, 2, 1.5, 1)
        if (n := int(self._local * part / 8)) >= _FEWEST]
    self._starts, self._widths = c._shapes.prompts, c._shapes.observations
    self._size = c._shapes.cache[0]
    if len(episodes) == 1:
      # Somebody waits: a question that follows should compile nothing.
      self._starts = tuple(
          w for w in self._starts if w >= min(_ONE, self._starts[-1]))
      self._widths, self._size = self._widths[-1:], c._shapes.cache[-1]
    self._decoding = dict(
        table=c._table, key=key, temperature=config.temperature,
        steps=config.chunk, greedy=greedy)
    self._first = first_episode
    self._episodes = episodes
    self._queue = collections.deque(range(len(episodes)))
    self._slots: list[int | None] = [None] * count
    numbers: dict[tuple[int, ...], int] = {}
    self._prompt = [  # equal for equal prompts
        numbers.setdefault(tuple(episode.prompt), len(numbers))
        for episode in episodes]
    self._held = [-1] * count  # prompts in the cache
    self._left = [1] * count  # tokens of the episode that has left a slot
    self._due: collections.deque = collections.deque()
    self._flying: collections.deque = collections.deque()
    self._tick = 0
    width = c._shapes.length
    self._tokens = np.full(
        (len(episodes), width), c._tokenizer.pad_id, np.int32)
    self._logprobs = np.zeros((len(episodes), width), np.float32)
    self._loss_mask = np.zeros((len(episodes), width), np.float32)

    self._useful = self._paid = self._saved = 0
    self._retrieval = self._idle = 0.0
    self._idle_since: float | None = None
    start = time.perf_counter()
    self._params = jax.block_until_ready(self._sampler.weights(params))
    self._weights_time = time.perf_counter() - start
    self._state = self._sampler.empty(self._size)
    self._prefix = None
    if len(c._prefix):
      self._prefix = self._sampler.prefix(self._params, c._prefix)

  @property
  def unfinished(self) -> bool:
    """Whether an episode waits, runs or searches."""
    return bool(self._queue) or any(s is not None for s in self._slots)

  def admit(self) -> None:
    """Gives free slots to the next questions.

    Slots wait until there are enough of them to fill a call. A prompt that a
    slot of the same shard still holds is copied; the order of calls is such
    that it is copied before it is overwritten.
    """
    copies, starts, copies_of_starts = [], [], []
    free = [s for s, number in enumerate(self._slots) if number is None]
    if len(free) < min(
        len(self._slots) // sampler_lib.WAITING, len(self._queue)):
      return
    started, targets = set(), set()
    while free and self._queue:
      number = self._queue.popleft()
      episode = self._episodes[number]
      prompt = tuple(episode.prompt)
      holders = {
          s // self._local: s for s, held in enumerate(self._held)
          if held == self._prompt[number] and s not in targets}
      slot = next((s for s in free if s // self._local in holders), None)
      source = None if slot is None else holders[slot // self._local]
      if slot is None:
        room = collections.Counter(s // self._local for s in free)
        slot = min(free, key=lambda s: (-room[s // self._local], s))
      free.remove(slot)
      self._slots[slot], self._held[slot] = number, self._prompt[number]
      episode.slot = slot
      self._tokens[number, :len(prompt)] = prompt
      episode.length = len(prompt)
      if source is None:
        shared = self._shared(prompt)
        starts.append((slot, prompt[shared:], shared, None))
        started.add(slot)
      else:
        shared = len(prompt) - 1
        (copies_of_starts if source in started else copies).append(
            (slot, prompt[shared:], shared, source))
        targets.add(slot)
      self._saved += shared
      self._run(episode)
    for rows in self._calls(copies, (1,)):
      self._state = self._sampler.fork(self._state, rows)
    for rows in self._calls(starts, self._starts):
      self._state = self._sampler.start(
          self._params, self._state, rows, self._prefix)
    for rows in self._calls(copies_of_starts, (1,)):
      self._state = self._sampler.fork(self._state, rows)

  def answer(self) -> None:
    """Appends the observations that are due, and resumes their rows."""
    appended = []
    while self._due and self._due[0][0] <= self._tick:
      _, turns, search = self._due.popleft()
      self._look()
      while self._idle_since is None and not search.done():
        futures.wait([search], timeout=0.005)
        self._look()
      found = iter(search.result())
      for number, turn in turns:
        episode = self._episodes[number]
        episode.last = self._last_turn_is_next(episode)
        documents = next(found) if turn.query else []
        ids, shown = self._observation(turn, documents, episode.last)
        end = episode.length + len(ids)
        self._tokens[number, episode.length:end] = ids
        appended.append((episode.slot, ids, episode.length, None))
        episode.length = end
        episode.turns.append(dataclasses.replace(
            turn, documents=shown, observation=self._c._tokenizer.decode(ids)))
        if self._on_turn:
          self._on_turn(number, episode.turns[-1])
        self._run(episode)
    for rows in self._calls(appended, self._widths):
      self._state = self._sampler.append(self._params, self._state, rows)

  def gather(self) -> None:
    """Moves the last episodes into fewer slots, once they fit.

    Otherwise every step would pay for slots that no question is left for.
    """
    live = [
        [s for s in range(first, first + self._local)
         if self._slots[s] is not None]
        for first in range(0, len(self._slots), self._local)]
    fewer = [n for n in self._fewer if max(map(len, live)) <= n < self._local]
    if self._queue or not fewer:
      return
    rows = []
    for shard, mine in enumerate(live):
      idle = sorted(
          set(range(shard * self._local, (shard + 1) * self._local))
          - set(mine), key=lambda s: (self._bound(s), s))
      rows += mine + idle[:min(fewer) - len(mine)]
    slots = [self._slots[s] for s in rows]
    self._left = [self._left[s] for s in rows]
    self._held = [self._held[s] for s in rows]
    for slot, number in enumerate(slots):
      if number is not None:
        self._episodes[number].slot = slot
    self._slots, self._local = slots, min(fewer)
    self._sampler, self._state = self._sampler.shrink(
        self._state, np.asarray(rows, np.int32))
    # With fewer slots there is one size and one width, to compile less.
    self._reserve(self._c._shapes.cache[-1])
    self._widths = self._c._shapes.observations[-1:]

  def decode(self) -> None:
    """Dispatches the next chunk, if a row may be running."""
    if not any(
        number is not None and self._episodes[number].since is not None
        for number in self._slots):
      return
    self._reserve(max(
        self._bound(slot, 1) for slot in range(len(self._slots))))
    self._dispatched()
    self._state, chunk = self._sampler.decode(
        self._params, self._state, **self._decoding)
    for array in jax.tree.leaves(chunk):
      array.copy_to_host_async()
    self._flying.append((self._tick, chunk, list(self._slots)))

  def read(self) -> None:
    """Reads what a chunk wrote: this one's, or with a lag the one before."""
    newest = self._tick if self._config.lag == 0 else self._tick - 1
    while self._flying and self._flying[0][0] <= newest:
      tick, chunk, slots = self._flying.popleft()
      chunk = jax.device_get(chunk)
      self._look()
      self._stopped(tick, self._take(tick, chunk, slots))
    self._look()
    self._tick += 1

  def _take(self, tick, chunk, slots) -> list[tuple[int, int]]:
    """Keeps the tokens of a chunk; returns the episodes that stopped in it."""
    stopped = []
    for slot, number in enumerate(slots):
      if number is None:
        continue
      episode = self._episodes[number]
      if episode.since is None or episode.since > tick:
        continue  # what the chunk says of it is older
      count = chunk.count[slot]
      written = slice(episode.length, episode.length + count)
      self._tokens[number, written] = chunk.tokens[slot, :count]
      self._logprobs[number, written] = chunk.logprobs[slot, :count]
      self._loss_mask[number, written] = 1.0
      episode.length += int(count)
      episode.sampled += int(count)
      if self._on_turn:
        self._on_turn(number, types.Turn(self._c._tokenizer.decode(
            self._tokens[number, episode.start:episode.length])))
      if chunk.stop[slot] != sampler_lib.RUNNING:
        episode.since = None
        stopped.append((number, int(chunk.stop[slot])))
    self._useful += int(chunk.count.sum())
    self._paid += int(chunk.steps) * len(slots)
    return stopped

  def _stopped(self, tick, stopped) -> None:
    """Reads the turns that ended; frees their slots, or starts to search."""
    turns = []
    for number, stop in stopped:
      episode = self._episodes[number]
      text = self._c._tokenizer.decode(
          self._tokens[number, episode.start:episode.length])
      action = self._c._protocol.parse(text)
      query = action.content if action.kind == 'search' else None
      episode.turn_ends.append(
          episode.length - 1 if stop == sampler_lib.SEARCH else -1)
      if (episode.last or action.kind == 'answer'
          or stop in (sampler_lib.ANSWER, sampler_lib.EOS)):
        episode.turns.append(types.Turn(text))
        self._slots[episode.slot] = None
        self._left[episode.slot] = episode.length
        if self._on_end:
          observed = episode.length - len(episode.prompt) - episode.sampled
          self._on_end(number, self._transcript(episode), Tokens(
              len(episode.prompt), episode.sampled, observed))
      else:
        turns.append((number, types.Turn(text, query)))
        if self._on_turn:
          self._on_turn(*turns[-1])
    if turns:
      search = self._start_search([t.query for _, t in turns if t.query])
      self._due.append((tick + 1 + self._config.lag, turns, search))

  def _start_search(self, queries) -> futures.Future:
    """Searches, in a thread where the device goes on meanwhile."""
    result = futures.Future()
    if not queries:
      result.set_result([])
      return result
    before, self._c._last_search = self._c._last_search, result

    def search():
      # One at a time whatever the lag, and in order: several processes that
      # search together have to do it in the same one.
      futures.wait([before])
      start = time.perf_counter()
      found = self._c._search(queries, self._config.k)
      self._retrieval += time.perf_counter() - start
      return found

    def apart():
      try:
        result.set_result(search())
      except BaseException as error:  # raised where it is waited for
        result.set_exception(error)

    if self._config.lag:
      # A daemon: an engine that hangs must not keep the process alive.
      threading.Thread(target=apart, daemon=True).start()
    else:
      apart()
    return result

  def _observation(self, turn, documents, last):
    c = self._c
    arguments = dict(last_turn=last, cache=c._cache)
    if turn.query is None:
      return protocol_lib.warning_tokens(
          c._protocol, c._tokenizer, self._config.observation_length,
          **arguments)
    return protocol_lib.observation_tokens(
        c._protocol, c._tokenizer, documents, self._config.observation_length,
        **arguments)

  def _last_turn_is_next(self, episode) -> bool:
    """Whether turns or tokens are spent up to one answer.

    Another search is granted only if after it a whole answer would still fit,
    so that the forced last turn always has its full budget.
    """
    config = self._config
    room = config.max_length - episode.length - config.observation_length
    needed = config.response_length * 2 + config.observation_length
    return len(episode.turns) + 1 >= config.max_turns or room < needed

  def _run(self, episode) -> None:
    episode.since = self._tick
    episode.start = episode.length
    episode.limit = episode.length + self._config.response_length

  def _shared(self, prompt) -> int:
    """Tokens that a prompt has of the common prefix."""
    prefix = self._c._prefix
    count = min(len(prefix), len(prompt) - 1)
    same = prefix[:count] == prompt[:count]
    return count if np.all(same) else int(np.argmin(same))

  def _bound(self, slot, chunks=0) -> int:
    """Tokens that a slot may have, after so many more chunks."""
    number = self._slots[slot]
    if number is None:
      return self._left[slot]
    episode = self._episodes[number]
    if episode.since is None:
      return episode.length
    ahead = self._config.chunk * (len(self._flying) + chunks)
    return min(episode.length + ahead, episode.limit)

  def _reserve(self, size) -> None:
    """Lets the cache grow to a size that is compiled for."""
    if size > self._size:
      self._size = _rung(self._c._shapes.cache, size)
      self._state = self._sampler.grow(self._state, self._size)

  def _calls(self, fed, widths) -> Iterator[sampler_lib.Rows]:
    """Groups (slot, tokens, position, source) by width, some rows a call."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in fed:
      groups[_rung(widths, len(row[1]))][row[0] // self._local].append(row)
    shards = range(len(self._slots) // self._local)
    for width, waiting in sorted(groups.items()):
      most = self._c._shapes.rows(width, self._local)
      while any(waiting.values()):
        rows, size = [], 0
        for shard in shards:
          mine = waiting[shard][:most]
          del waiting[shard][:most]
          size = max([size, *(at + width for _, _, at, _ in mine)])
          taken = {row[0] for row in mine}
          first = shard * self._local
          # The shortest others, behind which there is room.
          others = sorted(
              set(range(first, first + self._local)) - taken,
              key=lambda s: (self._bound(s), s))[:most - len(mine)]
          size = max([size, *(self._bound(s) + width for s in others)])
          rows += mine
          rows += [(s, (), 0, None) for s in others]
        self._useful += sum(len(ids) for _, ids, _, _ in rows)
        self._paid += len(rows) * width
        self._reserve(size)
        self._dispatched()
        yield self._rows(rows, width)

  def _rows(self, rows, width) -> sampler_lib.Rows:
    slots, ids, shared, source = zip(*rows)
    tokens, count = _pad(ids, width, self._c._tokenizer.pad_id)
    array = lambda values: np.asarray(list(values), np.int32)
    return sampler_lib.Rows(
        slot=array(slots), active=count > 0, tokens=tokens, count=count,
        budget=np.full_like(count, self._config.response_length),
        episode=array(
            self._first + (self._slots[s] or 0) for s in slots),
        shared=array(shared),
        source=array(
            slot if s is None else s for slot, s in zip(slots, source)))

  def _look(self) -> None:
    """Notes since when the device has had nothing to do, as the host sees."""
    if self._idle_since is None and (
        not self._flying or self._flying[-1][1].steps.is_ready()):
      self._idle_since = time.perf_counter()

  def _dispatched(self) -> None:
    if self._idle_since is not None:
      self._idle += time.perf_counter() - self._idle_since
      self._idle_since = None

  def trajectory(self) -> types.Trajectory:
    """The arrays, on the host."""
    length = np.asarray([episode.length for episode in self._episodes])
    width = _bucket(int(length.max()), self._config.length_multiple)
    turn_ends = np.full(
        (len(self._episodes), self._config.max_turns + 1), -1, np.int32)
    for row, episode in zip(turn_ends, self._episodes):
      row[:len(episode.turn_ends)] = episode.turn_ends
    return types.Trajectory(
        tokens=self._tokens[:, :width],
        token_mask=(
            np.arange(width)[None] < length[:, None]).astype(np.float32),
        loss_mask=self._loss_mask[:, :width],
        logprobs=self._logprobs[:, :width], turn_ends=turn_ends)

  def transcripts(self) -> list[types.Transcript]:
    """The texts."""
    return [self._transcript(episode) for episode in self._episodes]

  def _transcript(self, episode) -> types.Transcript:
    return types.Transcript(
        self._c._tokenizer.decode(episode.prompt), tuple(episode.turns))

  def metrics(self) -> dict[str, float]:
    """Figures of the call.

    Returns:
      `rollout/slot_utilisation`: tokens that were sampled or fed, by row-steps
      that were paid for, padding and idle slots included;
      `rollout/prefill_tokens_saved`: of prompts, copied instead of computed;
      seconds: `time/retrieval` in the engine, `time/device_idle` with nothing
      dispatched, `time/weights` for the copy that decodes.
    """
    return {
        'rollout/slot_utilisation': self._useful / max(self._paid, 1),
        'rollout/prefill_tokens_saved': float(self._saved),
        'time/retrieval': self._retrieval,
        'time/device_idle': self._idle,
        'time/weights': self._weights_time,
    }


def _quarters(limit: int, multiple: int) -> list[int]:
  """Two, three and four quarters of a limit."""
  return [_bucket(-(-limit * part // 4), multiple) for part in (2, 3, 4)]


def _rung(ladder: Sequence[int], length: int) -> int:
  return next(rung for rung in ladder if rung >= length)


def _bucket(length: int, multiple: int) -> int:
  return -(-length // multiple) * multiple


def _pad(rows, width, pad):
  tokens = np.full((len(rows), width), pad, np.int32)
  for row, ids in zip(tokens, rows):
    row[:len(ids)] = ids
  return tokens, np.asarray([len(ids) for ids in rows], np.int32)


def _check(config: Config, minimum: int) -> None:
  for field, least in dict(
      max_turns=1, k=1, prompt_length=1, response_length=1, length_multiple=1,
      chunk=1, slots=0, lag=0).items():
    value = getattr(config, field)
    if value < least:
      raise ValueError(f'config.rollout.{field} = {value}: at least {least}.')
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
