"""report: the plot is a plot, the table says what the numbers say."""

import math
import random
import struct

import pytest

from stepsearch import report


def _rows(steps=40):
  noise = random.Random(0)
  rows = []
  for step in range(steps + 1):
    rise = 1 - math.exp(-step / 12)
    row = {
        'step': step,
        'reward/answer': 0.3 + 0.55 * rise + noise.gauss(0, 0.05),
        'reward/search_key': 0.4 + 0.3 * rise + noise.gauss(0, 0.03),
        'reward/information_gain': 0.2 + 0.5 * rise + noise.gauss(0, 0.03),
        'reward/redundancy': 0.25 * (1 - rise) + noise.gauss(0, 0.02),
        'rollout/searches': 2.2 + rise + noise.gauss(0, 0.1),
        'ppo/approx_kl': 0.004 + abs(noise.gauss(0, 0.002)),
    }
    if step % 10 == 0:
      row |= {'eval/em': 0.4 + 0.5 * rise, 'eval/f1': 0.5 + 0.45 * rise,
              'eval/searches': 2.3 + rise}
    rows.append(row)
  rows[3]['reward/answer'] = None
  return rows


def _size(path):
  head = path.read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  return struct.unpack('>II', head[16:24])


def test_learning_curve_is_a_readable_png(tmp_path):
  path = tmp_path / 'learning_curve.png'
  report.learning_curve(_rows(), path)
  assert _size(path) == (1200, 800)


def test_learning_curve_of_few_metrics_and_of_one_row(tmp_path):
  path = tmp_path / 'learning_curve.png'
  report.learning_curve([{'step': 0, 'eval/em': 0.5}], path)
  assert _size(path) == (1200, 800)
  with pytest.raises(ValueError, match='none of the 1 rows'):
    report.learning_curve([{'step': 0, 'other': 1.0}], path)


def test_table_rows_columns_and_change():
  before = {'em': .4, 'f1': .45, 'em/2': .5, 'em/3': .4, 'em/4': .3,
            'searches': 2.5, 'redundancy': .25}
  after = {'em': .9, 'f1': .92, 'em/2': .8, 'em/4': .7,
           'searches': 3.0, 'redundancy': .05}
  lines = report.table(before, after).splitlines()
  assert lines[0].split() == ['before', 'after', 'change']
  assert [line[:21].strip() for line in lines[1:]] == [
      'EM', 'F1', 'EM, 2 hops', 'EM, 4 hops', 'searches per question',
      'redundancy']
  assert lines[1].split()[1:] == ['0.400', '0.900', '+0.500']
  assert lines[-1].split()[1:] == ['0.250', '0.050', '-0.200']
  assert len({len(line) for line in lines}) == 1
