"""Vectors of a large corpus, by any number of processes that may be killed.

    passages ─ cut into files of so many ─▶ process p of P encodes files p::P
      ─▶ DIR/vectors-00000-of-01283.npy, …, DIR/plan.json ─ `gather` ─▶ [n, d]

A file appears whole or not at all, on disk and in a store, and is the same
whoever writes it: a job goes on with the files that are missing, with as many
processes as there are then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import io
import json

import numpy as np

from stepsearch import paths
from stepsearch.retrieval import embed
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever
from stepsearch.types import Document

_PLAN = 'plan.json'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a folder of vectors holds; written to its plan.json.

  Attributes:
    corpus: fingerprint of the passages, `retriever.corpus_fingerprint`.
    embedder: fingerprint of the encoder.
    size: passages.
    dimensions: of a vector.
    rows: passages a file, but for the last.
  """

  corpus: str
  embedder: str
  size: int
  dimensions: int
  rows: int

  @property
  def files(self) -> list[str]:
    """Names of the files, in the order of the passages."""
    count = -(-self.size // self.rows)
    return [f'vectors-{i:05}-of-{count:05}.npy' for i in range(count)]

  def span(self, file: int) -> range:
    """The passages of a file."""
    return range(
        file * self.rows, min((file + 1) * self.rows, self.size))


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Stands for the encoder where its vectors are there already."""

  dimensions: int
  fingerprint: str


def encode(
    documents: Sequence[Document],
    embedder: embed.Embedder,
    directory: paths.Address,
    *,
    rows: int,
    shard: tuple[int, int] = (0, 1),
    on_file: Callable[[int, int, int], None] = lambda *_: None,
) -> Plan:
  """Encodes what is missing of one process' files.

  Args:
    documents: the whole corpus.
    embedder: an encoder.
    directory: receives the files; on disk or gs://.
    rows: passages a file.
    shard: (p, P): take the files p::P.
    on_file: called at first and after each file with (files of this process
      that are there, all of them, passages encoded by this call).

  Returns:
    The plan.

  Raises:
    ValueError: the folder is of another corpus, encoder or size of files.
  """
  plan = Plan(
      retriever.corpus_fingerprint(documents), embedder.fingerprint,
      len(documents), embedder.dimensions, rows)
  directory = paths.Path(directory)
  _agree(plan, directory)
  present = _present(directory)
  mine = list(enumerate(plan.files))[shard[0]::shard[1]]
  missing = [(i, name) for i, name in mine if name not in present]
  encoded = 0
  on_file(len(mine) - len(missing), len(mine), encoded)
  for done, (i, name) in enumerate(missing, len(mine) - len(missing) + 1):
    texts = [retriever.passage_text(documents[row]) for row in plan.span(i)]
    vectors = np.ascontiguousarray(embedder.embed_passages(texts), np.float32)
    with paths.replacing(directory / name) as file:
      np.save(file, vectors, allow_pickle=False)
    encoded += len(texts)
    on_file(done, len(mine), encoded)
  return plan


def read_plan(directory: paths.Address) -> Plan:
  """What a folder of vectors is of.

  Raises:
    ValueError: it is no such folder.
  """
  file = paths.Path(directory) / _PLAN
  with paths.explained(file):
    if not file.exists():
      raise ValueError(
          f'{directory} holds no vectors: {_PLAN} is missing. Make them with'
          f' `python -m stepsearch.encode --output={directory}`.')
    text = file.read_text()
  try:
    return Plan(**json.loads(text))
  except (TypeError, ValueError) as error:
    raise ValueError(
        f'{file} is no plan ({error}): delete the folder and encode again.'
    ) from error


def gather(
    directory: paths.Address, shard: tuple[int, int] = (0, 1)
) -> np.ndarray:
  """The vectors of the passages p::P, [n, d] float32, in memory.

  Args:
    directory: what `encode` has filled.
    shard: (p, P).

  Raises:
    ValueError: files are missing, or one is damaged.
  """
  plan = read_plan(directory)
  directory = paths.Path(directory)
  present = _present(directory)
  absent = [name for name in plan.files if name not in present]
  if absent:
    raise ValueError(
        f'{directory}: {len(absent)} of {len(plan.files)} files are missing,'
        f' {absent[0]} first: run `python -m stepsearch.encode` again, which'
        ' goes on with them.')
  p, count = shard
  vectors = np.empty(
      [len(range(p, plan.size, count)), plan.dimensions], np.float32)
  filled = 0
  for i, name in enumerate(plan.files):
    span = plan.span(i)
    part = _load(directory / name, (len(span), plan.dimensions))
    # The first row of the file that is p modulo P.
    part = part[(p - span.start) % count::count]
    vectors[filled:filled + len(part)] = part
    filled += len(part)
  return vectors


def _agree(plan, directory):
  """Writes the plan, or refuses a folder that has another."""
  file = directory / _PLAN
  with paths.explained(file):
    exists = file.exists()
  if not exists:
    # Several may start at once: they write the same.
    paths.write(file, json.dumps(dataclasses.asdict(plan), indent=2) + '\n')
    return
  found = read_plan(directory)
  for field in dataclasses.fields(Plan):
    before, now = (getattr(of, field.name) for of in (found, plan))
    if before != now:
      raise indexing.IndexMismatchError(
          f'{directory} holds vectors made with {field.name} = {before!r}, but'
          f' this run has {now!r}: give the same corpus and settings, or'
          ' another --output.')


def _present(directory) -> set[str]:
  with paths.explained(directory):
    return {file.name for file in directory.iterdir()}


def _load(path, shape) -> np.ndarray:
  with paths.explained(path):
    data = path.read_bytes()
  try:
    part = np.load(io.BytesIO(data), allow_pickle=False)
    problem = f'it holds {part.shape} {part.dtype}'
  except (ValueError, EOFError) as error:
    part, problem = None, str(error)
  if part is None or part.shape != shape or part.dtype != np.float32:
    raise ValueError(
        f'{path} is damaged ({problem}; {shape} float32 are expected): delete'
        ' it, and run `python -m stepsearch.encode` again.')
  return part
