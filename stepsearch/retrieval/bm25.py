"""Queries → documents by their words: BM25, from bm25s.

    score(q, d) = sum over the words w of q of
                  idf_w tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf_w = ln(1 + (n - df_w + 1/2) / (df_w + 1/2))

with tf the times that d holds w, |d| the words of d, n the passages and df_w
those that hold w: Lucene's form. Words are lower case, without punctuation,
without Lucene's 33 stop words, and not stemmed. Of what was tried on MuSiQue,
2Wiki and HotpotQA nothing else is better on all three: stemming the plural
moves R@3 by -.01, .00 and +.02, keeping the stop words by -.01, -.01 and .00,
k1 = .9 and b = .4 by .00, +.02 and .00, and R@5 on HotpotQA by -.01.

A saved index is a folder of the files of bm25s, mapped when it is loaded, the
passages, and an `index.json` as a dense index has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import json
import logging
import sys
from typing import Any

import numpy as np

from stepsearch import passages
from stepsearch import paths
from stepsearch.retrieval import embed
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever
from stepsearch.types import Document

REGIME = indexing.BM25
_BLOCK = 4096  # passages that stand for each other in `_nearest`
_CHUNK = 1024  # passages between two calls of `progress`


class Bm25:
  """A `retriever.Engine` over a corpus.

  Attributes:
    documents: what is searched.
    corpus: fingerprint of the corpus.
    parameters: what describes the index, as written to `index.json`.
  """

  failed = 0  # as of `retriever.Patient`

  def __init__(
      self, documents: Sequence[Document], scorer: Any, corpus: str,
      parameters: dict[str, Any],
  ):
    """Takes a `bm25s.BM25` that has indexed the documents."""
    self.documents = documents
    self.corpus = corpus
    self.parameters = parameters
    self._scorer = scorer

  def __len__(self) -> int:
    return len(self.documents)

  @property
  def fingerprints(self) -> dict[str, str]:
    """Names of corpus and settings; an index is loaded for these only."""
    return {
        'corpus': self.corpus,
        'embedder': _settings(self.parameters['k1'], self.parameters['b'])}

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """Finds up to k documents a query, best first, `score` set.

    Passages without a word of the query are not found; equal scores are
    ordered by row.

    Raises:
      ValueError: k is out of range.
    """
    retriever.check_k(k, len(self))
    return [
        [retriever.scored(self.documents[row], score) for row, score in found]
        for found in (self._nearest(query, k) for query in queries)]

  def _nearest(self, query, k) -> list[tuple[int, float]]:
    vocabulary = self._scorer.vocab_dict
    asked = [vocabulary[word] for word in _words(query) if word in vocabulary]
    if not asked:
      return []
    scores = self._scorer.get_scores_from_ids(asked)
    # The k-th best block's best is at most the k-th best of all, and found
    # without sorting all: 17 ms instead of 270 for 21 M passages.
    bests = np.maximum.reduceat(scores, np.arange(0, len(scores), _BLOCK))
    if len(bests) < k:
      bests = scores
    bound = max(np.partition(bests, -k)[-k], np.finfo(np.float32).tiny)
    rows = np.flatnonzero(scores >= bound)
    rows = rows[np.argsort(-scores[rows], kind='stable')[:k]]
    return list(zip(rows.tolist(), scores[rows].tolist()))

  def save(self, directory: paths.Address, *, replace: bool = False) -> None:
    """Writes a folder that `load` reads; it appears whole or not at all.

    Args:
      directory: where; absent or empty, or holding an index.
      replace: whether an index that is already there gives way.

    Raises:
      ValueError: the folder holds something that is not an index.
    """
    with indexing.new_directory(directory, replace=replace) as folder:
      passages.write(folder / retriever.CORPUS, self.documents)
      self._scorer.save(folder, show_progress=False)
      indexing.write_metadata(folder, self.fingerprints, self.parameters)


def build(
    documents: Sequence[Document],
    *,
    k1: float = 1.5,
    b: float = 0.75,
    directory: paths.Address | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bm25:
  """Indexes a corpus, or loads the index that is saved.

  Building holds every word of the corpus as a number: for the 21 M passages of
  wiki-18 some 40 GB.

  Args:
    documents: the corpus.
    k1: how slowly the count of a word saturates.
    b: how much a passage's length counts, 0 to 1.
    directory: loaded from if an index is there, else saved to.
    replace: build anew and replace the index that is there.
    progress: called with (passages read, passages in all).

  Raises:
    index.IndexMismatchError: the index in `directory` is of another corpus or
      of other settings.
    ValueError: a corpus without documents or words.
  """
  if not documents:
    raise ValueError('The corpus has no documents: nothing can be indexed.')
  if directory is not None and indexing.exists(directory) and not replace:
    return load(directory, documents=documents, k1=k1, b=b)
  vocabulary: dict[str, int] = {}
  rows = []
  for i, document in enumerate(documents, 1):
    rows.append([
        vocabulary.setdefault(word, len(vocabulary))
        for word in _words(retriever.passage_text(document))])
    if progress is not None and (i % _CHUNK == 0 or i == len(documents)):
      progress(i, len(documents))
  if not vocabulary:
    raise ValueError('The corpus has no words: nothing can be indexed.')
  scorer = _bm25s().BM25(k1=k1, b=b, backend='auto')
  scorer.index((rows, vocabulary), create_empty_token=False,
               show_progress=False)
  built = Bm25(
      documents, scorer, retriever.corpus_fingerprint(documents),
      {'size': len(documents), 'regime': REGIME, 'k1': k1, 'b': b})
  if directory is None:
    return built
  built.save(directory, replace=replace)
  return load(directory, documents=documents, k1=k1, b=b)


def load(
    directory: paths.Address,
    *,
    documents: Sequence[Document] | None = None,
    k1: float | None = None,
    b: float | None = None,
) -> Bm25:
  """Maps what `Bm25.save` wrote.

  Args:
    directory: the folder.
    documents: the corpus that it must have been made of; None: what the folder
      holds.
    k1: that it must have been made with, together with b; None: the folder's.
    b: as k1.

  Raises:
    index.IndexMismatchError: the index was made of something else.
    ValueError: the folder holds no BM25 index.
  """
  metadata = indexing.read_metadata(directory)
  expected = {}
  if documents is not None:
    expected['corpus'] = retriever.corpus_fingerprint(documents)
  if k1 is not None:
    expected['embedder'] = _settings(k1, b)
  indexing.check_fingerprints(directory, metadata, expected)
  parameters = metadata['parameters']
  if parameters['regime'] != REGIME:
    raise ValueError(
        f'{directory} holds a dense index and no BM25 index: point to another'
        ' folder, or build one with `python -m stepsearch.build_index'
        ' --method=bm25`.')
  local = paths.local_copy(directory)
  try:
    scorer = _bm25s().BM25.load(
        local, mmap=True, show_progress=False, override_params={
            'backend': 'auto'})
  except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
    raise ValueError(
        f'The index in {directory} is damaged ({error}): delete the folder and'
        ' build it again.') from error
  if documents is None:
    documents = passages.read(local / retriever.CORPUS)
  return Bm25(
      documents, scorer, metadata['fingerprints']['corpus'], parameters)


def _settings(k1, b) -> str:
  return f'bm25 k1={k1:g} b={b:g} stop_words=english'


def _words(text: str) -> list[str]:
  return embed.words(text, without=_stop_words())


@functools.cache
def _stop_words() -> frozenset[str]:
  return frozenset(_bm25s().stopwords.STOPWORDS_EN)


@functools.cache
def _bm25s():
  # It would start jax's backend when it is imported, for a function that is
  # not used here: too early for a run of several processes.
  hidden = {name: sys.modules.get(name) for name in ('jax', 'jax.lax')}
  sys.modules.update(dict.fromkeys(hidden))
  try:
    import bm25s
  finally:
    for name, module in hidden.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  return bm25s
