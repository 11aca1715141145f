"""Playing held-out questions and adding up what came of them.

    collect + score ─▶ one row a question ─▶ means, by hops ─▶ eval/em, eval/f1

`em` and `f1` are unweighted means over hops, every question counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from stepsearch import protocol
from stepsearch import types
from stepsearch.data import loader
from stepsearch.rl import rewards


def evaluate(
    collect: Callable[..., Any], score: Callable[..., list[rewards.Score]],
    params: Any, examples: Sequence[types.Example], batch_size: int,
    key: jax.Array, *, greedy: bool,
    on_batch: Callable[[Sequence[dict[str, Any]]], None] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Plays every example exactly once.

  Args:
    collect: a `rollout.collect.Collector`.
    score: (examples, transcripts) -> scores.
    params: actor parameters.
    examples: the questions.
    batch_size: questions at a time; the last batch is filled up by repeats
      that do not count.
    key: drives the sampling; unused where greedy.
    greedy: most likely tokens, or T = `config.rollout.temperature`.
    on_batch: called with the rows so far after each batch.

  Returns:
    `summary` of the rows, and one JSON-able row a question.
  """
  rows = []
  for batch, real in loader.eval_batches(examples, batch_size):
    _, transcripts = collect(
        params, batch, key, first_episode=len(rows), greedy=greedy)
    scores = score(batch, transcripts)
    rows += [
        row(*parts)
        for parts in list(zip(batch, transcripts, scores))[:real]]
    if on_batch is not None:
      on_batch(rows)
  return summary(rows), rows


def row(
    example: types.Example, transcript: types.Transcript, score: rewards.Score
) -> dict[str, Any]:
  """All that is known of one episode, for `transcripts/*.jsonl`."""
  shown = {d.id for turn in transcript.turns for d in turn.documents}
  gold = [d.id for d in example.gold_documents]
  return {
      'id': example.id,
      'dataset': example.dataset,
      'hops': example.hops,
      'question': example.question,
      'answers': list(example.answers),
      'prediction': protocol.answer(transcript.turns[-1].text),
      'text': transcript.prompt + transcript.text,
      'gold_documents': gold,
      'gold_recall': (
          sum(g in shown for g in gold) / len(gold) if gold else None),
      'turns': [
          {
              'text': turn.text,
              'query': turn.query,
              'documents': [
                  {'id': d.id, 'title': d.title, 'text': d.text,
                   'score': d.score}
                  for d in turn.documents],
              'information_gain': float(gain),
              'redundancy_penalty': float(penalty),
              'turn_reward': float(reward),
          }
          for turn, gain, penalty, reward in zip(
              transcript.turns, score.gains, score.penalties,
              score.turn_rewards)],
      'searches': transcript.searches,
      'format_ok': bool(score.format_ok),
      'em': float(score.exact_match),
      'f1': float(score.answer_f1),
      'search_key_reward': float(score.search_key),
      'information_gain': float(np.sum(score.gains)),
      'redundancy_penalty': float(np.sum(score.penalties)),
      'global_reward': float(score.global_reward),
  }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Means over the rows of an evaluation.

  Returns:
    `em`, `f1` (unweighted means over hops), `em/<hops>`, `f1/<hops>`,
    `searches` a question, `redundancy` (share of shown documents a search that
    had been shown before), `gold_recall`, `format`, `questions`.
  """
  mean = lambda values: float(np.mean(values)) if len(values) else 0.0
  hops = sorted({r['hops'] for r in rows})
  found = {}
  for name in ('em', 'f1'):
    by_hops = {h: mean([r[name] for r in rows if r['hops'] == h]) for h in hops}
    found[name] = mean(list(by_hops.values()))
    found |= {f'{name}/{h}': value for h, value in by_hops.items() if h}
  searches = sum(r['searches'] for r in rows)
  recalls = [r['gold_recall'] for r in rows if r['gold_recall'] is not None]
  return found | {
      'searches': mean([r['searches'] for r in rows]),
      'redundancy': (
          sum(r['redundancy_penalty'] for r in rows) / max(searches, 1)),
      'gold_recall': mean(recalls),
      'format': mean([r['format_ok'] for r in rows]),
      'questions': float(len(rows)),
  }


def rollout_metrics(
    transcripts: Sequence[types.Transcript], scores: Sequence[rewards.Score],
    sampled: int, seconds: float,
) -> dict[str, float]:
  """What a training rollout looked like: `reward/*` and `rollout/*`.

  Args:
    transcripts: the episodes.
    scores: of the episodes.
    sampled: tokens that the policy wrote in all of them.
    seconds: wall time of the rollout.
  """
  mean = lambda values: float(np.mean(values))
  searches = sum(t.searches for t in transcripts)
  return {
      'reward/answer': mean([s.answer_f1 * s.format_ok for s in scores]),
      'reward/em': mean([s.exact_match for s in scores]),
      'reward/format': mean([s.format_ok for s in scores]),
      'reward/search_key': mean([s.search_key for s in scores]),
      'reward/information_gain': mean([s.gains.sum() for s in scores]),
      'reward/redundancy': (
          sum(s.penalties.sum() for s in scores) / max(searches, 1)),
      'reward/turn': mean([s.turn_rewards.sum() for s in scores]),
      'reward/global': mean([s.global_reward for s in scores]),
      'reward/total': mean(
          [s.global_reward + s.turn_rewards.sum() for s in scores]),
      'rollout/turns': mean([len(t.turns) for t in transcripts]),
      'rollout/searches': searches / len(transcripts),
      'rollout/tokens': float(sampled),
      'rollout/tokens_per_s': sampled / max(seconds, 1e-9),
  }
