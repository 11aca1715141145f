"""Text to tokens and back, with every token known as bytes.

    text ──encode──▶ ids ──▶ rollout ──▶ ids ──decode──▶ text

Decoding is defined as the concatenation of `byte_strings`, so that the text of
a transcript, the tokens that were trained on and the stop table of
`protocol.stop_table` can never disagree about what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import hashlib
import json
import os
import re
import tempfile
import threading
from typing import Any

import numpy as np

from stepsearch import paths

# What a Hugging Face folder may hold of a tokenizer.
FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'vocab.json', 'merges.txt', 'tokenizer.model',
    'chat_template.jinja', 'chat_template.json')
# Of these, where a chat template may be.
_TEMPLATES = (
    'chat_template.jinja', 'chat_template.json', 'tokenizer_config.json')
PAD, EOS, UNKNOWN = '<pad>', '<eos>', '<unk>'
_WORDS = 'so it is'  # that no chat template says


class Tokenizer:
  """A fast Hugging Face tokenizer whose tokens are byte strings.

  Attributes:
    byte_strings: list of bytes, length `vocab_size`; b'' for unused ids.
    eos_ids: the tokens at which a policy has ended, the tokenizer's own first
      where it has one.
    pad_id: int; the first of `eos_ids` where nothing names another.
    vocab_size: int, the largest id plus one. A model may have more rows than
      this; `decode` gives '' for such ids.
  """

  def __init__(
      self, fast: Any, eos_ids: Sequence[int] = (), pad_id: int | None = None
  ):
    """Wraps a transformers `PreTrainedTokenizerFast`; see `load`."""
    self._fast = fast
    self._backend = fast.backend_tokenizer
    self._lock = threading.Lock()
    self.byte_strings = _byte_strings(self._backend)
    self.vocab_size = len(self.byte_strings)
    own = () if fast.eos_token_id is None else (int(fast.eos_token_id),)
    self.eos_ids = tuple(dict.fromkeys((*own, *eos_ids)))
    if not self.eos_ids:
      raise ValueError(
          f'The tokenizer {fast.name_or_path!r} names no eos_token, which is '
          'where a policy that has nothing more to say ends its turn, and no '
          'model names an eos_token_id. Name one in its tokenizer_config.json '
          '("eos_token": "<|im_end|>", say).'
      )
    for pad in (fast.pad_token_id, pad_id, self.eos_ids[0]):
      if pad is not None:
        self.pad_id = int(pad)
        break

  def encode(self, text: str) -> list[int]:
    """Tokens of `text`, with nothing added in front or behind.

    The literal text of a special token (a passage that quotes '<|im_end|>') is
    spelled out in ordinary tokens: text from outside cannot end a turn. For a
    byte-level tokenizer `decode(encode(text))` is `text`, up to the Unicode
    normalisation that the tokenizer asks for (NFC in Qwen's).
    """
    return self._encode(text, specials=False)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The concatenated bytes of `ids` as text, invalid UTF-8 replaced."""
    size, strings = self.vocab_size, self.byte_strings
    ids = np.asarray(ids).tolist()  # list indices are slow as numpy scalars
    joined = b''.join([strings[i] for i in ids if 0 <= i < size])
    return joined.decode('utf-8', errors='replace')

  def prompt(
      self, question: str, instruction: str, chat: str = 'auto',
      system: str = '',
  ) -> list[int]:
    """Tokens of the prompt that asks `question`.

    Args:
      question: the question; surrounding whitespace is dropped.
      instruction: text with one or more '{question}' placeholders.
      chat: 'on': the text goes into the tokenizer's chat template, as one
        user message followed by the opening of the assistant's; 'off': it is
        sent plainly, after what the tokenizer puts before any text (a
        beginning-of-sequence token, say); 'auto': on if `chats`.
      system: the system message in front of it; '': what the template itself
        puts there.

    Returns:
      list of int.

    Raises:
      ValueError: no placeholder, a template that cannot be rendered, or a
        system message without one.
    """
    if '{question}' not in instruction:
      raise ValueError(
          f'The instruction {instruction[:80]!r} has no place for the '
          "question: write '{question}' where it belongs."
      )
    text = instruction.replace('{question}', question.strip())
    if chat == 'on' and not self._fast.chat_template:
      raise ValueError(
          f"config.rollout.chat = 'on', but the tokenizer "
          f'{self._fast.name_or_path!r} has no chat template: use auto or off.'
      )
    if chat == 'off' or (chat == 'auto' and not self.chats):
      if system:
        raise ValueError(
            f'The prompt has a system message ({system[:40]!r}), and is sent '
            'plainly, where there is none: set config.rollout.chat=on, or put '
            'its text into the prompt.'
        )
      return [*self._prefix, *self.encode(text)]
    messages = [{'role': 'system', 'content': system}] if system else []
    render = lambda words: self._render(
        [*messages, {'role': 'user', 'content': words}],
        add_generation_prompt=True,
    )
    if any(t.special and t.content in text for t in self._added().values()):
      # A passage or question that quotes one is spelled out, as by `encode`.
      before, _, after = render(_WORDS).rpartition(_WORDS)
      ids = self._encode(before, specials=True) + self.encode(text)
      return ids + self._encode(after, specials=True)
    return self._encode(render(text), specials=True)

  @functools.cached_property
  def chats(self) -> bool:
    """Whether the model was tuned on its chat template.

    Base models carry one too, but end with another token than the one that
    ends the assistant's turn in it.
    """
    if not self._fast.chat_template:
      return False
    text = self._render([
        {'role': 'user', 'content': 'Is it?'},
        {'role': 'assistant', 'content': _WORDS},
    ])
    _, _, after = text.rpartition(_WORDS)
    return self.eos_ids[0] in self._encode(after, specials=True)

  @functools.cached_property
  def _prefix(self) -> list[int]:
    """What the tokenizer puts before every text."""
    encoded = self._backend.encode('a')
    return encoded.ids[:encoded.special_tokens_mask.index(0)]

  def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
    try:
      return self._fast.apply_chat_template(messages, tokenize=False, **options)
    except ImportError as error:
      raise ValueError(
          f'The tokenizer {self._fast.name_or_path!r} has a chat template, and '
          f'rendering it failed: {error} Install jinja2, or set '
          'config.rollout.chat=off to send the plain prompt.'
      ) from error
    except Exception as error:  # jinja2's, or what the template's code raises
      folder = paths.Path(self._fast.name_or_path)
      files = [folder / name for name in _TEMPLATES]
      file = next((file for file in files if file.exists()), files[-1])
      raise ValueError(
          f'{file}: the chat template cannot be rendered ({error}): mend it, '
          'or set config.rollout.chat=off to send the plain prompt.'
      ) from error

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digest of all that decides how texts become tokens, and back."""
    state = json.loads(self._backend.to_str())
    parts = [
        [state[part] for part in ('normalizer', 'pre_tokenizer', 'model')],
        [(i, self.byte_strings[i].hex()) for i in sorted(self._added())],
        [self.vocab_size, self.eos_ids, self.pad_id, self._fast.chat_template],
    ]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face tokenizer folder that `load` reads back.

    transformers 4, and what is built on it, can read it as well.
    """
    self._fast.save_pretrained(os.fspath(directory))
    file = paths.Path(directory) / 'tokenizer_config.json'
    settings = json.loads(file.read_text())
    # How it was loaded here, which is no matter of the folder.
    for name in ('backend', 'is_local', 'local_files_only'):
      settings.pop(name, None)
    # transformers 5 writes names that 4 does not know, and a list that it takes
    # for a dictionary.
    if settings.get('tokenizer_class', '').endswith('Backend'):
      settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if isinstance(settings.get('extra_special_tokens'), list):
      settings['additional_special_tokens'] = settings.pop(
          'extra_special_tokens')
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + '\n')

  def _added(self) -> dict[int, Any]:
    return self._backend.get_added_tokens_decoder()

  def _encode(self, text: str, *, specials: bool) -> list[int]:
    # The switch belongs to the shared backend: hold it while encoding.
    with self._lock:
      if self._backend.encode_special_tokens == specials:
        self._backend.encode_special_tokens = not specials
      return self._backend.encode(text, add_special_tokens=False).ids


def load(
    path: str | os.PathLike[str],
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> Tokenizer:
  """Reads a tokenizer from a Hugging Face folder or a tokenizer.json.

  Args:
    path: a folder with tokenizer.json (or the files from which transformers
      makes a fast tokenizer: vocab.json and merges.txt, tokenizer.model), or
      the tokenizer.json itself, whose folder is then used; local or gs://.
    eos_ids: what the model's config names besides the tokenizer's own.
    pad_id: what the model's config names, where the tokenizer has none.

  Raises:
    ValueError: nothing there, or nothing that is a fast tokenizer.
  """
  path = paths.Path(path)
  folder = path.parent if path.is_file() else path
  known = ('tokenizer.json', 'vocab.json', 'tokenizer.model')
  if not any((folder / name).is_file() for name in known):
    raise ValueError(
        f'No tokenizer at {os.fspath(path)!r}: expected a folder with a '
        'tokenizer.json (or vocab.json and merges.txt, or tokenizer.model) as '
        'Hugging Face models carry it, or the path of the tokenizer.json.'
    )
  if paths.is_remote(folder):
    with tempfile.TemporaryDirectory() as local, paths.explained(folder):
      for name in FILES:
        if (folder / name).exists():
          (folder / name).copy(paths.Path(local, name))
      made = load(local, eos_ids, pad_id)
    made._fast.name_or_path = str(folder)  # for messages
    return made
  transformers = _transformers()
  whole = (folder / 'tokenizer.json').is_file()
  try:
    if whole:
      # tokenizer.json is the whole truth; the model's own class would rebuild
      # it from parts and may need packages that are not installed.
      loader = transformers.PreTrainedTokenizerFast
    else:
      loader = transformers.AutoTokenizer
    fast = loader.from_pretrained(os.fspath(folder), local_files_only=True)
  except Exception as error:  # whatever the parsers raise, the cause is a file
    raise ValueError(
        f'The tokenizer at {os.fspath(folder)!r} cannot be read: {error}'
    ) from error
  if not getattr(fast, 'is_fast', False):
    raise ValueError(
        f'The tokenizer at {os.fspath(folder)!r} has no fast form; save it '
        'once with a tokenizer.json (save_pretrained of a fast tokenizer).'
    )
  return Tokenizer(fast, eos_ids, pad_id)


def from_words(words: Sequence[str], tags: Sequence[str]) -> Tokenizer:
  """A word-level tokenizer for a closed world.

  The vocabulary is pad, eos, unknown, the tags, a newline, a
  space, and ' w' for every word w: a word's token carries its leading space, so
  '<search> x born</search>' is [<search>][ x][ born][</search>] and decoding
  is concatenation. A word without a space before it is unknown.

  Args:
    words: the words, without whitespace and without '<'; duplicates are
      dropped, order is kept.
    tags: tokens of their own, without a leading space (`protocol.TAGS`).

  Raises:
    ValueError: a word that could never be produced by splitting a text.
  """
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers

  for word in words:
    if not re.fullmatch(r'[^\s<]+', word):
      raise ValueError(
          f'The word {word!r} cannot be one token: give words that are not '
          "empty and hold neither whitespace nor '<'."
      )
  tokens = [PAD, EOS, UNKNOWN, *tags, '\n', ' ']
  tokens += [' ' + word for word in dict.fromkeys(words)]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
      models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN)
  )
  backend.decoder = decoders.Fuse()
  either = '|'.join(re.escape(tag) for tag in tags)
  backend.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(rf'{either}| ?[^\s<]+|\s|<'), behavior='isolated'
  )
  return Tokenizer(
      _transformers().PreTrainedTokenizerFast(
          tokenizer_object=backend,
          pad_token=PAD,
          eos_token=EOS,
          unk_token=UNKNOWN,
          clean_up_tokenization_spaces=False,
      )
  )


def _transformers() -> Any:
  """The transformers module, imported without its notice about PyTorch."""
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  import transformers

  return transformers


def _byte_strings(backend: Any) -> list[bytes]:
  """The bytes that each id stands for, b'' where an id is unused."""
  state = json.loads(backend.to_str())
  if state['model']['type'] == 'WordPiece':
    raise ValueError(
        'This is a WordPiece tokenizer (BERT-like): it forgets the spaces of '
        'the text, so its tokens cannot be concatenated. A policy needs a '
        'byte-level BPE, SentencePiece-like or word-level tokenizer.'
    )
  kinds = _component_types(state['decoder'])
  if 'ByteLevel' in kinds:
    alphabet = _byte_alphabet()

    def to_bytes(token: str) -> bytes:
      return b''.join(alphabet.get(c) or c.encode() for c in token)

  elif kinds & {'Metaspace', 'ByteFallback'}:

    def to_bytes(token: str) -> bytes:
      byte = re.fullmatch(r'<0x([0-9A-Fa-f]{2})>', token)
      if byte:
        return bytes.fromhex(byte[1])
      return token.replace('\u2581', ' ').encode()

  else:
    to_bytes = str.encode

  added = backend.get_added_tokens_decoder()
  vocabulary = backend.get_vocab(with_added_tokens=True)
  strings = [b''] * (max([*vocabulary.values(), *added]) + 1)
  for token, i in vocabulary.items():
    strings[i] = to_bytes(token)
  for i, token in added.items():
    strings[i] = token.content.encode()
  return strings


def _component_types(component: Any) -> set[str]:
  """The type names in a tokenizer.json component, nested ones included."""
  if isinstance(component, dict):
    found = {component['type']} if 'type' in component else set()
    return found.union(*map(_component_types, component.values()))
  if isinstance(component, list):
    return set().union(*map(_component_types, component))
  return set()


def _byte_alphabet() -> dict[str, bytes]:
  """The character that stands for each byte in byte-level BPE, inverted.

  Printable Latin-1 characters stand for themselves; the other 68 bytes, in
  order, take the code points from 256 on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): bytes([byte]) for byte in printable}
  alphabet |= {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
  return alphabet
