"""Qwen2.5-7B on v5e:8x8; variant `v5p`: on v5p:2x2x2."""

from configs import qwen2_5
from stepsearch import config as config_lib


def get_config(arg=''):
  config = qwen2_5.get_config()
  config.topology = 'v5e:8x8'
  config.model.update(dict(
      vocab_size=152064, embed=3584, layers=28, heads=28, kv_heads=4,
      head_dim=128, mlp=18944, tie_embeddings=False))
  config.ppo.microbatch_size = 64
  if arg == 'v5p':
    config.topology = 'v5p:2x2x2'
    config.model.remat = 'dots'  # there is room
    config.ppo.microbatch_size = 8
  elif arg:
    config_lib.unknown_variant(arg, ['v5p'])
  return config
