"""Evaluates a checkpoint: greedy, every held-out question exactly once.

    python -m stepsearch.evaluate --config=… --checkpoint=WORKDIR --output=DIR

The checkpoint is the workdir of a run, or a Hugging Face folder: a pretrained
model, or what `export` wrote. Writes DIR/eval.json (means, by dataset and by
hops) and DIR/transcripts.jsonl.

`python -m stepsearch.evaluate retrieval` measures search engines alone.
"""

from __future__ import annotations

import json

import jax
import ml_collections

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import distributed
from stepsearch import evaluate_retrieval
from stepsearch import evaluation
from stepsearch import metrics
from stepsearch import paths


def evaluate(
    config: ml_collections.ConfigDict, checkpoint: str, output: str,
    step: int | None = None, *, sampled: bool = False,
) -> dict[str, dict[str, float]]:
  """Plays the held-out questions of the config with a trained actor.

  Args:
    config: of the run; its held-out questions and engine are used. What the
      model is and its tokenizer are read from the run.
    checkpoint: the workdir of a run, or its checkpoints folder; or a Hugging
      Face folder, on disk or gs://.
    output: on disk or gs://; receives eval.json and transcripts.jsonl.
    step: of the checkpoint; the newest by default.
    sampled: at T = config.rollout.temperature instead of greedy.

  Returns:
    `evaluation.summary` by dataset, and over all of them as 'all'.

  Raises:
    ValueError: no such checkpoint, or one of another shape; a bad config.
  """
  assembly.tune_host()
  source = assembly.Checkpoint(checkpoint, step)
  with distributed.first('output'):
    out = config_lib.check_workdir(output, 'output')
  distributed.share(out, 'output')
  assembly.agree(config, checkpoint=checkpoint, step=step, sampled=sampled)
  progress = metrics.Progress(0)
  parts = source.build(config, out, say=progress.line)
  key = jax.random.key(config.seed)
  params, step = source.actor(parts, key)
  name = str(source.root) if step is None else f'step {step} of {source.root}'

  with progress.phase('questions', len(parts.eval)) as tick:
    _, rows = evaluation.evaluate(
        parts.collect, parts.score, params, parts.eval,
        config.eval.batch_size, key, greedy=not sampled,
        on_batch=lambda rows: tick(
            len(rows), em=evaluation.summary(rows)['em']))
  results = {
      name: evaluation.summary([r for r in rows if r['dataset'] == name])
      for name in sorted({r['dataset'] for r in rows})}
  results['all'] = evaluation.summary(rows)
  if distributed.index() == 0:
    paths.write(out / 'transcripts.jsonl', ''.join(
        json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    paths.write(out / 'eval.json', json.dumps(
        {'checkpoint': str(source.root), 'step': step,
         'decoding': 'sampled' if sampled else 'greedy', 'results': results},
        indent=2) + '\n')
  progress.line(name)
  if parts.retriever.failed:
    progress.line(
        f'{parts.retriever.failed} searches failed and found nothing: what '
        'follows is too low')
  for name, found in results.items():
    progress.line(
        f'{name:>12}: EM {found["em"]:.3f}  F1 {found["f1"]:.3f}  searches '
        f'{found["searches"]:.2f}  gold recall {found["gold_recall"]:.3f}  '
        f'({found["questions"]:.0f} questions)')
  progress.line(f'written: {out / "eval.json"}, {out / "transcripts.jsonl"}')
  return results


def _play(argv):
  """The command without a name: its flags, then `evaluate`."""
  from absl import flags

  checkpoint = flags.DEFINE_string(
      'checkpoint', None,
      'Workdir of the training run, or a Hugging Face folder.',
      required=True)
  output = flags.DEFINE_string(
      'output', None, 'Where eval.json and transcripts.jsonl go.',
      required=True)
  step = flags.DEFINE_integer(
      'step', None, 'Step of the checkpoint; the newest by default.')
  sampled = flags.DEFINE_bool(
      'sampled', False, 'Sample at rollout.temperature instead of greedy.')
  joined = distributed.define_flags()

  def main(config):
    with joined():
      evaluate(
          config, checkpoint.value, output.value, step.value,
          sampled=sampled.value)

  config_lib.main(main, argv=argv)


if __name__ == '__main__':
  config_lib.commands(
      {'retrieval': evaluate_retrieval.command}, otherwise=_play)
