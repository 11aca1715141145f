"""The embedded world: a closed corpus and multi-hop questions from a seed.

Entities of five types bear two-word made-up names and are linked by relations.
Every relation of an entity is one passage in the corpus' wording ("X Y was born
in Z W"); questions use another wording ("the birthplace of X Y") that the
corpus never uses, so that a searcher has something to learn. Train and held-out
questions are over disjoint entities, all of which are in the corpus. Nothing is
stored: the same seed makes the same world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from stepsearch import protocol
from stepsearch import types

# type -> relations: (noun of the question, type of the object, passage,
# word by which the corpus can be searched for it)
_RELATIONS = {
    'person': (
        ('birthplace', 'city', 'was born in the town of', 'born'),
        ('employer', 'company', 'works these days for', 'works'),
    ),
    'city': (
        ('country', 'country', 'lies within the borders of', 'lies'),
        ('mayor', 'person', 'is governed since long by', 'governed'),
    ),
    'country': (
        ('capital', 'city', 'is run from its seat', 'seat'),
        ('ruler', 'person', 'bows to the crown of', 'crown'),
    ),
    'company': (
        ('founder', 'person', 'was started once by', 'started'),
        ('headquarters', 'city', 'keeps its main office at', 'office'),
    ),
    'film': (
        ('director', 'person', 'was shot under the eye of', 'shot'),
        ('studio', 'company', 'was paid for by', 'paid'),
        ('setting', 'city', 'plays in the streets of', 'streets'),
    ),
}
_SAME_TYPE = ('spouse', 'person', 'is married happily to', 'married')
_DISTRACTOR = 'is named in many an old'
_THINGS = ('song', 'letter', 'map', 'story')
_FRAME = ('what', 'is', 'the', 'of', '?')
_SYLLABLES = tuple(
    consonant + vowel for consonant in 'bdfgklmnprstvz' for vowel in 'aeiou')


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the world; the leaves of `config.world`."""

  train_entities: int = 240  # a type
  eval_entities: int = 120  # a type, in held-out questions only
  name_words: int = 40  # first names a type, and as many last names
  same_type: bool = False  # with a person -> person relation


@dataclasses.dataclass(frozen=True)
class Fact:
  """One link of the world and the passage that states it."""

  noun: str
  keyword: str
  object: str
  passage: types.Document


class World:
  """Corpus, vocabulary and question makers of one seed."""

  def __init__(self, config: Config, seed: int):
    """Makes names, links and passages."""
    if min(config.train_entities, config.eval_entities) < 2:
      raise ValueError(
          f'config.world.train_entities = {config.train_entities}, '
          f'eval_entities = {config.eval_entities}: at least 2 of each type.')
    if config.name_words**2 < config.train_entities + config.eval_entities:
      raise ValueError(
          f'config.world.name_words = {config.name_words} gives only '
          f'{config.name_words**2} names a type, and train_entities + '
          f'eval_entities = {config.train_entities + config.eval_entities} '
          'are needed: raise it, or lower them.')
    rng = np.random.default_rng((seed, 0))
    relations = dict(_RELATIONS)
    if config.same_type:
      relations['person'] += (_SAME_TYPE,)
    self.pools = _pools(len(relations) * 2, config.name_words, rng)
    names = {}
    for i, kind in enumerate(relations):
      pick = rng.choice(
          config.name_words**2, config.train_entities + config.eval_entities,
          replace=False)
      first, last = self.pools[2 * i], self.pools[2 * i + 1]
      names[kind] = [
          f'{first[n // config.name_words]} {last[n % config.name_words]}'
          for n in pick]
    split = {
        'train': slice(0, config.train_entities),
        'eval': slice(config.train_entities, None)}
    self.entities: dict[str, list[str]] = {
        part: [name for kind in names for name in names[kind][where]]
        for part, where in split.items()}
    texts, self.facts = [], {}
    for where in split.values():
      for kind in relations:
        for name in names[kind][where]:
          self.facts[name] = []
          for noun, target, wording, keyword in relations[kind]:
            others = [x for x in names[target][where] if x != name]
            value = others[rng.integers(len(others))]
            self.facts[name].append((noun, keyword, value, len(texts)))
            texts.append(f'{name} {wording} {value}')
          texts.append(f'{name} {_DISTRACTOR} {rng.choice(_THINGS)}')
    order = rng.permutation(len(texts))
    ids = np.empty(len(texts), np.int64)
    ids[order] = np.arange(len(texts))
    self.corpus = [
        types.Document(id=str(i), title='', text=texts[n])
        for i, n in enumerate(order)]
    self.facts = {
        name: [Fact(noun, keyword, value, self.corpus[ids[n]])
               for noun, keyword, value, n in facts]
        for name, facts in self.facts.items()}
    wordings = [word for kind in relations.values()
                for noun, _, wording, _ in kind
                for word in (noun, *wording.split())]
    self.words = list(dict.fromkeys(
        [*_FRAME, *wordings, *_DISTRACTOR.split(), *_THINGS,
         *(word for pool in self.pools for word in pool)]))

  def questions(
      self, part: str, count: int, hops: Sequence[int],
      shares: Sequence[float], seed: int,
  ) -> list[types.Example]:
    """Distinct questions over the entities of one part.

    Args:
      part: 'train' or 'eval'.
      count: how many.
      hops: lengths of the chains.
      shares: how often each length occurs, in proportion.
      seed: of the draw.
    """
    rng = np.random.default_rng((seed, 1, part == 'eval'))
    shares = np.asarray(shares, float) / np.sum(shares)
    wanted = np.floor(shares * count).astype(int)
    wanted[0] += count - wanted.sum()
    lengths = rng.permutation(np.repeat(hops, wanted))
    seen, examples = set(), []
    for length in lengths:
      for _ in range(1000):
        chain = self._chain(part, int(length), rng)
        question = self._question(chain)
        if question not in seen:
          break
      else:
        raise ValueError(
            f'the world has too few {length}-hop questions over its {part} '
            f'entities for {count} distinct ones: lower the number of '
            'questions, or raise config.world.*_entities.')
      seen.add(question)
      examples.append(types.Example(
          id=f'{part}-{len(examples)}',
          question=question,
          answers=(chain[-1][1].object,),
          gold_documents=tuple(fact.passage for _, fact in chain),
          search_keys=tuple(
              (f'{name} {fact.keyword}',) for name, fact in chain),
          hops=int(length),
          dataset='world'))
    return examples

  def _chain(self, part, length, rng):
    """A walk [(entity, fact)] that never comes back to an entity."""
    for _ in range(10_000):
      name = self.entities[part][rng.integers(len(self.entities[part]))]
      chain, visited = [], {name}
      for _ in range(length):
        facts = self.facts[name]
        fact = facts[rng.integers(len(facts))]
        chain.append((name, fact))
        name = fact.object
        visited.add(name)
      if len(visited) == length + 1:
        return chain
    raise ValueError(
        f'the world holds no {length}-hop question over its {part} entities: '
        f'ask for fewer hops, or raise config.world.{part}_entities.')

  def _question(self, chain):
    nouns = ' of '.join(f'the {fact.noun}' for _, fact in reversed(chain))
    return f'what is {nouns} of {chain[0][0]} ?'

  def demonstrations(
      self, examples: Sequence[types.Example], search: Callable,
      observation: Callable, *, good_query: float, retry: float,
      early_stop: float, k: int, max_turns: int, seed: int,
  ) -> list[tuple[str, str]]:
    """Transcripts of a sloppy searcher who follows the format.

    For each hop it queries in the corpus' wording with probability
    `good_query` and in the question's wording else. If the passage it needs is
    not found, it tries the other wording with probability `retry`; otherwise
    it answers with what it has. Before each further hop it stops early with
    probability `early_stop`.

    Args:
      examples: questions of this world.
      search: (queries, k) -> documents a query.
      observation: (documents, last turn is next) -> text of the observation.
      good_query: probability.
      retry: probability.
      early_stop: probability.
      k: documents a search.
      max_turns: most searches.
      seed: of the draw.

    Returns:
      (question, text) pairs.
    """
    rng = np.random.default_rng((seed, 2))
    # Every query that can occur is searched in one call.
    queries = {}
    for example in examples:
      for fact, key in zip(self._chain_of(example), example.search_keys):
        name = key[0].rsplit(' ', 1)[0]
        for word in (fact.keyword, fact.noun):
          queries[f'{name} {word}'] = None
    found = dict(zip(queries, search(list(queries), k)))
    rows = []
    for example in examples:
      text, searches = '', 0
      answer = example.search_keys[0][0].rsplit(' ', 1)[0]
      for hop, fact in enumerate(self._chain_of(example)):
        if hop and rng.random() < early_stop:
          break
        hit = False
        word = fact.keyword if rng.random() < good_query else fact.noun
        while searches < max_turns:
          query = f'{answer} {word}'
          documents = found[query]
          searches += 1
          text += protocol.search_turn(f' {fact.noun}', f' {query}')
          text += observation(documents, searches == max_turns)
          hit = any(d.id == fact.passage.id for d in documents)
          if hit or rng.random() >= retry:
            break
          word = fact.noun if word == fact.keyword else fact.keyword
        if not hit:
          break
        answer = fact.object
      text += protocol.answer_turn(' answer', f' {answer}')
      rows.append((example.question, text))
    return rows

  def _chain_of(self, example):
    for document, key in zip(example.gold_documents, example.search_keys):
      name = key[0].rsplit(' ', 1)[0]
      yield next(
          f for f in self.facts[name] if f.passage.id == document.id)


def _pools(count: int, size: int, rng) -> list[list[str]]:
  """Disjoint pools of made-up two- and three-syllable words."""
  taken = {*_FRAME, *protocol.SHORT_WORDS}
  words: list[str] = []
  while len(words) < count * size:
    word = ''.join(rng.choice(_SYLLABLES, rng.integers(2, 4)))
    if word not in taken:
      taken.add(word)
      words.append(word)
  return [words[i * size:(i + 1) * size] for i in range(count)]
