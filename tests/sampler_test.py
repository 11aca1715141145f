import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import protocol
from stepsearch.rollout import sampler as sampler_lib

SIZE, PROMPTS = 48, (5, 2, 7, 4)


@pytest.fixture
def sampler(model):
  return sampler_lib.Sampler(model=model, size=SIZE, turns=3, eos_ids=(1,))


@pytest.fixture(scope='module')
def table(tokenizer, model):
  return jnp.asarray(protocol.stop_table(
      tokenizer.byte_strings, model.vocab_size).next_state)


def prompts(seed=0, sizes=PROMPTS, width=8):
  rng = np.random.default_rng(seed)
  tokens = np.zeros((len(sizes), width), np.int32)
  for row, size in zip(tokens, sizes):
    row[:size] = rng.integers(13, 29, size)
  return tokens, np.asarray(sizes, np.int32)


def row_keys(numbers, seed=0):
  return jnp.stack([
      jax.random.fold_in(jax.random.key(seed), n) for n in numbers])


def host(state):
  return jax.tree.map(np.array, dataclasses.replace(state, cache=None))


def rollout(sampler, params, table, keys, start, temperature=1.0):
  """Two turns of up to 8 tokens with an observation in between; not all get it.

  Returns:
    the states after each call, as numpy, and the last one.
  """
  states = []
  state = sampler.prefill(params, *start)
  state = sampler.decode(params, state, table, keys, 0, 8, temperature)
  states.append(host(state))
  chunk, _ = prompts(9, (6,) * len(keys))
  length = np.where(states[0].stop == sampler_lib.EOS, 0, [3, 0, 6, 1])
  state = sampler.append(params, state, chunk, length.astype(np.int32))
  states.append(host(state))
  state = sampler.decode(params, state, table, keys, 1, 8, temperature)
  states.append(host(state))
  return states, state


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_recorded_logprobs_are_the_recomputed_ones(
    sampler, params, table, recomputed, temperature):
  (_, _, end), _ = rollout(
      sampler, params, table, row_keys(range(4)), prompts(), temperature)
  assert end.loss_mask.sum() > 30
  for row in range(4):
    length = end.length[row]
    expected = recomputed(sampler.model, params, end.tokens[row], temperature)
    expected = expected[np.arange(SIZE), end.tokens[row]]
    sampled = end.loss_mask[row] > 0
    assert not sampled[length:].any()
    np.testing.assert_allclose(
        end.logprobs[row][sampled], expected[sampled], atol=1e-5)
    assert (end.logprobs[row][~sampled] == 0).all()


def test_what_is_sampled_follows_from_key_and_position(
    sampler, params, table, recomputed):
  """The draw by the documented rule: inverse CDF at uniform(key, position)."""
  keys = row_keys(range(4))
  (_, _, end), _ = rollout(sampler, params, table, keys, prompts())
  for row in range(4):
    logprobs = recomputed(sampler.model, params, end.tokens[row])
    cdf = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=-1)
    for t in np.flatnonzero(end.loss_mask[row]):
      uniform = jax.random.uniform(jax.random.fold_in(keys[row], int(t)))
      assert end.tokens[row, t] == np.searchsorted(cdf[t], float(uniform))


def test_a_row_depends_on_its_own_key_and_tokens_only(sampler, params, table):
  numbers = np.asarray([4, 5, 6, 7])
  start = prompts()
  (_, _, end), _ = rollout(sampler, params, table, row_keys(numbers), start)

  def same(found, at, expected, of):
    for name in ('tokens', 'length', 'loss_mask', 'stop'):
      np.testing.assert_array_equal(
          getattr(found, name)[at], getattr(expected, name)[of])
    np.testing.assert_allclose(
        found.logprobs[at], expected.logprobs[of], atol=1e-5)

  # Observations are by batch row, so only turns before them are compared when
  # the rows change places.
  order = np.asarray([2, 0, 3, 1])
  (first, _, _), _ = rollout(
      sampler, params, table, row_keys(numbers[order]),
      tuple(x[order] for x in start))
  (expected, _, _), _ = rollout(
      sampler, params, table, row_keys(numbers), start)
  for at, of in enumerate(order):
    same(first, at, expected, of)
  # Other neighbours: rows 0 and 2 stay, 1 and 3 are strangers.
  tokens, length = prompts(8, (7, 8, 1, 3))
  tokens[[0, 2]], length[[0, 2]] = start[0][[0, 2]], start[1][[0, 2]]
  (_, _, other), _ = rollout(
      sampler, params, table, row_keys([4, 50, 6, 70]), (tokens, length))
  for row in (0, 2):
    same(other, row, end, row)
  assert (other.tokens[1] != end.tokens[1]).any()
  # Another key, another sample.
  (_, _, fresh), _ = rollout(
      sampler, params, table, row_keys(numbers, 1), start)
  assert all(
      (fresh.tokens[row] != end.tokens[row]).any() for row in range(4))


# ── Policies whose every token is known ──────────────────────────────────────


def chain(sampler, scripted, follows, table, starts):
  """Sampler, parameters, table and prefilled state; always of six rows."""
  config, params = scripted.chain_policy(follows, 32)
  sampler = dataclasses.replace(sampler, model=config, eos_ids=(0,))
  wide = np.zeros((17, 32), np.int32)
  wide[:len(table)] = table
  tokens = np.zeros((6, 3), np.int32)
  for row, start in zip(tokens, starts):
    row[:len(start)] = start
  length = np.asarray([len(start) for start in starts], np.int32)
  state = sampler.prefill(params, tokens, length)
  return sampler, params, jnp.asarray(wide), state


def test_a_finished_row_never_changes(sampler, scripted):
  # Tokens 4 and 5 follow each other for ever, 2 goes to the tag 3, 9 to eos.
  table = np.zeros((3, 32), np.int32)
  table[:, 3] = sampler_lib.SEARCH
  sampler, params, table, state = chain(
      sampler, scripted, {4: 5, 5: 4, 2: 3}, table,
      [[2], [4, 5], [9], [4], [9], [9]])
  keys = row_keys(range(6))
  state = sampler.decode(params, state, table, keys, 0, 3, 1.0)
  assert state.stop.tolist()[:4] == [
      sampler_lib.SEARCH, sampler_lib.BUDGET, sampler_lib.EOS,
      sampler_lib.BUDGET]
  assert state.length.tolist()[:4] == [2, 5, 2, 4]
  assert state.turn_ends[:, 0].tolist() == [1, -1, -1, -1, -1, -1]

  def finished(state):
    """All that is known of all rows but the fourth, free cache left out."""
    rows = np.asarray([0, 1, 2, 4, 5])
    known = np.arange(SIZE) < np.asarray(state.length)[:, None] - 1
    cache = jax.tree.map(
        lambda x: np.where(
            known[None, :, None, :, None], np.asarray(x), 0)[:, rows],
        state.cache)
    return jax.tree.map(lambda x: x[rows], host(state)), cache

  before = finished(state)
  for turn in (1, 2):  # only the fourth row goes on
    state = sampler.append(
        params, state, np.full((6, 5), 4, np.int32),
        np.asarray([0, 0, 0, 2, 0, 0]))
    jax.tree.map(np.testing.assert_array_equal, before, finished(state))
    state = sampler.decode(params, state, table, keys, turn, 6, 1.0)
    jax.tree.map(np.testing.assert_array_equal, before, finished(state))
  assert state.length[3] == 4 + 2 * 8
  assert state.loss_mask[3].sum() == 3 + 2 * 6


def test_stops_across_token_boundaries(sampler, scripted):
  pieces = scripted.Pieces([
      b'</', b'search', b'>\n', b'answer', b'>', b'</search', b'></answer>',
      b'x', b'</', b'search', b'x>', b'<', b'/answer>?', b'</search>'])
  # What a row writes after a prompt of its own, why and when it stops.
  chains = [
      ((8, 1, 2, 3), sampler_lib.SEARCH, 4),  # x </ search >\n
      ((12, 13), sampler_lib.ANSWER, 2),  # < /answer>?
      ((9, 10, 11), sampler_lib.EOS, 4),  # </ search x> <eos>
      ((6, 7), sampler_lib.SEARCH, 2),  # </search ></answer>
      ((4, 5), sampler_lib.EOS, 3),  # answer > <eos>
      ((), sampler_lib.EOS, 1),  # the prompt's own tag does not count
  ]
  follows, starts = {}, [[20], [21], [22], [23], [24], [14]]
  for [start], (written, _, _) in zip(starts, chains):
    follows |= dict(zip((start, *written), written))
  table = protocol.stop_table(pieces.byte_strings, 32).next_state
  sampler, params, table, state = chain(
      sampler, scripted, follows, table, starts)
  state = host(sampler.decode(
      params, state, table, row_keys(range(6)), 0, 10, 1.0))
  for row, (written, code, steps) in enumerate(chains):
    assert (state.stop[row], state.length[row]) == (code, 1 + steps), written
    closed = steps if code == sampler_lib.SEARCH else -1
    assert state.turn_ends[row, 0] == closed
    assert state.tokens[row, 1:].tolist() == [
        *written, *[0] * (SIZE - 1 - len(written))]


def test_budget_and_end_of_cache(sampler, scripted):
  starts = [[4], [4, 5, 4], [4], [5], [4, 5], [5, 4]]
  sampler, params, table, state = chain(
      sampler, scripted, {4: 5, 5: 4}, np.zeros((3, 32)), starts)
  keys = row_keys(range(6))
  state = sampler.decode(params, state, table, keys, 0, 5, 1.0)
  assert state.length.tolist() == [5 + len(start) for start in starts]
  assert state.stop.tolist() == [sampler_lib.BUDGET] * 6
  # A budget beyond the cache ends one position before it does.
  state = sampler.append(
      params, state, np.full((6, 5), 4, np.int32), np.ones(6, np.int32))
  state = sampler.decode(params, state, table, keys, 1, 999, 1.0)
  assert state.length.tolist() == [SIZE - 1] * 6
  assert state.stop.tolist() == [sampler_lib.BUDGET] * 6
  assert state.tokens[:, -1].tolist() == [0] * 6


def test_greedy_takes_the_most_likely(sampler, params, table, recomputed):
  start = prompts()
  state = sampler.prefill(params, *start)
  end = host(sampler.decode(
      params, state, table, row_keys(range(4)), 0, 8, 1.0, greedy=True))
  one = dataclasses.replace(sampler, top_k=1)
  state = one.prefill(params, *start)
  same = host(one.decode(params, state, table, row_keys(range(4)), 0, 8, 1.0))
  np.testing.assert_array_equal(end.tokens, same.tokens)
  # Log-probs are those of the whole distribution, whatever is cut from it.
  np.testing.assert_allclose(end.logprobs, same.logprobs, atol=1e-6)
  for row in range(4):
    logprobs = recomputed(sampler.model, params, end.tokens[row])
    for t in np.flatnonzero(end.loss_mask[row]):
      assert end.tokens[row, t] == logprobs[t].argmax()


# ── One draw ─────────────────────────────────────────────────────────────────


def sorted_reference(probs, top_k, top_p):
  """The kept distribution of one row, by sorting; ties with the last stay."""
  probs = probs.astype(np.float64)
  if 0 < top_k < len(probs):
    probs = np.where(probs >= np.sort(probs)[-top_k], probs, 0)
  if top_p < 1:
    order = np.sort(probs)[::-1]
    enough = np.searchsorted(np.cumsum(order), top_p * probs.sum() - 1e-7)
    probs = np.where(probs >= order[enough], probs, 0)
  return probs / probs.sum()


@pytest.mark.parametrize(
    ('top_k', 'top_p'),
    [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6), (7, 0.8),
     (99, 0.999)])
def test_draw_is_the_kept_distribution(top_k, top_p):
  """Sweeps the uniform number, so that counts are the distribution exactly."""
  grid = 4000
  logits = 2 * jax.random.normal(jax.random.key(top_k), (6, 23))
  logits = logits.at[0].set(0.0)  # all tied
  logits = logits.at[1, 3:9].set(logits[1].max())  # some tied
  logits = logits.at[2].add(jnp.where(jnp.arange(23) == 4, 30.0, 0.0))
  logprobs = jax.nn.log_softmax(logits)
  uniform = jnp.asarray((np.arange(grid) + 0.5) / grid, jnp.float32)
  draw = jax.jit(jax.vmap(
      lambda u: sampler_lib.draw(
          logprobs, jnp.full(6, u), top_k, top_p)))
  tokens = np.asarray(draw(uniform))  # [grid, 6]
  assert (np.diff(tokens, axis=0) >= 0).all()  # the inverse of a CDF
  for row in range(6):
    expected = sorted_reference(np.exp(np.asarray(logprobs[row])), top_k, top_p)
    counts = np.bincount(tokens[:, row], minlength=23) / grid
    np.testing.assert_allclose(counts, expected, atol=1.5 / grid)
    assert (counts[expected == 0] == 0).all()


def test_draw_at_the_ends_of_the_unit_interval():
  logprobs = jnp.log(jnp.asarray([[0.0, 0.5, 0.0, 0.5, 0.0]]))
  for uniform, token in ((0.0, 1), (np.nextafter(np.float32(1), 0), 3)):
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.99)):
      found = sampler_lib.draw(
          logprobs, jnp.asarray([uniform], jnp.float32), top_k, top_p)
      assert found.tolist() == [token]


def test_a_large_vocabulary_is_cut_exactly():
  rng = np.random.default_rng(5)
  probs = rng.dirichlet(np.full(5000, 0.05), size=3).astype(np.float32)
  for top_p in (0.5, 0.95):
    kept = np.asarray(sampler_lib._keep(
        jnp.asarray(probs), jnp.asarray(probs), top_p * jnp.ones(3)))
    for row in range(3):
      order = np.argsort(-probs[row])
      total = np.cumsum(probs[row][order].astype(np.float64))
      count = (kept[row] > 0).sum()
      assert set(np.flatnonzero(kept[row])) == set(order[:count])
      assert total[count - 1] > top_p - 1e-5 > total[count - 2] - 2e-5
