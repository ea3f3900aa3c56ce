"""A roll call: wait until all processes are there, where jax itself would abort."""

import errno
import re
import socket
import time
from contextlib import ExitStack

from glide_jax.errors import GlideError, one_line

GREETING = "glide-jax process"
GREETING_PATTERN = re.compile(rf"{GREETING} ([0-9]{{1,9}}) of ([0-9]{{1,9}})")
GO = "go"
RETRY_SECONDS = 0.5
ANSWER_SECONDS = 10


def roll_call(
    coordinator: str, processes: int, process: int, seconds: float
) -> dict[int, socket.socket]:
    """Wait until all processes have come to the address of the first.

    Returns:
        the open connections by the index of the other process: in process 0 those to all others, in
        the others the one to process 0.

    Raises:
        GlideError: a process did not come in time, or the address cannot be used.
    """
    host, _, port = coordinator.rpartition(":")
    if processes == 1:
        return {}
    if process == 0:
        return _gather(int(port), processes, seconds)
    greeting = f"{GREETING} {process} of {processes}"
    return {0: _report(host.strip("[]"), int(port), greeting, seconds)}


def _gather(port: int, processes: int, seconds: float) -> dict[int, socket.socket]:
    """Wait for the other processes, and tell them to go on, or which are missing."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        arrived: dict[int, socket.socket] = {}
        while len(arrived) < processes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(5)
                greeting = GREETING_PATTERN.fullmatch(_read_line(peer))
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                why = _missing(arrived, processes, seconds)
                _answer(arrived, why)
                raise GlideError(why) from None
            except OSError:
                continue
            if greeting is None:
                continue  # a stranger
            index, count = map(int, greeting.groups())
            why = ""
            if count != processes:
                why = f"process {index} expects {count} processes, process 0 {processes}"
            elif index in arrived or not 0 < index < processes:
                why = f"process {index} of {processes} came twice, or is out of range"
            if why:
                _answer({**arrived, -1: peer}, why)
                raise GlideError(why)
            arrived[index] = peer
        _answer(arrived, GO)
        return {index: peer.dup() for index, peer in arrived.items()}


def _report(host: str, port: int, greeting: str, seconds: float) -> socket.socket:
    """Connect to the first process, and wait for its word."""
    deadline, why = time.monotonic() + seconds, "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(remaining, 10)) as peer:
                peer.sendall(f"{greeting}\n".encode())
                # The first process ends the wait; it knows who is missing.
                peer.settimeout(seconds + ANSWER_SECONDS)
                answer = _read_line(peer)
                if answer == GO:
                    return peer.dup()
        except OSError as error:
            why = error.strerror or one_line(error) or "no answer"
        else:
            if answer.startswith("process"):
                raise GlideError(answer)
            why = "another program answers there"
        time.sleep(RETRY_SECONDS)
    raise GlideError(f"process 0 was not reached in {seconds:g} s: {why}")


def _listen(port: int) -> socket.socket:
    try:
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise
            return socket.create_server(("", port), backlog=1024)  # a machine without IPv6
    except OSError as error:
        raise GlideError(
            f"process 0 cannot use its port {port}, {error.strerror}; JAX_COORDINATOR_PORT, the "
            "same for all processes, names another"
        ) from None


def _read_line(peer: socket.socket) -> str:
    """Return one line of at most 1000 bytes."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 1000 and (more := peer.recv(1000)):
        data += more
    return data.decode(errors="replace").strip()


def _answer(peers: dict[int, socket.socket], text: str) -> None:
    for peer in peers.values():
        try:
            peer.sendall(f"{text}\n".encode())
        except OSError:
            continue  # it ended; jax will miss it


def _missing(arrived: dict[int, socket.socket], processes: int, seconds: float) -> str:
    names = [str(i) for i in range(1, processes) if i not in arrived]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    noun = "process" if len(names) == 1 else "processes"
    return f"{noun} {listed} of {processes} did not come in {seconds:g} s"
