"""MuSiQue with a real tokenizer; `smoke` is two steps of a small random Qwen.

    --config.tokenizer=FOLDER and the three files of config.data are needed.
"""

from configs import default
from stepsearch import config as config_lib


def _smoke(config):
  config.num_steps = 2
  config.batch_size = 8
  data = '../shared/data/musique'
  config.data.corpus = f'{data}/corpus.jsonl'
  config.data.train = config.data.eval = f'{data}/questions.jsonl'
  config.data.eval_questions = 8
  config.model.update(dict(
      embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64,
      dtype='float32', remat=False))
  config.rollout.update(dict(
      max_turns=2, k=1, prompt_length=256, response_length=48,
      observation_length=160, max_length=736))
  config.ppo.update(dict(minibatch_size=4, microbatch_size=4))
  config.warmup.update(dict(steps=60, batch_size=2, learning_rate=1e-2))
  config.eval.update(dict(every=2, batch_size=8, sampled=False))
  config.checkpoint.every = 1


VARIANTS = {'smoke': _smoke}


def get_config(arg=''):
  config = default.get_config()
  config.data.demonstrations = 'search_keys'
  for name in filter(None, arg.split(',')):
    if name not in VARIANTS:
      config_lib.unknown_variant(name, list(VARIANTS))
    VARIANTS[name](config)
  return config
