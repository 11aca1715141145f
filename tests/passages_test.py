"""A corpus on disk behaves as the list of its documents."""

import json
import tracemalloc

import pytest

from stepsearch import passages
from stepsearch.data import datasets
from stepsearch.types import Document

_DOCUMENTS = [
    Document('a', 'Ä "quoted" title', 'One\ntwo'), Document('7', '', 'x'),
    Document('c', 't', '𝄞\u2028'), Document('d', '', 'y')]


@pytest.fixture
def written(tmp_path):
  passages.write(tmp_path / 'corpus.jsonl', _DOCUMENTS)
  return tmp_path / 'corpus.jsonl'


@pytest.mark.parametrize('read', [passages.read, datasets.read_corpus])
def test_the_documents_of_a_file(written, read):
  found = read(written)
  assert list(found) == _DOCUMENTS and len(found) == 4
  assert found[-1] == _DOCUMENTS[3]
  part = found[1::2]
  assert list(part) == _DOCUMENTS[1::2] and list(part[1:]) == _DOCUMENTS[3:]
  with pytest.raises(IndexError):
    found[4]
  # The last line may lack its end, and others may follow that are empty.
  text = written.read_bytes()
  written.write_bytes(text.rstrip())
  assert list(read(written)) == _DOCUMENTS
  if read is datasets.read_corpus:
    written.write_bytes(text + b' \n\n')
    assert list(read(written)) == _DOCUMENTS


@pytest.fixture(params=['hash', 'collisions'])
def hashed(request, monkeypatch):
  if request.param == 'collisions':
    for module in (passages, datasets):
      monkeypatch.setattr(module, 'hash', lambda text: 0, raising=False)


def test_documents_by_their_id(written, hashed):
  by_id = datasets.read_corpus(written).by_id
  assert dict(by_id) == {d.id: d for d in _DOCUMENTS} and len(by_id) == 4
  assert 'e' not in by_id and by_id.get('', 'no') == 'no'


def test_ids_that_are_repeated(tmp_path, hashed):
  def read(*ids):
    path = tmp_path / 'corpus.jsonl'
    path.write_text(''.join(
        json.dumps({'id': i, 'contents': 'x'}) + '\n' for i in ids))
    return datasets.read_corpus(path)

  assert len(read('a', 'b', 'c')) == 3
  with pytest.raises(ValueError, match='"b" is on line 2 and again on line 4'):
    read('a', 'b', 'c', 'b', 'a', 'b', 'c')
  with pytest.raises(ValueError, match='"1" is on line 1 and again on line 2'):
    read(1, '1')


def test_what_a_process_keeps(tmp_path):
  size = 20_000
  passages.write(tmp_path / 'corpus.jsonl', (
      Document(str(i), f'title {i}', 'word ' * 100) for i in range(size)))
  tracemalloc.start()
  try:
    found = datasets.read_corpus(tmp_path / 'corpus.jsonl')
    assert 'none' not in found.by_id
    held, _ = tracemalloc.get_traced_memory()
    documents = list(found)
    as_list, _ = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert len(documents) == size
  assert 24 <= held / size < 26
  assert (as_list - held) / size - 500 == pytest.approx(270, abs=15)
