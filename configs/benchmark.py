"""Evaluating a pretrained model on real questions (`stepsearch.evaluate`).

Five searches of three passages, as the published numbers were measured.
`laptop` is for small models on two CPU cores: short turns, two passages a
search, two searches. --config.retriever.* names the engine.
"""

from configs import default
from stepsearch import config as config_lib


def _laptop(config):
  config.model.dtype = 'float32'
  config.rollout.update(dict(
      max_turns=2, k=2, prompt_length=448, response_length=96,
      observation_length=320, max_length=1408, length_multiple=64, chunk=8,
      lag=0))
  config.eval.batch_size = 50


VARIANTS = {'laptop': _laptop}


def get_config(arg=''):
  config = default.get_config()
  config.rollout.update(dict(
      prompt_length=1536, response_length=512, observation_length=800,
      max_length=8704))
  for name in filter(None, arg.split(',')):
    if name not in VARIANTS:
      config_lib.unknown_variant(name, list(VARIANTS))
    VARIANTS[name](config)
  return config
