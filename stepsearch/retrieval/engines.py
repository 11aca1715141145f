"""Search engines by a short text, for commands that compare or ask several.

    lexical                      the hashed embedder of `retrieval.embed`
    bm25                         `retrieval.bm25`
    dense:ENCODER[@INDEX]        an encoder's folder; INDEX is what build_index
                                 made of the corpus with it
    fusion:bm25+dense:ENCODER    reciprocal ranks of others, joined by +
    rerank:CROSS_ENCODER:ENGINE  the first 50 of another, ordered anew
    http://host:port             a server that speaks Search-R1's protocol
    serper, bing[:URL]           a web search API, or what speaks like it there

Without an INDEX the corpus is embedded, and kept nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

from stepsearch.retrieval import bm25
from stepsearch.retrieval import fusion
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service
from stepsearch.retrieval import web
from stepsearch.types import Document

_DIMENSIONS = 2048  # of lexical; config.retriever's default
_NEXT = re.compile(r'\+(?=lexical|bm25|dense:|rerank:|https?:|serper|bing)')


def make(
    spec: str,
    corpus: Sequence[Document],
    *,
    k: int = 10,
    known: Iterable[Document] = (),
    made: dict[str, retriever.Engine] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> retriever.Engine:
  """Makes the engine that a text describes; see the module.

  Args:
    spec: the text.
    corpus: what is searched; a server has its own.
    k: documents a query that a server is tried with.
    known: of a server, as of `service.Remote`: documents of the corpus that
      are known again by title and text, whatever their id is there.
    made: engines by their text, taken from here where they are made already,
      also as parts of a fusion, and added.
    limits: `cache`, `per_second` and `wait` of servers and web search APIs.

  Raises:
    ValueError: a text that describes nothing, no such encoder or index, or an
      index of another corpus; no server.
  """
  made = {} if made is None else made
  if spec not in made:
    made[spec] = _make(spec, corpus, k, known, made, dict(limits or {}))
  return made[spec]


def split(specs: str) -> list[str]:
  """The texts of a flag that holds several, joined by commas.

  Raises:
    ValueError: none, or one of them twice.
  """
  found = [spec.strip() for spec in specs.split(',') if spec.strip()]
  if not found or len(set(found)) < len(found):
    raise ValueError(
        f'engines = {specs!r}: at least one is needed, and each once.')
  return found


def _make(spec, corpus, k, known, made, limits):
  kind, _, rest = spec.partition(':')
  if spec == 'lexical':
    return retriever.build(corpus, dimensions=_DIMENSIONS)
  if spec == 'bm25':
    return bm25.build(corpus)
  if kind == 'dense' and rest:
    return _dense(rest, corpus)
  if kind in ('http', 'https'):
    return service.from_url(spec, k, known=known, **limits)
  if kind in web.APIS:
    return web.WebSearch(kind, url=rest, **limits)
  if kind == 'rerank' and ':' in rest:
    return _reranked(
        *rest.split(':', 1),
        lambda part: make(
            part, corpus, k=k, known=known, made=made, limits=limits))
  if kind == 'fusion' and rest:
    parts = _NEXT.split(rest)
    if len(parts) > 1:
      return fusion.Fusion([
          make(part, corpus, k=k, known=known, made=made, limits=limits)
          for part in parts])
  raise ValueError(
      f'{spec!r} is no search engine: lexical, bm25, dense:ENCODER_FOLDER,'
      ' dense:ENCODER_FOLDER@INDEX_FOLDER, fusion:bm25+dense:…,'
      ' rerank:CROSS_ENCODER_FOLDER:ENGINE, http://host:port, serper or bing'
      ' are expected.')


def _reranked(folder, part, make_part):
  from stepsearch.retrieval import rerank

  try:
    scorer = rerank.load(folder)
  except ValueError as error:
    raise ValueError(
        f'rerank:{folder}: this is no usable cross-encoder: {error}'
    ) from error
  return rerank.Reranked(make_part(part), scorer)


def _dense(folders, corpus):
  # Here, because the others need no jax.
  from stepsearch.retrieval import encoders

  encoder, _, index = folders.partition('@')
  try:
    embedder = encoders.load(encoder)
  except ValueError as error:
    raise ValueError(
        f'dense:{folders}: {encoder} is no usable encoder: {error}') from error
  if index:
    return retriever.load(index, documents=corpus, embedder=embedder)
  return retriever.build(corpus, embedder=embedder)
