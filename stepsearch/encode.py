"""Encodes a large corpus, by any number of processes that may be killed.

    python -m stepsearch.encode --corpus=… --embedder=… --output=DIR --shard=p/P
    python -m stepsearch.build_index --vectors=DIR --corpus=… --output=INDEX

Each process encodes every P-th file of DIR and uses all of its machine's
accelerators. The same command goes on where a killed one has stopped, with
another P too; DIR may be gs://.

    python -m stepsearch.encode --estimate=21015324 --topology=v5e:4x4

says how long it would take there, of E5-base or of --embedder.
"""

from __future__ import annotations

import math
import re
import time

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import costs
from stepsearch import topology
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


def estimate(
    passages: int, name: str, embedder: str | None = None, tokens: int = 144,
) -> dict[str, float]:
  """What encoding so many passages takes on a TPU slice, by its compiler.

  Args:
    passages: how many.
    name: of the slice, as of `topology.split`.
    embedder: as of `run`; None: the shape of E5-base-v2.
    tokens: of a passage; a batch is as wide as `encoders.width` makes it.

  Returns:
    `flops` a passage; `least`, hours if the slowest of arithmetic and memory
    went at the chip's full rate; `compiler`, hours by the compiler's estimate.
    The host is assumed to keep up.

  Raises:
    ValueError: no such slice or encoder, or no TPU compiler.
  """
  generation, shape = topology.split(name)
  chips, chip = math.prod(shape), costs.CHIPS[generation]
  # Chips share nothing: those of one host do.
  devices = topology.devices(topology.host(name))
  tokens = encoders.width(tokens)
  _, lower = encoders.lower(embedder, devices, tokens)
  cost = costs.cost(lower().compile().as_text())
  rows = encoders.batch_rows(tokens)
  least, bound = costs.roofline(cost, chip)
  batches = passages / rows / chips / 3600
  found = {
      'flops': cost.flops / rows, 'least': least * batches,
      'compiler': cost.cycles / chip.clock * batches}
  print(
      f'{embedder or "the shape of E5-base"}, {tokens} tokens a passage: '
      f'{found["flops"] / 1e9:.1f} GFLOPs a passage, batches of {rows} a chip')
  for kind, note in (
      ('least', f'at least, bound by {bound}'),
      ('compiler', "by the compiler's estimate")):
    print(
        f'{passages:,} passages on {name}: {found[kind]:.2f} h {note}, '
        f'{passages / found[kind] / 3600 / chips:,.0f} passages/s a chip, '
        f'{found[kind] * chips:.1f} chip-hours')
  return found


def _main(
    passages, slice_name, corpus, embedder, output, shard, rows, **prefixes):
  if passages is not None:
    estimate(passages, slice_name, embedder)
    return
  for name, value in dict(
      corpus=corpus, embedder=embedder, output=output).items():
    if not value:
      raise ValueError(
          f'--{name} is missing: --corpus, --embedder and --output are needed,'
          ' or --estimate alone.')
  match = re.fullmatch(r'(\d+)/([1-9]\d*)', shard)
  if match is None or int(match[1]) >= int(match[2]):
    raise ValueError(
        f'--shard={shard}: p/P is expected, process p of P, counted from 0.')
  assembly.tune_host()
  run(corpus, embedder, output, shard=(int(match[1]), int(match[2])),
      rows=rows, **prefixes)


if __name__ == '__main__':
  from absl import flags

  _CORPUS = flags.DEFINE_string('corpus', None, 'Passages.')
  _EMBEDDER = flags.DEFINE_string('embedder', None, 'Folder of an encoder.')
  _OUTPUT = flags.DEFINE_string(
      'output', None, 'Folder that receives the vectors.')
  _SHARD = flags.DEFINE_string(
      'shard', '0/1', 'p/P: what process p of P encodes, counted from 0.')
  _ROWS = flags.DEFINE_integer(
      'rows', 16_384, 'Passages a file: what a kill may cost.', lower_bound=1)
  _QUERY_PREFIX = flags.DEFINE_string(
      'query_prefix', None, "Of the encoder's queries; default: its own.")
  _PASSAGE_PREFIX = flags.DEFINE_string(
      'passage_prefix', None, "Of the encoder's passages; default: its own.")
  _ESTIMATE = flags.DEFINE_integer(
      'estimate', None, 'Passages: print how long they would take, and stop.',
      lower_bound=1)
  _TOPOLOGY = flags.DEFINE_string(
      'topology', 'v5e:4x4', 'TPU slice of --estimate, in chips.')
  config_lib.main(
      lambda: _main(
          _ESTIMATE.value, _TOPOLOGY.value, _CORPUS.value, _EMBEDDER.value,
          _OUTPUT.value, _SHARD.value, _ROWS.value,
          query_prefix=_QUERY_PREFIX.value,
          passage_prefix=_PASSAGE_PREFIX.value),
      takes_config=False)
