"""`prepare`: builders, sizes, names of what is prepared, and its commands."""

import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

from stepsearch import paths
from stepsearch import prepare
from stepsearch.data import builders
from stepsearch.data import datasets
from stepsearch.data import prepared
from stepsearch.types import Document

_RAW = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'raw'
_ROOT = pathlib.Path(__file__).parents[1]


def _row(i, split='dev'):
  titles = [f'T{j}' for j in range(3)]  # the same passages for all
  return {
      'id': f'2hop__{split}{i}', 'question': f'Spouse of performer {i}?',
      'answer': 'Miquette', 'answer_aliases': ['M.'], 'answerable': True,
      'paragraphs': [
          {'idx': j, 'title': title, 'paragraph_text': f'Passage é {j}.',
           'is_supporting': j > 0} for j, title in enumerate(titles)],
      'question_decomposition': [
          {'id': 1, 'question': f'{i} >> performer', 'answer': 'Hillage',
           'paragraph_support_idx': 1},
          {'id': 2, 'question': '#1 >> spouse', 'answer': 'Miquette',
           'paragraph_support_idx': 2}]}


def _raw(folder, **sizes):
  folder.mkdir(parents=True, exist_ok=True)
  for split, size in sizes.items():
    (folder / f'musique_ans_v1.0_{split}.jsonl').write_text(''.join(
        json.dumps(_row(i, split)) + '\n' for i in range(size)))
  return str(folder)


@pytest.fixture
def musique(monkeypatch):
  """The release of MuSiQue, of three and two questions."""
  release = next(r for r in builders.RELEASES if r.name == 'musique')
  small = builders.Release(
      release.name, release.config, release.homepage, release.repository, {
          name: builders.Split(size, split.files, split.hub)
          for (name, split), size in zip(release.splits.items(), (3, 2))})
  monkeypatch.setattr(builders, 'RELEASES', [small])
  return small


def test_sizes_are_those_published():
  sizes = {
      f'{r.name}/{r.config}'.rstrip('/'): {
          name: split.size for name, split in r.splits.items()}
      for r in builders.RELEASES}
  assert sizes == {
      'musique': {'train': 19938, 'dev': 2417},
      'hotpotqa/distractor': {'train': 90447, 'dev': 7405},
      'hotpotqa/fullwiki': {'dev': 7405},
      '2wiki': {'train': 167454, 'dev': 12576},
      'bamboogle': {'test': 125}}
  assert {r.name for r in builders.RELEASES} == set(prepared.CONFIGS)


def test_a_set_is_prepared_and_read_back(tmp_path, musique, capsys):
  raw, data = _raw(tmp_path / 'raw', train=3, dev=2), str(tmp_path / 'data')
  prepare.prepare(musique, data, raw, export=str(tmp_path / 'lines'))
  out = capsys.readouterr().out
  assert 'musique:train: 3 questions; hops: 3 of 2' in out
  assert '2.00 answers a question; 100.0% gold documents, 100.0% sub-' in out
  assert 'references resolved in 3 of 3' in out and 'ETA' in out
  assert 'musique:corpus: 3 passages' in out
  assert f'--config.data.directory={data} --config.data.corpus=musi' in out

  corpus = datasets.read_corpus('musique:corpus', data)
  assert [(d.id, d.title, d.text) for d in corpus] == [
      (str(j), f'T{j}', f'Passage é {j}.') for j in range(3)]
  for split, size in ('train', 3), ('dev', 2):
    found = datasets.read_questions(
        f'musique:{split}', corpus.by_id, dataset='musique', directory=data)
    file = datasets.read_questions(
        f'{raw}/musique_ans_v1.0_{split}.jsonl', corpus.by_id,
        dataset='musique')
    assert found == file and len(found) == size  # in order, every field
    assert found[0].gold_documents == (corpus[1], corpus[2])
    assert found[0].sub_questions[1].gold == ('2',)
    # The gold passages are spelled out there: no corpus is needed.
    assert datasets.read_questions(
        f'musique:{split}', dataset='musique', directory=data) == found
    assert datasets.read_questions(tmp_path / 'lines' / f'{split}.jsonl') == (
        found)


def test_tensorflow_is_never_imported(tmp_path):
  raw = _raw(tmp_path / 'raw', dev=2)
  code = f'''
import sys
from stepsearch import prepare
from stepsearch.data import builders, datasets
release = builders.RELEASES[0]
data = {str(tmp_path / "data")!r}
prepare.prepare(release, data, {raw!r}, splits=['dev'], partial=True)
assert len(datasets.read_questions('musique:dev_partial', directory=data)) == 2
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(data + '/musique/1.0.0')
source = builder.as_data_source('dev_partial')
assert source[1]['question'] == b'Spouse of performer 1?'
assert list(source[1]['sub_question_gold']['sub_question']) == [0, 1]
builder = tfds.builder_from_directory(data + '/corpus/musique/1.0.0')
assert builder.as_data_source('passages_partial')[2]['title'] == b'T2'
assert 'tensorflow' not in sys.modules
'''
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr
  assert 'oneDNN' not in done.stderr


def test_several_files_and_the_usual_way_to_write_them(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  monkeypatch.setattr(builders, '_SHARD', 2)
  file = tmp_path / 'c.jsonl'
  file.write_text(''.join(
      json.dumps({'id': i, 'title': f'T{i}', 'text': 'x'}) + '\n'
      for i in range(5)))
  prepare.corpus('mine', [str(file)], str(tmp_path / 'data'))
  folder = tmp_path / 'data' / 'corpus' / 'mine' / prepared.VERSION
  assert len(list(folder.glob('*array_record*'))) == 3
  builder = builders.Corpus(
      documents=datasets.read_corpus(file), data_dir=tmp_path / 'usual',
      config=tfds.core.BuilderConfig(name='mine', version=prepared.VERSION))
  builder.download_and_prepare()
  for made in folder, builder.data_dir:
    source = tfds.builder_from_directory(made).as_data_source('passages')
    assert [source[i]['id'] for i in range(5)] == [b'0', b'1', b'2', b'3', b'4']


def test_the_size_of_a_split_is_checked(tmp_path, musique):
  data = str(tmp_path / 'data')
  raw = _raw(tmp_path / 'raw', train=3, dev=1)
  with pytest.raises(
      ValueError, match='musique:dev has 2 .* here are 1.*dev_partial by --p'):
    prepare.prepare(musique, data, raw)
  assert not (tmp_path / 'data').exists()
  raw = _raw(tmp_path / 'raw', dev=3)
  with pytest.raises(ValueError, match='has 2 .* here are 3. It is another'):
    prepare.prepare(musique, data, raw, partial=True)
  raw = _raw(tmp_path / 'raw', dev=1)
  prepare.prepare(musique, data, raw, partial=True)
  assert len(datasets.read_questions('musique:train', directory=data)) == 3
  with pytest.raises(
      ValueError, match='there are musique:train, musique:dev_partial'):
    datasets.read_questions('musique:dev', directory=data)
  with pytest.raises(ValueError, match=r'--splits=test: musique has train, de'):
    prepare.prepare(musique, data, raw, splits=['test'])


def test_no_split_is_lost(tmp_path, musique):
  raw, data = _raw(tmp_path / 'raw', train=2, dev=2), str(tmp_path / 'data')
  prepare.prepare(musique, data, raw, partial=True)
  with pytest.raises(ValueError, match='holds train_partial, which prep.* dev'):
    prepare.prepare(musique, data, raw, splits=['dev'])
  _raw(tmp_path / 'raw', train=3)  # the whole file has come
  prepare.prepare(musique, data, raw)
  _raw(tmp_path / 'raw', train=1)
  with pytest.raises(ValueError, match='holds train, which .* train_partial,'):
    prepare.prepare(musique, data, raw, partial=True)
  for split, size in ('train', 3), ('dev', 2):
    assert len(datasets.read_questions(
        f'musique:{split}', directory=data)) == size


def test_splits_beside_those_that_are_named(tmp_path, musique):
  raw, data = _raw(tmp_path / 'raw', train=3), str(tmp_path / 'data')
  other = _raw(tmp_path / 'other', dev=2) + '/musique_ans_v1.0_dev.jsonl'
  prepare.prepare(musique, data, raw, {'dev': [other]}, splits=['train'])
  for split in 'train', 'dev':
    datasets.read_questions(f'musique:{split}', directory=data)


def test_raw_files_of_this_folder(tmp_path, musique, monkeypatch):
  _raw(tmp_path, train=3)
  monkeypatch.chdir(tmp_path)
  assert builders.find(musique, '.', ['train'])['train'] == [
      'musique_ans_v1.0_train.jsonl']


def test_raw_files_are_found_also_in_archives(tmp_path, musique):
  raw = tmp_path / 'raw'
  _raw(raw, train=3)
  name = 'musique_ans_v1.0_dev.jsonl'
  with pytest.raises(ValueError) as error:
    builders.find(musique, raw, ['train', 'dev'])
  for part in (name, 'StonyBrookNLP/musique', 'dgslibisey/MuSiQue', '--splits'):
    assert part in str(error.value)
  with zipfile.ZipFile(raw / 'musique_v1.0.zip', 'w') as archive:
    archive.writestr(f'data/{name}', json.dumps(_row(0)))
  found = builders.find(musique, raw, ['train', 'dev'])
  assert found['dev'] == [f'{raw}/musique_v1.0.zip/data/{name}']
  assert len(datasets.read_questions(found['dev'][0])) == 1
  (raw / name).write_text(json.dumps(_row(0)))
  assert builders.find(musique, raw, ['dev'])['dev'] == [f'{raw}/{name}']
  _raw(raw / 'copy', dev=1)
  with pytest.raises(ValueError, match='several files called .* --dev=FILE'):
    builders.find(musique, raw, ['dev'])
  with pytest.raises(ValueError, match='No such file'):
    builders.find(musique, tmp_path / 'none', ['dev'])


def test_shards_of_a_table_are_one_split(tmp_path):
  release = next(r for r in builders.RELEASES if r.config == 'distractor')
  for i in (1, 0):
    path = tmp_path / 'distractor' / f'train-0000{i}-of-00002.parquet'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  found = builders.find(release, tmp_path, ['train'])
  assert found['train'] == [
      f'{tmp_path}/distractor/train-0000{i}-of-00002.parquet' for i in (0, 1)]


def test_passages_that_are_not_there_are_not_gold(tmp_path, capsys):
  release = next(r for r in builders.RELEASES if r.config == 'fullwiki')
  row = {'_id': 'a', 'question': 'q', 'answer': 'x', 'level': 'hard',
         'supporting_facts': [['A', 0], ['B', 0]],
         'context': [['A', ['One.']], ['B', ['Two.']]]}
  less = row | {'_id': 'b', 'context': row['context'][:1]}
  (tmp_path / 'dev.json').write_text(json.dumps([row, less]))
  data = str(tmp_path / 'data')
  prepare.prepare(
      release, data, files={'dev': [f'{tmp_path}/dev.json']}, partial=True)
  out = capsys.readouterr().out
  assert ' 50.0% gold documents' in out
  assert '--datasets=hotpotqa/fullwiki:dev_partial' in out
  assert 'hotpotqa_fullwiki:corpus: 2 passages' in out
  # Another question's paragraph is the one that was missing.
  by_id = datasets.read_corpus('hotpotqa/fullwiki:corpus', data).by_id
  found = datasets.read_questions(
      'hotpotqa/fullwiki:dev_partial', by_id, directory=data)
  assert [d.text for d in found[1].gold_documents] == ['One.', 'Two.']


def test_bad_rows_of_a_raw_file(tmp_path, musique):
  raw = pathlib.Path(_raw(tmp_path / 'raw', train=3))
  file = raw / 'musique_ans_v1.0_dev.jsonl'
  file.write_text('{"id": "2hop__1"}\n{"question": "q"}\n')
  with pytest.raises(ValueError, match='2 rows are malformed: line 1, field q'):
    prepare.prepare(musique, str(tmp_path / 'data'), str(raw))
  assert not (tmp_path / 'data').exists()


def test_rows_of_another_set(tmp_path, musique):
  row = {'_id': 'a', 'question': 'q', 'answer': 'x', 'level': 'hard',
         'supporting_facts': [['A', 0]], 'context': [['A', ['One.']]]}
  (tmp_path / 'dev.json').write_text(json.dumps([row, row]))
  files = {'dev': [str(tmp_path / 'dev.json')]}
  with pytest.raises(
      ValueError, match=r'2 rows .* 1 \(line 1\): it is of hotpotqa, not of'):
    prepare.prepare(musique, str(tmp_path / 'data'), files=files)


def test_download(tmp_path, musique, monkeypatch):
  import huggingface_hub

  def fetch(repository, *, repo_type, allow_patterns, local_dir):
    assert (repository, repo_type) == ('dgslibisey/MuSiQue', 'dataset')
    assert allow_patterns == ['musique_ans_v1.0_dev.jsonl']
    _raw(pathlib.Path(local_dir), dev=2)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
  data, raw = str(tmp_path / 'data'), str(tmp_path / 'raw')
  prepare.prepare(musique, data, raw, splits=['dev'], fetch=True)
  assert len(datasets.read_questions('musique:dev', directory=data)) == 2

  def offline(*args, **kwargs):
    raise OSError('no route to host\nat all')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(ValueError, match=r'fetched \(no route to host\): check'):
    prepare.prepare(musique, data, raw, splits=['dev'], fetch=True)
  with pytest.raises(ValueError, match='--download needs a folder'):
    builders.download('a/b', ['x'], '')


def test_aliases_of_2wiki(tmp_path):
  release = next(r for r in builders.RELEASES if r.name == '2wiki')
  rows = [
      {'_id': f'{i}', 'question': 'Where?', 'answer': 'Manhattan',
       'answer_id': key, 'supporting_facts': [], 'evidences': []}
      for i, key in enumerate(('Q1', 'Q2', None))]
  (tmp_path / 'dev.json').write_text(json.dumps(rows))
  names = [
      {'Q_id': 'Q1', 'aliases': ['New York County', 'Manhattan'],
       'demonyms': ['Manhattanite']}, {'Q_id': 'Q3', 'aliases': ['x']}]
  (tmp_path / 'id_aliases.json').write_text('\n'.join(map(json.dumps, names)))
  data = str(tmp_path / 'data')
  prepare.prepare(
      release, data, str(tmp_path), splits=['dev'], partial=True,
      aliases=f'{tmp_path}/id_aliases.json')
  found = datasets.read_questions('2wiki:dev_partial', directory=data)
  assert [e.answers for e in found] == [
      ('Manhattan', 'New York County', 'Manhattanite'), ('Manhattan',),
      ('Manhattan',)]
  (tmp_path / 'id_aliases.json').write_text('{"aliases": []}')
  with pytest.raises(ValueError, match='line 1, field Q_id: it is missing'):
    builders.read_aliases(tmp_path / 'id_aliases.json')


def test_a_store_gets_what_is_prepared(tmp_path, musique, bucket, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  raw, data = _raw(tmp_path / 'raw', train=3, dev=2), f'{bucket}/data'
  prepare.prepare(musique, data, raw)
  corpus = datasets.read_corpus('musique:corpus', data)
  found = datasets.read_questions('musique:dev', corpus.by_id, directory=data)
  assert len(corpus) == 3 and len(found) == 2
  assert found[0].gold_documents == (corpus[1], corpus[2])
  # Raw files may lie in a store, too.
  paths.write(f'{bucket}/raw/{"musique_ans_v1.0_dev.jsonl"}', '\n'.join(
      json.dumps(_row(i)) for i in range(2)))
  found = builders.find(musique, f'{bucket}/raw', ['dev'])
  assert len(datasets.read_questions(found['dev'][0])) == 2


def test_corpora(tmp_path, capsys):
  data = str(tmp_path / 'data')
  file = tmp_path / 'c.jsonl'
  file.write_text(''.join(
      json.dumps({'id': 10 + i, 'contents': f'"T{i}"\ntext {i}'}) + '\n'
      for i in range(3)))
  prepare.corpus('mine', [str(file)], data)
  assert 'mine:corpus: 3 passages' in capsys.readouterr().out
  assert list(datasets.read_corpus('mine:corpus', data)) == [
      Document(str(10 + i), f'T{i}', f'text {i}') for i in range(3)]
  raw = _raw(tmp_path / 'raw', train=3, dev=2)
  prepare.corpus('pool', [f'{raw}/musique_ans_v1.0_{s}.jsonl' for s in (
      'train', 'dev')], data)
  assert [d.title for d in datasets.read_corpus('pool:corpus', data)] == [
      'T0', 'T1', 'T2']
  with pytest.raises(ValueError, match='21,015,324 .* here are 3'):
    prepare.corpus('wiki18', [str(file)], data)
  prepare.corpus('wiki18', [str(file)], data, partial=True)
  assert len(datasets.read_corpus('wiki18:corpus', data)) == 3
  with pytest.raises(ValueError, match='wiki-18.jsonl.gz of https://hugging'):
    prepare.corpus('wiki18', [], data)
  with pytest.raises(ValueError, match='only wiki18 is fetched'):
    prepare.corpus('mine', [], data, fetch=True)
  file.write_text('{"id": 1, "title": "", "text": "x"}\n' * 2)
  with pytest.raises(ValueError, match=r'c\.jsonl: .*row 1 and again on row 2'):
    prepare.corpus('mine', [str(file)], data)
  assert len(datasets.read_corpus('mine:corpus', data)) == 3  # as it was


def test_parts_of_a_corpus_keep_their_ids(tmp_path):
  data, files = str(tmp_path / 'data'), []
  for i, ids in enumerate((('5', '3'), ('7',))):
    files.append(str(tmp_path / f'part-{i}.jsonl'))
    pathlib.Path(files[-1]).write_text(''.join(
        json.dumps({'id': i, 'contents': f'"T"\n{i}'}) + '\n' for i in ids))
  prepare.corpus('mine', files, data)
  assert [d.id for d in datasets.read_corpus('mine:corpus', data)] == [
      '5', '3', '7']
  with pytest.raises(ValueError, match='id "5" is on row 1 and again on row 4'):
    prepare.corpus('mine', [*files, files[0]], data)


@pytest.mark.parametrize('source, problem', [
    ('musiqe:dev', 'no set called musiqe; did you mean musique'),
    ('hotpotqa/wide:dev', 'has no config wide; it has distractor, fullwiki'),
    ('musique/x:dev', 'has no config x; it has none'),
    ('a/b:corpus', 'no set called a'),
    ('musique:dev', 'is not prepared in .*prepare musique'),
    ('musique:corpus', 'prepare corpus --name=musique'),
])
def test_names_of_nothing(tmp_path, source, problem):
  read = (
      datasets.read_corpus if source.endswith('corpus')
      else datasets.read_questions)
  with pytest.raises(ValueError, match=problem):
    read(source, directory=tmp_path)


def test_names(tmp_path, monkeypatch):
  assert prepared.parse('hotpotqa:dev').folder == 'hotpotqa/distractor/1.0.0'
  assert prepared.parse('hotpotqa/fullwiki:dev').folder == (
      'hotpotqa/fullwiki/1.0.0')
  assert prepared.parse('mine:corpus').folder == 'corpus/mine/1.0.0'
  for name, folder in (
      ('hotpotqa/fullwiki', 'hotpotqa_fullwiki'),
      ('hotpotqa/distractor', 'hotpotqa'), ('hotpotqa', 'hotpotqa')):
    assert prepared.parse(f'{name}:corpus').folder == f'corpus/{folder}/1.0.0'
  with pytest.raises(ValueError, match='--name=a/b: a corpus is called by'):
    prepare.corpus('a/b', [], str(tmp_path))
  for path in ('a/b.jsonl', 'gs://b/a:dev', 'questions.jsonl', tmp_path):
    assert prepared.parse(path) is None
  monkeypatch.chdir(tmp_path)
  pathlib.Path('odd:dev').write_text('{"question": "q", "answer": "a"}')
  assert len(datasets.read_questions('odd:dev')) == 1
  with pytest.raises(ValueError, match='by config.data.directory or --data_d'):
    datasets.read_questions('musique:dev')
  assert datasets.name('2wiki:dev_partial') == '2wiki'
  assert datasets.name('x/musique/questions.jsonl') == 'musique'
  assert datasets.name('x/musique/questions.jsonl.gz') == 'musique'
  assert datasets.name('raw.zip/v1.0/dev.json') == 'dev'


def test_inspect(tmp_path, musique, capsys):
  raw, data = _raw(tmp_path / 'raw', train=3, dev=2), str(tmp_path / 'data')
  prepare.prepare(musique, data, raw)
  capsys.readouterr()
  (tmp_path / 'bad.jsonl').write_text('{"question": "q"}')
  with pytest.raises(ValueError, match='1 of 4 could not be read: .*bad'):
    prepare.inspect(
        [f'{raw}/musique_ans_v1.0_dev.jsonl', 'musique:corpus',
         str(tmp_path / 'bad.jsonl'), 'musique:train'], directory=data)
  out = capsys.readouterr().out
  assert 'dev.jsonl: 2 questions; hops: 2 of 2' in out
  assert 'musique:corpus: 3 passages' in out
  assert 'musique:train: 3 questions' in out
  assert 'line 1, field answers: it is missing' in out


def _command(*args):
  return subprocess.run(
      [sys.executable, '-m', 'stepsearch.prepare', *args], cwd=_ROOT,
      capture_output=True, text=True, check=False)


@pytest.mark.parametrize('name', list(prepared.CONFIGS))
def test_the_command_of_each_set(tmp_path, name):
  raw = tmp_path / 'raw.jsonl'
  raw.write_text('{"question": "q"}')
  split = 'test' if name == 'bamboogle' else 'dev'
  done = _command(name, f'--{split}={raw}', f'--data_dir={tmp_path}/data')
  assert done.returncode == 1 and done.stderr == (
      f'error: {raw}, line 1, field answers: it is missing; the row has '
      'question.\n')


def test_the_command(tmp_path):
  raw, data = _raw(tmp_path / 'raw', dev=2), tmp_path / 'data'
  done = _command(
      'musique', f'--raw_dir={raw}', '--splits=dev', f'--data_dir={data}')
  assert done.returncode == 1 and done.stderr.count('\n') == 1
  assert '2,417 questions as published, and here are 2' in done.stderr
  done = _command(
      'musique', f'--dev={raw}/musique_ans_v1.0_dev.jsonl', '--partial',
      f'--data_dir={data}')
  assert (done.returncode, done.stderr) == (0, '')
  assert '--datasets=musique:dev_partial --data_dir=' in done.stdout


@pytest.mark.skipif(
    not _RAW.exists(), reason='the real data sets are not beside this checkout')
@pytest.mark.parametrize('name, split, file, size', [
    ('hotpotqa', 'dev', 'hotpotqa_dev_100_official_shape.json', 100),
    ('2wiki', 'train', '2wiki_train_500_with_subquestions.json', 500),
    ('bamboogle', 'test', 'bamboogle_125_flashrag_shape.jsonl', 125),
])
def test_real_files(tmp_path, name, split, file, size):
  release = next(r for r in builders.RELEASES if r.name == name)
  data = str(tmp_path)
  prepare.prepare(
      release, data, files={split: [str(_RAW / file)]}, partial=True)
  split = split if release.splits[split].size == size else f'{split}_partial'
  by_id = None
  if name != 'bamboogle':
    by_id = datasets.read_corpus(f'{name}:corpus', data).by_id
    texts = {
        (title, ''.join(sentences).replace(' ', ''))
        for row in json.loads((_RAW / file).read_text())
        for title, sentences in row['context']}
    assert len(by_id) == len(texts)
  found = datasets.read_questions(f'{name}:{split}', by_id, directory=data)
  assert len(found) == size
  raw = datasets.read_questions(_RAW / file, by_id)
  assert [e.answers for e in found] == [e.answers for e in raw]
  assert [e.gold_documents for e in found] == [e.gold_documents for e in raw]
  assert [e.sub_questions for e in found] == [e.sub_questions for e in raw]
  assert {e.hops for e in found} <= {2, 4}
