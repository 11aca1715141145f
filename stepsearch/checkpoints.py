"""Checkpoints: train state, data position and config, one step = one commit.

    Checkpoints.save(step, state, metadata) ─▶ directory/<step>/{state,metadata}
    Checkpoints.restore / restore(directory) ─▶ (state, metadata), bit for bit
    save_once / restore_once: one tree at one path, outside of any rotation

A thin layer over Orbax: saves are asynchronous and atomic (a killed one leaves
nothing that counts), the latest N and the best M are kept, and paths may be
local or gs://. Every error names the path; those that a user can do something
about are ValueErrors.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from stepsearch import paths
from stepsearch import sharding
from stepsearch.models import lora
from stepsearch.models import qwen


class Checkpoints:
  """The checkpoints of one run, as its trainer sees them.

  Readers (evaluation, export) call `restore` of this module instead: it leaves
  the directory, which another process may be writing to, as it is.
  """

  def __init__(
      self,
      directory: paths.Address,
      *,
      keep_latest: int,
      keep_best: int,
      best_metric: str = 'eval/em',
  ):
    """Creates the directory and clears away what killed saves left in it.

    Args:
      directory: local path or gs:// address.
      keep_latest: how many of the newest to keep, at least 1.
      keep_best: how many of the best to keep besides; of equal ones the newer.
      best_metric: the key of `save`'s metrics that says how good one is; a
        checkpoint without it, or with NaN, is never among the best.

    Raises:
      ValueError: the directory cannot be created; keep_latest below 1.
    """
    if keep_latest < 1 or keep_best < 0:
      raise ValueError(
          f'checkpoints: keep_latest = {keep_latest}, keep_best = {keep_best}: '
          'at least 1 and at least 0 are needed.')
    self._directory = _absolute(directory)
    self._metric = best_metric
    with paths.explained(self._directory):
      self._manager = _manager(
          self._directory,
          create=True,
          cleanup_tmp_directories=True,
          # Without best_fn Orbax would not store the metrics at all.
          best_fn=self._score,
          preservation_policy=policies.AnyPreservationPolicy([
              policies.LatestN(keep_latest),
              policies.BestN(
                  get_metric_fn=self._score,
                  n=keep_best,
                  keep_checkpoints_without_metrics=False),
          ]),
      )

  def save(
      self,
      step: int,
      state: Any,
      metadata: Mapping[str, Any],
      metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save; returns when `state` may be changed or donated.

    Args:
      step: not saved before.
      state: pytree of arrays.
      metadata: anything JSON (data position, config, model config).
      metrics: `best_metric` is looked up here.

    Raises:
      ValueError: this save or the one before could not be written (disk full,
        no permission), or the step exists already.
    """
    value = float((metrics or {}).get(self._metric, math.nan))
    with paths.explained(self._directory):
      self._manager.save(
          step,
          args=ocp.args.Composite(
              state=ocp.args.PyTreeSave(state),
              metadata=ocp.args.JsonSave(dict(metadata))),
          metrics={} if math.isnan(value) else {self._metric: value},
          force=True)

  def latest(self) -> int | None:
    """Step of the newest finished checkpoint, None if there is none."""
    self.wait()
    return self._manager.latest_step()

  def restore(
      self, like: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]]:
    """As the module's `restore`, from this run's directory."""
    self.wait()
    return _restore(self._manager, like, step, partial=False)

  def wait(self) -> None:
    """Blocks until the save under way is on disk.

    Raises:
      ValueError: it could not be written.
    """
    with paths.explained(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and releases the threads."""
    with paths.explained(self._directory):
      self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _score(self, metrics: Mapping[str, float]) -> float:
    return metrics.get(self._metric, -math.inf)


def restore(
    directory: paths.Address,
    like: Any,
    step: int | None = None,
    *,
    partial: bool = False,
) -> tuple[Any, dict[str, Any]]:
  """Reads a checkpoint without touching its directory.

  Args:
    directory: what `Checkpoints` was given.
    like: pytree of arrays or `jax.ShapeDtypeStruct`s. A leaf with a sharding
      comes back as a jax array on it, whatever mesh it was saved from; a leaf
      without one comes back as a numpy array. None: metadata alone.
    step: the newest by default.
    partial: `like` may lack leaves of the checkpoint, which are not read, and
      may spell attributes as dictionary keys: `{'actor': {'params': ...}}`.

  Returns:
    The state, in the structure of `like`, and the metadata.

  Raises:
    ValueError: no such checkpoint, or one of another shape, type or structure;
      names the directory and the steps in it, or the leaf and both shapes.
  """
  directory = _absolute(directory)
  with paths.explained(directory), contextlib.closing(
      _manager(directory, create=False)) as manager:
    return _restore(manager, like, step, partial)


def restore_actor(
    directory: paths.Address, model: qwen.Config, layout: sharding.Layout,
    step: int | None = None,
) -> tuple[Any, int]:
  """Reads the actor's parameters alone, onto the mesh; adapters are merged.

  Args:
    directory: what `Checkpoints` was given. Of a run with adapters, the base
      is the `reference` beside it.
    model: of the run, but for what a folder does not say: dtype and adapters.
    layout: any; it need not be that of the run.
    step: the newest by default.

  Returns:
    the parameters, float32, and the step they are of.

  Raises:
    ValueError: as of `restore`.
  """
  directory = _absolute(directory)
  all_axes = qwen.axes(model)[0]
  shapes = jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))
  whole = sharding.shapes(shapes, layout.place(all_axes))

  run = restore(directory, None, step)[1]['model']
  adapters = run.get('lora') and lora.Config(**run['lora'])
  like = whole
  if adapters:
    like = sharding.shapes(
        jax.eval_shape(
            lambda: lora.init(adapters, shapes, jax.random.key(0))),
        layout.place(lora.axes(adapters, all_axes)))
  state, metadata = restore(
      directory, {'actor': {'params': like}}, step, partial=True)
  params = state['actor']['params']
  if adapters:
    base = restore_once(directory.parent / 'reference', whole)
    computed = dataclasses.replace(model, dtype=run['dtype'])
    params = jax.jit(
        lambda base, params: jax.tree.map(
            lambda x: x.astype(jnp.float32), lora.merge(
                adapters, lora.Adapted(qwen.compact(computed, base), params),
                jnp.float32)),
        donate_argnums=0, out_shardings=layout.place(all_axes))(base, params)
  return params, metadata['step']


def save_once(path: paths.Address, tree: Any) -> None:
  """Writes a pytree of arrays to `path`, whole or not at all; waits for it.

  Replaces what is there. For what is written once a run, such as the frozen
  reference.

  Raises:
    ValueError: the path cannot be written; names it.
  """
  path = _absolute(path)
  with paths.explained(path), ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)


def exists_once(path: paths.Address) -> bool:
  """Whether `save_once` has written a tree to `path`, to its end."""
  path = _absolute(path)
  with paths.explained(path):
    return path.exists() and ocp.utils.is_checkpoint_finalized(path)


def restore_once(path: paths.Address, like: Any) -> Any:
  """Reads what `save_once` wrote; `like` as in `restore`.

  Raises:
    ValueError: nothing there, or a tree of another shape, type or structure.
  """
  path = _absolute(path)
  with paths.explained(path):
    if not exists_once(path):
      raise ValueError(
          f'{path} does not exist: it is written when a run starts; give the '
          'working directory of a run that got so far.')
    with ocp.PyTreeCheckpointer() as checkpointer:
      saved = checkpointer.metadata(path).item_metadata
      _check_fits(saved, like, path, partial=False)
      return checkpointer.restore(path, args=_restore_args(like))


def _absolute(path: paths.Address) -> paths.Path:
  """Orbax takes absolute paths only; addresses such as gs:// are."""
  path = paths.Path(path)
  return path if paths.is_remote(path) else paths.Path(os.path.abspath(path))


def _manager(directory: paths.Path, **options) -> ocp.CheckpointManager:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays, json = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
  registry.add('state', ocp.args.PyTreeSave, arrays)
  registry.add('state', ocp.args.PyTreeRestore, arrays)
  registry.add('metadata', ocp.args.JsonSave, json)
  registry.add('metadata', ocp.args.JsonRestore, json)
  return ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(**options),
      handler_registry=registry)


def _restore(
    manager: ocp.CheckpointManager, like: Any, step: int | None, partial: bool
) -> tuple[Any, dict[str, Any]]:
  steps = sorted(manager.all_steps())
  if not steps or (step is not None and step not in steps):
    wanted = 'no checkpoint' if step is None else f'no checkpoint {step}'
    raise ValueError(
        f'{manager.directory} holds {wanted}; steps present: '
        f'{", ".join(map(str, steps)) or "none"}.')
  step = steps[-1] if step is None else step
  with paths.explained(manager.directory):
    items = {'metadata': ocp.args.JsonRestore()}
    if like is not None:
      saved = manager.item_metadata(step)['state']
      _check_fits(saved, like, manager.directory / str(step), partial)
      items['state'] = _restore_args(like, partial)
    restored = manager.restore(step, args=ocp.args.Composite(**items))
  return restored.get('state'), restored['metadata']


def _restore_args(like: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
  def leaf_args(leaf):
    if getattr(leaf, 'sharding', None) is None:
      return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=leaf.sharding, strict=True)

  return ocp.args.PyTreeRestore(
      like,
      restore_args=jax.tree.map(leaf_args, like),
      partial_restore=partial)


def _check_fits(
    saved: Any, like: Any, path: paths.Path, partial: bool
) -> None:
  """Raises ValueError unless the leaves of `like` are those of `saved`."""
  saved, like = _leaves(getattr(saved, 'tree', saved)), _leaves(like)
  problems = []
  for name in sorted(saved.keys() | like.keys()):
    if name not in saved:
      problems.append(f'it lacks {name} {like[name]}')
    elif name not in like:
      if not partial:
        problems.append(f'it has {name} {saved[name]}, the model has not')
    elif saved[name] != like[name]:
      problems.append(
          f'{name} is {saved[name]} there and {like[name]} in the model')
  if problems:
    more = f' (and {len(problems) - 1} more)' if problems[1:] else ''
    raise ValueError(
        f'the checkpoint {path} does not fit the model: {problems[0]}{more}. '
        'Use the config that it was saved with, or another directory.')


def _leaves(tree: Any) -> dict[str, str]:
  """Maps dotted leaf names to 'dtype(shape)'; names as Orbax knows them."""
  def key(entry):
    for attribute in ('key', 'name', 'idx'):
      if hasattr(entry, attribute):
        return str(getattr(entry, attribute))
    return str(entry)

  return {
      '.'.join(map(key, path)):
          f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
      if hasattr(leaf, 'dtype')
  }
