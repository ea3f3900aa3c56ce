"""Signals and worker processes: a run ends its workers itself, after it has saved its state.

Ctrl-C reaches every process of a terminal, and many schedulers send SIGTERM to all processes of a
job. A worker that ended at once would print a traceback, and leave shared memory behind.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

# Seconds that a worker outlives SIGTERM, if nothing ends it before.
GRACE = 10


@contextmanager
def shielded() -> Iterator[None]:
    """Block SIGINT and SIGTERM, also in processes that are started here.

    This process receives afterwards what came in the meantime.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Its start unblocks both signals in this process. What a killed run leaves behind, it removes
    # without a warning.
    with _variable("PYTHONWARNINGS", "ignore:resource_tracker"):
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for processes that are started here."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def keep_working(*_: int) -> None:
    """Make this worker ignore SIGINT, and end some seconds after SIGTERM, or with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):
        return
    # The default action of SIGALRM ends the process, whatever it does.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE) and None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
