"""Unit vectors → nearest neighbours by inner product: the second half.

Three regimes, by the number of vectors n, after ScaNN's own advice:

    n <= exact_below   every vector is scored
    n <= tree_above    asymmetric hashing of all, the best `reorder` re-scored
    beyond             ~ sqrt(n) leaves, the nearest of them hashed, re-scored

ScaNN does the work where it is installed; numpy, always exact, elsewhere (no
wheel exists for macOS). In the exact regime both return the same neighbours.

A saved index is a folder of ScaNN's own files plus `index.json`. The vectors
lie in ScaNN's `dataset.npy`, in order, and numpy maps that file: whatever saved
an index, both can load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from stepsearch import paths

BACKENDS = ('auto', 'scann', 'exact')
REORDER_DTYPES = ('float32', 'bfloat16', 'int8')
BM25 = 'bm25'  # the regime of a folder without vectors, `retrieval.bm25`'s
_METADATA = 'index.json'
_VECTORS = 'dataset.npy'  # the name that ScaNN gives it
_ASSETS = 'scann_assets.pbtxt'
_FORMAT = 1
_MARGIN = 16  # candidates beyond k that exact search ranks, for ties
_SCORES = 2**25  # scores held at once by exact search: 128 MiB


class IndexMismatchError(ValueError):
  """A saved index that does not belong to this corpus or embedder."""


class Index:
  """A searchable set of vectors; made by `build` or `load`.

  Attributes:
    vectors: [n, d] float32, the rows as they were given.
    parameters: what describes the index, as written to `index.json`.
    fingerprints: what it was saved with; empty unless it was loaded.
  """

  def __init__(
      self, vectors: np.ndarray, parameters: Mapping[str, Any], searcher=None,
      fingerprints: Mapping[str, str] | None = None,
  ):
    self.vectors = vectors
    self.parameters = dict(parameters)
    self.fingerprints = dict(fingerprints or {})
    self._searcher = searcher  # ScaNN's, or None: numpy

  def __len__(self) -> int:
    return len(self.vectors)

  @property
  def approximate(self) -> bool:
    """Whether a search may miss a neighbour."""
    return self._searcher is not None and self.parameters['regime'] != 'exact'

  def search(
      self, queries: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k best rows for each query, best first.

    Args:
      queries: [m, d] float32.
      k: neighbours a query, 1 <= k <= n.

    Returns:
      rows [m, k] int64 and inner products [m, k] float64: exact ones to nine
      decimals, approximate ones as ScaNN's float32. Equal scores are ordered
      by row.

    Raises:
      ValueError: k is out of range.
    """
    if not 1 <= k <= len(self):
      raise ValueError(
          f'k = {k} neighbours were asked of an index of {len(self)} vectors:'
          f' k must be between 1 and {len(self)}.'
      )
    queries = np.ascontiguousarray(queries, np.float32)
    if not len(queries):
      return np.zeros([0, k], np.int64), np.zeros([0, k])
    if not self.approximate:
      return self.exact_search(queries, k)
    rows, scores = self._ask_scann(queries, k)
    # Too few candidates lay in the searched leaves: search all of them.
    short = np.isnan(scores).any(axis=1)
    if short.any():
      rows[short], scores[short] = self._ask_scann(
          queries[short], k, leaves_to_search=self.parameters['num_leaves']
      )
    order = np.lexsort((rows, -scores))
    return (
        np.take_along_axis(rows, order, 1),
        np.take_along_axis(scores, order, 1),
    )

  def exact_search(
      self, queries: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Like `search`, but scores every vector.

    Candidates are scored again in float64, one by one, and ordered by score,
    then row: so neither the backend nor the size of the batch, which both
    round differently, decides the order of equal passages.
    """
    wanted = min(k + _MARGIN, len(self))
    if self._searcher is not None and not self.approximate:
      candidates, _ = self._ask_scann(queries, wanted)
    else:
      step = max(1, _SCORES // len(self))
      candidates = np.concatenate([
          _largest(queries[i : i + step] @ self.vectors.T, wanted)
          for i in range(0, len(queries), step)
      ])
    rows = np.empty([len(queries), k], np.int64)
    scores = np.empty([len(queries), k])
    for i, found in enumerate(np.sort(candidates, axis=1)):
      exact = np.einsum(
          'kd,d->k',
          self.vectors[found].astype(np.float64),
          queries[i].astype(np.float64),
      ).round(9)
      best = np.argsort(-exact, kind='stable')[:k]
      rows[i], scores[i] = found[best], exact[best]
    return rows, scores

  def save(self, directory: pathlib.Path, fingerprints: Mapping[str, str]):
    """Writes the index into an existing folder.

    Args:
      directory: where; see `new_directory` for writing it atomically.
      fingerprints: names of what the vectors were made of, which `load` checks.
    """
    if self._searcher is not None:
      self._searcher.serialize(str(directory), relative_path=True)
    # ScaNN writes them only where they are what it scores with.
    if not (directory / _VECTORS).exists():
      np.save(directory / _VECTORS, self.vectors)
    write_metadata(directory, fingerprints, self.parameters)

  def _ask_scann(self, queries, k, leaves_to_search=None):
    options = {}
    if self.parameters['regime'] != 'exact':
      options['pre_reorder_num_neighbors'] = max(k, self.parameters['reorder'])
    if self.parameters['regime'] == 'tree':
      options['leaves_to_search'] = (
          leaves_to_search or self.parameters['leaves_to_search']
      )
    rows, scores = self._searcher.search_batched_parallel(
        queries, final_num_neighbors=k, batch_size=32, **options
    )
    return rows.astype(np.int64), scores.astype(np.float64)


def build(
    vectors: np.ndarray,
    *,
    backend: str = 'auto',
    exact_below: int = 20_000,
    tree_above: int = 100_000,
    num_leaves: int | None = None,
    leaves_to_search: int | None = None,
    training_sample_size: int = 250_000,
    dimensions_per_block: int = 2,
    anisotropic_threshold: float = 0.2,
    reorder: int = 300,
    reorder_dtype: str = 'float32',
) -> Index:
  """Indexes vectors.

  Args:
    vectors: [n, d] float32, rows of unit length (or zero).
    backend: 'scann', 'exact' (numpy), or 'auto': ScaNN where it is installed.
    exact_below: largest n for which every vector is scored.
    tree_above: largest n that is not partitioned.
    num_leaves: partitions; None: the root of n.
    leaves_to_search: partitions looked into for a query; None: a fifth. That
      suits encoders. Lexical vectors hardly cluster: of HotpotQA's three
      nearest a fifth of the leaves finds .70, half of them .89, all (no tree)
      1.00.
    training_sample_size: vectors that the partitions are learnt from.
    dimensions_per_block: coordinates that share one 4-bit code.
    anisotropic_threshold: weight that quantization gives to the error along a
      vector, as the cosine above which errors matter.
    reorder: candidates scored again with the vectors themselves (100 do for
      encoders, lexical vectors want more); a search for k > reorder neighbours
      uses k.
    reorder_dtype: of the copy of the vectors that they are scored with, one of
      `REORDER_DTYPES`; what it saves is in `retrieval.memory`.

  Returns:
    The index. Its `parameters` hold what was chosen.

  Raises:
    ValueError: no vectors, an unknown backend, or ScaNN is asked for by name
      and cannot be imported.
  """
  vectors = np.ascontiguousarray(vectors, np.float32)
  if vectors.ndim != 2 or not len(vectors):
    raise ValueError(
        'An index needs at least one vector, as [n, d], but got an array of'
        f' shape {list(vectors.shape)}.'
    )
  if reorder_dtype not in REORDER_DTYPES:
    raise ValueError(
        f"reorder_dtype = '{reorder_dtype}' is unknown: use one of"
        f' {", ".join(REORDER_DTYPES)}.'
    )
  scann = _scann(backend)
  size, dimensions = vectors.shape
  parameters = {'size': size, 'dimensions': dimensions, 'regime': 'exact'}
  if scann is None:
    return Index(vectors, parameters)
  builder = scann.builder(vectors, 10, 'dot_product')
  if size <= exact_below:
    builder = builder.score_brute_force()
  else:
    parameters |= {
        'regime': 'hashed',
        'dimensions_per_block': dimensions_per_block,
        'anisotropic_threshold': anisotropic_threshold,
        'reorder': reorder,
        'reorder_dtype': reorder_dtype,
    }
    if size > tree_above:
      leaves = min(num_leaves or default_leaves(size), size)
      searched = min(leaves_to_search or math.ceil(leaves / 5), leaves)
      parameters |= {
          'regime': 'tree',
          'num_leaves': leaves,
          'leaves_to_search': searched,
      }
      builder = builder.tree(
          num_leaves=leaves,
          num_leaves_to_search=searched,
          training_sample_size=min(training_sample_size, size),
      )
    builder = builder.score_ah(
        dimensions_per_block,
        anisotropic_quantization_threshold=anisotropic_threshold,
    ).reorder(
        reorder,
        scann.scann_builder.ReorderType[reorder_dtype.upper()],
    )
  with _quiet():
    searcher = builder.build()
  return Index(vectors, parameters, searcher)


def default_leaves(size: int) -> int:
  """Partitions of so many vectors."""
  return round(math.sqrt(size))


def load(
    directory: paths.Address,
    fingerprints: Mapping[str, str],
    *,
    backend: str = 'auto',
) -> Index:
  """Loads a saved index, without building anything.

  Args:
    directory: what `Index.save` wrote.
    fingerprints: must equal those it was saved with.
    backend: as of `build`; an index that numpy saved is searched by numpy
      under 'auto'.

  Raises:
    IndexMismatchError: the index was made of something else.
    ValueError: the folder holds no index, or not one for this backend.
  """
  directory = paths.Path(directory)
  metadata = read_metadata(directory)
  check_fingerprints(directory, metadata, fingerprints)
  if metadata['parameters']['regime'] == BM25:
    raise ValueError(
        f'{directory} holds a BM25 index and no vectors: point to another'
        ' folder, or build one with `python -m stepsearch.build_index'
        ' --method=dense`.'
    )
  local = paths.local_copy(directory)
  has_assets = (local / _ASSETS).exists()
  if backend == 'scann' and not has_assets:
    raise ValueError(
        f'The index in {directory} was saved by the exact backend, so there is'
        " nothing for ScaNN to load: use backend 'auto' or 'exact', or rebuild"
        ' it with `python -m stepsearch.build_index` where ScaNN is installed.'
    )
  scann = _scann(backend) if has_assets or backend != 'auto' else None
  searcher = None
  if scann is not None:
    with _quiet():
      searcher = scann.load_searcher(str(local))
  vectors = np.load(local / _VECTORS, mmap_mode='r', allow_pickle=False)
  parameters = metadata['parameters']
  expected = (parameters['size'], parameters['dimensions'])
  if vectors.shape != expected or vectors.dtype != np.float32:
    raise ValueError(
        f'The index in {directory} is damaged: {_METADATA} speaks of'
        f' {expected} float32, {_VECTORS} holds {vectors.shape}'
        f' {vectors.dtype}. Delete the folder and build it again.'
    )
  return Index(vectors, parameters, searcher, metadata['fingerprints'])


def exists(directory: paths.Address) -> bool:
  """Whether a folder holds a saved index."""
  with paths.explained(directory):
    return (paths.Path(directory) / _METADATA).exists()


@contextlib.contextmanager
def new_directory(
    directory: paths.Address, *, replace: bool = False
) -> Iterator[pathlib.Path]:
  """Yields an empty folder that becomes `directory` if nothing fails.

  Where another process has put an index there in the meantime, its work is
  kept and this one's dropped, so that several may start at once.

  Args:
    directory: what appears whole or not at all.
    replace: whether an index that is already there gives way.

  Raises:
    ValueError: the folder holds something that is not an index.
  """
  if not exists(directory) and paths.occupied(directory, _METADATA):
    raise ValueError(
        f'{directory} is not empty and holds no index, so nothing is written'
        ' there: delete it, or point to another folder.'
    )
  with paths.new_folder(directory, _METADATA, replace=replace) as folder:
    yield folder


def write_metadata(
    directory: pathlib.Path, fingerprints: Mapping[str, str],
    parameters: Mapping[str, Any],
) -> None:
  """Writes what `read_metadata` reads; makes a folder that of an index."""
  metadata = {
      'format': _FORMAT,
      'fingerprints': dict(fingerprints),
      'parameters': dict(parameters),
  }
  (directory / _METADATA).write_text(json.dumps(metadata, indent=2) + '\n')


def check_fingerprints(
    directory: paths.Address, metadata: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> None:
  """Refuses an index whose metadata has other fingerprints.

  Raises:
    IndexMismatchError: names the first that differs.
  """
  for name, expected in fingerprints.items():
    found = metadata['fingerprints'].get(name)
    if found != expected:
      raise IndexMismatchError(
          f'The index in {directory} was built for another {name}: it has'
          f' {name} "{found}", but this run has "{expected}". Rebuild it with'
          ' `python -m stepsearch.build_index --corpus=CORPUS'
          f' --output={directory}` and the same settings (--method,'
          ' --embedder, --dimensions, --query_prefix and --passage_prefix as'
          ' config.retriever has them), or point to another folder.'
      )


def read_metadata(directory: paths.Address) -> dict[str, Any]:
  """What an index says of itself: format, fingerprints, parameters.

  Raises:
    ValueError: the folder holds no index, or one of another format.
  """
  directory = paths.Path(directory)
  try:
    metadata = json.loads((directory / _METADATA).read_text())
  except FileNotFoundError:
    raise ValueError(
        f'{directory} holds no index: {_METADATA} is missing. Build one with'
        f' `python -m stepsearch.build_index --output={directory}`.'
    ) from None
  except json.JSONDecodeError as error:
    raise ValueError(
        f'{directory / _METADATA} is not JSON ({error}): delete the folder and'
        ' build the index again.'
    ) from None
  if metadata.get('format') != _FORMAT:
    raise ValueError(
        f'{directory / _METADATA} has format {metadata.get("format")}, this'
        f' version reads format {_FORMAT}: build the index again.'
    )
  return metadata


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
  """Columns of the k largest entries of each row, [m, k]; of equals the first.

  Equal means to 1e-6: a product of matrices rounds equal columns differently.
  """
  bounds = np.partition(scores, -k, axis=1)[:, -k] - 1e-6
  columns = np.empty([len(scores), k], np.int64)
  for row, bound, chosen in zip(scores, bounds, columns):
    found = np.flatnonzero(row >= bound)
    order = np.argsort(-row[found].round(6), kind='stable')[:k]
    chosen[:] = found[order]
  return columns


def _scann(backend: str):
  """Returns ScaNN's module, or None where numpy is to search."""
  if backend not in BACKENDS:
    raise ValueError(
        f"The index backend '{backend}' is unknown: use one of"
        f' {", ".join(BACKENDS)}.'
    )
  if backend == 'exact':
    return None
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  # ScaNN imports TensorFlow if it can, for ops that are not used here: seven
  # CPU seconds, and a failure with releases it was not built against.
  hidden = 'tensorflow' not in sys.modules
  if hidden:
    sys.modules['tensorflow'] = None
  try:
    with _quiet():
      from scann.scann_ops.py import scann_ops_pybind
  except ImportError as error:
    if backend == 'scann':
      raise ValueError(
          f"The index backend 'scann' cannot be imported here ({error}):"
          " `pip install scann`, or use backend 'exact' or 'auto'."
      ) from error
    print('ScaNN is not installed: searching exactly, with numpy.', flush=True)
    return None
  finally:
    if hidden:
      del sys.modules['tensorflow']
  return scann_ops_pybind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back what native code writes to stderr; shows it on an exception.

  ScaNN reports its progress through its own copy of absl's C++ log, which no
  variable silences, so the file descriptor itself is turned away meanwhile.
  """
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except Exception:
      os.dup2(saved, 2)
      held.seek(0)
      os.write(2, held.read())
      raise
    finally:
      os.dup2(saved, 2)
      os.close(saved)
