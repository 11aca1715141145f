"""What an index is said to take against what the system counts."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepsearch import build_index
from stepsearch.retrieval import index
from stepsearch.retrieval import memory

_ROOT = pathlib.Path(__file__).parents[1]
_N, _D = 20_000, 128

# Prints the private memory that loading each folder adds.
_LOAD = """
import ctypes, json, sys
from stepsearch.retrieval import index

def private():
  ctypes.CDLL(None).malloc_trim(0)
  with open('/proc/self/status') as file:
    return next(int(l.split()[1]) * 1024 for l in file if 'RssAnon' in l)

index.load(sys.argv[1], {}, backend='scann')
kept, added = [], []
for folder in sys.argv[1:]:
  before = private()
  kept.append(index.load(folder, {}, backend=folder.rpartition('-')[2]))
  kept[-1].vectors.max()  # mapped: not this process' own
  added.append(private() - before)
print(json.dumps(added))
"""


def test_memory_and_disk_of_real_indexes(tmp_path):
  if not (pathlib.Path('/proc/self/status').exists()
          and index._scann('auto')):
    pytest.skip('needs ScaNN and /proc')
  vectors = np.random.default_rng(0).normal(size=(_N, _D)).astype(np.float32)
  kinds = {
      'exact': ('exact', 'float32'), 'hashed': ('hashed', 'float32'),
      'hashed8': ('hashed', 'int8'), 'tree16': ('tree', 'bfloat16')}
  for name, (regime, dtype) in kinds.items():
    built = index.build(
        vectors, exact_below=_N if regime == 'exact' else 0,
        tree_above=0 if regime == 'tree' else _N, reorder_dtype=dtype,
        training_sample_size=2000)
    assert built.parameters['regime'] == regime
    folder = tmp_path / f'{name}-scann'
    folder.mkdir()
    built.save(folder, {})
    expected = memory.footprint(_N, _D, regime, dtype)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size == pytest.approx(expected.disk, rel=0.02), name
  os.symlink(tmp_path / 'exact-scann', tmp_path / 'mapped-exact')
  done = subprocess.run(
      [sys.executable, '-c', _LOAD,
       *(str(tmp_path / f'{name}-scann') for name in kinds),
       str(tmp_path / 'mapped-exact')],
      env=os.environ | {'PYTHONPATH': str(_ROOT)}, capture_output=True,
      text=True, check=True)
  *added, mapped = json.loads(done.stdout)
  for kind, found in zip(kinds.values(), added):
    expected = memory.footprint(_N, _D, *kind).memory
    assert found == pytest.approx(expected, rel=0.1, abs=2**19), kind
  assert mapped < 2**19


def test_wiki_18():
  """By hand, for 21,015,324 vectors of 768: GB."""
  table = memory.table(21_015_324, 768, processes=(16,))
  rows = {
      cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
      for cells in (line.split('|') for line in table.splitlines())}
  assert rows['exact, float32'] == ['60.1', '3.8', '0', '60.1']
  # 768 + 384 + 192 bytes; with 3,072 + 384 of the file.
  assert rows['hashed, int8'] == ['26.3', '1.6', '0', '82.7']
  # 1,536 + 192 + 4 bytes, and 4,584 leaves.
  assert rows['tree, bfloat16'] == ['34.0', '2.1', '0', '97.8']
  assert rows['passages'] == ['0.5', '0.5', '0', 'their file']


def test_the_command(capsys, tmp_path):
  build_index._main('100000x64', '0/1')
  assert memory.table(100_000, 64) == capsys.readouterr().out.strip()
  arguments = dict(corpus='c', output=str(tmp_path))
  for flags, words in (
      (('21M', '0/1'), '--estimate=21M'), ((None, '2/2'), '--shard=2/2'),
      ((None, '1'), '--shard=1')):
    with pytest.raises(ValueError, match=words):
      build_index._main(*flags, **arguments)
  with pytest.raises(ValueError, match='--output is missing'):
    build_index._main(None, '0/1', corpus='c', output=None)
