"""Checkpoints of a run: state, place in the data and checksums together, through orbax."""

import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from glide_jax.errors import GlideError
from glide_jax.training.state import TrainState


@jax.jit
def checksums(tree: Any) -> Any:
    """A uint32 for each array: its bits, weighted by odd numbers that grow with their place.

    The same however the array is sharded. One altered bit always changes it.
    """

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        bits = bits.astype(jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def named_checksums(tree: Any) -> dict[str, int]:
    """`checksums` by path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(checksums(tree)))
    return {_name(path): int(value) for path, value in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Checkpoints:
    """The checkpoints of one run, newest last; saving goes on in the background.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, create=True
        )
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
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(data),
            checksums=ocp.args.JsonSave(named_checksums(state)),
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest whole state; moves `data` to where it was then.

        A checkpoint that is truncated or altered is named, put aside, and the one before is used.

        Args:
            like: a state of the same shapes, arrays or abstract ones with their sharding.

        Raises:
            GlideError: the checkpoints are of another model or optimiser, or all are broken.
        """
        return self._newest(like, data=grain.checkpoint.CheckpointRestore(data))

    def restore_state(self, like: TrainState) -> TrainState:
        """The newest whole state alone, as numpy arrays; for a use without the run's data."""
        return jax.device_get(self._newest(like))

    def _newest(self, like: TrainState, **items: Any) -> TrainState:
        broken = []
        while (step := self.latest) is not None:
            self._check_recipe(step, like)
            problem, state = self._read(step, like, items)
            if state is not None:
                return state
            broken.append(f"step {step}: {problem}")
            print(
                f"warning: the checkpoint of {broken[-1]}; trying the one before", file=sys.stderr
            )
            self._put_aside(step)
        raise GlideError(f"no checkpoint in {self._folder} is whole ({'; '.join(broken)})")

    def _check_recipe(self, step: int, like: TrainState) -> None:
        """Raises GlideError where the checkpoint holds other arrays than the recipe makes."""
        try:
            saved = self._manager.item_metadata(step)["state"]
        except (ValueError, KeyError, OSError):
            return  # Unreadable: for `_read` to say.
        shapes = _shapes(saved)
        if not shapes:
            return
        wanted = _shapes(like)
        if different := sorted(p for p in wanted | shapes if wanted.get(p) != shapes.get(p)):
            raise GlideError(
                f"cannot go on from step {step} in {self._folder}: it was made by another recipe "
                f"({len(different)} arrays differ: {', '.join(different[:3])}); choose another "
                "folder with --out"
            )

    def _read(
        self, step: int, like: TrainState, items: dict[str, Any]
    ) -> tuple[str, TrainState | None]:
        """The state of a step, or what is wrong with it."""
        wanted = {"state": ocp.args.StandardRestore(like), "checksums": ocp.args.JsonRestore()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**wanted, **items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"cannot be read ({str(error).strip().splitlines()[0][:160]})", None
        now = named_checksums(found["state"])
        if altered := sorted(p for p in now if now[p] != found["checksums"].get(p)):
            return f"altered after it was saved ({', '.join(altered[:3])})", None
        return "", found["state"]

    def _put_aside(self, step: int) -> None:
        """Moves a broken checkpoint out of the way of the run, to `broken/` beside the others."""
        if jax.process_index() == 0:
            aside = self._folder.parent / "broken"
            aside.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside / f"{step}-{len(list(aside.iterdir()))}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("put aside")
        self._manager.reload()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): tuple(np.shape(leaf)) for path, leaf in leaves if hasattr(leaf, "shape")}
