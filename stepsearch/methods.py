"""How to answer a question with a model and an engine: ours, and baselines.

    Method ─▶ Protocol: what the model is told, how it searches and answers

Every method is a dialect of one protocol, played by one collector with the same
sampler, engine and budgets. The words of the prompts are ours. `differs` says
in what a baseline is not what its paper did, and goes into every result.
"""

from __future__ import annotations

import dataclasses

from stepsearch import protocol

AGENT = 'agent'
_AGENT = protocol.Protocol()

_DIRECT = """\
Answer the question with the shortest phrase that answers it: a name, a date, \
a number, yes or no. Write nothing else.

Question: {question}
Answer:"""

_COT = """\
Answer the question. Reason step by step in a few short sentences, then end \
with one line of the form "The answer is" followed by the shortest phrase that \
answers the question.

Question: {question}
"""

_RAG = """\
Answer the question with the shortest phrase that answers it: a name, a date, \
a number, yes or no. Write nothing else. These passages may help:

{documents}

Question: {question}
Answer:"""


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
}


def make(name: str, instruction: str = '') -> Method:
  """The method of a name.

  Args:
    name: a key of `METHODS`.
    instruction: takes the place of its prompt, with '{question}' in it, and
      '{documents}' where its own has that.

  Raises:
    ValueError: no such method, or an instruction that leaves one of them out.
  """
  if name not in METHODS:
    raise ValueError(
        f'--method={name}: there is no such method; there are '
        f'{", ".join(METHODS)}.')
  method = METHODS[name]
  if not instruction:
    return method
  for part in ('{question}', '{documents}'):
    if (part in instruction) < (part in method.protocol.instruction):
      raise ValueError(
          f'--prompt: the method {name} needs {part} in its prompt.')
  return dataclasses.replace(method, protocol=dataclasses.replace(
      method.protocol, instruction=instruction))
