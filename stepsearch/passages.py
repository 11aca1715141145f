"""Passages as text: one field for title and text, as Search-R1 writes them.

    contents  "title"⏎text      its corpora, and what its servers return
"""

from __future__ import annotations

from stepsearch.types import Document


def contents(document: Document) -> str:
  """Title and text in one field."""
  return f'"{document.title}"\n{document.text}'


def from_contents(document_id: str, field: str) -> Document:
  """The document of one field; what has no second line has no title."""
  title, separator, text = field.partition('\n')
  if not separator:
    title, text = '', field
  return Document(document_id, title.strip().strip('"'), text)
