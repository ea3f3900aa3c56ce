"""The time limit of a run: the decay follows the clock, and the run ends in time."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig
from glide_jax.training.optimiser import decay_factor


class Clock:
    """The training time of a run with `minutes`, kept in its checkpoints.

    Time counts from the end of the first call on, so compilation is not counted. Pauses are not
    counted either.
    """

    def __init__(self, config: RunConfig, loop_state: Mapping[str, Any] | None = None):
        """Start from a checkpoint's `loop_state`, or from nothing.

        Raises:
            UsageError: there are several processes, whose clocks differ.
        """
        if config.minutes and jax.process_count() > 1:
            raise UsageError("a time limit is for one process: set --minutes 0 and --steps")
        self._limit, self._share = 60 * config.minutes, config.optimiser.lr_decay_share
        self._decays = config.optimiser.lr_decay == "wsd"
        self._before = float((loop_state or {}).get("seconds", 0.0))
        self._start: float | None = None
        self._running: Any = None

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + (time.monotonic() - self._start if self._start is not None else 0.0)

    @property
    def over(self) -> bool:
        """Whether the time is used up; never without a limit."""
        return 0 < self._limit <= self.seconds

    @property
    def time_share(self) -> np.ndarray | None:
        """The share of the time that is used up; None without a limit."""
        return np.asarray(self.seconds / self._limit, np.float32) if self._limit else None

    def lr_factor(self) -> np.ndarray | None:
        """Return the factor of the learning rate; None without a limit."""
        if not self._limit:
            return None
        done = self.seconds / self._limit
        return np.asarray(decay_factor(done, self._share) if self._decays else 1.0, np.float32)

    def started(self, metrics: Any) -> None:
        """Wait until the call before is done, then note the new one.

        Without that the host would run ahead of the device, and the decay would end too early.
        """
        if not self._limit:
            return
        if self._start is None:
            jax.block_until_ready(metrics)
            self._start = time.monotonic()
        jax.block_until_ready(self._running)
        self._running = metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count: sampling and validation, with their compilation."""
        # The step started last does count, and may still be running on the device.
        jax.block_until_ready(self._running)
        was_started = self._start is not None
        self._before, self._start = self.seconds, None
        try:
            yield
        finally:
            self._start = time.monotonic() if was_started else None

    def get_state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"seconds": self.seconds} if self._limit else {}
