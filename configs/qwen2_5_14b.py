"""Qwen2.5-14B on v5p:2x2x4."""

from configs import qwen2_5
from stepsearch import config as config_lib


def get_config(arg=''):
  if arg:
    config_lib.unknown_variant(arg, [])
  config = qwen2_5.get_config()
  config.topology = 'v5p:2x2x4'
  config.model.update(dict(
      vocab_size=152064, embed=5120, layers=48, heads=40, kv_heads=8,
      head_dim=128, mlp=13824, rms_norm_eps=1e-5, tie_embeddings=False,
      remat='dots'))  # there is room
  config.ppo.microbatch_size = 16
  return config
