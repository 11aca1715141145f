"""What a run shows at its end: the learning curve and the table.

    metrics.jsonl rows ─▶ learning_curve ─▶ learning_curve.png
    two evaluations    ─▶ table          ─▶ plain text, before → after
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
from typing import Any

from stepsearch import paths

# Panel: title, range of the vertical axis (None = the data's), and its lines
# as (metric, label).
_PANELS = (
    ('Held-out questions, greedy', (0.0, 1.0), (
        ('eval/em', 'EM'), ('eval/f1', 'F1'))),
    ('Reward terms, per training episode', None, (
        ('reward/answer', 'answer'),
        ('reward/search_key', 'search key'),
        ('reward/information_gain', 'information gain'),
        ('reward/redundancy', 'redundancy penalty'))),
    ('Searches per question', None, (
        ('eval/searches', 'held-out, greedy'),
        ('rollout/searches', 'training'))),
    ('KL', None, (
        ('ppo/approx_kl', 'to the policy that sampled'),
        ('ppo/reference_kl', 'to the reference'))),
)
# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')


def learning_curve(
    rows: Sequence[Mapping[str, Any]], path: paths.Address
) -> None:
  """Draws metrics.jsonl as a PNG of about 1200 x 800 pixels.

  Up to four panels over a common step axis; one without data is left out.
  Per-step metrics are noisy: they are drawn pale, under their moving mean.

  Args:
    rows: as `metrics.read` returns them; absent or null metrics are skipped.
    path: the PNG to write, on disk or gs://.

  Raises:
    ValueError: no row holds any of the metrics that are drawn.
  """
  panels = []
  for title, limits, lines in _PANELS:
    drawn = []
    for metric, label in lines:
      points = [
          (row['step'], row[metric])
          for row in rows if row.get(metric) is not None]
      if points:
        drawn.append((label, *zip(*points)))
    if drawn:
      panels.append((title, limits, drawn))
  if not panels:
    raise ValueError(
        f'{path}: none of the {len(rows)} rows holds a metric to draw, such as '
        'eval/em or reward/answer.')

  # Imported here: half a second that no other entry point should pay.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = 1 if len(panels) == 1 else 2
  figure = Figure(figsize=(12, 8), dpi=100, layout='constrained')
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
  axes = list(figure.subplots(
      -(-len(panels) // columns), columns, sharex=True, squeeze=False).flat)
  last_step = max(row['step'] for row in rows)
  for axis, (title, limits, drawn) in zip(axes, panels):
    for colour, (label, steps, values) in zip(_COLOURS, drawn):
      if len(steps) > 12 and len(steps) > last_step / 2:
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axis.plot(
            steps, _moving_mean(values, max(len(values) // 12, 3)),
            color=colour, linewidth=2, label=label)
      else:
        axis.plot(
            steps, values, color=colour, linewidth=2, marker='o',
            markersize=4, label=label)
    if limits:
      axis.set_ylim(*limits)
    axis.set_title(title, loc='left', fontsize=13, pad=10)
    axis.grid(axis='y', color='#dddddd', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(labelsize=11, labelbottom=True)
    axis.set_xlabel('step', fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(drawn) > 1:
      axis.legend(
          frameon=False, fontsize=11, loc='best', handlelength=1.4)
  for axis in axes[len(panels):]:
    axis.set_visible(False)
  drawn = io.BytesIO()
  figure.savefig(drawn, format='png')
  paths.write(path, drawn.getvalue())


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
  """Compares two evaluations as plain text: before, after, change.

  Args:
    before: `em`, `f1`, `em/<hops>`, `searches`, `redundancy`; a row whose key
      either evaluation lacks is skipped.
    after: the same.

  Returns:
    Lines of equal width, no newline at the end.
  """
  hops = sorted(
      int(name.removeprefix('em/')) for name in before
      if name.startswith('em/') and name.removeprefix('em/').isdigit())
  rows = [('EM', 'em'), ('F1', 'f1')]
  for name in ('EM', 'F1'):
    rows += [(f'{name}, {n} hop{"s" if n > 1 else ""}', f'{name.lower()}/{n}')
             for n in hops]
  rows += [('searches per question', 'searches'), ('redundancy', 'redundancy')]
  lines = [f'{"":21}   {"before":>7} {"after":>7} {"change":>7}']
  lines += [
      f'{label:21}   {before[key]:7.3f} {after[key]:7.3f} '
      f'{after[key] - before[key]:+7.3f}'
      for label, key in rows if key in before and key in after]
  return '\n'.join(lines)


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
  """Means over up to `width` values that end at each position."""
  return [
      sum(window) / len(window)
      for window in (
          values[max(i + 1 - width, 0):i + 1] for i in range(len(values)))]
