"""What a run tells: a progress bar, TensorBoard curves, grids of samples."""

import time
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import SummaryWriter

from glide_jax.errors import GlideError
from glide_jax.pipeline import Pipeline
from glide_jax.settings import Settings
from glide_jax.training.config import RunConfig, TrainConfig
from glide_jax.training.export import run_defaults
from glide_jax.training.objectives import Metrics, Params, finish
from glide_jax.weights.registry import Model


class Logger:
    """Progress of one run; metrics stay on the device until a window of steps is full.

    A context manager.
    """

    def __init__(self, config: RunConfig, first: int, records: int, devices: int):
        self._config = config
        self._writer = SummaryWriter(str(config.folder / "logs"), flush_secs=30)
        self._window: list[Metrics] = []
        self._due: tuple[int, list[Metrics]] | None = None
        self._since, self._from, self._first = time.monotonic(), first, first
        print(
            f"{config.name}: {records:,} pictures, {config.batch_size} a step on {devices} "
            f"{jax.devices()[0].device_kind}; step {first:,} of {config.steps:,} -> {config.folder}"
        )
        self._bar = tqdm.tqdm(total=config.steps, initial=first, unit="step", smoothing=0.05)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        self._writer.close()

    def step(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step: scalars, or one copy a device.

        Raises:
            GlideError: a step of the last window was bad and the recipe says to stop.
        """
        self._bar.update()
        # A window is read when the step after it is on its way: nothing waits for the device.
        self._read()
        self._window.append(metrics)
        if step % self._config.log_every == 0 or step in (self._first + 1, self._config.steps):
            self._due, self._window = (step, self._window), []
        if step == self._config.steps:
            self._read()

    def _read(self) -> None:
        if self._due is None:
            return
        step, window = self._due
        self._due = None
        one_copy = [jax.tree.map(lambda x: np.asarray(x), m) for m in jax.device_get(window)]
        raise_if_bad(self._config, step, one_copy)
        values = finish(mean_metrics(one_copy))
        now = time.monotonic()
        rate = (step - self._from) * self._config.batch_size / max(now - self._since, 1e-9)
        self._since, self._from = now, step
        for name, value in (values | {"images_per_second": rate}).items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s")

    def samples(self, step: int, ema: Params) -> None:
        """Draws the recipe's prompts with the averaged weights: `samples/step_000500.png`."""
        config = self._config
        if not isinstance(config, TrainConfig) or not config.sample_prompts:
            return
        model = Model(
            config.name,
            config.model,
            ema,
            config.schedule,
            config.diffusion_steps,
            config.prediction,
        )
        pipe = Pipeline(model, config.dtype, Settings().changed(**run_defaults(config)))
        grid = pipe(config.sample_prompts, seed=config.seed, progress=False).grid()
        folder = config.folder / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"step_{step:06}.png")
        self._writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
        # Drawing is no part of the training speed.
        self._since, self._from = time.monotonic(), step


def mean_metrics(window: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means over steps; those of skipped updates count in `bad` alone."""
    good = [m for m in window if not m["bad"].any()] or window
    means = {name: np.mean([m[name] for m in good], axis=0) for name in window[0]}
    return means | {"bad": np.mean([m["bad"] for m in window])}


def raise_if_bad(config: RunConfig, step: int, window: list[dict[str, np.ndarray]]) -> None:
    """Raises GlideError where an update could not be made and the recipe says to stop."""
    if config.on_bad_step == "skip":
        return
    for i, metrics in enumerate(window):
        if metrics["bad"].any():
            at = step - len(window) + 1 + i
            raise GlideError(
                f"step {at}: loss {float(metrics['loss'].flat[0]):.3g}, gradient norm "
                f"{float(metrics['grad_norm'].flat[0]):.3g}; this update was not made. Go on from "
                "the newest checkpoint with a lower --optimiser.learning-rate, or with "
                "--on-bad-step skip"
            )
