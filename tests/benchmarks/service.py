"""What HTTP costs a search, and what joining requests saves.

    python -m tests.benchmarks.service --corpus=corpus.jsonl

Searches the titles of a corpus, by a lexical index of 1,024 dimensions: here in
this process, through a server on loopback (a process of its own) in calls of
64, and through it one by one from 32 threads, with requests joined and not.
Medians of alternating rounds, and the answers are compared.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import contextlib
import multiprocessing
import pathlib
import statistics
import tempfile
import time

from stepsearch.data import datasets
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service


def _serve(folder, batch, lines):
  service._BATCH = batch
  service.serve(retriever.load(folder), port=0, say=lines.send)


@contextlib.contextmanager
def _server(folder, batch):
  """The client of a server that joins up to so many queries."""
  here, there = multiprocessing.Pipe()
  context = multiprocessing.get_context('spawn')
  process = context.Process(target=_serve, args=(folder, batch, there))
  process.start()
  try:
    yield service.Remote(here.recv().split('/retrieve')[0])
  finally:
    process.terminate()
    process.join()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--corpus', required=True, type=pathlib.Path)
  parser.add_argument('--queries', type=int, default=512)
  parser.add_argument('--rounds', type=int, default=5)
  flags = parser.parse_args()
  corpus = datasets.read_corpus(flags.corpus)
  queries = [d.title for d in corpus[:: len(corpus) // flags.queries]]
  queries = queries[: flags.queries // 64 * 64]
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    engine = retriever.build(
        corpus, directory=pathlib.Path(folder) / 'index', dimensions=1024)
    joined, single = (
        stack.enter_context(_server(pathlib.Path(folder) / 'index', batch))
        for batch in (service._BATCH, 1))
    pool = stack.enter_context(futures.ThreadPoolExecutor(32))

    def by_calls(asked):
      parts = [queries[i : i + 64] for i in range(0, len(queries), 64)]
      return [row for part in parts for row in asked.search(part, 3)]

    def one_by_one(asked):
      return list(pool.map(lambda q: asked.search([q], 3)[0], queries))

    ways = {
        'in this process, 64 a call': lambda: by_calls(engine),
        'over HTTP, 64 a call': lambda: by_calls(joined),
        'over HTTP, one a call, 32 at once, joined': lambda: one_by_one(joined),
        'the same, not joined': lambda: one_by_one(single)}
    answers = {name: way() for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(flags.rounds):
      for name, way in ways.items():
        start = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - start)
  here = answers['in this process, 64 a call']
  print(f'{len(corpus):,} passages; the answers are '
        + ('equal' if all(a == here for a in answers.values()) else 'UNEQUAL'))
  for name, taken in seconds.items():
    print(f'{name}: {len(queries) / statistics.median(taken):,.0f} queries/s')


if __name__ == '__main__':
  main()
