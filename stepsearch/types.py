"""Nouns that travel between stages.

    data ─ Example ─▶ rollout ─ Trajectory + Transcript ─▶ rewards ─▶ learner

`Trajectory` and `Batch` are arrays (pytrees), `Transcript` is text. Dimension
legend, used in every docstring and einsum of the project:

    B batch   T query length   S cache length   R turns   D embed   N heads
    K kv heads   G = N / K   H head_dim   F mlp   V vocabulary   L layers
"""

from __future__ import annotations

import dataclasses

from flax import struct
import jax


@dataclasses.dataclass(frozen=True)
class Document:
  """One passage of the corpus; `score` is the retriever's, or 0."""

  id: str
  title: str
  text: str
  score: float = 0.0


@dataclasses.dataclass(frozen=True)
class SubQuestion:
  """One step of a decomposed question."""

  question: str  # its references #k replaced by the earlier answers
  answer: str = ''
  gold: tuple[str, ...] = ()  # ids among the example's gold documents


@dataclasses.dataclass(frozen=True)
class Example:
  """One question with everything that rewards and evaluation need of it."""

  id: str
  question: str
  answers: tuple[str, ...]  # aliases, at least one
  gold_documents: tuple[Document, ...] = ()
  search_keys: tuple[tuple[str, ...], ...] = ()  # [sub-question][query]
  hops: int = 0  # 0 = unknown
  dataset: str = ''
  sub_questions: tuple[SubQuestion, ...] = ()
  source: str = ''  # file or release that it was read from
  licence: str = ''  # of that release, '' = not known


@dataclasses.dataclass(frozen=True)
class Turn:
  """One stretch that the policy wrote, and what the environment answered.

  `query` is None unless the stretch ended in a well-formed search, and may be
  empty. `documents` are those the policy was shown, after truncation.
  """

  text: str
  query: str | None = None
  documents: tuple[Document, ...] = ()
  observation: str = ''


@dataclasses.dataclass(frozen=True)
class Transcript:
  """The text of one episode; `turns[r]` goes with `turn_ends[:, r]`."""

  prompt: str
  turns: tuple[Turn, ...]

  @property
  def text(self) -> str:
    """What follows the prompt: the policy's words and the observations."""
    return ''.join(turn.text + turn.observation for turn in self.turns)

  @property
  def searches(self) -> int:
    """Well-formed searches that were issued."""
    return sum(turn.query is not None for turn in self.turns)


@struct.dataclass
class Trajectory:
  """The arrays of one batch of episodes, as sampled; filled by rollout.

  Numpy as it comes from there, whole in every process; `sharding.shard_batch`
  places it for the learner.
  """

  tokens: jax.Array  # [B, T] int32: prompt, sampled and retrieved tokens
  token_mask: jax.Array  # [B, T] float32: 1 on tokens, 0 on padding
  loss_mask: jax.Array  # [B, T] float32: 1 iff the actor sampled the token
  logprobs: jax.Array  # [B, T] float32: log pi(token) as recorded; 0 elsewhere
  turn_ends: jax.Array  # [B, R] int32: token that closed search turn r, else -1


@struct.dataclass
class Batch:
  """A `Trajectory` with targets; filled by `rl.learner.make_batch`."""

  tokens: jax.Array  # [B, T] int32
  token_mask: jax.Array  # [B, T] float32
  loss_mask: jax.Array  # [B, T] float32
  logprobs: jax.Array  # [B, T] float32: log pi_old, recomputed by the learner
  ref_logprobs: jax.Array  # [B, T] float32: log pi_ref
  values: jax.Array  # [B, T] float32: V before token t, from hidden t - 1
  advantages: jax.Array  # [B, T] float32: whitened over the loss mask
  returns: jax.Array  # [B, T] float32: the critic's targets
