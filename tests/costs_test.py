"""Costs read off compiled programs, against counts by hand."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from stepsearch import costs


def cost(function, *shapes, passes=None):
  arrays = [
      x if isinstance(x, jax.ShapeDtypeStruct)
      else jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
  compiled = jax.jit(function).trace(*arrays).lower().compile()
  return costs.cost(compiled.as_text(), passes)


def test_bodies_count_as_often_as_they_run():
  def nested(x, w):
    def layer(x, w):
      return jax.lax.fori_loop(2, 9, lambda _, x: x @ w, x), None

    return jax.lax.scan(layer, x, w)[0] @ w[0]

  found = cost(nested, (8, 16), (5, 16, 16))
  assert found.flops == (5 * 7 + 1) * 2 * 8 * 16 * 16


def test_loops_that_depend_on_data_need_a_number():
  def loop(x, w, count):
    def body(carry):
      i, x = carry
      return i + 2, x @ w

    return jax.lax.while_loop(lambda c: c[0] < count, body, (0, x))

  shapes = (8, 16), (16, 16), jax.ShapeDtypeStruct((), jnp.int32)
  assert cost(loop, *shapes, passes=11).flops == 11 * 2 * 8 * 16 * 16
  with pytest.raises(ValueError, match='depend on data'):
    cost(loop, *shapes)


def test_the_dearer_branch_counts():
  def branches(x, w, first):
    return jax.lax.cond(first, lambda: x @ w @ w, lambda: x @ w)

  found = cost(
      branches, (8, 16), (16, 16), jax.ShapeDtypeStruct((), jnp.bool_))
  assert found.flops == 2 * 2 * 8 * 16 * 16


@pytest.mark.parametrize('strides, padding, dilation, groups', [
    ((1, 1), 'SAME', (1, 1), 1), ((2, 3), 'VALID', (2, 1), 1),
    ((1, 2), ((3, 1), (0, 2)), (1, 2), 4)])
def test_convolutions_meet_no_padding(strides, padding, dilation, groups):
  def convolve(x, w):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=dilation,
        feature_group_count=groups)

  x, w = (2, 8, 9, 10), (12, 8 // groups, 3, 2)
  found = cost(convolve, x, w)
  # Where all is 1, an output counts the products that made it.
  products = convolve(jnp.ones(x), jnp.ones(w)).sum()
  assert found.flops == 2 * products


def test_bytes_of_what_is_only_sliced_are_those_of_the_slice():
  rows = 4 * 256

  def add(x):
    return x + 1

  def one_row(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) * 2

  index = jax.ShapeDtypeStruct((), jnp.int32)
  assert cost(add, (100, 256)).bytes == 2 * 100 * rows
  assert cost(one_row, (100, 256), index).bytes == pytest.approx(
      2 * rows, abs=64)

  def update(x, row, i):  # x is donated
    return jax.lax.dynamic_update_index_in_dim(x, row, i, 0)

  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((100, 256), (256,))]
  text = jax.jit(update, donate_argnums=0).trace(
      *arrays, index).lower().compile().as_text()
  assert costs.cost(text).bytes == pytest.approx(2 * rows, abs=128)


def sharded(mesh, dtype='float32'):
  """A two-matrix layer, scanned, with gradients; and its argument shapes."""

  def loss(ws, x):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(
          w.astype(dtype), NamedSharding(mesh, P(None, 'tensor')))
      return jax.nn.silu(x @ w) @ w.T, None

    return jnp.sum(jax.lax.scan(layer, x, ws)[0].astype(jnp.float32)**2)

  def shapes(layers, embed, mlp, rows):
    return (
        jax.ShapeDtypeStruct(
            (layers, embed, mlp), jnp.float32,
            sharding=NamedSharding(mesh, P(None, 'fsdp', 'tensor'))),
        jax.ShapeDtypeStruct(
            (rows, embed), dtype, sharding=NamedSharding(mesh, P('fsdp'))))

  return jax.value_and_grad(loss), shapes


@pytest.mark.parametrize('eight', [((1, 4, 2), {}, {})], indirect=True)
def test_sharded_programs_count_one_device(eight):
  function, shapes = sharded(eight.mesh)
  layers, embed, mlp, rows = 6, 64, 128, 32
  found = cost(function, *shapes(layers, embed, mlp, rows))
  # Two products forward, four back, on a fourth of the rows and half of mlp.
  assert found.flops == layers * 6 * 2 * (rows // 4) * embed * (mlp // 2)
  # Each layer's weights are gathered once from four devices.
  shard = embed // 4 * mlp // 2 * 4
  assert found.collectives['all-gather'] == layers * 3 * shard
  # Over tensor: what comes out of a layer, and its gradient. Over fsdp: both
  # gradients of the weights. Last, the loss.
  activations = 2 * 2 * (1 / 2) * rows // 4 * embed * 4
  weights = 2 * 2 * (3 / 4) * embed * mlp // 2 * 4
  assert found.collectives['all-reduce'] == (
      layers * (activations + weights) + 2 * (3 / 4) * 4)


def test_the_slowest_resource_binds():
  chip = costs.Chip(hbm=0, flops=10, bandwidth=5, links=2, clock=1)
  found = costs.Cost(
      flops=30, kernel_flops=20, bytes=20, collectives={'a': 4, 'b': 3})
  assert costs.roofline(found, chip) == (5, 'compute')
  found.bytes = 26
  assert costs.roofline(found, chip) == (5.2, 'HBM')
  found.collectives['a'] = 8
  assert costs.roofline(found, chip) == (5.5, 'interconnect')


# What TPU programs have and CPU programs have not. SHARD and FULL are of the
# weights, ROWS lies on the chip, N is a number; all in tiles of 8 x 128.
TPU = """HloModule step, is_scheduled=true

%start (a: SHARD) -> (SHARD, FULL) {
  %a = SHARD parameter(0)
  %g0 = FULL all-gather(%a), channel_id=7, GROUPS0, dimensions={1}
  ROOT %s = (SHARD, FULL) custom-call(%g0), STARTED
}

%middle (b: SHARD, x: ROWS) -> (ROWS, SHARD) {
  %b = SHARD parameter(0)
  %x = ROWS parameter(1)
  %g1 = FULL all-gather(%b), channel_id=7, GROUPS1, dimensions={1}
  %y = ROWS add(%x, %x)
  ROOT %t = (ROWS, SHARD) tuple(%y, %b)
}

%done (c: SHARD) -> FULL {
  %c = SHARD parameter(0)
  %g2 = FULL all-gather(%c), channel_id=7, GROUPS2, dimensions={1}
  ROOT %d = FULL custom-call(%g2), ENDED
}

%condition (p: (N, SHARD, N)) -> pred[] {
  %p = (N, SHARD, N) parameter(0)
  %i = N get-tuple-element(%p), index=0
  %n = N get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (q: (N, SHARD, N)) -> (N, SHARD, N) {
  %q = (N, SHARD, N) parameter(0)
  %j = N get-tuple-element(%q), index=0
  %m = N get-tuple-element(%q), index=2
  %w = SHARD get-tuple-element(%q), index=1
  %two = N constant(2)
  %next = N add(%j, %two)
  %st = (SHARD, FULL) fusion(%w), kind=kCustom, calls=%start
  %w1 = SHARD get-tuple-element(%st), index=0
  %v = ROWS constant({...})
  %mid = (ROWS, SHARD) fusion(%w1, %v), kind=kLoop, calls=%middle, frontend={
"a":"line of its own"}, CYCLES
  %w2 = SHARD get-tuple-element(%mid), index=1
  %full = FULL fusion(%w2), kind=kCustom, calls=%done
  ROOT %out = (N, SHARD, N) tuple(%next, %w2, %m)
}

ENTRY %main (w.1: SHARD, h: bf16[3,64]) -> SHARD {
  %w.1 = SHARD parameter(0)
  %h = THERE parameter(1)
  %zero = N constant(0)
  %nine = N constant(9)
  %up = (HERE, THERE, u32[]{:S(2)}) copy-start(%h)
  %here = HERE copy-done(%up)
  %in = (N, SHARD, N) tuple(%zero, %w.1, %nine)
  %loop = (N, SHARD, N) while(%in), condition=%condition, body=%body
  ROOT %result = SHARD get-tuple-element(%loop), index=1
}
"""
for short, long in {
    'SHARD': 'bf16[1,224,512]{2,1,0:T(8,128)(2,1)}',
    'FULL': 'bf16[1,896,512]{2,1,0:T(8,128)(2,1)S(1)}',
    'ROWS': 'bf16[128,512]{1,0:T(8,128)(2,1)S(1)}',
    'THERE': 'bf16[3,64]{1,0:T(8,128)(2,1)S(5)}',
    'HERE': 'bf16[3,64]{1,0:T(8,128)(2,1)}',
    'GROUPS0': "replica_groups=mesh['x'=2,'y'=8] {'x':(1)2,'y':(4)2}",
    'GROUPS1': 'replica_groups=[2,4]<=[8]',
    'GROUPS2': 'replica_groups={{0,1,2,3},{4,5,6,7}}',
    'STARTED': 'custom_call_target="AsyncCollectiveStart"',
    'ENDED': 'custom_call_target="AsyncCollectiveDone"',
    'CYCLES': 'backend_config={"window_config":{"estimated_cycles":"1000"}}',
    'N ': 's32[]{:T(128)} ', 'N,': 's32[]{:T(128)},', 'N)': 's32[]{:T(128)})',
}.items():
  TPU = TPU.replace(short, long)


def test_a_tpu_program_by_hand():
  found = costs.cost(TPU)
  # 0, 2, ..., 8: five times. Three fusions have parts of one all-gather.
  assert found.collectives == {'all-gather': 5 * 3 * 224 * 512 * 2}
  assert found.cycles == 5 * 1000
  # From the host comes a whole tile of 8 x 128.
  assert found.host_bytes == 8 * 128 * 2
  # The shard is read, and its gathered form is nowhere but on the chip. The
  # rest is the loop's counter.
  assert found.bytes - found.host_bytes == pytest.approx(
      5 * 224 * 512 * 2, abs=5 * 32)


COMPILE = """
import dataclasses
import json
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from stepsearch import costs
from stepsearch import sharding
from stepsearch.models import attention
from tests import costs_test

devices = topologies.get_topology_desc(
    topology_name='v5e:2x4', platform='tpu').devices
mesh = sharding.make_mesh((1, 4, 2), devices)

def report(function, *shapes, passes=None):
  compiled = jax.jit(function).trace(*shapes).lower().compile()
  print(json.dumps(dataclasses.asdict(costs.cost(compiled.as_text(), passes))))

function, shapes = costs_test.sharded(mesh, 'bfloat16')
report(function, *shapes(6, 1024, 4096, 4096))

layout = sharding.Layout(mesh)
place = layout.rows
rows = lambda *shape: jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=place)
segments = jax.ShapeDtypeStruct((8, 2048), 'int32', sharding=place)

def layers(q, k, segments, count):
  attend = lambda q: jnp.sum(attention.attend(
      q, k, k, segments=segments, kind='splash', layout=layout)
      .astype(jnp.float32))
  return jax.lax.fori_loop(0, count, lambda _, q: jax.grad(attend)(q), q)

report(layers, rows(8, 2048, 8, 128), rows(8, 2048, 2, 128), segments,
       jax.ShapeDtypeStruct((), 'int32'), passes=3)
"""


def test_programs_for_tpu():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu (0.0.42.* with jax 0.10.2) is not installed')
  root = str(pathlib.Path(__file__).parents[1])
  environment = os.environ | {
      'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16', 'XLA_FLAGS': ''}
  done = subprocess.run(
      [sys.executable, '-c', COMPILE], env=environment, text=True,
      capture_output=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  matrices, attention = map(json.loads, done.stdout.strip().split('\n'))

  layers, embed, mlp, rows = 6, 1024, 4096, 4096
  assert matrices['flops'] == layers * 6 * 2 * rows // 4 * embed * mlp // 2
  shard = embed // 4 * mlp // 2 * 2
  assert matrices['collectives']['all-gather'] == layers * 3 * shard
  # Both products of a layer read their operands and write a result; no more
  # than what six products, three times over, would.
  assert matrices['cycles'] > matrices['flops'] / (4 * 128 * 128 * 2)
  # Weights, read and their gradients written, pass through HBM at least.
  parameters = layers * embed * mlp // 2
  assert matrices['bytes'] > parameters // 4 * 4 + parameters * 2

  # A row of 2,048 is four blocks of 512 a side, ten of them not above the
  # diagonal; two rows and four heads are on a device. The gradient of k and v
  # is not asked for.
  block = 2 * 512 * 512 * 128
  assert attention['kernels'] == {
      'splash_mha_fwd_segmented_residuals': 3,
      'splash_mha_dq_segmented_no_residuals': 3}
  assert attention['kernel_flops'] == 3 * 2 * 4 * 10 * (2 + 3) * block
  assert attention['flops'] == 0
