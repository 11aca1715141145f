"""MuSiQue. Needs the three files of config.data and --config.model.pretrained.

`laptop` is a few steps of a small pretrained model, SmolLM2-135M say, on two
CPU cores; `smoke` two steps of a tiny random Qwen (--config.tokenizer=FOLDER).
"""

from configs import default
from stepsearch import config as config_lib


def _data(config):
  data = '../shared/data/musique'
  config.data.corpus = f'{data}/corpus.jsonl'
  config.data.train = config.data.eval = f'{data}/questions.jsonl'
  config.data.eval_questions = 8


def _smoke(config):
  _data(config)
  config.num_steps = 2
  config.batch_size = 8
  config.model.update(dict(
      embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64,
      dtype='float32', remat='off'))
  config.rollout.update(dict(
      max_turns=2, k=1, prompt_length=256, response_length=48,
      observation_length=160, max_length=736, lag=0))
  config.ppo.update(dict(minibatch_size=4, microbatch_size=4))
  config.warmup.update(dict(steps=60, batch_size=2, learning_rate=1e-2))
  config.eval.update(dict(every=2, batch_size=8, sampled=False))
  config.checkpoint.every = 1


def _laptop(config):
  _data(config)
  config.num_steps = 3
  config.batch_size = 8
  config.model.update(dict(dtype='float32', remat='off'))
  config.rollout.update(dict(
      max_turns=2, k=1, prompt_length=352, response_length=48,
      observation_length=160, max_length=736, length_multiple=64, lag=0))
  # One minibatch a step: the ratio of every update is 1.
  config.ppo.update(dict(
      minibatch_size=8, microbatch_size=2, actor_lr=5e-6, critic_lr=1e-4,
      actor_warmup=0.0))
  config.warmup.update(dict(steps=40, batch_size=2, learning_rate=2e-4))
  config.eval.update(dict(every=3, batch_size=8, sampled=False))
  config.checkpoint.update(dict(every=3, keep_latest=1, keep_best=0))


VARIANTS = {'smoke': _smoke, 'laptop': _laptop}


def get_config(arg=''):
  config = default.get_config()
  config.data.demonstrations = 'search_keys'
  for name in filter(None, arg.split(',')):
    if name not in VARIANTS:
      config_lib.unknown_variant(name, list(VARIANTS))
    VARIANTS[name](config)
  return config
