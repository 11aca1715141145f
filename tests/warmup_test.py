import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch import protocol
from stepsearch import warmup

SHORT = protocol.Protocol.short()
CONFIG = warmup.Config(
    steps=8, batch_size=4, learning_rate=2e-2, ramp=0.1)


def demonstration(query, answer, last=False):
  text = protocol.search_turn(' born', f' {query}')
  text += SHORT.information([f' {query} is born in {answer}'])
  text += SHORT.last_turn if last else ''
  return text + protocol.answer_turn(' answer', f' {answer}')


NAMES = ('alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi')
ROWS = [
    (f'who is born in {a} ?', demonstration(a, b, last=i % 2 == 0))
    for i, (a, b) in enumerate(zip(NAMES, NAMES[1:]))]


@pytest.fixture(scope='module')
def demonstrations(tokenizer):
  return warmup.tokenize(ROWS, tokenizer, SHORT, 64)


def test_what_the_environment_wrote_is_masked(demonstrations, tokenizer):
  unknown = tokenizer.byte_strings.index(b'<unk>')
  for row, (question, text) in enumerate(ROWS):
    length = demonstrations.length[row]
    tokens = demonstrations.tokens[row]
    mask = demonstrations.mask[row]
    prompt = tokenizer.prompt(question, SHORT.instruction)
    assert tokens[:len(prompt)].tolist() == prompt
    assert tokenizer.decode(tokens[len(prompt):length]) == text
    assert unknown not in tokens[:length]
    assert not mask[:len(prompt)].any() and not mask[length:].any()
    assert (tokens[length:] == 0).all()
    # The searcher's words and nothing else, by cutting out what is known.
    first, rest = text.split('<information>')
    second = rest.split('</information>')[1].removeprefix(SHORT.last_turn)
    assert tokenizer.decode(tokens[mask > 0]) == first + second


def test_rows_that_cannot_teach_are_refused(tokenizer):
  tokenize = lambda rows, size=64: warmup.tokenize(
      rows, tokenizer, SHORT, size)
  with pytest.raises(ValueError, match='no demonstrations'):
    tokenize([])
  with pytest.raises(ValueError, match=r"demonstration 1 \('who \?'\) breaks"):
    tokenize([ROWS[0], ('who ?', '<answer> alba</answer>')])
  with pytest.raises(ValueError, match='demonstration 0 .* has 28 tokens'):
    tokenize(ROWS, 20)


def run(
    params, demonstrations, model, layout, config=CONFIG, seed=0, **options):
  losses = []
  found = warmup.train(
      jax.tree.map(jnp.copy, params), demonstrations, model, config, layout,
      seed,
      on_step=lambda step, row: losses.append((step, row['warmup/loss'])),
      **options)
  assert [step for step, _ in losses] == list(range(1, config.steps + 1))
  return jax.tree.map(np.asarray, found), [loss for _, loss in losses]


def test_it_learns_and_is_deterministic(
    demonstrations, model, params, layout, recomputed):
  new, losses = run(params, demonstrations, model, layout)
  assert losses[-1] < 0.7 * losses[0]
  again, same = run(params, demonstrations, model, layout)
  assert same == losses
  jax.tree.map(np.testing.assert_array_equal, new, again)
  _, other = run(params, demonstrations, model, layout, seed=1)
  assert other[0] != losses[0]

  # The first loss is the mean over the searcher's words of the first rows.
  rows = warmup._rows(0, demonstrations.length, CONFIG.batch_size, 0)
  total = []
  for row in rows:
    tokens = demonstrations.tokens[row]
    logprobs = recomputed(model, params, tokens)
    total += [
        -logprobs[t, tokens[t]] for t in np.flatnonzero(
            demonstrations.mask[row])]
  np.testing.assert_allclose(losses[0], np.mean(total), rtol=1e-4)


def test_masked_tokens_teach_nothing(demonstrations, model, params, layout):
  """With nothing to learn from, no parameter moves."""
  config = dataclasses.replace(CONFIG, steps=2)
  silent = dataclasses.replace(
      demonstrations, mask=np.zeros_like(demonstrations.mask))
  new, losses = run(params, silent, model, layout, config)
  assert losses == [0.0, 0.0]
  jax.tree.map(np.testing.assert_array_equal, new, params)


def test_tokens_may_be_renamed(demonstrations, model, params, layout):
  seen = []

  def augment(tokens, rng):
    seen.append(rng.integers(1 << 30))
    return np.where(tokens == 13, 14, tokens)

  config = dataclasses.replace(CONFIG, steps=2)
  renamed = dataclasses.replace(
      demonstrations,
      tokens=np.where(demonstrations.tokens == 13, 14, demonstrations.tokens))
  assert (renamed.tokens != demonstrations.tokens).any()
  new, losses = run(
      params, demonstrations, model, layout, config, augment=augment)
  expected, same = run(params, renamed, model, layout, config)
  assert losses == same and len(set(seen)) == 2
  jax.tree.map(np.testing.assert_array_equal, new, expected)


def test_a_loss_that_is_not_finite_stops(demonstrations, model, params, layout):
  broken = params | {'lm_head': params['lm_head'] * np.nan}
  with pytest.raises(FloatingPointError, match='at update 1'):
    run(broken, demonstrations, model, layout)


def test_every_row_comes_once_an_epoch():
  lengths = np.random.default_rng(0).integers(5, 50, 64)
  batches = [warmup._rows(step, lengths, 4, 0) for step in range(32)]
  for epoch in range(2):
    rows = np.concatenate(batches[16 * epoch:16 * (epoch + 1)])
    assert sorted(rows) == list(range(64))
  # An epoch may end inside a group of updates.
  rows = np.concatenate(
      [warmup._rows(step, lengths[:48], 4, 0) for step in range(24)])
  assert (np.bincount(rows, minlength=48) == 2).all()
  spread = lambda rows: lengths[rows].max() - lengths[rows].min()
  random = [spread(np.arange(i, i + 4)) for i in range(0, 64, 4)]
  assert np.mean([spread(b) for b in batches]) < 0.5 * np.mean(random)
