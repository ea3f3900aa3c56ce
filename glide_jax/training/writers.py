"""Where the figures of a run go: TensorBoard, and wandb where a recipe names a project."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig


class Writer(Protocol):
    """Takes numbers and pictures, by name and step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: np.ndarray, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Curves and pictures below the run's `logs/`."""

    def __init__(self, folder: Path):
        self._writer = SummaryWriter(str(folder), flush_secs=30)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds a picture `(H, W, 3)` uint8."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases that goes on where it was."""

    def __init__(self, config: RunConfig):
        try:
            import wandb
        except ModuleNotFoundError:
            raise UsageError("--wandb needs the package: pip install wandb") from None
        self._wandb = wandb
        self._run = wandb.init(
            project=config.wandb,
            name=config.name,
            id=config.folder.name,
            resume="allow",
            dir=str(config.folder),
            config=dataclasses.asdict(config),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each curve."""
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds a picture `(H, W, 3)` uint8."""
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()


class Nowhere:
    """Takes everything and keeps nothing: for processes that are not the first."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Both:
    """Several writers as one."""

    def __init__(self, *writers: Any):
        self._writers = writers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """To each of them."""
        for writer in self._writers:
            writer.scalars(values, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """To each of them."""
        for writer in self._writers:
            writer.image(name, image, step)

    def close(self) -> None:
        """Each of them."""
        for writer in self._writers:
            writer.close()


def open_writer(config: RunConfig, *, first_process: bool = True) -> Writer:
    """The writer that a recipe asks for.

    Raises:
        UsageError: it asks for wandb, which is not installed.
    """
    if not first_process:
        return Nowhere()
    board = TensorBoard(config.folder / "logs")
    return Both(board, Wandb(config)) if config.wandb else board
