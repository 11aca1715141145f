"""The rollout against other ways to do the same, on one core.

    python -m tests.benchmarks.rollout --workdir=runs/tiny \
        --tunix_python=… --hf_python=…

Rates by CPU time of the process, medians of alternating rounds:

  * a finished tiny run's own questions, and episodes of which one in ten is
    long, against the loop that was there before, in which all wait for the
    slowest (tests/lockstep.py), and against today's, given no more than a batch
    at a time: the first also has the slower sampler, the second tells what
    refilling the slots does by itself;
  * one cache through all turns, against prefilling the context at every turn;
  * the samplers of Tunix and transformers, from the scripts in --peers, each in
    an environment of its own;
  * an agentic loop, against the rate that was once measured of Tunix's.

`of matmul` is what the model has to compute, by what the core's float32 matrix
product does in that time; the last column says which calls take it.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

# Before numpy and jax start their threads; subprocesses inherit it.
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
os.environ.update(
    JAX_PLATFORMS='cpu', PYTHONWARNINGS='ignore', TF_CPP_MIN_LOG_LEVEL='3',
    OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='0')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from stepsearch import assembly  # noqa: E402
from stepsearch import checkpoints  # noqa: E402
from stepsearch import config as config_lib  # noqa: E402
from stepsearch import protocol as protocol_lib  # noqa: E402
from stepsearch import sharding  # noqa: E402
from stepsearch import tokenizer as tokenizer_lib  # noqa: E402
from stepsearch import types  # noqa: E402
from stepsearch.models import qwen  # noqa: E402
from stepsearch.rollout import collect  # noqa: E402
from stepsearch.rollout import sampler as sampler_lib  # noqa: E402
from tests import lockstep  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[2]
_PEERS = _ROOT.parent / 'shared/peers'
# The shape of the scripts in --peers.
_SHAPE = qwen.Config(
    vocab_size=2048, embed=256, layers=4, heads=4, kv_heads=2, head_dim=64,
    mlp=704)
_TINY = qwen.Config(
    vocab_size=512, embed=96, layers=3, heads=4, kv_heads=2, head_dim=24,
    mlp=192, rope_theta=1e4, attention_bias=False, qk_norm=True)
# Tunix's agentic loop, which no package has: repository head c7d8950f, the same
# shape, 16 questions of 3 turns, 48 calls of its sampler, 54 programs compiled
# meanwhile: the first call is the like of it.
_TUNIX_LOOP = 13.5  # new tokens per CPU second
_TURNS, _WRITTEN = 3, 22
_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table; rates are per CPU second."""

  work: str
  unit: str
  against: str
  theirs: float | None
  ours: float
  used: float | None  # share of the slots' steps
  matmul: float  # share of the core's rate
  where: str

  def __str__(self):
    theirs = ratio = used = '-'
    if self.theirs is not None:
      theirs, ratio = f'{self.theirs:,.1f}', f'{self.ours / self.theirs:.2f}x'
    if self.used is not None:
      used = f'{self.used:.2f}'
    return _LINE.format(
        self.work, self.unit, self.against, theirs, f'{self.ours:,.1f}', ratio,
        used, f'{self.matmul:.1%}', self.where)


_LINE = '{:30} {:8} {:26} {:>8} {:>9} {:>8} {:>5} {:>9}  {}'
_HEADER = _LINE.format(
    'work', 'per s', 'against', 'theirs', 'ours', 'ratio', 'used', 'of matmul',
    'where ours goes')


# ── Measuring ────────────────────────────────────────────────────────────────


def cpu_seconds(run: Callable[[], Any]) -> float:
  """CPU seconds of this process."""
  start = time.process_time()
  run()
  return time.process_time() - start


def alternate(
    arms: dict[str, Callable[[], Any]], rounds: int,
    peers: dict[str, Callable[[], float]] | None = None,
) -> tuple[dict[str, float], float]:
  """Runs all arms in every round.

  Args:
    arms: called once more at first, to compile.
    rounds: at least one.
    peers: arms of other processes, which return their CPU seconds.

  Returns:
    median CPU seconds of each arm, and FLOP per second of a matrix product.
  """
  x = jnp.ones((_SIDE, _SIDE), jnp.float32)
  arms = arms | {'matmul': lambda: jnp.dot(x, x).block_until_ready()}
  for run in arms.values():
    run()
  seconds = collections.defaultdict(list)
  for _ in range(rounds):
    for name, run in arms.items():
      seconds[name].append(cpu_seconds(run))
    for name, run in (peers or {}).items():
      seconds[name].append(run())
  medians = {name: statistics.median(x) for name, x in seconds.items()}
  return medians, 2 * _SIDE**3 / medians['matmul']


def flops(model: qwen.Config, lengths: Any, decoded: float) -> float:
  """What rows of these lengths need; padding is not counted.

  Every token goes through the matrices of all layers, two operations a weight,
  and attends to those up to itself, two products of N heads; what is sampled
  also goes through the output matrix.
  """
  shapes = jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))
  matrices = sum(x.size for x in jax.tree.leaves(shapes['layers']))
  lengths = np.asarray(lengths, np.float64)
  context = np.sum(lengths * (lengths + 1) / 2)
  return (2 * matrices * lengths.sum()
          + 2 * model.vocab_size * model.embed * decoded
          + 4 * model.heads * model.head_dim * model.layers * context)


def where(run: Callable[[], Any]) -> str:
  """Shares of the sampler's calls in a run that waits for each of them."""
  spent = collections.Counter()

  def timed(name, method):
    def call(*args, **kwargs):
      start = time.process_time()
      found = jax.block_until_ready(method(*args, **kwargs))
      spent[name] += time.process_time() - start
      return found
    return call

  kind = sampler_lib.Sampler
  with contextlib.ExitStack() as stack:
    for name in ('weights', 'empty', 'grow', 'shrink', 'prefix', 'start',
                 'fork', 'append', 'decode'):
      stack.enter_context(
          mock.patch.object(kind, name, timed(name, getattr(kind, name))))
    total = cpu_seconds(run)
  spent['host'] = total - spent.total()
  return ', '.join(
      f'{name} {x / total:.0%}' for name, x in spent.most_common()
      if x / total >= 0.005)


# ── Whole episodes ───────────────────────────────────────────────────────────


def weights(model: qwen.Config) -> Any:
  """Random parameters, made without compiling anything."""
  rng = np.random.default_rng(0)

  def leaf(path, x):
    drawn = rng.normal(0, model.embed**-0.5, x.shape)
    return jnp.asarray(drawn + (path[-1].key == 'scale'), jnp.float32)

  return jax.tree_util.tree_map_with_path(
      leaf, jax.eval_shape(lambda: qwen.init(model, jax.random.key(0))))


def counting(
    vocab_size: int, length: int, code: int, endless: int = 0
) -> jax.Array:
  """A stop table that ends a turn with `code` after `length` tokens, >= 2.

  A turn whose first token is below `endless` never stops.
  """
  # States: start, the two codes, endless, then one for each token so far.
  following = np.arange(length + 3) + 1
  following[:4] = 4, 1, 2, 3
  following[-1] = code
  table = np.repeat(following[:, None], vocab_size, axis=1)
  table[0, :endless] = 3
  return jnp.asarray(table, jnp.int32)


def vocabulary(size: int) -> tuple[tokenizer_lib.Tokenizer, list[str]]:
  """A tokenizer of so many tokens, none of which ends a turn, and its words."""
  fixed = tokenizer_lib.from_words(
      protocol_lib.SHORT_WORDS, protocol_lib.TAGS).vocab_size
  words = [f'w{i}' for i in range(size - fixed)]
  tokenizer = tokenizer_lib.from_words(
      [*protocol_lib.SHORT_WORDS, *words], protocol_lib.TAGS)
  tokenizer.eos_ids = ()
  return tokenizer, words


def texts(words: list[str], count: int, length: int) -> list[str]:
  """Random ones of so many words."""
  rng = np.random.default_rng(0)
  return [' '.join(rng.choice(words, length)) for _ in range(count)]


def ask(questions: list[str]) -> list[types.Example]:
  """Examples, for their questions only."""
  return [types.Example(str(i), q, ('',)) for i, q in enumerate(questions)]


def episodes(
    work, model, params, plain, collector, examples, rounds
) -> list[Row]:
  """Batches as large as the slots, in two ways, against the collector."""
  key, batch = jax.random.key(0), collector.config.slots
  found = {}

  def in_lockstep():
    parts = [
        plain(params, examples[i:i + batch], key, first_episode=i)[0]
        for i in range(0, len(examples), batch)]
    found['lockstep'] = np.concatenate(
        [np.asarray(part.loss_mask.sum(axis=1)) for part in parts])

  def batched():
    for i in range(0, len(examples), batch):
      collector(params, examples[i:i + batch], key, first_episode=i)

  def collected():
    found['slots'] = jax.device_get(collector(params, examples, key)[0])

  seconds, rate = alternate(
      {'lockstep': in_lockstep, 'batches': batched, 'slots': collected}, rounds)
  trajectory = found['slots']
  # Rounding may turn a token over, but no more.
  same = found['lockstep'] == trajectory.loss_mask.sum(axis=1)
  assert np.mean(same) > 0.98, np.mean(same)
  work_done = flops(
      model, trajectory.token_mask.sum(axis=1), trajectory.loss_mask.sum())
  used, text = (
      collector.metrics['rollout/slot_utilisation'], where(collected))
  return [
      Row(work, 'episodes', against, len(examples) / seconds[name],
          len(examples) / seconds['slots'], used,
          work_done / seconds['slots'] / rate, text)
      for name, against in (
          ('lockstep', f'lockstep, batches of {batch}'),
          ('batches', f'itself, batches of {batch}'))]


def own(workdir: pathlib.Path, rounds: int) -> list[Row]:
  """256 held-out questions of a tiny run, with its newest actor."""
  config = config_lib.load(f'{_ROOT}/configs/tiny.py')
  parts = assembly.build(
      config, workdir, training=False, card=workdir / 'model',
      say=lambda _: None)
  params, _ = checkpoints.restore_actor(
      workdir / 'checkpoints', parts.model, parts.decode)
  examples = parts.eval[:256]
  shared = (
      parts.tokenizer, parts.protocol, parts.retriever.search, parts.decode)
  config = dataclasses.replace(parts.collect.config, slots=64, chunk=16, lag=0)
  collector = collect.Collector(parts.model, config, *shared)
  collector.prepare(example.question for example in examples)
  plain = lockstep.Collector(parts.model, config, *shared)
  return episodes(
      'tiny run, its own lengths', parts.model, params, plain, collector,
      examples, rounds)


def skewed(rounds: int) -> list[Row]:
  """256 turns of 32 tokens, but one in ten spends its budget of 256.

  It is then told to answer, and its last turn drawn in the same way.
  """
  tokenizer, words = vocabulary(_TINY.vocab_size)
  # A temperature at which all tokens are about as likely.
  config = collect.Config(
      max_turns=1, k=1, prompt_length=16, response_length=256,
      observation_length=8, max_length=16 + 2 * 256 + 8, temperature=100.0,
      length_multiple=8, slots=64, chunk=16, lag=0)
  shared = (
      tokenizer, protocol_lib.Protocol.short(), lambda queries, k: [],
      _layout())
  table = counting(
      _TINY.vocab_size, 32, sampler_lib.ANSWER, _TINY.vocab_size // 10)
  made = []
  for kind in (lockstep.Collector, collect.Collector):
    made.append(kind(_TINY, config, *shared))
    made[-1]._table = table
  return episodes(
      'one in ten is long (32, 256)', _TINY,
      weights(_TINY), *made, ask(texts(words, 256, 12)),
      rounds)


def loop() -> tuple[Callable[[], Any], collect.Collector]:
  """16 episodes of 3 turns of 22 tokens, two of which search in memory.

  Whatever tokens a turn has, its text reads as a search for them. Prompts have
  64 tokens, observations about 100; of Tunix's they are not known.
  """
  tokenizer, words = vocabulary(_SHAPE.vocab_size)
  decode = tokenizer.decode
  tokenizer.decode = lambda ids: protocol_lib.search_turn(
      '', decode(ids).replace('<', ' '))
  passages = [
      types.Document(str(i), '', text)
      for i, text in enumerate(texts(words, 64, 96))]

  def search(queries, k):
    first = [sum(map(ord, query)) for query in queries]
    return [[passages[(i + j) % 64] for j in range(k)] for i in first]

  config = collect.Config(
      max_turns=_TURNS - 1, k=1, prompt_length=64, response_length=32,
      observation_length=128, max_length=448, chunk=16, lag=0)
  collector = collect.Collector(
      _SHAPE, config, tokenizer, protocol_lib.Protocol.short(), search,
      _layout())
  collector._table = counting(
      _SHAPE.vocab_size, _WRITTEN, sampler_lib.SEARCH)
  params = weights(_SHAPE)
  examples = ask(texts(words, 16, 62))
  collector.prepare(example.question for example in examples)

  def run():
    trajectory, transcripts = collector(params, examples, jax.random.key(1))
    assert all(
        [bool(turn.documents) for turn in transcript.turns]
        == [True] * (_TURNS - 1) + [False] for transcript in transcripts)
    return jax.device_get(trajectory)

  return run, collector


def cold() -> None:
  """Prints what the first call costs in this process, and what it compiles."""
  run, _ = loop()
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **_: compiled.append(seconds)
      if event == '/jax/core/compile/backend_compile_duration' else None)
  call = cpu_seconds(run)
  whole, first, compiling = time.process_time(), len(compiled), sum(compiled)
  run()
  print(json.dumps(dict(
      call=call, whole=whole, programs=first, compiling=compiling,
      later=len(compiled) - first)))


def agentic(rounds: int) -> list[Row]:
  """The loop once compiled, and from a cold start."""
  run, collector = loop()
  seconds, rate = alternate({'slots': run}, rounds)
  trajectory = run()
  count = trajectory.loss_mask.sum()
  assert count == 16 * _TURNS * _WRITTEN
  used = collector.metrics['rollout/slot_utilisation']
  work_done = flops(_SHAPE, trajectory.token_mask.sum(axis=1), count)
  started = []
  for _ in range(rounds):
    out = subprocess.run(
        [sys.executable, '-m', 'tests.benchmarks.rollout', '--cold'], cwd=_ROOT,
        check=True, capture_output=True, text=True).stdout
    started.append(json.loads(out.splitlines()[-1]))
  first, whole, programs, compiling, later = (
      statistics.median(x[name] for x in started)
      for name in ('call', 'whole', 'programs', 'compiling', 'later'))
  row = lambda work, spent, text: Row(
      work, 'tokens', "Tunix's loop, as measured", _TUNIX_LOOP, count / spent,
      used, work_done / spent / rate, text)
  return [
      row('agentic loop, compiled', seconds['slots'], where(run)),
      row('agentic loop, first call', first,
          f'{programs:.0f} programs compiled in {compiling:.1f} s, '
          f'{later:.0f} by the next call'),
      row('agentic loop, with imports', whole, 'and the parameters'),
  ]


# ── The sampler alone ────────────────────────────────────────────────────────


def _layout():
  return sharding.Layout(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


def feed(call, state, tokens: np.ndarray, budget: int):
  """Starts or appends to all slots, as many a call as the collector would."""
  count, width = tokens.shape
  some = max(1, min(count // sampler_lib.WAITING, 512 // width))
  for slots in np.arange(count, dtype=np.int32).reshape(-1, some):
    ones = np.ones_like(slots)
    state = call(state, sampler_lib.Rows(
        slot=slots, active=ones > 0, tokens=tokens[slots], count=ones * width,
        budget=ones * budget, episode=slots, shared=0 * ones))
  return state


def resumed(rounds: int) -> Row:
  """Four turns of 64 tokens with 200 observed between, behind 512 of prompt.

  Greedy, since rounding must not turn a sampled token over: both have to write
  the same.
  """
  count, prompt, turns, written, observed = 16, 512, 4, 64, 200
  sampler = sampler_lib.Sampler(
      model=_SHAPE, layout=_layout(), slots=count, eos_ids=())
  params = weights(_SHAPE)
  table = jnp.zeros((1, _SHAPE.vocab_size), jnp.int32)
  rng = np.random.default_rng(0)
  prompts, *observations = (
      rng.integers(0, _SHAPE.vocab_size, (count, width)).astype(np.int32)
      for width in (prompt, *[observed] * (turns - 1)))
  size = lambda turn: prompt + turn * (written + observed) + written
  found = {}

  def decode(copy, state):
    state, chunk = sampler.decode(
        copy, state, table, jax.random.key(0), 1.0, written, greedy=True)
    return state, jax.device_get(chunk.tokens)

  def one_state():
    copy = sampler.weights(params)
    start = lambda state, rows: sampler.start(copy, state, rows, None)
    append = lambda state, rows: sampler.append(copy, state, rows)
    state = feed(start, sampler.empty(size(0)), prompts, written)
    state, tokens = decode(copy, state)
    said = [tokens]
    for turn, tokens in enumerate(observations, 1):
      state = feed(append, sampler.grow(state, size(turn)), tokens, written)
      state, tokens = decode(copy, state)
      said.append(tokens)
    found['ours'] = np.stack(said)

  def again():
    copy = sampler.weights(params)
    start = lambda state, rows: sampler.start(copy, state, rows, None)
    context, said = prompts, []
    for turn in range(turns):
      if turn:
        context = np.concatenate(
            [context, said[-1], observations[turn - 1]], axis=1)
      state = feed(start, sampler.empty(size(turn)), context, written)
      said.append(decode(copy, state)[1])
    found['theirs'] = np.stack(said)

  seconds, rate = alternate({'theirs': again, 'ours': one_state}, rounds)
  np.testing.assert_array_equal(found['ours'], found['theirs'])
  total = count * turns * written
  work_done = flops(_SHAPE, [size(turns - 1)] * count, total)
  return Row(
      f'{turns} turns, one cache', 'tokens', 'prefill at every turn',
      total / seconds['theirs'], total / seconds['ours'], None,
      work_done / seconds['ours'] / rate, where(one_state))


def samplers(
    folder: pathlib.Path, pythons: dict[str, tuple[str, str]], rounds: int
) -> list[Row]:
  """32 prompts of 64 tokens, 64 new ones each.

  Args:
    folder: of the peers' scripts.
    pythons: interpreter and script by the peer's name.
    rounds: at least one.
  """
  count, width, new, chunk = 32, 64, 64, 32
  sampler = sampler_lib.Sampler(
      model=_SHAPE, layout=_layout(), slots=count, eos_ids=())
  params = weights(_SHAPE)
  table = jnp.zeros((1, _SHAPE.vocab_size), jnp.int32)
  tokens = np.random.default_rng(0).integers(
      2, _SHAPE.vocab_size, (count, width)).astype(np.int32)

  def ours():
    copy = sampler.weights(params)
    start = lambda state, rows: sampler.start(copy, state, rows, None)
    state = feed(start, sampler.empty(width + chunk), tokens, new)
    written = 0
    for end in range(chunk, new + 1, chunk):
      if end > chunk:
        state = sampler.grow(state, width + end)
      state, out = sampler.decode(
          copy, state, table, jax.random.key(0), 1.0, chunk)
      written += jax.device_get(out).count.sum()
    assert written == count * new

  def peer(python, script):
    out = subprocess.run(
        [python, script, 'sample'], cwd=folder, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=_without_path() | {'REPEATS': '3'}).stdout
    return json.loads(out.splitlines()[-1])['cpu_median_s']

  peers = {
      name: lambda how=how: peer(*how) for name, how in pythons.items()}
  seconds, rate = alternate({'ours': ours}, rounds, peers)
  work_done = flops(_SHAPE, [width + new] * count, count * new)
  total, text = count * new, where(ours)
  return [
      Row('32 x (64 + 64) tokens', 'tokens', name,
          None if name not in seconds else total / seconds[name],
          total / seconds['ours'], None, work_done / seconds['ours'] / rate,
          text)
      for name in peers or ['-']]


def _without_path():
  """The environment without this project's modules."""
  return {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path)
  parser.add_argument('--peers', type=pathlib.Path, default=_PEERS)
  parser.add_argument('--tunix_python')
  parser.add_argument('--hf_python')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--cold', action='store_true', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  assembly.tune_host()
  if flags.cold:
    cold()
    return
  show = lambda *rows: print(*rows, sep='\n', flush=True)
  show(f'per CPU second of one core, medians of {flags.rounds} alternating '
       'rounds', _HEADER)
  if flags.workdir:
    show(*own(flags.workdir, flags.rounds))
  else:
    show("tiny run, its own lengths: skipped, --workdir names none; python -m "
         'stepsearch.train --config=configs/tiny.py --workdir=runs/tiny makes '
         'one')
  show(*skewed(flags.rounds))
  show(resumed(flags.rounds))
  pythons = {}
  for name, python, script in (
      ('Tunix', flags.tunix_python, 'bench_tunix_sampler.py'),
      ('transformers', flags.hf_python, 'bench_hf.py')):
    if python:
      pythons[name] = os.path.abspath(python), script
    else:
      show(f'32 x (64 + 64) tokens: {name} skipped, no --'
           f'{"tunix" if name == "Tunix" else "hf"}_python')
  show(*samplers(flags.peers, pythons, flags.rounds))
  show(*agentic(flags.rounds))


if __name__ == '__main__':
  main()
