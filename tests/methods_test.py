"""Dialects of baselines: what stops, searches and answers in each."""

import dataclasses
import itertools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from stepsearch import methods
from stepsearch import protocol
from stepsearch import types
from stepsearch.rollout import collect as collect_lib

SHARED = pathlib.Path(__file__).parents[2] / 'shared'
SENTENCES = protocol.Protocol(
    instruction='{question}', information_open='[', information_close=']',
    document='{text}', warning='', last_turn='so the answer is',
    query=('', '\n'), answers='conclusion', thinks=False)


@pytest.mark.parametrize('name', methods.METHODS)
def test_a_method_asks_its_question_and_has_a_line_of_its_own(name):
  method = methods.make(name)
  assert method.protocol.instruction.count('{question}') == 1
  assert method.does and '\n' not in method.does + method.differs
  assert methods.make(name, '{documents} {question}?').protocol.instruction == (
      '{documents} {question}?')
  with pytest.raises(ValueError, match='needs {question}'):
    methods.make(name, 'no place')


def test_a_prompt_of_ones_own_is_no_difference():
  ours, theirs = (
      methods.make('search_r1', prompt) for prompt in ('', '{question}'))
  assert ours.differs.startswith(theirs.differs) and 'prompt' in ours.differs
  assert 'prompt' not in theirs.differs
  assert methods.make('cot', '', 'Be kind.').protocol.system == 'Be kind.'


def test_names_and_prompts_that_cannot_be():
  with pytest.raises(ValueError, match='no such method; there are agent, '):
    methods.make('agents')
  with pytest.raises(ValueError, match='needs {documents}'):
    methods.make('rag', '{question}')


@pytest.mark.parametrize(
    ('answers', 'text', 'expected'),
    [
        ('line', ' Paris\n', 'Paris'),
        ('line', '\n\n Paris, France', 'Paris, France'),
        ('line', ' \n', None),
        ('conclusion', 'It is old.\nSo the answer is: Paris.', 'Paris'),
        ('conclusion', 'The Answer is "Paris". \nMore.', 'Paris'),
        ('conclusion', 'the answer is X? No, the answer is **Y**\n', 'Y'),
        ('conclusion', 'The answer is:\n\n**Paris**\nIt is.', 'Paris'),
        ('conclusion', ' Paris\n', 'Paris'),
        ('conclusion', 'The answer is Y.\n\nQuestion: b?\nThe answer is Z.',
         'Y'),
        ('conclusion', '\nQuestion: a?\nThe answer is Y.', 'Y'),
        ('conclusion', 'the answer is', 'the answer is'),
        ('conclusion', '', None),
        ('boxed', r'so \boxed{Paris}.', 'Paris'),
        ('boxed', r'\boxed{a} or \boxed{\text{b {c}} }', r'\text{b {c}}'),
        ('boxed', r'\boxed{a} or \boxed{b', 'a'),
        ('boxed', 'Paris', None),
        ('tags', '<answer>a</answer>', 'a'),
    ],
)
def test_predictions(answers, text, expected):
  dialect = protocol.Protocol(answers=answers)
  assert dialect.prediction(text) == expected


@pytest.mark.parametrize(
    ('query', 'text', 'kind', 'content'),
    [
        (('<|q|>', '<|/q|>'), 'I need <|q|> a b <|/q|>\n', 'search', 'a b'),
        (('<|q|>', '<|/q|>'), '<|q|>a<|/q|> <|q|>b<|/q|>', 'search', 'b'),
        (('<|q|>', '<|/q|>'), 'a<|/q|>', 'none', ''),
        (('<|q|>', '<|/q|>'), '<|q|>a<|/q|> and', 'none', ''),
        (('', '\n'), ' One sentence.\n', 'search', 'One sentence.'),
        (('', '\n'), ' \n', 'none', ''),
        (('', '\n'), 'So the answer is Paris.\n', 'answer', 'Paris'),
        (None, '<search>a</search>', 'none', ''),
    ],
)
def test_queries(query, text, kind, content):
  dialect = protocol.Protocol(query=query, answers='conclusion')
  assert dialect.parse(text) == protocol.Action(kind, content)


def test_a_box_ends_an_episode_that_says_no_end_of_sequence():
  dialect = methods.make('search_o1').protocol
  opening, closing = dialect.query
  boxed = r'it is \boxed{Paris}, and'
  assert dialect.parse(boxed) == protocol.Action('answer', 'Paris')
  assert dialect.parse(f'{boxed} {opening}a{closing}').kind == 'search'
  assert dialect.parse(r'it is \boxed{Par').kind == 'none'


def first_stop(stops, data):
  """(bytes up to the first stop, its code), by searching every beginning."""
  for end in range(1, len(data) + 1):
    for text, code in stops.items():
      start = end - len(text)
      if not data[:end].endswith(text.encode()) or start < 0:
        continue
      if text[0].isspace() and not data[:start].strip():
        continue
      return end, code
  return None


@pytest.mark.parametrize('stops', [
    {'\n': protocol.ANSWER},
    {'\n': protocol.SEARCH, 'b': protocol.ANSWER},
    {'aab': protocol.SEARCH, 'ab': protocol.ANSWER, '\na': protocol.SEARCH},
    {'abab': protocol.SEARCH, 'ba': protocol.ANSWER},
    {},
], ids=str)
def test_stops_against_a_search(stops):
  """All texts of seven bytes of three kinds, a byte and three bytes a token."""
  table = protocol.stop_table(
      [bytes([b]) for b in b'ab\n'], stops=stops).next_state
  assert table.shape == (17, 3)
  pairs = [bytes(p) for p in itertools.product(b'ab\n', repeat=3)]
  coarse = protocol.stop_table(pairs, stops=stops).next_state
  for data in map(bytes, itertools.product(b'ab\n', repeat=7)):
    state, found = 0, None
    for n, byte in enumerate(data, start=1):
      state = table[state, b'ab\n'.index(byte)]
      if state in (protocol.SEARCH, protocol.ANSWER) and found is None:
        found = n, int(state)
    assert found == first_stop(stops, data), data
    state = coarse[0, pairs.index(data[:3])]
    state = coarse[state, pairs.index(data[3:6])]
    expected = first_stop(stops, data[:6])
    assert (state if state in (1, 2) else None) == (
        expected and expected[1]), data


def test_transcripts_of_search_r1_are_as_its_preset_writes_them():
  path = SHARED / 'data/raw/search_r1_3b_instruct_bamboogle_transcripts.json'
  if not path.exists():
    pytest.skip('no shared/data beside the repository')
  preset = methods.make('search_r1').protocol
  blocks = 0
  for row in json.loads(path.read_text(encoding='utf-8')):
    text = row['output']['final_response']
    turns = protocol.split_transcript(text)
    own = [piece for piece, written in preset.pieces(text) if written]
    seen = [piece for piece, written in preset.pieces(text) if not written]
    assert [turn.strip() for turn in own] == [turn.strip() for turn in turns]
    for block in seen:
      inner = block.strip().removeprefix('<information>').removesuffix(
          '</information>')
      found = re.findall(
          r'Doc (\d+)\(Title: (.*?)\) (.*?)(?=\nDoc \d+\(Title: |$)', inner,
          re.DOTALL)
      documents = [
          preset.document_text(i, types.Document('', title, text))
          for i, (_, title, text) in enumerate(found, start=1)]
      # The last may be followed by nothing, where the transcript ends.
      assert preset.information(documents).startswith(block)
      blocks += 1
    if row['output']['stop_matched_text'] == '</answer>':
      assert preset.keeps_format(turns)
      assert preset.prediction(turns[-1]) == row['output']['pred']
  assert blocks > 125


# ── Played by the collector ──────────────────────────────────────────────────

STRINGS = [
    b'Q', b'[', b']', b'd', b'so the answer is', b':',
    b'one', b' two', b'\n', b'three', b'\n', b' Paris', b'\n', b'answer is']


def play(scripted, layout, dialect, follows, search, **config):
  """One episode of a policy whose every token is known; and its tokens."""
  ids = lambda *indices: [i + 1 for i in indices]
  tokenizer = scripted.Pieces(STRINGS)
  chain = {}
  for head, *rest in follows:
    at, = ids(head)
    for token in ids(*rest):
      chain[at] = at = token
  model, params = scripted.chain_policy(chain, 32)
  collector = collect_lib.Collector(
      model, collect_lib.Config(**dict(
          max_turns=2, k=1, prompt_length=8, response_length=6,
          observation_length=6, max_length=64, length_multiple=8) | config),
      tokenizer, dialect, search, layout)
  ended = []
  example = types.Example('q', 'Q', ('Paris',))
  trajectory, (transcript,) = collector(
      params, [example], jax.random.key(0), greedy=True,
      on_end=lambda *episode: ended.append(episode))
  (number, text, tokens), = ended
  assert (number, text) == (0, transcript)
  mask = np.asarray(trajectory.loss_mask[0])
  assert tokens.sampled == mask.sum()
  assert sum(tokens) == np.asarray(trajectory.token_mask[0]).sum()
  return transcript, tokens


def never(queries, k):
  raise AssertionError(queries)


def found(queries, k):
  return [[types.Document('7', '', 'd')] for _ in queries]


def test_without_searches_the_first_turn_is_the_last(scripted, layout):
  dialect = protocol.Protocol(
      instruction='{question}:', document='{text}', information_open='[',
      information_close=']', warning='', last_turn='', query=None,
      answers='line', thinks=False)
  transcript, tokens = play(
      scripted, layout, dialect, [(5, 6, 7, 8, 9)], never)
  assert [turn.text for turn in transcript.turns] == ['one two\n']
  assert dialect.prediction(transcript.turns[0].text) == 'one two'
  assert dialect.keeps_format(['one two\n']) and transcript.searches == 0
  assert tokens == (2, 3, 0)


def test_methods_share_the_programs_of_the_sampler(scripted, layout):
  chain = [(0, 6, 7, 8), (2, 9, 10), (4, 11, 12)]
  play(scripted, layout, SENTENCES, chain, found)
  compiled = []

  def note(event, _, **__):
    compiled.append('backend_compile' in event)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    for answers in ('conclusion', 'line', 'boxed'):
      other = dataclasses.replace(SENTENCES, answers=answers, query=None)
      play(scripted, layout, other, chain, never)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert not any(compiled)


def test_documents_in_the_prompt_are_a_search(scripted, layout):
  dialect = protocol.Protocol(
      instruction='[{documents}]{question}:', document='{text}',
      information_open='[', information_close=']', warning='', last_turn='',
      query=None, answers='line', thinks=False)
  transcript, tokens = play(
      scripted, layout, dialect, [(5, 11, 12)], found)
  assert transcript.prompt == '[d]Q:' and transcript.searches == 1
  assert transcript.turns == (
      types.Turn('', 'Q', (types.Document('7', '', 'd'),)),
      types.Turn(' Paris\n'))
  assert tokens == (5, 2, 0)


def test_every_sentence_is_a_query_until_the_last(scripted, layout):
  asked = []

  def search(queries, k):
    asked.extend(queries)
    return found(queries, k)

  # Q one two \n [ d ] three \n [ d ] so the answer is Paris \n
  transcript, tokens = play(
      scripted, layout, SENTENCES,
      [(0, 6, 7, 8), (2, 9, 10), (4, 11, 12)], search)
  assert asked == ['one two', 'three']
  assert [turn.text for turn in transcript.turns] == [
      'one two\n', 'three\n', ' Paris\n']
  assert transcript.turns[1].observation == '[d]so the answer is'
  assert SENTENCES.prediction(' Paris\n') == 'Paris'
  assert tokens == (1, 3 + 2 + 2, 3 + 4)
  # It may conclude of its own accord.
  transcript, _ = play(
      scripted, layout, SENTENCES, [(0, 13, 11, 12)], never)
  assert [turn.text for turn in transcript.turns] == ['answer is Paris\n']
  assert SENTENCES.prediction(transcript.turns[-1].text) == 'Paris'


def test_documents_in_the_prompt_count_as_a_turn(scripted, layout):
  dialect = dataclasses.replace(
      SENTENCES, instruction='[{documents}]{question}')
  asked = []

  def search(queries, k):
    asked.extend(queries)
    return found(queries, k)

  # Q one two \n [ d ] so the answer is Paris \n
  chain = [(0, 6, 7, 8), (4, 11, 12)]
  transcript, _ = play(
      scripted, layout, dialect, chain, search, prompt_length=10, max_turns=2)
  assert asked == ['Q', 'one two'] and transcript.searches == 2
  transcript, _ = play(
      scripted, layout, dialect, chain, search, prompt_length=10, max_turns=1)
  assert [turn.text for turn in transcript.turns] == ['', 'one two\n']
  assert transcript.searches == 1


def test_a_long_prompt_is_refused_before_anything_is_played(scripted, layout):
  dialect = protocol.Protocol(
      instruction='[{documents}]{question}:', document='{text}',
      information_open='[', information_close=']', warning='', last_turn='',
      query=None, answers='line')
  model, _ = scripted.chain_policy({}, 32)
  collector = collect_lib.Collector(
      model, collect_lib.Config(
          max_turns=1, k=1, prompt_length=8, response_length=6,
          observation_length=5, max_length=64, length_multiple=8),
      scripted.Pieces(STRINGS), dialect, never, layout)
  with pytest.raises(ValueError, match=re.escape(
      'config.rollout.prompt_length = 8: the question \'Q\' and')):
    collector.prepare(['Q'])
