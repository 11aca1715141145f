"""Host memory of loading a model.

    python -m tests.benchmarks.loading --model=FOLDER

On a CPU the device arrays lie in host memory too; what is left of the peak
resident memory without them, and without what the process held before, is what
streaming costs. The bound is 1.3 times the largest file.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import threading
import time

import jax
import jax.numpy as jnp

from stepsearch import assembly
from stepsearch.models import hf


def resident() -> int:
  """Bytes of this process in memory."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize()


def measure(path: str) -> dict[str, float]:
  """Loads the folder; bytes and seconds."""
  assembly.tune_host()
  jax.block_until_ready(jnp.zeros(8) + 1)  # the runtime itself
  before, peak, done = resident(), [0], threading.Event()

  def watch():
    while not done.is_set():
      peak[0] = max(peak[0], resident())
      time.sleep(0.002)

  thread = threading.Thread(target=watch)
  thread.start()
  start = time.perf_counter()
  _, params = hf.load(path)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  done.set()
  thread.join()
  return {
      'before': before, 'peak': peak[0], 'seconds': seconds,
      'live': sum(x.nbytes for x in jax.tree.leaves(params)),
      'shard': max(
          file.stat().st_size for file in pathlib.Path(path).glob(
              '*.safetensors'))}


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True)
  found = measure(parser.parse_args().model)
  over = found['peak'] - found['before'] - found['live']
  print(f'{found["seconds"]:.1f} s; MB: device arrays '
        f'{found["live"] / 1e6:,.0f}, largest file '
        f'{found["shard"] / 1e6:,.0f}, host memory besides {over / 1e6:,.0f} = '
        f'{over / found["shard"]:.2f} x the largest file')
