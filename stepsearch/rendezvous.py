"""How processes find each other: all call process 0, which knows who it misses.

    process i ── [i, count, host] ──▶ process 0 ── the hosts, or why not ──▶ all

jax meets in the same way at the same port afterwards, but where a process does
not come it aborts, and does not say which. The connections stay: whoever holds
the other end of one learns at once when a process is gone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any


def is_loopback(coordinator: str) -> bool:
  """Whether HOST:PORT is for processes of this machine only."""
  return coordinator.rpartition(':')[0] in ('localhost', '127.0.0.1', '[::1]')


def meet(
    coordinator: str, count: int, index: int, timeout: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """Waits until all processes are there.

  Args:
    coordinator: HOST:PORT, at which process 0 listens.
    count: of the processes.
    index: of this one.
    timeout: seconds.

  Returns:
    the host name of each process, and connections by process: of process 0 to
    all others, of those to process 0.

  Raises:
    ValueError: names the processes that did not come, or came twice, or what
      is wrong with the coordinator.
  """
  if index:
    return _call(coordinator, count, index, timeout)
  host, _, port = coordinator.rpartition(':')
  try:
    server = socket.create_server(
        (host.strip('[]') if is_loopback(coordinator) else '', int(port)),
        backlog=count)
  except OSError as error:
    raise ValueError(
        f'--coordinator={coordinator}: process 0 cannot listen at port {port} '
        f'({error.strerror or error}): choose another.') from error
  deadline = time.monotonic() + timeout
  hosts, links = {0: socket.gethostname()}, {}

  def refuse(text, *more):
    for link in (*links.values(), *more):
      send(link, text)
      link.close()
    raise ValueError(text)

  with server:
    while len(hosts) < count:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        link, _ = server.accept()
      except TimeoutError:
        missing = ', '.join(str(i) for i in range(count) if i not in hosts)
        refuse(
            f'of {count} processes, number {missing} did not come to '
            f'{coordinator} within {timeout:.0f} s; there were '
            + ', '.join(f'{i} on {hosts[i]}' for i in sorted(hosts)) + '.')
      said = receive(link, 5)
      if not isinstance(said, list) or len(said) != 3:
        link.close()
        continue  # not one of ours
      other, total, name = said
      if total != count:
        refuse(
            f'process {other} on {name} was started with --num_processes='
            f'{total}, and process 0 on {hosts[0]} with {count}.', link)
      if other in hosts:
        refuse(
            f'--process_id={other} was given twice, on {hosts[other]} and on '
            f'{name}.', link)
      hosts[other], links[other] = name, link
  found = [hosts[i] for i in range(count)]
  for link in links.values():
    send(link, found)
    _keep_alive(link)
  return found, links


def _call(coordinator, count, index, timeout):
  host, _, port = coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  while True:
    try:
      link = socket.create_connection(
          (host.strip('[]'), int(port)), max(deadline - time.monotonic(), 0.1))
      break
    except OSError as error:
      if time.monotonic() > deadline:
        raise ValueError(
            f'--coordinator={coordinator}: process 0 could not be reached '
            f'within {timeout:.0f} s ({error.strerror or error}): check that '
            'it runs there, and that no firewall closes the port.') from error
      time.sleep(0.2)
  send(link, [index, count, socket.gethostname()])
  # Process 0 has its own deadline, and then tells who is missing.
  found = receive(link, max(deadline - time.monotonic(), 0) + timeout)
  if isinstance(found, list):
    _keep_alive(link)
    return found, {0: link}
  link.close()
  raise ValueError(found or (
      f'--coordinator={coordinator}: what answers there is not process 0 of a '
      'run that is about to start: it has ended, or a run is under way at this '
      'port; stop it, or choose another.'))


def send(link: socket.socket, value: Any) -> None:
  """Sends JSON as a line; a connection that has ended swallows it."""
  with contextlib.suppress(OSError):
    link.sendall(json.dumps(value).encode() + b'\n')


def receive(link: socket.socket, timeout: float | None = None) -> Any:
  """The next line as JSON; None if the connection ends, or brings no JSON."""
  link.settimeout(timeout)
  line = b''
  with contextlib.suppress(OSError, ValueError):
    while not line.endswith(b'\n'):
      piece = link.recv(1)  # the next line is for the next call
      if not piece:
        return None
      line += piece
    return json.loads(line)
  return None


def _keep_alive(link):
  """Lets the kernel find out within a minute that the other host is down."""
  link.settimeout(None)
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for option, value in (
      ('TCP_KEEPIDLE', 20), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 6)):
    if hasattr(socket, option):
      link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
