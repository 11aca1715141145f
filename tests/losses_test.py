import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch.rl import losses

B, T, D, V = 3, 11, 5, 17


def case(seed=0, length=T):
  keys = jax.random.split(jax.random.key(seed), 5)
  return (
      jax.random.normal(keys[0], (B, length, D)),
      jax.random.normal(keys[1], (D, V)),
      jax.random.randint(keys[2], (B, length), 0, V),
      jax.random.normal(keys[3], (2, B, length)),
  )


def plain(hidden, matrix, targets, temperature):
  logprobs = jax.nn.log_softmax(hidden @ matrix / temperature)
  picked = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
  return picked, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@pytest.mark.parametrize('chunk', [1, 4, 100])
def test_chunked_logprobs_are_the_plain_ones(chunk):
  hidden, matrix, targets, w = case()

  def total(function, *options):
    def run(hidden, matrix):
      logprobs, entropy = function(hidden, matrix, targets, 0.7, *options)
      return jnp.sum(w[0] * logprobs + w[1] * entropy), (logprobs, entropy)
    return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(
        hidden, matrix)

  (_, found), grads = total(losses.token_logprobs, chunk)
  (_, expected), expected_grads = total(plain)
  for x, y in zip((*found, *grads), (*expected, *expected_grads)):
    assert x.dtype == jnp.float32 and x.shape == y.shape
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def shapes(jaxpr):
  """Shapes of all intermediate arrays, those of inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.shape
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: hasattr(x, 'jaxpr') or hasattr(x, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from shapes(inner)


def test_no_array_of_all_logits_forward_or_backward():
  hidden, matrix, targets, w = case(length=64)

  def largest(function, *options):
    run = lambda h, m: jnp.sum(
        w[0] * function(h, m, targets, 1.0, *options)[0])
    jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1)))(hidden, matrix)
    return max(int(np.prod(shape)) for shape in shapes(jaxpr.jaxpr))

  assert largest(plain) == B * 64 * V
  assert largest(losses.token_logprobs, 8) == B * 64 * D
  assert max(B * 8 * V, D * V) < B * 64 * D


def test_kl_estimators():
  p, q = jnp.asarray([[-1.0, -0.5]]), jnp.asarray([[-1.5, -0.25]])
  r = np.asarray([[-0.5, 0.25]])  # log q - log p
  np.testing.assert_allclose(losses.kl(p, q, 'k1'), -r)
  np.testing.assert_allclose(losses.kl(p, q, 'k2'), r * r / 2)
  np.testing.assert_allclose(
      losses.kl(p, q, 'k3'), np.exp(r) - r - 1, rtol=1e-6)
  with pytest.raises(ValueError, match='k4'):
    losses.kl(p, q, 'k4')


def test_k1_and_k3_are_unbiased():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(9), size=2).astype(np.float32)
  true = (p * np.log(p / q)).sum()
  for kind in ('k1', 'k3'):
    terms = losses.kl(jnp.log(p)[None], jnp.log(q)[None], kind)[0]
    np.testing.assert_allclose((p * terms).sum(), true, rtol=1e-5)
  assert (losses.kl(jnp.log(p)[None], jnp.log(q)[None], 'k3') >= 0).all()


def test_policy_loss_by_hand():
  ratios = jnp.asarray([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 1.0])
  advantages = jnp.asarray([2., -2., 2., -2., 2., -2., 3.])
  old = jnp.full(7, -1.0)
  loss, clipped = losses.policy_loss(
      old + jnp.log(ratios), old, advantages, 0.2)
  np.testing.assert_allclose(
      loss, [-2.4, 3.0, -1.0, 1.6, -2.2, 1.8, -3.0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [1, 0, 0, 1, 0, 0, 0])
  # A clipped token pushes no further: d loss / d log pi = -ratio A, or 0.
  total = lambda x: losses.policy_loss(x, old, advantages, 0.2)[0].sum()
  grad = jax.grad(total)(old + jnp.log(ratios))
  np.testing.assert_allclose(
      grad, [0, 3.0, -1.0, 0, -2.2, 1.8, -3.0], rtol=1e-5, atol=1e-6)


def test_value_loss_by_hand():
  # Old value 1, clip 0.5, so the clipped prediction stays in [0.5, 1.5].
  old = jnp.ones(5)
  values = jnp.asarray([1.25, 2.0, 2.0, 0.0, 0.0])
  returns = jnp.asarray([2.0, 3.0, 0.0, -1.0, 2.0])
  loss, clipped = losses.value_loss(values, old, returns, 0.5)
  np.testing.assert_allclose(
      loss, [0.75**2 / 2, 1.5**2 / 2, 2.0, 1.5**2 / 2, 2.0])
  np.testing.assert_array_equal(clipped, [0, 1, 0, 1, 0])
  grad = jax.grad(lambda x: losses.value_loss(x, old, returns, 0.5)[0].sum())(
      values)
  np.testing.assert_allclose(grad, [-0.75, 0.0, 2.0, 0.0, -2.0])


def test_weights():
  mask = jnp.asarray([
      [0, 1, 1, 0, 1, 1.], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 1]])
  token = np.asarray(mask) / 7
  rows = np.asarray(mask) * np.asarray([[1 / 4], [1], [0], [1 / 2]]) / 3
  for average, expected in (('token', token), ('trajectory', rows)):
    found = losses.weights(mask, average)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=1e-6)
    assert (losses.weights(jnp.zeros((2, 3)), average) == 0).all()
  with pytest.raises(ValueError, match='median'):
    losses.weights(mask, 'median')


def test_masked_tokens_have_no_gradient():
  rng = np.random.default_rng(3)
  x, old, target = (
      jnp.asarray(rng.normal(size=(4, 9)), jnp.float32) for _ in range(3))
  mask = jnp.asarray(rng.random((4, 9)) < 0.5, jnp.float32)

  def total(x, loss, average):
    weights = losses.weights(mask, average)
    return jnp.sum(loss(x, old, target, 1e4)[0] * weights)

  for loss in (losses.policy_loss, losses.value_loss):
    for average in ('token', 'trajectory'):
      grad = np.asarray(jax.grad(total)(x, loss, average))
      assert (grad[np.asarray(mask) == 0] == 0).all()
      assert (grad[np.asarray(mask) == 1] != 0).all()
