"""Rows of questions and passages, in the shapes in which they are published.

    file ─ rows ─▶ Row ─ shape ─▶ Example, Document

A row's shape is told by its fields, never by the file's name:

    own         question, answers; or answer, a text or a list. All else is
                optional: id, gold [ids, or {id, title, text}], decomposition
                [{question, answer, gold}], or sub_questions where the #k are
                replaced already, search_keys [sub-question][query], evidences
                [[subject, relation, object]], hops, dataset, source, licence
    released    with arXiv 2505.15107: question, final_answer, answer_aliases,
                sub_searchs, sub_support_docs [{title, paragraph_text}]; as of
                `prepare keys` also sub_questions [{question, answer, gold}],
                whose gold are places in sub_support_docs
    musique     question, answer, answer_aliases, question_decomposition, and
                paragraphs or else document_id, the gold title
    hotpotqa    HotpotQA and 2WikiMultihopQA, official or as on Hugging Face:
                question, answer, supporting_facts, context; 2Wiki's evidences
                and qa_pairs
    flashrag    question, golden_answers, metadata; also what Search-R1 trains
                on, and its transcripts
    verl        prompt, reward_model, extra_info

A gold document may be spelled out, or be an id or a title that waits for a
corpus (`Document.text` is empty then; `datasets.read_questions` looks it up).
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import json
import os
import re
from typing import Any

from stepsearch import passages
from stepsearch.data.rows import Fault
from stepsearch.data.rows import Row
from stepsearch.types import Document
from stepsearch.types import Example
from stepsearch.types import SubQuestion

LICENCES = {
    'musique': 'CC BY 4.0',
    'hotpotqa': 'CC BY-SA 4.0',
    '2wiki': 'Apache-2.0',
    'bamboogle': 'MIT',
}

_REFERENCE = re.compile(r'#(\d+)')
_NAMED = re.compile(
    r'(?<![a-z0-9])(musique|hotpot|2wiki|bamboogle)', re.IGNORECASE)
_ALIKE = {'hotpot': 'hotpotqa'}
_RELATION = ' >> '  # as MuSiQue writes a sub-question that is a relation


def example(row: Row) -> Example:
  """The question of a row, whichever shape it has.

  Raises:
    Fault: a field is missing or has another type; no shape is known.
  """
  return _SHAPES[shape(row)](row)


def shape(row: Row) -> str:
  """Which of the shapes of the module's docstring a row has.

  Raises:
    Fault: none of them.
  """
  if 'final_answer' in row:
    return 'released'
  if 'question_decomposition' in row or 'paragraphs' in row:
    return 'musique'
  if 'answers' not in row and ('supporting_facts' in row or isinstance(
      row.values.get('context'), (list, dict))):
    return 'hotpotqa'
  if 'golden_answers' in row and 'question' in row:
    return 'flashrag'
  if 'reward_model' in row:
    return 'verl'
  if 'question' in row.values or 'Question' in row:
    return 'own'
  fields = ', '.join(map(str, row.values))
  raise Fault(
      row.path, f'{row.where}, field question',
      f'it is missing; the row has {fields}. A question has at least question '
      'and answers')


def context(row: Row) -> list[Document]:
  """The passages that come with a question, without ids; else none.

  Raises:
    Fault: a field of them is missing or has another type.
  """
  row = _with_metadata(row)
  if 'paragraphs' in row:
    documents = []
    for i, item in enumerate(row.list('paragraphs')):
      part = row.part(f'paragraphs[{i}]', item)
      documents.append(Document(
          '', part.text('title', blank=True), part.text('paragraph_text')))
    return documents
  if 'context' not in row:
    return []
  titled = _unpacked(row, 'context')
  if isinstance(titled, dict):
    titles = titled.get('title')
    sentences = titled.get('sentences', titled.get('content'))
    if not isinstance(titles, list) or not isinstance(sentences, list) or (
        len(titles) != len(sentences)):
      raise row.error(
          'context', 'expected title and sentences, two lists of one length')
    titled = [list(pair) for pair in zip(titles, sentences)]
  documents = []
  for i, item in enumerate(row.list('context', value=titled)):
    if not isinstance(item, list) or len(item) != 2:
      raise row.error(f'context[{i}]', 'expected [title, [sentences]]')
    title = row.text(f'context[{i}][0]', blank=True, value=item[0])
    parts = item[1] if isinstance(item[1], list) else [item[1]]
    text = ' '.join(
        s for s in (
            row.text(f'context[{i}][1]', blank=True, value=part).strip()
            for part in parts) if s)
    if text:  # HotpotQA has pages without a first paragraph
      documents.append(Document('', title, text))
  return documents


def passage(row: Row) -> Document:
  """The document of a row of a corpus.

  Raises:
    Fault: a field is missing or has another type.
  """
  row.id()
  if 'contents' in row.values and 'text' not in row.values:
    row.text('contents')
  else:
    row.text('title', blank=True)
    row.text('text')
  document = passages.document(row.values)
  if not document.text.strip():
    raise row.error('contents', 'nothing follows its title')
  return document


class Pool:
  """Passages of many questions, each title and text once, ids counted up."""

  def __init__(self):
    self._ids: dict[bytes, int] = {}

  def __len__(self) -> int:
    return len(self._ids)

  def add(self, document: Document) -> tuple[Document, bool]:
    """The document under its id in the pool, and whether it is new there."""
    key = hashlib.blake2b(
        f'{document.title}\n{document.text}'.encode(), digest_size=16).digest()
    new = len(self._ids)
    place = self._ids.setdefault(key, new)
    return (
        Document(str(place), document.title, document.text),
        place == new)


def record(item: Example) -> dict[str, Any]:
  """A question as a row of our own shape, which `example` reads."""
  row = {
      'id': item.id, 'question': item.question, 'answers': list(item.answers)}
  if item.gold_documents:
    row['gold'] = [
        {'id': d.id, 'title': d.title, 'text': d.text}
        for d in item.gold_documents]
  if item.sub_questions:
    row['sub_questions'] = [
        {'question': s.question, 'answer': s.answer, 'gold': list(s.gold)}
        for s in item.sub_questions]
  if item.search_keys:
    row['search_keys'] = [list(keys) for keys in item.search_keys]
  for field in ('hops', 'dataset', 'source', 'licence'):
    if getattr(item, field):
      row[field] = getattr(item, field)
  return row


def fill(question: str, answers: Sequence[str]) -> str:
  """Replaces #k by answer k; a # that counts nothing earlier stays."""

  def answer(match: re.Match[str]) -> str:
    k = int(match[1])
    return answers[k - 1] if 1 <= k <= len(answers) and answers[k - 1] else (
        match[0])

  return _REFERENCE.sub(answer, question)


def unresolved(item: Example) -> list[str]:
  """The sub-questions in which a #k is left, that no earlier answer brought."""
  left = []
  for i, sub in enumerate(item.sub_questions):
    text = sub.question
    for earlier in item.sub_questions[:i]:
      text = text.replace(earlier.answer, '') if earlier.answer else text
    if _REFERENCE.search(text):
      left.append(sub.question)
  return left


def _own(row: Row) -> Example:
  if 'Question' in row:  # Bamboogle's table
    row = row.holding({
        field.lower(): value for field, value in row.values.items()})
  example_id = row.id() if 'id' in row else str(row.number)
  gold = []
  for i, item in enumerate(row.list('gold', [])):
    gold.append(_reference(row, f'gold[{i}]', item, f'{example_id}/{i}'))
  field = 'decomposition' if 'decomposition' in row else 'sub_questions'
  subs = []
  for i, item in enumerate(row.list(field, [])):
    part = row.part(f'{field}[{i}]', item)
    ids = part.values.get('gold')
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    ids = [part.id('gold', value=item) for item in ids]
    subs.append(
        _sub(part, subs, ids) if field == 'decomposition'
        else _filled(part, ids))
  named = {document.id for document in gold}
  of_subs = dict.fromkeys(i for sub in subs for i in sub.gold)
  gold += [Document(i, '', '') for i in of_subs if i not in named]
  if not subs:
    subs = _evidences(row)
  keys = None
  if 'search_keys' in row:
    keys = tuple(
        row.texts(f'search_keys[{i}]', value=item, empty=True)
        for i, item in enumerate(row.list('search_keys')))
  return _example(
      row, example_id, row.text('question'), _answers(row), gold, subs, keys)


def _released(row: Row) -> Example:
  example_id = row.id() if 'id' in row else str(row.number)
  answers = (
      row.text('final_answer'), *row.texts('answer_aliases', empty=True))
  documents = []
  for i, item in enumerate(row.list('sub_support_docs')):
    part = row.part(f'sub_support_docs[{i}]', item)
    documents.append(Document(
        f'{example_id}/{i}', part.text('title', blank=True),
        part.text('paragraph_text')))
  subs = []
  for i, item in enumerate(row.list('sub_questions', [])):
    part = row.part(f'sub_questions[{i}]', item)
    places = part.list('gold', [])
    for place in places:
      if not isinstance(place, int) or not 0 <= place < len(documents):
        raise part.error(
            'gold', f'{place!r} is none of the {len(documents)} rows of '
            'sub_support_docs')
    subs.append(_filled(part, [documents[place].id for place in places]))
  # A sub-question may have lost all its keys; `prepare keys` counts it.
  keys = tuple(
      row.texts(f'sub_searchs[{i}]', value=item, empty=True)
      for i, item in enumerate(row.list('sub_searchs')))
  return _example(
      row, example_id, row.text('question'), answers, documents, subs, keys)


def _musique(row: Row) -> Example:
  if row.values.get('answerable') is False:
    raise row.error(
        'answerable', 'it is false: only questions that have an answer can be '
        "used, those of MuSiQue-Ans; leave MuSiQue-Full's others out")
  example_id = row.id() if 'id' in row else str(row.number)
  paragraphs = row.list('paragraphs', [])
  found = {
      item.get('idx', i): document
      for i, (item, document) in enumerate(zip(paragraphs, context(row)))}
  supporting = [
      item.get('idx', i) for i, item in enumerate(paragraphs)
      if item.get('is_supporting')]
  documents: dict[str, Document] = {}
  subs = []
  for i, item in enumerate(row.list('question_decomposition', [])):
    part = row.part(f'question_decomposition[{i}]', item)
    place = part.values.get('paragraph_support_idx')
    gold = []
    if found and isinstance(place, int):
      if place not in found:
        raise part.error(
            'paragraph_support_idx',
            f'{place} is none of the {len(found)} paragraphs')
      gold = [f'{example_id}/{place}']
      documents.setdefault(gold[0], found[place])
    elif 'support_paragraph' in part:  # FlashRAG's
      inner = part.part('support_paragraph', part.values['support_paragraph'])
      gold = [f'{example_id}/{i}']
      documents[gold[0]] = Document(
          '', inner.text('title', blank=True), inner.text('paragraph_text'))
    elif 'document_id' in part:
      title, _, paragraph = part.id('document_id').rpartition('_')
      if not paragraph.isdigit():
        title = part.id('document_id')
      gold = [f'{example_id}/{i}']
      documents[gold[0]] = Document('', title, '')
    subs.append(_sub(part, subs, gold))
  for place in supporting:
    documents.setdefault(f'{example_id}/{place}', found[place])
  return _example(
      row, example_id, row.text('question'), _answers(row),
      [Document(id, d.title, d.text) for id, d in documents.items()], subs)


def _hotpotqa(row: Row) -> Example:
  row = _with_metadata(row)
  example_id = row.id(
      '_id' if '_id' in row else 'id') if '_id' in row or 'id' in row else (
          str(row.number))
  texts = {d.title: d.text for d in reversed(context(row))}
  facts = _unpacked(row, 'supporting_facts') if 'supporting_facts' in row else (
      [])
  if isinstance(facts, dict):
    titles = row.part('supporting_facts', facts).list('title')
  else:
    titles = [
        item[0] if isinstance(item, list) and item else item
        for item in row.list('supporting_facts', value=facts)]
  titles = row.texts('supporting_facts', empty=True, value=titles)
  gold = [
      Document(f'{example_id}/{i}', title, texts.get(title, ''))
      for i, title in enumerate(titles)]
  subs = []
  for i, item in enumerate(row.list('qa_pairs', [])):
    subs.append(_sub(row.part(f'qa_pairs[{i}]', item), subs, []))
  evidences = _evidences(row)
  if len(subs) == len(evidences):
    # The answers of qa_pairs are sentences, those of evidences what is asked
    # for; where the subject is a gold title the passage is known too.
    subs = [
        SubQuestion(s.question, e.answer, about(e.question, gold))
        for s, e in zip(subs, evidences)]
  return _example(
      row, example_id, row.text('question'), _answers(row), gold,
      subs or evidences)


def _flashrag(row: Row) -> Example:
  inner = _with_metadata(row)
  if 'supporting_facts' in inner or 'context' in inner:
    return _hotpotqa(row)
  if 'question_decomposition' in inner:
    return _musique(inner)
  example_id = row.id() if 'id' in row else str(row.number)
  return _example(
      row, example_id, row.text('question'), _answers(row), [],
      _evidences(inner))


def _verl(row: Row) -> Example:
  extra = row.part('extra_info', row.values.get('extra_info') or {})
  if 'question' in row:
    question = row.text('question')
  elif 'question' in extra:
    question = extra.text('question')
  else:
    question = _asked(row)
  if 'id' in row:
    example_id = row.id()
  elif 'index' in extra:
    split = extra.values.get('split')
    example_id = f'{split}_{extra.id("index")}' if split else extra.id('index')
  else:
    example_id = str(row.number)
  return _example(row, example_id, question, _answers(row), [], [])


_SHAPES = {
    'own': _own, 'released': _released, 'musique': _musique,
    'hotpotqa': _hotpotqa, 'flashrag': _flashrag, 'verl': _verl}


def _example(row, example_id, question, answers, gold, subs, keys=None):
  """Puts the parts together; `keys` default to the sub-questions."""
  if keys is None:
    keys = tuple((sub.question,) for sub in subs)
  hops = row.values.get('hops')
  if hops is None:
    hops = len(subs) or len(keys) or len(gold)
  elif isinstance(hops, bool) or not isinstance(hops, int) or hops < 0:
    raise row.error('hops', f'expected a number of hops, found {hops!r}')
  source = row.values.get('source') or row.values.get('data_source')
  licence = row.values.get('licence')
  return Example(
      id=example_id,
      question=question,
      answers=tuple(dict.fromkeys(answers)),
      gold_documents=tuple(gold),
      search_keys=tuple(keys),
      hops=hops,
      dataset=row.text('dataset') if 'dataset' in row else '',
      sub_questions=tuple(subs),
      source=source if isinstance(source, str) else (
          os.path.basename(os.fspath(row.path))),
      licence=licence if isinstance(licence, str) else (
          LICENCES.get(release(row) or _named(row), '')),
  )


def _answers(row: Row) -> tuple[str, ...]:
  """All answers that a row accepts, the reference first."""
  if 'answers' in row:
    return row.texts('answers')
  if 'golden_answers' in row:
    return row.texts('golden_answers')
  if 'reward_model' in row:
    part = row.part('reward_model', row.values['reward_model'])
    truth = part.values.get('ground_truth')
    if isinstance(truth, dict):  # Search-R1's
      part = part.part('ground_truth', truth)
      field = 'target'
    else:
      field = 'ground_truth'
    return _one_or_more(part, field)
  aliases = ()
  for field in ('answer_aliases', 'aliases'):
    if field in row:
      aliases += row.texts(field, empty=True)
  if 'answer' not in row.values:
    fields = ', '.join(map(str, row.values))
    raise row.error('answers', f'it is missing; the row has {fields}')
  return (*_one_or_more(row, 'answer'), *aliases)


def _one_or_more(row, field):
  if isinstance(row.values.get(field), list):
    return row.texts(field)
  return (row.text(field),)


def _sub(part: Row, before: Sequence[SubQuestion], gold: Sequence[str]):
  return SubQuestion(
      fill(part.text('question'), [sub.answer for sub in before]),
      part.text('answer'), tuple(gold))


def _filled(part: Row, gold: Sequence[str]) -> SubQuestion:
  """A sub-question whose references are replaced; its answer may be unknown."""
  return SubQuestion(
      part.text('question'),
      part.text('answer', blank=True) if 'answer' in part else '', tuple(gold))


def _evidences(row: Row) -> list[SubQuestion]:
  """2Wiki's triples as sub-questions, written as MuSiQue writes relations."""
  found = _unpacked(row, 'evidences') if 'evidences' in row else []
  if isinstance(found, dict):  # as Hugging Face stores it
    part = row.part('evidences', found)
    lists = [part.list(name) for name in ('fact', 'relation', 'entity')]
    if len(set(map(len, lists))) > 1:
      raise row.error('evidences', 'expected three lists of one length')
    found = list(map(list, zip(*lists)))
  subs = []
  for i, item in enumerate(row.list('evidences', value=found)):
    item = list(item.values()) if isinstance(item, dict) else item
    triple = row.list(f'evidences[{i}]', value=item)
    if len(triple) != 3:
      raise row.error(
          f'evidences[{i}]', 'expected [subject, relation, object]')
    subject, relation, value = (
        row.text(f'evidences[{i}][{j}]', value=part)
        for j, part in enumerate(triple))
    subs.append(SubQuestion(f'{subject}{_RELATION}{relation}', value))
  return subs


def about(question: str, gold: Sequence[Document]) -> tuple[str, ...]:
  """Ids of the gold documents whose title is what a relation starts from."""
  subject, relation, _ = question.partition(_RELATION)
  if not relation:
    return ()
  return tuple(
      d.id for d in gold
      if d.title == subject or d.title.startswith(f'{subject} ('))


def _reference(row: Row, field: str, item: Any, otherwise: str) -> Document:
  """A gold document: an id, or an object that says more."""
  if not isinstance(item, dict):
    return Document(row.id(field, value=item), '', '')
  part = row.part(field, item)
  return Document(
      part.id() if 'id' in part else otherwise,
      part.text('title', blank=True) if 'title' in part else '',
      part.text('text', blank='title' in part) if 'text' in part else '')


def _asked(row: Row) -> str:
  """The question in a prompt; after its last `Question:` where it has one."""
  prompt = row.values.get('prompt')
  if isinstance(prompt, list):
    asked = [
        (i, message) for i, message in enumerate(prompt)
        if isinstance(message, dict) and message.get('role') == 'user']
    if not asked:
      raise row.error('prompt', 'no message in it has the role user')
    i, message = asked[-1]
    prompt = row.part(f'prompt[{i}]', message).text('content')
  text = row.text('prompt', value=prompt).rpartition('Question:')[2].strip()
  if not text:
    raise row.error('prompt', 'nothing follows its last Question:')
  return text


def _with_metadata(row: Row) -> Row:
  """A row of FlashRAG with what its `metadata` holds beside the rest."""
  values, inner = row.values, row.values.get('metadata')
  while isinstance(inner, dict):  # MuSiQue's has another in it
    values = {k: v for k, v in inner.items() if v is not None} | values
    inner = inner.get('metadata')
  return row if values is row.values else row.holding(values)


def _unpacked(row: Row, field: str) -> Any:
  """A field's value; some files keep lists as JSON in a text."""
  value = row.values[field]
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except json.JSONDecodeError as error:
    raise row.error(field, f'it is not JSON ({error})') from None


def release(row: Row) -> str:
  """Of which published set a row has the fields; '' = not known."""
  if 'question_decomposition' in row:
    return 'musique'
  if 'supporting_facts' in row and 'evidences' in row:
    return '2wiki'
  if 'supporting_facts' in row and 'level' in row:
    return 'hotpotqa'
  return ''


def _named(row: Row) -> str:
  """Which published set a row, its file or its folder names; '' = none."""
  folder, name = os.path.split(os.fspath(row.path))
  texts = name, os.path.basename(folder)
  if isinstance(row.values.get('data_source'), str):
    texts = (row.values['data_source'],)  # a file may have several
  for text in texts:
    match = _NAMED.search(text)
    if match:
      name = match[1].lower()
      return _ALIKE.get(name, name)
  return ''
