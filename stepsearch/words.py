"""Texts compared word by word, as SQuAD does: answers, keys and passages."""

from __future__ import annotations

import re
import string

PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')


def normalize(text: str) -> str:
  """SQuAD normalisation: lower case, no punctuation, no a/an/the, one space."""
  text = _ARTICLES.sub(' ', text.lower().translate(PUNCTUATION))
  return ' '.join(text.split())


def occurs(answer: str, text: str) -> bool:
  """Whether the words of an answer stand side by side in a text.

  Both are normalised; whole words count, so that 'Rome' is not in 'Romero'. An
  answer without words occurs nowhere.
  """
  answer = normalize(answer)
  return bool(answer) and f' {answer} ' in f' {normalize(text)} '
