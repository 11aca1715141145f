"""Gold passages for questions that have none, and how sure they are.

    (sub-)question, with and without its answer ─ engines ─▶ ranked lists
        ─▶ support of each passage ─▶ the best ones, with a confidence

Of L lists, a query by an engine each, a passage that is r_l-th in list l has

    support = w / L · sum over its lists of 1 / r_l

w is 1 where the answer occurs in title or text (`words.occurs`); where it does
not, 1/4 for a sub-question, and 1/2 for a question without sub-questions, as
its gold passages need not all name the answer. A sub-question gets the passage
with most support; a question without any gets as many as it has hops, two if
that is not known. The confidence of each is by how much its support exceeds
that of the best passage not taken: 1 when every list begins with it and nothing
else is found, 0 when another fits as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses

from stepsearch import words
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

_WITHOUT = {True: 0.25, False: 0.5}  # w without the answer; key: decomposed
_UNKNOWN_HOPS = 2
_BLOCK = 64  # questions searched at once

Search = Callable[[Sequence[str], int], list[list[Document]]]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A passage that may be gold."""

  document: Document
  confidence: float  # 0 to 1, see the module
  sub_question: int | None  # which one it is for; None: the whole question


def find(
    examples: Sequence[Example], searches: Sequence[Search], *, k: int = 10,
    tick: Callable[[int], None] = lambda done: None,
) -> Iterator[list[Candidate]]:
  """Yields the candidates of each question, by sub-question, best first.

  Args:
    examples: the questions; sub-questions without an answer count as none.
    searches: of the engines, (queries, k) -> passages of each, best first.
    k: passages a list.
    tick: is told how many questions are done.
  """
  for start in range(0, len(examples), _BLOCK):
    block = examples[start : start + _BLOCK]
    steps = [(i, *step) for i, e in enumerate(block) for step in _steps(e)]
    queries = [
        query for *_, question, answers in steps
        for query in (question, f'{question} {answers[0]}')]
    lists = [search(queries, k) for search in searches]
    found: list[list[Candidate]] = [[] for _ in block]
    for n, (i, sub, _, answers) in enumerate(steps):
      ranked = _supported(
          [one[j] for one in lists for j in (2 * n, 2 * n + 1)], answers,
          _WITHOUT[sub is not None])
      wanted = 1 if sub is not None else block[i].hops or _UNKNOWN_HOPS
      rest = ranked[wanted][0] if len(ranked) > wanted else 0.0
      found[i] += [
          Candidate(document, support - rest, sub)
          for support, document in ranked[:wanted]]
    yield from found
    tick(start + len(block))


def with_gold(
    example: Example, candidates: Sequence[Candidate], threshold: float
) -> Example:
  """The question with those candidates that are sure enough as its gold."""
  sure = [c for c in candidates if c.confidence >= threshold]
  gold = {c.document.id: c.document for c in sure}
  subs = []
  for i, sub in enumerate(example.sub_questions):
    ids = tuple(c.document.id for c in sure if c.sub_question == i)
    subs.append(SubQuestion(sub.question, sub.answer, ids))
  return dataclasses.replace(
      example, gold_documents=tuple(
          dataclasses.replace(d, score=0.0) for d in gold.values()),
      sub_questions=tuple(subs))


def complete(example: Example) -> bool:
  """Whether every sub-question, or hop, has a gold passage."""
  if any(sub.answer for sub in example.sub_questions):
    return all(sub.gold for sub in example.sub_questions)
  return len(example.gold_documents) >= (example.hops or _UNKNOWN_HOPS)


def precision_recall(
    examples: Sequence[Example], found: Sequence[Sequence[Candidate]],
    threshold: float,
) -> tuple[float, float, float]:
  """What candidates are worth on questions whose gold passages are known.

  Args:
    examples: with their gold documents.
    found: what `find` gave without them.
    threshold: least confidence.

  Returns:
    Share of the passages taken that are gold (nan for none), share of the gold
    passages that are taken, share of the questions all of whose gold passages
    are; a passage counts once a question.
  """
  taken = right = total = whole = 0
  for example, candidates in zip(examples, found):
    gold = {d.id for d in example.gold_documents}
    ids = {c.document.id for c in candidates if c.confidence >= threshold}
    taken += len(ids)
    right += len(ids & gold)
    total += len(gold)
    whole += gold <= ids
  precision = right / taken if taken else float('nan')
  return precision, right / total, whole / len(examples)


def _steps(example: Example) -> list[tuple[int | None, str, Sequence[str]]]:
  """(sub-question or None, what is asked, answers), a search each."""
  steps = [
      # MuSiQue writes relations as `Green >> performer`.
      (i, sub.question.replace(' >> ', ' '), (sub.answer,))
      for i, sub in enumerate(example.sub_questions) if sub.answer]
  if steps:
    if steps[-1][0] == len(example.sub_questions) - 1:
      i, question, (answer,) = steps[-1]
      others = [a for a in example.answers if a != answer]
      steps[-1] = i, question, (answer, *others)
    return steps
  return [(None, example.question, example.answers)]


def _supported(
    lists: Sequence[Sequence[Document]], answers: Sequence[str],
    without: float,
) -> list[tuple[float, Document]]:
  """Passages with their support, most first; of equals the first found."""
  ranks: dict[str, float] = {}
  documents: dict[str, Document] = {}
  for one in lists:
    for rank, document in enumerate(one, start=1):
      documents.setdefault(document.id, document)
      ranks[document.id] = ranks.get(document.id, 0.0) + 1 / rank
  ranked = []
  for key, document in documents.items():
    text = f'{document.title} {document.text}'
    weight = 1.0 if any(words.occurs(a, text) for a in answers) else without
    ranked.append((weight * ranks[key] / len(lists), document))
  return sorted(ranked, key=lambda pair: -pair[0])
