"""What the Qwen2.5 runs share: 256 episodes of up to 4,096 tokens a step.

Each size has a file of its own, qwen2_5_3b.py say, made for the TPU slice in
its config.topology. They need the three files of config.data and
--config.model.pretrained=FOLDER; `stepsearch.compile` needs neither.
"""

from configs import default


def get_config(arg=''):
  config = default.get_config(arg)
  config.model.update(dict(vocab_size=151936, remat='attention'))
  config.mesh = (1, -1, 1)
  # A decoding step reads its weights and little else: each chip reads its part
  # of those that are large, of all rows, instead of all of them for its rows.
  config.sharding.decode.mlp = config.sharding.decode.vocab = (
      'fsdp', 'tensor')
  # An instruction and a question; five searches with three passages of 100
  # words each; what is left is written in stretches of 256 tokens.
  config.rollout.update(dict(
      prompt_length=512, response_length=256, observation_length=448,
      max_length=4096))
  config.ppo.minibatch_size = 64
  return config
