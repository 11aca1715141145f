"""Queries a second of our indexes against faiss' flat one, in one run.

    python -m tests.benchmarks.retrieval [--index=DIR] [--threads=2]

Searches the vectors of a saved dense index, or random ones of --size x
--dimensions, for the ten nearest of --queries, 256 a call: vectors that have
been moved at random by as much as they are long. Rounds of all arms alternate,
programs are warm, and all are held to the same cores. `exact` is what our exact
regime runs (the product, then float64 for the best), by numpy and by ScaNN;
`hashed` and `tree` are approximate. faiss is measured as it is set, by its own
kernels at this size of a batch, and told to multiply by BLAS. Medians of the
rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

K, BATCH = 10, 256


def _vectors(arguments):
  import numpy as np

  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  if arguments.index:
    vectors = np.load(os.path.join(arguments.index, 'dataset.npy'))
  else:
    vectors = unit(rng.normal(
        size=(arguments.size, arguments.dimensions)).astype(np.float32))
  chosen = vectors[rng.integers(0, len(vectors), arguments.queries)]
  moved = unit(rng.normal(size=chosen.shape).astype(np.float32))
  return vectors, unit(chosen + moved).astype(np.float32)


def main():
  """Prints a line an arm."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--index', help='folder of a dense index')
  parser.add_argument('--size', type=int, default=100_000)
  parser.add_argument('--dimensions', type=int, default=384)
  parser.add_argument('--queries', type=int, default=2048)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--threads', type=int, default=2)
  arguments = parser.parse_args()
  # Before the libraries count the cores.
  cores = sorted(os.sched_getaffinity(0))[:arguments.threads]
  os.sched_setaffinity(0, cores)
  for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[name] = str(len(cores))

  import faiss
  import numpy as np

  from stepsearch.retrieval import index as indexing

  vectors, queries = _vectors(arguments)
  faiss.omp_set_num_threads(len(cores))
  flat = faiss.IndexFlatIP(vectors.shape[1])
  flat.add(vectors)
  size = len(vectors)
  hashed = dict(backend='scann', exact_below=0)
  ours = {
      'exact, numpy': indexing.build(vectors, backend='exact'),
      'exact, ScaNN': indexing.build(
          vectors, backend='scann', exact_below=size),
      'hashed, ScaNN': indexing.build(vectors, tree_above=size, **hashed),
      'tree, ScaNN': indexing.build(vectors, tree_above=0, **hashed)}

  def by_blas(q):
    kept = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20
    try:
      return flat.search(q, K)[1]
    finally:
      faiss.cvar.distance_compute_blas_threshold = kept

  arms = {
      'faiss, IndexFlatIP': lambda q: flat.search(q, K)[1],
      'faiss, by BLAS': by_blas} | {
      name: lambda q, index=index: index.search(q, K)[0]
      for name, index in ours.items()}
  batches = [queries[i:i + BATCH] for i in range(0, len(queries), BATCH)]
  taken, found = {name: [] for name in arms}, {}
  for turn in range(arguments.rounds + 1):
    for name, search in arms.items():
      start, cpu = time.perf_counter(), time.process_time()
      found[name] = np.concatenate([search(batch) for batch in batches])
      if turn:  # the first one warms up
        taken[name].append(
            (time.perf_counter() - start, time.process_time() - cpu))
  reference = found['faiss, IndexFlatIP']
  print(f'{size:,} vectors of {vectors.shape[1]}, {len(queries):,} queries in '
        f'calls of {BATCH}, k = {K}, {len(cores)} cores, medians of '
        f'{arguments.rounds} alternating rounds')
  for name, seconds in taken.items():
    wall, cpu = (statistics.median(column) for column in zip(*seconds))
    overlap = np.mean([
        np.isin(a, b).mean() for a, b in zip(reference, found[name])])
    print(f'  {name:20}{len(queries) / wall:10,.0f} queries/s'
          f'{len(queries) / cpu:10,.0f} a CPU second'
          f'   overlap@{K} with faiss {overlap:.4f}', flush=True)


if __name__ == '__main__':
  main()
