"""Plain text from a model in a folder: prompts in, texts out, no searches.

    prompts ─▶ groups of slots ─▶ sampler: start, decode until the last stops

For writing data; episodes are played by `rollout.collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import zlib

import jax
import numpy as np

from stepsearch import paths
from stepsearch import sharding
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.models import attention
from stepsearch.models import folder as folder_lib
from stepsearch.models import hf
from stepsearch.rollout import sampler as sampler_lib

_CHUNK = 64  # tokens between two looks at the rows
_WIDTHS = 128  # prompts are padded to a multiple of this, for each is compiled


class Generator:
  """Writes until the model ends, in batches; alike prompts get alike texts."""

  def __init__(
      self, folder: paths.Address, *, slots: int = 8, longest: int = 512,
      temperature: float = 0.0,
  ):
    """Loads the weights, whole on every device, and the tokenizer.

    Args:
      folder: a Hugging Face folder, local or gs://.
      slots: texts that are written at once; made a multiple of the devices.
      longest: tokens of a text, at most.
      temperature: of sampling; 0: the most likely token is taken.

    Raises:
      ValueError: as of `hf.load` and `tokenizer.load`.
    """
    files = folder_lib.Folder(folder)
    self._tokenizer = tokenizer_lib.load(files.path, *hf.special_ids(files))
    layout = sharding.Layout(sharding.make_mesh(), sharding.DECODE)
    dtype = 'float32' if layout.platform == 'cpu' else 'bfloat16'
    model, params = hf.load(files, layout, dtype)
    self._model = dataclasses.replace(
        model, dtype=dtype, attention=attention.resolve(
            'auto', layout.mesh.devices.flat[0], head_dim=model.head_dim,
            dtype=dtype, windows=model.windows))
    self._sampler = sampler_lib.Sampler(
        self._model, layout, -(-slots // layout.shards) * layout.shards,
        self._tokenizer.eos_ids)
    self._params = self._sampler.weights(params)
    # One state that nothing leaves: only the end of a text stops it.
    self._table = sharding.put(
        np.zeros([1, model.vocab_size], np.int8), layout.replicated)
    self._longest = longest
    self._temperature = temperature

  def __call__(self, prompts: Sequence[str]) -> list[tuple[str, bool] | str]:
    """Writes one text a prompt.

    Args:
      prompts: each goes into the tokenizer's chat template, where the model
        was tuned on it.

    Returns:
      the texts, and whether the model has ended each; or why there is none,
      where a prompt leaves the model no room for a text.
    """
    tokens = [self._tokenizer.prompt(text, '{question}') for text in prompts]
    room = self._model.max_length - self._longest
    texts = [
        f'a prompt of {len(ids)} tokens, and the model has room for {room} '
        f'before a text of {self._longest}' for ids in tokens]
    # Alike lengths together, so that little is padded.
    order = sorted(
        (i for i, ids in enumerate(tokens) if len(ids) <= room),
        key=lambda i: len(tokens[i]))
    slots = self._sampler.slots
    for first in range(0, len(order), slots):
      group = order[first:first + slots]
      for i, text in zip(group, self._group([tokens[i] for i in group])):
        texts[i] = text
    return texts

  def _group(self, prompts) -> list[tuple[str, bool]]:
    slots, pad = self._sampler.slots, self._tokenizer.pad_id
    width = -(-max(map(len, prompts)) // _WIDTHS) * _WIDTHS
    fed = np.full([slots, width], pad, np.int32)
    count = np.zeros([slots], np.int32)
    for i, ids in enumerate(prompts):
      fed[i, :len(ids)] = ids
      count[i] = len(ids)
    numbers = np.arange(slots, dtype=np.int32)
    # A text is drawn by its prompt, whatever else is written beside it.
    drawn_by = np.zeros_like(count)
    drawn_by[:len(prompts)] = [
        zlib.crc32(row[:n].tobytes()) >> 1
        for row, n in zip(fed[:len(prompts)], count)]
    state = self._sampler.start(
        self._params, self._sampler.empty(width + self._longest),
        sampler_lib.Rows(
            slot=numbers, active=count > 0, tokens=fed, count=count,
            budget=np.full_like(count, self._longest), episode=drawn_by,
            shared=np.zeros_like(count)), None)
    written = [[] for _ in prompts]
    running = True
    while running:
      state, chunk = self._sampler.decode(
          self._params, state, self._table, jax.random.key(0),
          self._temperature or 1.0, _CHUNK, greedy=not self._temperature)
      chunk = jax.device_get(chunk)
      for ids, row, number in zip(written, chunk.tokens, chunk.count):
        ids += row[:number].tolist()
      running = np.any(chunk.stop == sampler_lib.RUNNING)
    ends = self._tokenizer.eos_ids
    ended = [bool(ids) and ids[-1] in ends for ids in written]
    return [
        (self._tokenizer.decode(ids[:-1] if end else ids), end)
        for ids, end in zip(written, ended)]
