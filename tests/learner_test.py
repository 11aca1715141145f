import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepsearch import config as config_lib
from stepsearch import sharding
from stepsearch import types
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rl import learner as learner_lib
from stepsearch.rl import losses
from stepsearch.rl import policy

_ROOT = pathlib.Path(__file__).parents[1]
B, T, STEPS = 16, 22, 10
PLAIN = learner_lib.Config(
    minibatch_size=16, microbatch_size=8, gamma=0.95, gae_lambda=0.9,
    clip_eps=0.2, value_clip=0.5, kl_coef=0.3, kl_kind='k2', whiten_floor=0.1,
    temperature=0.7, logprob_chunk=8, actor_lr=0.05, critic_lr=0.02,
    actor_warmup=0.5, critic_warmup=0.2, optimizer='sgd', max_grad_norm=1.0)


@pytest.fixture(scope='module')
def trajectory(model):
  """Prompts, two stretches of sampled tokens with a hole between, padding."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.vocab_size, (B, T)).astype(np.int32)
  mask, present = np.zeros((2, B, T), np.float32)
  for row in range(B):
    prompt, first, hole, second = rng.integers(1, 6, 4)
    mask[row, prompt:prompt + first] = 1
    start = prompt + first + hole
    mask[row, start:start + second] = 1
    present[row, :start + second] = 1
  mask[3] = 0  # an episode in which nothing was sampled
  tokens[present == 0] = 0
  recorded = rng.normal(-2, 0.5, (B, T)).astype(np.float32) * mask
  return jax.tree.map(jnp.asarray, types.Trajectory(
      tokens=tokens, token_mask=present, loss_mask=mask, logprobs=recorded,
      turn_ends=np.full((B, 2), -1, np.int32)))


@pytest.fixture(scope='module')
def rewards(trajectory):
  rng = np.random.default_rng(1)
  return jnp.asarray(
      rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.3), jnp.float32)


@pytest.fixture(scope='module')
def other(model, random_params):
  """The reference policy."""
  return random_params(model, 1)


def make(model, layout, config=PLAIN, batch_size=B):
  return learner_lib.Learner(model, config, layout, batch_size, STEPS)


@pytest.fixture(scope='module')
def learner(model, layout):
  return make(model, layout)


@pytest.fixture(scope='module')
def first(learner, params):
  """Step 0 as numpy, with a critic whose head is not zero any more."""
  state = jax.tree.map(np.asarray, learner.start(params))
  rng = np.random.default_rng(2)
  state.critic.params['head'] = rng.normal(
      0, 0.5, state.critic.params['head'].shape).astype(np.float32)
  return state


@pytest.fixture
def state(first, learner):
  return jax.device_put(first, learner.shardings)


@pytest.fixture(scope='module')
def made(learner, first, other, trajectory, rewards):
  """Batch and metrics of `make_batch`, as numpy."""
  state = jax.device_put(first, learner.shardings)
  return jax.tree.map(
      np.asarray, learner.make_batch(state, other, trajectory, rewards))


def close(found, expected, **tolerance):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found,
      expected)


# ── A second implementation ──────────────────────────────────────────────────


@functools.partial(jax.jit, static_argnums=0)
def plain_values(model, critic, tokens):
  """V before each token, [B, T]."""
  positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[1])[None], tokens.shape)
  trunk = dataclasses.replace(model, tie_embeddings=True)
  hidden, _ = qwen.Qwen(trunk).apply(
      {'params': critic['trunk']}, tokens, positions)
  return jnp.pad(hidden @ critic['head'], ((0, 0), (1, 0)))[:, :-1]


@functools.partial(jax.jit, static_argnums=0)
def plain_policy(model, params, tokens, temperature):
  """Log-softmax before each token [B, T, V]."""
  positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, _ = qwen.Qwen(model).apply({'params': params}, tokens, positions)
  logprobs = jax.nn.log_softmax(
      hidden @ qwen.unembedding(params) / temperature)
  return jnp.pad(logprobs, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def picked(logprobs, tokens):
  return np.take_along_axis(
      np.asarray(logprobs), np.asarray(tokens)[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain_grads(model, config, params, batch):
  """Gradients of both losses, without chunks and microbatches."""
  mask = batch.loss_mask
  counts = jnp.sum(mask, axis=1)

  def mean(terms):  # over trajectories that have tokens, of means over tokens
    means = jnp.sum(terms * mask, axis=1) / jnp.maximum(counts, 1)
    return jnp.sum(means) / jnp.sum(counts > 0)

  def actor_loss(params):
    all_logprobs = plain_policy(
        model, params, batch.tokens, config.temperature)
    logprobs = jnp.take_along_axis(
        all_logprobs, batch.tokens[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, -1)
    ratio = jnp.exp(logprobs - batch.logprobs)
    low, high = 1 - config.clip_eps, 1 + config.clip_eps
    gain = jnp.minimum(
        ratio * batch.advantages,
        jnp.minimum(jnp.maximum(ratio, low), high) * batch.advantages)
    return -mean(gain + config.entropy_coef * entropy)

  def critic_loss(params):
    values = plain_values(model, params, batch.tokens)
    near = jnp.minimum(jnp.maximum(
        values, batch.values - config.value_clip),
        batch.values + config.value_clip)
    return 0.5 * mean(jnp.maximum(
        (values - batch.returns)**2, (near - batch.returns)**2))

  return jax.grad(actor_loss)(params[0]), jax.grad(critic_loss)(params[1])


@functools.partial(jax.jit, static_argnums=0)
def plain_adamw(config, params, opt, grads, rates):
  """One optimizer step of actor and critic; `opt` is None at first."""
  found = []
  for p, moments, g, rate in zip(params, opt or (None, None), grads, rates):
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, b1=config.beta1, b2=config.beta2,
                    weight_decay=config.weight_decay))
    updates, moments = tx.update(g, moments or tx.init(p), p)
    found.append((optax.apply_updates(p, updates), moments))
  return tuple(zip(*found))


# ── make_batch ───────────────────────────────────────────────────────────────


def test_targets_are_those_of_a_plain_implementation(
    model, first, made, other, trajectory, rewards):
  batch, metrics = made
  mask = np.asarray(trajectory.loss_mask)
  logprobs, ref_logprobs = (
      picked(plain_policy(model, p, trajectory.tokens, 0.7), trajectory.tokens)
      for p in (first.actor.params, other))
  values = plain_values(model, first.critic.params, trajectory.tokens)
  close((batch.logprobs, batch.ref_logprobs, batch.values),
        (logprobs * mask, ref_logprobs * mask, values * mask),
        rtol=1e-4, atol=1e-4)

  drift = (batch.ref_logprobs - batch.logprobs)**2 / 2
  total = np.asarray(rewards) - 0.3 * drift
  advantages = np.zeros((B, T))
  for row in range(B):
    following, ahead = 0.0, 0.0
    for t in np.flatnonzero(mask[row])[::-1]:
      value = batch.values[row, t]
      ahead = total[row, t] + 0.95 * following - value + 0.95 * 0.9 * ahead
      advantages[row, t], following = ahead, value
  inside = advantages[mask > 0]
  white = (advantages - inside.mean()) / max(inside.std(), 0.1) * mask
  close(batch.returns, (advantages + batch.values) * mask, rtol=1e-4, atol=1e-4)
  close(batch.advantages, white, rtol=1e-4, atol=1e-4)

  np.testing.assert_allclose(
      metrics['ppo/sampler_mismatch'],
      np.abs(batch.logprobs - trajectory.logprobs).max(), rtol=1e-5)
  np.testing.assert_allclose(
      metrics['ppo/sampler_mismatch_mean'],
      np.abs(batch.logprobs - trajectory.logprobs)[mask > 0].mean(), rtol=1e-5)
  np.testing.assert_allclose(
      metrics['ppo/reference_kl'], drift[mask > 0].mean(), rtol=1e-4)
  returns = batch.returns[mask > 0]
  residual = returns - batch.values[mask > 0]
  np.testing.assert_allclose(
      metrics['critic/explained_variance'],
      1 - residual.var() / returns.var(), rtol=1e-3, atol=1e-3)


def test_what_was_not_sampled_has_no_target(made, trajectory):
  batch, _ = made
  off = np.asarray(trajectory.loss_mask) == 0
  for name in ('logprobs', 'ref_logprobs', 'values', 'advantages', 'returns'):
    assert (getattr(batch, name)[off] == 0).all()


def test_recorded_logprobs_that_agree_have_no_mismatch(
    learner, state, made, other, trajectory, rewards):
  same = trajectory.replace(logprobs=jnp.asarray(made[0].logprobs))
  _, metrics = learner.make_batch(state, other, same, rewards)
  assert metrics['ppo/sampler_mismatch'] == 0
  assert metrics['ppo/sampler_mismatch_mean'] == 0


# ── update ───────────────────────────────────────────────────────────────────


def test_the_ratio_is_one_on_the_first_update(
    learner, first, state, made, trajectory):
  batch = jax.tree.map(jnp.asarray, made[0])
  new, metrics = learner.update(state, batch, jax.random.key(0))
  assert 0 <= metrics['ppo/approx_kl'] < 1e-9
  assert metrics['ppo/clip_fraction'] == metrics['critic/clip_fraction'] == 0
  weights = losses.weights(trajectory.loss_mask, 'trajectory')
  np.testing.assert_allclose(
      metrics['ppo/policy_loss'], -(weights * batch.advantages).sum(),
      rtol=1e-4)
  assert new.step == 1
  moved = optax.tree.norm(
      jax.tree.map(jnp.subtract, new.actor.params, first.actor.params))
  np.testing.assert_allclose(moved, 0.05 / 5, rtol=1e-3)  # the clipped norm
  # Half of ten steps of warm-up for the actor, a fifth for the critic.
  np.testing.assert_allclose(metrics['ppo/learning_rate'], 0.05 / 5)
  np.testing.assert_allclose(metrics['critic/learning_rate'], 0.02 / 2)
  new, metrics = learner.update(new, batch, jax.random.key(1))
  assert new.step == 2 and metrics['ppo/approx_kl'] > 1e-9
  np.testing.assert_allclose(metrics['ppo/learning_rate'], 0.05 * 2 / 5)
  np.testing.assert_allclose(metrics['critic/learning_rate'], 0.02)


def test_masked_tokens_change_nothing(learner, first, made):
  """Retrieved text, prompts and padding have no gradient in either loss."""
  batch, _ = made
  rng = np.random.default_rng(4)
  off = batch.loss_mask == 0
  garbage = {
      name: np.where(
          off, rng.normal(0, 5, (B, T)), getattr(batch, name)).astype(
              np.float32)
      for name in ('logprobs', 'values', 'advantages', 'returns')}
  # What stands behind the last token is seen by none.
  tokens = np.where(batch.token_mask == 0, 5, batch.tokens)
  dirty = batch.replace(tokens=tokens, **garbage)
  found = [
      learner.update(
          jax.device_put(first, learner.shardings),
          jax.tree.map(jnp.asarray, b), jax.random.key(0))
      for b in (batch, dirty)]
  jax.tree.map(
      np.testing.assert_array_equal, found[0][0], found[1][0])
  for name in ('ppo/policy_loss', 'ppo/grad_norm', 'critic/grad_norm'):
    assert found[0][1][name] == found[1][1][name] != 0


def test_update_is_that_of_a_plain_implementation(
    model, layout, first, made):
  """Which has minibatches and no microbatches: those do not show."""
  config = dataclasses.replace(
      PLAIN, epochs=2, minibatch_size=8, microbatch_size=2,
      entropy_coef=0.05, optimizer='adamw', weight_decay=0.1, beta2=0.95,
      actor_lr=2e-3, critic_lr=2e-3)
  batch = jax.tree.map(jnp.asarray, made[0])
  one = make(model, layout, config)
  key = jax.random.key(3)
  params = jax.tree.map(
      jnp.asarray, (first.actor.params, first.critic.params))
  state = one.start(params[0])
  found, metrics = one.update(
      state.replace(critic=state.critic.replace(
          params=jax.tree.map(jnp.copy, params[1]))), batch, key)

  opt, norms, count = None, [], 0
  for epoch_key in jax.random.split(key, 2):
    order = jax.random.permutation(epoch_key, B)
    for rows in (order[0::2], order[1::2]):
      count += 1  # of 40 steps, 20 and 8 are warm-up
      rates = (2e-3 * min(count / 20, 1), 2e-3 * min(count / 8, 1))
      part = jax.tree.map(lambda x, at=rows: x[at], batch)
      grads = plain_grads(model, config, params, part)
      params, opt = plain_adamw(config, params, opt, grads, rates)
      norms.append([optax.tree.norm(g) for g in grads])
  np.testing.assert_allclose(
      [metrics['ppo/grad_norm'], metrics['critic/grad_norm']],
      np.mean(norms, axis=0), rtol=1e-3)
  for new, expected, old in zip(
      (found.actor.params, found.critic.params), params,
      (first.actor.params, first.critic.params)):
    close(new, expected, atol=2e-5)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), new, old)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_eight_devices_are_one(
    model, eight, learner, first, other, trajectory, rewards, made):
  expected, expected_metrics = learner.update(
      jax.device_put(first, learner.shardings),
      jax.tree.map(jnp.asarray, made[0]), jax.random.key(0))
  many = make(model, eight)
  state = jax.device_put(first, many.shardings)
  reference = jax.device_put(other, many.shardings.actor.params)
  batch, metrics = many.make_batch(
      state, reference, *sharding.shard_batch((trajectory, rewards), eight))
  close((batch, metrics), made, rtol=1e-3, atol=2e-4)
  found, metrics = many.update(state, batch, jax.random.key(0))
  close(found, expected, rtol=1e-4, atol=1e-5)
  close(metrics, expected_metrics, rtol=2e-3, atol=1e-4)
  # Every parameter lies where it should, and stays there.
  shards = (eight.size('vocab'), eight.size('embed'))
  embedding = found.actor.params['embedding']
  assert embedding.addressable_shards[0].data.shape == (
      model.vocab_size // shards[0], model.embed // shards[1])
  placed = jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found,
      many.shardings)
  assert all(jax.tree.leaves(placed)), placed


# ── What lies in host memory ─────────────────────────────────────────────────


def kinds(tree):
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_offloading_changes_where_arrays_lie_and_no_bit(
    model, params, other, trajectory, rewards):
  config = dataclasses.replace(PLAIN, optimizer='adamw', microbatch_size=16)
  layout = sharding.Layout(
      sharding.make_mesh((2, 2, 2), jax.devices()[:8]))
  rows = sharding.shard_batch((trajectory, rewards), layout)
  found = []
  for offload in ((), learner_lib.OFFLOADS):
    one = learner_lib.Learner(model, config, layout, B, STEPS, offload)
    state, reference = one.start(params), one.freeze(other)
    for step in range(2):
      batch, targets = one.make_batch(state, reference, *rows)
      old = state
      state, metrics = one.update(state, batch, jax.random.key(step))
      assert all(x.is_deleted() for x in jax.tree.leaves(old))
    host = {sharding.HOST if offload else 'device'}
    assert kinds(reference) == host
    assert kinds((state.actor.opt_state, state.critic.opt_state)) == host
    assert kinds((state.actor.params, state.critic.params)) == {'device'}
    assert one._update._cache_size() == one._make_batch._cache_size() == 1
    found.append(jax.device_get((state, batch, targets, metrics)))
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_what_cannot_be_offloaded_is_refused(model, layout, monkeypatch):
  make_one = lambda *offload: learner_lib.Learner(
      model, PLAIN, layout, B, STEPS, offload)
  with pytest.raises(ValueError, match=r"offload = \('critic',\): what can"):
    make_one('critic')
  monkeypatch.setattr(sharding, 'HOST', 'elsewhere')
  with pytest.raises(ValueError, match='cpu backend offer no elsewhere'):
    make_one('optimizer')


# ── Adapters ─────────────────────────────────────────────────────────────────

LORA = lora.Config(rank=2, alpha=3.0, targets=('q', 'v', 'o', 'up', 'down'))


@pytest.fixture(scope='module')
def adapted(model, layout, other):
  """A model, its learner and a state none of whose adapters is zero."""
  rng = np.random.default_rng(4)
  model = dataclasses.replace(model, lora=LORA)
  one = make(model, layout, dataclasses.replace(
      PLAIN, actor_lr=1.0, critic_lr=1.0, actor_warmup=0.0, critic_warmup=0.0,
      max_grad_norm=1e9))
  state = jax.tree.map(np.asarray, one.start(other, jax.random.key(0)))
  for learnt in (state.actor, state.critic):
    learnt.params.update(jax.tree.map(
        lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32),
        learnt.params))
  return model, one, state


def test_adapters_learn_by_the_chain_rule(
    model, adapted, other, trajectory, rewards):
  """Their gradients are those of a plain implementation's kernels, projected.

  With K = W + c A B: dA = c dK B^T and dB = c A^T dK.
  """
  with_lora, one, first = adapted
  reference = one.freeze(other)
  state = jax.device_put(first, one.shardings)
  batch, metrics = one.make_batch(state, reference, trajectory, rewards)
  found, _ = one.update(state, batch, jax.random.key(0), reference)
  jax.tree.map(np.testing.assert_array_equal, reference, other)

  whole = [
      lora.merge(LORA, lora.Adapted(other, adapters), jnp.float32)
      for adapters in (first.actor.params, first.critic.params['trunk'])]
  critic = {'trunk': whole[1], 'head': jnp.asarray(first.critic.params['head'])}
  mask, tokens = trajectory.loss_mask, trajectory.tokens
  for name, params in (('logprobs', whole[0]), ('ref_logprobs', other)):
    np.testing.assert_allclose(
        getattr(batch, name), mask * picked(
            plain_policy(model, params, tokens, PLAIN.temperature), tokens),
        rtol=1e-4, atol=2e-4)
  np.testing.assert_allclose(
      batch.values, mask * plain_values(model, critic, tokens), rtol=1e-4,
      atol=2e-4)
  assert metrics['ppo/reference_kl'] > 1e-3

  grads = plain_grads(model, PLAIN, (whole[0], critic), batch)
  head = lambda learnt: learnt.critic.params['head']
  np.testing.assert_allclose(
      head(first) - head(found), grads[1]['head'], rtol=1e-3, atol=1e-5)
  matrix = lambda x, *shape: np.asarray(x, np.float64).reshape(len(x), *shape)
  for old, new, grad in (
      (first.actor.params, found.actor.params, grads[0]),
      (first.critic.params['trunk'], found.critic.params['trunk'],
       grads[1]['trunk'])):
    for block, kernels in old['layers'].items():
      for name, pair in kernels.items():
        a, b = matrix(pair['a'], -1, 2), matrix(pair['b'], 2, -1)
        slope = 1.5 * matrix(
            grad['layers'][block][name], a.shape[1], b.shape[2])
        for which, expected in (
            ('a', slope @ b.swapaxes(1, 2)), ('b', a.swapaxes(1, 2) @ slope)):
          change = pair[which] - np.asarray(new['layers'][block][name][which])
          np.testing.assert_allclose(
              change.reshape(expected.shape), expected, rtol=2e-3,
              atol=2e-3 * np.abs(expected).max())
          assert np.abs(expected).max() > 1e-6


@pytest.mark.parametrize('eight', [
    ((2, 2, 2), {}, {}),
    ((1, 4, 2), dict(
        batch=('data', 'fsdp', 'tensor'), embed=('fsdp', 'tensor'), vocab=(),
        heads=(), kv_heads=(), mlp=()), {})], indirect=True)
def test_adapters_on_eight_devices_are_those_on_one(
    adapted, eight, other, trajectory, rewards):
  with_lora, one, first = adapted
  found = []
  for learner in (one, make(with_lora, eight, one.config)):
    state = jax.device_put(first, learner.shardings)
    reference = learner.freeze(other)
    batch, targets = learner.make_batch(
        state, reference, *sharding.shard_batch(
            (trajectory, rewards), learner.layout))
    state, metrics = learner.update(
        state, batch, jax.random.key(0), reference)
    assert jax.tree.all(jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state,
        learner.shardings))
    found.append(jax.device_get((batch, targets, state, metrics)))
  close(*found, rtol=2e-3, atol=2e-4)


# ── States and sizes ─────────────────────────────────────────────────────────


def test_start_keeps_what_it_was_given(learner, params, made):
  """The policy that RL starts from stays the reference, its buffers its own."""
  state = learner.start(params)
  assert (state.critic.params['head'] == 0).all()
  jax.tree.map(
      np.testing.assert_array_equal, state.critic.params['trunk'],
      {name: x for name, x in params.items() if name != 'lm_head'})
  before = jax.tree.map(np.array, params)
  learner.update(
      state, jax.tree.map(jnp.asarray, made[0]), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_split_and_join_are_inverse():
  tree = {'x': jnp.arange(24.0).reshape(12, 2), 'y': jnp.arange(12)}
  for pieces in (1, 3, 4, 12):
    parts = learner_lib._split(tree, pieces)
    assert parts['x'].shape == (pieces, 12 // pieces, 2)
    np.testing.assert_array_equal(parts['y'][0], np.arange(0, 12, pieces))
    jax.tree.map(
        np.testing.assert_array_equal, learner_lib._join(parts), tree)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(minibatch_size=5), r'minibatch_size = 5 .*batch_size = 16'),
        (dict(minibatch_size=0), 'minibatch_size = 0'),
        (dict(microbatch_size=3), r'microbatch_size = 3 .*minibatch_size = 16'),
        (dict(average='mean'), "average = 'mean'"),
        (dict(kl_kind='k4'), "kl_kind = 'k4'"),
        (dict(optimizer='adamax'), "optimizer = 'adamax'"),
        (dict(epochs=0), 'epochs = 0'),
    ],
)
def test_impossible_options_are_refused(model, layout, change, says):
  with pytest.raises(ValueError, match=says):
    make(model, layout, dataclasses.replace(PLAIN, **change))


def test_microbatches_that_the_mesh_cannot_split_are_refused(model, eight):
  with pytest.raises(ValueError, match='microbatch_size = 2'):
    make(model, eight, dataclasses.replace(PLAIN, microbatch_size=2))


@pytest.mark.parametrize('name', policy.OPTIMIZERS)
def test_every_optimizer_lays_its_state_out(name, model, eight):
  tx = policy.optimizer(name, 0.9, 0.999, 0.01, 1.0)
  params = jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))
  laid_out = policy.shardings(tx, params, qwen.axes(model)[0], eight)
  state = jax.eval_shape(tx.init, params)
  # Raises where a dimension does not divide or the ranks differ.
  for x, s in zip(
      jax.tree.leaves(state), jax.tree.leaves(laid_out.opt_state),
      strict=True):
    s.shard_shape(x.shape)


def test_the_tiny_run_s_update_is_the_same_for_twenty_steps_on_eight_devices(
    layout, trajectory):
  """Its model and coefficients, packed; everything split over two axes."""
  config = config_lib.load(str(_ROOT / 'configs/tiny.py'))
  sizes = config.model.to_dict()
  for name in ('pretrained', 'attention'):
    del sizes[name]
  model = qwen.Config(**sizes | dict(vocab_size=64, layers=2))
  ppo = learner_lib.Config(
      **config.ppo.to_dict() | dict(microbatch_size=8, minibatch_size=8))
  if len(jax.devices()) < 8:
    pytest.skip('fewer than 8 devices; unset XLA_FLAGS and JAX_PLATFORMS')
  spread = sharding.Layout(
      sharding.make_mesh((1, 4, 2), jax.devices()[:8]),
      sharding.rules(
          dict(batch=('fsdp', 'tensor'), embed=('fsdp', 'tensor')),
          'sharding.update'))
  curves = []
  for where in (layout, spread):
    learner = make(model, where, ppo)
    state = learner.init(jax.random.key(0))
    reference = learner.freeze(state.actor.params)
    rows = []
    for step in range(20):
      rewards = np.random.default_rng(step).normal(
          size=(B, T)) * trajectory.loss_mask
      batch, _ = learner.make_batch(
          state, reference,
          *sharding.shard_batch(
              (trajectory, np.asarray(rewards, np.float32)), where))
      state, metrics = learner.update(state, batch, jax.random.key(step))
      rows.append([
          float(metrics[name]) for name in (
              'ppo/policy_loss', 'critic/loss', 'ppo/grad_norm', 'ppo/entropy')
      ])
    curves.append(np.asarray(rows))
  assert np.ptp(curves[0][:, 1]) > 0.1  # it does learn meanwhile
  np.testing.assert_allclose(curves[1], curves[0], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize('average', ['trajectory', 'token'])
def test_packed_targets_and_update_are_the_unpacked_ones(
    model, params, other, trajectory, rewards, average):
  layout = sharding.Layout(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
  config = dataclasses.replace(
      PLAIN, average=average, minibatch_size=8, microbatch_size=2, epochs=2,
      entropy_coef=0.1)
  found = {}
  for packed in (False, True):
    learner = make(
        model, layout, dataclasses.replace(config, packing=packed))
    state = learner.start(params)
    batch, targets = learner.make_batch(state, other, trajectory, rewards)
    state, metrics = learner.update(state, batch, jax.random.key(3))
    found[packed] = jax.device_get(
        (batch, targets, state.actor.params, state.critic.params, metrics))
  fill = [found[packed][-1].pop('ppo/row_fill') for packed in (False, True)]
  assert fill[0] == pytest.approx(
      float(np.mean(trajectory.token_mask))) and fill[1] > fill[0]
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      *found.values())


def test_packed_gradients_are_the_unpacked_ones(
    model, params, other, trajectory, rewards):
  # One step of plain descent: the change of a parameter is its gradient.
  config = dataclasses.replace(
      PLAIN, actor_lr=1.0, critic_lr=1.0, actor_warmup=0.0, critic_warmup=0.0,
      max_grad_norm=1e9, microbatch_size=4)
  layout = sharding.Layout(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
  changes = []
  for packed in (False, True):
    learner = make(model, layout, dataclasses.replace(config, packing=packed))
    state = learner.start(params)
    before = jax.device_get((state.actor.params, state.critic.params))
    batch, _ = learner.make_batch(state, other, trajectory, rewards)
    state, _ = learner.update(state, batch, jax.random.key(3))
    changes.append(jax.tree.map(
        np.subtract, before,
        jax.device_get((state.actor.params, state.critic.params))))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *changes)
  assert max(np.abs(x).max() for x in jax.tree.leaves(changes[0])) > 1e-2


def test_packing_on_eight_devices(
    model, params, other, trajectory, rewards):
  found = []
  config = dataclasses.replace(PLAIN, packing=True)
  for shape in ((1, 1, 1), (2, 2, 2)):
    layout = sharding.Layout(
        sharding.make_mesh(shape, jax.devices()[:int(np.prod(shape))]))
    learner = make(model, layout, config)
    state = learner.start(params)
    batch, _ = learner.make_batch(
        state, other, sharding.shard_batch(trajectory, layout),
        sharding.shard_batch(rewards, layout))
    state, metrics = learner.update(state, batch, jax.random.key(3))
    found.append(jax.device_get((batch, state.actor.params, metrics)))
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
      *found)
