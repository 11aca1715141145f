"""Scores stored transcripts: rows in, rows with their rewards out.

    python -m stepsearch.score --input=rows.jsonl --output=scored.jsonl \
        --variant=paper

A row is one JSON object a line:

    transcript      everything after the prompt, information blocks included
    gold_answers    [alias, ...]
    search_keys     [[reference query of sub-question 1, ...], ...], may be []
    gold_documents  [{title, text}, ...], may be []
    turns           [{query, docs: [{title, text}, ...]}, ...], the searches; a
                    query may be null where the turn asked none
    flags           optional: {information_gain, redundancy_penalty,
                    turn_reward, search_key_reward, answer_reward: bool}, all
                    true by default: the switches of `rewards.Config`

The output row is the input row and

    score             the global reward
    answer_f1         largest F1 with an alias, whatever the format
    turn_scores       G - P of each turn as switched, before any scale
    search_key_score  r_key, before its coefficient
    format_ok         by the rules of the variant

The released variant costs a broken format -1, reports no turn scores for it
(`[]`) and search key score 0. The policy's own words are told from retrieved
ones by `protocol.split_transcript`: training, which knows them by token, is the
stricter judge of what a policy invents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import json
import reprlib
import sys
import time
from typing import Any, Literal

from stepsearch import paths
from stepsearch import protocol
from stepsearch import types
from stepsearch.rl import rewards

_BATCH = 256  # rows scored at once: bounds the memory
_FLAGS = {
    'information_gain': 'information_gain',
    'redundancy_penalty': 'redundancy_penalty',
    'turn_reward': 'turn_reward',
    'search_key_reward': 'search_key',
    'answer_reward': 'answer',
}
_KINDS = {
    str: 'a string',
    list: 'a list',
    dict: 'an object',
    bool: 'true or false',
}


def score_rows(
    rows: Iterable[tuple[str, Any]], variant: Literal['paper', 'released']
) -> Iterator[dict[str, Any]]:
  """Yields each row with its scores added, in order, a batch at a time.

  Args:
    rows: (where, row) pairs; `where` names the row in errors.
    variant: of `rewards.Config`; 'released' takes wrong_format = -1.

  Raises:
    ValueError: a row lacks a field or has a wrong one.
  """
  rows = iter(rows)
  while batch := list(itertools.islice(rows, _BATCH)):
    parsed = [_parse(where, row, variant) for where, row in batch]
    scores: dict[int, rewards.Score] = {}
    for config in {config for config, *_ in parsed}:
      members = [i for i, one in enumerate(parsed) if one[0] == config]
      examples, transcripts = zip(*(parsed[i][1:] for i in members))
      found = rewards.score(examples, transcripts, config)
      scores.update(zip(members, found))
    for i, (_, row) in enumerate(batch):
      yield row | _fields(scores[i], parsed[i][0], len(row['turns']))


def score_file(
    source: paths.Address,
    output: paths.Address,
    variant: Literal['paper', 'released'],
) -> int:
  """Scores a JSONL file into another, which appears only once it is whole.

  Args:
    source: the file to read, on disk or gs://, one row a line; blank lines are
      skipped.
    output: the file to write; replaced if it exists.
    variant: as in `score_rows`.

  Returns:
    The number of rows.

  Raises:
    ValueError: a file cannot be read or written, or a row is malformed (named
      by file, line and field). The output is then as it was before.
  """
  with paths.explained(source):
    lines = open(paths.local_copy(source), 'rb')
  count = 0
  with lines, paths.replacing(output) as out:
    for row in score_rows(_read(lines, source), variant):
      out.write(json.dumps(row).encode() + b'\n')
      count += 1
  return count


def _read(
    lines: Iterable[bytes], source: paths.Address
) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    where = f'{source}, line {number}'
    try:
      yield where, json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
      raise ValueError(
          f'{where}: {error}. Every line must be one JSON object.'
      ) from error


def _fields(
    score: rewards.Score, config: rewards.Config, searches: int
) -> dict[str, Any]:
  """What the output row adds; only the row's own turns get a turn score."""
  dropped = config.variant == 'released' and not score.format_ok
  turn_scores = score.turn_rewards[:searches] / config.turn_factor
  return {
      'score': score.global_reward,
      'answer_f1': score.answer_f1,
      'turn_scores': [] if dropped else turn_scores.tolist(),
      'search_key_score': 0.0 if dropped else score.search_key,
      'format_ok': score.format_ok,
  }


# ── One row ──────────────────────────────────────────────────────────────────


def _parse(
    where: str, row: Any, variant: Literal['paper', 'released']
) -> tuple[rewards.Config, types.Example, types.Transcript]:
  """Checks a row and reads it as the nouns that rewards are about."""
  if not isinstance(row, dict):
    raise ValueError(
        f'{where}: {_short(row)} must be an object with the fields transcript, '
        'gold_answers, search_keys, gold_documents and turns.'
    )
  transcript = _field(where, row, 'transcript', str)
  answers = _strings(where, row, 'gold_answers')
  if not answers:
    raise ValueError(
        f'{where}: field gold_answers is empty and must hold an answer.'
    )
  groups = _field(where, row, 'search_keys', list)
  keys = tuple(
      _strings(where, {name: group}, name)
      for name, group in _named('search_keys', groups)
  )
  golds = _documents(where, row, 'gold_documents')
  searches = []
  for name, turn in _named('turns', _field(where, row, 'turns', list)):
    _check(where, name, turn, dict)
    query = turn.get('query')
    if query is not None:
      _check(where, f'{name}.query', query, str)
    shown = _documents(where, turn, 'docs', f'{name}.')
    searches.append(types.Turn('', query, shown))
  flags = row.get('flags') or {}
  _check(where, 'flags', flags, dict)
  switches = {}
  for name, value in flags.items():
    if name not in _FLAGS:
      raise ValueError(
          f'{where}: field flags.{name} is not known; there are '
          f'{", ".join(_FLAGS)}.'
      )
    _check(where, f'flags.{name}', value, bool)
    switches[_FLAGS[name]] = value
  config = rewards.Config(
      variant=variant,
      wrong_format=-1.0 if variant == 'released' else 0.0,
      **switches,
  )
  example = types.Example('', '', answers, golds, keys)
  return config, example, _transcript(transcript, searches, variant)


def _transcript(
    text: str, searches: list[types.Turn], variant: str
) -> types.Transcript:
  """Joins the searches of a row with the words that the policy wrote.

  The released code reads the text as a whole, so it becomes the last turn.
  Otherwise words and searches are aligned from the first; whichever are more
  numerous have left the format already, or left the answer out.
  """
  if variant == 'released':
    return types.Transcript('', (*searches, types.Turn(text)))
  words = protocol.split_transcript(text)
  turns = [
      dataclasses.replace(turn or types.Turn(''), text=own or '')
      for own, turn in itertools.zip_longest(words, searches)
  ]
  return types.Transcript('', tuple(turns))


def _documents(
    where: str, row: dict[str, Any], name: str, prefix: str = ''
) -> tuple[types.Document, ...]:
  found = []
  documents = _field(where, row, name, list, prefix)
  for inner, document in _named(f'{prefix}{name}', documents):
    _check(where, inner, document, dict)
    title = _field(where, document, 'title', str, f'{inner}.')
    text = _field(where, document, 'text', str, f'{inner}.')
    found.append(types.Document('', title, text))
  return tuple(found)


def _strings(where: str, row: dict[str, Any], name: str) -> tuple[str, ...]:
  values = _field(where, row, name, list)
  for inner, value in _named(name, values):
    _check(where, inner, value, str)
  return tuple(values)


def _named(name: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
  return ((f'{name}[{i}]', value) for i, value in enumerate(values))


def _field(
    where: str, row: dict[str, Any], name: str, kind: type, prefix: str = ''
) -> Any:
  if name not in row:
    raise ValueError(
        f'{where}: field {prefix}{name} is missing; it must be '
        f'{_KINDS[kind]}.'
    )
  return _check(where, f'{prefix}{name}', row[name], kind)


def _check(where: str, name: str, value: Any, kind: type) -> Any:
  if not isinstance(value, kind):
    raise ValueError(
        f'{where}: field {name} is {_short(value)} and must be {_KINDS[kind]}.'
    )
  return value


def _short(value: Any) -> str:
  return reprlib.repr(value)


if __name__ == '__main__':
  from absl import app
  from absl import flags

  _INPUT = flags.DEFINE_string(
      'input', None, 'JSONL file of rows to score.', required=True
  )
  _OUTPUT = flags.DEFINE_string(
      'output', None, 'JSONL file to write.', required=True
  )
  _VARIANT = flags.DEFINE_enum(
      'variant', 'paper', ['paper', 'released'], 'Whose reward values.'
  )

  def main(argv: list[str]) -> None:
    """Scores --input into --output."""
    if len(argv) > 1:
      raise app.UsageError(f'Unknown argument {argv[1]!r}.')
    start = time.perf_counter()
    try:
      count = score_file(_INPUT.value, _OUTPUT.value, _VARIANT.value)
    except ValueError as error:
      sys.exit(f'error: {error}')
    seconds = time.perf_counter() - start
    print(
        f'{count} rows scored ({_VARIANT.value}) in {seconds:.2f} s, '
        f'{count / seconds:.0f} rows/s: {_OUTPUT.value}'
    )

  app.run(main)
