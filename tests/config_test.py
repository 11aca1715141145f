"""config: overrides, errors for the user, resume; bugs keep their traceback."""

import json
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from stepsearch import config as config_lib

_FILE = """
from ml_collections import config_dict
from stepsearch import config as config_lib

def get_config(arg=''):
  config = config_dict.ConfigDict()
  config.seed = 0
  config.tokenizer = config_dict.placeholder(str)
  config.limit = config_dict.placeholder(int)
  config.mesh = (-1, 1, 1)
  config.betas = (0.9, 0.95)
  config.names = ('musique', 'hotpotqa')
  config.skipped = ()
  config.rl = dict(
      clip_eps=0.2, kl_coef=1e-3, whiten=True, algorithm='ppo', epochs=1)
  for variant in filter(None, arg.split(',')):
    if variant == 'sparse':
      config.rl.epochs = 2
    elif variant == 'broken':
      raise ValueError('sparse wants more hops')
    else:
      config_lib.unknown_variant(variant, ['sparse', 'ppo'])
  config.steps = config.get_ref('seed') + 1
  return config
"""


@pytest.fixture(name='path')
def _path(tmp_path):
  path = tmp_path / 'tiny.py'
  path.write_text(_FILE)
  return str(path)


def test_overrides_are_parsed_by_the_type_of_their_leaf(path):
  config = config_lib.load(path + ':sparse', [
      'seed=3', 'tokenizer=some/dir', 'limit=12', 'mesh=2,2,2',
      'betas=(0, 1)', 'names=bamboogle', 'skipped=nq,triviaqa',
      'rl.clip_eps=1', 'rl.whiten=False', 'rl.algorithm=a=b',
      'rl.clip_eps=0.3'])
  assert config.to_dict() == {
      'seed': 3, 'tokenizer': 'some/dir', 'limit': 12, 'mesh': (2, 2, 2),
      'betas': (0.0, 1.0), 'names': ('bamboogle',), 'steps': 4,
      'skipped': ('nq', 'triviaqa'),
      'rl': {'clip_eps': 0.3, 'kl_coef': 1e-3, 'whiten': False,
             'algorithm': 'a=b', 'epochs': 2}}
  assert isinstance(config.betas[0], float)
  config = config_lib.load(path, ['names=a,b', 'rl.kl_coef=2', 'limit=none'])
  assert config.names == ('a', 'b') and config.limit is None
  assert isinstance(config.rl.kl_coef, float)
  with pytest.raises(AttributeError):
    config.rl.unknown = 1  # locked


@pytest.mark.parametrize('override, parts', [
    ('rl.clip_epz=1', ['config.rl.clip_epz=1', 'config.rl.clip_eps?']),
    ('clip_eps=1', ['did you mean config.rl.clip_eps?']),
    ('seed.x=1', ['config.seed.x=1: there is no such field']),
    ('qqqqqqqq=1', ['there is no such field.']),
    ('rl=3', ['is a section', 'config.rl.clip_eps']),
    ('rl.epochs=1.5', ['config.rl.epochs=1.5', 'an integer', 'default 1']),
    ('rl.clip_eps=big', ['a number', '0.2']),
    ('rl.whiten=maybe', ['true or false']),
    ('seed=none', ['an integer']),
    ('limit=x', ['config.limit=x', 'an integer']),
    ('mesh=a', ['config.mesh=a', 'tuple']),
    ('mesh=(1.5, 2)', ['config.mesh=(1.5, 2)', 'tuple']),
    ('mesh=(1', ['tuple']),
])
def test_bad_overrides_are_refused_in_one_paragraph(path, override, parts):
  with pytest.raises(ValueError) as error:
    config_lib.load(path, [override])
  message = str(error.value)
  assert '\n' not in message
  for part in parts:
    assert part in message


def test_bad_files_and_variants(path, tmp_path):
  with pytest.raises(ValueError, match="'sparce'.*did you mean sparse"):
    config_lib.load(path + ':sparce')
  with pytest.raises(ValueError, match='tiny.py:broken: sparse wants more'):
    config_lib.load(path + ':broken')
  with pytest.raises(ValueError, match='no such config file.*tiny.py'):
    config_lib.load(str(tmp_path / 'tinny.py'))
  with pytest.raises(ValueError, match='no such config file'):
    config_lib.load('tiny')
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(ValueError, match='defines no get_config'):
    config_lib.load(str(tmp_path / 'empty.py'))


def test_overrides_are_split_from_the_command_line():
  rest, overrides = config_lib.split_overrides([
      'train', '--config=a.py', '--config.a=1', '--workdir', 'w', '--config.b',
      '-2', '--config.c.d', '--x', '-config.e=x=y'])
  assert rest == ['train', '--config=a.py', '--workdir', 'w', '--x']
  assert overrides == ['a=1', 'b=-2', 'c.d=true', 'e=x=y']


def test_require_and_choice():
  config_lib.require(True, 'a.b', 1, 'unused')
  with pytest.raises(ValueError, match=r'^config.a.b = 0: must be positive'):
    config_lib.require(0 > 0, 'a.b', 0, 'must be positive')
  config_lib.choice('rl.kl', 'k1', ('k1', 'k2'))
  with pytest.raises(
      ValueError, match="config.o = 'adamv' is none of 'adamw', 'sgd'; did"):
    config_lib.choice('o', 'adamv', ('adamw', 'sgd'))


def test_resume_compares_leaf_by_leaf(path, tmp_path):
  config = config_lib.load(path)
  config_lib.write(config, tmp_path)
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert stored == json.loads(config_lib.to_json(config))
  assert stored['mesh'] == [-1, 1, 1]
  config_lib.write(config, tmp_path)
  changed = config_lib.load(path, ['rl.epochs=3'])
  with pytest.raises(ValueError) as error:
    config_lib.write(changed, tmp_path)
  for part in ('config.rl.epochs is 3', 'with 1', str(tmp_path)):
    assert part in str(error.value)
  assert json.loads((tmp_path / 'config.json').read_text()) == stored
  for allowed in ('rl', 'rl.epochs'):
    config_lib.write(changed, tmp_path, may_change=[allowed])
  with pytest.raises(ValueError, match='config.rl.epochs is 1'):
    config_lib.write(config, tmp_path, may_change=['rl.epoch', 'r'])
  more = ml_collections.ConfigDict(changed.to_dict() | {'new': None})
  with pytest.raises(ValueError, match='config.new is null.*with absent'):
    config_lib.write(more, tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['config.json', 'tiny.py']


def test_a_run_s_config_comes_back(path, tmp_path):
  config = config_lib.load(str(path), ['rl.epochs=3'])
  config_lib.write(config, tmp_path)
  assert config_lib.to_json(config_lib.stored(tmp_path)) == (
      config_lib.to_json(config))
  root = pathlib.Path(__file__).parents[1]
  for default in (root / 'configs').glob('*.py'):
    config = config_lib.load(str(default))
    config_lib.write(config, tmp_path / default.stem)
    again = config_lib.stored(tmp_path / default.stem)
    assert again.to_dict() == config.to_dict() and again.is_locked
  assert config_lib.stored(tmp_path, ['rl.epochs=4']).rl.epochs == 4
  with pytest.raises(ValueError, match='no such field'):
    config_lib.stored(tmp_path, ['rl.epoch=4'])
  with pytest.raises(ValueError, match='no/config.json'):
    config_lib.stored(tmp_path / 'no')
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    config_lib.stored(tmp_path)


def test_check_workdir(tmp_path):
  workdir = config_lib.check_workdir(str(tmp_path / 'a' / 'b'))
  assert workdir.is_dir() and not list(workdir.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='=.*file/x: .*cannot be .*directory'):
    config_lib.check_workdir(str(tmp_path / 'file' / 'x'))


_PROGRAM = """
import sys
import numpy as np
from absl import flags
from stepsearch import config as config_lib

def run(config):
  what = flags.FLAGS.what
  if what == 'user':
    config_lib.require(False, 'rl.epochs', config.rl.epochs, 'two\\nlines')
  if what == 'file':
    open('no/such/file')
  if what == 'bug':
    np.zeros(2) + np.zeros(3)  # a ValueError of a library
  if what == 'interrupt':
    raise KeyboardInterrupt
  if what == 'key':
    {}['x']
  if what == 'pipe':
    raise BrokenPipeError  # of a connection
  while what == 'words':
    print('words', flush=True)
  print('ran', config.rl.epochs)

if __name__ == '__main__':
  flags.DEFINE_string('what', '', '')
  config_lib.main(run)
"""


@pytest.mark.parametrize('arguments, code, stdout, stderr', [
    (['--config.rl.epochs=4'], 0, 'ran 4\n', None),
    (['--what=user'], 1, '', 'error: config.rl.epochs = 1: two lines\n'),
    (['--what=file'], 1, '', "error: [Errno 2] No such file or directory: "
     "'no/such/file'\n"),
    (['--what=bug'], 1, '', ...),
    (['--what=key'], 1, '', ...),
    (['--what=pipe'], 1, '', ...),
    (['--what=interrupt'], 130, '', None),
    (['--config.rl.epoch=4'], 1, '', 'error: --config.rl.epoch=4: there is no '
     'such field; did you mean config.rl.epochs?\n'),
    (['--whaat=1'], 1, '', "error: Unknown command line flag 'whaat'. Did you "
     'mean: what ?\n'),
    (['stray'], 1, '', "error: unexpected argument 'stray': every argument is "
     'a flag, --name=value.\n'),
])
def test_main_turns_user_errors_into_a_paragraph(
    path, tmp_path, arguments, code, stdout, stderr):
  program = tmp_path / 'program.py'
  program.write_text(_PROGRAM)
  root = str(pathlib.Path(__file__).parents[1])
  done = subprocess.run(
      [sys.executable, str(program), f'--config={path}', *arguments],
      env=os.environ | {'PYTHONPATH': root}, capture_output=True, text=True,
      timeout=60, check=False)
  assert (done.returncode, done.stdout) == (code, stdout), done.stderr
  if stderr is ...:
    assert 'Traceback' in done.stderr
  else:
    assert done.stderr == (stderr or '')


def test_a_reader_that_leaves_ends_a_program_quietly(path, tmp_path):
  (tmp_path / 'program.py').write_text(_PROGRAM)
  root = str(pathlib.Path(__file__).parents[1])
  program = subprocess.Popen(
      [sys.executable, str(tmp_path / 'program.py'), f'--config={path}',
       '--what=words'], env=os.environ | {'PYTHONPATH': root},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert program.stdout.readline() == b'words\n'
  program.stdout.close()
  assert program.stderr.read() == b''
  assert program.wait(timeout=60) == 141


def test_help_shows_all_flags_of_a_command(tmp_path):
  # Its own and those that modules define for it: --config here.
  program = tmp_path / 'program.py'
  program.write_text(_PROGRAM)
  root = str(pathlib.Path(__file__).parents[1])
  run = lambda *arguments: subprocess.run(
      [sys.executable, str(program), *arguments],
      env=os.environ | {'PYTHONPATH': root}, capture_output=True, text=True,
      timeout=60, check=False)
  shown = run('--help').stdout
  assert '--what' in shown and '--config:' in shown
  assert '--verbosity' not in shown  # absl's own
  assert run().stderr == (
      'error: --config is missing: --help tells what it is.\n')


@pytest.mark.parametrize('arguments, called', [
    (['keys', '--n=3'], ('keys', ['program keys', '--n=3'])),
    (['--n=3'], ('otherwise', ['program', '--n=3'])),
    ([], ('otherwise', ['program'])),
])
def test_commands_are_named_by_the_first_argument(arguments, called):
  seen = []

  def command(name):
    def run(argv):
      seen.append((name, argv))
      raise SystemExit(0)
    return run

  with pytest.raises(SystemExit):
    config_lib.commands(
        {'keys': command('keys'), 'gold': command('gold')},
        command('otherwise'), ['program', *arguments])
  assert seen == [called]


def test_help_names_the_commands(capsys):
  with pytest.raises(SystemExit) as done:
    config_lib.commands({'keys': None, 'gold': None}, None, [
        'a/prepare.py', '--help'])
  assert done.value.code == 0
  assert ('python -m stepsearch.prepare NAME --help shows the flags of each '
          'of keys, gold.') in capsys.readouterr().out


@pytest.mark.parametrize('arguments, parts', [
    (['kesy'], ["no command 'kesy'", 'keys, gold', 'did you mean keys']),
    (['--n=3'], ['names what to do: keys, gold']),
    ([], ['names what to do: keys, gold']),
])
def test_unknown_commands_are_refused(arguments, parts, capsys):
  with pytest.raises(SystemExit) as stopped:
    config_lib.commands(
        {'keys': None, 'gold': None}, None, ['program', *arguments])
  assert stopped.value.code == 1
  error = capsys.readouterr().err
  for part in parts:
    assert part in error
