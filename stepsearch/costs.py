"""What a compiled program costs, and the least time that a chip needs for it.

    compiled.as_text() ─▶ cost ─▶ FLOPs, bytes of HBM, bytes between chips
                                       │
                          chip ────────┴─▶ roofline: seconds, what binds

XLA's own `cost_analysis` counts the body of a loop once. Here a body counts as
often as it runs. Everything is per device, as the partitioned program is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import numpy as np

from stepsearch import hlo
from stepsearch.hlo import Instruction
from stepsearch.hlo import Shape

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'collective-permute', 'collective-broadcast', 'ragged-all-to-all')
# These move nothing by themselves.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
    'conditional', 'call', 'after-all', 'partition-id', 'replica-id',
    'opt-barrier', 'add-dependency', 'optimization-barrier'))


@dataclasses.dataclass
class Cost:
  """Of one device and one call of the program."""

  flops: float = 0.0  # of dots and convolutions
  kernel_flops: float = 0.0  # of attention kernels, as of `_kernel_flops`
  bytes: float = 0.0  # HBM, read and written
  host_bytes: float = 0.0  # between HBM and the host's memory
  cycles: float = 0.0  # the TPU compiler's estimate; no kernels, no collectives
  # Bytes that the device sends, by kind, if every group is a ring.
  collectives: dict[str, float] = dataclasses.field(default_factory=dict)
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)  # calls

  def add(self, other: Cost, times: float = 1) -> None:
    """Adds another cost, so many times."""
    self._merge(other, lambda x, y: x + times * y)

  def raise_to(self, other: Cost) -> None:
    """The larger of both, figure by figure."""
    self._merge(other, max)

  def _merge(self, other, function):
    for field in dataclasses.fields(self):
      mine, theirs = getattr(self, field.name), getattr(other, field.name)
      if isinstance(mine, dict):
        for name in theirs:
          mine[name] = function(mine.get(name, 0.0), theirs[name])
      else:
        setattr(self, field.name, function(mine, theirs))

  @property
  def collective_bytes(self) -> float:
    """Of all kinds."""
    return sum(self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do."""

  hbm: float  # bytes that the compiler lets a program have
  flops: float  # a second, bfloat16
  bandwidth: float  # bytes of HBM a second
  links: float  # bytes a second that it sends, over all of its links at once
  clock: float  # Hz


# The vendor's figures (cloud.google.com/tpu/docs: v5e, v5p, v6e); of an
# interconnect's "bidirectional" bandwidth half goes out. hbm is what libtpu
# says when a program is too large. The clock is the one at which the MXUs (4 of
# 128 x 128 a core, 4 of 256 x 256 on v6e) reach the peak.
CHIPS = {
    'v5e': Chip(15.75 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    'v5p': Chip(95.74 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
    'v6e': Chip(31.25 * 2**30, 918e12, 1600e9, 400e9, 1.75e9),
}


def roofline(cost: Cost, chip: Chip) -> tuple[float, str]:
  """The least seconds that a chip needs, and what binds it.

  Returns:
    the largest of FLOPs, bytes of HBM and bytes sent, each at the chip's full
    rate, and its name: compute, HBM or interconnect.
  """
  seconds = {
      'compute': (cost.flops + cost.kernel_flops) / chip.flops,
      'HBM': cost.bytes / chip.bandwidth,
      'interconnect': cost.collective_bytes / chip.links,
  }
  bound = max(seconds, key=seconds.get)
  return seconds[bound], bound


def cost(text: str, passes: int | None = None) -> Cost:
  """What one call of a program costs one device.

  * FLOPs: two per multiplication of dots and convolutions; where a convolution
    meets padding, nothing.
  * Attention kernels: `_kernel_flops`. Kernels of other names count no FLOPs.
  * Bytes: what the instructions outside fusions read and write in HBM, of an
    array that is only sliced or updated in place the slices. An array that an
    instruction reads several times counts once.
  * Of the branches of a conditional the larger figures.

  Args:
    text: `compiled.as_text()`, for TPU or CPU.
    passes: trips of loops whose number depends on data.

  Raises:
    ValueError: such a loop, and no `passes`.
  """
  program = hlo.parse(text)
  return _Reader(program, passes).of(program.entry)


# -- FLOPs -------------------------------------------------------------------


def _numbers(instruction: Instruction, pattern: str) -> list[int]:
  found = instruction.attribute(pattern)
  return [int(x) for x in (found or '').split(',') if x]


def _dot_flops(instruction: Instruction, operands: list[Shape]) -> float:
  contracted = math.prod(
      operands[0].dims[axis]
      for axis in _numbers(instruction, r'lhs_contracting_dims=\{([\d,]*)\}'))
  return 2.0 * instruction.shapes[0].elements * contracted


def _convolution_flops(
    instruction: Instruction, operands: list[Shape]
) -> float:
  """2 x products; TPU programs have all their dots as convolutions."""
  lhs, rhs, out = re.search(
      r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes).groups()
  size = lambda shape, labels, label: shape.dims[labels.index(label)]
  result = instruction.shapes[0]
  window = instruction.attribute(r'window=\{([^}]*)\}') or ''
  options = dict(x.split('=') for x in window.split())
  products = float(
      size(operands[1], rhs, 'i') * size(result, out, 'f')
      * size(operands[0], lhs, 'b')
      / int(instruction.attribute(r'batch_group_count=(\d+)') or 1))
  # The kernel's `i` is already a feature group's share.
  for axis, length in enumerate(options.get('size', '').split('x')):
    if not length:
      continue
    option = lambda name, default, axis=axis: (
        options[name].split('x')[axis] if name in options else default)
    products *= _valid(
        size(operands[0], lhs, str(axis)), int(length),
        size(result, out, str(axis)), int(option('stride', 1)),
        int(option('pad', '0_0').split('_')[0]),
        int(option('lhs_dilate', 1)), int(option('rhs_dilate', 1)))
  return 2.0 * products


@functools.cache
def _valid(
    size: int, window: int, outputs: int, stride: int, pad: int,
    dilation: int, window_dilation: int,
) -> int:
  """Pairs of output and window position that meet an entry, no padding."""
  found = 0
  starts = np.arange(outputs) * stride - pad
  for position in range(window):
    at = starts + position * window_dilation
    found += np.count_nonzero(
        (at >= 0) & (at % dilation == 0) & (at // dilation < size))
  return int(found)


def _kernel_flops(instruction: Instruction, operands: list[Shape]) -> float:
  """Of splash attention, causal: the blocks that it visits, whole.

  A product of a block is 2 Bq Bk H. Forward there are two of them (scores,
  values), three for dq (scores again, dp, dq), four for dk and dv (scores, dp,
  dv, dk). Of n x n blocks those up to the diagonal are visited; packed segments
  spare none of them. Other kernels: 0.
  """
  kind = re.match(r'splash_m[hq]a_(fwd|dq|dkv)', instruction.name)
  sizes = re.search(
      r'xprof_metadata":"(\{.*?\})"', instruction.attributes)
  if not kind or not sizes:
    return 0.0
  sizes = json.loads(sizes.group(1).replace('\\', ''))
  kind = kind.group(1)
  suffix = '' if kind == 'fwd' else f'_{kind}'
  block_q, block_kv = sizes[f'block_q{suffix}'], sizes[f'block_kv{suffix}']
  q = next(x for x in operands if len(x.dims) >= 3 and 'f' in x.dtype)
  *heads, length, dim = q.dims
  blocks = sum(
      -(-min((row + 1) * block_q, length) // block_kv)
      for row in range(-(-length // block_q)))
  products = {'fwd': 2, 'dq': 3, 'dkv': 4}[kind]
  return 2.0 * math.prod(heads) * products * blocks * block_q * block_kv * dim


# -- bytes -------------------------------------------------------------------


class _Reader:
  """Costs of computations, each computed once."""

  def __init__(self, program: hlo.Program, passes: int | None):
    self._program = program
    self._passes = passes
    self._known: dict[str, Cost] = {}

  def of(self, name: str) -> Cost:
    """The cost of a computation that is not a fusion's."""
    if name not in self._known:
      total = Cost()
      channels: set[str] = set()
      computation = self._program.computations[name]
      for instruction in computation.values():
        total.add(self._one(computation, instruction, channels))
      self._known[name] = total
    return self._known[name]

  def _one(self, computation, instruction, channels) -> Cost:
    found, opcode = Cost(), instruction.opcode
    operands = [computation[name] for name in instruction.operands]
    if opcode == 'while':
      body = instruction.attribute(r'body=%?([\w.\-]+)')
      condition = instruction.attribute(r'condition=%?([\w.\-]+)')
      trips = self._trips(computation, instruction)
      found.add(self.of(body), trips)
      found.add(self.of(condition), trips)
    elif opcode == 'conditional':
      branches = instruction.attribute(r'branch_computations=\{([^}]*)\}')
      for branch in re.findall(r'[\w.\-]+', branches) if branches else (
          instruction.attribute(r'true_computation=%?([\w.\-]+)'),
          instruction.attribute(r'false_computation=%?([\w.\-]+)')):
        found.raise_to(self.of(branch))
    elif opcode in ('call', 'async-start'):
      found.add(self.of(instruction.called))
    elif not opcode.endswith(('-done', '-update')) and opcode not in _FREE:
      self._compute(found, computation, instruction, channels)
      self._move(found, instruction, operands)
      cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
      found.cycles += float(cycles or 0)
    return found

  def _trips(self, computation, loop) -> int:
    trips = self._program.trips(computation, loop)
    if trips is None and self._passes is None:
      name = loop.attribute(r'op_name="([^"]*)"') or loop.name
      raise ValueError(
          f'the trips of the loop {name} depend on data: say how many are '
          'meant.')
    return self._passes if trips is None else trips

  def _compute(self, found, computation, instruction, channels, fused=False):
    """Adds FLOPs, kernels and what is sent, inside of fusions too."""
    opcode = instruction.opcode
    shapes = [
        shape for name in instruction.operands
        for shape in computation[name].shapes]
    if opcode == 'dot':
      found.flops += _dot_flops(instruction, shapes)
    elif opcode == 'convolution':
      found.flops += _convolution_flops(instruction, shapes)
    elif opcode == 'custom-call' and instruction.target == 'tpu_custom_call':
      name = re.sub(r'(\.(clone|\d+))+$', '', instruction.name)
      found.kernels[name] = found.kernels.get(name, 0.0) + 1
      found.kernel_flops += _kernel_flops(instruction, shapes)
    elif opcode == 'fusion':
      inner = self._program.computations[instruction.called]
      for one in inner.values():
        self._compute(found, inner, one, channels, True)
    kind = opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      # Started, carried along by other fusions and finished, an asynchronous
      # one is in as many computations.
      channel = instruction.attribute(r'channel_id=(\d+)')
      if not fused or channel not in channels:
        found.collectives[kind] = found.collectives.get(kind, 0.0) + _sent(
            kind, instruction, shapes)
      if fused and channel:
        channels.add(channel)

  def _move(self, found, instruction, operands):
    """Adds the traffic of an instruction that is not inside a fusion."""
    if instruction.opcode == 'custom-call' and instruction.target in (
        'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound'):
      return
    spaces = {shape.space for x in operands for shape in x.shapes}
    if instruction.opcode in ('copy-start', 'slice-start', 'copy'):
      # (destination, source, context), ((source), destination, context)
      shapes = instruction.shapes
      moved = shapes[1 if instruction.opcode == 'slice-start' else 0]
      spaces = [moved.space, operands[0].shapes[0].space]
      found.bytes += moved.bytes * spaces.count(hlo.HBM)
      if hlo.HOST in spaces:
        found.host_bytes += moved.bytes
      return
    found.bytes += self._written(instruction, operands)
    for number, operand in enumerate(operands):
      for shape in operand.shapes:
        if shape.space == hlo.HBM:
          found.bytes += self._read(instruction, number, operand, shape)

  def _asynchronous(self, x) -> str:
    """start or done, of the fusions that begin and end a collective."""
    if x.opcode == 'fusion':
      x = self._program.computations[x.called].root
    return (x.target or '').removeprefix('AsyncCollective').lower()

  def _read(self, user, number, operand, shape) -> float:
    """Bytes of an operand that an instruction reads."""
    opcode, part = user.opcode, self._asynchronous(user)
    if part in ('start', 'done'):
      return shape.bytes if part == 'start' else 0.0
    if opcode in ('dynamic-slice', 'gather', 'slice') and number == 0:
      return min(shape.bytes, user.shapes[0].bytes)
    if opcode in ('dynamic-update-slice', 'scatter') and number == 0:
      return 0.0
    if opcode == 'fusion' and len(operand.shapes) == 1:
      inner = self._program.computations[user.called]
      return min(shape.bytes, self._touched(inner, inner.parameters[number]))
    return shape.bytes

  def _touched(self, computation, name) -> float:
    """Bytes of a fusion's parameter that the fusion reads; inf: all."""
    total = 0.0
    for user in computation.users[name]:
      numbers = [i for i, x in enumerate(user.operands) if x == name]
      if user.opcode in ('bitcast', 'reshape'):
        total += self._touched(computation, user.name)
      elif user.opcode == 'fusion':
        inner = self._program.computations[user.called]
        total += sum(
            self._touched(inner, inner.parameters[i]) for i in numbers)
      elif user.opcode == 'tuple' or user.opcode in COLLECTIVES or (
          user.target or '').startswith('AsyncCollective'):
        continue  # carried along
      elif user.opcode in (
          'dynamic-slice', 'gather', 'slice', 'dynamic-update-slice',
          'scatter') and numbers == [0]:
        total += self._read(user, 0, computation[name], computation[name]
                            .shapes[0])
      else:
        return math.inf
    return total

  def _written(self, instruction, operands) -> float:
    """Bytes that an instruction writes to HBM."""
    opcode, shapes = instruction.opcode, instruction.shapes
    whole = sum(x.bytes for x in shapes if x.space == hlo.HBM)
    part = self._asynchronous(instruction)
    if part == 'done':
      return 0.0
    if part == 'start' or opcode.endswith('-start'):
      # ((operands), results, ...)
      of_operands = sum(len(x.shapes) for x in operands)
      return sum(
          x.bytes for x in shapes[of_operands:2 * of_operands] or shapes
          if x.space == hlo.HBM)
    if opcode == 'dynamic-update-slice':
      return min(whole, operands[1].shapes[0].bytes)
    if opcode == 'scatter':
      # Read, added to, written.
      return min(whole, 2 * operands[-1].shapes[0].bytes)
    if opcode != 'fusion':
      return whole
    inner = self._program.computations[instruction.called]
    root = inner.root
    parts = [root]
    if root.opcode == 'tuple':
      parts = [inner[name] for name in root.operands]
    if len(parts) != len(shapes):
      return whole
    return sum(
        min(shape.bytes, self._result(inner, part))
        for part, shape in zip(parts, shapes) if shape.space == hlo.HBM)

  def _result(self, computation, part) -> float:
    """Bytes of a fusion's result that the fusion writes; inf: all."""
    while part.opcode in ('bitcast', 'reshape'):
      part = computation[part.operands[0]]
    if part.opcode == 'fusion' and len(part.shapes) == 1:
      inner = self._program.computations[part.called]
      return self._result(inner, inner.root)
    if part.opcode == 'parameter' or (
        part.target or '').startswith('AsyncCollective'):
      return 0.0
    if part.opcode == 'dynamic-update-slice':
      return computation[part.operands[1]].shapes[0].bytes
    if part.opcode == 'scatter':
      return 2 * computation[part.operands[-1]].shapes[0].bytes
    return math.inf


def _sent(kind: str, instruction: Instruction, operands: list[Shape]) -> float:
  """Bytes that a device sends if the devices of a group form a ring."""
  size = _group(instruction)
  whole = sum(x.elements * hlo.bits(x.dtype) / 8 for x in operands)
  if kind == 'collective-permute':
    return whole
  if kind == 'all-gather':
    return whole * (size - 1)
  share = (size - 1) / size
  return whole * share * (2 if kind == 'all-reduce' else 1)


def _group(instruction: Instruction) -> int:
  """Devices of one of a collective's groups."""
  groups = instruction.attributes.partition('replica_groups=')[2]
  listed = re.match(r'\{\{([\d,]*)\}', groups)
  if listed:
    return len(listed.group(1).split(','))
  counted = re.match(r'\[\d+,(\d+)\]<=', groups)
  if counted:
    return int(counted.group(1))
  named = re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", groups)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
    return math.prod(
        int(part or sizes[axis]) for axis, part in re.findall(
            r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2)))
  return 1
