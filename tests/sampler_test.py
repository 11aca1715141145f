import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import protocol
from stepsearch import sharding
from stepsearch.rollout import sampler as sampler_lib

SIZE, PROMPTS = 48, (5, 2, 7, 4)


class Stacked(sampler_lib.Sampler):
  """As on a TPU: layers in a scan, which reads the cache and writes late."""

  unrolled = property(lambda self: False)


@pytest.fixture(params=[sampler_lib.Sampler, Stacked], ids=['unrolled', 'scan'])
def sampler(request, model, layout):
  return request.param(model=model, layout=layout, slots=4, eos_ids=(1,))


@pytest.fixture(scope='module')
def table(tokenizer, model):
  return jnp.asarray(protocol.stop_table(
      tokenizer.byte_strings, model.vocab_size).next_state)


def prompts(seed=0, sizes=PROMPTS):
  rng = np.random.default_rng(seed)
  return [rng.integers(13, 29, size).tolist() for size in sizes]


class Game:
  """Rows of a sampler, and on the host all that they wrote."""

  def __init__(
      self, sampler, params, table, starts, episodes, *, budget=8, key=0,
      prefix=(), size=SIZE, slots=None, source=None):
    self.sampler, self.table, self.budget = sampler, table, budget
    self.key = jax.random.key(key)
    self.params = sampler.weights(params)
    self.state = sampler.empty(size)
    count = sampler.slots
    self.tokens = [[] for _ in range(count)]
    self.logprobs, self.mask = ([[] for _ in range(count)] for _ in range(2))
    self.steps = []
    entries = None
    if prefix:
      entries = sampler.prefix(self.params, np.asarray(prefix))
    fed = {s: ids for s, ids in enumerate(starts)}
    self.start(fed, episodes, entries, len(prefix))

  def rows(self, fed, **more):
    slots = np.arange(self.sampler.slots, dtype=np.int32)
    width = max(map(len, fed.values()))
    tokens = np.zeros((len(slots), width), np.int32)
    for slot, ids in fed.items():
      tokens[slot, :len(ids)] = ids
    count = np.asarray([len(fed.get(s, ())) for s in slots], np.int32)
    return sampler_lib.Rows(
        slot=slots, active=count > 0, tokens=tokens, count=count,
        budget=np.full_like(slots, self.budget), **more)

  def note(self, fed):
    for slot, ids in fed.items():
      self.tokens[slot] += ids
      self.logprobs[slot] += [0.0] * len(ids)
      self.mask[slot] += [0] * len(ids)

  def start(self, fed, episodes, prefix=None, shared=0):
    self.note(fed)
    rows = self.rows(
        {s: ids[shared:] for s, ids in fed.items()},
        episode=np.asarray(episodes, np.int32),
        shared=np.full(self.sampler.slots, shared, np.int32))
    self.state = self.sampler.start(self.params, self.state, rows, prefix)

  def fork(self, slot, source, episode, length):
    """Starts the prompt of `source`, its first `length` tokens, in `slot`."""
    prompt = self.tokens[source][:length]
    self.tokens[slot], self.mask[slot], self.logprobs[slot] = [], [], []
    self.note({slot: prompt})
    row = lambda x: np.asarray([x], np.int32)
    self.state = self.sampler.fork(self.state, sampler_lib.Rows(
        slot=row(slot), active=np.asarray([True]), tokens=row([prompt[-1]]),
        count=row(1), budget=row(self.budget), episode=row(episode),
        shared=row(length - 1), source=row(source)))

  def append(self, fed):
    self.note(fed)
    self.state = self.sampler.append(self.params, self.state, self.rows(fed))

  def decode(self, steps=5, temperature=1.0, **options):
    """Until no row runs; returns the stop codes."""
    while True:
      self.state, chunk = self.sampler.decode(
          self.params, self.state, self.table, self.key, temperature, steps,
          **options)
      chunk = jax.device_get(chunk)
      self.steps.append(int(chunk.steps))
      for slot, count in enumerate(chunk.count):
        self.tokens[slot] += chunk.tokens[slot, :count].tolist()
        self.logprobs[slot] += chunk.logprobs[slot, :count].tolist()
        self.mask[slot] += [1] * int(count)
      if (chunk.stop != sampler_lib.RUNNING).all():
        return chunk.stop.tolist()

  def padded(self, slot):
    return np.pad(
        np.asarray(self.tokens[slot]), (0, SIZE - len(self.tokens[slot])))


def rollout(sampler, params, table, episodes, starts, temperature=1.0, **more):
  """Two turns of up to 8 tokens, an observation in between; not all get it."""
  game = Game(sampler, params, table, starts, episodes, **more)
  stop = game.decode(temperature=temperature)
  sizes = [3, 0, 6, 1]
  chunk = prompts(9, (6,) * 4)
  game.append({
      s: chunk[s][:sizes[s]] for s in range(4)
      if sizes[s] and stop[s] != sampler_lib.EOS})
  game.decode(temperature=temperature)
  return game


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_recorded_logprobs_are_the_recomputed_ones(
    sampler, params, table, recomputed, temperature):
  game = rollout(sampler, params, table, range(4), prompts(), temperature)
  assert sum(map(sum, game.mask)) > 30
  for slot in range(4):
    tokens = game.padded(slot)
    expected = recomputed(sampler.model, params, tokens, temperature)
    expected = expected[np.arange(SIZE), tokens][:len(game.tokens[slot])]
    np.testing.assert_allclose(
        game.logprobs[slot], expected * game.mask[slot], atol=1e-5)


def test_what_is_sampled_follows_from_key_episode_and_position(
    sampler, params, table, recomputed):
  """By the documented rule: inverse CDF at uniform(key, episode, position)."""
  episodes = [3, 9, 4, 200]
  game = rollout(sampler, params, table, episodes, prompts())
  for slot, episode in enumerate(episodes):
    tokens = game.padded(slot)
    logprobs = recomputed(sampler.model, params, tokens)
    cdf = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=-1)
    key = jax.random.fold_in(jax.random.key(0), episode)
    for t in np.flatnonzero(game.mask[slot]):
      uniform = jax.random.uniform(jax.random.fold_in(key, int(t)))
      assert tokens[t] == np.searchsorted(cdf[t], float(uniform))


def test_a_row_depends_on_its_own_episode_and_tokens_only(
    sampler, params, table):
  numbers, starts = np.asarray([4, 5, 6, 7]), prompts()

  def first_turn(numbers, starts, **options):
    game = Game(sampler, params, table, starts, numbers, **options)
    game.decode(**(dict(steps=3) if options else {}))
    return game

  expected = first_turn(numbers, starts)
  # Other slots, and other chunks of steps.
  order = [2, 0, 3, 1]
  found = first_turn(numbers[order], [starts[i] for i in order], size=40)
  for at, of in enumerate(order):
    assert found.tokens[at] == expected.tokens[of]
    np.testing.assert_allclose(
        found.logprobs[at], expected.logprobs[of], atol=1e-5)
  # Other neighbours: rows 0 and 2 stay, 1 and 3 are strangers.
  strangers = prompts(8, (7, 8, 1, 3))
  strangers[0], strangers[2] = starts[0], starts[2]
  other = first_turn([4, 50, 6, 70], strangers)
  for slot in (0, 2):
    assert other.tokens[slot] == expected.tokens[slot]
  assert other.tokens[1] != expected.tokens[1]
  # Another key, another sample.
  fresh = first_turn(numbers, starts, key=1)
  assert all(
      fresh.tokens[slot] != expected.tokens[slot] for slot in range(4))


def test_shared_prefixes_and_forks_change_nothing(sampler, params, table):
  head = prompts(3, (6,))[0]
  starts = [head + tail for tail in prompts()]
  plain = Game(sampler, params, table, starts, range(4))
  plain.decode()
  shared = Game(sampler, params, table, starts, range(4), prefix=head)
  shared.decode()
  assert shared.tokens == plain.tokens
  # Slot 1 takes the prompt of slot 2 as episode 2, slot 2's own once more.
  shared.fork(1, 2, 2, len(starts[2]))
  other = shared.tokens[0][:]
  shared.decode()
  assert shared.tokens[1] == plain.tokens[2]
  np.testing.assert_allclose(
      shared.logprobs[1], plain.logprobs[2], atol=1e-5)
  assert shared.tokens[0] == other


def test_growing_and_shrinking_change_nothing(sampler, params, table):
  starts = prompts()
  expected = rollout(sampler, params, table, range(4), starts)
  game = Game(sampler, params, table, starts, range(4), size=16)
  stop = game.decode()
  game.state = sampler.grow(game.state, SIZE)
  sizes, chunk = [3, 0, 6, 1], prompts(9, (6,) * 4)
  fed = {
      s: chunk[s][:sizes[s]] for s in (0, 2, 3)
      if stop[s] != sampler_lib.EOS}
  game.append(fed)
  # The last slots become the first.
  game.sampler, game.state = sampler.shrink(
      game.state, np.asarray([3, 2], np.int32))
  for name in ('tokens', 'logprobs', 'mask'):
    setattr(game, name, [getattr(game, name)[s] for s in (3, 2)])
  game.decode()
  assert game.tokens == [expected.tokens[3], expected.tokens[2]]


def test_weights_are_copied_once_for_an_actor_that_only_plays(
    model, layout, params):
  sampler = sampler_lib.Sampler(
      model=model, layout=layout, slots=2, eos_ids=(1,))
  made = sampler_lib.weights(model, layout, params)
  for wanted, found in zip(
      jax.tree.leaves(sampler.weights(params)), jax.tree.leaves(made)):
    np.testing.assert_array_equal(wanted, found)
  assert sampler.weights(made) is made.params


def test_vocabulary_and_mlp_may_be_split_over_the_rows_axes(
    model, layout, random_params):
  """Activations are gathered then, and rows of logits put together again."""
  if len(jax.devices()) < 8:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  model = dataclasses.replace(model, vocab_size=40)
  params = random_params(model)
  spread = ('fsdp', 'tensor')
  many = sharding.Layout(
      sharding.make_mesh((1, 4, 2), jax.devices()[:8]),
      sharding.rules(
          dict(sharding.DECODE) | dict(vocab=spread, mlp=spread), 'decode'))
  games = []
  for where in (layout, many):
    sampler = Stacked(model=model, layout=where, slots=8, eos_ids=(1,))
    weights = sampler.weights(params)
    game = Game(
        sampler, params, jnp.zeros((1, 40), jnp.int32),
        prompts(2, (5, 2, 7, 4, 3, 6, 1, 4)), range(8))
    game.decode()
    games.append(game)
  assert weights['lm_head'].addressable_shards[0].data.shape == (32, 5)
  assert games[0].tokens == games[1].tokens
  for expected, found in zip(games[0].logprobs, games[1].logprobs):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_eight_devices_are_one(
    model, layout, eight_decoding, params, table):
  """Rows split over data and fsdp, heads over tensor; rows of a call too."""
  numbers, starts = range(8), prompts(2, (5, 2, 7, 4, 3, 6, 1, 4))
  games = []
  for devices in (layout, eight_decoding):
    for kind in (sampler_lib.Sampler, Stacked):
      sampler = kind(model=model, layout=devices, slots=8, eos_ids=(1,))
      game = Game(sampler, params, table, starts, numbers)
      stop = game.decode()
      game.append({s: [14, 15] for s in range(8) if stop[s] != 3})
      game.fork(4, 5, 5, 6) if devices is layout else None
      game.decode()
      game.append({s: [16] for s in (0, 7)})
      game.decode()
      games.append(game)
  assert len(games[-1].state.length.sharding.device_set) == 8
  for game in games[1:]:
    for slot in range(8):
      if slot != 4:
        assert game.tokens[slot] == games[0].tokens[slot]
        np.testing.assert_allclose(
            game.logprobs[slot], games[0].logprobs[slot], atol=1e-5)


# ── Policies whose every token is known ──────────────────────────────────────


def chain(sampler, scripted, follows, table, starts, **options):
  config, params = scripted.chain_policy(follows, 32)
  sampler = dataclasses.replace(
      sampler, model=config, eos_ids=(0,), slots=len(starts))
  wide = np.zeros((17, 32), np.int32)
  wide[:len(table)] = table
  return Game(
      sampler, params, jnp.asarray(wide), starts, range(len(starts)), **options)


def test_a_finished_row_never_changes(sampler, scripted):
  # Tokens 4 and 5 follow each other for ever, 2 goes to the tag 3, 9 to eos.
  table = np.zeros((3, 32), np.int32)
  table[:, 3] = sampler_lib.SEARCH
  game = chain(
      sampler, scripted, {4: 5, 5: 4, 2: 3}, table,
      [[2], [4, 5], [9], [4], [9], [9]], budget=3)
  stop = game.decode()
  assert stop[:4] == [
      sampler_lib.SEARCH, sampler_lib.BUDGET, sampler_lib.EOS,
      sampler_lib.BUDGET]
  assert list(map(len, game.tokens))[:4] == [2, 5, 2, 4]

  def finished():
    """All that the device knows of all rows but the fourth."""
    rows = np.asarray([0, 1, 2, 4, 5])
    state = jax.tree.map(np.array, game.state)
    known = np.arange(SIZE) < state.length[:, None] - 1
    cache = jax.tree.map(
        lambda x: np.where(
            known[:, None, :, None], x, 0)[..., rows, :, :, :], state.cache)
    return jax.tree.map(lambda x: x[rows], state.replace(cache=None)), cache

  before = finished()
  game.budget = 6
  for _ in range(2):  # only the fourth row goes on
    game.append({3: [4, 4]})
    jax.tree.map(np.testing.assert_array_equal, before, finished())
    game.decode()
    jax.tree.map(np.testing.assert_array_equal, before, finished())
  assert len(game.tokens[3]) == 4 + 2 * 8
  assert sum(game.mask[3]) == 3 + 2 * 6


def test_stops_across_token_boundaries(sampler, scripted):
  pieces = scripted.Pieces([
      b'</', b'search', b'>\n', b'answer', b'>', b'</search', b'></answer>',
      b'x', b'</', b'search', b'x>', b'<', b'/answer>?', b'</search>'])
  # What a row writes after a prompt of its own, and why it stops.
  chains = [
      ((8, 1, 2, 3), sampler_lib.SEARCH),  # x </ search >\n
      ((12, 13), sampler_lib.ANSWER),  # < /answer>?
      ((9, 10, 11, 0), sampler_lib.EOS),  # </ search x> <eos>
      ((6, 7), sampler_lib.SEARCH),  # </search ></answer>
      ((4, 5, 0), sampler_lib.EOS),  # answer > <eos>
      ((0,), sampler_lib.EOS),  # the prompt's own tag does not count
  ]
  follows, starts = {}, [[20], [21], [22], [23], [24], [14]]
  for [start], (written, _) in zip(starts, chains):
    follows |= dict(zip((start, *written), written))
  table = protocol.stop_table(pieces.byte_strings, 32).next_state
  # Chunks of two, so that tags are split between them.
  game = chain(sampler, scripted, follows, table, starts, budget=10)
  assert game.decode(steps=2) == [code for _, code in chains]
  for slot, (written, _) in enumerate(chains):
    assert game.tokens[slot] == [*starts[slot], *written]


def test_budgets_chunks_and_the_rows_that_wait(sampler, scripted):
  starts = [[4], [4, 5, 4], [4], [5], [4, 5], [5, 4], [4], [9]]
  game = chain(
      sampler, scripted, {4: 5, 5: 4}, np.zeros((3, 32)), starts, budget=7)
  assert game.decode(steps=3) == [sampler_lib.BUDGET] * 7 + [sampler_lib.EOS]
  assert [len(t) for t in game.tokens] == [8, 10, 8, 8, 9, 9, 8, 2]
  # The first chunk ended with the one in eight that stopped; no step is taken
  # for nobody.
  assert game.steps == [1, 3, 3]
  _, chunk = sampler_lib.Sampler.decode(
      game.sampler, game.params, game.state, game.table, game.key, 1.0, 3)
  assert (int(chunk.steps), chunk.count.tolist()) == (0, [0] * 8)


def test_greedy_takes_the_most_likely(sampler, params, table, recomputed):
  game = Game(sampler, params, table, prompts(), range(4))
  game.decode(greedy=True)
  one = Game(
      dataclasses.replace(sampler, top_k=1), params, table, prompts(), range(4))
  one.decode()
  assert game.tokens == one.tokens
  for slot in range(4):
    # Log-probs are those of the whole distribution, whatever is cut from it.
    np.testing.assert_allclose(
        game.logprobs[slot], one.logprobs[slot], atol=1e-6)
    logprobs = recomputed(sampler.model, params, game.padded(slot))
    for t in np.flatnonzero(game.mask[slot]):
      assert game.tokens[slot][t] == logprobs[t].argmax()


def test_what_is_fed_costs_no_logits(sampler, params):
  """Neither a start nor an append computes anything over the vocabulary."""
  game = Game(sampler, params, jnp.zeros((1, 30)), prompts(), range(4))
  rows = game.rows({0: [14, 15], 2: [16]})
  fresh = game.rows(
      {1: [14, 15]}, episode=np.arange(4), shared=np.zeros(4, np.int32))
  size = sampler.model.vocab_size
  for call in (
      sampler_lib._append.lower(sampler, game.params, game.state, rows),
      sampler_lib._start.lower(sampler, game.params, game.state, fresh, None)):
    shapes = set(re.findall(r'tensor<([\dx]+)xf32>', call.as_text()))
    wide = {s for s in shapes if str(size) in s.split('x')}
    assert wide == {f'{size}x32'}  # the embedding; not even lm_head is taken


def test_weights_that_decode_are_those_that_learn(model, layout, params):
  """bfloat16 but for the scales of the norms; each number is the same."""
  config = dataclasses.replace(model, dtype='bfloat16')
  sampler = sampler_lib.Sampler(
      model=config, layout=layout, slots=4, eos_ids=(1,))
  weights = sampler.weights(params)
  assert weights['layers'][1]['mlp']['up'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
      weights['layers'][1]['mlp']['up'],
      params['layers']['mlp']['up'][1].astype(jnp.bfloat16))
  for name in ('attention_norm', 'mlp_norm'):
    np.testing.assert_array_equal(
        weights['layers'][0][name]['scale'], params['layers'][name]['scale'][0])
  assert weights['final_norm']['scale'].dtype == jnp.float32


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
          3 * jnp.exp(logprobs), jnp.full(6, u), top_k, top_p)))
  tokens = np.asarray(draw(uniform))  # [grid, 6]
  assert (np.diff(tokens, axis=0) >= 0).all()  # the inverse of a CDF
  for row in range(6):
    expected = sorted_reference(np.exp(np.asarray(logprobs[row])), top_k, top_p)
    counts = np.bincount(tokens[:, row], minlength=23) / grid
    np.testing.assert_allclose(counts, expected, atol=1.5 / grid)
    assert (counts[expected == 0] == 0).all()


def test_draw_at_the_ends_of_the_unit_interval():
  odds = jnp.asarray([[0.0, 0.5, 0.0, 0.5, 0.0]])
  for uniform, token in ((0.0, 1), (np.nextafter(np.float32(1), 0), 3)):
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.99)):
      found = sampler_lib.draw(
          odds, jnp.asarray([uniform], jnp.float32), top_k, top_p)
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


def test_a_large_vocabulary_is_drawn_from_block_by_block():
  rng = np.random.default_rng(6)
  probs = rng.dirichlet(np.full(1000, 0.05), size=4).astype(np.float32)
  probs[1, :700] = 0  # whole blocks without any
  cdf = np.cumsum(probs.astype(np.float64), axis=-1)
  cdf /= cdf[:, -1:]
  for uniform in np.linspace(0, 0.9999, 200, dtype=np.float32):
    found = sampler_lib.draw(
        jnp.asarray(probs), jnp.full(4, uniform), 0, 1.0)
    for row in range(4):
      assert probs[row, found[row]] > 0
      low, high = (
          np.searchsorted(cdf[row], uniform + d) for d in (-1e-6, 1e-6))
      assert low <= found[row] <= max(high, np.flatnonzero(probs[row])[0])
