"""Sources → documents, examples and demonstrations.

    a file of a shape of `formats`, on disk or gs://  ─┐
    NAME:SPLIT, a set that `prepare` has made          ─┴▶ Example, Document

Each reader checks every row before anything is computed; bad rows are one
`ValueError` that names file, line and field of each. Ids may be numbers and
become text. A source is a path, or the name of something prepared:
`musique:train`, `hotpotqa/fullwiki:dev`, and of its passages `musique:corpus`.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil

from stepsearch import passages
from stepsearch import paths
from stepsearch.data import formats
from stepsearch.data import prepared
from stepsearch.data import rows as rows_lib
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion


def read_corpus(
    source: paths.Address, directory: paths.Address = '',
    say: Callable[[str], None] = print,
) -> passages.Passages:
  """Checks the passages of a corpus and maps them, in the source's order.

  Args:
    source: JSON lines of {id, title, text} or {id, contents}; a file of
      another kind (packed, a table as DPR's psgs_w100.tsv, or questions with
      the paragraphs they were asked about), which is written once as such lines
      into the cache of `paths`; or NAME:corpus.
    directory: where `prepare` put what NAME:corpus names.
    say: prints a line when a file is written into the cache.

  Raises:
    ValueError: no passages, malformed rows, or an id that occurs twice.
  """
  known = prepared.parse(source)
  if known is not None:
    path = prepared.passages_file(known, directory)
  else:
    path = source if _plain(source) else _materialised(source, say)
  return indexed(path, source)


def indexed(
    path: paths.Address, source: paths.Address,
    tick: Callable[[int], None] | None = None,
) -> passages.Passages:
  """Checks a file of passages as lines, and maps it.

  Args:
    path: the file.
    source: what it is made of, for errors.
    tick: as of `rows.read`.

  Raises:
    ValueError: as of `read_corpus`.
  """
  starts, hashes = array.array('q'), array.array('q')
  faults = rows_lib.Faults(source)
  for row in rows_lib.read(path, faults, tick):
    try:
      formats.passage(row)
    except rows_lib.Fault as fault:
      faults.add(fault)
      continue
    starts.append(row.start)
    hashes.append(hash(row.id()))
  faults.check()
  if not starts:
    raise ValueError(f'{source} holds no documents.')
  documents = passages.Passages(
      passages.mapped(paths.local_copy(path)), starts, hashes
  )
  twice = documents.repeated()
  if twice:
    first, again = twice
    row = 'line' if path == source else 'row'
    raise ValueError(
        f'{source}: the id "{documents[first].id}" is on {row} {first + 1} and'
        f' again on {row} {again + 1}; ids must be unique.'
    )
  return documents


def read_questions(
    source: paths.Address,
    corpus_by_id: Mapping[str, Document] | None = None,
    *,
    dataset: str = '',
    directory: paths.Address = '',
) -> list[Example]:
  """Reads questions of any shape that `formats` knows.

  Each sub-question of a decomposition, its references #k replaced by the
  answers of the sub-questions before it, becomes a search key unless the row
  has keys of its own. The number of hops is that of the sub-questions, else of
  the search keys, else of the gold passages.

  Gold passages are the corpus' own documents where it has them: by an id that
  has the title and text that are given, if any; by title and text; or by a
  title that only one of its passages has (or only one with the sub-question's
  answer in it). A question of which some are neither there nor spelled out in
  the source has none.

  Args:
    source: a file, or NAME:SPLIT.
    corpus_by_id: passages by id. None: the examples have only the gold passages
      that the source itself spells out.
    dataset: name for `Example.dataset`.
    directory: where `prepare` put what NAME:SPLIT names.

  Raises:
    ValueError: no questions, malformed rows, or a gold id that the corpus does
      not hold.
  """
  faults = rows_lib.Faults(source)
  known = prepared.parse(source)
  rows = (
      rows_lib.read(source, faults) if known is None
      else prepared.read(known, directory))
  examples = []
  for row in rows:
    try:
      example = formats.example(row)
      if corpus_by_id is not None:
        _check_ids(example, row, corpus_by_id)
    except rows_lib.Fault as fault:
      faults.add(fault)
      continue
    examples.append(example)
  faults.check()
  if not examples:
    raise ValueError(f'{source} holds no questions.')
  if dataset:
    examples = [dataclasses.replace(e, dataset=dataset) for e in examples]
  _find_gold(examples, corpus_by_id)
  return examples


def name(source: paths.Address) -> str:
  """What a source is called in metrics: musique for musique:dev.

  Also for musique/questions.jsonl; bamboogle for bamboogle.jsonl.gz.
  """
  known = prepared.parse(source)
  if known is not None:
    return known.name
  path = paths.Path(source)
  stem = path.name.removesuffix('.gz').removesuffix('.zip')
  stem = paths.Path(stem).stem if stem.endswith(rows_lib.SUFFIXES) else stem
  return path.parent.name if stem == 'questions' else stem


def write_questions(
    path: paths.Address, examples: Iterable[Example]
) -> None:
  """Writes questions as JSON lines of our own shape, whole or not at all.

  Raises:
    ValueError: as of `paths.explained`.
  """
  with paths.replacing(path) as file:
    for example in examples:
      row = json.dumps(formats.record(example), ensure_ascii=False)
      file.write(row.encode() + b'\n')


def read_demonstrations(
    path: paths.Address,
) -> list[tuple[str, str]]:
  """Reads (question, text) pairs; the text is an episode with its tags.

  Raises:
    ValueError: no demonstrations, or malformed rows.
  """
  faults = rows_lib.Faults(path)
  pairs = []
  for row in rows_lib.read(path, faults):
    try:
      pairs.append((row.text('question'), row.text('text')))
    except rows_lib.Fault as fault:
      faults.add(fault)
  faults.check()
  if not pairs:
    raise ValueError(f'{path} holds no demonstrations.')
  return pairs


def check(
    examples: Sequence[Example], corpus: Sequence[Document] | None, *,
    turn_rewards: bool, k: int, key_rewards: bool = False
):
  """Checks that questions, corpus and rewards can work together.

  Args:
    examples: the questions.
    corpus: the passages; only their number matters. None: not known.
    turn_rewards: whether information gain or redundancy is rewarded.
    k: passages retrieved a search.
    key_rewards: whether queries are compared with search keys.

  Raises:
    ValueError: turn rewards where a question has no gold passages, key rewards
      where none has search keys, or k larger than the corpus.
  """
  if corpus is not None and not 1 <= k <= len(corpus):
    raise ValueError(
        f'config.rollout.k = {k} documents cannot be retrieved from a corpus'
        f' of {len(corpus)}: k must be between 1 and {len(corpus)}.'
    )
  bare = [example.id for example in examples if not example.gold_documents]
  if turn_rewards and bare:
    first = ', '.join(bare[:5]) + (', …' if len(bare) > 5 else '')
    raise ValueError(
        f'{len(bare)} of {len(examples)} questions have no gold documents'
        f' ({first}), which the turn rewards compare with. `python -m'
        ' stepsearch.prepare gold` finds passages for them and says how sure it'
        ' is; or train without, by config.reward.turn_reward=false, or by'
        " config.algorithm=ppo, for which the answer's reward is all."
    )
  if key_rewards and examples and not any(
      any(e.search_keys) for e in examples):
    raise ValueError(
        f'none of the {len(examples)} questions has search keys, which the key'
        ' reward compares queries with. `python -m stepsearch.prepare keys`'
        ' writes them; or train without, by config.reward.search_key=false.'
    )


def read_passages(
    source: paths.Address, faults: rows_lib.Faults,
    tick: Callable[[int], None] | None = None,
    pool: formats.Pool | None = None,
) -> Iterator[Document]:
  """The passages of a file of any kind, one after the other.

  Args:
    source: a corpus, or questions with their paragraphs, which are pooled.
    faults: where malformed rows go.
    tick: as of `rows.read`.
    pool: with the paragraphs of the files before, none of which come again.
  """
  rows = rows_lib.read(source, faults, tick)
  first = next(rows, None)
  if first is None:
    return
  rows = itertools.chain([first], rows)
  if _has_context(first):
    pool = formats.Pool() if pool is None else pool
    for row in rows:
      try:
        documents = formats.context(row)
      except rows_lib.Fault as fault:
        faults.add(fault)
        continue
      for document in documents:
        added, new = pool.add(document)
        if new:
          yield added
    return
  for row in rows:
    try:
      yield formats.passage(row)
    except rows_lib.Fault as fault:
      faults.add(fault)


def _has_context(row: rows_lib.Row) -> bool:
  metadata = row.values.get('metadata')
  inside = metadata if isinstance(metadata, dict) else {}
  return any(
      name in row or name in inside for name in ('paragraphs', 'context'))


def _plain(source: paths.Address) -> bool:
  """Whether a file can be mapped as it is: lines of passages."""
  name = os.fspath(source)
  if name.endswith(('.gz', '.zip', '.parquet', '.csv', '.tsv')) or (
      '.zip/' in name):
    return False
  with rows_lib.opened(source) as (file, *_):
    if rows_lib.is_list(file):
      return False
    line = file.readline()
  try:
    return not _has_context(rows_lib.Row(source, 'line 1', json.loads(line)))
  except ValueError:
    return True  # which is told when it is read


def _materialised(
    source: paths.Address, say: Callable[[str], None]
) -> pathlib.Path:
  """The passages of a file as lines, in the cache; made anew when it changes.

  Raises:
    ValueError: malformed rows.
  """
  local = paths.local_copy(os.fspath(source).partition('.zip/')[0] + (
      '.zip' if '.zip/' in os.fspath(source) else ''))
  with paths.explained(source):
    status = local.stat()
  digest = lambda *key: hashlib.blake2b(
      repr(key).encode(), digest_size=8).hexdigest()
  kept = paths.cache() / 'passages' / digest(
      os.fspath(source) if paths.is_remote(source)
      else os.path.abspath(source))
  folder = kept / digest(status.st_size, status.st_mtime_ns)
  file = folder / 'corpus.jsonl'
  if not file.exists():
    say(f'{source} ({status.st_size / 2**20:,.0f} MiB) is written as lines to '
        f'{file}, once')
    faults = rows_lib.Faults(source)
    with paths.new_folder(folder, file.name) as draft:
      passages.write(draft / file.name, read_passages(source, faults))
      faults.check()
      if not (draft / file.name).stat().st_size:
        raise ValueError(f'{source} holds no documents.')
    for other in kept.iterdir():  # of the file as it was before
      if other != folder and not other.name.startswith('.'):
        shutil.rmtree(other, ignore_errors=True)
  return file


def _check_ids(
    example: Example, row: rows_lib.Row, corpus: Mapping[str, Document]
) -> None:
  """Refuses a gold document that is an id which the corpus does not hold."""
  for d in example.gold_documents:
    if not d.title and not d.text and d.id not in corpus:
      raise row.error(
          'gold', f'"{d.id}" is not the id of a document of the corpus')


def _find_gold(
    examples: list[Example], corpus: Mapping[str, Document] | None
) -> None:
  """Replaces references to gold documents by documents; see `read_questions`.

  In at most one pass over the corpus, for a large one has no room for a table
  of all its texts.
  """
  by_key: dict[tuple[str, str], Document] = {}
  by_title: dict[str, list[Document]] = {}
  if corpus is not None:
    wanted, titles = set(), set()
    for d in (d for e in examples for d in e.gold_documents):
      if _fits(corpus.get(d.id), d):
        continue
      if d.text:
        wanted.add((d.title, d.text))
      else:
        titles.add(d.title)
    if wanted or titles:
      for d in corpus.values():
        if (d.title, d.text) in wanted:
          by_key[d.title, d.text] = d
        if d.title in titles:
          by_title.setdefault(d.title, []).append(d)
  shared: dict[Document, Document] = {}
  for place, example in enumerate(examples):
    if not example.gold_documents and not example.sub_questions:
      continue
    found: dict[str, Document] = {}  # by the reference's own id
    for d in example.gold_documents:
      own = _lookup(d, example, corpus, by_key, by_title)
      if own is not None:
        found[d.id] = shared.setdefault(own, own)
    if len(found) < len({d.id for d in example.gold_documents}):
      found = {}
    # Two references may be one passage.
    gold = tuple(dict.fromkeys(found.values()))
    subs = tuple(
        dataclasses.replace(sub, gold=tuple(dict.fromkeys(
            found[i].id for i in sub.gold if i in found)))
        for sub in example.sub_questions)
    examples[place] = dataclasses.replace(
        example, gold_documents=gold, sub_questions=_about(subs, gold))


def _lookup(d, example, corpus, by_key, by_title) -> Document | None:
  """The document of one reference; None where it cannot be told."""
  if corpus is None:
    return d if d.text else None
  own = corpus.get(d.id)
  if _fits(own, d):
    return own
  if d.text:
    if (d.title, d.text) in by_key:
      return by_key[d.title, d.text]
    # Another passage of the corpus may have its id, that of another corpus.
    return d if own is None else dataclasses.replace(
        d, id=f'{example.id}/{d.id}')
  alike = by_title.get(d.title, [])
  if len(alike) > 1:
    answers = [s.answer for s in example.sub_questions if d.id in s.gold]
    alike = [p for p in alike if any(a and a in p.text for a in answers)]
  return alike[0] if len(alike) == 1 else None


def _fits(document: Document | None, reference: Document) -> bool:
  """Whether a document is all that a reference says of it."""
  return document is not None and (
      reference.title in ('', document.title)
      and reference.text in ('', document.text))


def _about(subs, gold) -> tuple[SubQuestion, ...]:
  """Sub-questions that are relations get the gold document they start from."""
  return tuple(
      sub if sub.gold
      else dataclasses.replace(sub, gold=formats.about(sub.question, gold))
      for sub in subs)
