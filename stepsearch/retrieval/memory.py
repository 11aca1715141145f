"""What an index takes, before it is built: memory a process, bytes on disk.

Of ScaNN 1.4's own layouts, n vectors of d coordinates, b bytes each in the copy
that candidates are scored with (`reorder_dtype`), L leaves:

    memory   exact     4 d n
             hashed   (b d + d/2 + d/4) n      codes of 4 bits, a byte each
             tree     (b d + d/4 + 4) n + 16 d L      and packed; in leaves
    disk     exact     4 d n                                      packed only
             hashed   (4 d + d/2) n  [+ b d n, where b < 4]
             tree      that, + 4 n + 4 d L

with codes of two coordinates each. What numpy searches is mapped: as many bytes
as `exact`, but the system's, once a machine. Building a tree takes three times
the vectors for a moment, hashing them twice. Passages take 24 bytes each
(`stepsearch.passages`) and their texts what the system spares as cache.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from stepsearch.retrieval import index as indexing

_BYTES = {'float32': 4, 'bfloat16': 2, 'int8': 1}
_PASSAGE = 24
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes that an index takes."""

  memory: int  # of each process that searches it
  disk: int


def footprint(
    size: int, dimensions: int, regime: str, reorder_dtype: str = 'float32',
    num_leaves: int | None = None,
) -> Footprint:
  """Memory and disk of one index, as the module's equations have it.

  Args:
    size: vectors.
    dimensions: of each.
    regime: exact | hashed | tree, as of `index.build`.
    reorder_dtype: as of `index.build`.
    num_leaves: as of `index.build`.
  """
  vectors = 4 * dimensions * size
  if regime == 'exact':
    return Footprint(vectors, vectors)
  copy = _BYTES[reorder_dtype] * dimensions * size
  codes = dimensions * size // 2
  disk = vectors + codes + (copy if copy < vectors else 0)
  if regime == 'hashed':
    return Footprint(copy + codes + codes // 2, disk)
  leaves = num_leaves or indexing.default_leaves(size)
  return Footprint(
      copy + codes // 2 + 4 * size + 16 * dimensions * leaves,
      disk + 4 * size + 4 * dimensions * leaves)


def table(
    size: int, dimensions: int, processes: Sequence[int] = (4, 8, 16)
) -> str:
  """Markdown: GiB a process for every kind of index and placement."""
  head = ['GiB a process', 'replicated', *(f'1/{p}' for p in processes),
          'remote', 'on disk']
  lines = [head, ['---'] * len(head)]
  for regime, dtype in (
      ('exact', 'float32'),
      *((regime, dtype) for regime in ('hashed', 'tree') for dtype in _BYTES)):
    whole = footprint(size, dimensions, regime, dtype)
    parts = [
        footprint(-(-size // p), dimensions, regime, dtype).memory
        for p in processes]
    lines.append([
        f'{regime}, {dtype}', _gib(whole.memory), *map(_gib, parts), '0',
        _gib(whole.disk)])
  lines.append(
      ['passages', *[_gib(_PASSAGE * size)] * (1 + len(processes)), '0',
       'their file'])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _gib(count: int) -> str:
  return f'{count / _GIB:.1f}'
