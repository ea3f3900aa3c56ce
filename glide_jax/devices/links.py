"""Connections between the processes of a run: the end of a process is noticed within seconds.

A machine that fails without closing its connections is noticed after a minute.
"""

import os
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

# What a process tells the others: its work is done, it has failed, it has lost another one.
DONE, FAILED, LOST_ANOTHER = b"d", b"f", b"l"
# Seconds that a process has to end by itself, with its own message, once another one is gone: the
# step that it waits in fails, or it meets the same error.
GRACE_SECONDS = 5
# Keepalive: a machine that fails without closing its connections is noticed after a minute.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Links:
    """The connections of this process: to all others from process 0, otherwise to process 0.

    Args:
        peers: one connected socket for each index of a process.
    """

    def __init__(self, peers: dict[int, socket.socket]):
        self._peers = peers
        self._ending = threading.Lock()
        for peer in peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                # Not every system has them.
                with suppress(AttributeError, OSError):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def watch(self, remedy: str) -> None:
        """End this process once another one is gone: within seconds, with one line and code 1.

        Args:
            remedy: what to do, as the line says it.
        """
        threading.Thread(target=self._watch, args=(remedy,), daemon=True).start()

    def close(self, done: bool) -> None:
        """Tell the other processes that this one ends; unless its work is done, they end too.

        Args:
            done: whether this process has finished its work.
        """
        # Held for good: the thread no longer ends this process.
        self._ending.acquire()
        self._send(DONE if done else FAILED)

    def end(self, line: str) -> None:
        """End this process with an error; only the first call prints its line."""
        if not self._ending.acquire(blocking=False):
            return
        self._send(LOST_ANOTHER)
        # Below a progress bar.
        try:
            print(f"\nerror: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(1)  # also where both are closed

    def _send(self, word: bytes) -> None:
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(word)

    def _watch(self, remedy: str) -> None:
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, (index, peer))
            while selector.get_map():
                for key, _ in selector.select():
                    index, peer = key.data
                    try:
                        word = peer.recv(1)
                    except OSError:
                        word = b""
                    if word == DONE:
                        selector.unregister(peer)
                        continue
                    name = "another process" if word == LOST_ANOTHER else f"process {index}"
                    # If process 0 was killed, jax aborts the others at once: do not wait.
                    if word == FAILED or index != 0:
                        time.sleep(GRACE_SECONDS)
                    self.end(f"{name} has ended or cannot be reached: {remedy}")
                    return
