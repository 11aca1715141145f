"""Serves a retriever over HTTP, as Search-R1's `/retrieve` does.

    python -m stepsearch.serve --index=DIR --port=8000
    python -m stepsearch.train --config.retriever.url=http://127.0.0.1:8000 …

DIR is what `build_index` or a run wrote, vectors or BM25, and holds its
passages. With --config instead, the engine is the one that config.retriever
describes, over the corpus of config.data; a user's own
(config.retriever.factory) too.
"""

from __future__ import annotations

import ml_collections

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch.retrieval import bm25
from stepsearch.retrieval import encoders
from stepsearch.retrieval import index as indexing
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service


def run(
    config: ml_collections.ConfigDict | None, index: str | None, *,
    host: str, port: int, encoder: str | None = None,
    query_prefix: str | None = None, passage_prefix: str | None = None,
) -> None:
  """Loads the engine and serves it until it is told to stop.

  Args:
    config: as of configs/default.py; None: `index` is served.
    index: folder of a saved index; None: the engine of `config`.
    host: address to listen on.
    port: port to listen on; 0 = any that is free.
    encoder: folder of the encoder that `index` was made with; None: lexical.
    query_prefix: of the encoder, as of `encoders.load`.
    passage_prefix: of the encoder, as of `encoders.load`.

  Raises:
    ValueError: not one of config and index, or nothing that can be served.
  """
  assembly.tune_host()
  if (config is None) == (index is None):
    raise ValueError(
        'give --index=DIR, a folder that stepsearch.build_index or a run has '
        'written, or --config=FILE, and not both.')
  if index is None:
    engine = assembly.retriever(config)
  else:
    engine = _load(index, encoder, query_prefix, passage_prefix)
  service.serve(engine, host, port, lambda line: print(line, flush=True))


def _load(index, encoder, query_prefix, passage_prefix):
  parameters = indexing.read_metadata(index)['parameters']
  if parameters['regime'] == indexing.BM25:
    if encoder is not None:
      raise ValueError(
          f'--embedder={encoder}: {index} holds a BM25 index, which needs none:'
          ' leave it out.')
    return bm25.load(index)
  embedder = None
  if encoder is not None:
    embedder = encoders.load(
        encoder, query_prefix=query_prefix, passage_prefix=passage_prefix)
  return retriever.load(index, embedder=embedder)


if __name__ == '__main__':
  from absl import flags

  _INDEX = flags.DEFINE_string(
      'index', None, 'Folder of a saved index, with its passages.')
  _EMBEDDER = flags.DEFINE_string(
      'embedder', None,
      'Folder of the encoder that the index was made with; default: lexical.')
  _QUERY_PREFIX = flags.DEFINE_string(
      'query_prefix', None, "Of the encoder's queries; default: its own.")
  _PASSAGE_PREFIX = flags.DEFINE_string(
      'passage_prefix', None, "Of the encoder's passages; default: its own.")
  _HOST = flags.DEFINE_string(
      'host', '127.0.0.1',
      'Address to listen on. There is no password: open others than loopback '
      'only to machines that you trust.')
  _PORT = flags.DEFINE_integer(
      'port', 8000, 'Port to listen on; 0 = any that is free.', lower_bound=0,
      upper_bound=65535)
  config_lib.main(
      lambda config: run(
          config, _INDEX.value, host=_HOST.value, port=_PORT.value,
          encoder=_EMBEDDER.value, query_prefix=_QUERY_PREFIX.value,
          passage_prefix=_PASSAGE_PREFIX.value),
      config_required=False)
