"""Ending a run early and well: SIGTERM and Ctrl-C."""

import os
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Whether the run has been told to stop: `stopping(step)`, to be asked after each step.

    All processes of a run hear of it at the same step, whichever was told. A second signal ends
    the process at once.

    A context manager.
    """

    def __init__(self):
        self._told = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        # With several processes jax takes SIGTERM, and lets them agree on a step.
        signals = SIGNALS if jax.process_count() == 1 else SIGNALS[1:]
        self._before = {number: signal.signal(number, self._take) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: Any) -> None:
        print("\nstopping after this step", file=sys.stderr)
        self.__exit__()
        self._told = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Whether `step`, just done, is to be the last."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told
