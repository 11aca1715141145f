"""configs/tiny.py cut down until it learns nothing, in seconds."""

import dataclasses
import pathlib

import jax
import ml_collections
import numpy as np

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import paths
from stepsearch.models import qwen

OVERRIDES = (
    'num_steps=4', 'batch_size=8', 'tensorboard=false', 'mesh=(1, 1, -1)',
    'model.embed=32', 'model.layers=2', 'model.heads=2', 'model.kv_heads=1',
    'model.head_dim=16', 'model.mlp=32', 'world.train_entities=24',
    'world.eval_entities=16', 'world.name_words=8', 'data.train_questions=40',
    'data.eval_questions=10', 'retriever.dimensions=128',
    'ppo.minibatch_size=4', 'ppo.microbatch_size=2', 'warmup.steps=6',
    'warmup.batch_size=8', 'demonstrations.count=40', 'eval.every=2',
    'eval.batch_size=8', 'checkpoint.every=2')
# Metrics of the machine, or of the process.
UNREPEATABLE = ('time/', 'rollout/tokens_per_s')


def searcher(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Makes the workdir of a run whose policy is written by hand.

  It thinks 'a', searches for 'b', and goes on so until no searches are left;
  then it answers 'c': a b c are the first words of the world.
  """
  size = 224
  config = config_lib.load(
      str(pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'),
      [*OVERRIDES, f'model.embed={size}', f'model.vocab_size={size}',
       'model.layers=1', 'model.qk_norm=false', 'model.tie_embeddings=false',
       'rollout.max_turns=2', 'rollout.max_length=640'])
  say = lambda line: None
  parts = assembly.build(config, workdir, training=False, say=say)
  follows = {}
  a, b, c = (f' {word}' for word in parts.world.words[:3])
  for words in (
      '\n<think>', f'<think>{a}</think><search>{b}</search>',
      '</information><think>', f' now<answer>{c}</answer>'):
    ids = parts.tokenizer.encode(words)
    follows |= dict(zip(ids, ids[1:]))
  params = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: qwen.init(parts.model, jax.random.key(0))))
  params['final_norm']['scale'] += 1
  params['embedding'] += np.eye(size, dtype=np.float32)
  for token, after in follows.items():
    params['lm_head'][token, after] = 5.0
  assembly.write_card(parts, paths.Path(workdir) / 'model')
  config_lib.write(config, workdir)
  with checkpoints.Checkpoints(
      workdir / 'checkpoints', keep_latest=1, keep_best=0) as kept:
    kept.save(
        0, {'actor': {'params': jax.tree.map(jax.numpy.asarray, params)}},
        {'step': 0, 'model': dataclasses.asdict(parts.model)})
  return config
