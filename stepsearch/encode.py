"""Encodes a large corpus, by any number of processes that may be killed.

    python -m stepsearch.encode --corpus=… --embedder=… --output=DIR --shard=p/P
    python -m stepsearch.build_index --vectors=DIR --corpus=… --output=INDEX

Each process encodes every P-th file of DIR and uses all of its machine's
accelerators. The same command goes on where a killed one has stopped, with
another P too; DIR may be gs://.
"""

from __future__ import annotations

import re
import time

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch.data import datasets
from stepsearch.retrieval import encoders
from stepsearch.retrieval import encoding


def run(
    corpus: str,
    embedder: str,
    output: str,
    *,
    shard: tuple[int, int] = (0, 1),
    rows: int = 16_384,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
) -> encoding.Plan:
  """Encodes one process' share of a corpus, or what is missing of it.

  Args:
    corpus: as of `datasets.read_corpus`.
    embedder: the folder of an encoder.
    output: the folder that receives the vectors.
    shard: (p, P): the share.
    rows: passages a file.
    query_prefix: of the encoder, as of `encoders.load`.
    passage_prefix: of the encoder, as of `encoders.load`.

  Raises:
    ValueError: a bad corpus or encoder, or a folder of other vectors.
  """
  config_lib.check_workdir(output, 'output')
  try:
    made = encoders.load(
        embedder, query_prefix=query_prefix, passage_prefix=passage_prefix)
  except ValueError as error:
    raise ValueError(
        f'--embedder={embedder} is no usable encoder: {error}') from error
  documents = datasets.read_corpus(corpus)
  print(f'{len(documents):,} passages in {corpus}', flush=True)
  print(made.fingerprint, flush=True)
  start = time.monotonic()

  def on_file(done, files, encoded):
    line = f'{done}/{files} files'
    if encoded:
      speed = encoded / (time.monotonic() - start)
      left = (files - done) * rows / speed
      line += (f' | {speed:,.1f} passages/s | ETA {left // 3600:.0f}:'
               f'{left % 3600 // 60:02.0f}:{left % 60:02.0f}')
    elif done:
      line += ' were there'
    print(line, flush=True)

  plan = encoding.encode(
      documents, made, output, rows=rows, shard=shard, on_file=on_file)
  print(f'process {shard[0]} of {shard[1]} is done: {output}', flush=True)
  return plan


def _main(corpus, embedder, output, shard, rows, **prefixes):
  match = re.fullmatch(r'(\d+)/([1-9]\d*)', shard)
  if match is None or int(match[1]) >= int(match[2]):
    raise ValueError(
        f'--shard={shard}: p/P is expected, process p of P, counted from 0.')
  assembly.tune_host()
  run(corpus, embedder, output, shard=(int(match[1]), int(match[2])),
      rows=rows, **prefixes)


if __name__ == '__main__':
  from absl import flags

  _CORPUS = flags.DEFINE_string('corpus', None, 'Passages.', required=True)
  _EMBEDDER = flags.DEFINE_string(
      'embedder', None, 'Folder of an encoder.', required=True)
  _OUTPUT = flags.DEFINE_string(
      'output', None, 'Folder that receives the vectors.', required=True)
  _SHARD = flags.DEFINE_string(
      'shard', '0/1', 'p/P: what process p of P encodes, counted from 0.')
  _ROWS = flags.DEFINE_integer(
      'rows', 16_384, 'Passages a file: what a kill may cost.', lower_bound=1)
  _QUERY_PREFIX = flags.DEFINE_string(
      'query_prefix', None, "Of the encoder's queries; default: its own.")
  _PASSAGE_PREFIX = flags.DEFINE_string(
      'passage_prefix', None, "Of the encoder's passages; default: its own.")
  config_lib.main(
      lambda: _main(
          _CORPUS.value, _EMBEDDER.value, _OUTPUT.value, _SHARD.value,
          _ROWS.value, query_prefix=_QUERY_PREFIX.value,
          passage_prefix=_PASSAGE_PREFIX.value),
      takes_config=False)
