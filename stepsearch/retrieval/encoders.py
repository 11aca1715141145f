"""Text → unit vectors by a neural encoder, from a Hugging Face folder.

    texts ─ prefix ─▶ tokens ─ sorted by length ─▶ batches ─▶ model ─ pool ─▶

`load` reads what sentence-transformers writes beside the weights: how hidden
states are pooled, how long a text may be, what is put before queries and
passages. BERT encoders (E5, BGE, MiniLM) go through `models.encoder`, decoders
that embed by their last token (Qwen3-Embedding) through `models.qwen`.

Batches have few shapes, so that few programs are compiled: the widths of
`width`, and for each width one number of rows, or a power of two for what is
left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from stepsearch import sharding
from stepsearch.models import encoder
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf
from stepsearch.models import qwen

# What a family was trained with, of folders that do not say so: start of the
# folder's name in lower case, before queries, before passages, pooling.
FAMILIES = (
    (r'(multilingual-)?e5-(small|base|large)', 'query: ', 'passage: ', 'mean'),
    (r'bge-(small|base|large)-en',
     'Represent this sentence for searching relevant passages: ', '', 'cls'),
    (r'qwen3-embedding',
     'Instruct: Given a web search query, retrieve relevant passages that'
     ' answer the query\nQuery:', '', 'lasttoken'),
)
_DECODERS = ('qwen2', 'qwen3', 'llama')
# The shape of E5-base-v2, which search agents are mostly trained with.
E5_BASE = encoder.Config(
    vocab_size=30522, embed=768, layers=12, heads=12, mlp=3072, positions=512)
# Tokens a device and batch. A CPU gains nothing from more of them, and texts
# that share a batch of queries then differ in length: a quarter is padding.
_TOKENS = {'cpu': 512}
_TOKENS_ELSEWHERE = 16_384


class NeuralEmbedder:
  """An `embed.Embedder` made of a model and a tokenizer; see `load`.

  Attributes:
    dimensions: width of the vectors.
    fingerprint: a hash of the folder's files, and the settings in words. The
      same wherever the folder lies.
    query_prefix: put before queries.
    passage_prefix: put before passages.
  """

  def __init__(
      self,
      module: encoder.Bert | qwen.Qwen,
      params: Any,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      *,
      pooling: str,
      max_length: int,
      query_prefix: str,
      passage_prefix: str,
      digest: str,
  ):
    self.dimensions = module.config.embed
    self.query_prefix = query_prefix
    self.passage_prefix = passage_prefix
    self.fingerprint = (
        f'encoder {digest} pooling={pooling} max_length={max_length}'
        f' dtype={module.config.dtype} query_prefix={query_prefix!r}'
        f' passage_prefix={passage_prefix!r}'
    )
    self._module = module
    self._params = params
    self._tokenizer = tokenizer
    self._layout = sharding.Layout(mesh)
    self._pooling = pooling
    self._max_length = max_length
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)

  def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds queries as [n, dimensions] float32, rows of unit length."""
    return self._embed(self.query_prefix, texts)

  def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds passages as [n, dimensions] float32, rows of unit length."""
    return self._embed(self.passage_prefix, texts)

  def _embed(self, prefix: str, texts: Sequence[str]) -> np.ndarray:
    vectors = np.zeros([len(texts), self.dimensions], np.float32)
    encoded = self._tokenizer.encode_batch([prefix + text for text in texts])
    rows = [encoding.ids for encoding in encoded]
    results = [
        (chosen, _vectors(self._module, self._pooling, self._params, *arrays))
        for chosen, arrays in batches(self._layout, self._max_length, rows)]
    for chosen, result in results:
      vectors[chosen] = jax.device_get(result)[: len(chosen)]
    return vectors


def batches(
    layout: sharding.Layout,
    max_length: int,
    tokens: Sequence[Sequence[int]],
    *others: Sequence[Sequence[int]],
) -> Iterator[tuple[np.ndarray, tuple[jax.Array, ...]]]:
  """Puts texts on the devices, those of alike length together, in few shapes.

  Args:
    layout: whose shards share the rows of a batch.
    max_length: tokens of a text at most.
    tokens: of each text; those of none are left out.
    *others: numbers beside the tokens, as many of each text.

  Yields:
    The texts of a batch, as indices, and [B, T] int32 tokens, [B] int32 lengths
    and [B, T] int32 of each of `others`, on the devices; B may be larger than
    the number of texts, and what lies behind them is zero.
  """
  lengths = np.array([len(row) for row in tokens], np.int32)
  # The longest first: what is left for an incomplete batch is short.
  order = np.argsort(-lengths, kind='stable')
  order = order[lengths[order] > 0]
  tokens_a_batch = _TOKENS.get(layout.platform, _TOKENS_ELSEWHERE)
  while len(order):
    columns = min(width(int(lengths[order[0]])), max_length)
    full = max(tokens_a_batch // columns, 1)
    size = layout.shards * min(
        full, _power_of_two(-(-len(order) // layout.shards)))
    chosen, order = order[:size], order[size:]
    arrays = []
    for rows in (tokens, *others):
      array = np.zeros([size, columns], np.int32)
      for i, row in enumerate(chosen):
        array[i, : lengths[row]] = rows[row]
      arrays.append(array)
    known = np.zeros([size], np.int32)
    known[: len(chosen)] = lengths[chosen]
    arrays.insert(1, known)
    yield chosen, sharding.shard_batch(tuple(arrays), layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(module, pooling, params, tokens, lengths):
  """Unit vectors [B, D] float32 of tokens [B, T] with lengths [B]."""
  if isinstance(module, encoder.Bert):
    hidden = module.apply({'params': params}, tokens, lengths)
  else:
    positions = jnp.broadcast_to(
        jnp.arange(tokens.shape[1])[None], tokens.shape
    )
    hidden, _ = module.apply({'params': params}, tokens, positions)
  return encoder.pool(hidden, lengths, pooling)


def lower(
    path: str | os.PathLike[str] | None, devices: Sequence[Any],
    length: int | None = None,
) -> tuple[Any, Callable[[], Any]]:
  """A full batch of texts, for devices that need not be there.

  Args:
    path: as of `load`; None: the shape of E5-base-v2.
    devices: of one process.
    length: tokens of a text; None: as many as one may have.

  Returns:
    The parameters as shapes with shardings, and what gives the
    `jax.stages.Lowered`.
  """
  layout = sharding.Layout(sharding.make_mesh(devices=devices))
  module, pooling, limit = encoder.Bert(E5_BASE), 'mean', E5_BASE.positions
  if path is not None:
    folder = folder_lib.Folder(path)
    if folder.config.get('model_type') in _DECODERS:
      config = dataclasses.replace(
          hf.read_config(folder), tie_embeddings=True)
      module, limit = qwen.Qwen(config), config.max_length
      pooling = 'lasttoken'
    else:
      config = encoder.read_config(folder)
      module, limit = encoder.Bert(config), config.positions
    limit = min(_max_length(folder) or limit, limit)
  length = min(width(length or limit), limit)
  init = encoder.init if isinstance(module, encoder.Bert) else qwen.init
  shapes = jax.eval_shape(lambda: init(module.config, jax.random.key(0)))
  params = sharding.shapes(
      shapes, jax.tree.map(lambda _: layout.replicated, shapes))
  rows = layout.shards * batch_rows(length)
  tokens, lengths = (
      jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.rows)
      for shape in ((rows, length), (rows,)))
  return params, lambda: _vectors.lower(
      module, pooling, params, tokens, lengths)


def batch_rows(length: int) -> int:
  """Texts of so many tokens that one accelerator takes at once."""
  return max(_TOKENS_ELSEWHERE // length, 1)


def width(length: int) -> int:
  """The width of a batch whose longest text has so many tokens.

  Multiples of a sixteenth of the next power of two, and of 4. Up to 512 tokens
  these are 40 widths, of which MuSiQue's passages need 24. With half as many, a
  tenth of what is computed is padding instead of a twentieth.
  """
  step = max(4, _power_of_two(length) // 16)
  return -(-length // step) * step


def _power_of_two(n: int) -> int:
  """The smallest that is at least n."""
  return 1 << (n - 1).bit_length()


def load(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
) -> NeuralEmbedder:
  """Reads an embedder from a Hugging Face or sentence-transformers folder.

  Parameters, computation and pooling are in float32. On TPU its products are as
  exact as jax_default_matmul_precision says, which is bfloat16 by default.

  Args:
    path: the folder, on disk or gs://: config.json, *.safetensors and
      tokenizer.json, and what sentence-transformers adds to them.
    mesh: devices of this process, all of them by default: the mesh of a run may
      have other processes' devices, and a tensor axis that would do the same
      work twice. Each device holds the whole model; rows are split over data
      and fsdp.
    query_prefix: put before queries; None: the folder's own, as of
      config_sentence_transformers.json, or its family's (`FAMILIES`), or none.
    passage_prefix: likewise, put before passages.

  Returns:
    The embedder.

  Raises:
    ValueError: a missing or damaged file, or something that is not
      implemented; names file, field and value.
  """
  folder = folder_lib.Folder(path)
  if mesh is None:
    mesh = sharding.make_mesh(devices=jax.local_devices())
  tokenizer = read_tokenizer(folder)
  pooling = _pooling(folder)
  if folder.config.get('model_type') in _DECODERS:
    config, params = _decoder(folder, mesh)
    module, limit = qwen.Qwen(config), config.max_length
    pooling = pooling or 'lasttoken'
  else:
    config, params = encoder.load(folder, mesh)
    module, limit = encoder.Bert(config), config.positions
    pooling = pooling or 'mean'
  check_vocabulary(folder, tokenizer, config.vocab_size)
  prefixes = _prefixes(folder)
  return NeuralEmbedder(
      module,
      params,
      tokenizer,
      mesh,
      pooling=pooling,
      max_length=min(_max_length(folder) or limit, limit),
      query_prefix=prefixes[0] if query_prefix is None else query_prefix,
      passage_prefix=prefixes[1] if passage_prefix is None else passage_prefix,
      digest=digest(folder),
  )


def _decoder(folder, mesh):
  """Config and parameters of a decoder's trunk, whole on every device."""
  config = dataclasses.replace(hf.read_config(folder), tie_embeddings=True)
  bare = 'embed_tokens.weight' in folder.tensors
  table = hf.tensors(config, '' if bare else 'model.')
  shapes = jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
  ignore = (r'^lm_head\.weight$', r'rotary_emb\.inv_freq$')
  return config, folder_lib.stream(
      folder, table, shapes, whole, ignore=ignore
  )


def read_tokenizer(folder: folder_lib.Folder) -> tokenizers.Tokenizer:
  """The folder's tokenizer.json.

  Raises:
    ValueError: it is missing or damaged.
  """
  file = folder.path / 'tokenizer.json'
  if not file.exists():
    raise ValueError(
        f'{file} is missing: the fast tokenizer is needed. Write it with'
        " transformers' AutoTokenizer.from_pretrained(folder)"
        '.save_pretrained(folder).'
    )
  try:
    return tokenizers.Tokenizer.from_str(file.read_text())
  except Exception as error:  # what the Rust library raises has no class
    raise ValueError(
        f'{file} cannot be read ({error}): fetch it again.'
    ) from error


def check_vocabulary(
    folder: folder_lib.Folder, tokenizer: tokenizers.Tokenizer, size: int
) -> None:
  """Refuses a tokenizer with ids beyond the model's embedding.

  Raises:
    ValueError: names the id and the size.
  """
  largest = max(tokenizer.get_vocab().values())
  if largest >= size:
    raise ValueError(
        f'{folder.path}: tokenizer.json has the token id {largest}, but'
        f' config.json says vocab_size = {size}: they do not'
        ' belong together, fetch the folder again.'
    )


def _pooling(folder) -> str | None:
  """What is done with hidden states, by the folder or its family.

  None: no word on it.
  """
  file = folder.path / 'modules.json'
  where = '1_Pooling'
  if file.exists():
    try:
      modules = json.loads(file.read_text())
      kinds = [module['type'].rpartition('.')[2] for module in modules]
      paths = [module['path'] for module in modules]
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
          f'{file} is no list of modules ({error!r}): fetch it again.'
      ) from error
    known = ['Transformer', 'Pooling', 'Normalize']
    if kinds not in (known, known[:2]):
      raise ValueError(
          f'{file}: the modules {", ".join(kinds)} are not implemented;'
          f' {", ".join(known)} are, in this order.'
      )
    where = paths[1]
  name = f'{where}/{folder_lib.CONFIG}'
  settings = folder.json(name)
  if settings is None:
    if file.exists():
      raise ValueError(
          f'{folder.path / name} is missing, but {file.name} names it: fetch it'
          ' again.'
      )
    return _family(folder)[2]
  chosen = sorted(
      field for field, value in settings.items()
      if field.startswith('pooling_mode') and value
  )
  if chosen == ['pooling_mode']:  # newer releases: one word, not a flag each
    chosen = [f'pooling_mode_{settings["pooling_mode"]}']
  poolings = {
      'pooling_mode_mean_tokens': 'mean',
      'pooling_mode_mean': 'mean',
      'pooling_mode_cls_token': 'cls',
      'pooling_mode_cls': 'cls',
      'pooling_mode_lasttoken': 'lasttoken',
  }
  if len(chosen) != 1 or chosen[0] not in poolings:
    raise ValueError(
        f'{folder.path / name}: {", ".join(chosen) or "no pooling_mode"} is'
        f' not implemented; one of {", ".join(encoder.POOLINGS)} is.'
    )
  pooling = poolings[chosen[0]]
  if pooling == 'mean' and not settings.get('include_prompt', True):
    raise ValueError(
        f'{folder.path / name}: include_prompt = False is not implemented: the'
        ' prefix is part of the mean here.'
    )
  return pooling


def _max_length(folder) -> int | None:
  """Tokens of a text, as sentence-transformers cuts it; None: no word on it."""
  settings = folder.json('sentence_bert_config.json') or {}
  if settings.get('do_lower_case'):
    raise ValueError(
        f'{folder.path / "sentence_bert_config.json"}: do_lower_case = True is'
        ' not implemented: let the normalizer of tokenizer.json do it.'
    )
  return settings.get('max_seq_length')


def _prefixes(folder) -> tuple[str, str]:
  """What goes before queries and passages, by the folder or its family."""
  settings = folder.json('config_sentence_transformers.json') or {}
  prompts = settings.get('prompts') or {}
  query = prompts.get('query')
  passage = prompts.get('passage') or prompts.get('document')
  if query or passage:
    return query or '', passage or ''
  return _family(folder)[:2]


def _family(folder) -> tuple[str, str, str | None]:
  """What goes before queries and passages, and the pooling, by the name."""
  path = folder.path
  # The hub's cache: models--intfloat--e5-base-v2/snapshots/<commit>.
  name = path.parent.parent.name if path.parent.name == 'snapshots' else (
      path.name)
  name = name.rpartition('--')[2].lower()
  for start, *known in FAMILIES:
    if re.match(start, name):
      return tuple(known)
  return '', '', None


def digest(folder: folder_lib.Folder) -> str:
  """A hash of all files that decide about a vector."""
  hashed = hashlib.blake2b(digest_size=8)
  files = [folder.path / name for name in (folder_lib.CONFIG, 'tokenizer.json')]
  for file in [*files, *sorted(folder.path.glob('*.safetensors'))]:
    with file.open('rb') as opened:
      while chunk := opened.read(2**24):
        hashed.update(chunk)
  return hashed.hexdigest()
