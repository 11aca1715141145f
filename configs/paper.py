"""The recipe of arXiv 2505.15107: a 3B model on v5e:4x4.

Variants, joined by commas: `7b`, on v5p:2x2x2; `released`, the settings of the
code that was released with the paper, which are others, instead of the paper's.
Base and instruct models differ in --config.model.pretrained alone. Data and
encoder lie where the README's "Reproducing the paper" puts them.

Of the paper are the numbers of `_paper` and the defaults; it names no lengths,
so these are of qwen2_5.py, and no clipping of values and gradients, no weight
of its search keys: these are of the released code. Rows of a microbatch, which
change no result, are the paper's where they fit, in the 3B variants.
"""

from configs import qwen2_5_3b
from configs import qwen2_5_7b
from stepsearch import config as config_lib


def _paper(config):
  config.num_steps = 500
  config.batch_size = 256
  config.rollout.update(dict(temperature=1.0, top_p=1.0, k=3))
  config.ppo.update(dict(
      minibatch_size=64, clip_eps=0.2, kl_coef=1e-3, actor_lr=7e-7,
      critic_lr=7e-6, actor_warmup=0.285, critic_warmup=0.015))
  config.reward.variant = 'paper'


def _released(config):
  config.num_steps = 1120  # the published run was stopped at 930
  config.batch_size = 128
  config.rollout.update(dict(
      temperature=1.0, top_p=0.95, k=3, max_turns=5, prompt_length=2048,
      response_length=800, observation_length=800,
      max_length=4096 + 800))  # of the context, and of one more turn
  config.ppo.update(dict(
      minibatch_size=32, clip_eps=0.2, value_clip=0.5, kl_coef=1e-3,
      entropy_coef=1e-3, max_grad_norm=1.0, average='token', actor_lr=5e-7,
      critic_lr=5e-7, actor_warmup=0.285, critic_warmup=0.05))
  config.reward.variant = 'released'


def get_config(arg=''):
  variants = list(filter(None, arg.split(',')))
  for name in variants:
    if name not in ('7b', 'released'):
      config_lib.unknown_variant(name, ['7b', 'released'])
  large, released = '7b' in variants, 'released' in variants
  if large:
    config = qwen2_5_7b.get_config('v5p')
  else:
    config = qwen2_5_3b.get_config()
    config.ppo.microbatch_size = 16 if released else 32
  (_released if released else _paper)(config)
  config.data.update(dict(
      directory='data', corpus='musique:corpus', train='musique:train',
      eval='musique:dev', eval_questions=512))
  config.retriever.embedder = 'models/e5-base-v2'
  return config
