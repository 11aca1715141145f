import gzip
import json

import pytest

from stepsearch import prepare_passages
from stepsearch.data import cleaning
from stepsearch.data import datasets
from stepsearch.types import Document


def _write(path, rows):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text)
  return str(path)


def _articles(tmp_path):
  """Two files; with an empty article, a copy, and a copied passage."""
  words = lambda start, count: ' '.join(f'w{i}' for i in range(start, count))
  first = [
      {'id': 12, 'title': 'Ada', 'text': words(0, 250)},
      {'id': 7, 'title': ' Caf\u0065\u0301  Rome ',
       'text': 'One\n\ttwo \u00a0three'},
      {'id': 8, 'title': 'Nothing', 'text': ' \n'}]
  second = [
      {'id': 9, 'title': 'Ada', 'text': words(0, 100)},  # 12/0 again
      {'id': 100, 'title': 'Bob', 'text': words(0, 100)},  # another title
      *({'id': f's{i}', 'title': f't{i}', 'text': words(i, 2 * i)}
        for i in range(1, 60))]
  return [
      _write(tmp_path / 'a.jsonl.gz', first),
      _write(tmp_path / 'b.jsonl', second)]


def test_articles_are_cut():
  article = Document('5', 'T', ' '.join(map(str, range(7))))
  assert cleaning.cut(article, 3) == [
      Document('5/0', 'T', '0 1 2'), Document('5/1', 'T', '3 4 5'),
      Document('5/2', 'T', '6')]
  assert cleaning.cut(Document('5', 'T', ' \n'), 3) == []


def test_passages_are_clean_and_occur_once(tmp_path):
  output = tmp_path / 'out' / 'passages.jsonl'
  counts = cleaning.clean(_articles(tmp_path), output)
  assert counts == cleaning.Counts(passages=3 + 1 + 1 + 59, repeated=1, empty=1)
  found = datasets.read_corpus(output).by_id
  assert len(found) == counts.passages
  # Of equal ones that of the smallest id, as text, stays.
  assert '12/0' in found and '9/0' not in found and '100/0' in found
  assert found['12/2'].text.split() == [f'w{i}' for i in range(200, 250)]
  assert found['7/0'] == Document('7/0', 'Caf\u00e9 Rome', 'One two three')


def test_the_order_of_files_does_not_matter(tmp_path):
  files = _articles(tmp_path)
  made = []
  for order in (files, files[::-1]):
    cleaning.clean(order, tmp_path / 'out')
    made.append((tmp_path / 'out').read_bytes())
  assert made[0] == made[1]


@pytest.mark.parametrize('workers', [1, 2])
def test_beam_makes_the_same_file(tmp_path, workers):
  pytest.importorskip(
      'apache_beam', reason='launch/requirements-beam.txt is not installed')
  files = _articles(tmp_path)
  counts = cleaning.clean(files, tmp_path / 'plain')
  again = cleaning.clean_by_beam(
      files, tmp_path / 'beam', options=[
          '--runner=DirectRunner', f'--direct_num_workers={workers}',
          '--direct_running_mode=multi_threading'])
  assert again == counts
  assert (tmp_path / 'beam').read_bytes() == (tmp_path / 'plain').read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {
      'a.jsonl.gz', 'b.jsonl', 'plain', 'beam'}


def test_what_is_left_out_is_said(tmp_path, capsys):
  output = tmp_path / 'passages.jsonl'
  prepare_passages.run(_articles(tmp_path), str(output), words=50)
  said = capsys.readouterr().out
  assert 'left out: 2 that repeat another, 1 articles' in said
  empty = _write(tmp_path / 'c.jsonl', [{'id': 1, 'title': 'A', 'text': ''}])
  with pytest.raises(ValueError, match='no article has any text'):
    prepare_passages.run([empty], str(output))
  bad = _write(tmp_path / 'd.jsonl', [{'id': 1, 'title': 'A'}, {'title': 3}])
  with pytest.raises(ValueError, match='2 rows are malformed: line 1.*text'):
    prepare_passages.run([bad], str(output))
  with pytest.raises(ValueError, match='--files and --output'):
    prepare_passages.run([], str(output))
  with pytest.raises(ValueError, match='are of --beam'):
    prepare_passages.run([empty], str(output), options=['--runner=x'])
