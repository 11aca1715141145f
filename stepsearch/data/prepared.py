"""What `python -m stepsearch.prepare` has made, and where: names of sources.

    musique:train   hotpotqa/fullwiki:dev   2wiki:dev_partial   musique:corpus

lie in DIRECTORY/NAME[/CONFIG]/VERSION, written by `data.builders`, passages in
DIRECTORY/corpus/NAME/VERSION. Records are read back as rows of `formats`' own
shape. TensorFlow is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import difflib
import os
import re

from stepsearch import paths
from stepsearch.data import formats

VERSION = '1.0.0'
PASSAGES = 'passages.jsonl'  # beside the records of a corpus
CORPUS = 'corpus'
CONFIGS = {  # the first is the default
    'musique': (), 'hotpotqa': ('distractor', 'fullwiki'), '2wiki': (),
    'bamboogle': ()}

_NAME = re.compile(r'([\w.-]+)(?:/([\w.-]+))?:([\w.-]+)')
_INFO = 'dataset_info.json'


@dataclasses.dataclass(frozen=True)
class Name:
  """NAME[/CONFIG]:SPLIT, taken apart."""

  name: str
  config: str
  split: str

  @property
  def folder(self) -> str:
    """Where its records lie, in the directory of all."""
    if self.split == CORPUS:
      return f'{CORPUS}/{self.name}/{VERSION}'
    return '/'.join(filter(None, (self.name, self.config, VERSION)))


def parse(source: paths.Address) -> Name | None:
  """A source as the name of something prepared; None: it is a path.

  Raises:
    ValueError: there is no set or config of that name.
  """
  text = os.fspath(source)
  match = _NAME.fullmatch(text)
  if match is None or os.path.exists(text):
    return None
  name, config, split = match.groups('')
  if split == CORPUS:
    return Name(name, '', split)
  if name not in CONFIGS:
    near = difflib.get_close_matches(name, CONFIGS, 1)
    raise ValueError(
        f'{text}: there is no file of this name, and no set called {name}'
        f'{f"; did you mean {near[0]}" if near else ""}? Sets are '
        f'{", ".join(CONFIGS)}, written NAME:SPLIT.')
  known = CONFIGS[name]
  if config and config not in known:
    raise ValueError(
        f'{text}: {name} has no config {config}; it has '
        f'{", ".join(known) or "none"}.')
  return Name(name, config or (known[0] if known else ''), split)


def passages_file(name: Name, directory: paths.Address) -> paths.Path:
  """The lines of a prepared corpus.

  Raises:
    ValueError: it is not there.
  """
  path = _folder(name, directory) / PASSAGES
  if not path.exists():
    raise ValueError(
        f'{name.name}:{CORPUS} has no {path}: prepare it by `python -m '
        f'stepsearch.prepare corpus --name={name.name} --data_dir={directory} '
        '--files=…`, or together with its questions.')
  return path


def read(name: Name, directory: paths.Address) -> Iterator[formats.Row]:
  """Yields the questions of a split, in the order of the raw file.

  Raises:
    ValueError: it is not there; names what is.
  """
  folder = _folder(name, directory)
  if not (folder / _INFO).exists():
    raise ValueError(
        f'{name.name}:{name.split} is not prepared in {directory} (there is no '
        f'{folder / _INFO}): run `python -m stepsearch.prepare {name.name} '
        f'--data_dir={directory} --raw_dir=…`.')
  # Here, because it takes half a second that files do not need.
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(paths.local_copy(folder))
  if name.split not in builder.info.splits:
    there = ', '.join(f'{name.name}:{split}' for split in builder.info.splits)
    raise ValueError(
        f'{name.name}:{name.split} is not in {folder}; there are {there}. A '
        'split of which the raw file holds less is called …_partial.')
  source = builder.as_data_source(name.split)
  for number in range(len(source)):
    yield formats.Row(
        f'{name.name}:{name.split}', f'record {number + 1}',
        _values(source[number]))


def _values(record) -> dict:
  """A record as a row of `formats`' own shape; undoes `builders.record`."""
  text = lambda value: value.decode()
  gold, subs = record['gold'], record['sub_questions']
  pieces = record['sub_question_gold']
  found = [[] for _ in subs['question']]
  for i, document in zip(pieces['sub_question'], pieces['id']):
    found[i].append(text(document))
  keys: list[list[str]] = []
  queries = record['search_keys']
  for i, query in zip(queries['sub_question'], queries['query']):
    keys += [[] for _ in range(i + 1 - len(keys))]
    keys[i].append(text(query))
  return {
      'id': text(record['id']),
      'question': text(record['question']),
      'answers': [text(answer) for answer in record['answers']],
      'gold': [
          {'id': text(i), 'title': text(t), 'text': text(d)}
          for i, t, d in zip(gold['id'], gold['title'], gold['text'])],
      'decomposition': [
          {'question': text(q), 'answer': text(a), 'gold': g}
          for q, a, g in zip(subs['question'], subs['answer'], found)],
      'search_keys': keys,
      'hops': int(record['hops']),
      'source': text(record['source']),
      'licence': text(record['licence']),
  }


def _folder(name: Name, directory: paths.Address) -> paths.Path:
  if not directory:
    raise ValueError(
        f'{name.name}:{name.split} is of a prepared set: say in which folder '
        'it was prepared, by config.data.directory or --data_dir.')
  return paths.Path(directory) / name.folder
