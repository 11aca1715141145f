"""Web search APIs as engines: Serper's, Bing's, and what speaks like them.

    queries ─▶ client (cache, limit, retries) ─▶ pages ─▶ Document(link, …)

A page is known by its link. Its title and the snippet that the API shows of it
are the document; pages are not fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

from stepsearch import client as client_lib
from stepsearch import paths
from stepsearch.retrieval import retriever
from stepsearch.types import Document


@dataclasses.dataclass(frozen=True)
class _Api:
  """How one API is asked, and how it answers."""

  url: str
  method: str
  header: str  # of the key
  variable: str  # of the environment, that holds the key
  payload: Callable[[str, int], dict[str, Any]]  # query, k
  rows: Callable[[Mapping[str, Any]], Any]  # the list of pages in an answer
  title: str  # fields of a page
  link: str
  most: int  # pages that one request may ask for


APIS = {
    'serper': _Api(
        'https://google.serper.dev/search', 'POST', 'X-API-KEY',
        'SERPER_API_KEY', lambda query, k: {'q': query, 'num': k},
        lambda answer: answer['organic'], 'title', 'link', 100),
    'bing': _Api(
        'https://api.bing.microsoft.com/v7.0/search', 'GET',
        'Ocp-Apim-Subscription-Key', 'BING_API_KEY',
        lambda query, k: {'q': query, 'count': k},
        # Where nothing was found there are no webPages.
        lambda answer: answer.get('webPages', {'value': []})['value']
        if answer['_type'] == 'SearchResponse' else None,
        'name', 'url', 50),
}


class WebSearch:
  """A web search API; each query is one request.

  Attributes:
    most: pages that a query may ask for.
    name: of the API, for people.
  """

  def __init__(
      self, api: str, *, url: str = '', key_variable: str = '',
      cache: paths.Address = '', per_second: float = 0.0, concurrency: int = 8,
      timeout: float = 15.0, retries: int = 4, wait: float = 1.0,
  ):
    """Reads the key; connects to nothing yet.

    Args:
      api: serper or bing.
      url: another address that speaks like it.
      key_variable: the environment variable that holds the key; '': the API's
        own, SERPER_API_KEY or BING_API_KEY.
      cache: as of `client.Client`, like all that follow.
      per_second: requests a second.
      concurrency: requests in flight at once.
      timeout: seconds for an answer.
      retries: requests after the first that fails.
      wait: seconds before the first retry.

    Raises:
      ValueError: an unknown API, no key, or as of `client.Client`.
    """
    if api not in APIS:
      raise ValueError(
          f'{api!r} is no web search API that is known here: use '
          f'{" or ".join(APIS)}, with the address of what speaks like it.')
    self._api = made = APIS[api]
    variable = key_variable or made.variable
    key = client_lib.key_of(variable, f'The web search API {api}')
    self._client = client_lib.Client(
        url or made.url, method=made.method, headers={made.header: key},
        secret=key, cache=cache, per_second=per_second,
        concurrency=concurrency, timeout=timeout, retries=retries, wait=wait)
    # Of a service that is down not every query has to find that out.
    self._patience = timeout * (retries + 1) + (
        concurrency / per_second if per_second else 0.0)
    self.most = made.most
    self.name = f'the web search API {api} at {self._client.url}'

  @property
  def counts(self) -> dict[str, int]:
    """Requests so far, as of `client.Client`."""
    return self._client.counts

  def search(
      self, queries: Sequence[str], k: int
  ) -> list[list[Document]]:
    """As of `retriever.Engine`.

    Raises:
      retriever.PartlyFailed: some queries got no answer, or all.
      client.Refused: the API takes no request: key, credit or address.
      ValueError: k is more than one request may ask for.
    """
    if not 1 <= k <= self.most:
      raise ValueError(
          f'{self.name} gives between 1 and {self.most} pages a query: '
          f'k = {k} cannot be asked for.')
    distinct = list(dict.fromkeys(query for query in queries if query.strip()))
    found = self._client.ask_all(
        [self._api.payload(query, k) for query in distinct],
        lambda answer: self._documents(answer, k), patience=self._patience)
    by_query = dict(zip(distinct, found))
    failures = [row for row in found if isinstance(row, client_lib.Failed)]
    results = [
        by_query[query] if query.strip() else [] for query in queries]
    if failures:
      silent = len(failures) == len(distinct)
      raise retriever.PartlyFailed(
          f'{self.name} has not answered {len(failures)} of {len(distinct)} '
          f'queries, at first {failures[0]}',
          [None if silent or isinstance(row, client_lib.Failed) else row
           for row in results])
    return results

  def _documents(self, answer, k) -> list[Document]:
    try:
      rows = self._api.rows(answer)
      return list({
          document.id: document for document in map(self._document, rows)
      }.values())[:k]
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(f'{error!r} where pages should be') from None

  def _document(self, row) -> Document:
    title, text = row.get(self._api.title, ''), row.get('snippet', '')
    link = row.get(self._api.link)
    if not isinstance(title, str) or not isinstance(text, str):
      raise TypeError('title or snippet is no text')
    if not isinstance(link, str) or not link:
      link = hashlib.blake2b(
          f'{title}\n{text}'.encode(), digest_size=8).hexdigest()
    return Document(link, title, text)


def patient(
    api: str, k: int, *, timeout: float, retries: int, give_up: float,
    say: Callable[[str], None] = print, **options: Any,
) -> retriever.Patient:
  """Makes an engine for rollouts, and tries it with one question.

  Args:
    api: as of `WebSearch`.
    k: pages a query that will be asked for.
    timeout: as of `WebSearch`.
    retries: as of `WebSearch`.
    give_up: as of `retriever.Patient`.
    say: prints a line about the engine.
    **options: of `WebSearch`.

  Raises:
    ValueError: as of `WebSearch`; the API takes no request of ours.
  """
  engine = WebSearch(api, timeout=timeout, retries=retries, **options)
  try:
    engine.search(['Who wrote Hamlet?'], k)
  except retriever.PartlyFailed as error:
    raise ValueError(
        f'config.retriever.web = {api!r} does not answer ({error}): look at '
        'the network and at config.retriever.web_url.') from error
  say(f'{engine.name}: answers')
  # The engine bounds and repeats its requests itself.
  return retriever.Patient(
      engine, name=engine.name, timeout=None, retries=0, give_up=give_up)
