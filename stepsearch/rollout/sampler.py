"""On-device sampling: B slots that start, resume and stop on their own.

    prefix ─▶ start ─▶ [decode a chunk ─▶ append]* ─▶ start the next episode
                 ╰── fork: another episode with the same prompt

Tokens in, tokens out; text never comes here. Slots are independent: a sample
depends on the row's own tokens, the step's key, the episode's number and the
absolute position only, never on the slot, its neighbours or the chunk. A row's
last token is *pending*: known, but not yet in the cache, and fed by whatever
comes next. So neither start nor append computes a logit.

What has been written leaves with every chunk; the device keeps only what the
next token needs. When a row has stopped is told by a stop table, an automaton
over tokens whose states 1 and 2 say that a closing search or answer tag has
been completed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import sharding
from stepsearch.models import cache as cache_lib
from stepsearch.models import lora
from stepsearch.models import qwen

# Why a row is not decoding.
RUNNING, SEARCH, ANSWER, EOS, BUDGET = range(5)
# A chunk ends early once one in so many slots has stopped in it.
WAITING = 8


@struct.dataclass
class State:
  """B slots; S positions."""

  pending: jax.Array  # [B] int32, the last token, not yet in the cache
  length: jax.Array  # [B] int32, tokens of each row, the pending one included
  limit: jax.Array  # [B] int32, the length at which the turn's budget is spent
  automaton: jax.Array  # [B] int32, state of the stop table
  stop: jax.Array  # [B] int32, one of the codes above
  episode: jax.Array  # [B] int32, global index of the episode
  cache: cache_lib.Cache  # length - 1 valid entries a row


@struct.dataclass
class Rows:
  """n slots that a call is about, made on the host.

  With several shards (the batch's axes) the j-th of equal parts of the
  rows lies in the j-th of equal parts of the slots. Slots are distinct; those
  of rows that are not active are left as they are.
  """

  slot: Any  # [n] int32
  active: Any  # [n] bool
  tokens: Any  # [n, C] int32, left-aligned: what is fed
  count: Any  # [n] int32, of them
  budget: Any  # [n] int32, tokens that the policy may then write
  # Of `start` and `fork` only:
  episode: Any = None  # [n] int32
  shared: Any = None  # [n] int32, positions that are copied, not computed
  source: Any = None  # [n] int32, slot that they are copied from (`fork`)


@struct.dataclass
class Chunk:
  """What one call of `decode` wrote: at most K tokens a row.

  Whole on every device: all processes read all rows.
  """

  tokens: jax.Array  # [B, K] int32
  logprobs: jax.Array  # [B, K] float32, log-softmax(logits / temperature)
  count: jax.Array  # [B] int32, tokens of each row
  stop: jax.Array  # [B] int32
  steps: jax.Array  # [] int32, decoding steps that were run


@struct.dataclass
class Weights:
  """An actor that only plays, as decoding wants it; see `weights`."""

  params: Any  # of Sampler.weights


def weights(
    model: qwen.Config, layout: sharding.Layout, params: Any
) -> Weights:
  """Makes once what a rollout makes of an actor that may have learnt.

  The parameters themselves are not needed any more.

  Args:
    model: the decoder's sizes.
    layout: of decoding.
    params: the actor's parameters.
  """
  any_sampler = Sampler(model, layout, slots=layout.shards, eos_ids=())
  return Weights(jax.block_until_ready(any_sampler.weights(params)))


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Compiled sampling for one model shape; hashable, holds no arrays.

  S, the positions of the cache, is that of the state, and grows as needed
  (`grow`). It must hold every row's tokens, and behind those of each row of a
  call the chunk that is fed, since that is written whole, padding included.
  """

  model: qwen.Config
  layout: sharding.Layout  # of decoding
  slots: int  # B, a multiple of `shards`
  eos_ids: tuple[int, ...]  # any of them ends an episode
  top_k: int = 0  # 0 = off
  top_p: float = 1.0  # 1 = off

  @property
  def shards(self) -> int:
    """Parts that the slots are split into."""
    return self.layout.shards

  @property
  def unrolled(self) -> bool:
    """Whether layers are unrolled; as `models.cache` says, not on TPU."""
    return self.layout.platform != 'tpu'

  def weights(self, params: Any) -> Any:
    """The actor's parameters as decoding wants them, a copy.

    In the computation's dtype, but for the scales of the norms, which are
    multiplied in float32; laid out for decoding, so that no step gathers
    weights; layers unrolled or stacked. The adapters of a `lora.Adapted` are
    merged; what lies in host memory is on the device while it is copied.
    `Weights` are such a copy already.
    """
    if isinstance(params, Weights):
      return params.params
    return _weights(self, sharding.on_device(params))

  def empty(self, size: int) -> State:
    """Slots without episodes, of `size` positions."""
    return _empty(self, size)

  def grow(self, state: State, size: int) -> State:
    """The state with a cache of `size` positions, more than it has.

    Both caches exist while one is copied into the other.
    """
    return _grow(self, size, state)

  def shrink(self, state: State, rows: Any) -> tuple[Sampler, State]:
    """Keeps some slots only.

    Args:
      state: B slots.
      rows: [n] int32, the slots to be kept, as of `Rows`.

    Returns:
      the sampler and the state of n slots.
    """
    sampler = dataclasses.replace(self, slots=len(rows))
    return sampler, _shrink(sampler, state, rows)

  def prefix(self, params: Any, tokens: Any) -> cache_lib.Cache:
    """Entries of tokens [P] that all prompts begin with, for one row.

    Args:
      params: from `weights`, as everywhere below.
      tokens: [P] int32, at least one.
    """
    return _prefix(self, params, jnp.asarray(tokens, jnp.int32))

  def start(
      self, params: Any, state: State, rows: Rows,
      prefix: cache_lib.Cache | None,
  ) -> State:
    """Starts episodes: `shared` positions from `prefix`, then `tokens`.

    Args:
      params: from `weights`.
      state: donated.
      rows: at least one token each.
      prefix: from `prefix`; None: nothing is shared.
    """
    return _start(self, params, state, rows, prefix)

  def fork(self, state: State, rows: Rows) -> State:
    """Starts episodes whose prompt another slot holds: nothing is computed.

    Args:
      state: donated.
      rows: `shared` positions are taken from `source`; `tokens` [n, 1] is the
        last of the prompt.
    """
    return _fork(self, state, rows)

  def append(self, params: Any, state: State, rows: Rows) -> State:
    """Appends tokens that the actor did not sample, and resumes the rows.

    Args:
      params: from `weights`.
      state: donated.
      rows: at least one token each.
    """
    return _append(self, params, state, rows)

  def decode(
      self, params: Any, state: State, table: jax.Array, key: jax.Array,
      temperature: float | jax.Array, steps: int, *,
      greedy: bool = False,
  ) -> tuple[State, Chunk]:
    """Samples up to `steps` tokens a row.

    It ends early when no row runs, or one in `WAITING` has stopped.

    Args:
      params: from `weights`.
      state: donated.
      table: [A, V] int, the stop table (`protocol.stop_table`): the automaton's
        next state; a row starts in 0, SEARCH and ANSWER are completed tags.
      key: of the step; the token at absolute position t of episode e is drawn
        with `fold_in(fold_in(key, e), t)`.
      temperature: the logits are divided by it, for sampling and log-probs.
      steps: K; the cache has to hold that many more of every running row, or
        what is left of its budget.
      greedy: take the most likely token instead.
    """
    return _decode(
        self, steps, params, state, table, key,
        jnp.float32(temperature), jnp.bool_(greedy))

  def lower(
      self, params: Any, table: Any, *, sizes: Sequence[int], steps: int,
      shared: int, prompt: tuple[int, int], observation: tuple[int, int],
  ) -> dict[str, Callable[[], Any]]:
    """The programs of a rollout, for devices that need not be there.

    Args:
      params: what `weights` takes: shapes with shardings.
      table: the stop table's shape.
      sizes: positions of the cache; the last two, largest, count.
      steps: K of `decode`.
      shared: P of `prefix`, 0: none.
      prompt: n and C of `start`.
      observation: n and C of `append`.

    Returns:
      by name, what gives a `jax.stages.Lowered`: `weights`, `grow`, `prefill`,
      `append` and `decode`, each with the largest cache.
    """

    def rows(count, width):
      array = lambda dtype, *shape: jax.ShapeDtypeStruct((count, *shape), dtype)
      number = array(np.int32)
      return Rows(
          slot=number, active=array(bool), tokens=array(np.int32, width),
          count=number, budget=number, episode=number, shared=number,
          source=number)

    weights = self.weight_shapes()
    smaller, state = map(self.state_shapes, sizes[-2:])
    prefix = None
    if shared:
      prefix = sharding.shapes(
          jax.eval_shape(
              lambda: _cache(self, 1, shared)),
          _entries(self, None))
    key = jax.eval_shape(lambda: jax.random.key(0))
    table = jax.ShapeDtypeStruct(
        table.shape, table.dtype, sharding=self.layout.replicated)
    return {
        'weights': lambda: _weights.lower(self, params),
        'grow': lambda: _grow.lower(self, sizes[-1], smaller),
        'prefill': lambda: _start.lower(
            self, weights, state, rows(*prompt), prefix),
        'append': lambda: _append.lower(
            self, weights, state, rows(*observation)),
        'decode': lambda: _decode.lower(
            self, steps, weights, state, table, key, jnp.float32(1),
            jnp.bool_(False)),
    }

  def weight_shapes(self) -> Any:
    """What `weights` gives, as shapes with shardings."""
    shapes = sharding.shapes(
        jax.eval_shape(lambda: qwen.compact(
            self.model, qwen.init(self.model, jax.random.key(0)))),
        self.layout.place(qwen.axes(self.model)[0]))
    if not self.unrolled:
      return shapes
    layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape[1:], x.dtype, sharding=jax.NamedSharding(
                self.layout.mesh, jax.P(*x.sharding.spec[1:]))),
        shapes['layers'])
    return shapes | {'layers': (layer,) * self.model.layers}

  def state_shapes(self, size: int) -> State:
    """What `empty` gives, as shapes with shardings."""
    return sharding.shapes(
        jax.eval_shape(lambda: _empty(self, size)), _layout(self))

  def _feed(self, params, tokens, cache, start, rows=None, fresh=False):
    return qwen.feed(
        self.model, self.layout, params, tokens, cache, start, rows,
        self.shards, fresh)


def _layout(sampler) -> State:
  """`NamedSharding`s of a state."""
  rows = sampler.layout.rows
  return State(
      rows, rows, rows, rows, rows, rows, _entries(sampler, 'batch'))


def _entries(sampler, rows: str | None) -> cache_lib.Cache:
  """`NamedSharding`s of a cache whose rows are split, or one row."""
  axes = (rows, 'kv_heads', None, None)
  if sampler.unrolled:
    entries = (sampler.layout.named(*axes),) * sampler.model.layers
  else:
    entries = sampler.layout.named(None, *axes)
  return cache_lib.Cache(entries, entries)


def _cache(sampler, rows, size):
  return qwen.empty_cache(
      sampler.model, rows, size, sampler.unrolled,
      sampler.layout.size('kv_heads'))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(sampler, size):
  zeros = jnp.zeros((sampler.slots,), jnp.int32)
  return jax.lax.with_sharding_constraint(
      State(
          pending=zeros, length=zeros + 1, limit=zeros, automaton=zeros,
          stop=zeros + EOS, episode=zeros,
          cache=_cache(sampler, sampler.slots, size)),
      _layout(sampler))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grow(sampler, size, state):
  cache = jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [
          (0, size - x.shape[-2]), (0, 0)]), state.cache)
  return jax.lax.with_sharding_constraint(
      state.replace(cache=cache), _layout(sampler))


@functools.partial(jax.jit, static_argnums=0)
def _shrink(sampler, state, rows):
  cache = cache_lib.pick(state.cache, rows, sampler.shards)
  state = jax.tree.map(lambda x: x[rows], state.replace(cache=None))
  return jax.lax.with_sharding_constraint(
      state.replace(cache=cache), _layout(sampler))


@functools.partial(jax.jit, static_argnums=0)
def _weights(sampler, params):
  model, axes = sampler.model, qwen.axes(sampler.model)[0]
  laid = lambda tree, axes: jax.lax.with_sharding_constraint(
      tree, sampler.layout.place(axes))
  if isinstance(params, lora.Adapted):
    # Laid out first, so that the sums are taken where they are needed.
    params = lora.merge(
        model.lora, lora.Adapted(
            laid(params.base, axes),
            laid(params.adapters, lora.axes(model.lora, axes))), model.dtype)
  params = laid(qwen.compact(model, params), axes)
  return qwen.unroll(params) if sampler.unrolled else params


@functools.partial(jax.jit, static_argnums=0)
def _prefix(sampler, params, tokens):
  cache = _cache(sampler, 1, tokens.shape[0])
  _, cache = qwen.feed(  # one row, the same on all devices
      sampler.model, sampler.layout, params, tokens[None], cache,
      jnp.zeros((1,), jnp.int32), fresh=True)
  return jax.lax.with_sharding_constraint(cache, _entries(sampler, None))


def _resume(state, rows, pending, length, cache, episode=None):
  """The state once the rows run again."""

  def put(old, new):
    new = jnp.where(rows.active, new, old[rows.slot])
    return old.at[rows.slot].set(new.astype(old.dtype))

  return state.replace(
      pending=put(state.pending, pending), length=put(state.length, length),
      limit=put(state.limit, length + rows.budget),  # of this turn
      automaton=put(state.automaton, 0), stop=put(state.stop, RUNNING),
      episode=(
          state.episode if episode is None else put(state.episode, episode)),
      cache=cache)


def _last(rows):
  return jnp.take_along_axis(
      rows.tokens, jnp.maximum(rows.count - 1, 0)[:, None], axis=1)[:, 0]


def _copy(sampler, cache, rows, entries):
  """Puts entries [n or 1, K, P, H] at the beginning of the active rows."""
  size = jax.tree.leaves(entries)[0].shape[-2]
  old = cache_lib.pick(
      jax.tree.map(lambda x: x[..., :size, :], cache), rows.slot,
      sampler.shards)
  active = rows.active[:, None, None, None]
  entries = jax.tree.map(
      lambda x, y: jnp.where(
          jnp.expand_dims(active, tuple(range(y.ndim - 4))), x, y),
      entries, old)
  return cache_lib.write(
      cache, entries, jnp.zeros_like(rows.slot), rows.slot, sampler.shards)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _start(sampler, params, state, rows, prefix):
  cache = state.cache
  if prefix is not None:
    cache = _copy(sampler, cache, rows, prefix)
  # What is not active writes behind its last entry.
  start = jnp.where(rows.active, rows.shared, state.length[rows.slot] - 1)
  _, cache = sampler._feed(
      params, rows.tokens, cache, start, rows.slot, fresh=prefix is None)
  return _resume(
      state, rows, _last(rows), start + rows.count, cache, rows.episode)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _fork(sampler, state, rows):
  entries = cache_lib.pick(state.cache, rows.source, sampler.shards)
  cache = _copy(sampler, state.cache, rows, entries)
  return _resume(
      state, rows, _last(rows), rows.shared + rows.count, cache, rows.episode)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _append(sampler, params, state, rows):
  start = state.length[rows.slot] - 1
  fed = jnp.concatenate(
      [state.pending[rows.slot][:, None], rows.tokens[:, :-1]], axis=1)
  _, cache = sampler._feed(params, fed, state.cache, start, rows.slot)
  return _resume(state, rows, _last(rows), start + 1 + rows.count, cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(sampler, steps, params, state, table, key, temperature,
            greedy):
  layout = sampler.layout
  matrix = qwen.unembedding(params)
  ends = jnp.asarray(sampler.eos_ids, jnp.int32)
  before = jnp.sum(state.stop != RUNNING)
  enough = max(sampler.slots // WAITING, 1)
  rows, everywhere = layout.rows, layout.replicated
  chunk = jax.lax.with_sharding_constraint(
      Chunk(
          tokens=jnp.zeros((sampler.slots, steps), jnp.int32),
          logprobs=jnp.zeros((sampler.slots, steps), jnp.float32),
          count=jnp.zeros_like(state.length), stop=state.stop,
          steps=jnp.int32(0)),
      Chunk(rows, rows, rows, rows, everywhere))

  def going_on(carry):
    state, chunk = carry
    running = state.stop == RUNNING
    stopped = jnp.sum(~running) - before
    return jnp.any(running) & (chunk.steps < steps) & (stopped < enough)

  def step(carry):
    state, chunk = carry
    active = state.stop == RUNNING
    hidden, cache = sampler._feed(
        params, state.pending[:, None], state.cache, state.length - 1)
    hidden = layout.constrain(hidden[:, 0], 'batch', None, beside='vocab')
    logits = layout.constrain(
        jnp.einsum(
            'bd,dv->bv', hidden, matrix, preferred_element_type=jnp.float32),
        'batch', 'vocab')
    # Drawing looks at whole rows.
    logits = layout.constrain(logits, 'batch', None) / temperature
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    odds = jnp.exp(logits)
    draws = jax.vmap(
        lambda episode, t: jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(key, episode), t)))(
                state.episode, state.length)
    token = jax.lax.cond(
        greedy,
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        lambda: draw(odds, draws, sampler.top_k, sampler.top_p))
    logprob = jnp.take_along_axis(
        logits, token[:, None], axis=1)[:, 0] - jnp.log(jnp.sum(odds, axis=-1))

    automaton = table[state.automaton, token].astype(jnp.int32)
    length = state.length + active
    stop = jnp.where(
        (automaton == SEARCH) | (automaton == ANSWER), automaton,
        jnp.where(
            jnp.any(token[:, None] == ends[None], axis=-1), EOS,
            jnp.where(length >= state.limit, BUDGET, RUNNING)))
    stop = jnp.where(active, stop, state.stop)
    put = lambda x, y: jax.lax.dynamic_update_index_in_dim(
        x, jnp.where(active, y, 0), chunk.steps, 1)
    chunk = chunk.replace(
        tokens=put(chunk.tokens, token), logprobs=put(chunk.logprobs, logprob),
        count=chunk.count + active, stop=stop, steps=chunk.steps + 1)
    state = state.replace(
        pending=jnp.where(active, token, state.pending), length=length,
        automaton=automaton, stop=stop, cache=cache)
    return state, chunk

  state, chunk = jax.lax.while_loop(going_on, step, (state, chunk))
  return state, jax.lax.with_sharding_constraint(chunk, everywhere)


def draw(
    odds: jax.Array, uniform: jax.Array, top_k: int, top_p: float
) -> jax.Array:
  """Inverse-CDF draw of one token a row from one uniform number a row.

  The sum over the vocabulary is taken in blocks: first the block is found, then
  the token in it, so that only one block a row is summed cumulatively.

  Args:
    odds: [B, V] float32, probabilities up to a factor a row.
    uniform: [B] float32 in [0, 1).
    top_k: keep the k most likely tokens (ties are kept); 0 = all.
    top_p: then keep the smallest set of most likely tokens that holds this
      share of the probability (ties are kept); 1 = all.

  Returns:
    [B] int32.
  """
  probs, size = odds, odds.shape[-1]
  if 0 < top_k < size:
    counts = jnp.full(probs.shape[:1], top_k, jnp.float32)
    probs = _keep(probs, jnp.ones_like(probs), counts)
  if top_p < 1.0:
    probs = _keep(probs, probs, top_p * jnp.sum(probs, axis=-1))
  probs = jnp.pad(probs, ((0, 0), (0, -size % BLOCK)))
  blocks = probs.reshape(probs.shape[0], -1, BLOCK)
  mass = jnp.sum(blocks, axis=-1)
  upto = jnp.cumsum(mass, axis=-1)
  target = uniform * upto[:, -1]
  block = _at(upto, mass, target)[:, None]
  rest = target - (
      jnp.take_along_axis(upto - mass, block, axis=1)[:, 0])
  inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  token = _at(jnp.cumsum(inside, axis=-1), inside, jnp.maximum(rest, 0.0))
  return block[:, 0] * BLOCK + token


BLOCK = 128  # tokens


def _at(cumulative, mass, target):
  """Index of the entry in which the target falls, one with mass."""
  index = jnp.sum(cumulative <= target[:, None], axis=-1)
  # Rounding can carry the target past the last entry that has any.
  last = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(mass > 0, axis=-1), axis=-1)
  return jnp.minimum(index, last).astype(jnp.int32)


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
  high = jnp.full_like(low, np.float32(np.inf).view(np.int32))
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  return jnp.where(bits >= low[:, None], probs, 0.0)
