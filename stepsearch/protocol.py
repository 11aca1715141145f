"""How policy and environment talk: prompt, tags, turns, observations, stops.

    instruction ─▶ [turn ─▶ observation]* ─▶ turn with the answer

This is the only module that knows the tags. A *turn* is one stretch that the
policy writes, from where it is given the word to the first completed
'</search>' or '</answer>' (or end of sequence, or its budget); an *observation*
is what the environment writes back. Text is only ever parsed one turn at a
time, so that what the environment wrote cannot be taken for the policy's words.

Training speaks one protocol. Baselines and other agents speak others, of which
a `Protocol` tells what differs (`methods` has them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, ClassVar, Literal

import numpy as np

from stepsearch.types import Document

THINK, THINK_END = '<think>', '</think>'
SEARCH_OPEN, SEARCH_END = '<search>', '</search>'
INFORMATION, INFORMATION_END = '<information>', '</information>'
ANSWER_OPEN, ANSWER_END = '<answer>', '</answer>'
TAGS = (
    THINK, THINK_END, SEARCH_OPEN, SEARCH_END,
    INFORMATION, INFORMATION_END, ANSWER_OPEN, ANSWER_END,
)  # fmt: skip

INSTRUCTION = """\
Answer the question below with the help of a search engine.

Before every step, reason between <think> and </think>. To look something up, \
write one query as <search>query</search>; passages that match it come back \
between <information> and </information>. Search as often as you need, for one \
missing fact at a time. Once you know the answer, give it in as few words as \
possible as <answer>answer</answer>.

For example, asked for the capital of the country where Mount Elgon lies:
<think>I first need the country of Mount Elgon.</think>
<search>Mount Elgon country</search>
<information>...</information>
<think>Mount Elgon lies in Uganda, whose capital is Kampala.</think>
<answer>Kampala</answer>

Question: {question}
"""

# What a chain of thought says before its answer.
CONCLUSION = 'answer is'

# The closed world's words all carry their leading space (`from_words`).
SHORT_INSTRUCTION = ' {question}\n'
SHORT_WORDS = ('answer', 'now', 'invalid')

# Distinct texts whose tokens are kept per cache: about 100 MB of passages.
_CACHE_SIZE = 65_536

_TAG = re.compile('|'.join(re.escape(tag) for tag in TAGS))
_ANSWER = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_CONCLUSION = re.compile(re.escape(CONCLUSION), re.IGNORECASE)
_BOXED = '\\boxed{'
_ANSWERED_SEARCH = re.compile(
    r'(?<=</search>)\s*<information>.*?</information>\s*', re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Protocol:
  """The configurable texts; the defaults suit a real language model.

  `warning` and `last_turn` may hold no tags: they stand in the transcript
  between the policy's turns, where a tag would be taken for the policy's.
  """

  # The prompt, with '{question}'; with '{documents}' too, the question is
  # searched for once, and what is found is in the prompt.
  instruction: str = INSTRUCTION
  information_open: str = '\n\n<information>'  # before the documents
  information_close: str = '</information>\n\n'  # after them
  document: str = 'Doc {i}(Title: {title}) {text}'  # {i} from 1, {text} last
  separator: str = '\n'  # between documents
  warning: str = (
      '\n\nThe last step was neither a complete search nor a complete answer. '
      'Think, then write either one query in search tags or the final answer '
      'in answer tags.\n\n'
  )  # the observation after a malformed turn
  last_turn: str = (
      'No searches are left. Think, then give the final answer in answer '
      'tags.\n\n'
  )  # closes the observation before the forced last turn
  # What surrounds a query; ('', end): all up to `end` is one; None: the policy
  # cannot search, and its first turn is its last.
  query: tuple[str, str] | None = (SEARCH_OPEN, SEARCH_END)
  # Where the final turn has the answer: between its tags; what follows
  # `CONCLUSION`, or the last line; the first line; in \boxed{}.
  answers: Literal['tags', 'conclusion', 'line', 'boxed'] = 'tags'
  thinks: bool = True  # the format asks for what `format_ok` asks for
  chat: str = ''  # on | off, what config.rollout.chat = auto comes to
  system: str = ''  # the system message; '' = that of the chat template

  def __post_init__(self):
    required = {'instruction': '{question}'}
    if self.query == (SEARCH_OPEN, SEARCH_END):
      required |= {
          'information_open': INFORMATION, 'information_close': INFORMATION_END
      }  # fmt: skip
    for name, part in required.items():
      if part not in getattr(self, name):
        raise ValueError(
            f'protocol.{name} is {getattr(self, name)!r} and must contain '
            f'{part!r}.'
        )
    if self.document.partition('{text}')[1:] != ('{text}', ''):
      raise ValueError(
          f'protocol.document is {self.document!r} and must end with its one '
          "'{text}', so that a passage that is too long can be cut at its end."
      )
    for name in ('document', 'separator', 'warning', 'last_turn'):
      if _TAG.search(getattr(self, name)):
        raise ValueError(
            f'protocol.{name} is {getattr(self, name)!r} and must hold no tag '
            'such as <search>: it would be read as the policy\'s own.'
        )

  @classmethod
  def short(cls) -> Protocol:
    """The texts of the closed world: tags and `SHORT_WORDS` only."""
    return cls(
        instruction=SHORT_INSTRUCTION,
        information_open=INFORMATION,
        information_close=INFORMATION_END,
        document=' {text}',
        separator='\n',
        warning=' invalid',
        last_turn=' answer now',
    )

  @property
  def retrieves_first(self) -> bool:
    """Whether documents for the question stand in the prompt."""
    return '{documents}' in self.instruction

  @property
  def stops(self) -> dict[str, int]:
    """What ends a turn, and the state that says so, for `stop_table`."""
    stops = {} if self.query is None else {self.query[1]: SEARCH}
    ends = {'tags': ANSWER_END, 'line': '\n'}
    if self.answers in ends:
      stops[ends[self.answers]] = ANSWER
    return stops

  def parse(self, text: str) -> Action:
    """Reads the action off one turn of the policy, as `protocol.parse`."""
    if self.query == (SEARCH_OPEN, SEARCH_END):
      return parse(text)
    if self.query is None:
      return Action('none')
    opening, closing = self.query
    if self.answers == 'conclusion' and CONCLUSION in text.lower():
      return Action('answer', self.prediction(text) or '')
    text = text.strip()
    if not opening:  # also where the budget was spent within the query
      return Action('search', text) if text else Action('none')
    _, opened, query = text.removesuffix(closing).rpartition(opening)
    if opened and text.endswith(closing):
      return Action('search', query.strip())
    if self.answers == 'boxed' and (found := _boxed(text)) is not None:
      return Action('answer', found)  # and said no end of sequence
    return Action('none')

  def prediction(self, text: str) -> str | None:
    """The answer that a final turn gives, stripped; None without one.

    Args:
      text: the policy's own words of its final turn, without its end of
        sequence.
    """
    if self.answers == 'tags':
      return answer(text)
    if self.answers == 'boxed':
      return _boxed(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if self.answers == 'line':
      return lines[0] if lines else None
    # A base model goes on, with a question of its own.
    own, _, _ = text.partition('\nQuestion:')
    _, *concluded = _CONCLUSION.split(own if _CONCLUSION.search(own) else text)
    for line in concluded[-1].splitlines() if concluded else ():
      if line := line.strip(' :."*'):
        return line
    return lines[-1] if lines else None

  def keeps_format(self, turn_texts: Sequence[str]) -> bool:
    """Whether an episode is what the instruction asks for.

    By `format_ok` where it asks for thoughts; else every turn but the final one
    has to search, and the final one to answer.

    Args:
      turn_texts: as of `format_ok`.
    """
    if self.thinks:
      return format_ok(turn_texts)
    *searches, final = turn_texts or ['']
    return self.prediction(final) is not None and all(
        self.parse(text).kind == 'search' for text in searches)

  def document_text(self, i: int, document: Document) -> str:
    """Document number `i` (from 1) as the policy reads it."""
    return ''.join(self._document_parts(i, document))

  def information(self, document_texts: Sequence[str]) -> str:
    """An observation with these texts, nothing cut."""
    documents = self.separator.join(document_texts)
    return self.information_open + documents + self.information_close

  def pieces(self, text: str) -> list[tuple[str, bool]]:
    """Splits a transcript into stretches, and whether the policy wrote each.

    The environment's are the complete information blocks that follow a closed
    search, as in `split_transcript`, with the last turn's message behind them.
    """
    # The message may begin with a space, which the block must leave to it.
    answered = _ANSWERED_SEARCH.pattern.removesuffix(r'\s*')
    message = re.escape(self.last_turn)
    pattern = re.compile(rf'(?:{answered})(?:\s*?{message})?\s*', re.DOTALL)
    found, end = [], 0
    for block in pattern.finditer(text):
      found += [(text[end:block.start()], True), (block[0], False)]
      end = block.end()
    return [piece for piece in (*found, (text[end:], True)) if piece[0]]

  def _document_parts(self, i: int, document: Document) -> tuple[str, str]:
    """Header and body; the body starts with the space before the text."""
    before = self.document.removesuffix('{text}')
    header = before.rstrip()
    space = before[len(header):]
    # One pass, so that a title that spells a placeholder stays as it is.
    fields = {'{i}': str(i), '{title}': document.title}
    header = re.sub(r'\{i\}|\{title\}', lambda found: fields[found[0]], header)
    return header, space + document.text


# ── What the policy wrote ────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Action:
  """What one turn asks of the environment."""

  kind: Literal['search', 'answer', 'none']
  content: str = ''  # the query or the answer, stripped; '' for none


def parse(text: str) -> Action:
  """Reads the action off one turn of the policy.

  A turn searches (answers) if it ends with <search>query</search>
  (<answer>…</answer>): the last two tags are that pair, the tag before them is
  not one that opens a search or an answer, and only whitespace follows. What
  else stands before the pair is judged by `format_ok`, not here. Everything
  else (a stray closing tag, a tag inside the query, no tag) is 'none'.

  Args:
    text: the policy's words of one turn.

  Returns:
    The action; its content is stripped and may be ''.
  """
  tags = list(_TAG.finditer(text))
  if len(tags) < 2 or text[tags[-1].end():].strip():
    return Action('none')
  names = [tag[0] for tag in tags]
  pairs = {
      (SEARCH_OPEN, SEARCH_END): 'search',
      (ANSWER_OPEN, ANSWER_END): 'answer',
  }
  kind = pairs.get(tuple(names[-2:]))
  if kind is None or names[-3:-2] in ([SEARCH_OPEN], [ANSWER_OPEN]):
    return Action('none')
  return Action(kind, text[tags[-2].end():tags[-1].start()].strip())


def answer(text: str) -> str | None:
  """The stripped content of the last complete answer pair, None without one.

  Args:
    text: the policy's own words of its final turn. Format is not judged.
  """
  answers = _ANSWER.findall(text)
  return answers[-1].strip() if answers else None


def _boxed(text: str) -> str | None:
  """The stripped content of the last \\boxed{}, its braces balanced."""
  found, start = None, text.find(_BOXED)
  while start >= 0:
    start += len(_BOXED)
    depth, end = 1, start
    while depth and end < len(text):
      depth += {'{': 1, '}': -1}.get(text[end], 0)
      end += 1
    if not depth:
      found = text[start : end - 1].strip()
    start = text.find(_BOXED, start)
  return found


def format_ok(turn_texts: Sequence[str]) -> bool:
  """Whether an episode keeps the format that the paper rewards (section 3.2).

  Judged over the policy's own words, turn by turn; observations are not in
  them. All of these must hold:

  1. In every turn the tags form flat pairs, each opening tag directly followed,
     among tags, by its own closing tag: none is stray, nested or left open.
  2. No turn holds an information tag; only the environment writes those.
  3. Every turn but the final one is any number of think pairs and then exactly
     one search pair, with only whitespace behind it.
  4. The final turn is any number of think pairs and then exactly one answer
     pair, with only whitespace behind it. So there is one answer, it is last,
     and a search on a forced last turn fails.
  5. At least one search turn has a think pair before its search.

  Words outside the tags are free; a query or an answer may be empty, and then
  earns nothing elsewhere.

  Args:
    turn_texts: the policy's words of each turn, in order.
  """
  if len(turn_texts) < 2:
    return False
  searched_after_thought = False
  for text in turn_texts[:-1]:
    thoughts = _thoughts_before(text, SEARCH_OPEN, SEARCH_END)
    if thoughts is None:
      return False
    searched_after_thought |= thoughts > 0
  final = _thoughts_before(turn_texts[-1], ANSWER_OPEN, ANSWER_END)
  return searched_after_thought and final is not None


def _thoughts_before(text: str, opening: str, closing: str) -> int | None:
  """Think pairs before the one closing pair, None if `text` is not so built."""
  tags = list(_TAG.finditer(text))
  names = [tag[0] for tag in tags]
  thoughts = len(tags) // 2 - 1
  if names != [THINK, THINK_END] * thoughts + [opening, closing]:
    return None
  return None if text[tags[-1].end():].strip() else thoughts


def split_transcript(text: str) -> list[str]:
  """Splits a stored transcript into the policy's own turns.

  Cuts out every complete information block that follows a closed search, with
  the whitespace around it; blocks anywhere else were written by the policy and
  stay. Nothing after the last block gives no turn.
  """
  turns = _ANSWERED_SEARCH.split(text)
  return turns if turns[-1].strip() else turns[:-1]


def spans(text: str, *, growing: bool = False) -> list[tuple[str, str]]:
  """Splits the policy's words of one turn at its tags, for people to read.

  A span of a text that grows may grow, and others may follow it; nothing that
  was told changes.

  Args:
    text: one turn.
    growing: more may follow: the end is left out if it may become a tag, or is
      part of a character.

  Returns:
    (kind, words), words not empty: of think, search, answer and information by
    the tag that opened them, of '' outside of them. A tag that opens ends what
    is open; a closing tag that closes nothing is a word.
  """
  if growing:
    text = text.rstrip('\ufffd')
    begun = max(text.rfind('<'), 0)
    if any(tag != text[begun:] and tag.startswith(text[begun:])
           for tag in TAGS):
      text = text[:begun]
  found = [('', '')]
  for piece in re.split(f'({_TAG.pattern})', text):
    kind, words = found[-1]
    if piece in TAGS and '/' not in piece:
      found.append((piece[1:-1], ''))
    elif piece == f'</{kind}>':
      found.append(('', ''))
    else:
      found[-1] = (kind, words + piece)
  return [span for span in found if span[1]]


def search_turn(thought: str, query: str) -> str:
  """A well-formed turn that searches, as demonstrations write it."""
  return f'{THINK}{thought}{THINK_END}{SEARCH_OPEN}{query}{SEARCH_END}'


def answer_turn(thought: str, content: str) -> str:
  """A well-formed final turn, as demonstrations write it."""
  return f'{THINK}{thought}{THINK_END}{ANSWER_OPEN}{content}{ANSWER_END}'


# ── What the environment writes back ─────────────────────────────────────────


def observation_tokens(
    protocol: Protocol,
    tokenizer: Any,
    documents: Sequence[Document],
    budget: int,
    *,
    last_turn: bool,
    cache: dict[str, np.ndarray],
) -> tuple[list[int], tuple[Document, ...]]:
  """The observation that answers a search, in at most `budget` tokens.

  Opening, documents, closing and message are tokenised apart, so that cutting
  documents can never cost a tag. Documents are kept whole, in order, while they
  fit. If not even the first does, its text is cut at a token (at a whole
  character); if its header leaves no room for any text, none is shown.

  Args:
    protocol: the texts.
    tokenizer: with `encode` and `decode` of `tokenizer.Tokenizer`.
    documents: best first; may be empty.
    budget: most tokens, at least `minimum_observation`.
    last_turn: append the message that the searches are over.
    cache: tokens by text, kept by the caller for one tokenizer; filled here.

  Returns:
    (ids, shown): list of int, and the documents that the policy sees, the text
    of a cut one cut alike.

  Raises:
    ValueError: the budget cannot hold the surroundings.
  """
  opening = _tokens(tokenizer, protocol.information_open, cache)
  closing = _tokens(tokenizer, protocol.information_close, cache)
  if last_turn:
    message = _tokens(tokenizer, protocol.last_turn, cache)
    closing = np.concatenate([closing, message])
  room = budget - len(opening) - len(closing)
  _require(room >= 0, budget, len(opening) + len(closing))
  separator = _tokens(tokenizer, protocol.separator, cache)

  pieces, shown = [opening], []
  for i, document in enumerate(documents, start=1):
    header, body = protocol._document_parts(i, document)
    header = _tokens(tokenizer, header, cache)
    body = _tokens(tokenizer, body, cache)
    between = separator if shown else separator[:0]
    if len(between) + len(header) + len(body) > room:
      if not shown:
        body, text = _cut(tokenizer, body, room - len(header))
        if text:
          pieces += [header, body]
          shown.append(dataclasses.replace(document, text=text))
      break
    pieces += [between, header, body]
    shown.append(document)
    room -= len(between) + len(header) + len(body)
  return np.concatenate([*pieces, closing]).tolist(), tuple(shown)


def prompt_documents(
    protocol: Protocol,
    tokenizer: Any,
    documents: Sequence[Document],
    budget: int,
    *,
    cache: dict[str, np.ndarray],
) -> tuple[str, tuple[Document, ...]]:
  """What stands for '{documents}' in a prompt, cut as an observation is.

  Arguments and errors are those of `observation_tokens`.

  Returns:
    the text, and the documents that it shows.
  """
  _, shown = observation_tokens(
      protocol, tokenizer, documents, budget, last_turn=False, cache=cache)
  texts = [protocol.document_text(i, d) for i, d in enumerate(shown, start=1)]
  return protocol.separator.join(texts), shown


def warning_tokens(
    protocol: Protocol,
    tokenizer: Any,
    budget: int,
    *,
    last_turn: bool,
    cache: dict[str, np.ndarray],
) -> tuple[list[int], tuple[Document, ...]]:
  """The observation after a malformed turn; as `observation_tokens`."""
  ids = _tokens(tokenizer, protocol.warning, cache)
  if last_turn:
    message = _tokens(tokenizer, protocol.last_turn, cache)
    ids = np.concatenate([ids, message])
  _require(len(ids) <= budget, budget, len(ids))
  return ids.tolist(), ()


def minimum_observation(protocol: Protocol, tokenizer: Any) -> int:
  """The smallest budget, in tokens, for what every observation must hold."""
  encode = tokenizer.encode
  surroundings = len(encode(protocol.information_open))
  surroundings += len(encode(protocol.information_close))
  longest = max(surroundings, len(encode(protocol.warning)))
  return longest + len(encode(protocol.last_turn))


def _tokens(
    tokenizer: Any, text: str, cache: dict[str, np.ndarray]
) -> np.ndarray:
  """int32 tokens of `text`; by text, since an engine's ids may be anything."""
  found = cache.get(text)
  if found is None:
    while len(cache) >= _CACHE_SIZE:
      del cache[next(iter(cache))]
    found = cache[text] = np.asarray(tokenizer.encode(text), np.int32)
  return found


def _cut(
    tokenizer: Any, ids: np.ndarray, length: int
) -> tuple[np.ndarray, str]:
  """At most `length` tokens that end at a whole character, and their text."""
  ids = ids[:max(length, 0)]
  text = tokenizer.decode(ids)
  while len(ids) and text.endswith('\ufffd'):
    ids = ids[:-1]
    text = tokenizer.decode(ids)
  return ids, text.strip()


def _require(fits: bool, budget: int, needed: int) -> None:
  if not fits:
    raise ValueError(
        f'An observation may take {budget} tokens, but its tags and messages '
        f'alone take {needed}: raise the observation budget to at least '
        f'{needed}, plus room for the documents.'
    )


# ── When a turn is over ──────────────────────────────────────────────────────

START, SEARCH, ANSWER = 0, 1, 2
_STOPS = {SEARCH_END: SEARCH, ANSWER_END: ANSWER}
_STATES = 1 + sum(map(len, _STOPS)) - 2  # '</' begins both


@dataclasses.dataclass(frozen=True)
class StopTable:
  """An automaton over tokens that finds completed closing tags exactly.

  A turn starts in state START = 0; `state = next_state[state, token]` after
  every token; the turn is over once the state is SEARCH or ANSWER, the first
  tag completed, also where the token carries characters past it. Both are
  absorbing. The other states are prefixes of the two tags.
  """

  START: ClassVar[int] = START
  SEARCH: ClassVar[int] = SEARCH
  ANSWER: ClassVar[int] = ANSWER

  next_state: np.ndarray  # [num_states, V] int8

  @property
  def num_states(self) -> int:
    """Number of states."""
    return self.next_state.shape[0]


def stop_table(
    byte_strings: Sequence[bytes], vocab_size: int | None = None,
    stops: Mapping[str, int] = _STOPS,
) -> StopTable:
  """Lifts the byte automaton of '</search>' and '</answer>' to tokens.

  Args:
    byte_strings: the bytes of each token (`Tokenizer.byte_strings`).
    vocab_size: width of the table, if the model has more rows than the
      tokenizer has tokens; the rest are empty tokens, which change no state.
    stops: other texts that end a turn, and SEARCH or ANSWER of each. One that
      begins with a space or a new line does not count at the beginning of a
      turn, where nothing has been written yet.

  Returns:
    The table, int8. Those of few states are filled up to as many as the tags
    have, so that a sampler compiles once.

  Raises:
    ValueError: `vocab_size` is smaller than the tokenizer's.
  """
  width = len(byte_strings) if vocab_size is None else vocab_size
  if width < len(byte_strings):
    raise ValueError(
        f'vocab_size is {width}, but the tokenizer has {len(byte_strings)} '
        'tokens: a model needs a row for every token.'
    )
  step = _byte_automaton({text.encode(): code for text, code in stops.items()})
  # Longest first: the tokens that have a byte at `position` are a prefix.
  lengths = np.fromiter(map(len, byte_strings), np.int64, len(byte_strings))
  order = np.argsort(-lengths, kind='stable')
  flat = np.frombuffer(b''.join(byte_strings), np.uint8)
  starts = (np.cumsum(lengths) - lengths)[order]
  lengths = lengths[order]
  states = len(step)
  ends = np.repeat(np.arange(states, dtype=np.int8)[:, None], width, axis=1)
  for position in range(int(lengths.max(initial=0))):
    active = np.searchsorted(-lengths, -position)
    column = flat[starts[:active] + position]
    ends[:, :active] = step[ends[:, :active], column]
  next_state = ends.copy()
  next_state[:, order] = ends[:, :len(order)]
  return StopTable(next_state)


def _byte_automaton(patterns: Mapping[bytes, int]) -> np.ndarray:
  """Aho-Corasick over bytes: [states, 256] int8, accepting states absorbing.

  Built from its definition: after any bytes, the state is that of a pattern
  that they end with, or else the longest suffix of them that is a prefix of
  one. Whitespace before anything else leads nowhere.
  """
  prefixes = {b'': START}
  for pattern in patterns:
    for end in range(1, len(pattern)):
      prefixes.setdefault(pattern[:end], 2 + len(prefixes))
  blank = any(pattern[:1].isspace() for pattern in patterns)
  begun = 2 + len(prefixes) if blank else START  # nothing is pending
  size = 2 + len(prefixes) + blank
  step = np.arange(max(size, _STATES), dtype=np.int8)[:, None].repeat(256, 1)
  for prefix, state in (*prefixes.items(), *([(b'', begun)] * blank)):
    for byte in range(256):
      suffix = prefix + bytes([byte])
      if blank and state == START and suffix.isspace():
        continue
      while suffix not in patterns and suffix not in prefixes:
        suffix = suffix[1:]
      completed = [
          code for pattern, code in patterns.items()
          if (prefix + bytes([byte])).endswith(pattern)]
      step[state, byte] = completed[0] if completed else (
          prefixes[suffix] if suffix else begun)
  return step


# ── The format of the released code ──────────────────────────────────────────

_RELEASED_ANSWER = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)


def released_answer(text: str) -> str | None:
  """The stripped content of the last answer pair, None without one.

  Unlike `answer`, an opening tag inside a pair is part of its content.

  Args:
    text: everything that the policy wrote, or a stored transcript.
  """
  answers = _RELEASED_ANSWER.findall(text)
  return answers[-1].strip() if answers else None


def released_format_ok(text: str) -> bool:
  """Whether the last answer pair closes the text, but for whitespace.

  All that the released code asks of the format; `text` as in
  `released_answer`.
  """
  ends = [found.end() for found in _RELEASED_ANSWER.finditer(text)]
  return bool(ends) and not text[ends[-1]:].strip()
