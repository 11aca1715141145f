"""Benchmark numbers of played questions, as the official scripts count them.

    Example + Transcript ─▶ row ─▶ one line of transcripts.jsonl
    rows ── measure ─▶ means with bootstrap intervals, by hops

EM and F1 are means over questions, each counted once, whatever its hops: not
the mean over hops that training watches (`evaluation.summary`). Answers are
normalised as SQuAD's are, and of several right answers the best counts. Where
HotpotQA's script, from which 2WikiMultihopQA's is derived, and MuSiQue's
differ, each set has its own:

    HotpotQA, 2Wiki    F1 of yes, no and noanswer is all or nothing
    MuSiQue, others    F1 of two texts without words is 1

A question without a prediction is wrong in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
import datetime
import json
from typing import Any

import numpy as np

from stepsearch import distributed
from stepsearch import evaluation
from stepsearch import paths
from stepsearch import protocol as protocol_lib
from stepsearch import types
from stepsearch import words
from stepsearch.rl import rewards
from stepsearch.rollout import collect

# In the names of sets that are scored by HotpotQA's rule.
_YES_NO = ('hotpot', '2wiki')
_ALL_OR_NOTHING = ('yes', 'no', 'noanswer')
RESAMPLES = 2000


def f1_rule(dataset: str) -> str:
  """Whose script counts F1 of a set: hotpotqa | musique."""
  found = any(part in dataset.lower() for part in _YES_NO)
  return 'hotpotqa' if found else 'musique'


def f1(prediction: str | None, answers: Iterable[str], dataset: str) -> float:
  """Largest word-level F1 with an answer, by the rule of the set."""
  if prediction is None or not prediction.strip():
    return 0.0
  prediction = words.normalize(prediction)
  yes_no = f1_rule(dataset) == 'hotpotqa'
  return max(
      (_f1(prediction, words.normalize(answer), yes_no)
       for answer in answers), default=0.0)


def _f1(x: str, y: str, yes_no: bool) -> float:
  if yes_no and x != y and (x in _ALL_OR_NOTHING or y in _ALL_OR_NOTHING):
    return 0.0
  if not (x and y):
    return float(x == y and not yes_no)
  common = (Counter(x.split()) & Counter(y.split())).total()
  return 2 * common / (len(x.split()) + len(y.split()))


def cover_match(prediction: str | None, answers: Iterable[str]) -> bool:
  """Whether an answer occurs in the prediction, also within a word."""
  prediction = words.normalize(prediction or '')
  answers = [words.normalize(answer) for answer in answers]
  return any(answer and answer in prediction for answer in answers)


def row(
    example: types.Example, transcript: types.Transcript,
    tokens: collect.Tokens, protocol: protocol_lib.Protocol,
    ends: Sequence[str], k: int,
) -> dict[str, Any]:
  """`evaluation.row` with what a benchmark counts.

  Args:
    example: the question.
    transcript: what was played.
    tokens: of it.
    protocol: that it was played by, which tells the answer.
    ends: texts of the tokens that end a sequence; no part of an answer.
    k: documents that a search asked for.
  """
  score, = rewards.score([example], [transcript], rewards.Config(), k=k)
  # Documents in the prompt are a search, but none that the policy wrote.
  *searches, final = [turn.text for turn in transcript.turns]
  for end in ends:
    final = final.removesuffix(end)
  prediction = protocol.prediction(final)
  texts = [*filter(None, searches), final]
  return evaluation.row(example, transcript, score) | {
      'prediction': prediction,
      'em': float(rewards.exact_match(prediction, example.answers)),
      'f1': f1(prediction, example.answers, example.dataset),
      'cover_em': float(cover_match(prediction, example.answers)),
      'format_ok': protocol.keeps_format(texts),
      'tokens': tokens._asdict(),
  }


def measure(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
  """Means over the rows of one set.

  Args:
    rows: at least one.
    seed: of the bootstrap.

  Returns:
    `em`, `f1`, `cover_em`, means over questions; `em_interval`, `f1_interval`,
    95 % each; `em/<hops>`, `f1/<hops>`, `questions/<hops>` where hops are
    known; `gold_recall`, of questions with gold passages, None without any;
    `searches` a question; `redundancy`, share of the documents of a search
    that had been shown before; `format`; `prompt_tokens`, `sampled_tokens`,
    `observed_tokens` a question; `unanswered`, share without a prediction;
    `questions`.
  """
  column = lambda name: np.array([r[name] for r in rows], np.float64)
  mean = lambda values: float(np.mean(values))
  em, f1s = column('em'), column('f1')
  found = {
      'em': mean(em), 'f1': mean(f1s), 'cover_em': mean(column('cover_em'))}
  for name, values in (('em', em), ('f1', f1s)):
    found[f'{name}_interval'] = interval(values, seed)
  hops = column('hops')
  for count in sorted({int(h) for h in hops if h}):
    of = hops == count
    found |= {
        f'em/{count}': mean(em[of]), f'f1/{count}': mean(f1s[of]),
        f'questions/{count}': int(of.sum())}
  recalls = [r['gold_recall'] for r in rows if r['gold_recall'] is not None]
  searches = column('searches')
  found |= {
      'gold_recall': mean(recalls) if recalls else None,
      'searches': mean(searches),
      'redundancy': float(
          column('redundancy_penalty').sum() / max(searches.sum(), 1)),
      'format': mean(column('format_ok'))}
  found |= {
      f'{kind}_tokens': mean([r['tokens'][kind] for r in rows])
      for kind in collect.Tokens._fields}
  return found | {
      'unanswered': mean([r['prediction'] is None for r in rows]),
      'questions': len(rows)}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
  """Lines that show what `measure` found, by method and set."""
  found = [
      f'{"set":>12} {"method":>10} {"EM":>6} {"95 %":>12} {"F1":>6} '
      f'{"95 %":>12} {"cover":>6} {"recall":>6} {"searches":>8} '
      f'{"redundant":>9} {"format":>6} {"questions":>9}']
  for method, sets in results.items():
    for name, m in sets.items():
      recall = m['gold_recall']
      found.append(' '.join([
          f'{name:>12}', f'{method:>10}', f'{m["em"]:6.3f}',
          f'{_bounds(m["em_interval"]):>12}', f'{m["f1"]:6.3f}',
          f'{_bounds(m["f1_interval"]):>12}', f'{m["cover_em"]:6.3f}',
          f'{"-" if recall is None else format(recall, ".3f"):>6}',
          f'{m["searches"]:8.2f}', f'{m["redundancy"]:9.3f}',
          f'{m["format"]:6.3f}', f'{m["questions"]:9d}']))
  return found


def _bounds(bounds):
  return '–'.join(f'{bound:.3f}' for bound in bounds)


def interval(
    values: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
  """The 95 % percentile bootstrap interval of a mean, from a seed."""
  generator = np.random.default_rng(seed)
  means = [
      values[generator.integers(0, len(values), len(values))].mean()
      for _ in range(resamples)]
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def sample(
    examples: Sequence[types.Example], count: int, seed: int
) -> list[types.Example]:
  """So many of the examples, drawn from a seed, in their own order.

  Args:
    examples: of one set.
    count: 0, or more than there are: all.
    seed: of the draw.
  """
  if not 0 < count < len(examples):
    return list(examples)
  chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
  return [examples[i] for i in sorted(chosen.tolist())]


def lines(rows: Iterable[dict[str, Any]]) -> str:
  """Rows as JSON lines."""
  return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


class Record:
  """The files of an evaluation by one method, written while it goes on.

  eval.json says at once what is played, and what came of it once all has been;
  transcripts.jsonl gets each question as it ends, and at the end has them in
  their order. Process 0 writes; all know what is written.

  Attributes:
    folder: of the two files.
    settings: what was played how, as eval.json has it.
    finished: whether nothing is left to play.
  """

  def __init__(self, folder: paths.Address, settings: dict[str, Any]):
    """Begins, or goes on where the same evaluation was stopped.

    Args:
      folder: on disk or gs://.
      settings: JSON; an evaluation with others is another one.

    Raises:
      ValueError: the folder holds another evaluation.
    """
    self.folder = paths.Path(folder)
    self.settings = json.loads(json.dumps(settings))
    self._file = self.folder / 'transcripts.jsonl'
    self._rows: dict[str, dict[int, dict[str, Any]]] = {
        name: {} for name in settings['datasets']}
    found = None
    if distributed.index() == 0:
      found = self._read()
    # To all: what is done, or why it cannot be gone on with.
    found = distributed.exchange(found, 'record')[0]
    if isinstance(found, str):
      raise ValueError(found)
    self.finished, done = found
    if distributed.index():
      for row in done:
        self._rows[row['dataset']][row['number']] = row

  def _read(self) -> tuple[bool, list[dict[str, Any]]] | str:
    """Whether it is finished, and what is done; or what is wrong."""
    path = self.folder / 'eval.json'
    with paths.explained(path):
      if not path.exists():
        paths.write(self._file, '')
        paths.write(path, json.dumps(
            self.settings | {'results': None}, indent=2) + '\n')
        return False, []
      kept = json.loads(path.read_text())
    with paths.explained(self._file):
      found = self._file.read_bytes()
    for name, value in self.settings.items():
      if kept.get(name) != value:
        return (
            f'{path} is of another evaluation: its {name} is '
            f'{json.dumps(kept.get(name))[:200]}, and this one has '
            f'{json.dumps(value)[:200]}. Choose another --output, or remove '
            'that one.')
    # A killed one leaves a torn line, which may end within a character.
    whole = found[:found.rfind(b'\n') + 1]
    if whole != found:
      paths.write(self._file, whole)
    done = []
    for row in map(json.loads, whole.splitlines()):
      self._rows[row['dataset']][row['number']] = row
      done.append({name: row[name] for name in ('dataset', 'number', 'em')})
    return kept['results'] is not None, done

  def done(self, dataset: str) -> Set[int]:
    """Numbers of the questions that have been played."""
    return self._rows[dataset].keys()

  def cut(self, dataset: str, count: int, size: int) -> None:
    """Forgets the rows of a batch that was not finished.

    Args:
      dataset: the set.
      count: its questions.
      size: of a batch.
    """
    rows = self._rows[dataset]
    if len(rows) < count:
      kept = len(rows) // size * size
      self._rows[dataset] = {n: r for n, r in rows.items() if n < kept}
      self._write()

  def add(self, number: int, row: dict[str, Any]) -> None:
    """Takes the row of a question; on disk it is written at once.

    Its `failed_searches` are those that have failed since the row before it.
    """
    row = row | {'number': number}
    self._rows[row['dataset']][number] = row
    if distributed.index() == 0 and not paths.is_remote(self._file):
      with paths.explained(self._file), self._file.open('a') as file:
        file.write(lines([row]))

  def flush(self) -> None:
    """Writes all rows where each could not be written at once."""
    if paths.is_remote(self._file):
      self._write()

  def running_em(self, dataset: str) -> float:
    """EM of what has been played of a set."""
    return float(np.mean([r['em'] for r in self._rows[dataset].values()]))

  @property
  def failed(self) -> int:
    """Searches that found nothing, for the engine failed; of process 0."""
    return sum(
        row.get('failed_searches', 0)
        for rows in self._rows.values() for row in rows.values())

  def finish(self, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Writes both files as they stay.

    Args:
      seed: of the bootstrap.
      seconds: that this took, without what an interrupted one had taken.

    Returns:
      `measure` of each set.
    """
    results = None
    if distributed.index() == 0:
      results = {
          name: measure([row for _, row in sorted(rows.items())], seed)
          for name, rows in self._rows.items()}
      if not self.finished:
        self._write()
        now = datetime.datetime.now(datetime.UTC)
        paths.write(self.folder / 'eval.json', json.dumps(
            self.settings | {
                'date': now.isoformat(timespec='seconds'),
                'seconds': round(seconds, 1), 'failed_searches': self.failed,
                'results': results},
            indent=2) + '\n')
    return distributed.exchange(results, 'record')[0]

  def _write(self):
    if distributed.index() == 0:
      paths.write(self._file, lines(
          row for rows in self._rows.values()
          for _, row in sorted(rows.items())))
