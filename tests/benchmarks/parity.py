"""A real checkpoint, here and in transformers: logits, continuations, bfloat16.

    python -m tests.benchmarks.parity --model=FOLDER

Needs torch (tests/requirements-parity.txt). Prints, for one text of real
passages:

  * float32: the largest distance of a logit from torch's in float64, ours and
    torch-float32's own;
  * whether greedy continuations, ours by prefill and cached decoding, agree;
  * bfloat16: KL of the next-token distributions, from transformers' bfloat16 to
    ours, and of both from float64.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch import sharding
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.models import hf
from stepsearch.models import qwen
from stepsearch.rl import losses
from stepsearch.rollout import sampler as sampler_lib

_ROOT = pathlib.Path(__file__).parents[2]
_CORPUS = _ROOT.parent / 'shared/data/musique/corpus.jsonl'


def passages(count: int, first: int = 0) -> str:
  """Real text: passages of MuSiQue, or the README where they are absent."""
  if not _CORPUS.exists():
    return (_ROOT / 'README.md').read_text()
  with _CORPUS.open(encoding='utf-8') as lines:
    rows = [json.loads(line) for _, line in zip(range(first + count), lines)]
  return '\n\n'.join(f'{row["title"]}\n{row["text"]}' for row in rows[first:])


def ours(folder: str, tokens: np.ndarray, dtype: str) -> np.ndarray:
  """Logits [T, V] float32 of one row."""
  config, params = hf.load(folder, dtype=dtype)
  config = config.__class__(**vars(config) | {'dtype': dtype})

  @jax.jit
  def run(params, tokens):
    hidden, _ = qwen.Qwen(config).apply(
        {'params': params}, tokens[None], jnp.arange(tokens.shape[0])[None])
    return jnp.einsum(
        'td,dv->tv', hidden[0], qwen.unembedding(params).astype(hidden.dtype),
        preferred_element_type=jnp.float32)

  return np.asarray(run(params, jnp.asarray(tokens)))


def theirs(folder: str, tokens: np.ndarray, dtype: str) -> np.ndarray:
  """Logits [T, V] of one row by transformers, in float64 if dtype is that."""
  import torch

  model = _torch(folder, dtype)
  with torch.no_grad():
    logits = model(torch.tensor(tokens[None])).logits[0]
  return (logits if dtype == 'float64' else logits.float()).numpy()


def sampled(
    config: qwen.Config, params: Any, tokens: np.ndarray, count: int,
    rows: int, *, greedy: bool = False,
) -> sampler_lib.Chunk:
  """So many tokens that rows with the same prompt go on with; none stops."""
  sampler = sampler_lib.Sampler(
      model=config, layout=sharding.Layout(
          sharding.make_mesh((1, 1, 1), jax.devices()[:1])),
      slots=rows, eos_ids=(-1,))
  params = sampler.weights(params)
  slots = np.arange(rows, dtype=np.int32)
  filled = lambda value: np.full_like(slots, value)
  state = sampler.start(
      params, sampler.empty(len(tokens) + count), sampler_lib.Rows(
          slot=slots, active=filled(1) > 0, tokens=np.tile(tokens, (rows, 1)),
          count=filled(len(tokens)), budget=filled(count), episode=slots,
          shared=filled(0)), None)
  table = jnp.zeros((1, config.vocab_size), jnp.int8)
  _, chunk = sampler.decode(
      params, state, table, jax.random.key(0), 1.0, count, greedy=greedy)
  return jax.device_get(chunk)


def our_continuation(folder: str, tokens: np.ndarray, count: int) -> list[int]:
  """Greedy tokens by the sampler of the rollout: prefill, then its cache."""
  config, params = hf.load(folder)
  return sampled(config, params, tokens, count, 1, greedy=True).tokens[
      0].tolist()


def their_continuation(
    folder: str, tokens: np.ndarray, count: int
) -> list[int]:
  """Greedy tokens by transformers' generate."""
  import torch

  model = _torch(folder, 'float32')
  row = torch.tensor(tokens[None])
  found = model.generate(
      row, attention_mask=torch.ones_like(row), do_sample=False,
      max_new_tokens=count, min_new_tokens=count, repetition_penalty=1.0,
      temperature=None, top_p=None, top_k=None)
  return found[0, len(tokens):].tolist()


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """KL(p || q) [T] in nats, from logits [T, V]."""
  total = []
  for x, y in zip(p, q):  # row by row: the vocabulary is large
    x, y = (
        z - z.max() - np.log(np.exp(z - z.max()).sum())
        for z in (x.astype(np.float64), y.astype(np.float64)))
    total.append(np.sum(np.exp(x) * (x - y)))
  return np.asarray(total)


def recorded_and_recomputed(
    folder: str, tokens: np.ndarray, count: int, dtype: str
) -> np.ndarray:
  """Differences of log-probs, sampled against recomputed, in nats [n]."""
  config, params = hf.load(folder)
  config = config.__class__(**vars(config) | {'dtype': dtype})
  chunk = sampled(config, params, tokens, count, 4)
  tokens = np.concatenate(
      [np.tile(tokens, (len(chunk.tokens), 1)), chunk.tokens], axis=1)

  @jax.jit
  def again(params, tokens):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = qwen.Qwen(config).apply({'params': params}, tokens, at)
    return losses.token_logprobs(
        hidden[:, :-1], qwen.unembedding(params), tokens[:, 1:], 1.0, 64)[0]

  found = np.asarray(again(params, jnp.asarray(tokens)))[:, -count:]
  return (found - chunk.logprobs).ravel()


def _torch(folder, dtype):
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=getattr(torch, dtype)).eval()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True)
  parser.add_argument('--tokens', type=int, default=256)
  parser.add_argument('--generate', type=int, default=64)
  flags = parser.parse_args()
  folder = flags.model
  ids = tokenizer_lib.load(folder).encode(passages(8))[:flags.tokens]
  tokens = np.asarray(ids, np.int32)
  print(f'{folder}: {len(tokens)} tokens of real text', flush=True)

  def timed(function, *arguments):
    start = time.perf_counter()
    found = function(*arguments)
    gc.collect()
    print(f'  {function.__name__}{arguments[2:]}: '
          f'{time.perf_counter() - start:.1f} s with loading', flush=True)
    return found

  exact = timed(theirs, folder, tokens, 'float64')
  torch32 = timed(theirs, folder, tokens, 'float32')
  ours32 = timed(ours, folder, tokens, 'float32')
  distance = lambda x: float(np.abs(x - exact).max())
  print(f'float32, max |logit - float64|: ours {distance(ours32):.2e}, '
        f'torch {distance(torch32):.2e}, ratio '
        f'{distance(ours32) / distance(torch32):.2f}', flush=True)
  torch16 = timed(theirs, folder, tokens, 'bfloat16')
  ours16 = timed(ours, folder, tokens, 'bfloat16')
  for name, p, q in (
      ('transformers bfloat16 || ours bfloat16', torch16, ours16),
      ('float64 || ours bfloat16', exact, ours16),
      ('float64 || transformers bfloat16', exact, torch16),
      ('float64 || ours float32', exact, ours32)):
    kl = divergence(p, q)
    print(f'KL({name}): mean {kl.mean():.2e}, largest {kl.max():.2e} nats')
  if flags.generate:
    start = tokens[:64]
    a = timed(our_continuation, folder, start, flags.generate)
    b = timed(their_continuation, folder, start, flags.generate)
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b)) if x != y), flags.generate)
    print(f'greedy continuation: {same} of {flags.generate} tokens identical')
    for dtype in ('float32', 'bfloat16'):
      found = np.abs(timed(
          recorded_and_recomputed, folder, start, flags.generate, dtype))
      print(f'recorded against recomputed log-probs, {dtype}: mean '
            f'{found.mean():.1e}, 99 % {np.quantile(found, .99):.1e}, largest '
            f'{found.max():.1e} nats over {found.size} tokens', flush=True)


if __name__ == '__main__':
  main()
