"""From a config to the parts of a run; what train and evaluate share.

    ConfigDict ─▶ Parts: tokenizer, questions, retriever, collect, score

Everything that can be wrong with a config or its files is found here, before
any compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import ctypes
import dataclasses
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import engine as engine_lib
from stepsearch import paths
from stepsearch import protocol as protocol_lib
from stepsearch import sharding
from stepsearch import tokenizer as tokenizer_lib
from stepsearch import types
from stepsearch import warmup
from stepsearch.data import datasets
from stepsearch.data import demonstrations as demonstrations_lib
from stepsearch.data import world as world_lib
from stepsearch.models import attention
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.retrieval import retriever as retriever_lib
from stepsearch.rl import learner
from stepsearch.rl import rewards
from stepsearch.rollout import collect
from stepsearch.rollout import sampler

Score = Callable[
    [Sequence[types.Example], Sequence[types.Transcript]], list[rewards.Score]]


def keep_compiled(config: ml_collections.ConfigDict) -> None:
  """Keeps compiled programs in config.compilation_cache, if it names a folder.

  Raises:
    ValueError: it cannot be written.
  """
  folder = config.compilation_cache
  if not folder:
    return
  with distributed.first('compilation_cache'):
    config_lib.check_workdir(folder, 'config.compilation_cache')
  jax.config.update('jax_compilation_cache_dir', folder)
  if paths.is_remote(folder):
    # The caches that XLA itself writes, for GPUs, know disks only.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


@dataclasses.dataclass(frozen=True)
class Player:
  """What plays questions, whichever they are."""

  config: ml_collections.ConfigDict
  update: sharding.Layout  # of everything that is trained
  decode: sharding.Layout  # of weights and cache that sample
  tokenizer: tokenizer_lib.Tokenizer
  protocol: protocol_lib.Protocol  # of training
  model: qwen.Config
  pretrained: folder_lib.Folder | None  # of the model's config and tokenizer
  learner: learner.Learner | None  # None where nothing is trained
  rollout: collect.Config

  def collector(
      self, protocol: protocol_lib.Protocol, search: collect.Search,
      on_tick: Callable[[], None] | None = None,
  ) -> collect.Collector:
    """Plays by one protocol with one engine."""
    return collect.Collector(
        self.model, self.rollout, self.tokenizer, protocol, search, self.decode,
        on_tick)


@dataclasses.dataclass(frozen=True)
class Parts(Player):
  """What a run is made of; nothing here is trained."""

  world: world_lib.World | None
  train: Sequence[types.Example]
  eval: Sequence[types.Example]
  retriever: Any
  collect: collect.Collector
  score: Score


def tune_host() -> None:
  """Sets what has to be set before jax starts; for entry points.

  On a machine without an accelerator XLA takes and gives back its buffers at
  every call, and the kernel hands out fresh pages each time. Told to keep them,
  malloc makes the tiny run a quarter faster. The TPU compiler, where it is
  installed (`stepsearch.compile`), is told that it is not needed.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  if any(glob.glob(f'/dev/{name}') for name in ('nvidia*', 'accel*', 'vfio')):
    return
  if importlib.util.find_spec('libtpu') and not jax.config.jax_platforms:
    jax.config.update('jax_platforms', 'cpu')
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # glibc only
  if mallopt is not None:
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
    mallopt(arena_max, 1)


class Checkpoint:
  """An actor to play with: of a run, or in a Hugging Face folder.

  Attributes:
    root: workdir of the run, or the folder.
    trained: whether it is a run.
  """

  def __init__(self, path: str, step: int | None = None):
    """Looks what is there.

    Args:
      path: the workdir of a run, or its checkpoints folder; or a Hugging Face
        folder, on disk or gs://, with or without 'hf:' before it.
      step: of the run; the newest by default.

    Raises:
      ValueError: neither is there; a step of a folder, which has none.
    """
    bare = path.removeprefix('hf:')
    self.root = paths.Path(bare)
    if self.root.name == 'checkpoints':
      self.root = self.root.parent
    self._step = step
    with paths.explained(self.root):
      self.trained = bare == path and (self.root / 'checkpoints').is_dir()
    if not self.trained and not any(self.root.glob('*.safetensors')):
      raise ValueError(
          f'--checkpoint={path}: there is no run here (no checkpoints folder '
          'in it) and no Hugging Face model (no *.safetensors); give the '
          '--workdir of a training run, or such a folder.')
    if not self.trained and step is not None:
      raise ValueError(
          f'--step={step}: {path} is a Hugging Face folder, which has no '
          'steps; leave it out.')

  def config(self, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of the run, as of `config.stored`.

    Raises:
      ValueError: it is a folder, or its config cannot be read.
    """
    if not self.trained:
      raise ValueError(
          f'--checkpoint={self.root} is a Hugging Face folder, which does not '
          'say how to search with it: give --config, such as '
          '--config=configs/benchmark.py.')
    return config_lib.stored(self.root, overrides)

  def build(
      self, config: ml_collections.ConfigDict, workdir: Any, **options: Any
  ) -> Parts:
    """The parts that play it, as of the module's `build`.

    Args:
      config: of the run; what the model is and its tokenizer are read from
        the checkpoint.
      workdir: where an index is kept that is none of the run's.
      **options: of `build`.
    """
    keep_compiled(config)
    config, card = self._sources(config)
    return build(
        config, self.root if self.trained else workdir, training=False,
        card=card, **options)

  def player(
      self, config: ml_collections.ConfigDict,
      say: Callable[[str], None] = print,
  ) -> Player:
    """What plays it, without questions and engine; errors as of `build`."""
    keep_compiled(config)
    config, card = self._sources(config)
    _check(config, False, card)
    update, decode = layouts(config)
    _check_rows(config, update, decode, False)
    world = None
    if config.data.source == 'world':
      world = world_lib.World(
          world_lib.Config(**config.world.to_dict()), config.seed)
    return _player(
        config, self.root, update, decode, world, False, card, say)

  def fingerprint(self, step: int | None) -> str:
    """Names the weights: the run and its step, or what the files begin with."""
    if self.trained:
      return f'step {step} of {digest((self.root / "config.json").read_text())}'
    found = [(self.root / folder_lib.CONFIG).read_text()]
    for path in sorted(self.root.glob('*.safetensors')):
      with path.open('rb') as file:
        found.append((path.name, path.stat().length, file.read(1 << 20)))
    return digest(found)

  def _sources(self, config):
    """The config that names a folder, and the card of a run."""
    if self.trained:
      card = self.root / 'model'
      return config, card if card.is_dir() else None
    config = config.copy_and_resolve_references()
    config.model.pretrained = str(self.root)
    return config, None

  def actor(
      self, parts: Player, key: jax.Array
  ) -> tuple[Any, int | None]:
    """What a collector plays with, and the step, None for a folder."""
    if self.trained:
      params, step = checkpoints.restore_actor(
          self.root / 'checkpoints', parts.model, parts.update, self._step)
    else:
      params, step = parameters(parts, key), None
    return sampler.weights(parts.model, parts.decode, params), step


def build(
    config: ml_collections.ConfigDict, workdir: Any, *, training: bool = True,
    card: Any = None, say: Callable[[str], None] = print,
    on_tick: Callable[[], None] | None = None,
) -> Parts:
  """Checks the config, reads or makes the data, loads or builds the index.

  Args:
    config: as of configs/default.py.
    workdir: where the index is kept, unless config.retriever.directory says.
    training: also read the training questions and make the learner.
    card: the folder that `write_card` made in the run whose checkpoint is
      played: what the model is, whatever config.model says of it.
    say: prints a line of progress.
    on_tick: as of `collect.Collector`.

  Raises:
    ValueError: one paragraph naming field or file, value and remedy.
  """
  _check(config, training, card)
  update, decode = layouts(config)
  _check_rows(config, update, decode, training)
  reward = _reward(config)
  world = None
  if config.data.source == 'world':
    world = world_lib.World(
        world_lib.Config(**config.world.to_dict()), config.seed)
    corpus = world.corpus
    train = world.questions(
        'train', config.data.train_questions, config.data.train_hops,
        config.data.train_shares, config.seed) if training else []
    held_out = world.questions(
        'eval', config.data.eval_questions, config.data.eval_hops,
        config.data.eval_shares, config.seed)
  else:
    corpus, train, held_out = _read(config, training, say)
  key_rewards = _key_rewards(config)
  datasets.check(
      train, corpus if engine_lib.is_here(config) else None,
      turn_rewards=_turn_rewards(config), k=config.rollout.k,
      key_rewards=key_rewards)
  keyless = sum(not any(example.search_keys) for example in train)
  if key_rewards and keyless:
    say(f'{keyless:,} of {len(train):,} training questions have no search '
        'keys: their key reward is 0')
  if training and config.warmup.steps and (
      config.data.demonstrations == 'search_keys'):
    # Which is said before an index is built.
    demonstrations_lib.usable(train, config.rollout.max_turns)

  player = _player(
      config, workdir, update, decode, world, training, card, say)
  collector = player.collector(
      player.protocol, lambda queries, k: found.search(queries, k), on_tick)
  collector.prepare(example.question for example in (*train, *held_out))

  _agree_on_data(corpus, train, held_out, player.model)
  # Last, for it may take long; `collector` sees it through its closure.
  gold = [
      document for example in (*train, *held_out)
      for document in example.gold_documents]
  found = engine_lib.build(config, corpus, workdir, say, gold)
  say((f'{len(corpus):,} passages, ' if corpus else '')
      + f'{len(train):,} training and {len(held_out):,} held-out questions, '
      f'{player.tokenizer.vocab_size:,} tokens')
  return Parts(
      **vars(player), world=world, train=train, eval=held_out, retriever=found,
      collect=collector,
      score=_by_all(_score(config, reward, found), decode))


def _player(
    config, workdir, update, decode, world, training, card, say) -> Player:
  protocol = (
      protocol_lib.Protocol.short() if config.rollout.protocol == 'short'
      else protocol_lib.Protocol())
  pretrained = _pretrained(config, workdir, training, card)
  tokenizer = _tokenizer(config, world, pretrained)
  made = _machinery(
      config, update, decode, pretrained, tokenizer.vocab_size, training)
  model = made.model
  if pretrained is not None:
    say(f'{pretrained.path}: {model.layers} layers of {model.embed}, '
        f'{model.heads} heads ({model.kv_heads} kv), {model.vocab_size:,} '
        f'tokens, computed in {model.dtype}')
  return Player(
      config=config, update=update, decode=decode, tokenizer=tokenizer,
      protocol=protocol, model=model, pretrained=pretrained,
      learner=made.learner, rollout=made.rollout)


def retriever(
    config: ml_collections.ConfigDict, say: Callable[[str], None] = print
) -> retriever_lib.Engine:
  """The search engine of a config, without a run: what `serve` serves.

  Raises:
    ValueError: one paragraph naming field or file, value and remedy.
  """
  c = config.retriever
  config_lib.require(
      engine_lib.is_here(config), 'retriever.url', c.url or c.web,
      'what is served has to be here, not behind another server: leave it out, '
      'and retriever.web.')
  config_lib.require(
      c.directory or c.factory, 'retriever.directory', c.directory,
      'name the folder of the index; it is built where there is none.')
  if config.data.source == 'world':
    corpus = world_lib.World(
        world_lib.Config(**config.world.to_dict()), config.seed).corpus
  else:
    corpus = datasets.read_corpus(config.data.corpus, config.data.directory)
  return engine_lib.build(config, corpus, c.directory, say)


@dataclasses.dataclass(frozen=True)
class Machinery:
  """The part of a run that is compiled; needs no data."""

  update: sharding.Layout
  decode: sharding.Layout
  model: qwen.Config
  learner: learner.Learner | None  # None where nothing is trained
  rollout: collect.Config


def machinery(
    config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> Machinery:
  """What `build` would make for these devices, which need not be there.

  Raises:
    ValueError: as of `build`; no config.model says how many tokens there are.
  """
  _check(config, True, None)
  update, decode = layouts(config, devices)
  _check_rows(config, update, decode, True)
  pretrained = None
  if config.model.pretrained:
    pretrained = folder_lib.Folder(config.model.pretrained)
  config_lib.require(
      pretrained is not None or config.model.vocab_size, 'model.vocab_size',
      config.model.vocab_size,
      'it follows from a tokenizer, and none is read here: give the number, '
      '151936 for Qwen2.5 up to 3B, or a config.model.pretrained.')
  return _machinery(config, update, decode, pretrained, 0, True)


def _machinery(config, update, decode, pretrained, tokens, training):
  model = _model(config, tokens, (update, decode), pretrained)
  rollout = config.rollout.to_dict()
  del rollout['protocol']
  return Machinery(
      update, decode, model,
      learner.Learner(
          model,
          learner.Config(
              temperature=config.rollout.temperature, **config.ppo.to_dict()),
          update, config.batch_size, config.num_steps,
          config.offload) if training else None,
      collect.Config(**rollout))


def parameters(parts: Parts, key: jax.Array) -> Any:
  """Actor parameters on the mesh: the pretrained ones, or random ones."""
  if parts.pretrained is not None:
    return hf.load(parts.config.model.pretrained, parts.update)[1]
  return jax.jit(
      lambda k: qwen.init(parts.model, k),
      out_shardings=parts.update.place(qwen.axes(parts.model)[0]))(key)


def agree(config: ml_collections.ConfigDict, **flags: Any) -> None:
  """Refuses several processes whose config, flags, code or libraries differ.

  Raises:
    ValueError: names the process and the first difference.
  """
  if distributed.count() == 1:
    return
  distributed.agree('config', json.loads(config_lib.to_json(config)))
  distributed.agree('flags', flags)
  distributed.agree('version', versions() | {'stepsearch': _sources()})


def versions() -> dict[str, str]:
  """Of Python, the libraries that compute, and a digest of this package."""
  return {
      'python': sys.version.split()[0],
      **{name: importlib.metadata.version(name) for name in (
          'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')},
      'stepsearch': digest(sorted(_sources().items()))}


def _sources() -> dict[str, str]:
  package = pathlib.Path(__file__).parent
  return {
      str(path.relative_to(package)): digest(path.read_text())
      for path in package.rglob('*.py')}


def write_card(parts: Parts, directory: paths.Path) -> None:
  """Writes config.json and tokenizer, so that `export` needs nothing else."""
  if (directory / folder_lib.CONFIG).exists():
    return
  own = parts.config.tokenizer or parts.pretrained is None
  with paths.new_folder(directory, folder_lib.CONFIG) as draft:
    hf.write_card(
        draft, parts.model, parts.tokenizer if own else None,
        source=parts.pretrained and parts.pretrained.path)


def demonstrations(parts: Parts) -> warmup.Demonstrations:
  """Tokenised demonstrations: the user's file, or the world's searcher."""
  config = parts.config
  c = config.demonstrations
  cache = {}

  def observation(found, last):
    ids, _ = protocol_lib.observation_tokens(
        parts.protocol, parts.tokenizer, found,
        config.rollout.observation_length, last_turn=last, cache=cache)
    return parts.tokenizer.decode(ids)

  failed = parts.retriever.failed
  budget = dict(
      k=config.rollout.k, max_turns=config.rollout.max_turns, seed=config.seed)
  if config.data.demonstrations == 'search_keys':
    rows = demonstrations_lib.from_search_keys(
        parts.train, parts.retriever.search, observation, **budget)
  elif config.data.demonstrations:
    rows = datasets.read_demonstrations(config.data.demonstrations)
  elif parts.world is not None:
    examples = parts.world.questions(
        'train', c.count, c.hops, c.shares, config.seed + 1)
    rows = parts.world.demonstrations(
        examples, parts.retriever.search, observation,
        good_query=c.good_query, retry=c.retry, early_stop=c.early_stop,
        **budget)
  else:
    raise ValueError(
        f'config.warmup.steps = {config.warmup.steps}, but there is nothing to '
        'learn from: '
        'give config.data.demonstrations, a JSONL file of {question, text} '
        'rows or search_keys, or set config.warmup.steps=0.')
  config_lib.require(
      parts.retriever.failed == failed, 'warmup.steps', config.warmup.steps,
      f'{parts.retriever.failed - failed} searches for its demonstrations '
      'found no engine that answers: start that again, and the same command.')
  return warmup.tokenize(
      rows, parts.tokenizer, parts.protocol, config.rollout.max_length,
      config.rollout.chat)


def renames(
    parts: Parts
) -> Callable[[np.ndarray, np.random.Generator], np.ndarray] | None:
  """Renames the world's entities at random, row by row; None without a world.

  Without it a small model memorises the training names and miscopies others.
  """
  if parts.world is None or not parts.config.demonstrations.rename:
    return None
  pools = [
      [parts.tokenizer.encode(f' {word}') for word in pool]
      for pool in parts.world.pools]
  config_lib.require(
      all(len(ids) == 1 for pool in pools for ids in pool),
      'demonstrations.rename', True,
      f'the tokenizer {parts.config.tokenizer} cuts the names of the world '
      'into pieces, which cannot be exchanged for one another: set it to '
      'false.')
  pools = [np.asarray(pool)[:, 0] for pool in pools]

  def augment(tokens, rng):
    mapping = np.tile(
        np.arange(parts.tokenizer.vocab_size, dtype=tokens.dtype),
        (len(tokens), 1))
    for pool in pools:
      order = np.argsort(rng.random((len(tokens), len(pool))), axis=1)
      mapping[:, pool] = pool[order]
    return np.take_along_axis(mapping, tokens, axis=1)

  return augment


def _turn_rewards(config) -> bool:
  return config.algorithm == 'steppo' and config.reward.turn_reward and (
      config.reward.information_gain) and not config.reward.factory


def _key_rewards(config) -> bool:
  return config.algorithm == 'steppo' and config.reward.search_key and (
      not config.reward.factory)


def _check(config, training, card):
  if jax.process_count() != distributed.count():
    raise ValueError(
        f'the devices of this run belong to {jax.process_count()} processes, '
        'which have not met: start each of them with --distributed.')
  config_lib.choice('algorithm', config.algorithm, ('steppo', 'ppo'))
  config_lib.choice('data.source', config.data.source, ('world', 'jsonl'))
  config_lib.choice(
      'rollout.protocol', config.rollout.protocol, ('full', 'short'))
  config_lib.choice(
      'model.dtype', config.model.dtype, ('float32', 'bfloat16'))
  made = config.data.source == 'world'
  for field, least in (
      ('seed', 0), ('num_steps', 0), ('batch_size', 1), ('warmup.steps', 0),
      ('warmup.batch_size', 1), ('eval.every', 1), ('eval.batch_size', 1),
      ('checkpoint.every', 1), ('checkpoint.keep_latest', 1),
      ('checkpoint.keep_best', 0), ('data.train_questions', int(made)),
      ('data.eval_questions', int(made)), ('demonstrations.count', 1),
      ('rollouts_per_question', 1), ('retriever.timeout', 0.001),
      ('retriever.retries', 0), ('retriever.give_up', 0)):
    value = config
    for name in field.split('.'):
      value = value[name]
    config_lib.require(
        value >= least, field, value, f'must be at least {least}.')
  traced = tuple(config.profile.steps)
  config_lib.require(
      not traced or len(traced) == 2 and 1 <= traced[0] <= traced[1],
      'profile.steps', traced,
      'the first and the last step are expected, such as (3, 5), or () for '
      'none.')
  config_lib.require(
      config.batch_size % config.rollouts_per_question == 0,
      'rollouts_per_question', config.rollouts_per_question,
      f'must divide batch_size = {config.batch_size}, the episodes of a step.')
  for section, prefix in (
      ('data', 'train_'), ('data', 'eval_'), ('demonstrations', '')):
    hops = config[section][f'{prefix}hops']
    shares = config[section][f'{prefix}shares']
    config_lib.require(
        len(hops) == len(shares) and sum(shares) > 0 and min(shares) >= 0
        and min(hops) >= 1, f'{section}.{prefix}shares', tuple(shares),
        f'one share is needed for each of {prefix}hops = {tuple(hops)}, not '
        'all of them zero.')
  config_lib.choice('rollout.chat', config.rollout.chat, ('auto', 'on', 'off'))
  config_lib.require(
      config.tokenizer or config.model.pretrained or card is not None
      or not made or config.rollout.protocol == 'short',
      'rollout.protocol', config.rollout.protocol,
      "the world's own words do not spell the long instruction: use short, or "
      'give config.tokenizer.')
  config_lib.require(
      not training or not config.reward.factory
      or config.algorithm == 'steppo', 'reward.factory', config.reward.factory,
      'your own reward replaces all others, so algorithm = ppo has no meaning '
      'with it: leave one of them out.')


def layouts(
    config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[sharding.Layout, sharding.Layout]:
  """Where the update and decoding put their arrays.

  Args:
    config: its mesh and sharding.
    devices: all of them by default.

  Raises:
    ValueError: the mesh does not cover the devices; rules that cannot be.
  """
  mesh = sharding.make_mesh(tuple(config.mesh), devices)
  return tuple(
      sharding.Layout(mesh, sharding.rules(
          config.sharding[name].to_dict(), f'sharding.{name}'))
      for name in ('update', 'decode'))


def _check_rows(config, update, decode, training):
  fields = [('eval.batch_size', config.eval.batch_size, decode, 'decode')]
  if training:
    fields += [
        ('batch_size', config.batch_size, decode, 'decode'),
        ('batch_size', config.batch_size, update, 'update')]
    if config.warmup.steps:
      fields.append(
          ('warmup.batch_size', config.warmup.batch_size, update, 'update'))
  for field, value, layout, name in fields:
    config_lib.require(
        value % layout.shards == 0, field, value,
        f'cannot be split over the {layout.shards} shards of config.sharding.'
        f'{name}.batch = {layout.axes("batch")!r}: choose a multiple of '
        f'{layout.shards}.')


def _pretrained(config, workdir, training, card) -> folder_lib.Folder | None:
  """The model that a run starts from, checked but for its values."""
  path, root = config.model.pretrained, paths.Path(workdir)
  if card is not None:
    return folder_lib.Folder(card)
  if not path:
    return None
  # A run that has begun goes on with the card that it has kept, whatever has
  # become of the folder, whose weights it needs up to step 0 only.
  begun = training and (root / 'model' / folder_lib.CONFIG).exists()
  if not begun or not checkpoints.exists_once(root / 'reference'):
    folder = folder_lib.Folder(path)
    hf.check(folder)
  return folder_lib.Folder(root / 'model') if begun else folder


def _model(config, tokens, layouts, pretrained) -> qwen.Config:
  sizes = config.model.to_dict()
  del sizes['pretrained']
  if pretrained is not None:
    model = hf.read_config(pretrained)
    if model.vocab_size < tokens:
      raise ValueError(
          f'the tokenizer has {tokens} tokens and the embedding of '
          f'{pretrained.path} {model.vocab_size} rows: take the tokenizer '
          'that came with the model (config.tokenizer = \'\').')
    sizes = dataclasses.asdict(model) | dict(
        rope_scaling=model.rope_scaling,
        **{name: sizes[name] for name in ('dtype', 'remat', 'attention')})
  if not sizes['vocab_size']:
    parts = math.lcm(*(layout.size('vocab') for layout in layouts))
    sizes['vocab_size'] = -(-tokens // parts) * parts
  config_lib.require(
      sizes['vocab_size'] >= tokens, 'model.vocab_size', sizes['vocab_size'],
      f'the tokenizer has {tokens} tokens, and a model needs a '
      "row for every token; 0 takes the tokenizer's number.")
  longest = sizes.setdefault('max_length', config.rollout.max_length)
  scaling = sizes.get('rope_scaling')
  if scaling is not None and scaling.kind == 'yarn':
    # Many a config.json keeps the positions before they were stretched.
    longest = max(longest, int(scaling.original_length * scaling.factor))
  config_lib.require(
      config.rollout.max_length <= longest,
      'rollout.max_length', config.rollout.max_length,
      f'the model was made for {longest} positions (max_position_embeddings '
      'of its config.json, or what yarn makes of it): lower it.')
  sizes['attention'] = attention.resolve(
      sizes['attention'], layouts[0].mesh.devices.flat[0],
      head_dim=sizes['head_dim'], dtype=sizes['dtype'],
      windows=sizes.get('windows', ()))
  for layout, kind in zip(layouts, ('update', 'decode')):
    for name in ('vocab_size', 'heads', 'kv_heads', 'mlp', 'embed'):
      rule = name.removesuffix('_size')
      parts = layout.size(rule)
      config_lib.require(
          sizes[name] % parts == 0, f'model.{name}', sizes[name],
          f'cannot be split into {parts} parts: config.sharding.{kind}.{rule} '
          f'= {layout.axes(rule)!r} on the mesh {dict(layout.mesh.shape)}. '
          f'Choose axes of config.mesh whose sizes divide it, at most '
          f'{math.gcd(sizes[name], layout.mesh.size)} in all.')
    parts = layout.size('heads')
    config_lib.require(
        sizes['attention'] == 'plain' or sizes['kv_heads'] % parts == 0,
        'model.attention', sizes['attention'],
        f'its kernel splits heads of keys as those of queries, and '
        f'{sizes["kv_heads"]} cannot be split into {parts} parts: '
        f'config.sharding.{kind}.heads = {layout.axes("heads")!r} on the mesh '
        f'{dict(layout.mesh.shape)}. Split them less, or use plain.')
  adapters = lora.Config(**config.lora.to_dict())
  return qwen.Config(**sizes | dict(lora=adapters if adapters.rank else None))


def _read(config, training, say):
  """Corpus and questions of source = jsonl."""
  # With a server the corpus tells what the gold documents of the questions
  # are; questions that spell them out, or have none, do without.
  unneeded = [] if training else ['train']
  unneeded += [] if engine_lib.is_here(config) else ['corpus']
  for name in ('corpus', 'train', 'eval'):
    config_lib.require(
        config.data[name] or name in unneeded, f'data.{name}',
        config.data[name],
        'data.source = jsonl needs this file; name it, or a set that `python '
        '-m stepsearch.prepare` made, or use data.source=world.')
  corpus, by_id = [], None
  if config.data.corpus:
    corpus = datasets.read_corpus(
        config.data.corpus, config.data.directory, say)
    by_id = corpus.by_id
  held_out, names = [], set()
  for source in filter(None, map(str.strip, config.data.eval.split(','))):
    name = datasets.name(source)
    config_lib.require(
        name not in names, 'data.eval', config.data.eval,
        f'two of its sets are called {name}, and their metrics would be one: '
        'rename a file, or evaluate one of them afterwards.')
    names.add(name)
    read = datasets.read_questions(
        source, by_id, dataset=name, directory=config.data.directory)
    held_out += read[:config.data.eval_questions or None]
  if not training:
    return corpus, [], held_out
  asked = {example.question for example in held_out}
  read = datasets.read_questions(
      config.data.train, by_id, directory=config.data.directory)
  train = [example for example in read if example.question not in asked]
  if train and len(train) < len(read):
    say(f'{len(read) - len(train):,} questions of {config.data.train} are held '
        'out, and not trained on')
  config_lib.require(
      train, 'data.train', config.data.train,
      'nothing is left to train on once the held-out questions are taken out: '
      'give another file, or lower config.data.eval_questions.')
  return corpus, train, held_out


def _tokenizer(config, world, pretrained):
  special = hf.special_ids(pretrained) if pretrained is not None else ()
  if config.tokenizer:
    return tokenizer_lib.load(config.tokenizer, *special)
  if pretrained is not None:
    return tokenizer_lib.load(pretrained.path, *special)
  config_lib.require(
      world is not None, 'tokenizer', config.tokenizer,
      'real text needs a tokenizer: a Hugging Face folder or a tokenizer.json, '
      "or the model's own with config.model.pretrained.")
  return tokenizer_lib.from_words(
      [*world.words, *protocol_lib.SHORT_WORDS], protocol_lib.TAGS)


def _reward(config) -> rewards.Config | Score:
  """The reward's settings, or the user's own."""
  c = config.reward.to_dict()
  factory = c.pop('factory')
  if factory:
    return _reward_factory(factory, config.reward)
  if config.algorithm == 'ppo':
    c |= dict(search_key=False, turn_reward=False)
  if c['wrong_format'] is None:
    c['wrong_format'] = -1.0 if c['variant'] == 'released' else 0.0
  return rewards.Config(**c)


def _score(config, reward, engine) -> Score:
  if not isinstance(reward, rewards.Config):
    return reward
  embed = getattr(engine, 'embed', None)
  config_lib.require(
      reward.similarity != 'retriever' or embed is not None,
      'reward.similarity', reward.similarity,
      'a server (config.retriever.url, web) does not embed texts: use tfidf.'
      if not engine_lib.is_here(config) else
      'BM25 (config.retriever.method) has no vectors: use tfidf, or method = '
      'dense or fusion.' if config.retriever.method == 'bm25' else
      'the engine of config.retriever.factory has no embed(texts) -> [n, d]; '
      'use tfidf, or give it one.')
  return lambda examples, transcripts: rewards.score(
      examples, transcripts, reward, embed, config.rollout.k)


def _by_all(score, layout) -> Score:
  """Scores with several processes: each its own rows, all get all scores."""
  if distributed.count() == 1:
    return score

  def together(examples, transcripts):
    rows = sharding.local_rows(layout, len(examples))
    scores = score(
        [examples[i] for i in rows], [transcripts[i] for i in rows])
    found = dict(
        pair for part in distributed.exchange(list(zip(rows, scores)), 'score')
        for pair in part)
    return [found[i] for i in range(len(examples))]

  return together


def _agree_on_data(corpus, train, held_out, model):
  if distributed.count() > 1:
    distributed.agree('data', {
        'passages': len(corpus), 'train': digest(train),
        'eval': digest(held_out), 'model': dataclasses.asdict(model)})


def digest(value: Any) -> str:
  """16 hex digits of what a value looks like."""
  return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _reward_factory(path, config) -> Score:
  """A user's own reward: `factory(config.reward)` -> score.

  `score(examples, transcripts)` returns one `rewards.Score` per episode; its
  `turn_rewards[r]` lands on the token that closed search turn r, its
  `global_reward` on the last sampled token. Of several processes each scores
  its own rows.
  """
  module, _, name = path.replace(':', '.').rpartition('.')
  try:
    factory = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
        f'config.reward.factory = {path!r} cannot be imported ({error}): write '
        "'package.module:function', with the package on PYTHONPATH.") from error
  score = factory(config)
  config_lib.require(
      callable(score), 'reward.factory', path,
      'it has to return score(examples, transcripts) -> list of rewards.Score.')
  return score
