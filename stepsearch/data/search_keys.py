"""Search keys of questions: queries that several engines find valid.

    question ─ decompose ─▶ sub-questions ─ write ─▶ N queries each
      ─ search in M engines ─▶ those valid in ⌈M / 2⌉ ─▶ one row a question

arXiv 2505.15107, section on data; our words for "valid results": a gold passage
of the sub-question is among the k best, or a passage that has the
sub-question's answer as a sequence of normalised words, or either of the two.
A query that has the answer in it is a leak and never kept.

Rows have the released fields (question, final_answer, answer_aliases,
sub_searchs, sub_support_docs) and more: `sub_questions`, and `queries`, all
that were written, each with the engines in which it is valid. They are appended
a block of questions at a time; what has been killed goes on by the same call.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
from typing import Any, Literal

from stepsearch import paths
from stepsearch import types
from stepsearch import words
from stepsearch.data import growing
from stepsearch.data import language_model

TASKS = {
    'decompose': ('question', 'answer'),
    'rewrite': ('question', 'steps', 'number'),
    'queries': ('question', 'number'),
}
Search = Callable[[Sequence[str], int], list[list[types.Document]]]

_ITEM = re.compile(r'\s*(?:\d+[.)]|[-*•])\s+(.*\S)')
_LONGEST = 48  # words of a query
_MOST_STEPS = 6
_SAME_FAULT = 20  # questions that fail one after the other and end the run


@dataclasses.dataclass(frozen=True)
class Config:
  """What is written and what is kept."""

  queries: int = 5  # N, a sub-question
  k: int = 3  # passages that an engine is asked for
  valid: Literal['gold', 'answer', 'either'] = 'either'
  rewrite: bool = False  # word the data's own sub-questions anew
  # Where nothing is kept: the sub-question is the only key, or there is none.
  keep_sub_question: bool = False
  tries: int = 3  # answers of a writer to one request, unusable ones included
  block: int = 32  # questions between two looks at the file


@dataclasses.dataclass
class Report:
  """What a file of keys holds, and what this run did for it."""

  questions: int = 0
  sub_questions: int = 0
  written: int = 0  # queries
  kept: int = 0
  per_sub_question: dict[int, int] = dataclasses.field(default_factory=dict)
  keyless_questions: int = 0  # no sub-question kept a key
  valid: dict[str, int] = dataclasses.field(default_factory=dict)  # by engine
  leaks: int = 0
  unjudged: int = 0  # sub-questions without what `valid` looks for
  unusable: list[str] = dataclasses.field(default_factory=list)
  prompt_tokens: int = 0  # of all usable and unusable answers behind the rows
  completion_tokens: int = 0
  failed: list[str] = dataclasses.field(default_factory=list)  # not in the file
  seconds: float = 0.0

  def lines(self) -> list[str]:
    """To be read by people."""
    share = self.kept / max(self.written, 1)
    counts = ', '.join(
        f'{count} with {number}'
        for number, count in sorted(self.per_sub_question.items()))
    lines = [
        f'{self.questions:,} questions, {self.sub_questions:,} sub-questions: '
        f'{self.written:,} queries written, {self.kept:,} kept ({share:.1%}), '
        f'{self.kept / max(self.sub_questions, 1):.2f} a sub-question',
        f'sub-questions by keys kept: {counts or "none"}',
        'valid by engine: ' + ', '.join(
            f'{engine} {count:,} ({count / max(self.written, 1):.1%})'
            for engine, count in self.valid.items()),
        f'{self.keyless_questions:,} questions without any key, {self.leaks:,} '
        f'queries that held the answer, {self.unjudged:,} sub-questions with '
        'nothing to judge by',
    ]
    if self.prompt_tokens or self.completion_tokens:
      lines.append(
          f'{self.prompt_tokens:,} prompt and {self.completion_tokens:,} '
          'completion tokens')
    for name, listed in (
        ('answers that could not be used', self.unusable),
        ('questions that failed and are not in the file', self.failed)):
      if listed:
        lines.append(f'{len(listed)} {name}:')
        lines += [f'  {line}' for line in listed[:10]]
        if len(listed) > 10:
          lines.append(f'  … and {len(listed) - 10} more')
    return lines


def run(
    examples: Sequence[types.Example], writer: language_model.Writer,
    engines: Mapping[str, Callable[[], Any]], config: Config,
    output: paths.Address, *, sources: Mapping[str, Any],
    say: Callable[[str], None] = print,
    progress: Callable[..., Any] = lambda *_: contextlib.nullcontext(
        lambda *_, **values: None),
) -> Report:
  """Writes the keys of all questions that the file does not have yet.

  Args:
    examples: the questions; their ids differ.
    writer: of sub-questions and queries.
    engines: by name, what makes a `retrieval.retriever.Engine`; called once
      where there is something to search.
    config: what is kept.
    output: JSON lines, in the order of the questions once all are there; as
      of `growing.File`, with the report.
    sources: what else a file is made of (questions, corpus, engines); a file
      that was begun with other settings is refused.
    say: prints a line.
    progress: as of `metrics.Progress.phase`.

  Raises:
    ValueError: the file was begun otherwise or is no such file; many questions
      failed one after the other.
    client.Refused: the endpoint, or an engine, takes no request.
  """
  start = time.monotonic()
  order = [example.id for example in examples]
  ((twice, times),) = collections.Counter(order).most_common(1) or [('', 0)]
  if times > 1:
    raise ValueError(
        f'two questions have the id {twice!r}: rows are known by their id, so '
        'give each its own.')
  settings = {
      **sources, **dataclasses.asdict(config), 'writer': writer.name}
  del settings['block']  # which decides on nothing in the file
  file = growing.File(output, settings)
  todo = [example for example in examples if example.id not in file.rows]
  if file.rows:
    say(f'{len(file.rows):,} questions are in {output} already')
  failures: dict[str, str] = {}
  streak = 0
  pipeline = _Pipeline(writer, {
      name: make() for name, make in engines.items() if todo}, config)
  with progress('keys', max(len(todo), 1)) as tick:
    for first in range(0, len(todo), config.block):
      block = todo[first:first + config.block]
      rows = pipeline.rows(block)
      for example, row in zip(block, rows):
        if isinstance(row, str):
          failures[example.id] = row
          streak += 1
        else:
          streak = 0
      file.append([row for row in rows if not isinstance(row, str)])
      tick(first + len(block), **pipeline.shares())
      if streak >= _SAME_FAULT:
        raise ValueError(
            f'the last {streak} questions have all failed, the last because of '
            f'{failures[block[-1].id]}. Nothing is lost: the same command goes '
            'on once that is mended.')
  rows = file.finish(order)
  report = _report(rows, list(engines), config)
  report.failed = [f'{name}: {why}' for name, why in failures.items()]
  report.seconds = time.monotonic() - start
  file.close(dataclasses.asdict(report))
  return report


def examples_to_read(output: paths.Address, number: int) -> list[str]:
  """Lines that show some questions of a file with what was kept and dropped."""
  lines = []
  with open(output, encoding='utf-8') as file:
    for row in map(json.loads, file):
      if number <= 0:
        break
      if not any(row['sub_searchs']):
        continue
      number -= 1
      lines += [row['question'], f'  answer: {row["final_answer"]}']
      for step, written in zip(row['sub_questions'], row['queries']):
        lines.append(f'  {step["question"]} → {step["answer"]}')
        for query in written:
          mark = '+' if query['kept'] else '-'
          held = ', '.join(query['engines']) or (
              'holds the answer' if query.get('leak') else 'none')
          lines.append(f'    {mark} {query["query"]}  [{held}]')
  return lines


class _Pipeline:
  """Takes blocks of questions to rows."""

  def __init__(self, writer, engines, config):
    self._writer, self._engines, self._config = writer, engines, config
    self._need = math.ceil(len(engines) / 2)
    self._written = self._kept = 0

  def shares(self) -> dict[str, float]:
    return {'kept': self._kept / max(self._written, 1)}

  def rows(self, block) -> list[dict[str, Any] | str]:
    """A row a question, or why it has none."""
    drafts = [_Draft(example) for example in block]
    self._decompose(drafts)
    self._write(drafts)
    self._search([draft for draft in drafts if not draft.failed])
    return [draft.failed or self._row(draft) for draft in drafts]

  def _decompose(self, drafts) -> None:
    asked, requests, parsers = [], [], []
    for draft in drafts:
      example = draft.example
      draft.steps = list(example.sub_questions)
      if draft.steps and not self._config.rewrite:
        continue
      asked.append(draft)
      if draft.steps:
        steps = '\n'.join(
            f'{i}. {step.question} | {step.answer or "?"}'
            for i, step in enumerate(draft.steps, 1))
        requests.append(language_model.Request('rewrite', dict(
            question=example.question, steps=steps,
            number=str(len(draft.steps)))))
        parsers.append(lambda text, d=draft: _reworded(text, d.steps))
      else:
        requests.append(language_model.Request('decompose', dict(
            question=example.question, answer=example.answers[0])))
        parsers.append(lambda text, d=draft: _steps(text, d.example.answers))
    for draft, steps in zip(asked, self._ask(asked, requests, parsers)):
      if steps is not None:
        draft.steps = steps
      elif not draft.steps:
        draft.steps = [types.SubQuestion(
            draft.example.question, draft.example.answers[0])]

  def _write(self, drafts) -> None:
    asked, requests = [], []
    for draft in drafts:
      if draft.failed:
        continue
      for step in draft.steps:
        asked.append(draft)
        requests.append(language_model.Request('queries', dict(
            question=step.question, number=str(self._config.queries))))
    parse = lambda text: _queries(text, self._config.queries)
    for draft, texts in zip(
        asked, self._ask(asked, requests, [parse] * len(asked))):
      draft.queries.append(texts or [])

  def _ask(self, drafts, requests, parsers) -> list[Any]:
    """What the parsers made of the answers; None where nothing was usable."""
    results = [None] * len(requests)
    pending = list(range(len(requests)))
    for attempt in range(self._config.tries):
      if not pending:
        break
      answers = self._writer.write([requests[i] for i in pending])
      again = []
      for i, answer in zip(pending, answers):
        if isinstance(answer, language_model.Failed):
          drafts[i].failed = drafts[i].failed or str(answer)
          continue
        drafts[i].prompt_tokens += answer.prompt_tokens
        drafts[i].completion_tokens += answer.completion_tokens
        try:
          results[i] = parsers[i](answer.text)
        except ValueError as problem:
          request = requests[i]
          requests[i] = dataclasses.replace(request, faults=(
              *request.faults, (answer.text, str(problem))))
          again.append(i)
          if attempt == self._config.tries - 1:
            drafts[i].unusable.append(f'{request.task}: {problem}')
      pending = again
    return results

  def _search(self, drafts) -> None:
    """Finds in which engines each query is valid."""
    places = collections.defaultdict(list)  # of a query
    for draft in drafts:
      draft.valid = [
          {query: [] for query in texts if not _leaks(query, step)}
          for step, texts in zip(draft.steps, draft.queries)]
      for number, texts in enumerate(draft.valid):
        for query in texts:
          places[query].append((draft, number))
    asked = list(places)
    for name, engine in self._engines.items():
      found, why = _found(engine, asked, self._config.k)
      for query, documents in zip(asked, found):
        for draft, number in places[query]:
          if documents is None:
            draft.failed = draft.failed or (
                f'{name} has no answer to {query!r}{why}')
          elif self._is_valid(draft, draft.steps[number], documents):
            draft.valid[number][query].append(name)

  def _is_valid(self, draft, step, documents) -> bool:
    gold, answer = _evidence(draft.example, step, self._config.valid)
    return any(
        document.id in gold
        or words.occurs(answer, f'{document.title}\n{document.text}')
        for document in documents)

  def _row(self, draft) -> dict[str, Any]:
    example, keys, queries = draft.example, [], []
    for step, texts, valid in zip(draft.steps, draft.queries, draft.valid):
      kept = [q for q, names in valid.items() if len(names) >= self._need]
      queries.append([
          {'query': query, 'kept': query in kept,
           'engines': valid.get(query, [])}
          | ({} if query in valid else {'leak': True}) for query in texts])
      self._written += len(texts)
      self._kept += len(kept)
      if not kept and self._config.keep_sub_question:
        kept = [step.question]
      keys.append(kept)
    ids = [document.id for document in example.gold_documents]
    row = {
        'id': example.id,
        'question': example.question,
        'final_answer': example.answers[0],
        'answer_aliases': list(example.answers[1:]),
        'sub_searchs': keys,
        'sub_support_docs': [
            {'title': document.title, 'paragraph_text': document.text}
            for document in example.gold_documents],
        'hops': example.hops or len(draft.steps),
        'sub_questions': [
            {'question': step.question, 'answer': step.answer,
             'gold': [ids.index(i) for i in step.gold if i in ids]}
            for step in draft.steps],
        'queries': queries,
    }
    for field in ('dataset', 'source', 'licence'):
      if getattr(example, field):
        row[field] = getattr(example, field)
    if draft.unusable:
      row['unusable'] = draft.unusable
    if draft.prompt_tokens or draft.completion_tokens:
      row['tokens'] = [draft.prompt_tokens, draft.completion_tokens]
    return row


@dataclasses.dataclass
class _Draft:
  """A question on its way to a row."""

  example: types.Example
  steps: list[types.SubQuestion] = dataclasses.field(default_factory=list)
  queries: list[list[str]] = dataclasses.field(default_factory=list)
  # By sub-question: the engines in which a query is valid; leaks are left out.
  valid: list[dict[str, list[str]]] = dataclasses.field(default_factory=list)
  unusable: list[str] = dataclasses.field(default_factory=list)
  failed: str = ''
  prompt_tokens: int = 0
  completion_tokens: int = 0


def _evidence(example, step, valid) -> tuple[frozenset[str], str]:
  """Gold ids and the answer that passages are judged by; empty if by neither.

  A sub-question without gold passages of its own, as a writer's has none, is
  judged by those of the question. Yes and no occur everywhere.
  """
  gold = step.gold or [document.id for document in example.gold_documents]
  return (
      frozenset(gold if valid != 'answer' else ()),
      step.answer if valid != 'gold' and _tells(step.answer) else '')


def _tells(answer: str) -> bool:
  return words.normalize(answer) not in ('', 'yes', 'no')


def _leaks(query: str, step: types.SubQuestion) -> bool:
  return _tells(step.answer) and words.occurs(step.answer, query) and (
      not words.occurs(step.answer, step.question))


def _found(
    engine, queries, k
) -> tuple[list[list[types.Document] | None], str]:
  """What an engine finds; None where it has failed, and then why.

  An engine that is patient with its server counts what failed, and has printed
  why: whatever got nothing may have.
  """
  failed = getattr(engine, 'failed', 0)
  try:
    found = engine.search(queries, k)
  except ConnectionError as error:
    if not hasattr(error, 'found'):
      raise
    return list(error.found), f': {error}'
  if getattr(engine, 'failed', 0) > failed:
    return [row or None for row in found], ''
  return found, ''


# ---- what writers write


def _items(text: str) -> list[str]:
  """The lines of a numbered list, without number, bold type and quotes."""
  found = [
      match[1].replace('**', '').strip() for match in map(
          _ITEM.match, text.splitlines()) if match]
  found = [
      item[1:-1] if item[:1] == item[-1:] == '"' and len(item) > 1 else item
      for item in found]
  found = [item for item in map(str.strip, found) if item]
  if not found:
    raise ValueError('it is not a numbered list')
  return found


def _queries(text: str, most: int) -> list[str]:
  """Up to so many different queries."""
  found = {}
  for item in _items(text):
    if len(item.split()) > _LONGEST:
      raise ValueError(f'{item[:40]!r}… is too long for a query')
    found.setdefault(' '.join(item.split()).lower(), ' '.join(item.split()))
  return list(found.values())[:most]


def _steps(text: str, answers: Sequence[str]) -> list[types.SubQuestion]:
  steps = []
  for item in _items(text):
    question, bar, answer = (part.strip() for part in item.rpartition('|'))
    if not (bar and question and answer):
      raise ValueError(
          f"{item[:60]!r} has no ' | ' between question and answer")
    steps.append(types.SubQuestion(question, answer))
  if len(steps) > _MOST_STEPS:
    raise ValueError(f'{len(steps)} steps are too many')
  last = steps[-1].answer
  if not any(
      words.occurs(last, answer) or words.occurs(answer, last)
      for answer in answers):
    raise ValueError(f'the last answer is {last!r}, not {answers[0]!r}')
  return steps


def _reworded(text: str, steps) -> list[types.SubQuestion]:
  """The same steps in other words; their answers and golds are the data's."""
  items = _items(text)
  if len(items) != len(steps):
    raise ValueError(f'it has {len(items)} lines, not {len(steps)}')
  questions = [item.rpartition('|')[0].strip() or item for item in items]
  return [
      dataclasses.replace(step, question=question)
      for step, question in zip(steps, questions)]


# ---- the report


def _report(rows, engines, config) -> Report:
  report = Report(valid=dict.fromkeys(engines, 0))
  per_sub_question = collections.Counter()
  for row in rows:
    report.questions += 1
    kept_here = 0
    gold = bool(row['sub_support_docs']) and config.valid != 'answer'
    for step, written in zip(row['sub_questions'], row['queries']):
      kept = sum(query['kept'] for query in written)
      per_sub_question[kept] += 1
      report.sub_questions += 1
      report.written += len(written)
      report.kept += kept
      report.leaks += sum(query.get('leak', False) for query in written)
      for query in written:
        for name in query['engines']:
          report.valid[name] += 1
      answer = config.valid != 'gold' and _tells(step['answer'])
      report.unjudged += not (gold or answer)
      kept_here += kept
    report.keyless_questions += not kept_here
    report.unusable += [
        f'{row["id"]}, {problem}' for problem in row.get('unusable', [])]
    spent = row.get('tokens', (0, 0))
    report.prompt_tokens += spent[0]
    report.completion_tokens += spent[1]
  report.per_sub_question = dict(sorted(per_sub_question.items()))
  return report


def fingerprint(examples: Sequence[types.Example]) -> str:
  """Names questions by their number and a hash of all that rows have of them.

  Keys that they have already are no part of that.
  """
  found = hashlib.blake2b(digest_size=8)
  for example in examples:
    found.update(repr(dataclasses.replace(example, search_keys=())).encode())
  return f'{len(examples):,} questions, {found.hexdigest()}'
