"""checkpoints: bit for bit, rotation, killed saves, and what errors say."""

import os
import pathlib
import re
import subprocess
import sys

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepsearch import checkpoints


@struct.dataclass
class _State:
  params: dict
  optimizer: tuple
  key: jax.Array
  step: jax.Array


def _state(rows=6):
  rng = np.random.default_rng(rows)
  params = {
      'layer': {'w': jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)},
      'b': jnp.asarray(rng.normal(size=3), jnp.bfloat16)}
  optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
  return _State(
      params, optimizer, jax.random.key_data(jax.random.key(7)), jnp.int32(5))


def _open(path, keep_latest=2, keep_best=1):
  return checkpoints.Checkpoints(
      path, keep_latest=keep_latest, keep_best=keep_best)


def _assert_bitwise(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bitwise_and_keeps_metadata(tmp_path):
  metadata = {'data': {'position': 640}, 'config': {'lr': 1e-3, 'mesh': [1]}}
  with _open(tmp_path / 'c') as saver:
    assert saver.latest() is None
    saver.save(3, _state(), metadata)
    assert saver.latest() == 3
    like = jax.tree.map(jnp.zeros_like, _state())
    state, stored = saver.restore(like)
  _assert_bitwise(state, _state())
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  assert stored == metadata
  # Another reader, with nothing but shapes: numpy arrays.
  state, _ = checkpoints.restore(tmp_path / 'c', jax.eval_shape(_state))
  _assert_bitwise(state, _state())
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))


def test_special_values_and_integers_survive(tmp_path):
  tree = {
      'f32': np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
      'u32': np.array([0, 2**32 - 1], np.uint32),
      'i8': np.array([-128, 127], np.int8),
      'bool': np.array([True, False])}
  checkpoints.save_once(tmp_path / 'x', tree)
  _assert_bitwise(checkpoints.restore_once(tmp_path / 'x', tree), tree)


def test_part_of_a_state_is_restored_by_name(tmp_path):
  with _open(tmp_path) as saver:
    saver.save(0, _state(), {})
  part = {'params': jax.eval_shape(_state).params}
  state, _ = checkpoints.restore(tmp_path, part, partial=True)
  _assert_bitwise(state, {'params': _state().params})
  with pytest.raises(ValueError, match='does not fit the model'):
    checkpoints.restore(tmp_path, part)


def test_the_latest_and_the_best_are_kept(tmp_path):
  with _open(tmp_path, keep_latest=2, keep_best=1) as saver:
    for step, em in enumerate([0.1, 0.9, 0.2, float('nan'), 0.3]):
      saver.save(step, {'w': np.ones(2)}, {}, metrics={'eval/em': em, 'x': 9})
  with _open(tmp_path, keep_latest=2, keep_best=1) as saver:  # after a restart
    saver.save(5, {'w': np.ones(2)}, {})
    saver.save(6, {'w': np.ones(2)}, {})
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ['1', '5', '6']


def test_a_save_survives_the_donation_of_its_state(tmp_path):
  # On CPU the save may hold views of the buffers that the update is given.
  update = jax.jit(
      lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  state = {'w': jnp.arange(1 << 20, dtype=jnp.float32)}
  expected = np.arange(1 << 20, dtype=np.float32)
  with _open(tmp_path) as saver:
    for step in range(3):
      saver.save(step, state, {})
      update(state)
      restored, _ = saver.restore({'w': expected})
      np.testing.assert_array_equal(restored['w'], expected)
      state = {'w': jnp.arange(1 << 20, dtype=jnp.float32)}


def test_restored_arrays_take_the_sharding_asked_for(tmp_path):
  if len(jax.devices()) < 4:
    pytest.skip('needs four devices')
  devices = np.asarray(jax.devices()[:4])
  wide = jax.sharding.Mesh(devices, ('x',))
  narrow = jax.sharding.Mesh(devices[:2], ('x',))
  spec = jax.sharding.PartitionSpec('x')
  expected = np.arange(32, dtype=np.float32).reshape(8, 4)
  array = jax.device_put(expected, jax.sharding.NamedSharding(wide, spec))
  with _open(tmp_path) as saver:
    saver.save(0, {'w': array}, {})
  target = jax.sharding.NamedSharding(narrow, spec)
  like = {'w': jax.ShapeDtypeStruct((8, 4), np.float32, sharding=target)}
  restored, _ = checkpoints.restore(tmp_path, like)
  assert restored['w'].sharding == target
  np.testing.assert_array_equal(restored['w'], expected)


def test_a_killed_save_is_ignored_and_cleared_away(tmp_path):
  with _open(tmp_path) as saver:
    saver.save(1, _state(), {'n': 1})
    saver.save(2, _state(), {'n': 2})
  # What a kill leaves: the step under its temporary name, a part missing.
  (tmp_path / '2').rename(tmp_path / '2.orbax-checkpoint-tmp')
  (tmp_path / '2.orbax-checkpoint-tmp' / '_CHECKPOINT_METADATA').unlink()
  (tmp_path / '2.orbax-checkpoint-tmp' / 'commit_success.txt').unlink(
      missing_ok=True)
  _, metadata = checkpoints.restore(tmp_path, _state())
  assert metadata == {'n': 1}
  assert (tmp_path / '2.orbax-checkpoint-tmp').exists()  # a reader only reads
  with _open(tmp_path) as saver:
    assert saver.latest() == 1
    saver.save(2, _state(), {'n': 3})
    assert saver.restore(_state())[1] == {'n': 3}
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


def test_another_model_is_refused_with_leaf_and_shapes(tmp_path):
  with _open(tmp_path) as saver:
    saver.save(4, _state(6), {})
  with pytest.raises(ValueError) as error:
    checkpoints.restore(tmp_path, _state(8))
  message = str(error.value)
  for part in (str(tmp_path / '4'), 'layer.w', 'float32[6, 4]', '[8, 4]'):
    assert part in message
  assert '\n' not in message
  other = _state()
  half = other.replace(params=jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), other.params))
  with pytest.raises(ValueError, match='layer.w is float32.*bfloat16'):
    checkpoints.restore(tmp_path, half)
  with pytest.raises(ValueError, match='it lacks params.extra'):
    checkpoints.restore(
        tmp_path, other.replace(params=other.params | {'extra': np.ones(1)}))


def test_a_missing_checkpoint_names_the_directory_and_the_steps(tmp_path):
  with _open(tmp_path / 'c') as saver:
    saver.save(4, {'w': np.ones(1)}, {})
    saver.save(8, {'w': np.ones(1)}, {})
  where = re.escape(str(tmp_path / 'c'))
  with pytest.raises(ValueError, match=f'{where}.* 5; steps present: 4, 8'):
    checkpoints.restore(tmp_path / 'c', {'w': np.ones(1)}, step=5)
  with pytest.raises(ValueError, match='steps present: none'):
    checkpoints.restore(tmp_path / 'nowhere', {'w': np.ones(1)})
  assert not (tmp_path / 'nowhere').exists()
  with pytest.raises(ValueError, match='nowhere does not exist'):
    checkpoints.restore_once(tmp_path / 'nowhere', {'w': np.ones(1)})


def test_the_same_step_is_not_saved_twice(tmp_path):
  with _open(tmp_path) as saver:
    saver.save(4, {'w': np.ones(1)}, {})
    with pytest.raises(ValueError, match='4 already exists'):
      saver.save(4, {'w': np.zeros(1)}, {})


def test_save_once_replaces_and_the_rotation_leaves_it(tmp_path):
  checkpoints.save_once(tmp_path / 'reference', {'w': np.zeros(2)})
  checkpoints.save_once(tmp_path / 'reference', {'w': np.ones(2)})
  with _open(tmp_path / 'checkpoints', keep_latest=1, keep_best=0) as saver:
    for step in range(3):
      saver.save(step, {'w': np.zeros(2)}, {})
  restored = checkpoints.restore_once(
      tmp_path / 'reference', {'w': np.zeros(2)})
  np.testing.assert_array_equal(restored['w'], np.ones(2))
  with pytest.raises(ValueError, match=r'w is float64\[2\] there'):
    checkpoints.restore_once(tmp_path / 'reference', {'w': np.zeros(3)})


def test_an_unwritable_directory_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  path = tmp_path / 'file' / 'c'
  for make in (
      lambda: _open(path),
      lambda: checkpoints.save_once(path, {'w': np.ones(1)})):
    with pytest.raises(ValueError, match=r'file/c cannot be .*Not a directory'):
      make()


_FULL_DISK = """
import resource, sys
import numpy as np
from absl import logging
from stepsearch import checkpoints
logging.set_verbosity(logging.FATAL)
saver = checkpoints.Checkpoints(sys.argv[1], keep_latest=1, keep_best=0)
saver.save(0, dict(w=np.ones(4)), {})
saver.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
try:
  saver.save(1, dict(w=np.random.default_rng(0).normal(size=1 << 18)), {})
  saver.wait()
except ValueError as error:
  print(error)
saver.close()
resource.setrlimit(
    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
state, _ = checkpoints.restore(sys.argv[1], dict(w=np.ones(4)))
print(state['w'].sum())
"""


def test_a_write_that_fails_names_the_path_and_leaves_the_last_one(tmp_path):
  # A limit on the size of files stands in for a full disk.
  done = subprocess.run(
      [sys.executable, '-c', _FULL_DISK, str(tmp_path)],
      cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
      timeout=120, check=False, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  message, total = done.stdout.splitlines()
  assert message.startswith(f'{tmp_path} cannot be written (File too large)')
  assert 'free space' in message and total == '4.0'
  assert done.stderr == ''


def test_relative_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tree = {'a': np.arange(3.0)}
  checkpoints.save_once('once', tree)
  np.testing.assert_array_equal(
      checkpoints.restore_once('once', tree)['a'], tree['a'])
  with checkpoints.Checkpoints('run', keep_latest=1, keep_best=0) as store:
    store.save(1, tree, {})
  restored, _ = checkpoints.restore('run', tree)
  np.testing.assert_array_equal(restored['a'], tree['a'])
