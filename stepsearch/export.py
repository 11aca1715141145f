"""Makes a Hugging Face folder of a trained actor.

    python -m stepsearch.export --checkpoint=WORKDIR --output=DIR

transformers, vLLM and SGLang load it. config.json, generation_config.json and
the tokenizer are those that the run started from; the weights have the type
that config.json names, or --dtype.
"""

from __future__ import annotations

import jax

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import paths
from stepsearch import sharding
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf


def export(
    checkpoint: str, output: str, step: int | None = None,
    dtype: str | None = None,
) -> None:
  """Writes the actor of a checkpoint.

  Args:
    checkpoint: the workdir of a run, or its checkpoints folder.
    output: absent or empty; local or gs://.
    step: of the checkpoint; the newest by default.
    dtype: float32 | bfloat16 | float16; None: what config.json names.

  Raises:
    ValueError: no such checkpoint, a folder that holds something, values that
      are not finite.
  """
  assembly.tune_host()
  root = paths.Path(checkpoint)
  if root.name == 'checkpoints':
    root = root.parent
  with paths.explained(root):
    trained = all((root / part).is_dir() for part in ('checkpoints', 'model'))
  if not trained:
    raise ValueError(
        f'--checkpoint={checkpoint}: there is no run here (no checkpoints and '
        'model folders in it); give the --workdir of a training run.')
  card = folder_lib.Folder(root / 'model')
  model = hf.read_config(card)
  # Spread over the devices where the sizes allow it.
  count = len(jax.devices())
  if model.embed % count:
    count = 1
  layout = sharding.Layout(
      sharding.make_mesh((1, count, 1), jax.devices()[:count]))
  params, step = checkpoints.restore_actor(
      root / 'checkpoints', model, layout, step)
  size = sum(x.size for x in jax.tree.leaves(params))
  print(f'step {step} of {root}: {size:,} parameters', flush=True)
  hf.save(output, model, params, source=card.path, dtype=dtype)
  files = sorted(path.name for path in paths.Path(output).iterdir())
  print(f'written to {output}: {", ".join(files)}', flush=True)


if __name__ == '__main__':
  from absl import flags

  _CHECKPOINT = flags.DEFINE_string(
      'checkpoint', None, 'Workdir of the training run.', required=True)
  _OUTPUT = flags.DEFINE_string(
      'output', None, 'Folder to write; absent or empty.', required=True)
  _STEP = flags.DEFINE_integer(
      'step', None, 'Step of the checkpoint; the newest by default.')
  _DTYPE = flags.DEFINE_enum(
      'dtype', None, ('float32', 'bfloat16', 'float16'),
      'Type of the weights; by default what config.json names.')
  config_lib.main(lambda: export(
      _CHECKPOINT.value, _OUTPUT.value, _STEP.value, _DTYPE.value),
      takes_config=False)
