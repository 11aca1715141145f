"""The shipped configs, compiled for their TPU slices, as a Markdown table.

    pip install -r launch/requirements-compile.txt
    python -m launch.compile_all [--reports=DIR] [NAME …]

One `stepsearch.compile` after the other, each in a process of its own, a few
minutes of CPU time each; reports that are in DIR already are not made again.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

CONFIGS = (
    'qwen2_5_0_5b.py', 'qwen2_5_3b.py', 'qwen2_5_3b.py:v6e', 'qwen2_5_7b.py',
    'qwen2_5_7b.py:v5p', 'qwen2_5_14b.py', 'qwen2_5_32b.py')
COLUMNS = (
    'config', 'slice', 'peak GiB a chip: rollout / update / of',
    'update: at least', 'bound by', 'model FLOPs', 'MFU', 'sent a chip',
    'step: at least', 'MFU', 'sent a chip')


def compile_one(name: str, reports: pathlib.Path) -> dict:
  """The report of one config; made, if it is not there.

  Raises:
    ValueError: it does not compile or does not fit; with what compile says.
  """
  path = reports / f'{name.replace(":", "-")}.json'
  if not path.exists():
    draft = path.with_suffix('.tmp')
    done = subprocess.run(
        [sys.executable, '-m', 'stepsearch.compile',
         f'--config=configs/{name}', f'--json={draft}'],
        text=True, capture_output=True, check=False)
    if done.returncode:
      raise ValueError(f'{name}: {done.stderr.strip()}')
    draft.replace(path)
  return json.loads(path.read_text())


def row(name: str, report: dict) -> str:
  """A line of the table."""
  phases = report['phases']
  update, step = phases['update'], report['step']
  rollout = max(
      phase['peak_hbm_gib'] for name, phase in phases.items()
      if name not in ('logprobs', 'update'))
  cells = (
      f'`{name}`', f'{report["topology"]}',
      f'{rollout:.1f} / {update["peak_hbm_gib"]:.1f} / '
      f'{report["hbm_gib"]:.2f}',
      f'{update["roofline_s"]:.1f} s', update['bound'],
      f'{update["model_flops_share"]:.2f}', f'{update["roofline_mfu"]:.2f}',
      f'{update["collective_bytes"] / 1e9:,.0f} GB',
      f'{step["roofline_s"]:.1f} s', f'{step["roofline_mfu"]:.2f}',
      f'{step["collective_bytes"] / 1e9:,.0f} GB')
  return _line(cells)


def _line(cells) -> str:
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  from absl import app
  from absl import flags

  _REPORTS = flags.DEFINE_string(
      'reports', None, 'Folder of the JSON reports; default: none are kept.')

  def main(argv):
    """Runs with the flags' values."""
    unknown = set(argv[1:]) - set(CONFIGS)
    if unknown:
      raise SystemExit(
          f'error: {sorted(unknown)[0]} is none of {", ".join(CONFIGS)}.')
    with tempfile.TemporaryDirectory() as temporary:
      reports = pathlib.Path(_REPORTS.value or temporary)
      reports.mkdir(parents=True, exist_ok=True)
      print(_line(COLUMNS))
      print(_line(('---',) * len(COLUMNS)))
      problems = []
      for name in argv[1:] or CONFIGS:
        try:
          print(row(name, compile_one(name, reports)), flush=True)
        except ValueError as error:
          problems.append(f'error: {error}')
    if problems:
      raise SystemExit('\n'.join(problems))

  app.run(main)
