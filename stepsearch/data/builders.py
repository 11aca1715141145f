"""tensorflow-datasets builders of the questions and passages that are used.

    raw files ─ formats ─▶ Example ─▶ ArrayRecord, one file a split
    any corpus ─▶ Document ─▶ ArrayRecord, and lines that retrieval maps

Records keep the order of the raw file. The sizes of splits are the published
ones; a file that holds less is refused, or with `partial` makes a split called
so: dev_partial. Nothing here imports TensorFlow; nested sequences would, hence
the pairs of lists in `FEATURES`. ArrayRecord cannot be written to a store, so
that `prepare` builds in a local folder that is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fnmatch
import itertools
import pathlib
import shutil
from typing import Any
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from stepsearch import paths
from stepsearch.data import formats
from stepsearch.data import prepared
from stepsearch.data import rows as rows_lib
from stepsearch.types import Document
from stepsearch.types import Example

_TEXT = tfds.features.Text
_BUILD = '.build'  # where tensorflow-datasets writes, inside the draft
_SHARD = 1_000_000  # records of a file
_BLOCK = 1000  # records encoded at a time

# Entry i of sub_questions has the gold ids of sub_question_gold whose
# sub_question is i, and the queries of search_keys likewise.
FEATURES = {
    'id': _TEXT(),
    'question': _TEXT(),
    'answers': tfds.features.Sequence(_TEXT()),
    'hops': np.int32,
    'sub_questions': tfds.features.Sequence(
        {'question': _TEXT(), 'answer': _TEXT()}),
    'sub_question_gold': tfds.features.Sequence(
        {'sub_question': np.int32, 'id': _TEXT()}),
    'gold': tfds.features.Sequence(
        {'id': _TEXT(), 'title': _TEXT(), 'text': _TEXT()}),
    'search_keys': tfds.features.Sequence(
        {'sub_question': np.int32, 'query': _TEXT()}),
    'source': _TEXT(),
    'licence': _TEXT(),
}


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of a published set."""

  size: int  # as published
  # Names of its raw files, the official one first; of those found, the first
  # name counts, with all the files that match it.
  files: tuple[str, ...]
  hub: str  # of these, the one in the repository on Hugging Face


@dataclasses.dataclass(frozen=True)
class Release:
  """A published set: where it comes from, and what it must hold."""

  name: str
  config: str
  homepage: str
  repository: str  # on Hugging Face
  splits: Mapping[str, Split]


_HOTPOTQA = ('https://hotpotqa.github.io', 'hotpotqa/hotpot_qa')
RELEASES = [
    Release(
        'musique', '', 'https://github.com/StonyBrookNLP/musique',
        'dgslibisey/MuSiQue', {
            'train': Split(
                19_938, ('musique_ans_v1.0_train.jsonl',),
                'musique_ans_v1.0_train.jsonl'),
            'dev': Split(
                2_417, ('musique_ans_v1.0_dev.jsonl',),
                'musique_ans_v1.0_dev.jsonl')}),
    Release(
        'hotpotqa', 'distractor', *_HOTPOTQA, {
            'train': Split(
                90_447, ('hotpot_train_v1.1.json',
                         'distractor/train-*.parquet'),
                'distractor/train-*.parquet'),
            'dev': Split(
                7_405, ('hotpot_dev_distractor_v1.json',
                        'distractor/validation-*.parquet'),
                'distractor/validation-*.parquet')}),
    Release(
        'hotpotqa', 'fullwiki', *_HOTPOTQA, {
            'dev': Split(
                7_405, ('hotpot_dev_fullwiki_v1.json',
                        'fullwiki/validation-*.parquet'),
                'fullwiki/validation-*.parquet')}),
    Release(
        '2wiki', '', 'https://github.com/Alab-NII/2wikimultihop',
        'xanhho/2WikiMultihopQA', {
            'train': Split(
                167_454, ('train.json', 'train.parquet'), 'train.parquet'),
            'dev': Split(12_576, ('dev.json', 'dev.parquet'), 'dev.parquet')}),
    Release(
        'bamboogle', '', 'https://github.com/ofirpress/self-ask',
        'RUC-NLPIR/FlashRAG_datasets', {
            'test': Split(
                125, ('Bamboogle Prerelease - Sheet1.csv',
                      'bamboogle/test.jsonl', 'bamboogle.jsonl'),
                'bamboogle/test.jsonl')}),
]
WIKI18 = 21_015_324  # passages; wiki-18.jsonl.gz of PeterJinGo/wiki-18-corpus


class Questions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The questions of one set; `name` is given by its subclasses."""

  VERSION = tfds.core.Version(prepared.VERSION)

  def __init__(
      self, *, splits: Mapping[str, Sequence[Example]] | None = None,
      tick: Callable[[int], None] = lambda done: None, **kwargs
  ):
    """Takes what `read` returned.

    Args:
      splits: by name, the questions.
      tick: is told how many records are written.
      **kwargs: of the base class, such as data_dir.
    """
    self._splits, self._tick = splits or {}, tick
    kwargs.setdefault('file_format', 'array_record')
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(FEATURES),
        homepage=next(
            r.homepage for r in RELEASES if r.name == self.name),
        license=formats.LICENCES[self.name], disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager  # the raw files are read and checked before
    return {
        name: self._generate_examples(examples)
        for name, examples in self._splits.items()}

  def _generate_examples(self, examples):
    for number, example in enumerate(examples):
      self._tick(1)
      yield number, record(example)


class MuSiQue(Questions, skip_registration=True):
  """MuSiQue-Ans; the published test split has no answers and is left out."""

  name = 'musique'


class HotpotQA(Questions, skip_registration=True):
  """HotpotQA: `distractor`, and the dev split of `fullwiki`."""

  name = 'hotpotqa'
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=name, version=prepared.VERSION)
      for name in prepared.CONFIGS['hotpotqa']]


class TwoWiki(Questions, skip_registration=True):
  """2WikiMultihopQA; the published test split has no answers."""

  name = '2wiki'


class Bamboogle(Questions, skip_registration=True):
  """Bamboogle, 125 questions of two hops."""

  name = 'bamboogle'


class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Passages; the config's name is that of the corpus."""

  name = prepared.CORPUS

  def __init__(
      self, *, documents: Iterable[Document] = (), split: str = 'passages',
      tick: Callable[[int], None] = lambda done: None, **kwargs
  ):
    """Takes the passages.

    Args:
      documents: in the order of their ids.
      split: their only split.
      tick: is told how many records are written.
      **kwargs: of the base class, such as config and data_dir.
    """
    self._documents, self._split, self._tick = documents, split, tick
    kwargs.setdefault('file_format', 'array_record')
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(
            {'id': _TEXT(), 'title': _TEXT(), 'text': _TEXT()}),
        disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {self._split: self._generate_examples(self._documents)}

  def _generate_examples(self, documents):
    for number, d in enumerate(documents):
      self._tick(1)
      yield number, {'id': d.id, 'title': d.title, 'text': d.text}


def record(example: Example) -> dict[str, Any]:
  """A question as a record of `FEATURES`; `prepared.read` undoes it."""
  return {
      'id': example.id,
      'question': example.question,
      'answers': list(example.answers),
      'hops': example.hops,
      'sub_questions': [
          {'question': sub.question, 'answer': sub.answer}
          for sub in example.sub_questions],
      'sub_question_gold': [
          {'sub_question': i, 'id': document}
          for i, sub in enumerate(example.sub_questions)
          for document in sub.gold],
      'gold': [
          {'id': d.id, 'title': d.title, 'text': d.text}
          for d in example.gold_documents],
      'search_keys': [
          {'sub_question': i, 'query': query}
          for i, keys in enumerate(example.search_keys) for query in keys],
      'source': example.source,
      'licence': example.licence,
  }


def builder_of(release: Release) -> type[Questions]:
  """The builder class of a set."""
  return {c.name: c for c in (MuSiQue, HotpotQA, TwoWiki, Bamboogle)}[
      release.name]


def find(
    release: Release, raw_dir: paths.Address, splits: Sequence[str]
) -> dict[str, list[str]]:
  """The raw files of some splits below a folder, also inside its archives.

  Raises:
    ValueError: what is missing, under which names and from where; two files of
      one name.
  """
  there = _listing(raw_dir)
  found, missing = {}, []
  for name in splits:
    split = release.splits[name]
    for pattern in split.files:
      files = [
          path for path in there
          if fnmatch.fnmatch(f'/{path}', f'*/{pattern}')
          or fnmatch.fnmatch(f'/{path}', f'*/{pattern}.gz')]
      plain = [path for path in files if '.zip/' not in path]
      files = plain or files
      if len(files) > 1 and '*' not in pattern:
        raise ValueError(
            f'{raw_dir} holds several files called {pattern}: '
            f'{", ".join(files)}. Name the right one, --{name}=FILE.')
      if files:
        found[name] = files
        break
    else:
      missing.append(f'{name} ({", or ".join(split.files)})')
  if missing:
    hub = ', '.join(release.splits[name].hub for name in splits)
    raise ValueError(
        f'--raw_dir={raw_dir}: there is no raw file of {release.name} for '
        f'{"; ".join(missing)}; plain, .gz, or in a .zip. Fetch it from '
        f'{release.homepage}, or with --download from https://huggingface.co/'
        f'datasets/{release.repository} ({hub}); name a file of yours by '
        f'--{splits[0]}=FILE, or leave splits out by --splits.')
  return found


def download(
    repository: str, patterns: Sequence[str], raw_dir: paths.Address
) -> None:
  """Fetches files of a dataset repository on Hugging Face into a folder.

  Raises:
    ValueError: no network, or no such files.
  """
  import huggingface_hub

  if not raw_dir or paths.is_remote(raw_dir):
    raise ValueError(
        f'--raw_dir={raw_dir}: --download needs a folder on this machine.')
  try:
    huggingface_hub.snapshot_download(
        repository, repo_type='dataset', allow_patterns=list(patterns),
        local_dir=raw_dir)
  except Exception as error:  # pylint: disable=broad-except
    # Requests', httpx' and the hub's own, all of which mean the same here.
    raise ValueError(
        f'{", ".join(patterns)} of https://huggingface.co/datasets/'
        f'{repository} cannot be fetched ({_first_line(error)}): check the '
        f'network, or put the files into {raw_dir} by other means.') from error


def read(
    release: Release, split: str, files: Sequence[str],
    pool: Callable[[Document], Document],
    tick: Callable[[int], None] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> list[Example]:
  """Questions of raw files; the ids of their gold passages are the pool's.

  Args:
    release: what they are of.
    split: name for errors.
    files: one after the other.
    pool: gives a passage that comes with a question its id in the corpus.
    tick: as of `rows.read`.
    aliases: more answers, by the `answer_id` of a row; see `read_aliases`.

  Raises:
    ValueError: no questions; malformed rows.
  """
  examples = []
  for path in files:
    faults = rows_lib.Faults(path)
    for row in rows_lib.read(path, faults, tick):
      try:
        other = formats.release(row)
        if other not in ('', release.name):
          raise rows_lib.Fault(
              path, row.where, f'it is of {other}, not of {release.name}')
        example = formats.example(row)
        documents = [pool(document) for document in formats.context(row)]
      except rows_lib.Fault as fault:
        faults.add(fault)
        continue
      more = (aliases or {}).get(row.values.get('answer_id'), ())
      examples.append(dataclasses.replace(
          _renamed(example, documents, release),
          answers=tuple(dict.fromkeys((*example.answers, *more)))))
    faults.check()
  if not examples:
    raise ValueError(
        f'{", ".join(files)}: no questions of {release.name}:{split}.')
  return examples


def read_aliases(path: paths.Address) -> dict[str, tuple[str, ...]]:
  """2Wiki's id_aliases.json: other names of an answer, by its id.

  Raises:
    ValueError: malformed rows.
  """
  faults = rows_lib.Faults(path)
  found = {}
  for row in rows_lib.read(path, faults):
    try:
      found[row.id('Q_id')] = (
          *row.texts('aliases', empty=True),
          *(row.texts('demonyms', empty=True) if 'demonyms' in row else ()))
    except rows_lib.Fault as fault:
      faults.add(fault)
  faults.check()
  return found


def named(
    release: Release, split: str, found: int, files: Sequence[str],
    partial: bool,
) -> str:
  """The name of a split of so many questions: its own, or …_partial.

  Raises:
    ValueError: its size is not the published one; names both.
  """
  expected = release.splits[split].size
  if found == expected:
    return split
  if found > expected or not partial:
    raise ValueError(
        f'{", ".join(files)}: {release.name}:{split} has {expected:,} '
        f'questions as published, and here are {found:,}. '
        + ('It is another file, or several.' if found > expected else
           'Fetch the whole file, or prepare what there is as '
           f'{release.name}:{split}_partial by --partial.'))
  return f'{split}_partial'


def write(
    make: Callable[..., Questions | Corpus], folder: paths.Address,
    beside: Mapping[str, paths.Address] | None = None,
) -> None:
  """Writes what a builder generates into a folder, whole or not at all.

  Record by record: `download_and_prepare` would sort them in memory, and beyond
  a gigabyte in files that it opens by TensorFlow.

  Args:
    make: makes the builder, given its data_dir.
    folder: on disk or gs://; one that is there gives way.
    beside: name -> a local file that is moved there too.

  Raises:
    ValueError: as of `paths.explained`.
  """
  with paths.new_folder(
      folder, 'dataset_info.json', replace=True) as draft:
    builder = make(data_dir=draft / _BUILD)
    made = pathlib.Path(builder.data_dir)
    made.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(
        builder.info, _SHARD, file_format='array_record')
    splits = builder._split_generators(None)  # pylint: disable=protected-access
    writer.initialize_splits(list(splits))
    for name, records in splits.items():
      while block := list(itertools.islice(records, _BLOCK)):
        writer.add_examples({name: [values for _, values in block]})
    writer.close_all()
    for file in made.iterdir():
      shutil.move(file, draft / file.name)
    shutil.rmtree(draft / _BUILD)
    for name, file in (beside or {}).items():
      shutil.move(file, draft / name)


def _renamed(example, documents, release) -> Example:
  """Gold passages under their ids in the pool."""
  ids = {(d.title, d.text): d.id for d in documents}
  gold = [
      dataclasses.replace(d, id=ids.get((d.title, d.text), d.id))
      for d in example.gold_documents]
  new = {
      old.id: d.id for old, d in zip(example.gold_documents, gold)}
  return dataclasses.replace(
      example, gold_documents=tuple(dict.fromkeys(gold)),
      sub_questions=tuple(
          dataclasses.replace(
              sub, gold=tuple(dict.fromkeys(new[i] for i in sub.gold)))
          for sub in example.sub_questions),
      hops=example.hops or (2 if release.name == 'bamboogle' else 0),
      dataset=release.name, licence=formats.LICENCES[release.name])


def _listing(raw_dir) -> list[str]:
  """All files below a folder, and the data in its archives, as sources."""
  if not raw_dir:
    return []
  listed = []
  for path in paths.files(raw_dir):
    listed.append(path)
    if path.endswith('.zip'):
      try:
        with zipfile.ZipFile(paths.local_copy(path)) as archive:
          listed += [f'{path}/{name}' for name in rows_lib.members(archive)]
      except zipfile.BadZipFile as error:
        raise ValueError(
            f'{path} is no archive ({error}): fetch it again.') from error
  return listed


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
