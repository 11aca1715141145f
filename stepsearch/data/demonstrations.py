"""Demonstrations from the reference queries of a real data set.

    Example.search_keys ─▶ search each in turn ─▶ (question, text with tags)

They teach the format, and to ask one thing at a time; what to do with what is
found is left to RL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepsearch import protocol
from stepsearch import types


def usable(
    examples: Sequence[types.Example], max_turns: int
) -> list[types.Example]:
  """The questions that make a demonstration; as of `from_search_keys`.

  Raises:
    ValueError: none does.
  """
  found = [
      e for e in examples
      if 0 < len(e.search_keys) <= max_turns and all(e.search_keys)]
  if not found:
    raise ValueError(
        'config.data.demonstrations = search_keys: none of the '
        f'{len(examples)} training questions has between 1 and {max_turns} '
        'sub-questions with reference queries; give a file of demonstrations, '
        'or set config.warmup.steps=0.')
  return found


def from_search_keys(
    examples: Sequence[types.Example], search: Callable,
    observation: Callable, *, k: int, max_turns: int, seed: int,
) -> list[tuple[str, str]]:
  """One demonstration per question with few enough sub-questions, all keyed.

  Each sub-question is searched with one of its reference queries, then the
  first answer is given.

  Args:
    examples: the questions.
    search: (queries, k) -> documents a query.
    observation: (documents, last turn is next) -> text of the observation.
    k: documents a search.
    max_turns: questions with more sub-questions are left out.
    seed: of the choice among reference queries.

  Returns:
    (question, text) pairs.

  Raises:
    ValueError: no question has search keys.
  """
  rng = np.random.default_rng((seed, 2))
  shown = usable(examples, max_turns)
  chosen = [
      [keys[rng.integers(len(keys))] for keys in e.search_keys] for e in shown]
  found = iter(search([query for row in chosen for query in row], k))
  rows = []
  for example, queries in zip(shown, chosen):
    text = ''
    for number, query in enumerate(queries, start=1):
      text += protocol.search_turn('I need to look this up.', query)
      text += observation(next(found), number == max_turns)
    text += protocol.answer_turn('Now I can answer.', example.answers[0])
    rows.append((example.question, text))
  return rows
