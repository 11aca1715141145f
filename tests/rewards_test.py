import dataclasses
import json
import math
import pathlib
import string

import numpy as np
import pytest

from stepsearch import protocol
from stepsearch import types
from stepsearch.rl import rewards

SHARED = pathlib.Path(__file__).parents[2] / 'shared'
WORDS = (
    'zorin was born in Vell, the town of a poet; 1984 U.S. co-founder O\'Neil '
    'straße café naïve x y I 東京 an the a ocean film (film) "Saint-" lake'
).split()


def document(text, title='', id=''):
  return types.Document(id, title, text)


def search(query, *documents, thought='hm'):
  return types.Turn(
      protocol.search_turn(thought, query), query, documents, '<information>'
  )


def episode(*turns, answer='Vell'):
  final = types.Turn(protocol.answer_turn('so', answer))
  return types.Transcript('prompt', (*turns, final))


def example(**fields):
  return types.Example(**({'id': '0', 'question': '?', 'answers': ('Vell',)}
                          | fields))


def score_one(example, transcript, embed=None, **config):
  config = rewards.Config(**config)
  return rewards.score([example], [transcript], config, embed)[0]


def sklearn_cosines(text, golds):
  """One document with its golds, by scikit-learn."""
  sklearn = pytest.importorskip('sklearn.feature_extraction.text')
  texts = [rewards.normalize(one) for one in (text, *golds)]
  try:
    x = sklearn.TfidfVectorizer().fit_transform(texts).toarray()
  except ValueError:  # not one term in any text
    return np.zeros(len(golds))
  return x[1:] @ x[0]


# ── Answers ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    'text, normalized',
    [
        ('The  U.S. co-founder,\tO\'Neil', 'us cofounder oneil'),
        ('An apple a day', 'apple day'),
        ('THE.', ''),
        ('theatre', 'theatre'),
        ('the–end', '–end'),  # no ASCII punctuation, but ends a word
        ('', ''),
    ],
)
def test_normalize(text, normalized):
  assert rewards.normalize(text) == normalized


@pytest.mark.parametrize(
    'prediction, answers, f1, exact',
    [
        ('the Vell', ['vell.'], 1, True),
        ('Vell Vell town', ['vell vell'], 2 * 2 / 5, False),
        ('Vell', ['Rome', 'town of Vell', 'Vell city'], 2 / 3, False),
        ('Rome', ['Vell'], 0, False),
        ('', ['The'], 0, False),  # a blank answer never earns anything
        (' ', [''], 0, False),
        ('THE.', ['the'], 0, True),  # no word is left, but the same was said
        (None, ['Vell'], 0, False),
        ('Vell', [], 0, False),
    ],
)
def test_answers(prediction, answers, f1, exact):
  assert rewards.f1(prediction, answers) == pytest.approx(f1)
  assert rewards.exact_match(prediction, answers) is exact


# ── The paper's equations ────────────────────────────────────────────────────

# Every text has its own words, so that cosines are countable: with golds
# 'aa bb' and 'cc dd', N = 3 texts at each fit.
GOLDS = (document('aa bb', id='g1'), document('cc dd', id='g2'))
HALF = document('aa zz', id='h')
# Fit on ['aa zz', 'aa bb', 'cc dd']: 'aa' has df 2 of N = 3, the others df 1.
SHARED_IDF = math.log(4 / 3) + 1
OWN_IDF = math.log(4 / 2) + 1
C_HALF = SHARED_IDF**2 / (SHARED_IDF**2 + OWN_IDF**2)


def worked():
  keys = (('vell town', 'town'), ('poet of vell',))
  question = example(gold_documents=GOLDS, search_keys=keys)
  transcript = episode(
      search('vell', HALF, document('yy xx', id='n')),
      search('poet vell', GOLDS[0], HALF),
      search('river', GOLDS[1], GOLDS[0], HALF),
      answer='the town Vell',
  )
  return question, transcript


def test_three_turns_by_hand():
  question, transcript = worked()
  score = score_one(question, transcript)
  # c: [C_HALF, 0], [1, 0], [1, 1]; n = 2.
  np.testing.assert_allclose(
      score.gains, [C_HALF / 2, (1 - C_HALF) / 2, 1 / 2, 0], atol=1e-12
  )
  # New; one of two seen; two of three seen.
  np.testing.assert_allclose(score.penalties, [0, 1 / 2, 2 / 3, 0])
  np.testing.assert_allclose(
      score.turn_rewards, score.gains - score.penalties
  )
  # 'vell' against 'vell town': 2/3; 'poet vell' against 'poet of vell': 4/5.
  assert score.search_key == pytest.approx((2 / 3 + 4 / 5) / 2)
  assert score.answer_f1 == pytest.approx(2 / 3)
  assert score.format_ok and not score.exact_match
  assert score.global_reward == pytest.approx(2 / 3 + 0.618 * 11 / 15)


@pytest.mark.parametrize(
    'switch, turn, key, answer',
    [
        ({}, 'G - P', 1, 1),
        ({'information_gain': False}, '-P', 1, 1),
        ({'redundancy_penalty': False}, 'G', 1, 1),
        ({'turn_reward': False}, '0', 1, 1),
        ({'search_key': False}, 'G - P', 0, 1),
        ({'answer': False}, 'G - P', 1, 0),
        ({'turn_scale': 3.0}, '3 (G - P)', 1, 1),
        ({'search_key_coef': 2.0}, 'G - P', 2 / 0.618, 1),
    ],
)
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_switches(switch, turn, key, answer, variant):
  question, transcript = worked()
  plain = score_one(question, transcript, variant=variant)
  score = score_one(question, transcript, variant=variant, **switch)
  np.testing.assert_array_equal(score.gains, plain.gains)
  np.testing.assert_array_equal(score.penalties, plain.penalties)
  scale = 1.6 if variant == 'released' else 1.0
  expected = {
      'G - P': score.gains - score.penalties,
      'G': score.gains,
      '-P': -score.penalties,
      '0': 0 * score.gains,
      '3 (G - P)': 3 * (score.gains - score.penalties),
  }[turn]
  np.testing.assert_allclose(score.turn_rewards, scale * expected)
  assert score.global_reward == pytest.approx(
      answer * plain.answer_f1 + key * 0.618 * plain.search_key
  )


def test_wrong_format():
  question, transcript = worked()
  broken = dataclasses.replace(transcript, turns=transcript.turns[:-1])
  for penalty in (0.0, -0.5):
    paper = score_one(question, broken, wrong_format=penalty)
    assert not paper.format_ok
    assert paper.global_reward == penalty + 0.618 * paper.search_key
    np.testing.assert_array_equal(
        paper.turn_rewards, paper.gains - paper.penalties
    )
    released = score_one(
        question, broken, variant='released', wrong_format=penalty
    )
    assert released.global_reward == penalty
    assert not released.turn_rewards.any() and released.gains.any()


def loop(question, transcript):
  """The paper's rewards by the letter, one number at a time."""
  golds = [f'{d.title} {d.text}' for d in question.gold_documents]
  best = [0.0] * len(golds)
  history, turns = set(), []
  for turn in transcript.turns:
    if not turn.query or not turn.documents:
      turns.append(0.0)
      continue
    gain = 0.0
    cosines = [
        sklearn_cosines(f'{d.title} {d.text}', golds) for d in turn.documents
    ]
    for i in range(len(golds)):
      c = max(cosine[i] for cosine in cosines)
      gain += max(c - best[i], 0) / len(golds)
      best[i] = max(best[i], c)
    seen = sum(d.id in history for d in turn.documents)
    history |= {d.id for d in turn.documents}
    turns.append(gain - seen / len(turn.documents))
  key = sum(
      max(
          rewards.f1(turn.query, group)
          for turn in transcript.turns
          if turn.query is not None
      )
      for group in question.search_keys
  ) / len(question.search_keys)
  return turns, key


def random_text(rng, length):
  return ' '.join(rng.choice(WORDS, rng.integers(0, length)))


def random_batch(rng, episodes):
  corpus = [
      document(random_text(rng, 12), random_text(rng, 3), str(i))
      for i in range(25)
  ]

  def pick(n):
    return tuple(corpus[i] for i in rng.choice(25, n, replace=False))

  questions = [
      example(
          gold_documents=pick(rng.integers(1, 5)),
          search_keys=tuple(
              tuple(random_text(rng, 5) for _ in range(rng.integers(1, 4)))
              for _ in range(rng.integers(1, 4))
          ),
      )
      for _ in range(episodes // 3)
  ]
  batch = [questions[rng.integers(len(questions))] for _ in range(episodes)]
  transcripts = [
      episode(*(
          search(random_text(rng, 5), *pick(rng.integers(0, 4)))
          for _ in range(rng.integers(1, 6))
      ))
      for _ in range(episodes)
  ]  # fmt: skip
  return batch, transcripts


def test_batch_equals_a_plain_loop():
  batch, transcripts = random_batch(np.random.default_rng(0), 60)
  scores = rewards.score(batch, transcripts, rewards.Config())
  for question, transcript, score in zip(batch, transcripts, scores):
    turns, key = loop(question, transcript)
    np.testing.assert_allclose(score.turn_rewards, turns, atol=1e-9)
    assert score.search_key == pytest.approx(key)
    assert score.global_reward == pytest.approx(1 + 0.618 * key)


def test_an_episode_does_not_depend_on_its_batch():
  batch, transcripts = random_batch(np.random.default_rng(1), 20)
  config = rewards.Config(variant='released')
  for pair, score in zip(
      zip(batch, transcripts), rewards.score(batch, transcripts, config)
  ):
    alone = rewards.score(*([one] for one in pair), config)[0]
    np.testing.assert_allclose(
        score.turn_rewards, alone.turn_rewards, atol=1e-12
    )
    assert score.global_reward == alone.global_reward


@pytest.mark.parametrize('seed', range(5))
def test_tfidf_equals_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  pairs = [
      (
          [random_text(rng, 30) for _ in range(rng.integers(0, 5))],
          [random_text(rng, 30) for _ in range(rng.integers(0, 6))],
      )
      for _ in range(8)
  ]
  pairs += [
      (['a 1 the', ''], ['', 'x']),  # not one term
      (['ab\x00cd', 'ab\x1fcd\x7fef'], ['ab cd', 'abcd', 'e\x00f \u212aelvin']),
      (['kelvin an\x00the x_y', 'naïve\x00an'], ['Kelvin', 'the-end xy naïve']),
  ]
  for (golds, documents), found in zip(pairs, rewards._tfidf(pairs)):
    assert found.shape == (len(documents), len(golds))
    for text, row in zip(documents, found):
      if golds:
        np.testing.assert_allclose(
            row, sklearn_cosines(text, golds), atol=1e-12
        )


def test_retriever_similarity():
  question, transcript = worked()
  rng = np.random.default_rng(0)
  vectors = {}
  calls = []

  def embed(texts):
    calls.append(texts)
    assert len(set(texts)) == len(texts)
    for text in texts:
      vector = rng.normal(size=8)
      vectors[text] = vector / np.linalg.norm(vector)
    return np.stack([vectors[text] for text in texts]).astype(np.float32)

  score = rewards.score(
      [question] * 2, [transcript] * 2,
      rewards.Config(similarity='retriever'), embed,
  )[1]  # fmt: skip
  assert len(calls) == 1
  best = np.zeros(2)
  for turn, gain in zip(transcript.turns, score.gains):
    old = best
    for shown in turn.documents:
      c = [vectors[f'\n{g.text}'] @ vectors[f'\n{shown.text}'] for g in GOLDS]
      best = np.maximum(best, c)
    assert gain == pytest.approx((best - old).mean(), abs=1e-6)
  assert np.isfinite(score.gains).all() and (score.gains >= 0).all()


def test_turns_that_earn_nothing():
  question = example(gold_documents=GOLDS)
  seen = search('vell', GOLDS[0])
  score = score_one(question, episode(
      search('', GOLDS[0]), search('  ', GOLDS[0]), search('vell'),
      types.Turn('malformed', None, (GOLDS[0],)), seen, seen,
  ))  # fmt: skip
  np.testing.assert_allclose(score.turn_rewards, [0, 0, 0, 0, 0.5, -1, 0])


def test_repetition_is_told_by_id_or_else_by_title_and_text():
  question = example(gold_documents=GOLDS)

  def twice(a, b):
    transcript = episode(search('q', a), search('q', b))
    return score_one(question, transcript).penalties[1]

  assert twice(document('x', id='1'), document('x y', id='1')) == 1
  assert twice(document('x', id='1'), document('x', id='2')) == 0
  assert twice(document('x', 't'), document('x', 't')) == 1
  assert twice(document('x', 't'), document('x', 'u')) == 0
  # Inside one turn the paper has no penalty.
  same = search('q', document('x'), document('x'))
  assert not score_one(question, episode(same)).penalties.any()


def test_without_golds_or_keys():
  score = score_one(
      example(), episode(search('vell', HALF), search('vell', HALF))
  )
  np.testing.assert_array_equal(score.gains, 0)
  np.testing.assert_array_equal(score.turn_rewards, [0, -1, 0])
  assert score.global_reward == 1 and score.search_key == 0
  empty = example(search_keys=((), ('vell',)))
  assert score_one(empty, episode(search('vell'))).search_key == 0.5
  assert rewards.score([], [], rewards.Config()) == []


# ── The released code ────────────────────────────────────────────────────────


def test_released_values_of_the_oracle():
  path = SHARED / 'oracles' / 'released_rewards.json'
  if not path.exists():
    pytest.skip(f'{path.name} is not at hand')
  rows = json.loads(path.read_text())
  names = {'search_key_reward': 'search_key'}
  for row in rows:
    golds = tuple(document(**d) for d in row['gold_documents'])
    question = example(
        answers=tuple(row['gold_answers']), gold_documents=golds,
        search_keys=tuple(map(tuple, row['search_keys'])),
    )  # fmt: skip
    # As training sees it: turns apart, the policy's words apart.
    words = protocol.split_transcript(row['transcript'])
    words += [''] * (len(row['turns']) + 1 - len(words))
    turns = [
        types.Turn(own, turn['query'], tuple(document(**d)
                                             for d in turn['docs']))
        for own, turn in zip(words, row['turns'])
    ]
    transcript = types.Transcript('', (*turns, types.Turn(words[-1])))
    flags = {names.get(k, k): v for k, v in row['flags'].items()}
    score = score_one(
        question, transcript, variant='released', wrong_format=-1.0, **flags
    )
    expected = row['expected']
    assert score.global_reward == pytest.approx(expected['score'], abs=1e-4)
    assert score.answer_f1 == pytest.approx(expected['answer_f1'], abs=1e-4)
    if expected['score'] == -1:
      assert not score.format_ok and not score.turn_rewards.any()
      continue
    assert score.format_ok
    assert score.search_key == pytest.approx(
        expected['search_key_score'], abs=1e-4
    )
    np.testing.assert_allclose(
        score.turn_rewards, [*np.multiply(1.6, expected['turn_scores']), 0],
        atol=1e-4,
    )  # fmt: skip


def test_released_keys_are_overwritten():
  question = example(search_keys=(('vell town',), ('poet ode',)))

  def value(*queries):
    transcript = episode(*map(search, queries))
    return score_one(question, transcript, variant='released').search_key

  assert value('vell town') == 0.5
  assert value('vell town', 'vell') == pytest.approx(0.6667 / 2)  # lowered
  assert value('vell town', 'nothing') == 0.5
  assert value('poet town') == 0.25
  assert value('poet town', 'vell town') == 0.5  # of equals, the first was hit


def test_released_repetition_is_missed_at_another_rank():
  question = example(gold_documents=GOLDS)
  a, b = document('aa', 'one'), document('bb', 'one')

  def penalties(*turns):
    score = score_one(question, episode(*turns), variant='released')
    return score.penalties.tolist()

  assert penalties(search('q', a, b), search('q', a, b)) == [0, 1, 0]
  assert penalties(search('q', a, b), search('q', b, a)) == [0, 0, 0]
  # Titles are not compared.
  other = dataclasses.replace(a, title='two')
  assert penalties(search('q', a), search('q', other)) == [0, 1, 0]


# ── Malformed output is a reward ─────────────────────────────────────────────

ZOO = [
    '',
    ' \n',
    'no tag at all',
    '<answer>Vell',
    'Vell</answer>',
    '</answer><answer>',
    '<answer></answer>',
    '<answer>Vell</answer> and more',
    '<answer>Vell</answer><answer>Vell</answer>',
    '<answer><answer>Vell</answer></answer>',
    '<answer>Vell<search>q</answer>',
    '<search>q</search><answer>Vell</answer>',
    '<information>Vell</information><answer>Vell</answer>',
    '<think><answer>Vell</answer></think>',
    '<ANSWER>Vell</ANSWER>',
    '<answer>\x00\ud800\u202e</answer>',
    '<think>' * 2000,
    '<answer>' * 2000 + '</answer>' * 2000,
]


@pytest.mark.parametrize('variant', ['paper', 'released'])
@pytest.mark.parametrize('similarity', ['tfidf', 'retriever'])
def test_malformed_output_never_raises(variant, similarity):
  question, _ = worked()
  transcripts = [types.Transcript('', ())]
  for text in ZOO:
    for query in (None, '', '\ud800 <search> \x00', 'the'):
      odd = types.Turn(text, query, (document(''), document(text)))
      transcripts.append(types.Transcript('', (odd, types.Turn(text))))
      transcripts.append(types.Transcript('', (types.Turn(text), odd)))
  scores = rewards.score(
      [question] * len(transcripts), transcripts,
      rewards.Config(variant, -1.0, similarity=similarity),
      lambda texts: np.full((len(texts), 4), 0.5),
  )  # fmt: skip
  for transcript, score in zip(transcripts, scores):
    assert len(score.turn_rewards) == len(transcript.turns)
    assert np.isfinite([score.global_reward, *score.turn_rewards]).all()
    if variant == 'paper':
      assert not score.format_ok and score.global_reward == -1


def test_invented_text_is_not_believed():
  invented = (
      '<think>x</think><search>vell</search>'
      '<information>aa bb cc dd</information><answer>Vell</answer>'
  )
  turns = (search('q', HALF), types.Turn(invented))
  question = example(gold_documents=GOLDS, search_keys=(('vell',),))
  score = score_one(question, types.Transcript('', turns))
  assert not score.format_ok and score.search_key == 0 and score.gains[1] == 0
  # What was retrieved cannot answer, nor can the prompt.
  shown = dataclasses.replace(
      search('q', HALF), observation='<answer>Vell</answer>'
  )
  for variant in ('paper', 'released'):
    transcript = types.Transcript('<answer>Vell</answer>', (shown,))
    assert score_one(question, transcript, variant=variant).answer_f1 == 0


# ── Placement ────────────────────────────────────────────────────────────────


def made(turn_rewards, global_reward):
  zeros = np.zeros(len(turn_rewards))
  return rewards.Score(
      0, False, True, 0, zeros, zeros, np.array(turn_rewards, float),
      global_reward,
  )  # fmt: skip


def test_place():
  mask = np.array([
      [0, 1, 1, 0, 0, 1, 1, 0],
      [0, 1, 1, 0, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0, 0],
      [0, 1, 1, 0, 0, 0, 0, 0],
  ], np.float32)  # fmt: skip
  ends = np.array([[2, -1, -1], [2, -1, 4], [-1, -1, -1], [2, -1, -1]])
  scores = [
      made([0.5, 0], 2), made([0.25, 7, -1], 1), made([], 3), made([0.5], 1)
  ]  # fmt: skip
  placed = rewards.place(scores, mask, ends)
  assert placed.dtype == np.float32
  np.testing.assert_array_equal(placed, [
      [0, 0, 0.5, 0, 0, 0, 2, 0],
      [0, 0, 0.25, 0, 0, 0, 0, 0],  # the last turn's and the global cancel
      [0, 0, 0, 0, 0, 0, 0, 0],
      [0, 0, 1.5, 0, 0, 0, 0, 0],
  ])  # fmt: skip


def test_place_refuses_what_does_not_belong_together():
  mask, ends = np.ones((1, 3)), np.array([[1]])
  with pytest.raises(ValueError, match='2 turns, but turn_ends has room for 1'):
    rewards.place([made([1, 1], 1)], mask, ends)
  with pytest.raises(ValueError, match='2 scores'):
    rewards.place([made([1], 1)] * 2, mask, ends)


# ── Bad calls ────────────────────────────────────────────────────────────────


def test_errors():
  with pytest.raises(ValueError, match="config.reward.variant is 'papr'"):
    rewards.Config(variant='papr')
  with pytest.raises(ValueError, match='config.reward.similarity'):
    rewards.Config(similarity='bm25')
  with pytest.raises(ValueError, match='embed'):
    score_one(*worked(), similarity='retriever')
  with pytest.raises(ValueError, match='1 examples and 0 transcripts'):
    rewards.score([example()], [], rewards.Config())


def test_words_used_in_tests_are_hard_ones():
  text = ' '.join(WORDS)
  assert set(string.punctuation) & set(text) and not text.isascii()
