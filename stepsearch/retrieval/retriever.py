"""Queries → documents: what rollout, rewards and evaluation ask.

    build / load ──▶ Retriever.search(queries, k) ──▶ documents, a list a query
                     Retriever.embed ──▶ similarity of the rewards

A saved retriever is a folder: the index (`retrieval.index`), the corpus as
`corpus.jsonl` and the state of the lexical embedder. It belongs to one corpus
and one embedder, named by fingerprints in `index.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import hashlib
import importlib
import json
import threading
import time
from typing import Any, Protocol

import numpy as np

from stepsearch import client
from stepsearch import passages
from stepsearch import paths
from stepsearch.retrieval import embed as embedding
from stepsearch.retrieval import index as indexing
from stepsearch.types import Document

CORPUS = 'corpus.jsonl'
_CALL = 256  # queries that share a timeout
_CHUNK = 1024  # passages embedded between two calls of `progress`


class Engine(Protocol):
  """A search engine; `Retriever` is one, `from_factory` makes a user's."""

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """Returns up to k documents a query, best first; none for a blank one."""


class Retriever:
  """Dense search over a corpus, or over one shard of it.

  Attributes:
    documents: what is searched.
    embedder: made the vectors of the index.
    index: rows are those of `documents`.
    corpus: fingerprint of the whole corpus.
    shard: (p, P) where `documents` are p::P of the corpus; else (0, 1).
  """

  failed = 0  # as of `Patient`

  def __init__(
      self,
      documents: Sequence[Document],
      embedder: embedding.Embedder,
      index: indexing.Index,
      corpus: str,
      shard: tuple[int, int] = (0, 1),
  ):
    shape = (len(documents), embedder.dimensions)
    if index.vectors.shape != shape:
      raise ValueError(
          f'The index holds {index.vectors.shape[0]} vectors of'
          f' {index.vectors.shape[1]} dimensions, but there are {shape[0]}'
          f' documents and the embedder has {shape[1]} dimensions.'
      )
    self.documents = documents
    self.embedder = embedder
    self.index = index
    self.corpus = corpus
    self.shard = shard

  def __len__(self) -> int:
    return len(self.documents)

  @property
  def fingerprints(self) -> dict[str, str]:
    """Names of corpus and embedder; an index is loaded for these only."""
    return {
        'corpus': _shard_fingerprint(self.corpus, self.shard),
        'embedder': self.embedder.fingerprint,
    }

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """Finds k documents for each query, in one batched call.

    Args:
      queries: any texts.
      k: documents a query, at most those of the corpus.

    Returns:
      Documents with `score` set, best first. A blank query, or one in which
      the embedder knows nothing, gets an empty list.

    Raises:
      ValueError: k is out of range.
    """
    return [
        [scored(self.documents[row], score) for row, score in found]
        for found in self.nearest(queries, k)
    ]

  def nearest(
      self, queries: Sequence[str], k: int
  ) -> list[list[tuple[int, float]]]:
    """As `search`, but gives rows of `documents` with their inner product."""
    check_k(k, len(self))
    results: list[list[tuple[int, float]]] = [[] for _ in queries]
    asked = [i for i, query in enumerate(queries) if query.strip()]
    if not asked:
      return results
    vectors = self.embedder.embed_queries([queries[i] for i in asked])
    meaningful = vectors.any(axis=1)
    rows, scores = self.index.search(vectors[meaningful], k)
    asked = [i for i, kept in zip(asked, meaningful) if kept]
    for i, found, values in zip(asked, rows.tolist(), scores.tolist()):
      results[i] = list(zip(found, values))
    return results

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts as passages: [n, d] float32."""
    return self.embedder.embed_passages(texts)

  def save(self, directory: paths.Address, *, replace: bool = False):
    """Writes a folder that `load` reads; it appears whole or not at all.

    Args:
      directory: where; absent or empty, or holding an index.
      replace: whether an index that is already there gives way.

    Raises:
      ValueError: the folder holds something that is not an index.
    """
    with indexing.new_directory(directory, replace=replace) as folder:
      passages.write(folder / CORPUS, self.documents)
      if isinstance(self.embedder, embedding.LexicalEmbedder):
        self.embedder.save(folder)
      self.index.save(folder, self.fingerprints)


def build(
    documents: Sequence[Document],
    *,
    embedder: str | embedding.Embedder = 'lexical',
    dimensions: int = 1024,
    index: str = 'auto',
    directory: paths.Address | None = None,
    replace: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    vectors: np.ndarray | None = None,
    **parameters,
) -> Retriever:
  """Makes a retriever, or loads the one that is saved.

  Args:
    documents: the whole corpus, also where one shard of it is built: what the
      lexical embedder learns, and the fingerprint, are of all of it.
    embedder: 'lexical', or an encoder (`encoders.load`).
    dimensions: of the lexical embedder.
    index: backend, as of `index.build`.
    directory: loaded from if an index is there, else saved to.
    replace: build anew and replace the index that is there.
    shard: (p, P): index the passages p::P only.
    progress: called with (passages embedded, passages in all).
    vectors: of the passages that are indexed, by this embedder, as
      `encoding.gather` returns them; None: they are embedded here.
    **parameters: of `index.build`; a loaded index keeps its own.

  Raises:
    index.IndexMismatchError: the index in `directory` was made of another
      corpus or embedder.
    ValueError: an empty corpus, an unknown embedder or backend.
  """
  if not documents:
    raise ValueError('The corpus has no documents: nothing can be indexed.')
  if embedder == 'lexical':
    embedder = embedding.LexicalEmbedder(dimensions)
  elif isinstance(embedder, str):
    raise ValueError(
        f"The embedder '{embedder}' is unknown: use 'lexical', or pass an"
        ' object with embed_queries and embed_passages, as'
        ' retrieval.encoders.load makes of a folder.'
    )
  if directory is not None and indexing.exists(directory) and not replace:
    return load(
        directory, documents=documents, embedder=embedder, index=index,
        shard=shard,
    )
  if isinstance(embedder, embedding.LexicalEmbedder):
    embedder.fit(map(passage_text, documents))
  mine = _part(documents, shard)
  if vectors is None:
    vectors = _embedded(mine, embedder, progress)
  built = Retriever(
      mine, embedder, indexing.build(vectors, backend=index, **parameters),
      corpus_fingerprint(documents), shard,
  )
  if directory is not None:
    built.save(directory, replace=replace)
    # What is loaded is mapped where it is not needed; what was built held the
    # vectors twice.
    built.index = indexing.load(directory, built.fingerprints, backend=index)
  return built


def _embedded(documents, embedder, progress):
  vectors = np.empty([len(documents), embedder.dimensions], np.float32)
  for start in range(0, len(documents), _CHUNK):
    texts = [passage_text(d) for d in documents[start : start + _CHUNK]]
    stop = start + len(texts)
    vectors[start:stop] = embedder.embed_passages(texts)
    if progress is not None:
      progress(stop, len(documents))
  return vectors


def load(
    directory: paths.Address,
    *,
    documents: Sequence[Document] | None = None,
    embedder: embedding.Embedder | None = None,
    index: str = 'auto',
    shard: tuple[int, int] = (0, 1),
) -> Retriever:
  """Loads what `Retriever.save` wrote, without embedding anything.

  Args:
    directory: the folder.
    documents: the whole corpus that it must have been made of; None: what the
      folder holds.
    embedder: the encoder that it must have been made with. A lexical one
      gives its settings and takes its state from the folder; None: lexical,
      with the folder's settings.
    index: backend, as of `index.build`.
    shard: that it must be, of `documents`.

  Raises:
    index.IndexMismatchError: the index was made of something else.
    ValueError: the folder holds no index.
  """
  expected = {}
  if documents is not None:
    corpus = corpus_fingerprint(documents)
    expected['corpus'] = _shard_fingerprint(corpus, shard)
    documents = _part(documents, shard)
  if embedder is not None:
    expected['embedder'] = embedder.fingerprint
  loaded = indexing.load(directory, expected, backend=index)
  local = paths.local_copy(directory)
  if documents is None:
    corpus, shard = loaded.fingerprints['corpus'], (0, 1)
    documents = passages.read(local / CORPUS)
  if embedder is None or isinstance(embedder, embedding.LexicalEmbedder):
    try:
      embedder = embedding.LexicalEmbedder.load(local)
    except FileNotFoundError:
      raise ValueError(
          f'The index in {directory} was built with an encoder that is not'
          ' saved in it: pass that encoder as `embedder`.'
      ) from None
  return Retriever(documents, embedder, loaded, corpus, shard)


def from_factory(
    dotted_path: str, config: Any = None, **patience: Any
) -> Patient:
  """Makes a user's own search engine: `factory(config) -> engine`.

  The engine's `search(queries, k)` returns one list of `Document` a query,
  best first, up to k of them, with ids that stay the same between calls. Calls
  that raise are repeated, and in the end cost the turn (`Patient`).

  Args:
    dotted_path: 'package.module:function' or 'package.module.function'.
    config: passed on to the function.
    **patience: of `Patient`.

  Raises:
    ValueError: the path cannot be imported, or what it makes cannot search.
  """
  field = f"config.retriever.factory = '{dotted_path}'"
  module, separator, name = dotted_path.partition(':')
  if not separator:
    module, _, name = dotted_path.rpartition('.')
  try:
    if not module or not name:
      raise ImportError('it names no module and function')
    factory = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
        f'{field} cannot be imported ({error}): write'
        " 'package.module:function', with the package on PYTHONPATH."
    ) from error
  if not callable(factory):
    raise ValueError(
        f'{field} is a {type(factory).__name__}, not a function: it is called'
        ' with the config and returns the engine.'
    )
  engine = factory(config)
  if not callable(getattr(engine, 'search', None)):
    raise ValueError(
        f'{field} returned a {type(engine).__name__} without a method'
        ' search(queries, k) -> list of lists of stepsearch.types.Document.'
    )
  return Patient(engine, **patience)


class Unavailable(ValueError):
  """A search engine answers nothing for longer than a run waits, or ever."""


class PartlyFailed(ConnectionError):
  """An engine has no answer to some queries of a call.

  Attributes:
    found: as of `Engine.search`, with None for those queries.
  """

  def __init__(
      self, problem: str, found: Sequence[list[Document] | None]
  ):
    super().__init__(problem)
    self.found = found


def ask(
    engine: Engine, queries: Sequence[str], k: int
) -> tuple[list[list[Document] | None], PartlyFailed | None]:
  """Searches; what has no answer is None, and the failure comes along."""
  try:
    return engine.search(queries, k), None
  except PartlyFailed as failure:
    return list(failure.found), failure


class Patient:
  """An engine whose failures cost a turn, and only in the end the run.

  A call that raises, takes too long or answers other than asked is repeated,
  each time after twice the wait. If it fails for good its queries get no
  documents, which the rewards count as no information. So do those that it
  names in a `PartlyFailed`, and only those.

  Attributes:
    failed: queries so far that got no documents for that reason.
  """

  def __init__(
      self, engine: Engine, *,
      name: str = 'the engine of config.retriever.factory',
      timeout: float | None = 15.0, retries: int = 2, give_up: float = 60.0,
      wait: float = 1.0,
  ):
    """Wraps an engine.

    Args:
      engine: called by one thread at a time, but for calls that were given up.
      name: of the engine, for errors.
      timeout: seconds that one call may take; None: the engine sees to that.
      retries: calls after the first that fails.
      give_up: seconds of searches without any answer after which `search`
        raises.
      wait: seconds before the first retry.
    """
    self._engine = engine
    self._name = name
    self._timeout = timeout
    self._retries = retries
    self._give_up = give_up
    self._wait = wait
    self._silence = 0.0  # seconds of searches since one was answered
    self.failed = 0
    if hasattr(engine, 'embed'):
      self.embed = engine.embed

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """As the engine's, or an empty list a query; some queries a call.

    Raises:
      Unavailable: no call was answered in `give_up` seconds of searches, or the
        engine says `client.Refused`.
    """
    return [
        row for start in range(0, len(queries), _CALL)
        for row in self._search(queries[start:start + _CALL], k)]

  def _search(self, queries, k):
    start = time.monotonic()
    for attempt in range(self._retries + 1):
      if attempt:
        time.sleep(self._wait * 2 ** (attempt - 1))
      try:
        found = self._checked(queries, k)
      except client.Refused as error:
        raise Unavailable(
            f'{self._name} is of no use any more: {error}') from error
      except Exception as error:  # whatever a user's engine may raise
        cause = error
      else:
        self._silence = 0.0
        return found
    rows = [None] * len(queries)
    if isinstance(cause, PartlyFailed):
      rows = list(cause.found)
    missing = rows.count(None)
    self.failed += missing
    silent = missing == len(queries)
    self._silence += time.monotonic() - start
    if not silent:
      self._silence = 0.0
    elif self._silence >= self._give_up:
      raise Unavailable(
          f'{self._name} has answered nothing in {self._silence:.0f} seconds '
          f'of searches, at last {cause!r}: start it again, and look at '
          'config.retriever.timeout, retries and give_up.'
      )
    print(
        f'search failed {self._retries + 1} times ({cause!r}): {missing} '
        'queries get no documents', flush=True)
    return [row or [] for row in rows]

  def _checked(self, queries, k):
    result: futures.Future = futures.Future()

    def call():
      try:
        result.set_result(self._engine.search(queries, k))
      except BaseException as error:  # raised where it is waited for
        result.set_exception(error)

    # A daemon: a call that hangs must not keep the process alive.
    threading.Thread(target=call, daemon=True).start()
    try:
      found = result.result(self._timeout)
    except futures.TimeoutError as error:
      if result.done():
        raise  # the engine's own
      raise TimeoutError(f'no answer in {self._timeout:g} seconds') from error
    found = [list(row)[:k] for row in found]
    if len(found) != len(queries):
      raise ValueError(
          f'{len(found)} lists for {len(queries)} queries: an engine has to '
          'return one list a query.')
    for row in found:
      for document in row:
        if not isinstance(document, Document):
          raise ValueError(
              f'{document!r}: the lists of an engine have to hold '
              'stepsearch.types.Document.')
    return found


def passage_text(document: Document) -> str:
  """The text of a document that is embedded."""
  return f'{document.title}\n{document.text}'


def shard_directory(
    directory: paths.Address, shard: tuple[int, int]
) -> paths.Path:
  """Where a shard lies: in a folder of the directory, or there if whole."""
  p, count = shard
  directory = paths.Path(directory)
  return directory / f'shard-{p:05}-of-{count:05}' if count > 1 else directory


def size(engine: Engine) -> int | None:
  """Passages of an engine; None where it does not know them."""
  try:
    return len(engine)
  except TypeError:
    return None


def scored(document: Document, score: float) -> Document:
  """The document as it was found; the score is rounded to float32."""
  return dataclasses.replace(document, score=float(np.float32(score)))


def check_k(k: int, size: int) -> None:
  """Raises a ValueError unless `size` documents have a k-th best."""
  if not 1 <= k <= size:
    raise ValueError(
        f'k = {k} documents a query were asked of a corpus of {size}: k must'
        f' be between 1 and {size}.'
    )


def corpus_fingerprint(documents: Sequence[Document]) -> str:
  """Names a corpus by its size and a hash of all ids, titles and texts."""
  digest = hashlib.blake2b(digest_size=8)
  for document in documents:
    row = json.dumps([document.id, document.title, document.text])
    digest.update(row.encode())
  return f'{len(documents)} documents, {digest.hexdigest()}'


def _shard_fingerprint(corpus: str, shard: tuple[int, int]) -> str:
  p, count = shard
  return corpus if count == 1 else f'{corpus}, shard {p} of {count}'


def _part(
    documents: Sequence[Document], shard: tuple[int, int]
) -> Sequence[Document]:
  p, count = shard
  if len(documents) < count:
    raise ValueError(
        f'A corpus of {len(documents)} documents cannot be split into {count}'
        ' shards.'
    )
  return documents[p::count] if count > 1 else documents
