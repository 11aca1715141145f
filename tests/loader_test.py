import numpy as np
import pytest

from stepsearch.data import loader
from stepsearch.types import Example


def _examples(n):
  return [Example(str(i), f'q{i}', ('a',)) for i in range(n)]


def _ids(examples):
  return [int(example.id) for example in examples]


def test_batches_are_the_epochs_laid_end_to_end():
  data = loader.Loader(_examples(7), 3, seed=5)
  stream = np.concatenate(
      [np.random.default_rng((5, e)).permutation(7) for e in range(4)]
  )
  seen = [i for step in range(9) for i in _ids(data.batch(step))]
  assert seen == stream[:27].tolist()


def test_any_step_can_be_asked_first():
  straight = loader.Loader(_examples(10), 4, seed=0)
  wanted = [straight.batch(step) for step in range(12)]
  for step in (11, 3, 7):
    assert loader.Loader(_examples(10), 4, seed=0).batch(step) == wanted[step]
  assert straight.batch(2) == wanted[2]  # back into a dropped epoch


def test_batch_larger_than_the_data():
  batch = _ids(loader.Loader(_examples(3), 8, seed=2).batch(0))
  assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
  assert len(batch) == 8


def test_seeds_differ():
  a, b = (_ids(loader.Loader(_examples(50), 50, s).batch(0)) for s in (0, 1))
  assert a != b and sorted(a) == sorted(b)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((_examples(3), 0, 0), 'batch_size = 0'),
        (([], 2, 0), 'no examples'),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=message):
    loader.Loader(*arguments)


@pytest.mark.parametrize('n', [0, 1, 4, 5, 8])
def test_eval_batches_cover_every_example_once(n):
  batches = list(loader.eval_batches(_examples(n), 4))
  assert all(len(batch) == 4 for batch, _ in batches)
  seen = [i for batch, real in batches for i in _ids(batch[:real])]
  assert seen == list(range(n))
