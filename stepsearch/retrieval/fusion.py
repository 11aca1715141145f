"""Several engines as one, by reciprocal ranks (Cormack et al., SIGIR 2009).

    score(d) = sum over the engines of 1 / (constant + rank of d there)

with ranks from 1, and nothing from an engine that has not found d among its
first `depth`. Scores of the engines, which nothing makes comparable, do not
count. A document is known again by its id.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

from stepsearch.retrieval import retriever
from stepsearch.types import Document


class Fusion:
  """A `retriever.Engine` of others.

  Attributes:
    embed: that of the first engine that has one; absent where none has.
  """

  def __init__(
      self, engines: Sequence[retriever.Engine], *, constant: float = 60,
      depth: int = 100,
  ):
    """Joins engines.

    Args:
      engines: over the same corpus; of equal documents those come first that
        an earlier engine has found.
      constant: how little the first ranks count more than the next.
      depth: documents asked of each engine, at least k.

    Raises:
      ValueError: engines over different corpora.
    """
    self._engines = tuple(engines)
    self._constant = constant
    self._depth = depth
    self._sizes = [retriever.size(engine) for engine in self._engines]
    corpora = {
        name for e in self._engines
        if (name := getattr(e, 'fingerprints', {}).get('corpus')) is not None}
    if len(corpora) > 1:
      raise ValueError(
          'engines over different corpora cannot be fused: '
          + '; '.join(sorted(corpora)) + '. Give them the same one.')
    self.fingerprints = {
        'corpus': next(iter(corpora), None),
        'embedder': f'reciprocal ranks, constant={constant:g} depth={depth}, '
        + ' + '.join(
            str(getattr(e, 'fingerprints', {}).get('embedder'))
            for e in self._engines)}
    for engine in self._engines:
      if hasattr(engine, 'embed'):
        self.embed = engine.embed
        break

  def __len__(self) -> int:
    known = [size for size in self._sizes if size is not None]
    if not known:
      raise TypeError('none of the engines says how many passages it has')
    return min(known)

  @property
  def failed(self) -> int:
    """Queries so far that some engine failed to answer."""
    return sum(getattr(engine, 'failed', 0) for engine in self._engines)

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """Up to k documents a query, best first, their `score` as above.

    Raises:
      ValueError: k is out of range.
      retriever.PartlyFailed: an engine has; what it had no answer to has none.
    """
    depth = max(k, self._depth)
    lists, failure = [], None
    for engine, size in zip(self._engines, self._sizes):
      if size is not None:
        retriever.check_k(k, size)
      # A web search API has no size, but a most that may be asked for.
      most = size or getattr(engine, 'most', depth)
      found, failed = retriever.ask(engine, queries, min(depth, most))
      lists.append(found)
      failure = failed or failure
    fused = [
        None if None in found else self._fused(found, k)
        for found in zip(*lists)]
    if failure is not None:
      raise retriever.PartlyFailed(str(failure), fused)
    return fused

  def _fused(self, lists, k) -> list[Document]:
    documents, shares = {}, {}
    for found in lists:
      for rank, document in enumerate(found, 1):
        documents.setdefault(document.id, document)
        shares.setdefault(document.id, []).append(1 / (self._constant + rank))
    # Exact sums: engines in another order rank alike. Sorting is stable.
    scores = {name: math.fsum(parts) for name, parts in shares.items()}
    best = sorted(scores, key=scores.get, reverse=True)[:k]
    return [retriever.scored(documents[name], scores[name]) for name in best]
