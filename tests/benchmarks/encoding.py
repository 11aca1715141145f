"""What encoding a corpus costs on this machine, by two encoders.

    python -m tests.benchmarks.encoding --embedder=MINILM --corpus=P.jsonl

Takes the first passages of at least --words=100 words, to which `prepare
passages` cuts a corpus, and encodes them by the encoder of the folder and by
one of the shape of E5-base-v2 with random weights and the folder's tokenizer:
speed does not depend on the values. Rounds alternate, after one that compiles.
Last, the ratio of their speeds beside that of their arithmetic, 2 FLOPs a
weight and token and 4 a layer, coordinate and pair of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import jax
import numpy as np

from stepsearch import assembly
from stepsearch import sharding
from stepsearch.data import datasets
from stepsearch.models import encoder
from stepsearch.models import folder as folder_lib
from stepsearch.retrieval import encoders
from stepsearch.retrieval import retriever

WIKI18 = 21_015_324


def _flops(config, lengths):
  """Of texts of so many tokens, without padding."""
  weights = config.layers * (
      4 * config.embed**2 + 2 * config.embed * config.mlp)
  return float(np.sum(
      2 * weights * lengths
      + 4 * config.layers * config.embed * lengths.astype(float)**2))


def main():
  """Prints a line an encoder."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--embedder', required=True)
  parser.add_argument('--corpus', required=True)
  parser.add_argument('--words', type=int, default=100)
  parser.add_argument('--passages', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  assembly.tune_host()
  folder = folder_lib.Folder(arguments.embedder)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  large = encoders.NeuralEmbedder(
      encoder.Bert(encoders.E5_BASE),
      encoder.init(encoders.E5_BASE, jax.random.key(0)),
      encoders.read_tokenizer(folder), mesh, pooling='mean', max_length=512,
      query_prefix='query: ', passage_prefix='passage: ', digest='')
  made = {
      arguments.embedder: (
          encoders.load(arguments.embedder, mesh=mesh),
          encoder.read_config(folder)),
      'the shape of E5-base': (large, encoders.E5_BASE)}
  texts = list(itertools.islice(
      (retriever.passage_text(document)
       for document in datasets.read_corpus(arguments.corpus)
       if len(document.text.split()) >= arguments.words), arguments.passages))
  taken = {name: [] for name in made}
  for turn in range(arguments.rounds + 1):
    for name, (embedder, _) in made.items():
      wall, cpu = time.perf_counter(), time.process_time()
      embedder.embed_passages(texts)
      if turn:
        taken[name].append(
            (time.perf_counter() - wall, time.process_time() - cpu))
  tokenizer = encoders.read_tokenizer(folder)
  tokenizer.no_padding()
  lengths = np.array([len(x.ids) for x in tokenizer.encode_batch(texts)])
  print(f'{len(texts)} passages of {lengths.mean():.0f} tokens, at most '
        f'{lengths.max()}; medians of {arguments.rounds} alternating rounds')
  cpus, flops = {}, {}
  for name, (_, config) in made.items():
    wall, cpu = (statistics.median(column) for column in zip(*taken[name]))
    cpus[name], flops[name] = cpu, _flops(config, lengths)
    print(f'  {name}: {len(texts) / wall:.1f} passages/s, '
          f'{len(texts) / cpu:.1f} a CPU second, '
          f'{flops[name] / cpu / 1e9:.0f} GFLOPs a CPU second; wiki-18 '
          f'{WIKI18 * cpu / len(texts) / 3600:,.0f} CPU hours')
  small, big = made
  print(f'  CPU time {cpus[big] / cpus[small]:.1f} times as much, arithmetic '
        f'{flops[big] / flops[small]:.1f} times')


if __name__ == '__main__':
  main()
