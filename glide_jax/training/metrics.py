"""What a run tells: a progress bar, TensorBoard curves, grids of samples."""

import time
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import SummaryWriter

from glide_jax.pipeline import Pipeline
from glide_jax.settings import Settings
from glide_jax.training.config import TrainConfig
from glide_jax.training.export import run_defaults
from glide_jax.training.state import Params
from glide_jax.weights.registry import Model


class Logger:
    """Progress of one run; metrics of a step are read a step later, so that nothing waits.

    A context manager.
    """

    def __init__(self, config: TrainConfig, first: int, records: int, devices: int):
        self._config = config
        self._writer = SummaryWriter(str(config.folder / "logs"), flush_secs=30)
        self._pending: tuple[int, Any] | None = None
        self._since, self._from, self._first = time.monotonic(), first, first
        print(
            f"{config.name}: {records:,} pictures, {config.batch_size} a step on {devices} "
            f"{jax.devices()[0].device_kind}; step {first:,} of {config.steps:,} -> {config.folder}"
        )
        self._bar = tqdm.tqdm(total=config.steps, initial=first, unit="step", smoothing=0.05)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        self._flush()
        self._bar.close()
        self._writer.close()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step: scalars, or one copy a device."""
        self._bar.update()
        self._flush()
        if step % self._config.log_every == 0 or step == self._first + 1:
            self._pending = step, metrics

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {k: float(np.ravel(jax.device_get(v))[0]) for k, v in metrics.items()}
        now = time.monotonic()
        rate = (step - self._from) * self._config.batch_size / max(now - self._since, 1e-9)
        self._since, self._from = now, step
        for name, value in (values | {"images_per_second": rate}).items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s")

    def samples(self, step: int, ema: Params) -> None:
        """Draws the recipe's prompts with the averaged weights: `samples/step_000500.png`."""
        config = self._config
        if not config.sample_prompts:
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
