"""Builds the retrieval index of a corpus ahead of training.

    python -m stepsearch.build_index --corpus=corpus.jsonl --output=DIR

Training and evaluation load DIR and refuse it for another corpus or other
embedder settings (embedder, dimensions and prefixes of config.retriever).
Building ends with a comparison of the index against exact search, on titles of
the corpus as queries. --shard=3/16 builds DIR/shard-00003-of-00016, what
process 3 of 16 loads with config.retriever.placement=sharded.

    python -m stepsearch.build_index --method=bm25 --corpus=… --output=DIR-bm25

builds that of config.retriever.method=bm25 or fusion. A corpus too large to be
embedded in one go is encoded by `python -m stepsearch.encode` first:

    python -m stepsearch.build_index --vectors=VECTORS --corpus=… --output=DIR
    python -m stepsearch.build_index --estimate=21015324x768

The last prints what an index of so many passages and coordinates would take.
"""

from __future__ import annotations

import re
import time

import numpy as np

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch.data import datasets
from stepsearch.retrieval import bm25
from stepsearch.retrieval import embed
from stepsearch.retrieval import encoding
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import memory
from stepsearch.retrieval import retriever as retrieval

_SAMPLE = 200
_LOW_RECALL = 0.95


def run(
    corpus: str,
    output: str,
    *,
    method: str = 'dense',
    vectors: str | None = None,
    embedder: str = 'lexical',
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    dimensions: int = 2048,
    index: str = 'auto',
    shard: tuple[int, int] = (0, 1),
    **parameters,
) -> float | None:
  """Builds and saves an index, replacing one that is at `output`.

  Args:
    corpus: as of `datasets.read_corpus`.
    output: the folder to write.
    method: dense | bm25; the other arguments are of dense.
    vectors: what `stepsearch.encode` has filled; None: embed here.
    embedder: 'lexical', or the folder of an encoder.
    query_prefix: of the encoder, as of `encoders.load`.
    passage_prefix: of the encoder, as of `encoders.load`.
    dimensions: of the lexical embedder.
    index: backend, as of `retrieval.index.build`.
    shard: (p, P): build the p-th of P shards, in a folder in `output`.
    **parameters: of `retrieval.index.build`.

  Returns:
    The share of exact search's ten nearest that the index finds; None of BM25.
  """
  start = time.monotonic()
  documents = datasets.read_corpus(corpus)
  print(f'{len(documents)} documents in {corpus}', flush=True)
  if method == 'bm25':
    built = bm25.build(
        documents, directory=output, replace=True, progress=_progress('read'))
    print(f'{built.parameters} saved to {output}')
    print(f'done in {time.monotonic() - start:.0f} s')
    return None
  output = retrieval.shard_directory(output, shard)
  if vectors is None:
    made = _embedder(embedder, query_prefix, passage_prefix, dimensions)
    rows = None
  else:
    made = _encoded(vectors, documents)
    rows = encoding.gather(vectors, shard)
  print(made.fingerprint, flush=True)
  built = retrieval.build(
      documents,
      embedder=made,
      index=index,
      directory=output,
      replace=True,
      shard=shard,
      progress=_progress('embedded'),
      vectors=rows,
      **parameters,
  )
  print(f'{built.index.parameters} saved to {output}', flush=True)
  recall = _recall(
      retrieval.load(output, embedder=made, index=index),
      embeds=vectors is None)
  print(f'recall@10 against exact search: {recall:.4f}')
  if recall < _LOW_RECALL:
    print(
        f'This is below {_LOW_RECALL}: raise --reorder'
        ' or --leaves_to_search and build again.'
    )
  print(f'done in {time.monotonic() - start:.0f} s')
  return recall


def _progress(verb):
  """Prints how far it is, once a second."""
  start = shown = time.monotonic()

  def progress(done: int, total: int):
    nonlocal shown
    now = time.monotonic()
    if now - shown > 1 or done == total:
      shown = now
      left = (now - start) / done * (total - done)
      print(
          f'{verb} {done}/{total} ({done / total:.0%}), {left:.0f} s left',
          flush=True,
      )

  return progress


def _encoded(vectors, documents):
  """What stands for the encoder of `vectors`, which must be of the corpus."""
  plan = encoding.read_plan(vectors)
  found = retrieval.corpus_fingerprint(documents)
  if plan.corpus != found:
    raise ValueError(
        f'--vectors={vectors} are of another corpus: of "{plan.corpus}", but'
        f' --corpus has "{found}".')
  return encoding.Encoded(plan.dimensions, plan.embedder)


def _embedder(name, query_prefix, passage_prefix, dimensions):
  if name == 'lexical':
    if query_prefix is not None or passage_prefix is not None:
      raise ValueError(
          '--query_prefix and --passage_prefix belong to an encoder: leave them'
          ' out, or name its folder by --embedder.'
      )
    return embed.LexicalEmbedder(dimensions)
  # Here, because the lexical embedder needs no jax.
  from stepsearch.retrieval import encoders

  try:
    return encoders.load(
        name, query_prefix=query_prefix, passage_prefix=passage_prefix
    )
  except ValueError as error:
    raise ValueError(
        f"--embedder={name} is neither 'lexical' nor a usable encoder: {error}"
    ) from error


def _recall(built: retrieval.Retriever, embeds: bool) -> float:
  """Share of exact search's nearest among the index' own, on a sample.

  Queries are titles, or passages where the encoder is not there.
  """
  k = min(10, len(built))
  size = min(_SAMPLE, len(built))
  chosen = np.random.default_rng(0).choice(len(built), size, replace=False)
  queries = built.embedder.embed_queries(
      [built.documents[i].title or built.documents[i].text for i in chosen]
  ) if embeds else built.index.vectors[chosen]
  exact = indexing.Index(built.index.vectors, built.index.parameters)
  wanted, _ = exact.exact_search(queries, k)
  found, _ = built.index.search(queries, k)
  return float(
      np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found)])
  )


def _check(method, vectors, shard, embedder, **_):
  if method == 'bm25' and (vectors or embedder != 'lexical' or shard[1] > 1):
    raise ValueError(
        '--method=bm25 takes no --embedder, --vectors or --shard: leave them'
        ' out.')
  if vectors and embedder != 'lexical':
    raise ValueError(
        f'--embedder={embedder}: --vectors={vectors} have been made with an'
        ' encoder already, which is not needed here: leave it out.')


def _main(estimate: str | None, shard: str, **arguments):
  if estimate is not None:
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', estimate)
    if match is None:
      raise ValueError(
          f'--estimate={estimate}: PASSAGESxDIMENSIONS is expected, such as'
          ' 21015324x768.'
      )
    print(memory.table(int(match[1]), int(match[2])))
    return
  for name in ('corpus', 'output'):
    if not arguments[name]:
      raise ValueError(f'--{name} is missing: both --corpus and --output are'
                       ' needed, or --estimate alone.')
  match = re.fullmatch(r'(\d+)/([1-9]\d*)', shard)
  if match is None or int(match[1]) >= int(match[2]):
    raise ValueError(
        f'--shard={shard}: p/P is expected, shard p of P, counted from 0.'
    )
  arguments['shard'] = int(match[1]), int(match[2])
  _check(**arguments)
  assembly.tune_host()
  run(**arguments)


if __name__ == '__main__':
  from absl import flags

  _CORPUS = flags.DEFINE_string('corpus', None, 'Corpus, JSON lines.')
  _OUTPUT = flags.DEFINE_string(
      'output', None, 'Folder to write; an index in it is replaced.'
  )
  _SHARD = flags.DEFINE_string(
      'shard', '0/1', 'p/P: build shard p of P only, counted from 0.'
  )
  _ESTIMATE = flags.DEFINE_string(
      'estimate', None,
      'PASSAGESxDIMENSIONS: print what an index would take, and stop.',
  )
  _METHOD = flags.DEFINE_enum(
      'method', 'dense', ('dense', 'bm25'), 'Vectors, or words.')
  _VECTORS = flags.DEFINE_string(
      'vectors', None, 'Folder that stepsearch.encode has filled.')
  _EMBEDDER = flags.DEFINE_string(
      'embedder', 'lexical', "'lexical', or the folder of an encoder."
  )
  _QUERY_PREFIX = flags.DEFINE_string(
      'query_prefix', None, "Of the encoder's queries; default: its own."
  )
  _PASSAGE_PREFIX = flags.DEFINE_string(
      'passage_prefix', None, "Of the encoder's passages; default: its own."
  )
  _DIMENSIONS = flags.DEFINE_integer(
      'dimensions', 2048, 'Width of the lexical vectors.', lower_bound=1
  )
  _INDEX = flags.DEFINE_enum(
      'index', 'auto', indexing.BACKENDS, 'Search by ScaNN or numpy.'
  )
  _EXACT_BELOW = flags.DEFINE_integer(
      'exact_below', 20_000, 'Largest corpus that is searched exactly.'
  )
  _TREE_ABOVE = flags.DEFINE_integer(
      'tree_above', 100_000, 'Largest corpus that is not partitioned.'
  )
  _LEAVES = flags.DEFINE_integer(
      'leaves_to_search', None, 'Partitions searched; default: a fifth.'
  )
  _REORDER = flags.DEFINE_integer(
      'reorder', 300, 'Candidates scored again with the vectors themselves.'
  )
  _REORDER_DTYPE = flags.DEFINE_enum(
      'reorder_dtype', 'float32', indexing.REORDER_DTYPES,
      'Of the copy of the vectors that they are scored with.'
  )

  config_lib.main(
      lambda: _main(
          _ESTIMATE.value,
          _SHARD.value,
          corpus=_CORPUS.value,
          output=_OUTPUT.value,
          method=_METHOD.value,
          vectors=_VECTORS.value,
          embedder=_EMBEDDER.value,
          query_prefix=_QUERY_PREFIX.value,
          passage_prefix=_PASSAGE_PREFIX.value,
          dimensions=_DIMENSIONS.value,
          index=_INDEX.value,
          exact_below=_EXACT_BELOW.value,
          tree_above=_TREE_ABOVE.value,
          leaves_to_search=_LEAVES.value,
          reorder=_REORDER.value,
          reorder_dtype=_REORDER_DTYPE.value,
      ),
      takes_config=False,
  )
