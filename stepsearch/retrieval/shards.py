"""One search by several processes, which all ask the same and all get the same.

    replicated   process p of P searches queries p::P in the whole corpus;
                 the documents found are exchanged
    sharded      process p searches all queries in passages p::P;
                 scores are exchanged, then the documents of the best

`exchange(x)` gives every process what each of them called it with, in order:
that of stepsearch.distributed, on a channel of its own. What goes through it
is small: numbers, texts and lists of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import hashlib
import heapq
import json
from typing import Any

import numpy as np

from stepsearch.retrieval import retriever
from stepsearch.types import Document

Exchange = Callable[[Any], list[Any]]


def distribute(
    engine: retriever.Engine, exchange: Exchange, index: int, count: int
) -> retriever.Engine:
  """Makes one engine of those of `count` processes.

  Args:
    engine: of this process: a `Retriever` of one shard of the corpus
      (`retriever.build(shard=(index, count))`), or one that answers alone.
    exchange: (object) -> that of every process.
    index: of this process.
    count: of the processes; 1: the engine is returned as it is.

  Raises:
    ValueError: the shards of the processes do not make up one corpus.
  """
  if count == 1:
    return engine
  if getattr(engine, 'shard', (0, 1)) == (0, 1):
    return Replicated(engine, exchange, index, count)
  return Sharded(engine, exchange)


class Replicated:
  """An engine that every process has; each searches a part of the queries.

  Attributes:
    failed: queries so far that got no documents, in all processes.
  """

  def __init__(
      self, engine: retriever.Engine, exchange: Exchange, index: int, count: int
  ):
    self._engine = engine
    self._exchange = exchange
    self._index, self._count = index, count
    self.failed = 0
    if hasattr(engine, 'embed'):
      self.embed = engine.embed

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """As the engine's; to be called in every process with the same queries.

    Raises:
      Unavailable: the engine of one process is, in all of them.
      RuntimeError: a search failed otherwise, in any process.
    """
    mine = queries[self._index::self._count]

    def work():
      found = self._engine.search(mine, k) if mine else []
      return (
          [[_packed(document) for document in row] for row in found],
          getattr(self._engine, 'failed', 0))

    parts = _together(self._exchange, [list(queries), k], work)
    self.failed = sum(failed for _, failed in parts)
    return [
        [Document(*fields) for fields in parts[i % self._count][0][
            i // self._count]]
        for i in range(len(queries))]


class Sharded:
  """A corpus of which every process has a part.

  In the exact regime the result is that of one index over the whole corpus, to
  the bit. Beyond it at least as much is found, for the shards are smaller.
  """

  failed = 0

  def __init__(self, engine: retriever.Retriever, exchange: Exchange):
    self._engine = engine
    self._exchange = exchange
    self._index, self._count = engine.shard
    parts = _together(exchange, 'shards', lambda: (
        *engine.shard, len(engine), engine.corpus,
        engine.embedder.fingerprint))
    if [part[:2] for part in map(list, parts)] != [
        [i, self._count] for i in range(len(parts))]:
      raise ValueError(
          f'{len(parts)} processes hold the shards '
          + ', '.join(f'{i} of {n}' for i, n, *_ in parts)
          + ': process p has to hold shard p of as many.')
    self._size = sum(size for _, _, size, *_ in parts)
    if len({tuple(part[3:]) for part in parts}) > 1:
      raise ValueError(
          'the processes hold shards of different indexes: '
          + '; '.join(
              f'process {i} of {corpus}, {embedder}'
              for i, _, _, corpus, embedder in parts)
          + '. Give all of them the same corpus, embedder and settings.')
    self.embed = engine.embed

  def __len__(self) -> int:
    return self._size

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """As `Retriever.search`; in every process with the same queries.

    Raises:
      ValueError: k is out of range.
      RuntimeError: a search failed, in any process.
    """
    retriever.check_k(k, len(self))
    engine = self._engine
    asked = [list(queries), k]
    parts = _together(self._exchange, asked, lambda: [
        [(-score, self._index + row * self._count) for row, score in found]
        for found in engine.nearest(queries, min(k, len(engine)))])
    best = [
        heapq.nsmallest(k, (tuple(pair) for found in lists for pair in found))
        for lists in zip(*parts)]
    wanted = sorted({
        row for found in best for _, row in found
        if row % self._count == self._index})
    texts = _together(self._exchange, asked, lambda: [
        (row, _packed(engine.documents[row // self._count]))
        for row in wanted])
    document_of = {row: fields for part in texts for row, fields in part}
    return [
        [retriever.scored(Document(*document_of[row]), -score)
         for score, row in found]
        for found in best]


class Divided:
  """A `rerank.Scorer` whose pairs the processes share."""

  def __init__(self, scorer: Any, exchange: Exchange, index: int, count: int):
    self.fingerprint = scorer.fingerprint
    self._scorer = scorer
    self._exchange = exchange
    self._index, self._count = index, count

  def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """As the scorer's; in every process with the same pairs."""
    parts = _together(
        self._exchange, [len(pairs), pairs[:1]],
        lambda: self._scorer.score(pairs[self._index::self._count]).tolist())
    scores = np.zeros([len(pairs)], np.float32)
    for i, part in enumerate(parts):
      scores[i::self._count] = part
    return scores


def _packed(document: Document) -> list[Any]:
  return [document.id, document.title, document.text, document.score]


def _together(exchange, asked, work) -> list[Any]:
  """What `work` returns in every process.

  Where it raises in one, all of them raise: a process that went on alone would
  wait for the others for ever.

  Args:
    exchange: as of `distribute`.
    asked: what is worked on, the same in all processes.
    work: called once.

  Raises:
    Unavailable: the first process that failed raised it.
    RuntimeError: it raised something else, or not all were asked the same.
  """
  digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8)
  mine = {'asked': digest.hexdigest()}
  own = None
  try:
    mine['found'] = work()
  except Exception as error:  # raised below, in every process
    own = error
    mine['error'] = str(error) or repr(error)
    mine['unavailable'] = isinstance(error, retriever.Unavailable)
  parts = exchange(mine)
  if len({part['asked'] for part in parts}) > 1:
    raise RuntimeError(
        'processes searched for different things at the same time.') from own
  for i, part in enumerate(parts):
    if 'error' in part:
      kind = retriever.Unavailable if part['unavailable'] else RuntimeError
      raise kind(f'process {i}: {part["error"]}') from own
  return [part['found'] for part in parts]
