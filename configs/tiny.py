"""The embedded run: a 0.3 M Qwen learns to search on two CPU cores.

Variants, joined by commas: `sparse`, a stress test whose answer reward is
almost always zero; `ppo`, the answer's reward alone; `good`, a warm-up on good
demonstrations, which leaves RL little to do.
"""

from configs import default
from stepsearch import config as config_lib


def _sparse(config):
  config.num_steps = 20
  config.data.train_hops, config.data.train_shares = (3, 4), (1., 1.)
  config.reward.wrong_format = -1.0  # in both arms
  config.demonstrations.shares = (0.85, 0.15, 0.0)
  config.demonstrations.good_query = 0.2
  config.demonstrations.retry = 0.4


def _ppo(config):
  config.algorithm = 'ppo'


def _good(config):
  config.demonstrations.good_query = 0.9
  config.demonstrations.retry = 1.0
  config.demonstrations.early_stop = 0.0


VARIANTS = {'sparse': _sparse, 'ppo': _ppo, 'good': _good}


def get_config(arg=''):
  config = default.get_config()
  config.num_steps = 30
  config.batch_size = 64
  config.model.update(dict(
      embed=96, layers=3, heads=4, kv_heads=2, head_dim=24, mlp=192,
      rope_theta=1e4, attention_bias=False, qk_norm=True, dtype='float32',
      remat='off'))
  config.data.source = 'world'
  config.data.eval_questions = 384
  config.retriever.dimensions = 1024
  config.rollout.update(dict(
      protocol='short', max_turns=5, k=2, prompt_length=32, response_length=16,
      observation_length=32, max_length=288, length_multiple=64,
      chunk=16, lag=0))  # the CPU decodes and searches in turn anyway
  config.ppo.update(dict(
      minibatch_size=16, microbatch_size=4, actor_lr=5e-4, critic_lr=1e-3,
      actor_warmup=0.05, critic_warmup=0.015))
  config.warmup.update(dict(steps=450, learning_rate=4e-3, weight_decay=0.01))
  config.eval.update(dict(every=10, batch_size=64))
  config.checkpoint.update(dict(every=10))
  for name in filter(None, arg.split(',')):
    if name not in VARIANTS:
      config_lib.unknown_variant(name, list(VARIANTS))
    VARIANTS[name](config)
  return config


def sweep():
  """Step-wise rewards against the answer's alone, three seeds each."""
  return [
      dict(algorithm=algorithm, seed=seed)
      for seed in range(3) for algorithm in ('steppo', 'ppo')]
