import jax
import jax.numpy as jnp
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
  layout = sharding.Layout(sharding.make_mesh((2, 2, 2), devices))
  axes = {
      'a': PartitionSpec('vocab', 'embed'),
      'b': PartitionSpec('layers', 'embed', 'heads', 'head_dim'),
      'c': PartitionSpec(None, 'kv_heads'),
      'd': PartitionSpec('batch', 'length'),
  }
  found = layout.place(axes)
  assert {name: x.spec for name, x in found.items()} == {
      'a': PartitionSpec('tensor', 'fsdp'),
      'b': PartitionSpec(None, 'fsdp', 'tensor', None),
      'c': PartitionSpec(None, 'tensor'),
      'd': PartitionSpec(('data', 'fsdp'), None),
  }
  assert layout.shards == 4 and layout.size('mlp') == 2


def test_the_batch_gives_way_to_other_dimensions(devices):
  layout = sharding.Layout(
      sharding.make_mesh((2, 2, 2), devices), sharding.rules(
          dict(batch=('data', 'fsdp'), mlp=('fsdp', 'tensor')), 'decode'))
  assert layout.spec('batch', None, 'mlp') == PartitionSpec(
      'data', None, ('fsdp', 'tensor'))
  assert layout.spec('batch', None, beside='mlp') == PartitionSpec('data', None)
  x = np.arange(8.0 * 3).reshape(8, 3)
  spread = jax.jit(lambda x: layout.constrain(x, 'batch', None))(x)
  assert spread.sharding.is_equivalent_to(layout.rows, 2)
  # Three rows cannot be split over four shards.
  whole = jax.jit(lambda x: layout.constrain(x, 'batch', None))(x[:3])
  assert whole.sharding.is_fully_replicated


def test_weights_are_gathered_and_gradients_scattered(devices):
  """In the dtype of the computation; the value and gradient are the plain."""
  layout = sharding.Layout(sharding.make_mesh((2, 2, 2), devices))
  w = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  w = jax.device_put(w, layout.named('embed', 'mlp'))
  x = jax.device_put(
      np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32),
      layout.rows)

  def loss(w, gather):
    used = w.astype(jnp.bfloat16)
    if gather:
      used = layout.gather(used, 'embed', 'mlp')
    return jnp.sum(jnp.sin(x.astype(jnp.bfloat16) @ used).astype(jnp.float32))

  step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  (value, gradient), (plain, expected) = step(w, True), step(w, False)
  np.testing.assert_allclose(value, plain, rtol=1e-2)
  np.testing.assert_allclose(gradient, expected, rtol=0.05, atol=0.05)
  assert gradient.sharding.is_equivalent_to(w.sharding, 2)
  text = step.lower(w, True).compile().as_text()
  assert 'all-gather' in text


@pytest.mark.parametrize(
    ('table', 'says'),
    [
        ({'head': ('tensor',)}, 'config.sharding.update.head'),
        ({'mlp': ('model',)}, "each of the mesh axes"),
        ({'mlp': ('tensor', 'tensor')}, 'at most once'),
        ({'mlp': ('fsdp',), 'embed': ('fsdp',)}, "both name 'fsdp'"),
    ],
)
def test_impossible_rules_are_refused(table, says):
  with pytest.raises(ValueError, match=says):
    sharding.rules(table, 'sharding.update')


def test_rows_are_split_over_data_and_fsdp(devices):
  layout = sharding.Layout(sharding.make_mesh((2, 2, 2), devices))
  host = {'x': np.arange(24).reshape(8, 3), 'y': np.arange(4.0)}
  placed = sharding.shard_batch(host, layout)
  for name, array in placed.items():
    np.testing.assert_array_equal(array, host[name])
    assert array.sharding == layout.rows
    assert all(
        shard.data.shape[0] == len(host[name]) // 4
        for shard in array.addressable_shards)
  keys = jax.random.split(jax.random.key(0), 8)
  np.testing.assert_array_equal(
      jax.random.key_data(sharding.shard_batch(keys, layout)),
      jax.random.key_data(keys))
  whole = jax.device_put(np.arange(5), layout.replicated)
  assert all(shard.data.shape == (5,) for shard in whole.addressable_shards)


def test_rows_that_do_not_divide_are_refused(devices):
  layout = sharding.Layout(sharding.make_mesh((2, 2, 2), devices))
  with pytest.raises(ValueError, match='batch of 6 rows .* multiple of 4'):
    sharding.shard_batch(np.zeros((6, 2)), layout)


class _Device:
  """One of eight, two in a process; enough of one to be laid out."""

  platform = 'cpu'

  def __init__(self, number):
    self.id, self.process_index = number, number // 2


@pytest.mark.parametrize('shape, expected', [
    ((8, 1, 1), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ((2, 2, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    # Two processes hold the same rows, or all four do.
    ((2, 1, 4), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ((1, 1, 8), [[0, 1], [2, 3], [4, 5], [6, 7]]),
])
def test_every_row_is_one_process_own(monkeypatch, shape, expected):
  devices = np.array([_Device(i) for i in range(8)]).reshape(shape)
  layout = sharding.Layout(jax.sharding.Mesh(devices, sharding.AXES))
  for process, rows in enumerate(expected):
    monkeypatch.setattr(jax, 'process_index', lambda p=process: p)
    assert sharding.local_rows(layout, 8) == rows


def test_rows_lie_where_their_devices_are(monkeypatch):
  # A process whose devices lie apart, and rows that three processes share.
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  devices = np.array([_Device(i) for i in order])
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  apart = sharding.Layout(
      jax.sharding.Mesh(devices.reshape(8, 1, 1), sharding.AXES))
  assert sharding.local_rows(apart, 8) == [1, 5]
  shared = sharding.Layout(
      jax.sharding.Mesh(devices[:6].reshape(2, 1, 3), sharding.AXES))
  # Rows 0-3 are of processes 0, 1, 2; rows 4-7 of 3, 0, 1.
  assert sharding.local_rows(shared, 8) == [1, 5]
