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
from typing import Any

from stepsearch import paths
from stepsearch.data import rows as rows_lib

VERSION = '1.0.0'
PASSAGES = 'passages.jsonl'  # beside the records of a corpus
CORPUS = 'corpus'
CONFIGS = {  # the first is the default
    'musique': (), 'hotpotqa': ('distractor', 'fullwiki'), '2wiki': (),
    'bamboogle': ()}

_PART = r'[\w.-]+'
_NAME = re.compile(f'({_PART})(?:/({_PART}))?:({_PART})')
_INFO = 'dataset_info.json'
_BATCH = 1024  # records read at a time


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
  if split == CORPUS and not config:
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
  if split == CORPUS:
    return Name(corpus_name(name, config), '', split)
  return Name(name, config or (known[0] if known else ''), split)


def corpus_name(name: str, config: str) -> str:
  """What the corpus of a set's paragraphs is called."""
  return name if config in ('', *CONFIGS[name][:1]) else f'{name}_{config}'


def check_name(name: str) -> None:
  """Refuses a name by which a corpus could not be read.

  Raises:
    ValueError: it has signs that names have not.
  """
  if not re.fullmatch(_PART, name):
    raise ValueError(
        f'--name={name}: a corpus is called by letters, digits, _, - and ".".')


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


def read(name: Name, directory: paths.Address) -> Iterator[rows_lib.Row]:
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
  # Parsed here: numpy arrays of a few texts each would take three times as
  # long.
  source = builder.as_data_source(
      name.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
  for start in range(0, len(source), _BATCH):
    batch = range(start, min(start + _BATCH, len(source)))
    for number, data in zip(batch, source.__getitems__(batch)):
      yield rows_lib.Row(
          f'{name.name}:{name.split}', f'record {number + 1}', _values(data))


def _values(data: bytes) -> dict[str, Any]:
  """A record as a row of `formats`' own shape; undoes `builders.record`."""
  from tensorflow_datasets.proto import tf_example_pb2

  features = tf_example_pb2.Example.FromString(data).features.feature
  texts = lambda name: [
      value.decode() for value in features[name].bytes_list.value]
  numbers = lambda name: features[name].int64_list.value
  subs = [
      {'question': question, 'answer': answer, 'gold': []}
      for question, answer in zip(
          texts('sub_questions/question'), texts('sub_questions/answer'))]
  for i, document in zip(
      numbers('sub_question_gold/sub_question'),
      texts('sub_question_gold/id')):
    subs[i]['gold'].append(document)
  keys: list[list[str]] = []
  for i, query in zip(
      numbers('search_keys/sub_question'), texts('search_keys/query')):
    keys += [[] for _ in range(i + 1 - len(keys))]
    keys[i].append(query)
  return {
      'id': texts('id')[0],
      'question': texts('question')[0],
      'answers': texts('answers'),
      'gold': [
          {'id': i, 'title': title, 'text': text} for i, title, text in zip(
              texts('gold/id'), texts('gold/title'), texts('gold/text'))],
      'sub_questions': subs,
      'search_keys': keys,
      'hops': numbers('hops')[0],
      'source': texts('source')[0],
      'licence': texts('licence')[0],
  }


def _folder(name: Name, directory: paths.Address) -> paths.Path:
  if not directory:
    raise ValueError(
        f'{name.name}:{name.split} is of a prepared set: say in which folder '
        'it was prepared, by config.data.directory or --data_dir.')
  return paths.Path(directory) / name.folder
