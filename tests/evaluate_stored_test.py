import json
import pathlib
import re
import subprocess
import sys

import pytest

from stepsearch import evaluate_stored
from stepsearch import published

_ROOT = pathlib.Path(__file__).parents[1]
SHARED = _ROOT.parent / 'shared'
REAL = SHARED / 'data/raw/search_r1_3b_instruct_bamboogle_transcripts.json'


def run(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'stepsearch.evaluate', *map(str, arguments)],
      cwd=_ROOT, env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'},
      capture_output=True, text=True, timeout=120, check=False)


# ── Transcripts ──────────────────────────────────────────────────────────────


def test_real_transcripts_score_as_their_file_reports():
  if not REAL.exists():
    pytest.skip('no shared/data beside the repository')
  ours, theirs, differ = evaluate_stored.score_transcripts(REAL)
  assert ours == pytest.approx(theirs, abs=1e-12) and not differ
  assert set(ours) == {'em', 'f1', 'cover_em'} and ours['em'] == 0.36
  done = run('transcripts', REAL)
  assert done.returncode == 0 and not done.stderr
  assert 'em 0.3600  f1 0.4509' in done.stdout
  assert done.stdout.endswith('every row agrees\n')


def test_rows_that_differ_are_named(tmp_path):
  own = {
      'id': 'q1', 'dataset': 'musique', 'prediction': 'the Paris',
      'answers': ['Paris'], 'em': 1.0, 'f1': 1.0, 'cover_em': 1.0}
  rows = [own, own | {'id': 'q2', 'f1': 0.5, 'text': 'a\u2028b'},
          own | {'id': 'q3', 'prediction': None}]
  (tmp_path / 'own.jsonl').write_text('\n'.join(
      json.dumps(row, ensure_ascii=False) for row in rows))
  ours, theirs, differ = evaluate_stored.score_transcripts(
      tmp_path / 'own.jsonl')
  assert ours['em'] == pytest.approx(2 / 3)
  assert theirs['f1'] == pytest.approx(2.5 / 3)
  assert differ == ['q2', 'q3']
  flash = {'golden_answers': ['no'], 'output': {
      'final_response': '<search>q</search><information></information>'
                        '<answer>no way</answer>'}}
  (tmp_path / 'flash.json').write_text(json.dumps([flash]))
  for dataset, f1 in (('', 2 / 3), ('hotpotqa', 0.0)):
    ours, theirs, differ = evaluate_stored.score_transcripts(
        tmp_path / 'flash.json', dataset)
    assert ours == {'em': 0.0, 'f1': f1, 'cover_em': 1.0}
    assert theirs == {} and not differ


@pytest.mark.parametrize('text, match', [
    ('', 'holds no transcripts'), ('{', 'is not JSON'),
    ('{"id": 1}', 'line 1: .*prediction.* is missing'),
    ('[{"output": 1}]', 'row 1: '),
    ('[{"output": {}, "golden_answers": []}]', 'final_response'),
    ('[1]', 'row 1: '), ('"\xe9', 'is not JSON'),
    ('{"prediction": "a", "answers": "a b"}', "'a b' is no list"),
    ('{"prediction": 1, "answers": ["a"]}', 'line 1: '),
    ('{"prediction": "a", "answers": [1]}', 'line 1: '),
    ('{"prediction": "a", "answers": ["a"], "em": "?"}', 'line 1: '),
    ('{"prediction": "a", "answers": ["a"], "em": null}', 'line 1: ')])
def test_files_that_hold_none_are_refused(text, match, tmp_path):
  (tmp_path / 'file').write_text(text, encoding='latin-1')
  with pytest.raises(ValueError, match=match):
    evaluate_stored.score_transcripts(tmp_path / 'file')


# ── Comparison ───────────────────────────────────────────────────────────────

SETTINGS = {
    'questions': 'x', 'split': 'dev', 'size': 7405, 'asked': 7405,
    'drawn_with_seed': None, 'corpus': 'wiki', 'passages': 21_015_324}
AS_PUBLISHED = {
    'method': 'agent', 'differs': '', 'checkpoint': 'runs/a', 'step': 500,
    'prompt_file': None, 'decoding': {'kind': 'greedy'},
    'budgets': {
        'k': 3, 'max_turns': 5, 'prompt_length': 512, 'response_length': 800,
        'observation_length': 800},
    'retriever': dict(
        method='dense', embedder='models/e5-base-v2', reranker='', url='',
        web='', factory=''),
    'datasets': {'hotpotqa': SETTINGS},
    'results': {'hotpotqa': {
        'em': 0.25, 'f1': 0.5, 'em_interval': (0.2, 1.0)}}}
MUSIQUE = SETTINGS | {
    'questions': 'dev.jsonl', 'split': None, 'size': 340, 'asked': 50,
    'drawn_with_seed': 0, 'corpus': 'own.jsonl', 'passages': 11_338}


def test_what_was_measured_alike_is_no_difference():
  assert evaluate_stored.differences(AS_PUBLISHED) == [
      'the model is runs/a, step 500, theirs Qwen2.5 of the size given',
      'decoding is greedy, theirs ' + published.PROTOCOL['decoding'],
      'the prompt is in our own words']


@pytest.mark.parametrize('change, clause', [
    (dict(budgets={'k': 2, 'max_turns': 5}), 'k is 2, theirs 3'),
    (dict(budgets={'k': 3, 'max_turns': 2}), 'max_turns is 2, theirs 5'),
    (dict(budgets={'k': 3, 'response_length': 96}),
     'response_length is 96, theirs 800'),
    (dict(retriever={'method': 'bm25'}),
     'the engine is BM25, theirs E5-base-v2'),
    (dict(retriever={'method': 'fusion', 'reranker': 'r'}),
     'the engine is BM25 with models/e5-base-v2, ordered by r, theirs '
     'E5-base-v2'),
    (dict(retriever={'embedder': 'lexical'}),
     'the engine is lexical, theirs E5-base-v2'),
    (dict(retriever={'url': 'http://x'}),
     'the engine is http://x, theirs E5-base-v2'),
    (dict(datasets={'musique': MUSIQUE}),
     'questions: MuSiQue 50 drawn of 340 (dev.jsonl) for 2,417 (dev)'),
    (dict(datasets={'musique': MUSIQUE, 'bamboogle': MUSIQUE}),
     "passages: MuSiQue* 11,338 passages of own.jsonl for MuSiQue's own "
     'paragraphs'),
    (dict(datasets={'musique': MUSIQUE, 'bamboogle': MUSIQUE}),
     'passages: Bamboogle 11,338 passages of own.jsonl for '
     + published.WIKI18),
    (dict(datasets={'musique': MUSIQUE | {'passages': None}}),
     f'passages: MuSiQue passages of own.jsonl for {published.WIKI18}'),
    (dict(datasets={'mine': MUSIQUE}), 'nothing is published of mine'),
    (dict(differs='zero-shot'), 'zero-shot'),
    (dict(prompt_file='p.txt'), 'the prompt is that of p.txt'),
])
def test_each_difference_is_named(change, clause):
  if 'retriever' in change:
    change = {'retriever': AS_PUBLISHED['retriever'] | change['retriever']}
  assert clause in evaluate_stored.differences(AS_PUBLISHED | change)


def test_a_comparison_of_two(tmp_path):
  for name, one in (
      ('a', AS_PUBLISHED),
      ('b', AS_PUBLISHED | dict(
          method='rag', datasets={'musique': MUSIQUE}, step=None, results={
              'musique': {'em': 0.1, 'f1': 0.2, 'em_interval': (0.0, 0.2)}}))):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'eval.json').write_text(json.dumps(one))
  done = run('compare', '--output', f'{tmp_path}/table.md', tmp_path)
  assert done.returncode == 0 and not done.stderr
  assert (tmp_path / 'table.md').read_text() == done.stdout
  lines = done.stdout.splitlines()
  assert '| **agent**, a @ 500 | **.250** (.200–1.000) / .500 |  |' in lines[2]
  # What searched MuSiQue's own paragraphs stands in their column.
  assert lines[3].endswith('|  |  |  |  | **.100** (.000–.200) / .200 |')
  assert len([line for line in lines if line.startswith('| ')]) == (
      2 + 2 + len(published.NUMBERS))
  alike, agent, rag = (line for line in lines if line.startswith('* '))
  assert 'decoding is greedy' in alike and 'decoding' not in agent + rag
  assert 'step 500' in agent and 'MuSiQue 50 drawn' in rag


@pytest.mark.parametrize('one, match', [
    ({'results': {}}, 'held-out questions of a config'),
    (AS_PUBLISHED | {'results': None}, 'has not ended'),
    ([], 'is no eval.json'), ({'datasets': {}}, 'is no eval.json'),
    (None, 'no eval.json')])
def test_evaluations_that_cannot_be_compared(one, match, tmp_path):
  if one is not None:
    (tmp_path / 'eval.json').write_text(json.dumps(one))
  with pytest.raises(ValueError, match=match):
    evaluate_stored.compare([tmp_path])


def test_published_numbers_are_those_of_the_facts():
  path = SHARED / 'design/method.md'
  if not path.exists():
    pytest.skip('no shared/design beside the repository')
  section = path.read_text().split('## 6')[1].split('Ablation')[0]
  pairs = lambda text: [
      tuple(map(float, found))
      for found in re.findall(r'(\.\d{3})/(\.\d{3})', text)]
  ours = dict(published.NUMBERS)
  merged = [*ours.pop('7B PPO, answer F1'), *ours.pop('7B GRPO, answer F1')]
  for line in section.splitlines():
    if '7B PPO' in line:
      assert sorted(pairs(line)) == sorted(merged)
    elif pairs(line):
      name = re.sub(r'[*(),]', '', line.split('|')[1]).strip()
      key, = [k for k in ours if k.replace(',', '') == name]
      assert list(ours.pop(key)) == pairs(line)
  assert not ours
