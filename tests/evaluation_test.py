import json

import jax
import numpy as np
import pytest

from stepsearch import evaluation
from stepsearch import protocol
from stepsearch import types
from stepsearch.rl import rewards

GOLD = tuple(types.Document(str(i), f'T{i}', f'text {i}') for i in range(2))


def examples(hops):
  return [
      types.Example(
          f'q{i}', f'question {i}', (f'a{i}',), GOLD, hops=h, dataset='world')
      for i, h in enumerate(hops)]


class Player:
  """Stands for a collector: searches, and is right on the questions given."""

  def __init__(self, right=(), shown=(GOLD[:1], GOLD[:1])):
    self.right, self.shown, self.calls = right, shown, []

  def __call__(self, params, batch, key, *, first_episode, greedy):
    self.calls.append(([e.id for e in batch], params, first_episode, greedy))
    return None, [
        types.Transcript(f'{example.question}\n', (
            *(types.Turn(
                protocol.search_turn('t', 'q'), 'q', documents, 'seen')
              for documents in self.shown),
            types.Turn(protocol.answer_turn(
                't', example.answers[0] if example.id in self.right else 'x')),
        )) for example in batch]


def score(batch, transcripts):
  return rewards.score(batch, transcripts, rewards.Config())


@pytest.mark.parametrize('size', [1, 4, 10, 16])
def test_every_question_exactly_once(size):
  questions = examples([2, 3] * 5)
  player, seen = Player(), []
  summary, rows = evaluation.evaluate(
      player, score, 'params', questions, size, jax.random.key(0), greedy=True,
      on_batch=lambda rows: seen.append(len(rows)))
  assert [row['id'] for row in rows] == [e.id for e in questions]
  assert summary['questions'] == 10
  assert seen == [min(n, 10) for n in range(size, 10 + size, size)]
  assert all(len(ids) == size for ids, *_ in player.calls)
  assert [call[1:] for call in player.calls] == [
      ('params', n, True) for n in range(0, 10, size)]
  json.dumps(rows)


def test_means_over_hops_are_not_weighted():
  # Of 6, 2 and 1 questions, 3, 2 and none are right.
  questions = examples([2] * 6 + [3] * 2 + [4])
  player = Player(right=('q0', 'q1', 'q2', 'q6', 'q7'))
  summary, _ = evaluation.evaluate(
      player, score, None, questions, 4, jax.random.key(0), greedy=False)
  assert (summary['em/2'], summary['em/3'], summary['em/4']) == (0.5, 1.0, 0.0)
  assert summary['em'] == summary['f1'] == 0.5
  assert player.calls[0][-1] is False


def test_what_a_row_and_its_summary_say():
  questions = examples([2, 2])
  player = Player(right=('q0',))
  summary, rows = evaluation.evaluate(
      player, score, None, questions, 2, jax.random.key(0), greedy=True)
  row = rows[0]
  assert (row['prediction'], row['em'], row['f1']) == ('a0', 1.0, 1.0)
  assert rows[1]['prediction'] == 'x' and rows[1]['em'] == 0.0
  assert row['text'].startswith(
      'question 0\n<think>t</think><search>q</search>seen<think>')
  assert row['gold_documents'] == ['0', '1'] and row['gold_recall'] == 0.5
  # The same document twice: a gain at first, then only redundancy.
  turns = row['turns']
  assert [t['redundancy_penalty'] for t in turns] == [0.0, 1.0, 0.0]
  assert turns[0]['information_gain'] > turns[1]['information_gain'] == 0.0
  assert turns[0]['documents'][0]['title'] == 'T0'
  for name, expected in {
      'searches': 2.0, 'redundancy': 0.5, 'gold_recall': 0.5, 'format': 1.0,
      'em': 0.5}.items():
    np.testing.assert_allclose(summary[name], expected)


def test_questions_without_hops_or_golds():
  questions = [types.Example('q0', 'question', ('a',), dataset='other')]
  summary, rows = evaluation.evaluate(
      Player(shown=()), score, None, questions, 2, jax.random.key(0),
      greedy=True)
  assert rows[0]['gold_recall'] is None
  assert summary['gold_recall'] == summary['redundancy'] == 0.0
  assert not any('/' in name for name in summary)


def test_rollout_metrics():
  questions = examples([2, 2, 2])
  _, transcripts = Player(right=('q0',))(
      None, questions, None, first_episode=0, greedy=False)
  scores = score(questions, transcripts)
  found = evaluation.rollout_metrics(transcripts, scores, 300, 2.0)
  for name, expected in {
      'reward/answer': 1 / 3, 'reward/em': 1 / 3, 'reward/format': 1.0,
      'reward/search_key': 0.0, 'reward/redundancy': 0.5,
      'reward/information_gain': scores[0].gains.sum(),
      'reward/turn': scores[0].gains.sum() - 1.0,
      'rollout/turns': 3.0, 'rollout/searches': 2.0, 'rollout/tokens': 300.0,
      'rollout/tokens_per_s': 150.0}.items():
    np.testing.assert_allclose(found[name], expected, err_msg=name)
  np.testing.assert_allclose(
      found['reward/total'], found['reward/global'] + found['reward/turn'])
