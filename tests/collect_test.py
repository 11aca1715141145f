from concurrent import futures
import dataclasses
import math
import time
import types as py_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import protocol
from stepsearch import sharding
from stepsearch import types
from stepsearch.rl import rewards
from stepsearch.rollout import collect as collect_lib
from stepsearch.rollout import sampler as sampler_lib
from tests import lockstep

SHORT = protocol.Protocol.short()
CONFIG = collect_lib.Config(
    max_turns=3, k=2, prompt_length=8, response_length=10,
    observation_length=12, max_length=80, temperature=0.8, length_multiple=8)
QUESTIONS = ('who is the mayor of cuna ?', 'who born in bero ?', 'alba ?')


def examples(count, questions=QUESTIONS):
  return [
      types.Example(str(i), questions[i % len(questions)], ('bero',))
      for i in range(count)]


@pytest.fixture
def collector(model, tokenizer, retriever, layout):
  return collect_lib.Collector(
      model, CONFIG, tokenizer, SHORT, retriever.search, layout)


@pytest.fixture
def played(collector, chatty):
  """Sixteen episodes of a random policy: arrays as numpy, and transcripts."""
  trajectory, transcripts = collector(
      chatty, examples(16), jax.random.key(4), first_episode=100)
  return jax.tree.map(np.array, trajectory), transcripts


def stretches(tokens, mask, start, length):
  """[(sampled?, ids)] of a row behind its prompt."""
  found = []
  for t in range(start, length):
    if not found or found[-1][0] != mask[t]:
      found.append((mask[t], []))
    found[-1][1].append(int(tokens[t]))
  return found


# ── A random policy ──────────────────────────────────────────────────────────


def test_all_that_must_hold_of_every_episode(
    played, collector, tokenizer, retriever):
  trajectory, transcripts = played
  assert trajectory.turn_ends.shape == (16, CONFIG.max_turns + 1)
  kinds = []
  for row, transcript in enumerate(transcripts):
    tokens, mask = trajectory.tokens[row], trajectory.loss_mask[row]
    length = int(trajectory.token_mask[row].sum())
    assert (trajectory.token_mask[row] == (
        np.arange(trajectory.tokens.shape[1]) < length)).all()
    assert (tokens[length:] == 0).all() and not mask[length:].any()
    assert length <= CONFIG.max_length
    prompt = collector.prompt(QUESTIONS[row % 3])
    assert tokens[:len(prompt)].tolist() == prompt
    assert transcript.prompt == tokenizer.decode(prompt)
    assert transcript.text == tokenizer.decode(tokens[len(prompt):length])

    # Alternately what was sampled and what was observed, as the text says.
    parts = stretches(tokens, mask, len(prompt), length)
    assert [bool(sampled) for sampled, _ in parts] == [
        i % 2 == 0 for i in range(len(parts))]
    turns = transcript.turns
    assert len(turns) == (len(parts) + 1) // 2 <= CONFIG.max_turns + 1
    end = len(prompt)
    for number, turn in enumerate(turns):
      written = parts[2 * number][1]
      assert tokenizer.decode(written) == turn.text
      assert 1 <= len(written) <= CONFIG.response_length
      end += len(written)
      closed = turn.text.endswith('</search>')
      assert trajectory.turn_ends[row, number] == (end - 1 if closed else -1)
      action = protocol.parse(turn.text)
      last = number == len(turns) - 1
      if last:
        assert (turn.query, turn.observation, turn.documents) == (None, '', ())
        forced = number == CONFIG.max_turns or turns[
            number - 1].observation.endswith(SHORT.last_turn)
        over = turn.text.endswith(('</answer>', '<eos>'))
        assert forced or over
        kinds.append('forced' if forced else 'over')
        continue
      observation = parts[2 * number + 1][1]
      assert tokenizer.decode(observation) == turn.observation
      assert len(observation) <= CONFIG.observation_length
      end += len(observation)
      final = turn.observation.endswith(SHORT.last_turn)
      # After this turn, another and an answer would not fit, or are not left.
      room = CONFIG.max_length - (end - len(observation))
      assert final == (
          number + 1 == CONFIG.max_turns or room < 2 * (10 + 12))
      assert not final or number == len(turns) - 2
      if action.kind == 'search':
        assert turn.query == action.content
        found = []
        if turn.query:
          [found] = retriever.search([turn.query], CONFIG.k)
        ids, shown = protocol.observation_tokens(
            SHORT, tokenizer, found, CONFIG.observation_length,
            last_turn=final, cache={})
        assert (observation, turn.documents) == (ids, shown)
        kinds.append('search' if turn.query else 'empty')
      else:
        assert (turn.query, turn.documents) == (None, ())
        assert turn.observation == SHORT.warning + final * SHORT.last_turn
        kinds.append('stray' if closed else 'warned')
    assert (trajectory.turn_ends[row, len(turns):] == -1).all()
  # The draw had something of everything.
  assert set(kinds) == {
      'forced', 'over', 'search', 'empty', 'stray', 'warned'}
  assert {len(t.turns) for t in transcripts} == {1, 2, 3, 4}


def test_recorded_logprobs_are_recomputed_ones_up_to_the_budget(
    played, model, chatty, recomputed):
  """Also in rows that fill it: nothing of the cache was ever overwritten."""
  trajectory, transcripts = played
  assert max(len(t.turns) for t in transcripts) == CONFIG.max_turns + 1
  for row in range(16):
    tokens = trajectory.tokens[row]
    expected = recomputed(model, chatty, tokens, CONFIG.temperature)
    expected = expected[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(
        trajectory.logprobs[row], expected * trajectory.loss_mask[row],
        atol=1e-5)


def test_a_tight_budget_is_filled_and_never_exceeded(
    model, tokenizer, retriever, layout, params, recomputed):
  """A policy that never stops, in the smallest length that is allowed."""
  config = dataclasses.replace(
      CONFIG, max_length=8 + 2 * 10 + 12, max_turns=5)
  collector = collect_lib.Collector(
      model, config, tokenizer, SHORT, retriever.search, layout)
  table = jnp.zeros_like(collector._table)
  collector._table = table  # no tag stops it
  mute = params | {
      'lm_head': params['lm_head'].at[:, tokenizer.eos_ids[0]].set(0)}
  questions = ('? ? ? ? ? ? ?', 'alba ?')
  trajectory, transcripts = collector(
      mute, examples(2, questions), jax.random.key(0))
  trajectory = jax.tree.map(np.array, trajectory)
  lengths = trajectory.token_mask.sum(axis=1)
  # The long one has room for the forced last turn only; so has the other,
  # since a search and an answer would not fit behind its first turn.
  assert lengths.tolist() == [8 + 2 * 10 + 3, 3 + 2 * 10 + 3]
  for row, transcript in enumerate(transcripts):
    assert len(transcript.turns) == 2
    assert transcript.turns[0].observation == ' invalid answer now'
    tokens = trajectory.tokens[row]
    expected = recomputed(model, mute, tokens, config.temperature)
    np.testing.assert_allclose(
        trajectory.logprobs[row],
        expected[np.arange(len(tokens)), tokens] * trajectory.loss_mask[row],
        atol=1e-5)


def test_one_call_a_turn_for_queries_that_ask_something(
    collector, chatty, retriever):
  retriever.calls.clear()
  _, transcripts = collector(chatty, examples(16), jax.random.key(4))
  expected = [
      [t.turns[n].query for t in transcripts
       if n < len(t.turns) and t.turns[n].query]
      for n in range(CONFIG.max_turns)]
  assert retriever.calls == [queries for queries in expected if queries]
  # Nobody who asks nothing costs a call.
  retriever.calls.clear()
  collector(
      jax.tree.map(jnp.zeros_like, chatty), examples(16), jax.random.key(4),
      greedy=True)
  assert retriever.calls == []


def test_an_episode_depends_on_its_number_and_not_on_its_batch(
    collector, chatty, played):
  trajectory, transcripts = played
  part, texts = collector(
      chatty, examples(16)[5:] + examples(5), jax.random.key(4),
      first_episode=105)
  part = jax.tree.map(np.array, part)
  assert texts[:11] == transcripts[5:]
  width = min(part.tokens.shape[1], trajectory.tokens.shape[1])
  for name in ('tokens', 'loss_mask', 'token_mask'):
    np.testing.assert_array_equal(
        getattr(part, name)[:11, :width],
        getattr(trajectory, name)[5:, :width])
  np.testing.assert_allclose(
      part.logprobs[:11, :width], trajectory.logprobs[5:, :width], atol=1e-5)
  _, other = collector(
      chatty, examples(16), jax.random.key(4), first_episode=101)
  assert other != transcripts


def test_eight_devices_are_one(
    model, tokenizer, retriever, eight_decoding, chatty, played):
  many = collect_lib.Collector(
      model, CONFIG, tokenizer, SHORT, retriever.search, eight_decoding)
  trajectory, transcripts = many(
      chatty, examples(16), jax.random.key(4), first_episode=100)
  expected, texts = played
  assert transcripts == texts
  for name in ('tokens', 'token_mask', 'loss_mask', 'turn_ends'):
    np.testing.assert_array_equal(
        getattr(trajectory, name), getattr(expected, name))
  np.testing.assert_allclose(
      trajectory.logprobs, expected.logprobs, atol=1e-5)


# ── Policies whose every token is known ──────────────────────────────────────

TEXTS = protocol.Protocol(
    instruction='{question}?', information_open='<information>',
    information_close='</information>', document=' {text}', separator='|',
    warning='!', last_turn='.')
STRINGS = [
    b'?', b'<information>', b'</information>', b' d', b'|', b'!', b'.', b'Q',
    # from 9 on, what only the policy writes
    b'<think>', b'x', b'</think>', b'<search>', b' q', b'</', b'search', b'>\n',
    b'<answer>', b' a', b'</answer>', b'</search>', b'<information>',
    b'invented', b'</information>', b' <', b'/sea', b'rch', b'><sea', b'y',
]


def scripted_collector(scripted, layout, follows, search, **config):
  """A collector with the real sampler, and parameters of a chain policy."""
  tokenizer = scripted.Pieces(STRINGS)
  model, params = scripted.chain_policy(follows, 32)
  settings = dict(
      max_turns=2, k=1, prompt_length=4, response_length=12,
      observation_length=6, max_length=64, length_multiple=8)
  return collect_lib.Collector(
      model, collect_lib.Config(**settings | config), tokenizer, TEXTS, search,
      layout), params


def ids(*strings):
  """Tokens of byte strings; of those that occur twice, the policy's."""
  everything = [b'<eos>', *STRINGS]
  return [len(everything) - 1 - everything[::-1].index(s) for s in strings]


def links(*chains):
  """Chains of byte strings as token -> next token; a chain's head is the
  environment's."""
  follows = {}
  for head, *rest in chains:
    at = STRINGS.index(head) + 1
    for token in ids(*rest):
      follows[at] = at = token
  return follows


def found(text='d'):
  return lambda queries, k: [
      [types.Document('7', '', text)] for _ in queries]


def play(collector, params, count=2):
  trajectory, transcripts = collector(
      params, examples(count, ('Q',)), jax.random.key(0))
  assert len(set(transcripts)) == 1  # nothing is random here
  return jax.tree.map(np.array, trajectory), transcripts[0]


def score_of(turn_rewards, global_reward):
  values = np.asarray(turn_rewards, float)
  return rewards.Score(
      answer_f1=1.0, exact_match=True, format_ok=True, search_key=0.0,
      gains=values, penalties=0 * values, turn_rewards=values,
      global_reward=global_reward)


def test_reward_lands_on_the_token_that_closes_the_turn(scripted, layout):
  """Tags split over tokens, searches to the last, then a forced answer."""
  search = (
      b'<think>', b'x', b'</think>', b'<search>', b' q', b'</', b'search',
      b'>\n')
  follows = links(
      (b'?', *search), (b'</information>', *search),
      (b'.', b'<answer>', b' a', b'</answer>'))
  collector, params = scripted_collector(scripted, layout, follows, found())
  trajectory, transcript = play(collector, params)
  # Q ? + 8 + <information> d </information> + 8 + ... . + 3
  wrote = '<think>x</think><search> q</search>\n'
  shown = '<information> d</information>'
  assert [turn.text for turn in transcript.turns] == [
      wrote, wrote, '<answer> a</answer>']
  assert [turn.observation for turn in transcript.turns] == [
      shown, shown + '.', '']
  assert [turn.query for turn in transcript.turns] == ['q', 'q', None]
  assert protocol.format_ok([turn.text for turn in transcript.turns])
  assert transcript.searches == 2
  assert trajectory.turn_ends[0].tolist() == [9, 20, -1]
  tokens = trajectory.tokens[0]
  assert tokens[[9, 20]].tolist() == ids(b'>\n') * 2
  assert trajectory.loss_mask[0].tolist() == (
      [0] * 2 + [1] * 8 + [0] * 3 + [1] * 8 + [0] * 4 + [1] * 3
      + [0] * (len(tokens) - 28))
  # The sampled '</', 'search', '>\n' stayed three tokens, though the text
  # would be encoded as one.
  assert ids(b'</search>')[0] not in tokens.tolist()
  placed = rewards.place(
      [score_of([0.5, -0.25, 0.0], 2.0)] * 2, trajectory.loss_mask,
      trajectory.turn_ends)
  expected = np.zeros(len(tokens))
  expected[[9, 20, 27]] = 0.5, -0.25, 2.0
  np.testing.assert_array_equal(placed[0], expected)


def test_an_invented_information_block_is_the_policy_s_own(scripted, layout):
  """It is trained on, breaks the format, and moves no reward."""
  search = (
      b'<think>', b'<information>', b'invented', b'</information>',
      b'<search>', b' q', b' <', b'/sea', b'rch', b'><sea')
  follows = links(
      (b'?', *search[:6], *search[6:]),
      (b'.', b'<answer>', b' a', b'</answer>'))
  # ' <' leads on to '/sea', 'rch', '><sea': the tag, and something behind it.
  collector, params = scripted_collector(
      scripted, layout, follows, found(), max_turns=1)
  trajectory, transcript = play(collector, params)
  first = transcript.turns[0]
  assert first.text == (
      '<think><information>invented</information><search> q </search><sea')
  # Characters behind the tag: the turn is over, and no search.
  assert (first.query, first.observation) == (None, '!.')
  assert trajectory.turn_ends[0].tolist() == [11, -1]
  assert trajectory.loss_mask[0, 2:12].all()
  assert not protocol.format_ok([turn.text for turn in transcript.turns])
  # The environment's block has the same characters, and other tokens.
  follows = links(
      (b'?', b'<information>', b'invented', b'</information>', b'<search>',
       b' q', b'</search>'),
      (b'.', b'<answer>', b' a', b'</answer>'))
  collector, params = scripted_collector(
      scripted, layout, follows, found(), max_turns=1)
  trajectory, transcript = play(collector, params)
  assert transcript.turns[0].query == 'q'
  assert trajectory.tokens[0, :16].tolist() == [
      8, 1, *ids(b'<information>', b'invented', b'</information>', b'<search>',
                 b' q', b'</search>'),
      2, 4, 3, 7, *ids(b'<answer>', b' a', b'</answer>'), 0]
  assert trajectory.turn_ends[0].tolist() == [7, -1]
  placed = rewards.place(
      [score_of([0.5, 0.0], 2.0)] * 2, trajectory.loss_mask,
      trajectory.turn_ends)
  assert np.flatnonzero(placed[0]).tolist() == [7, 14]
  assert placed[0, [7, 14]].tolist() == [0.5, 2.0]


def test_warnings_empty_queries_and_a_search_on_the_last_turn(scripted, layout):
  def never(queries, k):
    raise AssertionError(f'{queries} ask nothing')

  follows = links(
      (b'?', b'y', b'</search>'),  # a stray tag
      (b'!', b'<search>', b'</search>'),  # an empty query
      (b'.', b'<think>', b'x', b'</think>'))
  follows |= dict(zip(ids(b'</think>'), ids(b'</search>')))
  collector, params = scripted_collector(scripted, layout, follows, never)
  trajectory, transcript = play(collector, params)
  assert transcript.turns == (
      types.Turn('y</search>', None, (), '!'),
      types.Turn('<search></search>', '', (), '<information></information>.'),
      types.Turn('<think>x</think></search>'))
  assert trajectory.turn_ends[0].tolist() == [3, 6, 13]
  assert trajectory.loss_mask[0, :14].tolist() == [
      0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
  # A search on the forced last turn is over, unanswered, and breaks the format.
  follows |= links((b'.', b'<search>', b' q', b'</search>'))
  collector, params = scripted_collector(
      scripted, layout, {**follows, ids(b'<search>')[0]: ids(b' q')[0]},
      found())
  _, transcript = play(collector, params)
  assert transcript.turns[-1] == types.Turn('<search> q</search>')
  assert transcript.turns[-2].query == 'q'
  assert not protocol.format_ok([turn.text for turn in transcript.turns])


def test_long_documents_are_cut_and_the_closing_tag_stays(scripted, layout):
  follows = links(
      (b'?', b'<search>', b' q', b'</search>'),
      (b'.', b'<answer>', b' a', b'</answer>'))
  collector, params = scripted_collector(
      scripted, layout, follows, found('d d d d d d'), max_turns=1)
  trajectory, transcript = play(collector, params)
  turn = transcript.turns[0]
  assert turn.observation == '<information> d d d</information>.'
  # Rewards see what the policy was shown.
  assert turn.documents == (types.Document('7', '', 'd d d'),)
  assert transcript.turns[1].text == '<answer> a</answer>'
  assert trajectory.loss_mask[0, :14].tolist() == [0] * 2 + [1] * 3 + [
      0] * 6 + [1] * 3


def test_end_of_sequence_and_budget_end_a_turn(scripted, layout):
  follows = links((b'?', b'x', b'y'))  # then eos
  collector, params = scripted_collector(scripted, layout, follows, found())
  trajectory, transcript = play(collector, params)
  assert transcript.turns == (types.Turn('xy<eos>'),)
  assert trajectory.loss_mask[0, :6].tolist() == [0, 0, 1, 1, 1, 0]
  follows |= dict(zip(ids(b'y'), ids(b'x')))  # for ever
  follows |= links((b'!', b'x'), (b'.', b'x'))
  collector, params = scripted_collector(
      scripted, layout, follows, found(), response_length=5)
  trajectory, transcript = play(collector, params)
  assert [(t.text, t.observation) for t in transcript.turns] == [
      ('xyxyx', '!'), ('xyxyx', '!.'), ('xyxyx', '')]
  assert (trajectory.turn_ends == -1).all()


def test_other_stop_codes_of_the_sampler_are_the_protocol_s():
  assert (sampler_lib.SEARCH, sampler_lib.ANSWER) == (
      protocol.SEARCH, protocol.ANSWER)


# ── Budgets that cannot work ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(max_turns=0), 'max_turns = 0'),
        (dict(k=0), 'k = 0'),
        (dict(response_length=0), 'response_length = 0'),
        (dict(observation_length=3), 'observation_length = 3'),
        (dict(max_length=39), 'max_length = 39.* = 40'),
        (dict(temperature=0.0), 'temperature = 0.0'),
        (dict(top_p=0.0), 'top_p = 0.0'),
        (dict(top_p=1.1), 'top_p = 1.1'),
        (dict(top_k=-1), 'top_k = -1'),
        (dict(chunk=0), 'chunk = 0'),
        (dict(slots=-1), 'slots = -1'),
        (dict(lag=-1), 'lag = -1'),
    ],
)
def test_impossible_budgets_are_refused(
    model, tokenizer, retriever, layout, change, says):
  config = dataclasses.replace(CONFIG, **change)
  with pytest.raises(ValueError, match=rf'config\.rollout\..*{says}'):
    collect_lib.Collector(
        model, config, tokenizer, SHORT, retriever.search, layout)


def test_a_question_that_does_not_fit_is_refused(collector):
  with pytest.raises(ValueError, match='at least 9'):
    collector.prompt('who ' * 8)
  assert len(collector.prompt('who ' * 7)) == 8


# ── Continuous batching against the plain way ────────────────────────────────


@pytest.mark.parametrize('lag', [0, 1])
def test_turns_are_told_as_they_grow(
    model, tokenizer, retriever, layout, chatty, lag):
  config = dataclasses.replace(CONFIG, slots=2, chunk=2, lag=lag)
  play = collect_lib.Collector(
      model, config, tokenizer, SHORT, retriever.search, layout)
  told = [[] for _ in range(6)]
  trajectory, transcripts = play(
      chatty, examples(6), jax.random.key(4),
      on_turn=lambda number, turn: told[number].append(turn))
  assert any(t.searches for t in transcripts)
  for row, transcript in enumerate(transcripts):
    heard = iter(told[row])
    written = [
        ids for sampled, ids in stretches(
            trajectory.tokens[row], trajectory.loss_mask[row], 0,
            int(trajectory.token_mask[row].sum())) if sampled]
    for turn, ids in zip(transcript.turns, written, strict=True):
      texts = ['']
      while len(texts[-1]) < len(turn.text):
        growing = next(heard)
        assert growing == types.Turn(growing.text)
        assert growing.text.startswith(texts[-1]) and growing.text != texts[-1]
        texts.append(growing.text)
      # At most two tokens a chunk.
      assert len(ids) / 2 <= len(texts) - 1 <= len(ids)
      if turn is not transcript.turns[-1]:
        assert next(heard) == types.Turn(turn.text, turn.query)
        assert next(heard) == turn
    assert not list(heard)


@pytest.mark.parametrize(
    ('slots', 'chunk', 'lag'),
    [(0, 16, 1), (4, 4, 0), (8, 3, 1), (4, 2, 3), (1, 16, 2)])
def test_slots_chunks_and_lags_play_the_same_episodes_as_lockstep(
    model, tokenizer, retriever, layout, chatty, slots, chunk, lag):
  plain = lockstep.Collector(
      model, CONFIG, tokenizer, SHORT, retriever.search, layout)
  arguments = (chatty, examples(16), jax.random.key(4))
  expected, texts = plain(*arguments, first_episode=100)
  config = dataclasses.replace(CONFIG, slots=slots, chunk=chunk, lag=lag)
  collector = collect_lib.Collector(
      model, config, tokenizer, SHORT, retriever.search, layout)
  trajectory, transcripts = collector(*arguments, first_episode=100)
  assert transcripts == texts
  for name in ('tokens', 'token_mask', 'loss_mask', 'turn_ends'):
    np.testing.assert_array_equal(
        getattr(trajectory, name), getattr(expected, name))
  np.testing.assert_allclose(
      trajectory.logprobs, expected.logprobs, atol=1e-5)
  assert 0.2 < collector.metrics['rollout/slot_utilisation'] < 1


def test_nothing_is_compiled_once_all_shapes_are_known(
    model, tokenizer, retriever, layout, chatty):
  config = dataclasses.replace(CONFIG, slots=16, chunk=4)
  collector = collect_lib.Collector(
      model, config, tokenizer, SHORT, retriever.search, layout)
  compiled = []

  def note(event, _, **__):
    compiled.append('backend_compile' in event)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    collector(chatty, examples(32), jax.random.key(0))
    assert any(compiled)
    compiled.clear()
    for seed in (1, 2, 3):
      for greedy in (False, True):
        collector(
            chatty, examples(20 + seed), jax.random.key(seed), greedy=greedy)
    assert not any(compiled)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)], ids=str)
def test_prompts_share_what_they_have_in_common(
    model, tokenizer, retriever, chatty, shape):
  """Copies of the common beginning, and of whole prompts, change nothing."""
  count = math.prod(shape)
  if len(jax.devices()) < count:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  layout = sharding.Layout(
      sharding.make_mesh(shape, jax.devices()[:count]), sharding.DECODE)
  config = dataclasses.replace(
      CONFIG, prompt_length=40, max_length=112, slots=8, chunk=4)
  long = dataclasses.replace(
      SHORT, instruction='the mayor of cuna is ' * 4 + '{question}\n')
  questions = [q for q in QUESTIONS for _ in range(4)]
  asked = examples(16, questions)
  results = []
  for shares in (False, True):
    collector = collect_lib.Collector(
        model, config, tokenizer, long, retriever.search, layout)
    if shares:
      collector.prepare(QUESTIONS)
      assert len(collector._prefix) == 20
    results.append(collector(chatty, asked, jax.random.key(2)))
    saved = collector.metrics['rollout/prefill_tokens_saved']
    if shares:
      # Each prompt but for one token, or what it has of the beginning.
      assert saved >= 20 * 16
      if count == 1:
        assert saved > 20 * 16 + 8 * 2
  (expected, texts), (trajectory, transcripts) = results
  assert transcripts == texts
  np.testing.assert_array_equal(trajectory.tokens, expected.tokens)
  np.testing.assert_allclose(
      trajectory.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize('lag', [0, 1, 3])
def test_a_search_takes_its_time_while_others_decode(
    model, tokenizer, retriever, layout, chatty, lag):
  """The result does not depend on how long it takes."""
  delays = iter([0.05, 0.0, 0.02] * 100)
  active, most = [], []

  def slow(queries, k):
    active.append(1)
    most.append(len(active))
    time.sleep(next(delays))
    found = retriever.search(queries, k)
    active.pop()
    return found

  config = dataclasses.replace(CONFIG, slots=8, chunk=2, lag=lag)
  found = [
      collect_lib.Collector(model, config, tokenizer, SHORT, search, layout)(
          chatty, examples(16), jax.random.key(4))
      for search in (retriever.search, slow)]
  (expected, texts), (trajectory, transcripts) = found
  assert transcripts == texts
  jax.tree.map(np.testing.assert_array_equal, trajectory, expected)  # bitwise
  assert max(most) == 1  # engines need not be thread-safe


def test_an_engine_s_error_and_ctrl_c_end_the_call(
    model, tokenizer, layout, chatty):
  for error in (RuntimeError('index gone'), KeyboardInterrupt()):
    def fails(queries, k, error=error):
      raise error

    for lag in (0, 1):
      collector = collect_lib.Collector(
          model, dataclasses.replace(CONFIG, lag=lag), tokenizer, SHORT, fails,
          layout)
      with pytest.raises(type(error)):
        collector(
            chatty, examples(16), jax.random.key(4), first_episode=100)


@pytest.mark.parametrize('lag', [0, 3])
def test_searches_go_one_by_one_in_order(lag):
  """Several processes that search together have to do it in the same order."""
  done = futures.Future()
  done.set_result([])
  asked, running = [], []

  def search(queries, k):
    running.append(queries)
    time.sleep(0.002 * (len(asked) % 3))
    assert len(running) == 1
    running.clear()
    asked.append((queries, k))
    return [[] for _ in queries]

  play = py_types.SimpleNamespace(
      _c=py_types.SimpleNamespace(_search=search, _last_search=done),
      _config=py_types.SimpleNamespace(lag=lag, k=2), _retrieval=0.0)
  start = lambda queries: collect_lib._Play._start_search(play, queries)
  results = [start([str(i)]) for i in range(20)]
  assert start([]).done()  # waits for nothing
  assert [result.result(5) for result in results] == [[[]]] * 20
  assert asked == [([str(i)], 2) for i in range(20)]
