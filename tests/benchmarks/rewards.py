"""Speed of the rewards against the released method: python -m <this module>.

The released code fits scikit-learn's `TfidfVectorizer` anew for every retrieved
document. `slow_turns` and `slow_row` do just that, from the description of the
method, and leave out what it repeats beyond that, so that the ratios printed
are a lower bound. Both sides run on the same rows in alternating rounds, by CPU
time of the process, and must agree.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time

import numpy as np
from sklearn.feature_extraction import text as sklearn_text

from stepsearch import protocol
from stepsearch import score
from stepsearch.rl import rewards

ORACLE = (
    pathlib.Path(__file__).parents[3] / 'shared/oracles/released_rewards.json'
)
ROUNDS = 5


def slow_turns(row):
  """Unscaled turn rewards of one row, a fit per retrieved document."""
  flags = row.get('flags', {})
  golds = [rewards.normalize(gold['text']) for gold in row['gold_documents']]
  best, history, turns = np.zeros(len(golds)), set(), []
  for turn in row['turns']:
    c, seen, count = np.zeros(len(golds)), 0, len(turn['docs'])
    for i, document in enumerate(turn['docs'], start=2):
      text = document['text'] + (f'\nDoc {i}' if i <= count else '')
      vectors = sklearn_text.TfidfVectorizer().fit_transform(
          [rewards.normalize(text), *golds]
      )
      c = np.maximum(c, (vectors[1:] @ vectors[0].T).toarray()[:, 0])
      seen += text in history
      history.add(text)
    gain = np.maximum(c - best, 0).mean() * flags.get('information_gain', True)
    best = np.maximum(best, c)
    penalty = seen / max(count, 1) * flags.get('redundancy_penalty', True)
    turns.append((gain - penalty) * flags.get('turn_reward', True))
  return turns


def slow_row(row):
  """Global reward and unscaled turn rewards of one row."""
  text, flags = row['transcript'], row.get('flags', {})
  if not protocol.released_format_ok(text):
    return -1.0, []
  stored = [0.0] * len(row['search_keys'])
  for turn in row['turns']:
    values = [
        max(round(rewards.f1(turn['query'], [key]), 4) for key in group)
        for group in row['search_keys']
    ]
    if max(values):
      stored[values.index(max(values))] = max(values)
  key = sum(stored) / len(stored) * flags.get('search_key_reward', True)
  answer = rewards.f1(protocol.released_answer(text), row['gold_answers'])
  return round(answer, 4) + 0.618 * key, slow_turns(row)


def fast_turns(rows):
  """What `rewards.score` does for turn rewards, from parsed rows."""
  _, examples, transcripts = zip(*rows)
  config = rewards.Config(variant='released')
  similar = rewards._similarities(examples, transcripts, config, None)
  return [
      rewards._turns(transcript, True, c, 0)
      for transcript, c in zip(transcripts, similar)
  ]


def fast_rows(rows):
  """Whole rows as `python -m stepsearch.score` handles them, files apart."""
  return list(score.score_rows((('row', row) for row in rows), 'released'))


def synthetic_rows(count, words):
  """Rows of 4 searches for 3 passages of `words` words each, 2 to 4 golds."""
  rng = np.random.default_rng(0)
  vocabulary = [f'word{i}' for i in range(5000)]

  def passage():
    picks = (rng.zipf(1.3, words) - 1) % len(vocabulary)
    return {'title': 't', 'text': ' '.join(vocabulary[i] for i in picks)}

  def query():
    return ' '.join(rng.choice(vocabulary[:50], 4))

  rows = []
  for _ in range(count):
    pool = [passage() for _ in range(10)]
    turns = [
        {'query': query(), 'docs': [pool[i] for i in rng.choice(10, 3, False)]}
        for _ in range(4)
    ]
    text = ''.join(
        protocol.search_turn('hm', turn['query'])
        + '<information>x</information>'
        for turn in turns
    )
    rows.append({
        'transcript': text + protocol.answer_turn('so', query()),
        'gold_answers': [query()],
        'search_keys': [[query() for _ in range(5)] for _ in range(3)],
        'gold_documents': pool[: rng.integers(2, 5)],
        'turns': turns,
    })
  return rows


def cpu_seconds(function, argument):
  """Result, and CPU seconds of the process that it took."""
  start = time.process_time()
  result = function(argument)
  return result, time.process_time() - start


def compare(rows):
  """Median CPU seconds {(what, side): seconds}; checks that both agree."""
  parsed = [score._parse('row', row, 'released') for row in rows]
  sides = {
      ('turn rewards', 'released'): (lambda x: [*map(slow_turns, x)], rows),
      ('turn rewards', 'ours'): (fast_turns, parsed),
      ('whole rows', 'released'): (lambda x: [*map(slow_row, x)], rows),
      ('whole rows', 'ours'): (fast_rows, rows),
  }
  seconds = {side: [] for side in sides}
  for _ in range(ROUNDS):
    for side, (function, argument) in sides.items():
      result, spent = cpu_seconds(function, argument)
      seconds[side].append(spent)
      if side == ('whole rows', 'released'):
        expected = result
  for (value, turns), row in zip(expected, result):
    np.testing.assert_allclose(row['score'], value, atol=1e-9)
    np.testing.assert_allclose(row['turn_scores'], turns, atol=1e-9)
  return {side: statistics.median(spent) for side, spent in seconds.items()}


def main():
  """Prints the table."""
  workloads = {'made up, 100 words a passage': synthetic_rows(64, 100)}
  if ORACLE.exists():
    oracle = json.loads(ORACLE.read_text())
    workloads = {'oracle rows': oracle, **workloads}
  print(f'median CPU ms a row of {ROUNDS} alternating rounds')
  print(f'{"rows":34} {"what":13} {"released":>9} {"ours":>7} {"ratio":>6}')
  for name, rows in workloads.items():
    found = compare(rows)
    for what in ('turn rewards', 'whole rows'):
      slow, fast = (found[what, side] for side in ('released', 'ours'))
      print(
          f'{f"{name} ({len(rows)})":34} {what:13} '
          f'{1e3 * slow / len(rows):9.3f} {1e3 * fast / len(rows):7.3f} '
          f'{slow / fast:5.0f}x'
      )


if __name__ == '__main__':
  main()
