"""Real checkpoints against transformers, where they have been fetched."""

import os
import pathlib

import numpy as np
import pytest

from stepsearch import tokenizer as tokenizer_lib
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf

_MODELS = pathlib.Path(os.environ.get(
    'STEPSEARCH_MODELS', pathlib.Path(__file__).parents[1] / 'models'))


@pytest.fixture(scope='module', params=['smollm2', 'qwen'])
def checkpoint(request):
  """A folder, and 256 tokens of real text."""
  pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  path = _MODELS / request.param
  if not path.exists():
    pytest.skip(
        f'no {path}: python -m launch.fetch_models --output={_MODELS}, or set '
        'STEPSEARCH_MODELS')
  from tests.benchmarks import parity

  ids = tokenizer_lib.load(path).encode(parity.passages(8))[:256]
  assert len(ids) > 200
  return str(path), np.asarray(ids, np.int32), parity


def test_logits_are_as_near_to_float64_as_torch_s(checkpoint):
  path, tokens, parity = checkpoint
  exact = parity.theirs(path, tokens, 'float64')
  theirs = np.abs(parity.theirs(path, tokens, 'float32') - exact).max()
  ours = np.abs(parity.ours(path, tokens, 'float32') - exact).max()
  assert ours <= 2 * theirs


def test_greedy_continuations_are_the_same(checkpoint):
  path, tokens, parity = checkpoint
  ours = parity.our_continuation(path, tokens[:64], 64)
  assert ours == parity.their_continuation(path, tokens[:64], 64)


def test_recorded_logprobs_are_the_recomputed_ones(checkpoint):
  path, tokens, parity = checkpoint
  found = parity.recorded_and_recomputed(path, tokens[:64], 32, 'float32')
  assert np.abs(found).max() <= 1e-4


def test_weights_come_back_bit_for_bit(checkpoint, tmp_path):
  path, _, _ = checkpoint
  config, params = hf.load(path)
  hf.save(tmp_path / 'again', config, params, source=path)
  first, second = (
      folder_lib.Folder(folder) for folder in (path, tmp_path / 'again'))
  assert first.tensors == second.tensors
  for name in first.tensors:
    assert first.read(name).tobytes() == second.read(name).tobytes(), name
