"""Compiles a run for a TPU slice, without one: memory, costs, roofline.

    config ─▶ assembly.machinery ─▶ what training calls, lowered ─▶ libtpu
                                                                      │
            fits? · peak HBM · FLOPs · bytes · seconds at least ◀─ costs

`python -m stepsearch.compile --config=configs/qwen2_5_3b.py`. Needs libtpu and
no accelerator, no data, no weights and no tokenizer: config.model.vocab_size or
config.model.pretrained says how many tokens there are. All figures are of one
chip. The warm-up is not among what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import re
import time
from typing import Any

import jax
import ml_collections

from stepsearch import assembly
from stepsearch import config as config_lib
from stepsearch import costs
from stepsearch import paths
from stepsearch import sharding
from stepsearch import topology
from stepsearch import types
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.retrieval import encoders
from stepsearch.rollout import collect

GIB = 2**30


@dataclasses.dataclass
class Phase:
  """A program of a step, what lies in HBM while it runs, what it costs."""

  name: str
  lower: Callable[[], Any]  # gives a `jax.stages.Lowered`
  arguments: tuple[str, ...]  # the arrays that it takes, by name
  beside: tuple[str, ...]  # those that wait meanwhile
  calls: int  # a step
  passes: int | None = None  # trips of its loop that depends on data
  peak: float = 0.0  # bytes, all of it
  seconds: float = 0.0  # that compiling took
  cost: costs.Cost | None = None  # None: it is too large to be compiled


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is compiled for a config."""

  machinery: assembly.Machinery
  arrays: dict[str, float]  # bytes a chip, of what lives longer than a call
  phases: list[Phase]
  tokens: Tokens


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Of one step, if every episode is as long as it may be."""

  episodes: int
  length: int  # of an episode
  sampled: int  # of those of an episode
  shared: int  # of those of an episode, computed once for all


def plan(
    config: ml_collections.ConfigDict, devices: Sequence[Any],
    local: Sequence[Any] | None = None, *, shared: int | None = None,
    eos_ids: tuple[int, ...] = (0,),
) -> Plan:
  """The programs of a step, for devices that need not be there.

  Args:
    config: as of configs/default.py.
    devices: all of them.
    local: those of one host, which encodes by itself; all by default.
    shared: tokens that all prompts begin with; half of the budget by default.
    eos_ids: of the tokenizer.

  Raises:
    ValueError: as of `assembly.machinery`.
  """
  machinery = assembly.machinery(config, devices)
  learner, rollout = machinery.learner, machinery.rollout
  shapes = collect.Shapes.of(rollout, machinery.model, machinery.decode)
  episodes, k = config.batch_size, rollout.max_turns
  if shared is None:
    shared = rollout.prompt_length // 2
  tokens = Tokens(
      episodes, rollout.max_length, max(
          rollout.max_length - rollout.prompt_length
          - k * rollout.observation_length, rollout.response_length), shared)

  rows = lambda *shape, dtype='float32': jax.ShapeDtypeStruct(
      shape, dtype, sharding=machinery.update.rows)
  whole = rows(episodes, shapes.length)
  trajectory = types.Trajectory(
      tokens=rows(*whole.shape, dtype='int32'), token_mask=whole,
      loss_mask=whole, logprobs=whole,
      turn_ends=rows(episodes, k + 1, dtype='int32'))
  state = learner.shapes
  sampler = collect.sampler(
      rollout, machinery.model, machinery.decode, episodes, eos_ids)
  folder = config.retriever.embedder
  folder = None if folder == 'lexical' else folder
  encoder, encode = encoders.lower(folder, devices if local is None else local)
  programs = {'encode': encode} | learner.lower(trajectory) | collect.lower(
      rollout, machinery.model, machinery.decode, episodes,
      learner.policy_shapes(), shared, eos_ids)
  arrays = {
      'actor': state.actor.params, 'critic': state.critic.params,
      'optimizer': (state.actor.opt_state, state.critic.opt_state),
      'reference': learner.reference_shapes,
      'decoding weights': sampler.weight_shapes(),
      'cache': sampler.state_shapes(shapes.cache[-1]).cache,
      'encoder': encoder}

  feed = lambda widths: shapes.rows(
      widths[-1], sampler.slots // sampler.shards) * sampler.shards
  batches = -(-episodes // sampler.slots)
  decodes = -(-tokens.sampled // rollout.chunk) * batches
  learning = ('actor', 'critic', 'optimizer', 'reference')
  if folder:
    learning += ('encoder',)
  playing = ('decoding weights', 'cache')
  base = ('reference',) if machinery.model.lora else ()  # of the adapters
  without = lambda names: tuple(x for x in learning if x not in names)
  ppo = config.ppo
  phases = [
      Phase(name, programs[name], *where, calls, passes)
      for name, where, calls, passes in (
          ('weights', (('actor', *base), without(('actor', *base))), 1, None),
          ('grow', (('cache',), (*learning, 'decoding weights')),
           len(shapes.cache) - 1, None),
          ('prefill', (playing, learning),
           -(-episodes // feed(shapes.prompts)), None),
          ('append', (playing, learning),
           -(-episodes * k // feed(shapes.observations)), None),
          ('decode', (playing, learning), decodes, rollout.chunk),
          ('encode', (('encoder',), (*without(('encoder',)), *playing)),
           int(folder is not None), None),
          ('logprobs', (
              ('actor', 'critic', 'reference'),
              without(('actor', 'critic', 'reference'))),
           1, episodes // ppo.microbatch_size),
          ('update', (
              ('actor', 'critic', 'optimizer', *base),
              without(('actor', 'critic', 'optimizer', *base))),
           1, ppo.minibatch_size // ppo.microbatch_size))]
  return Plan(
      machinery, {name: _bytes(tree) for name, tree in arrays.items()}, phases,
      tokens)


def measure(
    phase: Phase, arrays: dict[str, float], chip: costs.Chip
) -> None:
  """Compiles a phase; fills in peak, seconds and, if it fits by itself, cost.

  Where its arrays alone do not fit, nothing is compiled.

  Args:
    phase: to be filled in.
    arrays: bytes a chip, as of `Plan`.
    chip: which the program is for.
  """
  beside = sum(arrays[name] for name in phase.beside)
  phase.peak = beside + sum(arrays[name] for name in phase.arguments)
  if phase.peak > chip.hbm:
    return
  start = time.perf_counter()
  try:
    compiled = phase.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    # "... the total memory required for HLO temporaries (18.64G) exceeds ..."
    needed = re.search(r'RESOURCE_EXHAUSTED.*?([\d.]+)([MGT])', str(error))
    if not needed:
      raise
    unit = {'M': 2**20, 'G': 2**30, 'T': 2**40}[needed.group(2)]
    # Arguments and results are among these "temporaries".
    phase.peak = max(float(needed.group(1)) * unit, chip.hbm + 1) + beside
  else:
    phase.peak = compiled.memory_analysis().peak_memory_in_bytes + beside
    phase.cost = costs.cost(compiled.as_text(), phase.passes)
  phase.seconds = time.perf_counter() - start


def model_flops(model: qwen.Config, tokens: Tokens, epochs: int) -> dict:
  """FLOPs of a step that the mathematics asks for, all chips together.

  2 a weight and token forward, twice that backward, half of it where the
  weight is frozen beside adapters; attention over what a token may see,
  causal; nothing for what is computed again or for padding. Logits are needed
  of the tokens that are sampled while decoding, of all tokens in the update.

  Returns:
    by `rollout`, `logprobs` (actor, reference and critic) and `update`.
  """
  m = model
  kernels = 2 * m.layers * (
      m.embed * m.head_dim * 2 * (m.heads + m.kv_heads) + 3 * m.embed * m.mlp)
  logits, head = 2 * m.embed * m.vocab_size, 2 * m.embed
  added, frozen = 0, 3  # passes through what adapters leave as it is
  if m.lora is not None:
    frozen = 2
    added = 2 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(
        lambda key: lora.init(m.lora, qwen.init(m, key), key),
        jax.random.key(0))))

  def attention(length):
    return 4 * m.layers * m.heads * m.head_dim * length * (length + 1) / 2

  length = tokens.length
  # Of actor and critic.
  whole, learnt = 2 * kernels + logits, 2 * added + head
  shared = kernels * tokens.shared + attention(tokens.shared)
  return {name: flops * tokens.episodes for name, flops in {
      'rollout': (
          kernels * length + attention(length) - shared
          + logits * tokens.sampled),
      'logprobs': (
          (whole + kernels + logits + learnt) * length
          + 3 * attention(length)),
      'update': epochs * (
          (frozen * whole + 3 * learnt) * length
          + 6 * attention(length))}.items()}


def report(made: Plan, name: str, config: ml_collections.ConfigDict) -> dict:
  """What is written to --json; `phases` have been measured."""
  generation, shape = topology.split(name)
  chip, chips = costs.CHIPS[generation], math.prod(shape)
  phases = {}
  for phase in made.phases:
    found = {
        'peak_hbm_gib': phase.peak / GIB,
        'resident_gib': {
            name: made.arrays[name] / GIB
            for name in (*phase.arguments, *phase.beside)},
        'calls': phase.calls, 'compile_s': phase.seconds}
    found |= dict.fromkeys(
        ('flops', 'bytes', 'collective_bytes', 'roofline_s', 'bound'))
    if phase.cost is not None:
      seconds, bound = costs.roofline(phase.cost, chip)
      found |= {
          'flops': phase.cost.flops + phase.cost.kernel_flops,
          'kernel_flops': phase.cost.kernel_flops,
          'bytes': phase.cost.bytes, 'host_bytes': phase.cost.host_bytes,
          'collective_bytes': phase.cost.collective_bytes,
          'collectives': phase.cost.collectives,
          'roofline_s': seconds, 'bound': bound,
          'compiler_s': phase.cost.cycles / chip.clock}
    phases[phase.name] = found
  wanted = model_flops(
      made.machinery.model, made.tokens, config.ppo.epochs)
  result = {
      'fits': all(
          phase.cost is not None and phase.peak <= chip.hbm
          for phase in made.phases if phase.calls),
      'hbm_gib': chip.hbm / GIB, 'topology': name, 'chips': chips,
      'mesh': dict(made.machinery.update.mesh.shape),
      'tokens': dataclasses.asdict(made.tokens), 'phases': phases,
      'model_flops': wanted}
  if all(phase.cost is not None for phase in made.phases):
    total = lambda field: sum(
        x[field] * x['calls'] for x in phases.values())
    seconds = total('roofline_s')
    result['step'] = {
        field: total(field) for field in (
            'flops', 'bytes', 'collective_bytes', 'roofline_s', 'compiler_s')}
    result['step'] |= {
        'model_flops_share': sum(wanted.values()) / (total('flops') * chips),
        'roofline_mfu': (
            sum(wanted.values()) / (seconds * chips * chip.flops))}
    executed = phases['update']['flops'] * chips
    phases['update'] |= {
        'model_flops_share': wanted['update'] / executed,
        'roofline_mfu': wanted['update'] / (
            phases['update']['roofline_s'] * chips * chip.flops)}
  return result


def text(result: dict) -> str:
  """The report as it is printed."""
  names = ('weights', 'optimizer', 'reference', 'decoding', 'cache')
  of = {
      'weights': ('actor', 'critic'), 'decoding': ('decoding weights',)}
  lines = ['', f'GiB a chip, of {result["hbm_gib"]:.2f}', ''.join(
      [f'{"":10}', *(f'{name:>11}' for name in names), f'{"other":>11}',
       f'{"peak":>9}'])]
  for name, phase in result['phases'].items():
    resident = phase['resident_gib']
    sizes = [
        sum(resident.get(x, 0.0) for x in of.get(name, (name,)))
        for name in names]
    other = phase['peak_hbm_gib'] - sum(sizes)
    lines.append(''.join([
        f'{name:10}', *(f'{x:11.2f}' for x in (*sizes, other)),
        f'{phase["peak_hbm_gib"]:9.2f}',
        '' if phase['peak_hbm_gib'] <= result['hbm_gib'] else '  too large']))
  lines += [
      '', 'a call, on one chip', ''.join([
          f'{"":10}{"a step":>8}{"TFLOP":>10}{"HBM GB":>10}{"sent GB":>10}',
          f'{"at least s":>12}  bound by      {"compiler s":>10}'])]
  for name, phase in result['phases'].items():
    if phase['flops'] is not None:
      lines.append(
          f'{name:10}{phase["calls"]:8}{phase["flops"] / 1e12:10.2f}'
          f'{phase["bytes"] / 1e9:10.1f}{phase["collective_bytes"] / 1e9:10.2f}'
          f'{phase["roofline_s"]:12.4f}  {phase["bound"]:14}'
          f'{phase["compiler_s"]:10.3f}')
  if 'step' in result:
    step, update = result['step'], result['phases']['update']
    tokens = result['tokens']
    lines += [
        '',
        f'A step of {tokens["episodes"]} episodes of {tokens["length"]:,} '
        f'tokens: {step["flops"] / 1e12:,.0f} TFLOP, {step["bytes"] / 1e9:,.0f}'
        f' GB of HBM and {step["collective_bytes"] / 1e9:,.0f} GB sent a chip, '
        f'{step["roofline_s"]:.1f} s at least, {step["compiler_s"]:.1f} s by '
        'the compiler (without kernels and transfers).',
        f'Model FLOPs of those executed: {step["model_flops_share"]:.2f}, in '
        f'the update {update["model_flops_share"]:.2f}. MFU at the roofline: '
        f'{step["roofline_mfu"]:.2f}, in the update '
        f'{update["roofline_mfu"]:.2f}.']
  return '\n'.join(lines)


def too_large(
    result: dict, config: ml_collections.ConfigDict, made: Plan
) -> str | None:
  """One paragraph on the phase that is furthest from fitting; None: it fits."""
  if result['fits']:
    return None
  name, phase = max(
      ((name, phase) for name, phase in result['phases'].items()
       if phase['calls']), key=lambda item: item[1]['peak_hbm_gib'])
  parts = phase['resident_gib'] | {'temporaries': max(
      phase['peak_hbm_gib'] - sum(phase['resident_gib'].values()), 0.0)}
  ordered = sorted(parts, key=parts.get, reverse=True)
  listed = ', '.join(f'{x} {parts[x]:.2f}' for x in ordered if parts[x] > 0.05)
  advice = [
      hint for part in ordered[:2]
      for hint in _advice(part, name, config, made.machinery)]
  room = result['hbm_gib'] / phase['peak_hbm_gib']
  for bigger in topology.larger(result['topology']):
    # As if everything were split over all chips.
    if math.prod(topology.split(bigger)[1]) * room >= result['chips']:
      advice.append(f'--topology={bigger}')
      break
  return (
      f'does not fit: {name} needs {phase["peak_hbm_gib"]:.2f} GiB a chip and '
      f'{result["topology"]} has {result["hbm_gib"]:.2f}; the largest is '
      f'{ordered[0]} (GiB: {listed}); try '
      f'{" or ".join(advice or ["a shorter config.rollout.max_length"])}.')


def _advice(part, phase, config, machinery) -> list[str]:
  """What would make one part of a phase smaller."""
  found = []
  learning = phase in ('update', 'logprobs')
  if part == 'temporaries' and learning:
    shards = machinery.update.shards
    fewer = max((
        size for size in range(shards, config.ppo.microbatch_size, shards)
        if config.ppo.minibatch_size % size == 0), default=0)
    if fewer:
      found.append(f'--config.ppo.microbatch_size={fewer}')
    if config.model.remat != 'full':
      found.append('--config.model.remat=full')
  elif part == 'decoding weights' or part == 'temporaries':
    for axis in ('mlp', 'vocab'):
      if 'fsdp' not in machinery.decode.axes(axis):
        found.append(f"--config.sharding.decode.{axis}=\"('fsdp', 'tensor')\"")
  elif part == 'cache':
    slots = (config.rollout.slots or config.batch_size) // 2
    if slots:
      found.append(f'--config.rollout.slots={slots}')
  elif part in ('optimizer', 'reference') and not learning and (
      part not in config.offload):
    found.append(
        f'--config.offload={",".join((*config.offload, part))}')
  elif part in ('actor', 'critic', 'optimizer') and (
      machinery.update.size('embed') < machinery.update.mesh.size):
    found.append('--config.mesh="(1, -1, 1)"')
  elif part in ('critic', 'optimizer') and machinery.model.lora is None:
    found.append('--config.lora.rank=16')
  return found


def _bytes(tree) -> float:
  """HBM of one device; what lies in host memory does not count."""
  return float(sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
      if x.sharding.memory_kind != sharding.HOST))


def run(
    config: ml_collections.ConfigDict, name: str, path: str,
    say: Callable[[str], None] = print,
) -> dict:
  """Compiles everything, prints the report and writes it.

  Args:
    config: as of configs/default.py.
    name: of the TPU slice; '': config.topology.
    path: of the JSON file; '': none.
    say: prints a line.

  Returns:
    what is written to the file.

  Raises:
    ValueError: the slice is not known, libtpu is missing, the config cannot
      work there, or does not fit (after the report).
  """
  name = name or config.topology
  if not name:
    raise ValueError(
        'config.topology names no TPU slice: give one, as --topology=v5e:4x4.')
  devices = topology.devices(name)
  made = plan(config, devices, topology.devices(topology.host(name)))
  chip = costs.CHIPS[topology.split(name)[0]]
  mesh = made.machinery.update.mesh.shape
  count = sum(
      math.prod(x.shape)
      for x in jax.tree.leaves(made.machinery.learner.reference_shapes))
  say(f'{name}: {len(devices)} chips, mesh '
      + ' x '.join(f'{axis} {size}' for axis, size in mesh.items())
      + f', {count / 1e9:.2f} B parameters')
  for phase in made.phases:
    measure(phase, made.arrays, chip)
    say(f'{phase.name:10}{phase.seconds:6.0f} s')
  result = report(made, name, config)
  say(text(result))
  if path:
    paths.write(path, json.dumps(result, indent=2) + '\n')
  problem = too_large(result, config, made)
  if problem:
    raise ValueError(problem)
  return result


if __name__ == '__main__':
  from absl import flags

  _TOPOLOGY = flags.DEFINE_string(
      'topology', '', 'TPU slice, in chips, as v5e:4x4; default: '
      'config.topology.')
  _JSON = flags.DEFINE_string('json', '', 'Also write the report here.')
  config_lib.main(
      lambda config: run(config, _TOPOLOGY.value, _JSON.value))
