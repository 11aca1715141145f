"""A user's own data, as in the README: what each kind of row suffices for."""

import json

import pytest

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import prepare
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.data import builders

_CORPUS = ['bero is the mayor of cuna', 'cuna is in dilo', 'alba is in efra',
           'efra is in gomi']
_PLAIN = {'question': 'who is the mayor of cuna ?', 'answer': 'bero'}
_GOLD = {'gold': [{'title': '', 'text': 'bero is the mayor of cuna'}]}
_IDS = {'gold': [0]}
_KEYS = {'search_keys': [['mayor of cuna', 'who is mayor']]}
_OUTCOME = 'algorithm=ppo'
_TURNS = 'reward.search_key=false'


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """A tokenizer's folder."""
  folder = tmp_path_factory.mktemp('words')
  tokenizer_lib.from_words(
      ' '.join([*_CORPUS, 'who born ? : . ,']).split(),
      ['<think>', '</think>', '<search>', '</search>', '<information>',
       '</information>', '<answer>', '</answer>']).save(folder)
  return folder


def _build(tmp_path, words, *overrides, training=True):
  """What a run is made of, and what was said meanwhile."""
  said = []
  config = config_lib.load('configs/tiny.py', [
      'data.source=jsonl', f'tokenizer={words}', 'retriever.index=exact',
      'rollout.k=2', 'ppo.microbatch_size=8', *overrides])
  parts = assembly.build(
      config, tmp_path / 'run', training=training, say=said.append)
  return parts, said


def _parts(tmp_path, words, rows, *overrides, training=True):
  """The same, with these training questions."""
  (tmp_path / 'corpus.jsonl').write_text(''.join(
      json.dumps({'id': i, 'title': '', 'text': text}) + '\n'
      for i, text in enumerate(_CORPUS)))
  (tmp_path / 'train.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows))
  held_out = {'question': 'who is born in gomi ?', 'answer': 'alba'}
  (tmp_path / 'eval.jsonl').write_text(json.dumps(held_out))
  files = [
      f'data.{name}={tmp_path}/{name}.jsonl'
      for name in ('corpus', 'train', 'eval')]
  return _build(tmp_path, words, *files, *overrides, training=training)


@pytest.mark.parametrize('rows, overrides', [
    ([_PLAIN], [_OUTCOME]),
    ([_PLAIN], [
        _OUTCOME, 'data.demonstrations=search_keys', 'warmup.steps=0']),
    ([_PLAIN], ['reward.turn_reward=false', _TURNS]),
    ([_PLAIN | _GOLD], [_TURNS]),
    ([_PLAIN | _IDS], [_TURNS]),
    ([_PLAIN | _KEYS], ['reward.turn_reward=false']),
    ([_PLAIN | _GOLD | _KEYS], []),
    ([_PLAIN | _GOLD | _KEYS], [_OUTCOME]),
])
def test_what_suffices(tmp_path, words, rows, overrides):
  parts, said = _parts(tmp_path, words, rows, *overrides)
  assert len(parts.train) == 1 and not any('key reward' in s for s in said)
  found = parts.train[0]
  assert [d.id for d in found.gold_documents] == (
      ['0'] if 'gold' in rows[0] else [])
  assert found.search_keys == tuple(
      map(tuple, rows[0].get('search_keys', [])))


@pytest.mark.parametrize('rows, overrides, advice', [
    ([_PLAIN], [], ['1 of 1', 'prepare gold', 'turn_reward=false',
                    'algorithm=ppo']),
    ([_PLAIN], ['reward.turn_reward=false'], [
        'none of the 1', 'prepare keys', 'search_key=false']),
    ([_PLAIN | _GOLD], [], ['none of the 1', 'prepare keys']),
    ([_PLAIN | _GOLD | {'search_keys': [[], []]}], [], ['none of the 1']),
    ([_PLAIN | _KEYS], [], ['1 of 1', 'prepare gold']),
    ([_PLAIN | _GOLD | _KEYS, _PLAIN | {'question': 'who ?'}], [],
     ['1 of 2', '(2)', 'prepare gold']),
    ([_PLAIN], [_OUTCOME, 'data.demonstrations=search_keys'], [
        'none of the 1', 'config.warmup.steps=0']),
    ([_PLAIN | {'gold': [9]}], [_OUTCOME], ['line 1, field gold: "9"']),
])
def test_what_does_not_and_what_to_do(
    tmp_path, words, rows, overrides, advice):
  with pytest.raises(ValueError) as error:
    _parts(tmp_path, words, rows, *overrides)
  for part in advice:
    assert part in str(error.value)
  assert not (tmp_path / 'run').exists()  # so that it can be followed there


def test_what_is_left_out_is_said(tmp_path, words):
  held_out = {'question': 'who is born in gomi ?', 'answer': 'alba'}
  rows = [_PLAIN | _GOLD | _KEYS, held_out,
          _PLAIN | _GOLD | {'question': 'who ?'}]
  parts, said = _parts(tmp_path, words, rows)
  assert len(parts.train) == 2
  assert any('1 questions of' in s and 'are held out' in s for s in said)
  assert '1 of 2 training questions have no search keys: their key reward ' \
      'is 0' in said
  # Nothing of this is asked of those who only evaluate.
  parts, said = _parts(tmp_path, words, [], training=False)
  assert len(parts.eval) == 1 and not parts.train


def test_metrics_of_two_sets_are_not_one(tmp_path, words):
  other = tmp_path / 'other' / 'eval.jsonl'
  other.parent.mkdir()
  other.write_text(json.dumps(_PLAIN | {'question': 'what ?'}))
  with pytest.raises(ValueError, match='two of its sets are called eval'):
    _parts(tmp_path, words, [_PLAIN], _OUTCOME,
           f'data.eval={tmp_path}/eval.jsonl,{other}')
  another = other.rename(tmp_path / 'another.jsonl')
  parts, _ = _parts(tmp_path, words, [_PLAIN], _OUTCOME,
                    f'data.eval={tmp_path}/eval.jsonl, {another},')
  assert [e.dataset for e in parts.eval] == ['eval', 'another']


def test_a_prepared_set_is_named(tmp_path, words):
  steps = [
      {'question': 'who is the mayor of cuna ?', 'answer': 'bero',
       'paragraph_support_idx': 0},
      {'question': 'where is #1 born ?', 'answer': 'alba',
       'paragraph_support_idx': 1}]
  for split in ('train', 'dev'):
    (tmp_path / f'{split}.jsonl').write_text(json.dumps({
        'id': split, 'question': f'who {split} ?', 'answer': 'alba',
        'question_decomposition': steps, 'paragraphs': [
            {'idx': i, 'title': '', 'paragraph_text': text}
            for i, text in enumerate(_CORPUS)]}))
  release = next(r for r in builders.RELEASES if r.name == 'musique')
  data = str(tmp_path / 'data')
  prepare.prepare(release, data, files={
      s: [f'{tmp_path}/{s}.jsonl'] for s in ('train', 'dev')}, partial=True)
  parts, said = _build(
      tmp_path, words, f'data.directory={data}', 'data.corpus=musique:corpus',
      'data.train=musique:train_partial', 'data.eval=musique:dev_partial')
  assert said[-1].startswith('4 passages, 1 training and 1 held-out questions')
  assert parts.eval[0].dataset == 'musique'
  assert [d.id for d in parts.train[0].gold_documents] == ['0', '1']
  assert parts.train[0].search_keys[1] == ('where is bero born ?',)
  with pytest.raises(ValueError, match='there are musique:train_partial, mus'):
    _build(
        tmp_path, words, f'data.directory={data}', 'data.corpus=musique:corpus',
        'data.train=musique:train', 'data.eval=musique:dev_partial')
