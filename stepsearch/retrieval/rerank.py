"""Candidates of an engine, ordered anew by a cross-encoder.

    engine.search(queries, candidates) ─▶ pairs of query and passage
      ─ sorted by length ─▶ batches ─▶ CrossEncoder ─▶ the k best of each query

A cross-encoder reads query and passage together: slower than an embedder by
the number of candidates, for nothing of it can be computed ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import os
from typing import Any

import jax
import numpy as np
import tokenizers

from stepsearch import sharding
from stepsearch.models import encoder
from stepsearch.models import folder as folder_lib
from stepsearch.retrieval import encoders
from stepsearch.retrieval import retriever
from stepsearch.types import Document


class Scorer:
  """A cross-encoder and its tokenizer; see `load`.

  Attributes:
    fingerprint: a hash of the folder's files, and the settings in words.
  """

  def __init__(
      self, config: encoder.Config, params: Any,
      tokenizer: tokenizers.Tokenizer, mesh: jax.sharding.Mesh, digest: str,
  ):
    self.fingerprint = f'cross-encoder {digest} max_length={config.positions}'
    self._module = encoder.CrossEncoder(config)
    self._params = params
    self._tokenizer = tokenizer
    self._layout = sharding.Layout(mesh)
    self._max_length = config.positions
    tokenizer.no_padding()
    tokenizer.enable_truncation(self._max_length)

  def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """How well each passage answers its query: [n] float32, any number.

    Args:
      pairs: (query, passage); of what is too long the longer text is cut.
    """
    scores = np.zeros([len(pairs)], np.float32)
    encoded = self._tokenizer.encode_batch(list(pairs))
    results = [
        (chosen, _scores(self._module, self._params, *arrays))
        for chosen, arrays in encoders.batches(
            self._layout, self._max_length, [row.ids for row in encoded],
            [row.type_ids for row in encoded])]
    for chosen, result in results:
      scores[chosen] = jax.device_get(result)[:len(chosen)]
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _scores(module, params, tokens, lengths, segments):
  return module.apply({'params': params}, tokens, lengths, segments)


def load(
    path: str | os.PathLike[str], *, mesh: jax.sharding.Mesh | None = None
) -> Scorer:
  """Reads a cross-encoder from a Hugging Face folder.

  Args:
    path: the folder, on disk or gs://: config.json of a
      BertForSequenceClassification with one label, *.safetensors and
      tokenizer.json.
    mesh: as of `encoders.load`.

  Raises:
    ValueError: a missing or damaged file, or something that is not
      implemented; names file, field and value.
  """
  folder = folder_lib.Folder(path)
  if mesh is None:
    mesh = sharding.make_mesh(devices=jax.local_devices())
  tokenizer = encoders.read_tokenizer(folder)
  config, params = encoder.load_cross_encoder(folder, mesh)
  encoders.check_vocabulary(folder, tokenizer, config.vocab_size)
  return Scorer(config, params, tokenizer, mesh, encoders.digest(folder))


class Reranked:
  """A `retriever.Engine` whose candidates a `Scorer` orders.

  Attributes:
    embed: the engine's; absent where it has none.
  """

  def __init__(
      self, engine: retriever.Engine, scorer: Scorer, candidates: int = 50
  ):
    """Wraps an engine.

    Args:
      engine: finds the candidates.
      scorer: orders them.
      candidates: how many of them, at least k.
    """
    self._engine = engine
    self._scorer = scorer
    self._candidates = candidates
    self._size = retriever.size(engine)
    if hasattr(engine, 'embed'):
      self.embed = engine.embed
    about = getattr(engine, 'fingerprints', {})
    self.fingerprints = {
        'corpus': about.get('corpus'),
        'embedder': f'{about.get("embedder")}, {candidates} of them by '
        + scorer.fingerprint}

  def __len__(self) -> int:
    if self._size is None:
      raise TypeError('the engine does not say how many passages it has')
    return self._size

  @property
  def failed(self) -> int:
    """As of the engine."""
    return getattr(self._engine, 'failed', 0)

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """Up to k documents a query, best first, their `score` the scorer's.

    Raises:
      ValueError: k is out of range.
      retriever.PartlyFailed: the engine has.
    """
    wanted = max(k, self._candidates)
    if self._size is not None:
      retriever.check_k(k, self._size)
      wanted = min(wanted, self._size)
    wanted = min(wanted, getattr(self._engine, 'most', wanted))
    found, failure = retriever.ask(self._engine, queries, wanted)
    scores = self._scorer.score([
        (query, retriever.passage_text(document))
        for query, row in zip(queries, found) for document in row or ()])
    results, start = [], 0
    for row in found:
      if row is None:
        results.append(None)
        continue
      mine = scores[start:start + len(row)]
      start += len(row)
      # Equal scores keep the engine's order.
      best = np.argsort(-mine, kind='stable')[:k]
      results.append(
          [retriever.scored(row[i], mine[i]) for i in best])
    if failure is not None:
      raise retriever.PartlyFailed(str(failure), results)
    return results
