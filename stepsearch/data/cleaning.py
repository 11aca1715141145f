"""Articles → passages: cut, cleaned, each title and text once.

    files of {id, title, text} ─ cut ─▶ pieces ─ by a hash of title and text ─▶
      buckets ─ finish ─▶ rows in order ─▶ one file of JSON lines

Equal pieces share a bucket, so that buckets are finished apart: one after the
other here, or by the workers of an Apache Beam pipeline. Both write the same
bytes. Of equal pieces the one with the smallest id stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import tempfile
import unicodedata

from stepsearch import passages
from stepsearch import paths
from stepsearch.data import rows
from stepsearch.types import Document

# In memory together are the pieces of one bucket: of wiki-18's 14 GB, 55 MB.
BUCKETS = 256
_EMPTY = 'empty'  # the bucket of articles without a word


@dataclasses.dataclass(frozen=True)
class Counts:
  """What became of articles; adds up to all pieces and articles read."""

  passages: int = 0
  repeated: int = 0  # pieces whose title and text another has
  empty: int = 0  # articles without text

  def __add__(self, other: Counts) -> Counts:
    return Counts(*(
        a + b for a, b in zip(
            dataclasses.astuple(self), dataclasses.astuple(other))))


def cut(article: Document, words: int) -> list[Document]:
  """An article as pieces of so many words, the last one what is left.

  Text is composed (NFC) and white space becomes one space. The ids are that of
  the article and a number, 12/0, 12/1, …
  """
  title, text = (
      unicodedata.normalize('NFC', field).split()
      for field in (article.title, article.text))
  return [
      Document(f'{article.id}/{i}', ' '.join(title),
               ' '.join(text[start:start + words]))
      for i, start in enumerate(range(0, len(text), words))]


def articles(path: paths.Address) -> Iterator[Document]:
  """The articles of a file of JSON lines, also packed; texts may be empty.

  Raises:
    ValueError: malformed rows, after the last one.
  """
  faults = rows.Faults(path)
  for row in rows.read(path, faults):
    try:
      yield Document(
          row.id(), row.text('title', blank=True), row.text('text', blank=True))
    except rows.Fault as fault:
      faults.add(fault)
  faults.check()


def finish(pieces: Iterable[Document]) -> tuple[list[str], Counts]:
  """The rows of one bucket, and what it held."""
  read = sorted(pieces, key=_order)
  kept: dict[tuple[str, str], Document] = {}
  for piece in read:
    kept.setdefault((piece.title, piece.text), piece)
  return (
      [passages.line(piece) for piece in kept.values()],
      Counts(len(kept), len(read) - len(kept)))


def clean(
    files: Sequence[str], output: paths.Address, words: int = 100,
    on_bucket: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
  """Writes the passages of articles to a file, in this process.

  Args:
    files: as of `articles`.
    output: receives JSON lines; as much room is needed once more, beside it.
    words: of a passage.
    on_bucket: called with (buckets finished, of them all).

  Raises:
    ValueError: as of `articles`.
  """
  counts = Counts()
  beside = None
  if not paths.is_remote(output):
    beside = pathlib.Path(output).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
  with (tempfile.TemporaryDirectory(dir=beside) as folder,
        contextlib.ExitStack() as stack):
    names = [pathlib.Path(folder) / str(i) for i in range(BUCKETS)]
    buckets = [
        stack.enter_context(open(name, 'w+', encoding='utf-8'))
        for name in names]
    for bucket, piece in _all_pieces(files, words):
      if bucket == _EMPTY:
        counts += Counts(empty=1)
      else:
        buckets[bucket].write(passages.line(piece))
    with paths.replacing(output) as out:
      for i, bucket in enumerate(buckets, 1):
        bucket.seek(0)
        lines, found = finish(
            passages.document(json.loads(line)) for line in bucket)
        out.write(''.join(lines).encode())
        counts += found
        on_bucket(i, BUCKETS)
  return counts


def clean_by_beam(
    files: Sequence[str], output: paths.Address, words: int = 100,
    options: Sequence[str] = (),
) -> Counts:
  """As `clean`, by an Apache Beam pipeline whose workers share the files.

  Args:
    files: as of `articles`, where all workers can read them.
    output: receives JSON lines; beside it, a folder for the workers' parts,
      where all of them can write.
    words: of a passage.
    options: of the pipeline, as on a command line: --runner=…

  Raises:
    ValueError: Beam is not installed.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise ValueError(
        f'Apache Beam cannot be imported ({error}): pip install -r '
        'launch/requirements-beam.txt, in an environment of its own, or leave '
        '--beam out.') from error
  parts = paths.Path(f'{output}.parts')
  with beam.Pipeline(
      options=pipeline_options.PipelineOptions(list(options))) as pipeline:
    _ = (
        pipeline
        | beam.Create(list(files))
        | beam.Reshuffle()
        | beam.FlatMap(functools.partial(_pieces, words=words))
        | beam.GroupByKey()
        | beam.Map(functools.partial(_write_part, parts=str(parts))))
  counts = Counts()
  with paths.replacing(output) as out:
    for bucket in (*range(BUCKETS), _EMPTY):
      part = parts / f'{bucket}.jsonl'
      if part.exists():
        first, _, lines = part.read_bytes().partition(b'\n')
        counts += Counts(**json.loads(first))
        out.write(lines)
  parts.rmtree()
  return counts


def _write_part(keyed, parts):
  """Finishes a bucket, in a worker: a row of counts, then those of passages."""
  bucket, pieces = keyed
  if bucket == _EMPTY:
    lines, counts = [], Counts(empty=sum(1 for _ in pieces))
  else:
    lines, counts = finish(pieces)
  head = json.dumps(dataclasses.asdict(counts)) + '\n'
  paths.write(paths.Path(parts) / f'{bucket}.jsonl', ''.join([head, *lines]))


def _all_pieces(files, words):
  for path in files:
    yield from _pieces(path, words)


def _pieces(
    path: str, words: int
) -> Iterator[tuple[int | str, Document | None]]:
  """Pieces of a file with their buckets."""
  for article in articles(path):
    pieces = cut(article, words)
    if not pieces:
      yield _EMPTY, None
    for piece in pieces:
      digest = hashlib.blake2b(
          json.dumps([piece.title, piece.text]).encode(), digest_size=4)
      yield int.from_bytes(digest.digest()) % BUCKETS, piece


def _order(piece: Document) -> tuple[str, int]:
  article, _, number = piece.id.rpartition('/')
  return article, int(number)
