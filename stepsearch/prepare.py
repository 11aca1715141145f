"""Prepares data: published sets, corpora, and what questions are missing.

    python -m stepsearch.prepare musique --raw_dir=RAW --data_dir=DATA
    python -m stepsearch.prepare hotpotqa|2wiki|bamboogle  the same
    python -m stepsearch.prepare corpus --name=wiki18 --files=F --data_dir=DATA
    python -m stepsearch.prepare gold --questions=Q --corpus=C --output=O
    python -m stepsearch.prepare keys --questions=Q --corpus=C --output=O
    python -m stepsearch.prepare passages --files=ARTICLES --output=O
    python -m stepsearch.prepare inspect FILE …

What is prepared is read as NAME:SPLIT, wherever a file of questions or a corpus
is named: config.data.train=musique:train, config.data.corpus=musique:corpus,
with config.data.directory=DATA. Files that are ready need no preparation.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
import json
import os
import pathlib
import tempfile
import time
from typing import NoReturn

from absl import flags
import jax

from stepsearch import config as config_lib
from stepsearch import metrics
from stepsearch import passages
from stepsearch import paths
from stepsearch import prepare_passages
from stepsearch.data import datasets
from stepsearch.data import formats
from stepsearch.data import prepared
from stepsearch.data import rows as rows_lib
from stepsearch.types import Document
from stepsearch.types import Example


def _published(name: str, argv: Sequence[str]) -> NoReturn:
  """The command of a published set."""
  from stepsearch.data import builders

  releases = [r for r in builders.RELEASES if r.name == name]
  known = list(dict.fromkeys(s for r in releases for s in r.splits))
  _data_dir()
  raw_dir = flags.DEFINE_string(
      'raw_dir', '', 'Folder with the raw files, plain, .gz, .zip or .parquet.')
  partial = flags.DEFINE_bool(
      'partial', False, 'Take files of fewer questions than were published; '
      'their splits are called ..._partial.')
  fetch = flags.DEFINE_bool(
      'download', False, 'Fetch the raw files from Hugging Face to --raw_dir.')
  export = flags.DEFINE_string(
      'export', '', 'Folder for SPLIT.jsonl of the questions, too.')
  splits = flags.DEFINE_list(
      'splits', None, f'Those wanted; default: those of --{", --".join(known)} '
      'where one is given, else all.')
  variant = flags.DEFINE_enum(
      'variant', releases[0].config, [r.config for r in releases],
      'Which of the settings of the set.') if len(releases) > 1 else None
  aliases = flags.DEFINE_string(
      'aliases', '', 'id_aliases.json of data_ids_april7.zip: its names of an '
      'answer count as well, which raises EM and F1.'
  ) if name == '2wiki' else None
  files = {
      split: flags.DEFINE_list(split, None, f'Raw file or files of {split}.')
      for split in known}

  def run():
    release = next(
        r for r in releases if variant is None or r.config == variant.value)
    prepare(
        release, flags.FLAGS.data_dir, raw_dir.value,
        {name: flag.value for name, flag in files.items() if flag.value},
        splits=splits.value, partial=partial.value, fetch=fetch.value,
        export=export.value,
        aliases='' if aliases is None else aliases.value)

  config_lib.main(run, takes_config=False, argv=argv)


def prepare(
    release, data_dir: str, raw_dir: str = '',
    files: dict[str, list[str]] | None = None, *,
    splits: Sequence[str] | None = None, partial: bool = False,
    fetch: bool = False, export: str = '', aliases: str = '',
) -> None:
  """Prepares a published set, and the corpus of its paragraphs.

  Args:
    release: of `builders.RELEASES`.
    data_dir: on disk or gs://.
    raw_dir: where raw files are looked for that `files` does not name.
    files: by split.
    splits: those wanted besides those of `files`; default: none, or all where
      there are no `files`.
    partial: take files of fewer questions than were published.
    fetch: download the raw files to `raw_dir` first.
    export: folder for the questions as JSON lines.
    aliases: 2Wiki's file of more answers.

  Raises:
    ValueError: one paragraph naming file, line and field, or what is missing.
  """
  from stepsearch.data import builders

  files = dict(files or {})
  wanted = list(dict.fromkeys([*(splits or ()), *files])) or list(
      release.splits)
  for split in wanted:
    if split not in release.splits:
      raise ValueError(
          f'--splits={split}: {release.name} '
          f'{release.config and release.config + " "}has '
          f'{", ".join(release.splits)}.')
  rest = [split for split in wanted if split not in files]
  if fetch:
    builders.download(
        release.repository, [release.splits[s].hub for s in rest], raw_dir)
  if rest:
    files |= builders.find(release, raw_dir, rest)
  folder = paths.Path(data_dir) / prepared.Name(
      release.name, release.config, wanted[0]).folder
  _keep_others(folder, wanted)
  names = builders.read_aliases(aliases) if aliases else None
  progress = metrics.Progress(1)
  start = time.monotonic()
  corpus = prepared.corpus_name(release.name, release.config)
  with tempfile.TemporaryDirectory() as scratch:
    draft = pathlib.Path(scratch) / prepared.PASSAGES
    questions, pool = {}, formats.Pool()
    with open(draft, 'w', encoding='utf-8') as out:
      for split in wanted:
        with progress.phase(
            f'reading {release.name}:{split}, percent', 100) as tick:
          examples = builders.read(
              release, split, files[split],
              functools.partial(_pooled, pool, out), tick, names)
        name = builders.named(
            release, split, len(examples), files[split], partial)
        questions[name] = examples
    _keep_others(folder, list(questions))
    total = sum(map(len, questions.values()))
    with _counted(progress, f'writing {release.name}', total) as tick:
      builders.write(
          functools.partial(
              builders.builder_of(release), splits=questions, tick=tick,
              **({'config': release.config} if release.config else {})),
          folder)
    if len(pool):
      _write_corpus(
          corpus, draft, len(pool), data_dir, progress,
          partial=any(name.endswith('_partial') for name in questions))
  print()
  for name, examples in questions.items():
    print(describe(f'{release.name}:{name}', examples))
    if export:
      datasets.write_questions(paths.Path(export) / f'{name}.jsonl', examples)
  if len(pool):
    print(f'{corpus}:corpus: {len(pool):,} passages, each title and text once')
  print(f'written to {folder} in {time.monotonic() - start:.1f} s'
        + (f', JSON lines to {export}' if export else ''))
  _say_next(
      release.name + (
          '' if corpus == release.name else f'/{release.config}'), questions,
      f'{corpus}:corpus' if len(pool) else '…', data_dir)


def _keep_others(folder, splits):
  """Refuses to replace a prepared set by one that has less."""
  info = folder / 'dataset_info.json'
  if not info.exists():
    return
  there = [split['name'] for split in json.loads(info.read_text())['splits']]
  lost = [
      name for name in there
      if name not in splits and name.removesuffix('_partial') not in splits]
  if lost:
    raise ValueError(
        f'{folder} holds {", ".join(lost)}, which preparing '
        f'{", ".join(splits)} would lose: prepare all splits in one go, whole '
        'ones again from whole files, or choose another --data_dir.')


def _say_next(name, splits, corpus, data_dir):
  """The command that uses what has been prepared."""
  train = next((s for s in splits if s.startswith('train')), None)
  held_out = next((s for s in splits if not s.startswith('train')), None)
  if train and held_out:
    print('next: python -m stepsearch.train --config=configs/musique.py '
          f'--config.model.pretrained=… --workdir=runs/{name} '
          f'--config.data.directory={data_dir} '
          f'--config.data.corpus={corpus} --config.data.train={name}:{train} '
          f'--config.data.eval={name}:{held_out}')
  elif held_out:
    print('next: python -m stepsearch.evaluate --config=configs/musique.py '
          f'--checkpoint=… --output=… --datasets={name}:{held_out} '
          f'--data_dir={data_dir} --corpus={corpus}')


def _write_corpus(name, lines, size, data_dir, progress, *, partial):
  """Records and lines of a corpus, from the lines."""
  import tensorflow_datasets as tfds

  from stepsearch.data import builders

  split = 'passages_partial' if partial else 'passages'
  folder = paths.Path(data_dir) / prepared.Name(name, '', 'corpus').folder
  with _counted(progress, f'writing {name}:corpus', size) as tick:
    builders.write(
        functools.partial(
            builders.Corpus, documents=passages.read(lines), split=split,
            tick=tick, config=tfds.core.BuilderConfig(
                name=name, version=prepared.VERSION)),
        folder, {prepared.PASSAGES: lines})
  return folder


def _corpus(argv: Sequence[str]) -> NoReturn:
  """The command that prepares a corpus."""
  _data_dir()
  name = flags.DEFINE_string(
      'name', None, 'What it is called: NAME:corpus.', required=True)
  files = flags.DEFINE_list(
      'files', None, 'Passages of {id, title, text} or {id, contents}, DPR\'s '
      '.tsv, or questions with their paragraphs, which are pooled. Several '
      'files become one corpus, in which ids have to be unique.')
  raw_dir = flags.DEFINE_string(
      'raw_dir', '', 'Folder for --download; wiki-18 is looked for in it.')
  fetch = flags.DEFINE_bool(
      'download', False, 'Fetch wiki-18 from Hugging Face (--name=wiki18).')
  partial = flags.DEFINE_bool(
      'partial', False, 'Take fewer passages of wiki-18 than were published.')
  config_lib.main(
      lambda: corpus(
          name.value, files.value or [], flags.FLAGS.data_dir, raw_dir.value,
          fetch=fetch.value, partial=partial.value),
      takes_config=False, argv=argv)


def corpus(
    name: str, files: Sequence[str], data_dir: str, raw_dir: str = '', *,
    fetch: bool = False, partial: bool = False,
) -> None:
  """Prepares passages of any kind as NAME:corpus.

  Raises:
    ValueError: no passages, malformed rows, an id twice; nothing to read.
  """
  from stepsearch.data import builders

  prepared.check_name(name)
  wiki = name == 'wiki18'
  raw, repository = 'wiki-18.jsonl.gz', 'PeterJinGo/wiki-18-corpus'
  if fetch:
    if not wiki:
      raise ValueError(
          f'--name={name}: only wiki18 is fetched; give --files.')
    builders.download(repository, [raw], raw_dir)
  if not files:
    there = [
        str(paths.Path(raw_dir) / n) for n in (raw, raw.removesuffix('.gz'))
        if wiki and raw_dir and (paths.Path(raw_dir) / n).exists()]
    if not there:
      raise ValueError(
          '--files is missing: the passages, or for --name=wiki18 a --raw_dir '
          f'with {raw} of https://huggingface.co/datasets/{repository} '
          '(--download fetches it).')
    files = there[:1]
  progress = metrics.Progress(1)
  start = time.monotonic()
  with tempfile.TemporaryDirectory(dir=_beside(data_dir)) as folder:
    draft = pathlib.Path(folder) / prepared.PASSAGES
    pool, size = formats.Pool(), 0
    with open(draft, 'w', encoding='utf-8') as out:
      for path in files:
        faults = rows_lib.Faults(path)
        with progress.phase(f'reading {path}, percent', 100) as tick:
          for document in datasets.read_passages(path, faults, tick, pool):
            out.write(passages.line(document))
            size += 1
        faults.check()
    if not size:
      raise ValueError(f'{", ".join(files)}: no passages.')
    if wiki and size != builders.WIKI18 and not (
        partial and size < builders.WIKI18):
      raise ValueError(
          f'{files[0]}: wiki-18 has {builders.WIKI18:,} passages as published, '
          f'and here are {size:,}. Fetch the whole file, or give --partial.')
    with progress.phase('checking ids, percent', 100) as tick:
      datasets.indexed(draft, ', '.join(files), tick)
    folder = _write_corpus(
        name, draft, size, data_dir, progress,
        partial=wiki and size < builders.WIKI18)
  print(f'\n{name}:corpus: {size:,} passages, written to {folder} in '
        f'{time.monotonic() - start:.1f} s')
  print('next: python -m stepsearch.build_index '
        f'--corpus={folder / prepared.PASSAGES} --output=…')


def _keys(argv: Sequence[str]) -> NoReturn:
  """The command that writes search keys."""
  # Here, because it needs models and engines, and the others do not.
  from stepsearch import prepare_keys

  config_lib.main(prepare_keys.command(), takes_config=False, argv=argv)


def _gold(argv: Sequence[str]) -> NoReturn:
  """The command that finds gold passages."""
  from stepsearch import prepare_gold

  prepare_gold.main(argv)


def _inspect(argv: Sequence[str]) -> NoReturn:
  """The command that tells what files hold."""
  program, *rest = argv
  files = [arg for arg in rest if not arg.startswith('-')]
  corpus = flags.DEFINE_string(
      'corpus', '', 'Corpus in which gold ids and titles are looked up.')
  directory = flags.DEFINE_string(
      'data_dir', '', 'Where prepared sets lie, for NAME:SPLIT.')
  config_lib.main(
      lambda: inspect(files, corpus.value, directory.value),
      takes_config=False,
      argv=[program, *(arg for arg in rest if arg.startswith('-'))])


def inspect(
    sources: Sequence[str], corpus: str = '', directory: str = ''
) -> None:
  """Prints what each file or prepared set holds, be it questions or passages.

  Raises:
    ValueError: none was named, or some could not be read.
  """
  if not sources:
    raise ValueError(
        'name files of questions or passages, or NAME:SPLIT: `python -m '
        'stepsearch.prepare inspect FILE …`.')
  by_id = datasets.read_corpus(corpus, directory).by_id if corpus else None
  failed = []
  for source in sources:
    start = time.monotonic()
    try:
      if _is_corpus(source):
        text = f'{source}: {len(datasets.read_corpus(source, directory)):,} ' \
            'passages'
      else:
        examples = datasets.read_questions(
            source, by_id, directory=directory)
        text = describe(source, examples)
    except ValueError as error:
      failed.append(source)
      text = ' '.join(str(error).split())
    print(f'{text}; {time.monotonic() - start:.2f} s', flush=True)
  if by_id is None:
    print('Gold documents: those that a file spells out; ids and titles are '
          'looked up in --corpus.')
  if failed:
    raise ValueError(
        f'{len(failed)} of {len(sources)} could not be read: '
        f'{", ".join(failed)}.')


def _is_corpus(source: str) -> bool:
  known = prepared.parse(source)
  if known is not None:
    return known.split == prepared.CORPUS
  first = next(rows_lib.read(source, rows_lib.Faults(source)), None)
  return first is not None and 'question' not in first and (
      'contents' in first or 'text' in first and 'id' in first)


def describe(name: str, examples: Sequence[Example]) -> str:
  """What questions hold, in two or more lines."""
  n = len(examples)
  share = lambda count: f'{count / n:.1%}'
  hops = collections.Counter(e.hops for e in examples)
  shown = ', '.join(
      f'{count:,} of {h or "unknown"}' for h, count in sorted(hops.items()))
  left = {e.id: formats.unresolved(e) for e in examples}
  left = {key: subs for key, subs in left.items() if subs}
  decomposed = sum(bool(e.sub_questions) for e in examples)
  subs = f'{share(decomposed)} sub-questions'
  if decomposed:
    subs += f' (references resolved in {(decomposed - len(left)):,} of ' \
        f'{decomposed:,})'
  licences = ', '.join(sorted({e.licence or 'unknown' for e in examples}))
  lines = [
      f'{name}: {n:,} questions; hops: {shown}',
      f'  {sum(len(e.answers) for e in examples) / n:.2f} answers a question; '
      f'{share(sum(map(_has_gold, examples)))} gold documents, '
      f'{subs}, {share(sum(any(e.search_keys) for e in examples))} search '
      f'keys; licence: {licences}']
  for key, subs in itertools.islice(left.items(), 20):
    lines.append(
        f'  {key}: no earlier answer for the reference in {subs[0]!r}')
  return '\n'.join(lines)


def _has_gold(example):
  """Whether it has its gold passages, not only titles of some."""
  gold = example.gold_documents
  return bool(gold) and all(document.text for document in gold)


def _data_dir():
  # Nothing is computed: no accelerator is taken from a run, or waited for.
  jax.config.update('jax_platforms', 'cpu')
  flags.DEFINE_string(
      'data_dir', None, 'Folder of all prepared sets, on disk or gs://.',
      required=True)


def _beside(data_dir: str) -> str | None:
  """Where to draft: on the disk that the result goes to, if it is one."""
  if paths.is_remote(data_dir):
    return None
  with paths.explained(data_dir):
    os.makedirs(data_dir, exist_ok=True)
  return data_dir


def _pooled(pool, out, document: Document) -> Document:
  """A document under its id in the pool, written once."""
  added, new = pool.add(document)
  if new:
    out.write(passages.line(added))
  return added


@contextlib.contextmanager
def _counted(
    progress: metrics.Progress, name: str, total: int
) -> Iterator[Callable[[int], None]]:
  """Progress of what says how many more are done, quiet but for that."""
  done = 0
  with progress.phase(name, total) as tick:

    def more(count):
      nonlocal done
      done += count
      tick(done)

    with open(os.devnull, 'w') as silence, contextlib.redirect_stdout(silence):
      yield more


COMMANDS = {
    **{name: functools.partial(_published, name) for name in prepared.CONFIGS},
    'corpus': _corpus,
    'gold': _gold,
    'keys': _keys,
    'inspect': _inspect,
    'passages': prepare_passages.command,
}

if __name__ == '__main__':
  config_lib.commands(COMMANDS)
