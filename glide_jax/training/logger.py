"""The progress of a run: a bar, curves, grids of samples, a trace for the profiler."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeGuard

import jax
import numpy as np
import tqdm
from PIL import Image

from glide_jax.devices.hardware import peak_flops
from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import write_atomically
from glide_jax.training.config import RunConfig, TrainConfig
from glide_jax.training.flops import flops_per_image
from glide_jax.training.objectives import Metrics, Params
from glide_jax.training.quartiles import named_metrics
from glide_jax.training.runs import model_of
from glide_jax.training.writers import open_writer

# `(model, prompts, *, seed, dtype) -> image`, such as `glide_jax.pipeline.loading.sample_grid`: an
# argument, since training does not import the pipeline.
SampleGrid = Callable[..., Image.Image]


class Logger:
    """Progress of one run; metrics stay on the device until a window of steps is full.

    A context manager.
    """

    def __init__(
        self, config: RunConfig, first: int, records: int, sample_grid: SampleGrid | None = None
    ):
        """Open the logs of a run.

        Args:
            config: the recipe.
            first: number of steps done before.
            records: number of images in the data.
            sample_grid: makes the grids of samples; None: there are none.
        """
        self._config, self._sample_grid = config, sample_grid
        self._main = jax.process_index() == 0
        self._writer = open_writer(config, first_process=self._main)
        self._profile, self._tracing = profiled_steps(config.profile), False
        self._window: list[tuple[int, Metrics]] = []
        self._due: tuple[int, list[tuple[int, Metrics]]] | None = None
        self._since, self._from, self._first = time.monotonic(), first, first
        self._last: Metrics = {}
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        # FLOP/s of all devices; nan if unknown.
        self._peak = count * (peak_flops(kind) or math.nan)
        self._flops: Future[float] | None = None
        if self._main:
            print(
                f"{config.name}: {records:,} images, {config.batch_size} a step on {count} "
                f"{kind}; step {first:,} of {config.steps:,} -> {config.folder}"
            )
        self._bar = tqdm.tqdm(
            total=config.steps,
            initial=first,
            unit="step",
            smoothing=0.05,
            disable=not self._main,
        )

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._bar.close()
        self._writer.close()

    def steps(
        self,
        step: int,
        count: int,
        metrics: Metrics,
        saved: int | None = None,
    ) -> None:
        """Record the metrics of the last steps.

        Args:
            step: number of steps done.
            count: how many of them these are.
            metrics: arrays on the device; with several steps, every array begins with the step.
            saved: the newest saved step.

        Raises:
            GlideError: a step of the last window was bad, and `on_bad_step` is "stop".
        """
        self._bar.update(count)
        self._last = metrics
        if self._flops is None and math.isfinite(self._peak):
            # To count them takes seconds: while the device trains, not before its first step.
            thread = ThreadPoolExecutor(1)
            self._flops = thread.submit(flops_per_image, self._config)
            thread.shutdown(wait=False)
        # A window is read once the next steps are running, so the device never waits.
        self._read(saved)
        self._window.append((count, metrics))
        every = self._config.log_every
        if step // every > (step - count) // every or step in (
            self._first + count,
            self._config.steps,
        ):
            self._due, self._window = (step, self._window), []
        if step == self._config.steps:
            self._read(saved)
        self._trace(step, count, metrics)

    def end(self, step: int, saved: int | None) -> None:
        """Record the steps since the last record, where a run ends before its last step.

        Raises:
            GlideError: see `steps`.
        """
        self._read(saved)
        if self._window:
            self._due, self._window = (step, self._window), []
            self._read(saved)

    def _read(self, saved: int | None) -> None:
        if self._due is None:
            return
        step, window = self._due
        self._due = None
        window = [
            metrics if count == 1 else {k: v[i] for k, v in metrics.items()}
            for count, metrics in jax.device_get(window)
            for i in range(count)
        ]
        raise_if_bad(self._config, step, window, saved)
        values = named_metrics(mean_metrics(window))
        now = time.monotonic()
        rate = (step - self._from) * self._config.batch_size / max(now - self._since, 1e-9)
        self._since, self._from = now, step
        values |= {
            "images_per_second": rate,
            "learning_rate": float(window[-1]["learning_rate"]),
            "model_flop_utilisation": rate * self._flops_per_image() / self._peak,
        }
        values |= device_memory()
        curves = {f"train/{k}": v for k, v in values.items() if math.isfinite(v)}
        self._writer.scalars(curves, step)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s")

    def _flops_per_image(self) -> float:
        """FLOPs of the network for an image; nan while they are counted, or if that failed."""
        done = self._flops is not None and self._flops.done() and not self._flops.exception()
        return self._flops.result() if self._flops is not None and done else math.nan

    def _trace(self, step: int, count: int, metrics: Metrics) -> None:
        """Start and end the trace for TensorBoard's profiler.

        It begins with a call that has steps of the range, but not with the first call, which
        compiles; so a run that is resumed within the range traces the rest.
        """
        if self._profile is None:
            return
        begin, end = self._profile
        if step >= end:
            jax.block_until_ready(metrics)
            self._profile = None
            if self._tracing:
                jax.profiler.stop_trace()
                self._tracing = False
            elif self._main:
                print(
                    f"note: no trace of {self._config.profile}: the first steps of this process "
                    "are not traced, and the range ends before or with them",
                    file=sys.stderr,
                )
        elif not self._tracing and step + count >= begin:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._config.folder / "logs"))
            self._tracing = True

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Record the held-out loss and its terms."""
        self._writer.scalars({f"held_out/{name}": value for name, value in values.items()}, step)

    def samples(self, step: int, ema: Params) -> None:
        """Sample the recipe's prompts with the EMA weights, into `samples/step_000500.png`.

        Does nothing for models that need more than a prompt.
        """
        config = self._config
        if self._sample_grid is None or not self._main or not generates_from_text(config):
            return
        model = model_of(config, ema)
        grid = self._sample_grid(model, config.sample_prompts, seed=config.seed, dtype=config.dtype)
        path, data = config.folder / "samples" / f"step_{step:06}.png", io.BytesIO()
        grid.save(data, "PNG")
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data.getvalue())
        except OSError as error:
            raise GlideError(f"cannot write {path}: {error.strerror}") from None
        self._writer.image("samples", np.asarray(grid), step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not lower the logged throughput: sampling and validation."""
        # The steps so far do count, and may still be running on the device.
        jax.block_until_ready(self._last)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - begun


def generates_from_text(config: RunConfig) -> TypeGuard[TrainConfig]:
    """Whether a recipe's model can generate its `sample_prompts`."""
    return (
        isinstance(config, TrainConfig)
        and bool(config.sample_prompts)
        and not config.model.upsamples
    )


def profiled_steps(text: str) -> tuple[int, int] | None:
    """Return the first and last step of "10:20"; None for "".

    Raises:
        UsageError: it is no such range, or begins before step 2.
    """
    if not text:
        return None
    try:
        first, last = (int(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"profile takes steps as first:last, not {text!r}") from None
    if not 2 <= first <= last:
        raise UsageError(f"profile {text}: begin at step 2 or later, and end after that")
    return first, last


def device_memory() -> dict[str, float]:
    """Return gigabytes in use and at the peak on the first local device, if it reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory_gb", "peak_bytes_in_use": "memory_peak_gb"}
    return {ours: stats[theirs] / 1e9 for theirs, ours in names.items() if theirs in stats}


def mean_metrics(window: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return means over steps; steps without an update count in `bad` alone."""
    good = [m for m in window if not m["bad"]] or window
    means = {name: np.mean([m[name] for m in good], axis=0) for name in window[0]}
    return means | {"bad": np.asarray(np.mean([m["bad"] for m in window]))}


def raise_if_bad(
    config: RunConfig, step: int, window: list[dict[str, np.ndarray]], saved: int | None
) -> None:
    """Stop the run at a bad step, if `on_bad_step` is "stop".

    Args:
        config: the recipe.
        step: the last step of the window.
        window: metrics of consecutive steps.
        saved: the newest saved step; it has no bad update, since none was made.

    Raises:
        GlideError: an update of the window was left out.
    """
    if config.on_bad_step == "skip":
        return
    for i, metrics in enumerate(window):
        if metrics["bad"]:
            at = step - len(window) + 1 + i
            newest = "nothing is saved yet" if saved is None else f"step {saved} is saved"
            raise GlideError(
                f"step {at}: loss {float(metrics['loss']):.3g}, gradient norm "
                f"{float(metrics['grad_norm']):.3g}; this update was not made, step {at - 1} was "
                f"the last good one, and {newest}. Resume with a lower "
                "--optimiser.learning-rate, or with --on-bad-step skip"
            )
