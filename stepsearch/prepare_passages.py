"""`python -m stepsearch.prepare passages`: articles cut into passages.

    python -m stepsearch.prepare passages --files=AA.gz,AB.gz --output=P.jsonl
        [--words=100] [--beam --beam_options=--runner=DataflowRunner,…]

A file holds one article {id, title, text} a line, as WikiExtractor writes them
with --json. Passages are 100 words, each title and text once; what is left out
is counted. --beam makes the same file through Apache Beam
(launch/requirements-beam.txt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from stepsearch import config as config_lib
from stepsearch import metrics
from stepsearch.data import cleaning


def run(
    files: Sequence[str], output: str, *, words: int = 100,
    beam: bool = False, options: Sequence[str] = (),
) -> cleaning.Counts:
  """Writes the passages of articles, and says what was left out.

  Args:
    files: of articles.
    output: the file to write.
    words: of a passage.
    beam: through Apache Beam.
    options: of Beam's pipeline.

  Raises:
    ValueError: no files, malformed rows, articles without any text.
  """
  if not files or not output:
    raise ValueError('--files and --output are needed: articles, and where '
                     'their passages go.')
  if options and not beam:
    raise ValueError(
        f'--beam_options={",".join(options)} are of --beam: give it, too.')
  progress = metrics.Progress(0)
  if beam:
    counts = cleaning.clean_by_beam(files, output, words, options)
  else:
    with progress.phase('buckets', cleaning.BUCKETS) as tick:
      counts = cleaning.clean(
          files, output, words, lambda done, _: tick(done))
  progress.line(
      f'{counts.passages:,} passages of up to {words} words in {output}; left '
      f'out: {counts.repeated:,} that repeat another, {counts.empty:,} '
      'articles without text')
  if not counts.passages:
    raise ValueError(f'{", ".join(files)}: no article has any text.')
  return counts


def command(argv: Sequence[str]) -> NoReturn:
  """The command: its flags, then `run`."""
  from absl import flags

  files = flags.DEFINE_list(
      'files', None, 'Articles, {id, title, text} a line; plain or packed.')
  output = flags.DEFINE_string('output', None, 'File for the passages.')
  words = flags.DEFINE_integer(
      'words', 100, 'Words of a passage.', lower_bound=1)
  beam = flags.DEFINE_bool('beam', False, 'Through Apache Beam.')
  options = flags.DEFINE_list(
      'beam_options', [], "Of Beam's pipeline, joined by commas: --runner=….")
  config_lib.main(
      lambda: run(files.value or [], output.value, words=words.value,
                  beam=beam.value, options=options.value),
      takes_config=False, argv=argv)
