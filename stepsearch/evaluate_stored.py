"""What has been evaluated before: compared with published numbers, or scored.

    python -m stepsearch.evaluate compare runs/a/eval.json runs/b/eval.json
        [--output=comparison.md]
    python -m stepsearch.evaluate transcripts FILE [--dataset=bamboogle]

The first puts evaluations beside the published table and names in what they
were measured differently. The second reads the answers of stored transcripts,
of `evaluate` or as FlashRAG and Search-R1's evaluations keep them, and scores
them as `evaluate` does; where the file reports scores of its own, it says
whether they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import json
import re
from typing import Any, NoReturn

import numpy as np

from stepsearch import benchmark
from stepsearch import config as config_lib
from stepsearch import paths
from stepsearch import protocol
from stepsearch import published
from stepsearch.rl import rewards

_FEW = 5_000_000  # passages: what has fewer is not wiki-18

# ── Beside the published numbers ─────────────────────────────────────────────


def compare(files: Sequence[paths.Address]) -> str:
  """A table of evaluations and published numbers, and how they differ.

  Args:
    files: eval.json of `evaluate --datasets`, or folders with one in them or
      in folders of theirs.

  Returns:
    Markdown.

  Raises:
    ValueError: a file that is none, or whose evaluation has not ended.
  """
  found = [_read(file) for name in files for file in _files(name)]
  titles = [published.TITLES[column] for column in published.COLUMNS]
  rows = [['EM / F1', *titles], ['---'] * (1 + len(titles))]
  for one in found:
    cells = dict.fromkeys(published.COLUMNS, '')
    for dataset, m in one['results'].items():
      column = _column(dataset, one['datasets'][dataset])
      if column in cells:
        low, high = m['em_interval']
        cells[column] = (
            f'**{_share(m["em"])}** ({_share(low)}–{_share(high)}) / '
            f'{_share(m["f1"])}')
    rows.append([f'**{one["method"]}**, {one["name"]}', *cells.values()])
  for system, numbers in published.NUMBERS:
    cells = [f'{_share(em)} / {_share(f1)}' for em, f1 in numbers]
    cells += [''] * (len(titles) - len(cells))
    rows.append([system, *cells])
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  lines += ['', (
      'Bold: measured here, with 95 % bootstrap intervals of EM. The other '
      f'rows are published ({published.SOURCE}); MuSiQue* searches '
      f'{published.OWN_CORPUS}, the others {published.WIKI18}.'), '',
      'Measured differently:', '']
  clauses = [differences(one) for one in found]
  shared = [c for c in clauses[0] if all(c in other for other in clauses)]
  if len(found) > 1 and shared:
    lines += [f'* in all rows: {"; ".join(shared)}.']
  for one, own in zip(found, clauses):
    own = [c for c in own if len(found) == 1 or c not in shared]
    if own:
      lines += [f'* **{one["method"]}**, {one["name"]}: {"; ".join(own)}.']
  return '\n'.join(lines) + '\n'


def differences(one: dict[str, Any]) -> list[str]:
  """In what an evaluation is not what was published, a clause each.

  Args:
    one: eval.json.
  """
  theirs = published.PROTOCOL
  clauses = [f'the model is {one["checkpoint"]}'
             + ('' if one['step'] is None else f', step {one["step"]}')
             + f', theirs {theirs["model"]}']
  questions, others = [], []
  corpora = {published.WIKI18: [], published.OWN_CORPUS: []}
  for dataset, settings in one['datasets'].items():
    if dataset not in published.SIZES:
      others.append(dataset)
      continue
    title, size = published.TITLES[dataset], published.SIZES[dataset]
    split = published.SPLITS[dataset]
    if settings['asked'] != size or settings['split'] != split:
      drawn = '' if settings['drawn_with_seed'] is None else (
          f' drawn of {settings["size"]:,}')
      source = settings['split'] or settings['questions']
      questions.append(
          f'{title} {settings["asked"]:,}{drawn} ({source}) for {size:,} '
          f'({split})')
    if (settings['passages'] or 0) < _FEW:
      count = settings['passages']
      column = _column(dataset, settings)
      corpora[
          published.WIKI18 if column == dataset else published.OWN_CORPUS] += [
          f'{published.TITLES[column]} '
          + (f'{count:,} passages' if count else 'passages')
          + f' of {settings["corpus"]}']
  if questions:
    clauses.append('questions: ' + ', '.join(questions))
  clauses += [
      f'passages: {", ".join(ours)} for {corpus}'
      for corpus, ours in corpora.items() if ours]
  if others:
    clauses.append(f'nothing is published of {", ".join(others)}')
  engine = _engine(one['retriever'])
  if not re.fullmatch(r'(.*/)?e5-base-v2', engine):
    clauses.append(f'the engine is {engine}, theirs {theirs["encoder"]}')
  for name, ours in one['budgets'].items():
    if ours != theirs.get(name, ours):
      clauses.append(f'{name} is {ours}, theirs {theirs[name]}')
  clauses.append(f'decoding is {one["decoding"]["kind"]}, theirs '
                 f'{theirs["decoding"]}')
  clauses.append(
      f'the prompt is that of {one["prompt_file"]}' if one.get('prompt_file')
      else 'the prompt is in our own words')
  if one['differs']:
    clauses.append(one['differs'])
  return clauses


def _files(name: paths.Address) -> list[paths.Path]:
  path = paths.Path(name)
  with paths.explained(path):
    if not path.is_dir():
      return [path]
    found = [*path.glob('eval.json')] or sorted(path.glob('*/eval.json'))
  if not found:
    raise ValueError(
        f'{path}: there is no eval.json in it, nor in a folder in it; give the '
        '--output of `python -m stepsearch.evaluate --datasets=…`.')
  return found


def _read(path: paths.Path) -> dict[str, Any]:
  with paths.explained(path):
    text = path.read_bytes()
  try:
    one = json.loads(text)
    results = one['results']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
        f'{path} is no eval.json of `python -m stepsearch.evaluate` '
        f'({error!r}).') from error
  if 'datasets' not in one:
    raise ValueError(
        f'{path} is of the held-out questions of a config, of which nothing is '
        'published: evaluate with --datasets.')
  if results is None:
    raise ValueError(
        f'{path}: this evaluation has not ended; its command goes on with it.')
  step = '' if one['step'] is None else f' @ {one["step"]}'
  return one | {'name': paths.Path(one['checkpoint']).name + step}


def _column(dataset: str, settings: dict[str, Any]) -> str:
  few = settings['passages'] and settings['passages'] < _FEW
  return 'musique*' if dataset == 'musique' and few else dataset


def _engine(retriever: dict[str, Any]) -> str:
  for name in ('url', 'web', 'factory'):
    if retriever[name]:
      return str(retriever[name])
  found = {
      'bm25': 'BM25', 'fusion': f'BM25 with {retriever["embedder"]}',
  }.get(retriever['method'], str(retriever['embedder']))
  if retriever['reranker']:
    found += f', ordered by {retriever["reranker"]}'
  return found


def _share(value: float) -> str:
  return f'{value:.3f}'.replace('0.', '.', 1)


# ── Stored transcripts ───────────────────────────────────────────────────────


def score_transcripts(
    path: paths.Address, dataset: str = ''
) -> tuple[dict[str, float], dict[str, float], list[str]]:
  """Scores the answers of stored transcripts.

  Args:
    path: rows of `evaluate`, or {id, golden_answers, output: {final_response,
      metric_score}}; JSON lines, or one JSON list.
    dataset: whose rule counts F1, where the rows do not say.

  Returns:
    means of `em`, `f1` and `cover_em`; those that the file reports, by the same
    names; and ids of the rows in which the two differ.

  Raises:
    ValueError: a file or row that is none of these.
  """
  found, reported, differ = [], [], []
  for where, row in _rows(path):
    try:
      if 'output' in row:
        text, answers = row['output']['final_response'], row['golden_answers']
        turns = protocol.split_transcript(text)
        prediction = protocol.answer(turns[-1]) if turns else None
        theirs = row['output'].get('metric_score') or {}
        theirs = {ours: theirs[name] for ours, name in (
            ('em', 'em'), ('f1', 'f1'), ('cover_em', 'acc')) if name in theirs}
      else:
        prediction, answers = row['prediction'], row['answers']
        theirs = {name: row[name] for name in ('em', 'f1', 'cover_em')
                  if name in row}
      name = row.get('dataset') or dataset
      ours = {
          'em': float(rewards.exact_match(prediction, _texts(answers))),
          'f1': benchmark.f1(prediction, answers, name),
          'cover_em': float(benchmark.cover_match(prediction, answers))}
      theirs = {name: float(value) for name, value in theirs.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
          f'{where}: {error!r} is missing or of another shape; rows of '
          '`evaluate` are expected, or of {id, golden_answers, output: '
          '{final_response, metric_score}}.') from error
    found.append(ours)
    reported.append(theirs)
    if any(abs(ours[name] - value) > 1e-9 for name, value in theirs.items()):
      differ.append(str(row.get('id', where)))
  if not found:
    raise ValueError(f'{path} holds no transcripts.')
  mean = lambda rows: {
      name: float(np.mean([row[name] for row in rows]))
      for name in ('em', 'f1', 'cover_em') if all(name in row for row in rows)}
  return mean(found), mean(reported), differ


def _texts(answers: Sequence[str]) -> Sequence[str]:
  if isinstance(answers, str):  # whose letters would be answers
    raise TypeError(f'{answers!r} is no list')
  return answers


def _rows(path: paths.Address) -> Iterable[tuple[str, dict[str, Any]]]:
  with paths.explained(path):
    text = paths.Path(path).read_bytes()
  try:
    text = text.decode()
    if text.lstrip().startswith('['):
      rows = enumerate(json.loads(text), 1)
      return [(f'{path}, row {i}', row) for i, row in rows]
    return [
        (f'{path}, line {i}', json.loads(line))
        for i, line in enumerate(text.split('\n'), 1) if line.strip()]
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}).') from error


# ── Commands ─────────────────────────────────────────────────────────────────


def compare_command(argv: Sequence[str]) -> NoReturn:
  """`python -m stepsearch.evaluate compare FILES [--output=FILE]`."""
  from absl import flags

  output = flags.DEFINE_string(
      'output', '', 'File that receives the table, in Markdown.')

  def run(*files):
    _needs(files, 'eval.json files or folders')
    table = compare(files)
    print(table, end='', flush=True)
    if output.value:
      paths.write(output.value, table)

  config_lib.main(run, takes_config=False, takes_files=True, argv=argv)


def transcripts_command(argv: Sequence[str]) -> NoReturn:
  """`python -m stepsearch.evaluate transcripts FILES`."""
  from absl import flags

  dataset = flags.DEFINE_string(
      'dataset', '', 'Whose rule counts F1 where the rows do not say: hotpotqa '
      'and 2wiki have one of their own.')

  def run(*files):
    _needs(files, 'files of transcripts')
    for file in files:
      ours, theirs, differ = score_transcripts(file, dataset.value)
      _say(file, ours, theirs, differ, print)

  config_lib.main(run, takes_config=False, takes_files=True, argv=argv)


def _say(
    file: str, ours: dict[str, float], theirs: dict[str, float],
    differ: list[str], say: Callable[[str], None],
) -> None:
  show = lambda means: '  '.join(
      f'{name} {value:.4f}' for name, value in means.items())
  say(f'{file}: {show(ours)}')
  if not theirs:
    say('the file reports no scores')
    return
  say(f'it reports: {show(theirs)}')
  say('every row agrees' if not differ else
      f'{len(differ)} rows differ: {", ".join(differ[:5])}'
      + (', …' if len(differ) > 5 else ''))


def _needs(files: Sequence[str], what: str) -> None:
  if not files:
    raise ValueError(f'name one or more {what}.')
