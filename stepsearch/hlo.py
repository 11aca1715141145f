"""The text of an optimised HLO program, and how often its loops run.

    compiled.as_text() ─▶ computations ─▶ instructions with types and operands

Made for the programs of XLA's TPU and CPU backends. `costs` adds up what the
instructions cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import operator
import re

# Memory spaces of a TPU's layouts, S(n): what has none is in HBM.
HBM, HOST = 0, 5
_BITS = {
    'pred': 8, 'token': 0, 'opaque': 0, 'bf16': 16, 'c64': 64, 'c128': 128}
_MOST_TRIPS = 1 << 20
_SCALAR = {
    'add': operator.add, 'subtract': operator.sub, 'multiply': operator.mul,
    'and': operator.and_, 'or': operator.or_, 'minimum': min, 'maximum': max}


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array of a type."""

  dtype: str
  dims: tuple[int, ...]
  space: int = HBM
  padded: tuple[int, ...] = ()  # as it lies in tiles; () = as `dims`

  @property
  def elements(self) -> int:
    """Without padding."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """As it lies in memory, padding of the tiles included."""
    return math.prod(self.padded or self.dims) * bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # the arrays of its type, in order
  operands: tuple[str, ...]
  arguments: str  # between the parentheses
  attributes: str  # behind them
  root: bool

  def attribute(self, pattern: str) -> str | None:
    """The first group of `pattern`, or None."""
    found = re.search(pattern, self.attributes)
    return found and found.group(1)

  @property
  def called(self) -> str | None:
    """The computation that a fusion, call or async op stands for."""
    return self.attribute(r'(?:calls|to_apply)=%?([\w.\-]+)')

  @property
  def target(self) -> str | None:
    """Of a custom call."""
    return self.attribute(r'custom_call_target="([^"]*)"')


class Computation(dict[str, Instruction]):
  """Instructions by name, in order."""

  @functools.cached_property
  def root(self) -> Instruction:
    """What it returns."""
    return next(i for i in self.values() if i.root)

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """Names by number."""
    return {
        int(i.arguments): i.name for i in self.values()
        if i.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Of every instruction."""
    found: dict[str, list[Instruction]] = {name: [] for name in self}
    for instruction in self.values():
      for name in dict.fromkeys(instruction.operands):
        found[name].append(instruction)
    return found


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, and the name of the entry."""

  computations: dict[str, Computation]
  entry: str

  def trips(self, computation: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs its body; None: that depends on data.

    Found by running the loop, the scalars of it that its condition looks at.
    """
    start = computation[loop.operands[0]]
    body, condition = (
        self.computations[loop.attribute(rf'{part}=%?([\w.\-]+)')]
        for part in ('body', 'condition'))
    if start.opcode != 'tuple' or body.root.opcode != 'tuple':
      return None
    state: dict[int, int | None] = {}  # elements of the loop's tuple

    def carried(number):
      if number not in state:  # only ever before the first trip
        state[number] = self._scalar(
            computation, computation[start.operands[number]], None)
      return state[number]

    for trips in range(_MOST_TRIPS):
      going_on = self._scalar(condition, condition.root, carried)
      if not going_on:
        return trips if going_on is not None else None
      known = -1
      while known != len(state):  # what they are made of is carried too
        known = len(state)
        new = {
            number: self._scalar(
                body, body[body.root.operands[number]], carried)
            for number in list(state)}
      state.clear()
      state.update(new)
    return None

  def _scalar(
      self, computation: Computation, x: Instruction,
      carried: Callable[[int], int | None] | None,
      arguments: list[int | None] | None = None,
  ) -> int | None:
    """The value of a scalar integer or boolean, None where it is unknown.

    Args:
      computation: where `x` is.
      x: the instruction.
      carried: the elements of the tuple that is the only parameter, by number.
      arguments: of a fusion's parameters.
    """
    again = lambda name: self._scalar(
        computation, computation[name], carried, arguments)
    opcode = x.opcode
    if opcode == 'constant':
      number = {'true': '1', 'false': '0'}.get(x.arguments, x.arguments)
      return int(number) if re.fullmatch(r'-?\d+', number) else None
    if opcode == 'parameter' and arguments is not None:
      return arguments[int(x.arguments)]
    if opcode == 'get-tuple-element':
      source = computation[x.operands[0]]
      number = int(x.attribute(r'index=(\d+)'))
      if source.opcode == 'parameter' and carried is not None:
        return carried(number)
      if source.opcode == 'tuple':
        return again(source.operands[number])
      return None
    if opcode in ('copy', 'bitcast', 'reshape', 'convert', 'copy-start',
                  'copy-done'):
      return again(x.operands[0])
    if opcode in ('fusion', 'call'):
      inner = self.computations[x.called]
      return self._scalar(
          inner, inner.root, None, [again(name) for name in x.operands])
    if opcode == 'compare':
      function = getattr(operator, x.attribute(r'direction=(\w+)').lower())
    elif opcode in _SCALAR:
      function = _SCALAR[opcode]
    else:
      return None
    values = [again(name) for name in x.operands]
    return None if None in values else int(function(*values))


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`."""
  computations, entry, lines = {}, '', []
  current = None

  def finish():
    if lines:
      instruction = _instruction('\n'.join(lines))
      current[instruction.name] = instruction
    lines.clear()

  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if header:
      current = computations[header.group(2)] = Computation()
      if header.group(1):
        entry = header.group(2)
    elif current is None:
      continue
    elif line == '}':
      finish()
      current = None
    elif re.match(r'  (ROOT )?%[\w.\-]+ = ', line):
      finish()
      lines.append(line)
    elif lines:  # metadata of kernels goes over several lines
      lines.append(line)
  return Program(computations, entry)


def _instruction(text: str) -> Instruction:
  head = re.match(r'  (ROOT )?%([\w.\-]+) = ', text)
  rest = text[head.end():]
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode = re.match(r'[\w\-]+', rest).group()
  end = _closing(rest, len(opcode))
  arguments, attributes = rest[len(opcode) + 1:end - 1], rest[end:]
  return Instruction(
      name=head.group(2), opcode=opcode, shapes=tuple(_shapes(kind)),
      operands=tuple(re.findall(r'%([\w.\-]+)', arguments)),
      arguments=arguments, attributes=attributes, root=bool(head.group(1)))


def _closing(text: str, start: int) -> int:
  """Index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i + 1
  raise AssertionError(f'unbalanced: {text[:80]}')


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in re.findall(
      r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?', text):
    dims = tuple(int(d.lstrip('<=')) for d in dims.split(',') if d)
    order, _, rest = layout.partition(':')
    space = re.search(r'(?<![A-Z])S\((\d+)\)', rest)
    tile = re.search(r'T\(([\d,]+)\)', rest)
    padded = list(dims)
    if tile:  # the minor dimensions are rounded up to whole tiles
      order = [int(d) for d in order.split(',') if d]
      sizes = [int(d) for d in tile.group(1).split(',')]
      for axis, size in zip(order, reversed(sizes)):
        padded[axis] = -(-dims[axis] // size) * size
    yield Shape(
        dtype, dims, int(space.group(1)) if space else HBM, tuple(padded))


def bits(dtype: str) -> int:
  """Of one element."""
  if dtype in _BITS:
    return _BITS[dtype]
  return int(re.match(r'[a-z]+(\d+)', dtype).group(1))  # f32, s8, f8e4m3fn, ...
