"""Checkpoints of a run: state and place in the data together, through orbax."""

from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from glide_jax.errors import GlideError
from glide_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, newest last; saving goes on in the background.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        try:
            self._manager = ocp.CheckpointManager(folder, options=options)
        except OSError as error:
            raise GlideError(f"cannot write checkpoints to {folder}: {error}") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest saved step, None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
        """Writes the state after `step` updates, with the iterator's position."""
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest state; moves `data` to where it was then.

        Args:
            like: a state of the same shapes (arrays, or `jax.ShapeDtypeStruct`).

        Raises:
            GlideError: the checkpoint is of another model or optimiser, or is broken.
        """
        items = {"data": grain.checkpoint.CheckpointRestore(data)}
        return self._read(state=ocp.args.StandardRestore(like), **items)

    def restore_state(self, like: TrainState) -> TrainState:
        """The newest state alone, as numpy arrays; for a use without the run's data."""
        return jax.device_get(self._read(state=ocp.args.StandardRestore(like)))

    def _read(self, **items: Any) -> TrainState:
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))["state"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise GlideError(
                f"cannot go on from step {self.latest} in {self._manager.directory}: it was made by"
                f" another recipe or is broken ({reason}); choose another folder with --out"
            ) from error
