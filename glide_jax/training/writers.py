"""Writers of a run's curves and images: TensorBoard, and wandb if a recipe names a project."""

import dataclasses
import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from glide_jax.errors import GlideError, UsageError
from glide_jax.training.config import RunConfig


class Writer(Protocol):
    """Writes numbers and images by name and step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""
        ...

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an image `(H, W, 3)` uint8."""
        ...

    def close(self) -> None:
        """Write what is buffered, and close."""
        ...


_FLUSH = 30.0  # seconds
# Its classes are made when it is imported.
_protos: Any = event_pb2


class TensorBoard:
    """Curves and images in the run's folder `logs/`.

    Not `SummaryWriter`: it writes in a thread, which a full disk ends with a traceback, and then
    waits for that thread forever.
    """

    def __init__(self, folder: Path):
        """Open a new file.

        Raises:
            GlideError: it cannot be written.
        """
        self._folder, self._broken = folder, False
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
            self._file.flush()
        self._flushed = time.monotonic()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self._add(summary.image(name, image, dataformats="HWC"), step)

    def close(self) -> None:
        # After an error, the file cannot be closed without another one.
        if not self._broken:
            with self._writing():
                self._file.close()

    def _add(self, values: object, step: int) -> None:
        with self._writing():
            event = _protos.Event(summary=values, step=step, wall_time=time.time())
            self._file.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH:
                self._file.flush()
                self._flushed = time.monotonic()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._broken = True
            raise GlideError(
                f"cannot write the log {self._folder}: {error.strerror}; the same command resumes "
                "from the newest checkpoint"
            ) from None


class Wandb:
    """A run of Weights & Biases, which is resumed with the training."""

    def __init__(self, config: RunConfig):
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError:
            raise UsageError("--wandb needs the package: pip install '.[wandb]'") from None
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
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class NullWriter:
    """Writes nothing: for all processes but the first."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class MultiWriter:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for writer in self._writers:
            writer.scalars(values, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        for writer in self._writers:
            writer.image(name, image, step)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writer(config: RunConfig, *, first_process: bool = True) -> Writer:
    """Return the writer that a recipe asks for.

    Raises:
        UsageError: it asks for wandb, which is not installed.
    """
    if not first_process:
        return NullWriter()
    board = TensorBoard(config.folder / "logs")
    return MultiWriter(board, Wandb(config)) if config.wandb else board
