"""Who may import whom, and what a module may not be called.

    4  entry points (the rest of stepsearch/*.py): the only readers of configs
    3  rollout.collect, rollout.generate, rl.learner, checkpoints, metrics,
       evaluation, warmup
    2  rollout.sampler, retrieval.*, data.*, rl.rewards, rl.policy, methods
    1  models.*, rl.advantages, rl.losses, rl.packing, protocol, passages,
       words, costs
    0  types, sharding, tokenizer, preemption, distributed, topology, hlo,
       client; below all, paths and rendezvous

Downward only. Inside a layer, only siblings of one package see each other, and
entry points may read `assembly`, `benchmark`, `config`, `engine` and `report`,
and a command's module.
"""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

_LAYERS = {
    'paths': -1, 'rendezvous': -1,
    'types': 0, 'sharding': 0, 'tokenizer': 0, 'preemption': 0,
    'distributed': 0, 'published': 0, 'hlo': 0, 'topology': 0, 'client': 0,
    'models': 1, 'rl.advantages': 1, 'rl.losses': 1, 'rl.packing': 1,
    'protocol': 1, 'passages': 1, 'words': 1, 'costs': 1,
    'rollout.sampler': 2, 'retrieval': 2, 'data': 2, 'rl.rewards': 2,
    'rl.policy': 2, 'methods': 2,
    'rollout.collect': 3, 'rl.learner': 3, 'checkpoints': 3, 'metrics': 3,
    'rollout.generate': 3, 'evaluation': 3, 'warmup': 3,
}
_SHARED_ENTRY = {
    'assembly', 'benchmark', 'config', 'engine', 'report',
    'evaluate_retrieval', 'evaluate_stored', 'prepare_gold', 'prepare_keys',
    'prepare_passages'}
_FORBIDDEN_NAMES = {'utils', 'util', 'common', 'helpers', 'base'}
# module or package -> what it must not import, at any depth of its code
_FORBIDDEN_IMPORTS = {
    'rl.rewards': ('jax', 'flax'),
    'protocol': ('jax', 'flax'),
    'rollout.sampler': (
        'stepsearch.protocol', 'stepsearch.tokenizer', 'transformers',
        'tokenizers'),
}


def _layer(module):
  """Layer of a module named without the `stepsearch.`; None if unknown."""
  if module in _LAYERS:
    return _LAYERS[module]
  package, _, rest = module.partition('.')
  if rest:
    return _LAYERS.get(package)
  return None if module in ('rl', 'rollout') else 4


def _imports(source, modules):
  """Absolute names imported anywhere; `from a import b` is a.b if a module."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level:
      names.add('.')
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        # stepsearch/__init__.py is empty: what comes from it is a module.
        is_module = (
            not node.module.startswith('stepsearch.')
            or name.removeprefix('stepsearch.') in modules)
        names.add(name if is_module else node.module)
  return names


def _is_or_in(name, package):
  return name == package or name.startswith(package + '.')


def _violations(sources):
  """What is wrong in {module: source}, modules without `stepsearch.`."""
  found = []
  for module, source in sources.items():
    layer = _layer(module)
    if layer is None:
      found.append(f'{module} has no layer: give it one here')
      continue
    if _FORBIDDEN_NAMES & set(module.split('.')):
      found.append(f'{module}: a name that says nothing')
    for name in sorted(_imports(source, set(sources) | set(_LAYERS))):
      problem = f'{module} imports {name}'
      if name == '.':
        found.append(f'{module}: a relative import')
      elif _is_or_in(name, 'configs'):
        found.append(problem)
      elif _is_or_in(name, 'ml_collections') and layer < 4:
        found.append(problem)
      elif _is_or_in(name, 'flax') and not (
          name == 'flax.struct' or _is_or_in(module, 'models')):
        found.append(problem)
      elif any(_is_or_in(name, forbidden)
               for forbidden in _FORBIDDEN_IMPORTS.get(module, ())):
        found.append(problem)
      elif name.startswith('stepsearch.'):
        target = name.removeprefix('stepsearch.')
        other = _layer(target)
        same_package = (
            '.' in module and target.split('.')[0] == module.split('.')[0])
        allowed = (
            other is not None and other < layer
            or other == layer < 4 and same_package
            or layer == 4 and target in _SHARED_ENTRY)
        if not allowed:
          found.append(f'{problem} (layer {layer} sees {other})')
  return found


def _sources():
  package = _ROOT / 'stepsearch'
  sources = {}
  for path in sorted(package.rglob('*.py')):
    name = '.'.join(path.relative_to(package).with_suffix('').parts)
    if path.name != '__init__.py':
      sources[name] = path.read_text()
    else:
      assert not _imports(path.read_text(), set()), f'{path} imports something'
  return sources


def test_the_package_keeps_to_its_layers():
  assert not _violations(_sources())


@pytest.mark.parametrize('module, source', [
    ('models.qwen', 'from stepsearch.rl import rewards'),
    ('rl.losses', 'import stepsearch.metrics'),
    ('retrieval.index', 'from stepsearch.data import world'),
    ('checkpoints', 'from stepsearch import metrics'),
    ('metrics', 'from stepsearch import config'),
    ('metrics', 'def f():\n  from stepsearch import train'),
    ('evaluate', 'from stepsearch import train'),
    ('rl.rewards', 'import jax.numpy as jnp'),
    ('rl.rewards', 'from jax import numpy'),
    ('protocol', 'import jax'),
    ('rollout.sampler', 'from stepsearch import protocol'),
    ('rollout.sampler', 'from stepsearch.tokenizer import Tokenizer'),
    ('rollout.sampler', 'import transformers'),
    ('models.qwen', 'import ml_collections'),
    ('rl.learner', 'from flax import linen'),
    ('rl.learner', 'import flax.linen as nn'),
    ('train', 'from configs import tiny'),
    ('data.loader', 'from . import world'),
    ('data.utils', ''),
    ('helpers', ''),
    ('rl.novelty', ''),
])
def test_a_violation_is_found(module, source):
  assert len(_violations({module: source})) == 1


@pytest.mark.parametrize('module, source', [
    ('rl.rewards', 'from stepsearch import protocol, types\nimport numpy'),
    ('rl.learner', 'from stepsearch.rl import advantages, losses\n'
     'from flax import struct\nimport jax'),
    ('models.qwen', 'from flax import linen as nn\nimport flax.linen'),
    ('models.hf', 'from stepsearch.models import qwen'),
    ('retrieval.retriever', 'from stepsearch.retrieval import index'),
    ('data.world', 'from stepsearch.types import Document, Example'),
    ('train', 'import ml_collections\nfrom stepsearch import config, report\n'
     'from stepsearch.rollout import collect\nfrom stepsearch import warmup'),
])
def test_what_is_allowed_passes(module, source):
  assert not _violations({module: source})
