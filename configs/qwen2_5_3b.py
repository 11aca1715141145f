"""Qwen2.5-3B on v5e:4x4; variant `v6e`: on v6e:2x4."""

from configs import qwen2_5
from stepsearch import config as config_lib


def get_config(arg=''):
  config = qwen2_5.get_config()
  config.topology = 'v5e:4x4'
  config.model.update(dict(
      embed=2048, layers=36, heads=16, kv_heads=2, head_dim=128, mlp=11008))
  config.ppo.microbatch_size = 16
  if arg == 'v6e':
    config.topology = 'v6e:2x4'
    config.ppo.microbatch_size = 8
  elif arg:
    config_lib.unknown_variant(arg, ['v6e'])
  return config
