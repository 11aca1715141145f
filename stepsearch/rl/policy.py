"""What RL and warm-up both do with a model: log-probs and optimizer steps."""

from __future__ import annotations

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from stepsearch import sharding
from stepsearch.models import lora
from stepsearch.models import qwen
from stepsearch.rl import losses

Params = Any
OPTIMIZERS = ('adamw', 'adam', 'adafactor', 'sgd')


@struct.dataclass
class ModelState:
  """What learns in one model."""

  params: Params  # float32
  opt_state: Any  # optax; moments are laid out as the parameters


def optimizer(
    name: str, beta1: float, beta2: float, weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
  """Global-norm clipping and the named optimizer, at a learning rate of 1.

  The caller multiplies the updates by its learning rate, which so can be a
  traced argument.
  """
  if name == 'adamw':
    inner = optax.adamw(1.0, b1=beta1, b2=beta2, weight_decay=weight_decay)
  elif name == 'adam':
    inner = optax.adam(1.0, b1=beta1, b2=beta2)
  elif name == 'adafactor':
    inner = optax.adafactor(1.0, multiply_by_parameter_scale=False)
  elif name == 'sgd':
    inner = optax.sgd(1.0)
  else:
    raise ValueError(
        f'config.ppo.optimizer = {name!r}: choose one of {OPTIMIZERS}.')
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), inner)


def apply_gradients(
    tx: optax.GradientTransformation, state: ModelState, grads: Params,
    rate: jax.Array,
) -> ModelState:
  """One optimizer step at the given learning rate."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
  return ModelState(params, opt_state)


def shardings(
    tx: optax.GradientTransformation, params: Params, axes: Any,
    layout: sharding.Layout,
) -> ModelState:
  """`NamedSharding`s of a `ModelState`: moments lie as their parameters do.

  Args:
    tx: the optimizer.
    params: parameters, or their shapes.
    axes: logical axis names of the parameters, from `qwen.axes`.
    layout: of the update.
  """
  everywhere = layout.replicated
  placed = layout.place(axes)
  opt_state = optax.tree_utils.tree_map_params(
      # Adafactor's factored moments have other shapes than their parameters.
      tx, lambda x, s, p: s if x.shape == p.shape else everywhere,
      jax.eval_shape(tx.init, params), placed, params,
      transform_non_params=lambda _: everywhere)
  return ModelState(placed, opt_state)


def next_token_logprobs(
    model: qwen.Qwen, params: Params, tokens: jax.Array,
    temperature: jax.Array | float, chunk: int,
    places: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """log pi(token t | tokens before t) and the entropy of that prediction.

  Args:
    model: the decoder.
    params: its parameters, or a `lora.Adapted`.
    tokens: [B, T] int32, left-aligned, or packed.
    temperature: the logits are divided by it.
    chunk: positions of a row whose logits exist at a time.
    places: positions and segment ids [B, T] of packed rows; the entry of a
      segment's first token is meaningless.

  Returns:
    logprobs and entropy, [B, T] float32, aligned with `tokens`; entry 0 is 0.
  """
  at, segments = places or (positions(tokens), None)
  variables = lora.variables(params)
  hidden, _ = model.apply(variables, tokens, at, segments=segments)
  logprobs, entropy = losses.token_logprobs(
      hidden[:, :-1], qwen.unembedding(variables['params']), tokens[:, 1:],
      temperature, chunk, model.layout)
  shift = lambda x: jnp.pad(x, ((0, 0), (1, 0)))
  return shift(logprobs), shift(entropy)


def positions(tokens: jax.Array) -> jax.Array:
  """Positions [B, T] int32 of left-aligned rows."""
  return jnp.broadcast_to(
      jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
