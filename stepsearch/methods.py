"""How to answer a question with a model and an engine: ours, and others.

    Method ─▶ Protocol: what the model is told, how it searches and answers

Every method is a dialect of one protocol, played by one collector with the same
sampler, engine and budgets. `differs` says in what a method is not what its
paper did, and goes into every result.

The words of all prompts are ours. What others have trained is used to the words
of its own prompt: `search_r1` and `stepsearch` keep its tags, passages and chat
template, and --prompt=FILE takes the words.
"""

from __future__ import annotations

import dataclasses

from stepsearch import protocol

AGENT = 'agent'
_AGENT = protocol.Protocol()

_DIRECT = """\
Answer the question in as few words as possible, from what you know. Give only \
the answer, without a sentence around it.

Question: {question}
Answer:"""

_COT = """\
Answer the question. Reason step by step in a few short sentences, then end \
with one line of the form "The answer is" followed by the shortest phrase that \
answers the question.

Question: {question}
"""

_RAG = """\
Answer the question in as few words as possible, with the help of the passages \
below. Give only the answer, without a sentence around it.

{documents}

Question: {question}
Answer:"""


_IRCOT = """\
Answer the question by reasoning in short sentences, each on a line of its \
own. New passages follow each sentence. Once you know the answer, write a line \
that begins with "So the answer is" and gives the shortest phrase that answers \
the question.

{documents}

Question: {question}
Reasoning:"""

_QUERY = '<|begin_search_query|>', '<|end_search_query|>'
_RESULT = '<|begin_search_result|>', '<|end_search_result|>'
_SEARCH_O1 = f"""\
Answer the question, reasoning step by step. Whenever you are not sure of a \
fact, look it up: write {_QUERY[0]}query{_QUERY[1]}, and what is found for it \
comes back between {_RESULT[0]} and {_RESULT[1]}. Then go on. Give the answer, \
in as few words as possible, as \\boxed{{answer}}.

Question: """ + '{question}\n'

_SEARCH_R1 = f"""\
Answer the question that follows. Each time you have read something new, first \
reason between {protocol.THINK} and {protocol.THINK_END}. When a fact is \
missing, ask a search engine by {protocol.SEARCH_OPEN} query \
{protocol.SEARCH_END}; its best results come back between \
{protocol.INFORMATION} and {protocol.INFORMATION_END}. Search as many times as \
you like. When nothing is missing any more, give the bare answer between \
{protocol.ANSWER_OPEN} and {protocol.ANSWER_END}, as in {protocol.ANSWER_OPEN} \
Beijing {protocol.ANSWER_END}. Question: """ + '{question}\n'

# Search-R1's loop says nothing when searches are over.
_RELEASED = dataclasses.replace(
    _AGENT, instruction=_SEARCH_R1, thinks=False, chat='on', last_turn='',
    warning='\nThat was no valid action: write one query in search tags, or '
    'the final answer in answer tags. I try again.\n')
_OUR_PROMPT = '; so are the words of the prompt'


@dataclasses.dataclass(frozen=True)
class Method:
  """A protocol, and what has to be known of it to compare."""

  protocol: protocol.Protocol
  does: str  # one line
  differs: str = ''  # from what its name stands for


METHODS = {
    AGENT: Method(_AGENT, 'thinks and searches as it is trained to'),
    'direct': Method(
        dataclasses.replace(
            _AGENT, instruction=_DIRECT, query=None, answers='line',
            thinks=False),
        'answers at once, without a search'),
    'cot': Method(
        dataclasses.replace(
            _AGENT, instruction=_COT, query=None, answers='conclusion',
            thinks=False),
        'reasons step by step, without a search'),
    'rag': Method(
        dataclasses.replace(
            _AGENT, instruction=_RAG, query=None, answers='line',
            thinks=False),
        'searches once for the question and reads what is found'),
    'ircot': Method(
        dataclasses.replace(
            _AGENT, instruction=_IRCOT, information_open='\n',
            information_close='\n\n', warning='\n',
            last_turn='So the answer is', query=('', '\n'),
            answers='conclusion', thinks=False, chat='off'),
        'searches with the question, then with each sentence of its reasoning',
        'IRCoT (2212.10509) shows its model solved examples, gathers all '
        'passages before the question, and lets another prompt read the '
        'answer: here there are no examples, passages follow their sentence, '
        'and the answer is what the reasoning concludes'),
    'search_o1': Method(
        dataclasses.replace(
            _AGENT, instruction=_SEARCH_O1,
            information_open=f'\n\n{_RESULT[0]}',
            information_close=f'{_RESULT[1]}\n\n',
            warning='\n\nThere was no query: write one, or the answer in a '
            'box.\n\n',
            last_turn='No searches are left: give the answer in a box.\n\n',
            query=_QUERY, answers='boxed', thinks=False),
        'reasons, searches where it is unsure, and boxes its answer',
        'Search-o1 (2501.05366) has its model first read the documents found '
        'and pass on what matters: here it sees the passages themselves'),
    'search_r1': Method(
        _RELEASED, "searches as Search-R1's checkpoints were trained to",
        'tags, passages and chat template are those of Search-R1 '
        f'(2503.09516); the warning is in our words{_OUR_PROMPT}'),
    'stepsearch': Method(
        dataclasses.replace(_RELEASED, thinks=True),
        "searches as StepSearch's released checkpoints were trained to",
        'tags, passages and chat template are those of the released code of '
        f'2505.15107; the warning is in our words{_OUR_PROMPT}'),
}


def make(name: str, instruction: str = '', system: str = '') -> Method:
  """The method of a name.

  Args:
    name: a key of `METHODS`.
    instruction: takes the place of its prompt, with '{question}' in it, and
      '{documents}' where its own has that.
    system: a system message.

  Raises:
    ValueError: no such method, or an instruction that leaves one of them out.
  """
  if name not in METHODS:
    raise ValueError(
        f'--method={name}: there is no such method; there are '
        f'{", ".join(METHODS)}.')
  method = METHODS[name]
  if system:
    method = dataclasses.replace(method, protocol=dataclasses.replace(
        method.protocol, system=system))
  if not instruction:
    return method
  for part in ('{question}', '{documents}'):
    if (part in instruction) < (part in method.protocol.instruction):
      raise ValueError(
          f'--prompt: the method {name} needs {part} in its prompt.')
  return dataclasses.replace(
      method, differs=method.differs.removesuffix(_OUR_PROMPT),
      protocol=dataclasses.replace(method.protocol, instruction=instruction))
