"""From config.retriever to the search engine of a run.

    dense ─┐                       ┌─ a server, a web search API, a user's own
    bm25  ─┴─ fusion ─ reranker ◀──┘

With several processes the engine is one that all of them ask together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import functools
import os
from typing import Any

import ml_collections

from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import types
from stepsearch.retrieval import bm25
from stepsearch.retrieval import encoders
from stepsearch.retrieval import fusion
from stepsearch.retrieval import rerank
from stepsearch.retrieval import retriever
from stepsearch.retrieval import service
from stepsearch.retrieval import shards
from stepsearch.retrieval import web


def build(
    config: ml_collections.ConfigDict, corpus: Sequence[types.Document],
    workdir: Any, say: Callable[[str], None] = print,
    gold: Sequence[types.Document] = (),
) -> retriever.Engine:
  """The search engine that all processes of a run ask together.

  Args:
    config: its `retriever` counts.
    corpus: what is searched; empty where a server has its own.
    workdir: where an index is kept, unless config.retriever.directory says.
    say: prints a line of progress.
    gold: documents of the corpus that a server's are known again by.

  Raises:
    ValueError: one paragraph naming field or file, value and remedy.
  """
  _check(config)
  c = config.retriever
  index, count = distributed.index(), distributed.count()
  exchange = functools.partial(distributed.exchange, channel='search')
  together = lambda engine: shards.distribute(engine, exchange, index, count)
  scorer = _scorer(c, say)
  if c.placement == 'replicated' or count == 1:
    engine = _other(config, gold, say) or _own(
        c, corpus, workdir, say, lambda engine: engine)
    if scorer is not None:
      engine = rerank.Reranked(engine, scorer, c.rerank_candidates)
    return together(engine)
  engine = _own(c, corpus, workdir, say, together)
  if scorer is None:
    return engine
  return rerank.Reranked(
      engine, shards.Divided(scorer, exchange, index, count),
      c.rerank_candidates)


def is_here(config: ml_collections.ConfigDict) -> bool:
  """Whether what is searched is a corpus that this run reads."""
  return not (config.retriever.url or config.retriever.web)


def _check(config):
  c = config.retriever
  for field, prefix in _prefixes(c).items():
    config_lib.require(
        prefix is None or c.embedder != 'lexical', f'retriever.{field}', prefix,
        'config.retriever.embedder = lexical takes no prefix: leave it out, or '
        'name the folder of an encoder.')
  config_lib.choice('retriever.method', c.method, ('dense', 'bm25', 'fusion'))
  config_lib.choice('retriever.index', c.index, ('auto', 'scann', 'exact'))
  config_lib.choice(
      'retriever.placement', c.placement, ('replicated', 'sharded'))
  config_lib.choice('retriever.web', c.web, ('', *web.APIS))
  for field, least in (
      ('fusion_constant', 0), ('fusion_depth', 1), ('rerank_candidates', 1)):
    config_lib.require(
        c[field] >= least, f'retriever.{field}', c[field],
        f'must be at least {least}.')
  others = {
      name: c[name] for name in ('url', 'web', 'factory') if c[name]}
  config_lib.require(
      c.placement == 'replicated' or not others,
      'retriever.placement', c.placement,
      'what is behind retriever.url, web or factory is not split here: leave '
      'it out.')
  config_lib.require(
      c.placement == 'replicated' or c.method != 'bm25',
      'retriever.placement', c.placement,
      'a BM25 index is mapped from its file, once for all processes of a '
      'machine, and its weights are those of the whole corpus: leave it out. '
      'With method = fusion the dense half is split.')
  config_lib.require(
      c.method == 'dense' or not others, 'retriever.method', c.method,
      'retriever.url, web and factory are engines of their own: leave it out.')
  config_lib.require(
      c.method != 'bm25' or c.embedder == 'lexical', 'retriever.embedder',
      c.embedder,
      'BM25 embeds nothing: leave it out, or use method = dense or fusion.')
  config_lib.require(
      len(others) < 2, f'retriever.{next(iter(others), "")}', others,
      'each of them is an engine: leave one out.')
  config_lib.require(
      c.url or c.web or not (c.cache or c.per_second), 'retriever.cache',
      c.cache or c.per_second,
      'cache and per_second belong to retriever.url and web: leave them out.')
  config_lib.require(
      c.web or not (c.web_url or c.web_key), 'retriever.web', c.web,
      'web_url and web_key are of a web search API: name it, serper or bing.')


def _prefixes(c):
  return dict(query_prefix=c.query_prefix, passage_prefix=c.passage_prefix)


def _scorer(c, say):
  if not c.reranker:
    return None
  try:
    scorer = rerank.load(c.reranker)
  except ValueError as error:
    raise ValueError(
        f'config.retriever.reranker = {c.reranker!r} is no usable '
        f'cross-encoder: {error}') from error
  say(f'{c.reranker}: {scorer.fingerprint}')
  return scorer


def _other(config, gold, say):
  """The engine that is not made of the corpus; None where none is named."""
  c = config.retriever
  k = config.rollout.k
  if c.reranker:
    k = max(k, c.rerank_candidates)
  patience = dict(timeout=c.timeout, retries=c.retries, give_up=c.give_up)
  limits = dict(cache=c.cache, per_second=c.per_second)
  if c.url:
    return service.from_url(
        c.url, k, known=gold, first=distributed.index(), say=say, **limits,
        **patience)
  if c.web:
    return web.patient(
        c.web, k, url=c.web_url, key_variable=c.web_key, say=say, **limits,
        **patience)
  if c.factory:
    return retriever.from_factory(c.factory, c, **patience)
  return None


def _own(c, corpus, workdir, say, together):
  """The engine over the corpus; `together` makes one of all processes'."""
  directory = os.fspath(c.directory) or os.path.join(
      os.fspath(workdir), 'index')
  if c.method == 'dense':
    return together(_dense(c, corpus, directory, say))
  if c.method == 'bm25':
    return together(_bm25(corpus, directory, say))
  return fusion.Fusion(
      [together(_bm25(corpus, directory.rstrip('/') + '-bm25', say)),
       together(_dense(c, corpus, directory, say))],
      constant=c.fusion_constant, depth=c.fusion_depth)


def _dense(c, corpus, directory, say):
  shard = (0, 1)
  if c.placement == 'sharded' and distributed.count() > 1:
    shard = distributed.index(), distributed.count()
  directory = retriever.shard_directory(directory, shard)
  embedder = c.embedder
  if embedder != 'lexical':
    try:
      embedder = encoders.load(embedder, **_prefixes(c))
    except ValueError as error:
      raise ValueError(
          f'config.retriever.embedder = {c.embedder!r} is neither lexical nor '
          f'a usable encoder: {error}') from error
    say(f'{c.embedder}: {embedder.fingerprint}')
  # One builds what all read; shards are built by their owners.
  with distributed.first('index') if shard[1] == 1 else (
      contextlib.nullcontext()):
    engine = retriever.build(
        corpus, embedder=embedder, dimensions=c.dimensions, index=c.index,
        directory=directory, shard=shard)
  if shard[1] > 1:  # one may have its shard already, another may encode it
    distributed.barrier('shards', float('inf'))
  say(f'index of {len(engine):,} passages in {directory}')
  return engine


def _bm25(corpus, directory, say):
  with distributed.first('bm25'):
    engine = bm25.build(corpus, directory=directory)
  say(f'BM25 index of {len(engine):,} passages in {directory}')
  return engine
