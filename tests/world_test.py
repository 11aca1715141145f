import collections
import dataclasses

import pytest

from stepsearch import protocol
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.data import world as world_lib

CONFIG = world_lib.Config(train_entities=30, eval_entities=20, name_words=12)
HOPS, SHARES = (2, 3, 4), (1., 1., 1.)
TEXTS = protocol.Protocol.short()


@pytest.fixture(scope='module')
def world():
  return world_lib.World(CONFIG, 0)


def subject(text):
  """The two-word name that a passage begins with."""
  return ' '.join(text.split()[:2])


def search_by(world):
  """Exact search for '<name> <word>': passages with all of its words."""
  by_name = collections.defaultdict(list)
  for document in world.corpus:
    by_name[subject(document.text)].append(document)

  def search(queries, k):
    found = []
    for query in queries:
      *name, word = query.split()
      documents = by_name[' '.join(name)]
      hits = [d for d in documents if word in d.text.split()[2:]]
      others = [d for d in world.corpus if d not in documents]
      found.append((hits or others[:k])[:k])
    return found

  return search


def test_the_same_seed_makes_the_same_world(world):
  again, other = world_lib.World(CONFIG, 0), world_lib.World(CONFIG, 1)
  assert again.corpus == world.corpus != other.corpus
  assert again.words == world.words and again.pools == world.pools
  ask = lambda w, seed=3: w.questions('train', 40, HOPS, SHARES, seed)
  assert ask(again) == ask(world) != ask(world, 4)


def test_corpus(world):
  ids = [document.id for document in world.corpus]
  assert len(set(ids)) == len(ids)
  assert len({document.text for document in world.corpus}) == len(ids)
  everyone = {*world.entities['train'], *world.entities['eval']}
  assert {subject(d.text) for d in world.corpus} == everyone == set(world.facts)
  assert len(everyone) == 5 * 50
  # Every word is a token, with the words of the short protocol.
  tokenizer = tokenizer_lib.from_words(
      [*world.words, *protocol.SHORT_WORDS], protocol.TAGS)
  unknown = tokenizer.byte_strings.index(b'<unk>')
  texts = [f' {document.text}' for document in world.corpus]
  texts += [
      f' {e.question}' for e in world.questions('eval', 30, HOPS, SHARES, 0)]
  assert not any(unknown in tokenizer.encode(text) for text in texts)
  pooled = [word for pool in world.pools for word in pool]
  assert len(set(pooled)) == len(pooled) == 10 * 12


@pytest.mark.parametrize('part', ['train', 'eval'])
def test_answers_follow_from_the_facts(world, part):
  """By reading the gold passages, one after the other, as text."""
  examples = world.questions(part, 60, HOPS, (1., 1., 2.), 0)
  assert len({e.question for e in examples}) == len(examples) == 60
  assert collections.Counter(e.hops for e in examples) == {2: 15, 3: 15, 4: 30}
  own = set(world.entities[part])
  by_id = {document.id: document for document in world.corpus}
  for example in examples:
    # 'what is the C of the B of the A of X Y ?', innermost last.
    chain = example.question.removeprefix('what is the ').removesuffix(' ?')
    *nouns, name = chain.split(' of ')
    nouns = [noun.removeprefix('the ') for noun in nouns][::-1]
    assert len(nouns) == len(example.gold_documents) == example.hops
    visited = [name]
    for noun, gold, keys in zip(
        nouns, example.gold_documents, example.search_keys):
      assert by_id[gold.id] == gold and subject(gold.text) == name
      [fact] = [f for f in world.facts[name] if f.passage == gold]
      assert (fact.noun, keys) == (noun, (f'{name} {fact.keyword}',))
      assert fact.keyword in gold.text.split()
      assert noun not in gold.text.split()  # the corpus never says it so
      name = ' '.join(gold.text.split()[-2:])
      assert name == fact.object
      visited.append(name)
    assert example.answers == (name,)
    assert own.issuperset(visited) and len(set(visited)) == len(visited)


def test_held_out_entities_are_strangers(world):
  train, held_out = (set(world.entities[part]) for part in ('train', 'eval'))
  assert not train & held_out
  assert (len(train), len(held_out)) == (5 * 30, 5 * 20)
  for part, own in (('train', train), ('eval', held_out)):
    assert all(
        fact.object in own for name in own for fact in world.facts[name])
    del part


def test_same_type_relation_is_a_switch():
  nouns = lambda w: {f.noun for facts in w.facts.values() for f in facts}
  config = dataclasses.replace(CONFIG, same_type=True)
  assert nouns(world_lib.World(config, 0)) - nouns(
      world_lib.World(CONFIG, 0)) == {'spouse'}


def observe(documents, last):
  texts = [TEXTS.document_text(i, d) for i, d in enumerate(documents, start=1)]
  return TEXTS.information(texts) + (TEXTS.last_turn if last else '')


def demonstrations(world, examples, **options):
  settings = dict(
      good_query=0.5, retry=0.7, early_stop=0.1, k=2, max_turns=3, seed=0)
  return world.demonstrations(
      examples, search_by(world), observe, **settings | options)


def test_demonstrations_keep_the_format_and_the_budget(world):
  examples = world.questions('train', 120, HOPS, SHARES, 0)
  rows = demonstrations(world, examples)
  assert rows == demonstrations(world, examples)
  assert rows != demonstrations(world, examples, seed=1)
  assert [question for question, _ in rows] == [e.question for e in examples]
  counts, right = collections.Counter(), 0
  for example, (_, text) in zip(examples, rows):
    turns = protocol.split_transcript(text)
    assert protocol.format_ok(turns), text
    searches = len(turns) - 1
    counts[searches] += 1
    # The last search is followed by the message, and no other is.
    assert text.count(TEXTS.last_turn) == (searches == 3)
    if searches == 3:
      assert text.rindex('</information>') < text.index(TEXTS.last_turn)
    right += protocol.answer(turns[-1]) in example.answers
  assert set(counts) == {1, 2, 3}
  assert 0 < right < 120


def test_a_careful_searcher_is_right(world):
  examples = world.questions('train', 60, HOPS, SHARES, 0)
  rows = demonstrations(
      world, examples, good_query=1.0, early_stop=0.0, max_turns=5)
  for example, (_, text) in zip(examples, rows):
    turns = protocol.split_transcript(text)
    assert protocol.answer(turns[-1]) == example.answers[0]
    queries = [protocol.parse(turn).content for turn in turns[:-1]]
    assert queries == [keys[0] for keys in example.search_keys]


def test_impossible_worlds_are_refused(world):
  with pytest.raises(ValueError, match='config.world.name_words = 7'):
    world_lib.World(dataclasses.replace(CONFIG, name_words=7), 0)
  with pytest.raises(ValueError, match='too few 1-hop questions'):
    world.questions('eval', 10_000, (1,), (1.,), 0)
