"""launch/colab_eval.ipynb: clean as committed, and it runs top to bottom."""

import json
import pathlib
import re

import jax
import pytest

from tests import micro

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

_ROOT = pathlib.Path(__file__).parents[1]
_PATH = _ROOT / 'launch' / 'colab_eval.ipynb'


@pytest.fixture
def notebook():
  return nbformat.read(_PATH, as_version=4)


def _parameters(notebook):
  cell, = (cell for cell in notebook.cells
           if 'parameters' in cell.metadata.get('tags', ()))
  return cell


def test_it_is_committed_clean(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None
      for line in cell.source.splitlines():
        assert len(line) <= 80, line
    assert not re.search(r'/(home|root|tmp|work|Users)\b', cell.source)
  assert notebook.metadata.kernelspec.name == 'python3'
  assert set(notebook.metadata) <= {
      'kernelspec', 'language_info', 'accelerator', 'colab'}
  # Where one person's choices would be are a public model and public data.
  values = {}
  exec(_parameters(notebook).source, values)  # pylint: disable=exec-used
  assert (values['REPOSITORY'], values['PASSAGES'], values['OPTIONS']) == (
      '', '', [])
  assert 'bamboogle:test' in values['DATASETS']
  assert (_ROOT / values['CONFIG']).is_file()


def test_what_is_prepared_and_pooled(notebook, tmp_path):
  cell, = (cell for cell in notebook.cells if "'--name=pooled'" in cell.source)
  ran = []
  values = dict(
      re=re, run=lambda *command: ran.append(command[2:]), ROOT=tmp_path,
      DATA='data', RAW='raw', PREPARE=['--download'], PASSAGES='',
      DATASETS=['hotpotqa/fullwiki:dev', 'hotpotqa/distractor:dev', 'my.jsonl'])
  with pytest.raises(RuntimeError, match='name PASSAGES above'):
    exec(cell.source, values)  # pylint: disable=exec-used
  shared = ('--raw_dir=raw', '--data_dir=data', '--splits=dev')
  assert ran == [
      ('hotpotqa', *shared, '--variant=fullwiki', '--download'),
      ('hotpotqa', *shared, '--variant=distractor', '--download')]
  pools = [tmp_path / f'data/corpus/{name}/1.0.0/passages.jsonl'
           for name in ('hotpotqa', 'hotpotqa_fullwiki')]
  for pool in pools:
    _write(pool, [])
  exec(cell.source, values)  # pylint: disable=exec-used
  assert ran[-1] == ('corpus', '--name=pooled', '--data_dir=data',
                     f'--files={pools[0]},{pools[1]}')


def _write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_it_runs_top_to_bottom(notebook, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *_: devices)
    micro.searcher(tmp_path / 'run')
  # As they are published, but for their number. The policy answers 'the'.
  raw = tmp_path / 'raw'
  _write(raw / 'bamboogle' / 'test.jsonl', [
      {'id': f'test_{i}', 'question': f'who is who {i} ?',
       'golden_answers': ['of' if i else 'The']} for i in range(4)])
  _write(raw / 'musique_ans_v1.0_dev.jsonl', [
      {'id': f'2hop__{i}', 'question': f'what is of {i} ?', 'answer': 'of',
       'answer_aliases': [], 'answerable': True,
       'paragraphs': [
           {'idx': j, 'title': f'T{j} <b>', 'paragraph_text': f'what is {j}',
            'is_supporting': j > 0} for j in range(3)],
       'question_decomposition': [
           {'id': 1, 'question': 'is', 'answer': 'in',
            'paragraph_support_idx': 1},
           {'id': 2, 'question': '#1 is', 'answer': 'of',
            'paragraph_support_idx': 2}]} for i in range(5)])
  overrides = dict(
      INSTALL=False, CHECKPOINT=str(tmp_path / 'run'), CONFIG='',
      DATASETS=['bamboogle:test_partial', 'musique:dev_partial'], QUESTIONS=4,
      PREPARE=['--partial'], RAW=str(raw), DATA=str(tmp_path / 'data'),
      QUESTION='who <i>is</i> it ?', OUTPUT=str(tmp_path / 'out'))
  at = notebook.cells.index(_parameters(notebook)) + 1
  notebook.cells.insert(at, nbformat.v4.new_code_cell(
      '\n'.join(f'{name} = {value!r}' for name, value in overrides.items())))
  for name in ('JAX_PLATFORMS', 'MPLBACKEND'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('XLA_FLAGS', '')
  # From the folder that it lies in, as an editor runs it.
  nbclient.NotebookClient(
      notebook, timeout=300, kernel_name='python3',
      resources={'metadata': {'path': str(_PATH.parent)}}).execute()

  results = json.loads((tmp_path / 'out' / 'eval.json').read_text())['results']
  assert {name: (m['questions'], m['em']) for name, m in results.items()} == {
      'bamboogle': (4, 0.25), 'musique': (4, 0.0)}
  outputs = [
      output for cell in notebook.cells for output in cell.get('outputs', ())]
  assert not any(output.output_type == 'error' for output in outputs)
  table, answered = (
      output.data['text/html'] for output in outputs
      if 'text/html' in output.get('data', ()))
  assert re.search(r'bamboogle</td>.*?>4<.*?>0\.250<.*?>0\.000–', table)
  assert any('image/png' in output.get('data', ()) for output in outputs)
  comparison, = (
      output.data['text/markdown'] for output in outputs
      if 'text/markdown' in output.get('data', ()))
  assert re.search(r'\| \*\*agent\*\*.*\.250', comparison)
  assert 'StepSearch' in comparison
  # The trajectory: what is asked and found is text, whatever it spells.
  assert 'who &lt;i&gt;is&lt;/i&gt; it ?' in answered
  assert answered.count('<b>searches:</b> is') == 2
  assert re.search(r'<summary>T\d &lt;b&gt;</summary>', answered)
  assert '<b>answer:</b> the' in answered
  assert '2 searches, 15 tokens' in answered
