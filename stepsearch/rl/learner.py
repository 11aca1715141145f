"""Where model meets maths: states, targets and the PPO update.

    make_batch: trajectory + rewards ─▶ log-probs, values, GAE ─▶ Batch
    update:     epochs x minibatches x microbatches ─▶ new TrainState, metrics

Owns the step-wise objective of StePPO (arXiv 2505.15107, Eq. 1): PPO over the
tokens that the actor sampled, whose rewards carry the per-turn terms and the KL
to the frozen reference. One compiled function each; `update` donates its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepsearch import sharding
from stepsearch import types
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rl import advantages
from stepsearch.rl import losses
from stepsearch.rl import packing
from stepsearch.rl import policy

Params = Any
Metrics = dict[str, jax.Array]
# Leaves that are traced: a sweep over them compiles once.
COEFFICIENTS = (
    'gamma', 'gae_lambda', 'clip_eps', 'value_clip', 'kl_coef', 'entropy_coef',
    'whiten_floor', 'temperature', 'actor_lr', 'critic_lr')
# What may lie in host memory while it is not needed: both optimizer states,
# except in `update`, and the reference, except in `make_batch` (with adapters
# in `update` too, and while weights are made for decoding).
OFFLOADS = ('optimizer', 'reference')


@dataclasses.dataclass(frozen=True)
class Config:
  """What shapes the update; the leaves of `config.ppo`."""

  epochs: int = 1
  minibatch_size: int = 64  # episodes per optimizer step
  microbatch_size: int = 32  # rows per forward and backward pass
  packing: bool = False  # short episodes share a row
  gamma: float = 1.0  # per sampled token
  gae_lambda: float = 1.0
  clip_eps: float = 0.2
  value_clip: float = 0.5
  kl_coef: float = 1e-3  # on the token rewards, to the reference
  kl_kind: str = 'k1'  # k1 | k2 | k3
  entropy_coef: float = 0.0
  average: str = 'trajectory'  # trajectory (paper) | token (released)
  whiten_floor: float = 0.1
  temperature: float = 1.0  # of the policy that sampled
  logprob_chunk: int = 256  # positions of a row whose logits exist at a time
  actor_lr: float = 7e-7
  critic_lr: float = 7e-6
  actor_warmup: float = 0.285  # share of all optimizer steps
  critic_warmup: float = 0.015
  optimizer: str = 'adamw'
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  max_grad_norm: float = 1.0


@struct.dataclass
class TrainState:
  """Everything that learns; what a checkpoint holds.

  With `config.lora` these are adapters, and the critic's head; the base of
  both is the reference.
  """

  step: jax.Array  # [] int32, finished updates
  actor: policy.ModelState
  critic: policy.ModelState


def _split(tree, pieces):
  """[B, ...] -> [pieces, B / pieces, ...], row i into piece i % pieces.

  The stride keeps rows on the device where they lie: a batch sharded over its
  leading axis is split without moving anything.
  """
  return jax.tree.map(
      lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), tree)


def _join(tree):
  """Inverse of `_split`."""
  return jax.tree.map(
      lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


class Learner:
  """The jitted functions for one model shape, PPO config and layout.

  Attributes:
    make_batch: (state, reference, trajectory, rewards) -> (Batch, metrics).
    update: (state, batch, key, reference) -> (TrainState, metrics); donates
      `state`.
    shardings: a `TrainState` of `NamedSharding`s: where a state lies between
      calls, in host memory for what is offloaded.
    shapes: a `TrainState` of shapes with these.
    reference_shapes: of the frozen policy, likewise.
  """

  def __init__(
      self, model: qwen.Config, config: Config, layout: sharding.Layout,
      batch_size: int, num_steps: int, offload: Sequence[str] = (),
  ):
    """Checks the sizes; compiles nothing yet.

    Args:
      model: sizes that actor, critic and reference share.
      config: the leaves of `config.ppo`.
      layout: of the update.
      batch_size: episodes a step, over all devices.
      num_steps: learner steps of the whole run; warm-up shares refer to it.
      offload: out of `OFFLOADS`.

    Raises:
      ValueError: sizes that do not divide; an unknown option; devices without
        host memory.
    """
    _check(config, layout, batch_size, offload)
    self.config = config
    self.layout = layout
    self._model = model
    self._actor = qwen.Qwen(model, layout)
    self._critic = qwen.Critic(model, layout)
    self._tx = policy.optimizer(
        config.optimizer, config.beta1, config.beta2, config.weight_decay,
        config.max_grad_norm)
    self._minibatches = batch_size // config.minibatch_size
    self._microbatches = config.minibatch_size // config.microbatch_size
    self._updates_per_step = config.epochs * self._minibatches
    total = max(num_steps, 1) * self._updates_per_step
    self._coefficients = {
        name: jnp.float32(getattr(config, name)) for name in COEFFICIENTS}
    self._coefficients['actor_ramp'], self._coefficients['critic_ramp'] = (
        jnp.float32(max(round(share * total), 1))
        for share in (config.actor_warmup, config.critic_warmup))

    everywhere, rows = layout.replicated, layout.rows
    self._working = self._state_shardings()
    self._whole = self._resting = layout.place(qwen.axes(model)[0])
    self.shardings = self._working
    if 'optimizer' in offload:
      self.shardings = self._working.replace(
          actor=_rest(self._working.actor), critic=_rest(self._working.critic))
    if 'reference' in offload:
      self._resting = sharding.on_host(self._resting)
    self._init = jax.jit(
        lambda key: self._fresh(qwen.init(model, key), key),
        out_shardings=self._working)
    self.shapes = sharding.shapes(
        jax.eval_shape(self._init, jax.random.key(0)), self.shardings)
    # Copied: what jit passes through would share the caller's buffers, and
    # `update` donates them.
    self._freeze = jax.jit(
        lambda actor: qwen.compact(
            model, jax.tree.map(jnp.copy, actor)),
        out_shardings=self._whole)
    self.reference_shapes = sharding.shapes(
        jax.eval_shape(
            lambda: self._freeze(qwen.init(model, jax.random.key(0)))),
        self._resting)
    self._start = jax.jit(
        lambda actor, key: self._fresh(jax.tree.map(jnp.copy, actor), key),
        out_shardings=self._working)
    self._make_batch = jax.jit(
        self._targets, out_shardings=(rows, everywhere))
    self._update = jax.jit(
        self._ppo, donate_argnums=(0,),
        out_shardings=(self._working, everywhere))
    self._lengths = jax.jit(
        lambda mask: jnp.sum(mask, axis=-1).astype(jnp.int32),
        out_shardings=everywhere)

  def init(self, key: jax.Array) -> TrainState:
    """Step 0 of a random actor; the critic shares its trunk, head zero."""
    return jax.device_put(self._init(key), self.shardings)

  def start(
      self, actor: Params, key: jax.Array | None = None
  ) -> TrainState:
    """Step 0 of given actor parameters, with fresh critic and optimizers.

    Args:
      actor: all parameters; copied. Adapters start beside them, which are then
        not kept here: `freeze` makes the reference of them.
      key: draws the adapters; needed with `config.lora` only.
    """
    return jax.device_put(self._start(actor, key), self.shardings)

  def freeze(self, actor: Params) -> Params:
    """A copy as the reference: in the computation's dtype."""
    return jax.device_put(self._freeze(actor), self._resting)

  def policy(self, state: TrainState, reference: Params) -> Params:
    """What plays: the actor's parameters, or its base and adapters."""
    return _adapted(state.actor.params, self._base(reference))

  def policy_shapes(self) -> Params:
    """What `policy` gives, as shapes on the device, whatever is offloaded."""
    return self.policy(
        self.shapes, sharding.shapes(self.reference_shapes, self._whole))

  def make_batch(
      self, state: TrainState, reference: Params,
      trajectory: types.Trajectory, rewards: jax.Array,
  ) -> tuple[types.Batch, Metrics]:
    """Log-probs under pi_old and reference, values, GAE, whitening.

    pi_old is recomputed by the function that `update` differentiates, so the
    ratio is 1 on the first minibatch whatever sampled the tokens; the recorded
    log-probs are compared with it: `ppo/sampler_mismatch` and `…_mean`, the
    largest and the mean absolute difference over the batch, in nats.

    Args:
      state: actor and critic that define pi_old and the values.
      reference: the frozen policy, from `freeze`.
      trajectory: [B, T] arrays as sampled.
      rewards: [B, T] float32, turn and global rewards at their tokens.
    """
    plan = None
    if self.config.packing:
      plan = self._plan(
          np.asarray(self._lengths(trajectory.token_mask)),
          trajectory.tokens.shape[1])
    return self._make_batch(
        state.actor.params, state.critic.params,
        sharding.on_device(reference), trajectory, rewards, plan,
        self._coefficients)

  def update(
      self, state: TrainState, batch: types.Batch, key: jax.Array,
      reference: Params | None = None,
  ) -> tuple[TrainState, Metrics]:
    """One learner step: every epoch and minibatch, in one program.

    Args:
      state: donated.
      batch: from `make_batch`.
      key: orders the minibatches.
      reference: from `freeze`; needed with `config.lora` only.
    """
    plans = None
    if self.config.packing:
      size, width = batch.tokens.shape
      plans = self._plans(
          np.asarray(self._lengths(batch.token_mask)), width,
          np.asarray(self._orders(key, size)))
    state, metrics = self._update(
        sharding.on_device(state, donate=True), batch, key,
        sharding.on_device(self._base(reference)), plans, self._coefficients)
    return jax.device_put(state, self.shardings), metrics

  def lower(
      self, trajectory: types.Trajectory
  ) -> dict[str, Callable[[], Any]]:
    """`make_batch` and `update` for devices that need not be there.

    Args:
      trajectory: of shapes [B, T] with shardings; all rows count as full, so
        that packing saves nothing.

    Returns:
      by name, what gives a `jax.stages.Lowered`: `logprobs` and `update`.
    """
    size, width = trajectory.tokens.shape
    lengths, order = np.full(size, width), np.arange(size)
    float32 = jax.ShapeDtypeStruct(
        (size, width), jnp.float32, sharding=self.layout.rows)
    batch = types.Batch(*(float32,) * len(dataclasses.fields(types.Batch)))
    batch = batch.replace(tokens=jax.ShapeDtypeStruct(
        (size, width), jnp.int32, sharding=self.layout.rows))
    # What is offloaded is brought back before the programs start.
    state = sharding.shapes(self.shapes, self._working)
    reference = sharding.shapes(self.reference_shapes, self._whole)
    plan = plans = None
    if self.config.packing:
      plan = self._plan(lengths, width)
      plans = self._plans(
          lengths, width, np.stack([order] * self.config.epochs))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {
        'logprobs': lambda: self._make_batch.lower(
            state.actor.params, state.critic.params, reference, trajectory,
            float32, plan, self._coefficients),
        'update': lambda: self._update.lower(
            state, batch, key, self._base(reference), plans,
            self._coefficients),
    }

  def _plan(self, lengths, width):
    """How `make_batch` packs all rows."""
    return packing.plan(
        lengths, range(len(lengths)), width, self.config.microbatch_size,
        self._minibatches * self._microbatches)

  def _plans(self, lengths, width, orders):
    """How `update` packs the rows of every epoch and minibatch."""
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    return stack(
        stack(
            packing.plan(
                lengths, order[i::self._minibatches], width,
                self.config.microbatch_size, self._microbatches)
            for i in range(self._minibatches))
        for order in orders)

  # -- states ----------------------------------------------------------------

  def _base(self, reference):
    """What the adapters are added to; None where everything learns."""
    return None if self._model.lora is None else reference

  def _fresh(self, actor, key):
    if self._model.lora is None:
      critic = qwen.init_critic(self._model, actor)
    else:
      actor, trunk = (
          lora.init(self._model.lora, actor, x) for x in jax.random.split(key))
      critic = {
          'trunk': trunk, 'head': jnp.zeros((self._model.embed,), jnp.float32)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        actor=policy.ModelState(actor, self._tx.init(actor)),
        critic=policy.ModelState(critic, self._tx.init(critic)))

  def _state_shardings(self):
    key = jax.random.key(0)
    state = jax.eval_shape(
        lambda: self._fresh(qwen.init(self._model, key), key))
    all_axes = qwen.axes(self._model)
    if self._model.lora is not None:
      adapters = lora.axes(self._model.lora, all_axes[0])
      all_axes = adapters, {'trunk': adapters, 'head': all_axes[1]['head']}
    actor, critic = (
        policy.shardings(self._tx, model.params, axes, self.layout)
        for model, axes in zip((state.actor, state.critic), all_axes))
    return TrainState(
        step=self.layout.replicated, actor=actor, critic=critic)

  # -- targets ---------------------------------------------------------------

  def _values(self, params, base, tokens, places=None):
    variables = {'params': params}
    if base is not None:
      variables = {
          'params': {'trunk': base, 'head': params['head']},
          'lora': {'trunk': params['trunk']}}
    at, segments = places or (policy.positions(tokens), None)
    values = self._critic.apply(variables, tokens, at, segments)
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))

  def _logprobs(self, params, base, tokens, temperature, places=None):
    return policy.next_token_logprobs(
        self._actor, _adapted(params, base), tokens, temperature,
        self.config.logprob_chunk, places)

  def _rows(self, tree):
    """Arrays [B, ...] as the update splits them, wherever they lie."""
    return jax.tree.map(lambda x: self.layout.constrain(
        x, 'batch', *(None,) * (x.ndim - 1)), tree)

  def _packed(self, tree, source):
    """[B, T] arrays -> [N, R, T] as `source` packs them, and their places."""
    put = lambda x: self.layout.constrain(x, None, 'batch', None)
    return (
        jax.tree.map(lambda x: put(packing.gather(x, source)), tree),
        jax.tree.map(put, packing.places(source)))

  def _targets(
      self, actor, critic, reference, trajectory, rewards, plan, c):
    trajectory, rewards = self._rows((trajectory, rewards))
    mask, base = trajectory.loss_mask, self._base(reference)

    def forward(piece):
      tokens, places = piece
      logprobs, ref_logprobs = (
          self._logprobs(*params, tokens, c['temperature'], places)[0]
          for params in ((actor, base), (reference, None)))
      values = self._values(critic, base, tokens, places)
      return logprobs, ref_logprobs, values

    if plan is None:
      pieces = self._minibatches * self._microbatches
      found = _join(jax.lax.map(
          forward, (_split(trajectory.tokens, pieces), None)))
    else:
      source, passes = plan
      found = jax.tree.map(
          lambda x: packing.scatter(x, source, mask.shape),
          _map(forward, self._packed(trajectory.tokens, source), passes))
    logprobs, ref_logprobs, values = found
    logprobs, ref_logprobs, values = (
        x * mask for x in (logprobs, ref_logprobs, values))
    drift = losses.kl(logprobs, ref_logprobs, self.config.kl_kind)
    rewards = (rewards - c['kl_coef'] * drift) * mask
    raw, returns = advantages.gae(
        rewards, values, mask, c['gamma'], c['gae_lambda'])
    batch = types.Batch(
        tokens=trajectory.tokens, token_mask=trajectory.token_mask,
        loss_mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages.whiten(raw, mask, c['whiten_floor']),
        returns=returns)
    mean = lambda x: advantages.masked_mean(x, mask)
    mismatch = jnp.abs(logprobs - trajectory.logprobs) * mask
    residual = returns - values
    variance = lambda x: mean((x - mean(x))**2)
    metrics = {
        'ppo/reference_kl': mean(drift),
        'ppo/sampler_mismatch': jnp.max(mismatch),
        'ppo/sampler_mismatch_mean': mean(mismatch),
        'ppo/advantage_deviation': jnp.sqrt(variance(raw)),
        'critic/value': mean(values),
        'critic/return': mean(returns),
        'critic/explained_variance': 1.0 - variance(residual) / jnp.maximum(
            variance(returns), 1e-8),
    }
    return batch, metrics

  # -- update ----------------------------------------------------------------

  def _actor_loss(self, params, base, piece, c):
    (batch, weights), places = piece
    logprobs, entropy = self._logprobs(
        params, base, batch.tokens, c['temperature'], places)
    loss, clipped = losses.policy_loss(
        logprobs, batch.logprobs, batch.advantages, c['clip_eps'])
    total = lambda x: jnp.sum(
        jnp.where(batch.loss_mask > 0, x, 0.0) * weights)
    objective = total(loss - c['entropy_coef'] * entropy)
    return objective, {
        'ppo/policy_loss': total(loss),
        'ppo/entropy': total(entropy),
        'ppo/clip_fraction': total(clipped),
        'ppo/approx_kl': total(losses.kl(batch.logprobs, logprobs, 'k3')),
    }

  def _critic_loss(self, params, base, piece, c):
    (batch, weights), places = piece
    values = self._values(params, base, batch.tokens, places)
    loss, clipped = losses.value_loss(
        values, batch.values, batch.returns, c['value_clip'])
    total = lambda x: jnp.sum(
        jnp.where(batch.loss_mask > 0, x, 0.0) * weights)
    objective = total(loss)
    return objective, {
        'critic/loss': objective,
        'critic/clip_fraction': total(clipped),
    }

  def _improve(self, name, model, base, pieces, passes, count, c):
    """One optimizer step of actor or critic on a minibatch's pieces."""
    loss = {'actor': self._actor_loss, 'critic': self._critic_loss}[name]
    grad = jax.grad(loss, has_aux=True)
    grads, metrics = _sum(
        lambda piece: grad(model.params, base, piece, c), pieces, passes)
    # Whole sums of gradients would lie on every device otherwise.
    grads = jax.lax.with_sharding_constraint(
        grads, getattr(self._working, name).params)
    rate = c[f'{name}_lr'] * jnp.minimum((count + 1) / c[f'{name}_ramp'], 1.0)
    prefix = 'ppo' if name == 'actor' else name
    return policy.apply_gradients(self._tx, model, grads, rate), metrics | {
        f'{prefix}/grad_norm': optax.tree.norm(grads),
        f'{prefix}/learning_rate': rate}

  def _orders(self, key, size):
    """The order [epochs, B] in which episodes are dealt to minibatches."""
    return jnp.stack([
        jax.random.permutation(key, size)
        for key in jax.random.split(key, self.config.epochs)])

  def _ppo(self, state, batch, key, base, plans, c):
    def minibatch(carry, x):
      actor, critic, count = carry
      if plans is None:
        weights = losses.weights(x.loss_mask, self.config.average)
        pieces, passes = (
            (_split((x, weights), self._microbatches), None),
            self._microbatches)
      else:
        source, passes = x
        here = packing.scatter(
            jnp.ones(source.shape), source, batch.tokens.shape)
        weights = losses.weights(
            batch.loss_mask * here, self.config.average)
        pieces = self._packed((batch, weights), source)
      new, metrics = [], {}
      for name, model in (('actor', actor), ('critic', critic)):
        model, found = self._improve(
            name, model, base, pieces, passes, count, c)
        new.append(model)
        metrics |= found
      return (*new, count + 1), metrics

    def epoch(carry, x):
      if plans is None:
        shuffled = jax.tree.map(lambda y: y[x], batch)
        x = _split(shuffled, self._minibatches)
      return jax.lax.scan(minibatch, carry, x)

    carry = (state.actor, state.critic,
             (state.step * self._updates_per_step).astype(jnp.float32))
    (actor, critic, _), metrics = jax.lax.scan(
        epoch, carry, self._orders(key, batch.tokens.shape[0])
        if plans is None else plans)
    metrics = jax.tree.map(jnp.mean, metrics)
    tokens = jnp.sum(batch.token_mask)
    slots = batch.tokens.size
    if plans is not None:
      rows = self.config.microbatch_size * jnp.sum(plans[1])
      slots = rows * batch.tokens.shape[1] / self.config.epochs
    metrics['ppo/row_fill'] = tokens / slots
    return TrainState(state.step + 1, actor, critic), metrics


def _adapted(params, base):
  return params if base is None else lora.Adapted(base, params)


def _rest(model):
  """Shardings of a `ModelState` whose optimizer is not needed."""
  return model.replace(opt_state=sharding.on_host(model.opt_state))


def _piece(pieces, i):
  return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), pieces)


def _map(function, pieces, passes):
  """As lax.map over the first `passes` of the pieces [N, ...], then zeros.

  `passes` may be traced: one program serves every packing.
  """
  count = jax.tree.leaves(pieces)[0].shape[0]
  outputs = jax.tree.map(
      lambda x: jnp.zeros((count, *x.shape), x.dtype),
      jax.eval_shape(function, _piece(pieces, 0)))

  def one(i, outputs):
    return jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0),
        outputs, function(_piece(pieces, i)))

  return jax.lax.fori_loop(0, passes, one, outputs)


def _sum(function, pieces, passes):
  """Sum of function(piece) over the first `passes` of the pieces [N, ...]."""
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(function, _piece(pieces, 0)))
  return jax.lax.fori_loop(
      0, passes, lambda i, total: jax.tree.map(
          jnp.add, total, function(_piece(pieces, i))), zeros)


def _check(config, layout, batch_size, offload):
  for field, value, of, size in (
      ('minibatch_size', config.minibatch_size, 'config.batch_size',
       batch_size),
      ('microbatch_size', config.microbatch_size,
       'config.ppo.minibatch_size', config.minibatch_size)):
    if value < 1 or size % value:
      raise ValueError(
          f'config.ppo.{field} = {value} does not divide {of} = {size}: '
          f'choose a divisor of {size}.')
  shards = layout.shards
  if config.microbatch_size % shards:
    raise ValueError(
        f'config.ppo.microbatch_size = {config.microbatch_size} cannot be '
        f'split over the {shards} shards of config.sharding.update.batch = '
        f'{layout.axes("batch")!r}: choose a multiple of {shards}.')
  for field, options in (
      ('average', ('trajectory', 'token')), ('kl_kind', ('k1', 'k2', 'k3')),
      ('optimizer', policy.OPTIMIZERS)):
    value = getattr(config, field)
    if value not in options:
      raise ValueError(
          f'config.ppo.{field} = {value!r}: choose one of {options}.')
  if config.epochs < 1:
    raise ValueError(f'config.ppo.epochs = {config.epochs}: at least 1.')
  if not set(offload) <= set(OFFLOADS):
    raise ValueError(
        f'config.offload = {tuple(offload)!r}: what can lie in host memory is '
        f'{" and ".join(OFFLOADS)}.')
  if offload and not sharding.has_host_memory(layout):
    raise ValueError(
        f'config.offload = {tuple(offload)!r}: the devices of this '
        f'{layout.platform} backend offer no {sharding.HOST} memory; leave it '
        'out.')
