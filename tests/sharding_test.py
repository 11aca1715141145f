import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from stepsearch import sharding


@pytest.fixture
def devices():
  if len(jax.devices()) < 8:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  return jax.devices()[:8]


def test_one_size_may_be_left_open(devices):
  for shape, expected in (
      ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((8, 1, -1), (8, 1, 1)),
      ((1, 4, 2), (1, 4, 2))):
    mesh = sharding.make_mesh(shape, devices)
    assert tuple(mesh.shape.items()) == tuple(
        zip(('data', 'fsdp', 'tensor'), expected))
  one = sharding.make_mesh(devices=devices[:1])
  assert set(one.shape.values()) == {1}


@pytest.mark.parametrize(
    ('shape', 'says'),
    [
        ((3, 1, 1), 'needs 3 devices and there are 8'),
        ((-1, 3, 1), 'there are 8'),
        ((-1, 16, 1), 'there are 8'),
        ((-1, -1, 1), 'three sizes'),
        ((8, 1), 'three sizes'),
        ((8, 0, 1), 'three sizes'),
        ((-2, -4, 1), 'three sizes'),
    ],
)
def test_impossible_meshes_are_refused(devices, shape, says):
  with pytest.raises(ValueError, match=says) as error:
    sharding.make_mesh(shape, devices)
  assert 'config.mesh' in str(error.value)


def test_logical_axes_land_where_the_rules_say(devices):
  mesh = sharding.make_mesh((2, 2, 2), devices)
  axes = {
      'a': PartitionSpec('vocab', 'embed'),
      'b': PartitionSpec('layers', 'embed', 'heads', 'head_dim'),
      'c': PartitionSpec(None, 'kv_heads'),
      'd': PartitionSpec('batch', 'length'),
  }
  found = sharding.shardings(axes, mesh)
  assert {name: x.spec for name, x in found.items()} == {
      'a': PartitionSpec('tensor', 'fsdp'),
      'b': PartitionSpec(None, 'fsdp', 'tensor', None),
      'c': PartitionSpec(None, 'tensor'),
      'd': PartitionSpec(('data', 'fsdp'), None),
  }


def test_rows_are_split_over_data_and_fsdp(devices):
  mesh = sharding.make_mesh((2, 2, 2), devices)
  host = {'x': np.arange(24).reshape(8, 3), 'y': np.arange(4.0)}
  placed = sharding.shard_batch(host, mesh)
  for name, array in placed.items():
    np.testing.assert_array_equal(array, host[name])
    assert array.sharding == sharding.rows(mesh)
    assert all(
        shard.data.shape[0] == len(host[name]) // 4
        for shard in array.addressable_shards)
  keys = jax.random.split(jax.random.key(0), 8)
  np.testing.assert_array_equal(
      jax.random.key_data(sharding.shard_batch(keys, mesh)),
      jax.random.key_data(keys))
  whole = jax.device_put(np.arange(5), sharding.replicated(mesh))
  assert all(shard.data.shape == (5,) for shard in whole.addressable_shards)


def test_rows_that_do_not_divide_are_refused(devices):
  mesh = sharding.make_mesh((2, 2, 2), devices)
  with pytest.raises(ValueError, match='batch of 6 rows .* multiple of 4'):
    sharding.shard_batch(np.zeros((6, 2)), mesh)
