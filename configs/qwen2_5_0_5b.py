"""Qwen2.5-0.5B on v5e:2x2."""

from configs import qwen2_5
from stepsearch import config as config_lib


def get_config(arg=''):
  if arg:
    config_lib.unknown_variant(arg, [])
  config = qwen2_5.get_config()
  config.topology = 'v5e:2x2'
  config.model.update(dict(
      embed=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864))
  config.ppo.microbatch_size = 4
  return config
