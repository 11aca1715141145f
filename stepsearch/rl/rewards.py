"""Rewards of one episode, from its text to the tokens they land on.

    Example + Transcript ── score ──▶ Score ── place ──▶ rewards [B, T] float32

Every episode earns one global reward, on its last sampled token, and one turn
reward per search, on the token that completed the search. With q_t the query of
turn t, k_ij reference query j of sub-question i (of M), d_i gold document i (of
n) and I^t the k documents shown in turn t, arXiv 2505.15107 rewards (there,
search_key_coef is gamma_key):

    F1(x, y) = 2 IN / (PN + RN)          words in common, in x and in y
    r_answer = max over aliases F1 if the format is correct, else wrong_format
    r_key    = 1/M sum_i max_j max_t F1(q_t, k_ij)
    r_global = r_answer + search_key_coef r_key
    c_i^t    = max over d in I^t of cos(d_i, d)
    G^t      = 1/n sum_i max(c_i^t - m_i^{t-1}, 0)
    m_i^t    = max(m_i^{t-1}, c_i^t)
    P^t      = 1/k |I^t in H^{t-1}|
    H^t      = H^{t-1} + I^t
    r_turn^t = G^t - P^t

Text is compared after SQuAD normalisation. What the policy wrote is never an
error: it is a reward. `variant = 'released'` reproduces the values of the
paper's released code instead, which differ:

    wrong format  costs `wrong_format` (-1 there) and drops all other rewards;
                  the format is right if the last answer pair closes the text
    F1            is rounded to 4 decimals
    r_key         a query counts for its best sub-question only, whose earlier
                  value it overwrites, also with a smaller one (not with 0)
    documents     are compared without their title and with the 'Doc n' that
                  announces the next one; a repetition is told by that string,
                  so that the same document at another rank is missed
    r_turn        counts 1.6 times: 0.6 was meant, but the plain value, written
                  into the same row before, was counted as well
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
import itertools
import re
import string
from typing import Literal

import numpy as np

from stepsearch import protocol
from stepsearch import types
from stepsearch.words import PUNCTUATION
from stepsearch.words import normalize

RELEASED_TURN_SCALE = 1.6

# With what else separates ASCII words as spaces.
_SEPARATED = PUNCTUATION | {
    i: ' ' for i in range(128) if not chr(i).isalnum() and i not in PUNCTUATION
}
_NO_TERMS = frozenset(('an', 'the', *string.ascii_lowercase, *string.digits))
_TERM = re.compile(r'\w\w+')


@dataclasses.dataclass(frozen=True)
class Config:
  """What is rewarded, and how much; the leaves of `config.reward`.

  A switch that is off removes its term from the rewards, not from what is
  measured. `answer = False` removes the F1 but leaves `wrong_format`, so that
  the arms of a comparison pay the same for a broken format.
  """

  variant: Literal['paper', 'released'] = 'paper'
  wrong_format: float = 0.0  # r_answer of a broken format; the released is -1
  search_key_coef: float = 0.618
  turn_scale: float = 1.0  # times r_turn; the released variant's 1.6 on top
  similarity: Literal['tfidf', 'retriever'] = 'tfidf'
  answer: bool = True
  search_key: bool = True
  information_gain: bool = True
  redundancy_penalty: bool = True
  turn_reward: bool = True  # off: neither gain nor penalty

  def __post_init__(self):
    for name, choices in (
        ('variant', ('paper', 'released')),
        ('similarity', ('tfidf', 'retriever')),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
            f'config.reward.{name} is {getattr(self, name)!r} and must be '
            f'{choices[0]!r} or {choices[1]!r}.'
        )

  @property
  def turn_factor(self) -> float:
    """What G - P is multiplied by."""
    released = RELEASED_TURN_SCALE if self.variant == 'released' else 1.0
    return self.turn_scale * released


@dataclasses.dataclass(frozen=True)
class Score:
  """One episode, measured and rewarded.

  The first six are measured whatever the switches and the format. R is the
  number of turns of the transcript; a turn that was shown no documents, or
  that asked an empty query, has 0 in all three arrays.
  """

  answer_f1: float  # max over aliases
  exact_match: bool  # with any alias
  format_ok: bool  # by the rules of the variant
  search_key: float  # r_key, not yet times its coefficient
  gains: np.ndarray  # [R] float64: G
  penalties: np.ndarray  # [R] float64: P
  turn_rewards: np.ndarray  # [R] float64: scaled, 0 where switched off
  global_reward: float  # for the last sampled token


# ── Answers ──────────────────────────────────────────────────────────────────


def exact_match(prediction: str | None, answers: Iterable[str]) -> bool:
  """Whether the prediction equals an answer once both are normalised.

  A blank prediction, or None, matches nothing, not even an answer that
  normalises to ''; 'The' does match 'the'.
  """
  if prediction is None or not prediction.strip():
    return False
  prediction = normalize(prediction)
  return any(prediction == normalize(answer) for answer in answers)


def f1(prediction: str | None, answers: Iterable[str]) -> float:
  """Largest word-level F1 of the prediction with any answer, in [0, 1].

  0 where no word is left in common, also between two texts that normalise to
  ''. None is no prediction.
  """
  if prediction is None:
    return 0.0
  words = _words(prediction)
  return max((_f1(words, _words(answer)) for answer in answers), default=0.0)


def _words(text: str) -> Counter[str]:
  return Counter(normalize(text).split())


def _f1(x: Counter[str], y: Counter[str]) -> float:
  common = sum(min(n, y[word]) for word, n in x.items() if word in y)
  return 2 * common / (x.total() + y.total()) if common else 0.0


# ── Episodes ─────────────────────────────────────────────────────────────────


def score(
    examples: Sequence[types.Example],
    transcripts: Sequence[types.Transcript],
    config: Config,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    k: int = 0,
) -> list[Score]:
  """Scores a batch of episodes against their questions.

  Only the policy's own words, its parsed queries and the documents that it was
  shown are read, never the transcript's text as a whole.

  Args:
    examples: the question of each episode; repeat one for several episodes of
      it. Without gold documents or search keys, G or r_key is 0.
    transcripts: the episodes, in the same order.
    config: variant, similarity, scales and switches.
    embed: texts -> [n, d] rows of unit length; for similarity = 'retriever'
      only, called at most once.
    k: documents that a search asks for, the k of P; 0 takes those shown, as
      the released variant always does.

  Returns:
    One score per episode.

  Raises:
    ValueError: as many transcripts as examples are not given, or the
      similarity needs an `embed` and there is none.
  """
  if len(examples) != len(transcripts):
    raise ValueError(
        f'rewards.score got {len(examples)} examples and {len(transcripts)} '
        'transcripts: every episode needs its question.'
    )
  if config.similarity == 'retriever' and embed is None:
    raise ValueError(
        "config.reward.similarity is 'retriever', but rewards.score was given "
        "no `embed`: pass the retriever's passage embedder, or use 'tfidf'."
    )
  similar = _similarities(examples, transcripts, config, embed)
  words = _Memo(_words)
  return [
      _score(example, transcript, config, words, found, k)
      for example, transcript, found in zip(examples, transcripts, similar)
  ]


def place(
    scores: Sequence[Score], loss_mask: np.ndarray, turn_ends: np.ndarray
) -> np.ndarray:
  """Puts each reward on the token that earned it.

  Args:
    scores: of the B episodes.
    loss_mask: [B, T], 1 on the tokens that the policy sampled.
    turn_ends: [B, R] int, the token that completed the search of each turn, or
      -1 for a turn without one, whose turn reward is dropped.

  Returns:
    rewards: [B, T] float32. The global reward is added on the last sampled
    token of its row; a row without sampled tokens gets none.

  Raises:
    ValueError: the numbers of episodes differ, or one has more than R turns.
  """
  mask = np.asarray(loss_mask) > 0
  ends = np.asarray(turn_ends)
  if not len(scores) == len(mask) == len(ends):
    raise ValueError(
        f'rewards.place got {len(scores)} scores, a loss_mask of {len(mask)} '
        f'rows and turn_ends of {len(ends)}: all must be of the same episodes.'
    )
  rewards = np.zeros(mask.shape, np.float32)
  for row, (one, end) in enumerate(zip(scores, ends)):
    turns = len(one.turn_rewards)
    if turns > len(end):
      raise ValueError(
          f'rewards.place: episode {row} has {turns} turns, but turn_ends has '
          f'room for {len(end)}.'
      )
    searched = np.flatnonzero(end[:turns] >= 0)
    rewards[row, end[searched]] = one.turn_rewards[searched]
    sampled = np.flatnonzero(mask[row])
    if len(sampled):
      rewards[row, sampled[-1]] += one.global_reward
  return rewards


class _Memo(dict):
  """text -> function(text), each computed once."""

  def __init__(self, function):
    super().__init__()
    self._function = function

  def __missing__(self, text):
    value = self[text] = self._function(text)
    return value


def _score(
    example: types.Example,
    transcript: types.Transcript,
    config: Config,
    words: _Memo,
    similar: np.ndarray,
    k: int,
) -> Score:
  """One episode; `similar` [R, n] is from `_similarities`."""
  released = config.variant == 'released'
  texts = [turn.text for turn in transcript.turns]
  if released:
    prediction = protocol.released_answer(''.join(texts))
    format_ok = protocol.released_format_ok(''.join(texts))
  else:
    prediction = protocol.answer(texts[-1]) if texts else None
    format_ok = protocol.format_ok(texts)
  answer_f1 = f1(prediction, example.answers)
  if released:
    answer_f1 = round(answer_f1, 4)

  queries = [words[t.query] for t in transcript.turns if t.query]
  keys = [[words[key] for key in group] for group in example.search_keys]
  search_key = (_released_key if released else _paper_key)(queries, keys)
  gains, penalties = _turns(transcript, released, similar, k)

  kept = format_ok or not released
  turn_rewards = np.zeros_like(gains)
  if config.turn_reward and kept:
    turn_rewards = config.turn_factor * (
        config.information_gain * gains - config.redundancy_penalty * penalties
    )
  global_reward = config.wrong_format
  if format_ok:
    global_reward = config.answer * answer_f1
  if config.search_key and kept:
    global_reward += config.search_key_coef * search_key
  return Score(
      answer_f1=answer_f1,
      exact_match=exact_match(prediction, example.answers),
      format_ok=format_ok,
      search_key=search_key,
      gains=gains,
      penalties=penalties,
      turn_rewards=turn_rewards,
      global_reward=global_reward,
  )


def _paper_key(
    queries: list[Counter[str]], keys: list[list[Counter[str]]]
) -> float:
  """r_key of [T] queries against [M][N_i] reference queries."""
  best = [
      max((_f1(query, key) for key in group for query in queries), default=0.0)
      for group in keys
  ]
  return sum(best) / len(best) if best else 0.0


def _released_key(
    queries: list[Counter[str]], keys: list[list[Counter[str]]]
) -> float:
  """r_key as the released code has it: the last query to hit i decides."""
  stored = [0.0] * len(keys)
  for query in queries:
    values = [
        max((round(_f1(query, key), 4) for key in group), default=0.0)
        for group in keys
    ]
    best = max(values, default=0.0)
    if best:
      stored[values.index(best)] = best
  return sum(stored) / len(stored) if stored else 0.0


def _turns(
    transcript: types.Transcript, released: bool, similar: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """G and P [R]; `similar` is c [R, n]."""
  turns, golds = similar.shape
  gains, penalties = np.zeros(turns), np.zeros(turns)
  if golds and turns:
    best = np.maximum.accumulate(similar).mean(axis=1)
    gains[0], gains[1:] = best[0], best[1:] - best[:-1]
  history: set[Hashable] = set()  # H
  for t, turn in enumerate(transcript.turns):
    if not _earns(turn):
      continue
    if released:
      shown = _texts(turn.documents, released)
    else:  # stored rows have no ids, and a cut document keeps its own
      shown = [d.id or (d.title, d.text) for d in turn.documents]
    repeated = sum(document in history for document in shown)
    penalties[t] = repeated / (len(shown) if released or not k else k)
    history.update(shown)
  return gains, penalties


def _earns(turn: types.Turn) -> bool:
  """Whether a turn asked something and was shown documents."""
  return bool(turn.documents and turn.query and turn.query.strip())


# ── Similarities ─────────────────────────────────────────────────────────────


def _texts(documents: Sequence[types.Document], released: bool) -> list[str]:
  """The documents of a turn as they are compared."""
  if not released:  # as the retriever embeds them
    return [f'{d.title}\n{d.text}' for d in documents]
  last = len(documents) - 1
  return [
      f'{d.text}\nDoc {i + 2}' if i < last else d.text
      for i, d in enumerate(documents)
  ]


def _similarities(
    examples: Sequence[types.Example],
    transcripts: Sequence[types.Transcript],
    config: Config,
    embed: Callable[[list[str]], np.ndarray] | None,
) -> list[np.ndarray]:
  """Similarity of each turn's documents to the golds.

  Args:
    examples: as in `score`.
    transcripts: as in `score`.
    config: as in `score`.
    embed: as in `score`.

  Returns:
    Per episode c [R, n], at least 0, and 0 for a turn that earns nothing. The
    cosine of a distinct text with a gold set is computed once.
  """
  released = config.variant == 'released'
  rows: dict[tuple[types.Document, ...], dict[str, int]] = {}
  where = []  # per episode, (turn, rows of its documents among those above)
  for example, transcript in zip(examples, transcripts):
    row_of = rows.setdefault(example.gold_documents, {})
    where.append([
        (
            t,
            [
                row_of.setdefault(text, len(row_of))
                for text in _texts(turn.documents, released)
            ],
        )
        for t, turn in enumerate(transcript.turns)
        if _earns(turn)
    ])
  pairs = [
      (
          [d.text if released else f'{d.title}\n{d.text}' for d in golds],
          list(row_of),
      )
      for golds, row_of in rows.items()
  ]
  if config.similarity == 'retriever':
    found = _dense(pairs, embed)
  else:
    found = _tfidf(pairs)
  cosines = dict(zip(rows, found))
  similar = []
  for example, transcript, turns in zip(examples, transcripts, where):
    golds = example.gold_documents
    c = np.zeros((len(transcript.turns), len(golds)))
    for t, shown in turns:
      np.maximum.reduce(cosines[golds][shown], out=c[t], initial=0.0)
    similar.append(c)
  return similar


def _dense(
    pairs: list[tuple[list[str], list[str]]],
    embed: Callable[[list[str]], np.ndarray],
) -> list[np.ndarray]:
  """Cosines [documents, golds] of each pair, by one call of `embed`."""
  row_of: dict[str, int] = {}
  for golds, documents in pairs:
    if golds and documents:
      for text in (*golds, *documents):
        row_of.setdefault(text, len(row_of))
  vectors = np.asarray(embed(list(row_of)), np.float64) if row_of else None
  return [
      vectors[[row_of[text] for text in documents]]
      @ vectors[[row_of[text] for text in golds]].T
      if golds and documents
      else np.zeros((len(documents), len(golds)))
      for golds, documents in pairs
  ]


def _tfidf(pairs: list[tuple[list[str], list[str]]]) -> list[np.ndarray]:
  """TF-IDF cosines [documents, golds], fitted on each document and its golds.

  The same as scikit-learn's `TfidfVectorizer()` fitted on [document, *golds]
  for every document: terms of two letters and more, idf = ln((1 + N) / (1 +
  df)) + 1 over the N = 1 + n texts. A document changes the df of its own terms
  only, by one. So golds are weighed once, and a document corrects their norms.

  All pairs are computed at once, over sparse entries. Each gold set has a
  column for each of its terms, and before them one for all other terms.
  """
  terms = _Memo(_terms)
  width = max((len(golds) for golds, _ in pairs), default=0)
  if not width:
    return [np.zeros((len(documents), 0)) for _, documents in pairs]
  gold_entries, entries = _Entries(), _Entries()
  golds_of = []  # [columns] n of the set that a column belongs to
  set_of = []  # [documents]
  starts = []  # [sets] first column
  for number, (golds, documents) in enumerate(pairs):
    other = len(golds_of)
    column_of: dict[str, int] = {}
    for i, text in enumerate(golds):
      for term in terms[text]:
        column_of.setdefault(term, other + 1 + len(column_of))
      gold_entries.add(i, terms[text], column_of, other)
    for text in documents:
      entries.add(len(set_of), terms[text], column_of, other)
      set_of.append(number)
    golds_of += [len(golds)] * (1 + len(column_of))
    starts.append(other)

  tf = np.zeros((width, len(golds_of)))
  row, column, count = gold_entries.arrays()
  tf[row, column] = count
  n, df = np.array(golds_of), np.count_nonzero(tf, axis=0)
  absent = (np.log((2 + n) / (1 + df)) + 1) ** 2  # idf^2 by column, if the
  present = (np.log((2 + n) / (2 + df)) + 1) ** 2  # document has not, has it
  squares = tf**2
  gold_norm = np.add.reduceat(squares * absent, starts, axis=1)
  change = squares * (present - absent)
  weighed = tf * present

  row, column, count = entries.arrays()

  def total(values):
    return np.bincount(row, values, minlength=len(set_of))

  norm = total(count**2 * present[column])
  cosines = np.empty((len(set_of), width))
  for i in range(width):
    dot = total(count * weighed[i, column])
    both = norm * (gold_norm[i, set_of] + total(change[i, column]))
    # Texts without a term have norm 0, and are similar to nothing.
    cosines[:, i] = dot / np.sqrt(np.maximum(both, 1e-300))
  ends = np.cumsum([len(documents) for _, documents in pairs])
  return [
      part[:, :len(golds)]
      for part, (golds, _) in zip(np.split(cosines, ends), pairs)
  ]


class _Entries:
  """Sparse counts, gathered text by text."""

  def __init__(self):
    self._rows, self._lengths, self._columns, self._counts = [], [], [], []

  def add(
      self, row: int, terms: Counter[str], column_of: dict[str, int], other: int
  ):
    self._rows.append(row)
    self._lengths.append(len(terms))
    self._columns += map(column_of.get, terms, itertools.repeat(other))
    self._counts += terms.values()

  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and count of every entry; several share the other column."""
    row = np.repeat(np.array(self._rows, np.int64), self._lengths)
    column = np.array(self._columns, np.int64)
    return row, column, np.array(self._counts, np.float64)


def _terms(text: str) -> Counter[str]:
  """The terms that scikit-learn finds in `normalize(text)`.

  One-letter words are no terms, and whole words are what normalisation drops,
  so that the two articles left can go after counting.
  """
  text = text.lower().translate(_SEPARATED)
  # Six times as fast as the pattern, and the same where all else is ASCII.
  counts = Counter(text.split() if text.isascii() else _TERM.findall(text))
  for word in _NO_TERMS.intersection(counts):
    del counts[word]
  return counts
