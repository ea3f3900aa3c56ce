"""Stopping a run at SIGTERM and Ctrl-C, with a checkpoint."""

import os
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """A signal to stop the run: call `stopping(step)` after each step.

    It is True at the same step in all processes of a run, whichever process got the signal. A
    second signal ends the process at once.

    A context manager.
    """

    def __init__(self):
        self._received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        # With several processes jax handles SIGTERM, and makes them agree on a step.
        signals = SIGNALS if jax.process_count() == 1 else SIGNALS[1:]
        self._before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        print("\nstopping after this step", file=sys.stderr)
        self.__exit__()
        self._received = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Whether `step`, just done, is the last."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
