"""Eight virtual CPU devices, strict broadcasting, and small shared parts."""

import dataclasses
import functools
import os
import tempfile
import types as python_types

# Both are read when jax starts, so before anything imports it.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_COUNT = '--xla_force_host_platform_device_count'
if _COUNT not in os.environ.get('XLA_FLAGS', ''):
  # Without the fusion emitters (jaxlib 0.10) programs compile in half the time.
  os.environ['XLA_FLAGS'] = ' '.join([
      os.environ.get('XLA_FLAGS', ''), f'{_COUNT}=8',
      '--xla_cpu_use_fusion_emitters=false'])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from stepsearch import protocol  # noqa: E402
from stepsearch import sharding  # noqa: E402
from stepsearch import tokenizer as tokenizer_lib  # noqa: E402
from stepsearch import types  # noqa: E402
from stepsearch.models import qwen  # noqa: E402
from tests import emulator  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compiling is most of the time that these tests take: do it quickly, and once
# for functions that are made anew and compile to the same.
_COMPILED = tempfile.TemporaryDirectory(prefix='stepsearch-tests-')
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', _COMPILED.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

WORDS = (
    'alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi', 'who', 'is', 'born', 'in',
    'the', 'of', 'mayor', '?')  # fmt: skip


@pytest.fixture(scope='session')
def tokenizer():
  """A word-level tokenizer of `WORDS`."""
  return tokenizer_lib.from_words(
      [*WORDS, *protocol.SHORT_WORDS], protocol.TAGS)


@pytest.fixture(scope='session')
def model(tokenizer):
  """A tiny Qwen with grouped-query attention and an output matrix."""
  return qwen.Config(
      vocab_size=tokenizer.vocab_size + tokenizer.vocab_size % 2, embed=32,
      layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, rope_theta=1e4,
      tie_embeddings=False)


@pytest.fixture(scope='session')
def params(model):
  """Random parameters of `model` whose distributions are far from flat."""
  random = _random_params(model)
  random['lm_head'] *= 10
  return random


def _random_params(config, seed=0):
  """Parameters all of which matter: biases and scales are random too."""
  leaves, tree = jax.tree.flatten(
      jax.eval_shape(lambda: qwen.init(config, jax.random.key(0))))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [
      jnp.asarray(rng.normal(0.2, 0.3, size=x.shape), x.dtype) for x in leaves])


@pytest.fixture(scope='session')
def chatty(model, tokenizer):
  """Random parameters bent towards the tags, so that episodes have searches.

  The first dimension of the hidden states is all but constant, and its row of
  the output matrix so is a bias.
  """
  bent = _random_params(model)
  for block, name in (('attention', 'o'), ('mlp', 'down')):
    bent['layers'][block][name] *= 0.2
  bent['embedding'] = bent['embedding'].at[:, 0].set(4.0)
  bent['final_norm']['scale'] = bent['final_norm']['scale'].at[0].set(1.0)
  bias = np.zeros(model.vocab_size, np.float32)
  bias[:3] = -2.0  # padding, end of sequence, unknown
  for tag, value in {
      '<search>': 4.8, '</search>': 4.2, '<think>': 0.5, '</think>': 0.5,
      '<answer>': 1.0, '</answer>': 1.5}.items():
    bias[tokenizer.encode(tag)] = value
  bent['lm_head'] = bent['lm_head'].at[0].set(bias / 4)
  return bent


@pytest.fixture(scope='session')
def mesh():
  """One device."""
  return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope='session')
def random_params():
  """config, seed -> parameters, drawn without compiling anything."""
  return _random_params


class InMemory:
  """Ranks passages by the words they share with the query, then by id."""

  def __init__(self, documents):
    self.documents = documents
    self.calls = []

  def search(self, queries, k):
    self.calls.append(list(queries))
    found = []
    for query in queries:
      words = set(query.split())
      scored = [
          dataclasses.replace(
              d, score=float(len(words & set(d.text.split()))))
          for d in self.documents]
      scored.sort(key=lambda d: (-d.score, d.id))
      found.append(scored[:k])
    return found


@pytest.fixture
def retriever():
  """Six passages over `WORDS`; remembers the queries of each call."""
  texts = (
      'alba is born in bero', 'bero is the mayor of cuna', 'cuna is in dilo',
      'dilo born of efra', 'efra the mayor', 'gomi who')
  return InMemory([
      types.Document(str(i), '', text) for i, text in enumerate(texts)])


class Pieces:
  """A tokenizer over any byte strings: the longest match from the left.

  Strings may occur twice; `encode` then takes the first, so that a policy can
  be told apart from the environment, or one place in its text from another.
  """

  eos_ids, pad_id = (0,), 0

  def __init__(self, strings):
    self.byte_strings = [b'<eos>', *strings]
    self.vocab_size = len(self.byte_strings)

  def encode(self, text):
    data, ids = text.encode(), []
    while data:
      fits = [s for s in self.byte_strings[1:] if s and data.startswith(s)]
      ids.append(self.byte_strings.index(max(fits, key=len), 1))
      data = data[len(max(fits, key=len)):]
    return ids

  def decode(self, ids):
    joined = b''.join(self.byte_strings[i] for i in np.asarray(ids).tolist())
    return joined.decode(errors='replace')

  def prompt(self, question, instruction, chat='auto', system=''):
    return self.encode(instruction.replace('{question}', question))


def chain_policy(follows, size=64):
  """A Qwen whose next token is certain given the last one.

  Attention and MLP write nothing, so that the hidden state is the one-hot
  embedding of the last token.

  Args:
    follows: token -> the token after it; others are followed by 0.
    size: vocabulary and width.

  Returns:
    config and parameters.
  """
  config = qwen.Config(
      vocab_size=size, embed=size, layers=1, heads=2, kv_heads=1, head_dim=4,
      mlp=8, tie_embeddings=False)
  params = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: qwen.init(config, jax.random.key(0))))
  params['final_norm']['scale'] += 1
  head = np.zeros((size, size), np.float32)
  for token in range(size):
    head[token, follows.get(token, 0)] = 5.0  # times sqrt(size)
  params |= {'embedding': np.eye(size, dtype=np.float32), 'lm_head': head}
  return config, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope='session')
def _store():
  """An emulated store, for this process and those that it starts."""
  if not emulator.installed():
    pytest.skip(emulator.REASON)
  with emulator.running() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    # Whoever found objects in it remembers where they were.
    patch.setenv('XDG_CACHE_HOME', _COMPILED.name)
    yield environment


@pytest.fixture
def bucket(_store):
  """The gs:// address of an empty bucket of the emulated store."""
  return emulator.new_bucket(_store)


@pytest.fixture(scope='session')
def scripted():
  """`Pieces` and `chain_policy`: episodes whose every token is known."""
  return python_types.SimpleNamespace(Pieces=Pieces, chain_policy=chain_policy)


@functools.partial(jax.jit, static_argnums=0)
def _distributions(config, params, tokens, temperature):
  positions = jnp.arange(tokens.shape[0])[None]
  hidden, _ = qwen.Qwen(config).apply(
      {'params': params}, tokens[None], positions)
  logits = hidden[0] @ qwen.unembedding(params) / temperature
  return jnp.pad(jax.nn.log_softmax(logits)[:-1], ((1, 0), (0, 0)))


def plain_logprobs(config, params, tokens, temperature=1.0):
  """Log-probs [T, V] of every token at each place of one row, as numpy.

  From one forward pass over the row and a log-softmax over the vocabulary.
  Entry t is of token t given those before it; entry 0 is 0.
  """
  return np.asarray(
      _distributions(config, params, jnp.asarray(tokens), temperature))


@pytest.fixture(scope='session')
def recomputed():
  """`plain_logprobs`."""
  return plain_logprobs


# A mesh, and rules other than the default ones: weights of the update split
# over two axes, those that decode over axes that split the rows as well.
SPLITS = (
    ((8, 1, 1), {}, {}), ((2, 2, 2), {}, {}), ((1, 4, 2), {}, {}),
    ((4, 1, 2), {}, {}),
    ((1, 4, 2),
     dict(batch=('data', 'fsdp', 'tensor'), embed=('fsdp', 'tensor'), vocab=(),
          heads=(), kv_heads=(), mlp=()),
     dict(mlp=('fsdp', 'tensor'))))


@pytest.fixture(scope='session')
def layout(mesh):
  """One device."""
  return sharding.Layout(mesh)


def _split(split, which):
  if len(jax.devices()) < 8:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  mesh = sharding.make_mesh(split[0], jax.devices()[:8])
  default = (sharding.UPDATE, sharding.DECODE)[which]
  return sharding.Layout(mesh, sharding.rules(
      dict(default) | split[which + 1], ('update', 'decode')[which]))


@pytest.fixture(params=SPLITS, ids=lambda split: f'{split[0]}{len(split[1])}')
def eight(request):
  """The layout of the update on eight devices, in several splits."""
  return _split(request.param, 0)


@pytest.fixture(params=SPLITS, ids=lambda split: f'{split[0]}{len(split[1])}')
def eight_decoding(request):
  """The layout of decoding on eight devices, in several splits."""
  return _split(request.param, 1)
