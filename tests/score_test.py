import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepsearch import paths
from stepsearch import protocol
from stepsearch import score

ROOT = pathlib.Path(__file__).parents[1]
SHARED = pathlib.Path(__file__).parents[2] / 'shared'
GOLD = {'title': 'g', 'text': 'aa bb'}
OTHER = {'title': 'o', 'text': 'yy zz'}
INFORMATION = '\n\n<information>Doc 1(Title: g) aa bb</information>\n\n'


def row(**fields):
  return {
      'transcript': (
          protocol.search_turn('hm', 'vell town')
          + INFORMATION
          + protocol.search_turn('hm', 'poet')
          + INFORMATION
          + protocol.answer_turn('so', 'the Vell')
          + '\n'
      ),
      'gold_answers': ['Rome', 'Vell'],
      'search_keys': [['vell town', 'x'], ['the poet of vell']],
      'gold_documents': [GOLD],
      'turns': [
          {'query': 'vell town', 'docs': [GOLD, OTHER]},
          {'query': 'poet', 'docs': [OTHER]},
      ],
      **fields,
  }


def scored(one, variant='paper'):
  return next(score.score_rows([('here', one)], variant))


def write(path, rows):
  path.write_text(''.join(json.dumps(one) + '\n' for one in rows))
  return path


def test_a_row_keeps_its_fields_and_gains_five():
  one = row(note='kept \u2028 \ud800')
  out = scored(one)
  key = (1 + 2 / 4) / 2
  assert out == one | {
      'score': pytest.approx(1 + 0.618 * key),
      'answer_f1': 1.0,
      'turn_scores': [pytest.approx(1), -1],
      'search_key_score': key,
      'format_ok': True,
  }


def test_released_scores_are_not_scaled():
  out = scored(row(), 'released')
  # 'Doc 2' behind the first document keeps its cosine below 1.
  assert 0.5 < out['turn_scores'][0] < 0.9
  # Last in both turns, so that its repetition is told.
  assert out['turn_scores'][1] == -1
  broken = row(transcript=row()['transcript'] + 'more')
  out = scored(broken, 'released')
  assert out['score'] == -1 and out['answer_f1'] == 1
  assert out['turn_scores'] == [] and out['search_key_score'] == 0
  assert not out['format_ok']


def test_flags():
  assert scored(row(flags={'redundancy_penalty': False}))['turn_scores'][1] == 0
  out = scored(row(flags={'search_key_reward': False, 'turn_reward': False}))
  assert out['score'] == 1 and out['turn_scores'] == [0, 0]
  assert out['search_key_score'] == 0.75  # still measured
  assert scored(row(flags=None)) == scored(row()) | {'flags': None}


@pytest.mark.parametrize(
    'transcript, format_ok',
    [
        ('', False),
        ('<answer>Vell', False),
        (protocol.answer_turn('so', 'Vell'), False),  # never searched
        (protocol.search_turn('hm', 'vell') + INFORMATION, False),
        (
            protocol.search_turn('hm', 'vell')
            + INFORMATION
            + '<information>mine</information>'
            + protocol.answer_turn('so', 'Vell'),
            False,
        ),
        (
            INFORMATION * 3 + protocol.answer_turn('so', 'Vell'),
            False,
        ),
        (
            protocol.search_turn('hm', 'vell')
            + '<information> <answer>Rome</answer> </information>'
            + protocol.answer_turn('so', 'Vell'),
            True,
        ),
    ],
)
def test_words_of_the_policy_alone_decide_the_format(transcript, format_ok):
  out = scored(row(transcript=transcript))
  assert out['format_ok'] is format_ok
  assert len(out['turn_scores']) == 2  # of the turns of the row, always
  if format_ok:
    assert out['answer_f1'] == 1


def test_oracle():
  path = SHARED / 'oracles' / 'released_rewards.json'
  if not path.exists():
    pytest.skip(f'{path.name} is not at hand')
  rows = json.loads(path.read_text())
  found = score.score_rows(
      ((f'row {i}', one) for i, one in enumerate(rows)), 'released'
  )
  count = 0
  for one, out in zip(rows, found, strict=True):
    count += 1
    for name, expected in one['expected'].items():
      assert len(np.atleast_1d(out[name])) == len(np.atleast_1d(expected))
      np.testing.assert_allclose(out[name], expected, atol=1e-4)
    assert out['format_ok'] == (one['expected']['score'] != -1)
  assert count == 300


def test_file(tmp_path, monkeypatch):
  monkeypatch.setattr(score, '_BATCH', 2)
  flags = ({}, {'turn_reward': False}, {'search_key_reward': False})
  rows = [row(number=i, flags=flags[i % 3]) for i in range(7)]
  source = write(tmp_path / 'rows.jsonl', rows)
  source.write_text('\n' + source.read_text() + '\n')
  output = tmp_path / 'out.jsonl'
  assert score.score_file(source, output, 'paper') == 7
  out = [json.loads(line) for line in output.read_text().splitlines()]
  assert out == [scored(one) for one in rows]
  # Into itself.
  assert score.score_file(source, source, 'paper') == 7
  assert source.read_text() == output.read_text()
  assert sorted(os.listdir(tmp_path)) == ['out.jsonl', 'rows.jsonl']


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'transcript': None}, r'field transcript is None .* a string'),
        ({'gold_answers': []}, r'field gold_answers is empty'),
        ({'gold_answers': 'Vell'}, r"field gold_answers is 'Vell' .* a list"),
        ({'gold_answers': ['a', 1]}, r'field gold_answers\[1\] is 1'),
        ({'search_keys': ['a']}, r"field search_keys\[0\] is 'a' .* a list"),
        ({'search_keys': [['a', {}]]}, r'field search_keys\[0\]\[1\] is {}'),
        (
            {'gold_documents': [GOLD, {'title': 'g'}]},
            r'field gold_documents\[1\]\.text is missing',
        ),
        ({'turns': {}}, r'field turns is {} and must be a list'),
        ({'turns': [3]}, r'field turns\[0\] is 3 and must be an object'),
        (
            {'turns': [{'query': 1, 'docs': []}]},
            r'field turns\[0\]\.query is 1',
        ),
        ({'turns': [{'query': 'q'}]}, r'field turns\[0\]\.docs is missing'),
        (
            {'turns': [{'query': None, 'docs': [{'title': 1, 'text': ''}]}]},
            r'field turns\[0\]\.docs\[0\]\.title is 1',
        ),
        ({'flags': {'gain': True}}, r'field flags\.gain is not known'),
        (
            {'flags': {'turn_reward': 1}},
            r'field flags\.turn_reward is 1 and must be true or false',
        ),
    ],
)
def test_malformed_rows_are_named(tmp_path, fields, message):
  source = write(tmp_path / 'rows.jsonl', [row(), row(**fields)])
  output = tmp_path / 'out.jsonl'
  output.write_text('before')
  with pytest.raises(ValueError, match=rf'rows\.jsonl, line 2: {message}'):
    score.score_file(source, output, 'paper')
  assert output.read_text() == 'before'
  assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    'line', [b'{"transcript": ', b'[1]', b'3', b'{"transcript": "\xff"}']
)
def test_lines_that_are_no_rows(tmp_path, line):
  source = tmp_path / 'rows.jsonl'
  source.write_bytes(line)
  with pytest.raises(ValueError, match=r'rows\.jsonl, line 1: '):
    score.score_file(source, tmp_path / 'out.jsonl', 'paper')
  assert os.listdir(tmp_path) == ['rows.jsonl']


def test_files_that_cannot_be_used(tmp_path):
  source = write(tmp_path / 'rows.jsonl', [row()])
  for pair in (
      (tmp_path / 'no.jsonl', tmp_path / 'out.jsonl'),
      (source, tmp_path),
      (source, source / 'out.jsonl'),
  ):
    with pytest.raises(ValueError, match='cannot be read or written'):
      score.score_file(*pair, 'paper')
  assert os.listdir(tmp_path) == ['rows.jsonl']


def test_files_in_a_store(bucket):
  source, output = (paths.Path(bucket) / name for name in ('in', 'out'))
  paths.write(source, json.dumps(row()) + '\n')
  assert score.score_file(source, output, 'paper') == 1
  assert json.loads(output.read_text()) == scored(row())


def test_command(tmp_path):
  source = write(tmp_path / 'rows.jsonl', [row()])
  output = tmp_path / 'out.jsonl'
  command = [
      sys.executable, '-m', 'stepsearch.score', f'--input={source}',
      f'--output={output}', '--variant=released',
  ]  # fmt: skip
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
      command, capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.startswith('1 rows scored (released) in ')
  assert 'rows/s' in done.stdout
  assert json.loads(output.read_text()) == scored(row(), 'released')
  source.write_text('{}')
  done = subprocess.run(
      command, capture_output=True, text=True, env=environment
  )
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith('error: ') and 'line 1' in done.stderr
