"""Qwen2.5-32B on v5p:2x4x4."""

from configs import qwen2_5
from stepsearch import config as config_lib


def get_config(arg=''):
  if arg:
    config_lib.unknown_variant(arg, [])
  config = qwen2_5.get_config()
  config.topology = 'v5p:2x4x4'
  config.model.update(dict(
      vocab_size=152064, embed=5120, layers=64, heads=40, kv_heads=8,
      head_dim=128, mlp=27648, rms_norm_eps=1e-5, tie_embeddings=False,
      remat='dots'))  # there is room
  config.ppo.microbatch_size = 32
  return config
