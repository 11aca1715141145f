"""Retrieval alone: how much of the gold an engine finds, and how fast.

    recall@k    share of a query's gold passages among its first k documents
    all_gold@k  share of questions all of whose gold passages are there: of
                sub-questions, each among the documents of its own query
    mrr         1 / rank of a query's first gold passage, 0 beyond the largest k

Means over queries, all_gold over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever
from stepsearch.types import Example

MODES = ('questions', 'sub_questions')
BATCH = 256  # queries a call
_TIMED = 512  # queries that are asked once more, for the clock
_OVERLAP = 10  # neighbours that an approximate search is compared on


@dataclasses.dataclass(frozen=True)
class Query:
  """One query and what it should find."""

  text: str
  gold: frozenset[str]  # ids
  question: int  # its number; sub-questions of one question share it


def queries(
    examples: Sequence[Example], mode: str = 'questions'
) -> tuple[list[Query], int]:
  """What is asked, and how many questions are left out.

  Args:
    examples: questions with gold documents.
    mode: each question as one query, or each of its sub-questions as one.

  Returns:
    Queries with gold passages; and the number of questions that have none, or
    a sub-question that has none.
  """
  found, without = [], 0
  for number, example in enumerate(examples):
    if mode == 'sub_questions':
      asked = [
          Query(part.question, frozenset(part.gold), number)
          for part in example.sub_questions]
    else:
      gold = frozenset(document.id for document in example.gold_documents)
      asked = [Query(example.question, gold, number)]
    if asked and all(query.gold for query in asked):
      found += asked
    else:
      without += 1
  return found, without


def measure(
    engine: retriever.Engine,
    asked: Sequence[Query],
    ks: Sequence[int],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
  """Asks an engine everything, up to 256 queries a call.

  Args:
    engine: any.
    asked: what; at least one.
    ks: numbers of documents that are looked at.
    on_batch: called with the number of queries answered.

  Returns:
    The module's measures, `queries_per_second` (of the first 512, asked a
    second time, so that nothing is compiled) and `failed`, queries that a
    server or a user's engine did not answer.
  """
  failed = getattr(engine, 'failed', 0)
  texts = [query.text for query in asked]
  found = []
  for start in range(0, len(texts), BATCH):
    for row in engine.search(texts[start:start + BATCH], max(ks)):
      found.append([document.id for document in row])
    on_batch(len(found))
  failed = getattr(engine, 'failed', 0) - failed
  start = time.perf_counter()
  again = texts[:_TIMED]
  for first in range(0, len(again), BATCH):
    engine.search(again[first:first + BATCH], max(ks))
  speed = len(again) / (time.perf_counter() - start)
  return score(asked, found, ks) | {
      'queries_per_second': speed, 'failed': float(failed)}


def score(
    asked: Sequence[Query], found: Sequence[Sequence[str]], ks: Sequence[int]
) -> dict[str, float]:
  """The module's measures of lists of ids, best first, one a query."""
  numbers = [query.question for query in asked]
  values = {}
  for k in sorted(ks):
    shares = np.array([
        len(query.gold.intersection(row[:k])) / len(query.gold)
        for query, row in zip(asked, found)])
    missed = {n for n, share in zip(numbers, shares) if share < 1}
    values[f'recall@{k}'] = float(shares.mean())
    values[f'all_gold@{k}'] = 1 - len(missed) / len(set(numbers))
  ranks = [
      next((i for i, name in enumerate(row[:max(ks)], 1)
            if name in query.gold), np.inf)
      for query, row in zip(asked, found)]
  values['mrr'] = float(np.mean(1 / np.array(ranks)))
  return values


def approximation(
    engine: retriever.Retriever, asked: Sequence[Query], ks: Sequence[int],
    regime: str,
) -> dict[str, float]:
  """ScaNN against exact search, over the vectors of one engine.

  Args:
    engine: its index serves where it is of this regime; another is built of
      its vectors, and not kept.
    asked: as of `measure`.
    ks: as of `measure`.
    regime: hashed | tree, as of `index.build`.

  Returns:
    `overlap@10`, share of the ten nearest that ScaNN finds; `ratio@k`, recall
    of gold passages by ScaNN over that by exact search, 1 where both are 0;
    `scann_per_second` and `exact_per_second`, queries without the embedding.

  Raises:
    ValueError: ScaNN cannot be imported.
  """
  built = engine.index
  if built.parameters['regime'] != regime:
    built = indexing.build(
        built.vectors, backend='scann', exact_below=0,
        tree_above=0 if regime == 'tree' else len(built))
  vectors = engine.embedder.embed_queries([query.text for query in asked])
  k = min(max(*ks, _OVERLAP), len(built))
  rows, seconds = {}, {}
  for name, search in (
      ('scann', built.search), ('exact', built.exact_search)):
    search(vectors[:BATCH], k)  # the first call is slower
    start = time.perf_counter()
    rows[name] = np.concatenate([
        search(vectors[i:i + BATCH], k)[0]
        for i in range(0, len(vectors), BATCH)])
    seconds[name] = time.perf_counter() - start
  values = {
      'overlap@10': float(np.mean([
          np.isin(a, b).mean()
          for a, b in zip(rows['exact'][:, :_OVERLAP],
                          rows['scann'][:, :_OVERLAP])]))}
  ids = lambda found: [engine.documents[row].id for row in found.tolist()]
  scores = {
      name: score(asked, [ids(found) for found in of], ks)
      for name, of in rows.items()}
  for size in ks:
    exact = scores['exact'][f'recall@{size}']
    values[f'ratio@{size}'] = (
        scores['scann'][f'recall@{size}'] / exact if exact else 1.0)
  return values | {
      f'{name}_per_second': len(asked) / taken
      for name, taken in seconds.items()}


def table(
    results: dict[str, dict[str, Any]], ks: Sequence[int]
) -> str:
  """Markdown: an engine a line, with what `measure` returns of it."""
  ks = sorted(ks)
  columns = [
      *(f'recall@{k}' for k in ks), *(f'all_gold@{k}' for k in ks), 'mrr']
  head = ['engine', *(name.replace('_', ' ') for name in columns), 'queries/s']
  lines = [head, ['---', *['---:'] * (len(head) - 1)]]
  for name, values in results.items():
    lines.append([
        name, *(f'{values[column]:.3f}' for column in columns),
        f'{values["queries_per_second"]:,.0f}'])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
