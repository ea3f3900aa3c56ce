"""Checkpoints of a run: its state, its place in the data, and checksums of both, through orbax.

Of `checkpoints/<step>/`, `state` is orbax's; `record` names each array with its dtype, shape and
checksum, says where in which data the run stood, and has a digest of its own.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from glide_jax.errors import GlideError
from glide_jax.devices.processes import on_first, shared_text
from glide_jax.training.state import TrainState

STATE, RECORD = "state", "record"


class Saved(NamedTuple):
    """What a checkpoint held.

    Attributes:
        step: the number of steps done.
        data: the state of the data's iterator.
    """

    step: int
    state: TrainState
    data: dict[str, Any]


# --- checksums


def checksums(tree: Any) -> dict[str, int]:
    """`sum_k b_k (2 k + 1) mod 2^32` of each array by its path, b its values as whole numbers.

    The same however an array is sharded, over devices and processes. One altered value always
    changes it, several do but for a chance of 2^-32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    own = np.array([_own_sum(leaf) for _, leaf in leaves], np.uint32)
    if not all(getattr(leaf, "is_fully_addressable", True) for _, leaf in leaves):
        own = np.asarray(multihost_utils.process_allgather(own)).sum(axis=0, dtype=np.uint32)
    return {_name(path): int(total) for (path, _), total in zip(leaves, own, strict=True)}


def _own_sum(x: jax.Array | np.ndarray) -> int:
    """The sum over what this process has of an array."""
    if not isinstance(x, jax.Array):
        return _box_sum(np.asarray(x), (0,) * np.ndim(x), np.shape(x))
    total = 0
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            begin = [span.start or 0 for span in shard.index]
            total += _box_sum(np.asarray(shard.data), begin, x.shape)
    return total % 2**32


def _box_sum(x: np.ndarray, begin: Sequence[int], shape: Sequence[int]) -> int:
    """The sum over a box of an array of some shape, from its corner `begin` on."""
    last = x.shape[-1] if x.ndim else 1
    values = np.ascontiguousarray(x).view(f"u{x.itemsize}").astype(np.uint32, copy=False)
    rows = values.reshape(-1, last)
    # Of the first value of each row, in the whole array; all is modulo 2^32.
    place = np.zeros(1, np.uint32)
    for size, first, count in zip(shape, begin, x.shape, strict=True):
        here = np.arange(first, first + count, dtype=np.uint32)
        place = (place[:, None] * np.uint32(size) + here).reshape(-1)
    place = place.reshape(-1, last)[:, 0]
    weights = 2 * np.arange(last, dtype=np.uint32) + 1
    return int((rows @ weights + 2 * place * rows.sum(axis=1, dtype=np.uint32)).sum()) % 2**32


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _arrays(tree: Any) -> dict[str, list[Any]]:
    """Dtype and shape of each array by its path, as JSON has them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


# --- reading


class BrokenCheckpoint(Exception):
    """A checkpoint is not what was saved."""


def steps_in(folder: Path) -> list[int]:
    """The steps of which a folder has checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def newest(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any], list[int]]:
    """The newest whole state, its record, and the steps of newer checkpoints, which are broken.

    Those are named on stderr. In a run of several processes all of them must call this.

    Args:
        like: a state of the same shapes: numpy arrays, or abstract ones with their sharding.

    Raises:
        GlideError: a checkpoint is of another recipe, or none is whole.
    """
    _quieten()
    broken: dict[int, str] = {}
    for step in steps_in(folder):
        try:
            return *read(folder / str(step), like), list(broken)
        except BrokenCheckpoint as error:
            broken[step] = str(error)
        if jax.process_index() == 0:
            print(
                f"warning: the checkpoint of step {step} is broken ({broken[step]}); trying the "
                "one before",
                file=sys.stderr,
            )
    listed = "; ".join(f"step {step}: {problem}" for step, problem in broken.items())
    raise GlideError(f"no checkpoint in {folder} is whole ({listed}): choose another --out")


def read(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state and the record of a checkpoint.

    Raises:
        BrokenCheckpoint: it is incomplete or altered; in all processes, whichever met it.
        GlideError: it is whole, and of another recipe.
    """
    record = _together(lambda: _read_record(folder / RECORD))
    saved, wanted = record["arrays"], _arrays(like)
    if different := sorted(p for p in wanted | saved if wanted.get(p) != saved.get(p)):
        raise GlideError(
            f"cannot go on from step {folder.name} in {folder.parent}: it was made by another "
            f"recipe ({len(different)} arrays differ: {', '.join(different[:3])}); choose another "
            "folder with --out"
        )
    state = _together(lambda: _read_state(folder / STATE, like))
    _together(lambda: _check_values(state, record))
    return state, record


def _together(do: Callable[[], Any]) -> Any:
    """What a function returns; raises BrokenCheckpoint if it does so in any process."""
    result, problem = None, ""
    try:
        result = do()
    except BrokenCheckpoint as error:
        problem = str(error)
    if problem := shared_text(problem):
        raise BrokenCheckpoint(problem)
    return result


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "metadata").read_bytes())
        digest = record.pop("digest")
    except OSError as error:
        raise BrokenCheckpoint(f"its record: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        digest, record = "", {}
    if digest != _digest(record):
        raise BrokenCheckpoint("its record was altered")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read_state(folder: Path, like: TrainState) -> TrainState:
    # The handler itself: the manager's `restore` waits for other processes, which may have failed.
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(folder, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Of any type: they come from all of orbax and tensorstore.
        raise BrokenCheckpoint(f"cannot be read: {_first_line(error)}") from None
    finally:
        handler.close()


def _check_values(state: TrainState, record: dict[str, Any]) -> None:
    now, then = checksums(state), record["checksums"]
    if wrong := sorted(path for path in now if now[path] != then[path]):
        raise BrokenCheckpoint(f"values of {', '.join(wrong[:3])} are not what was saved")


def _first_line(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    # Tensorstore says what it was doing to which of many files, and at the end why it could not.
    return line if len(line) <= 160 else f"{line[:50]}...{line[-110:]}"


@cache
def _quieten() -> None:
    """Leaves errors to those who catch them, once and for all.

    Where a read or a write fails, orbax, asyncio and the threads of tensorstore would each print
    tracebacks too, one for each array that was under way.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


# --- writing


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        """Opens a folder for writing, and clears away what a killed run was writing.

        Args:
            keep: how many of the newest stay.
            keep_every: of which steps they stay for good (multiples; 0: of none).

        Raises:
            GlideError: the folder cannot be written.
        """
        _quieten()
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,
            # The steps' own files say nothing that is needed here, and may be broken.
            lightweight_initialize=True,
        )
        with self._writing():
            self._manager = ocp.CheckpointManager(folder, options=options)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: tensorstore's, of any cause.
            raise GlideError(
                f"cannot write a checkpoint to {self._folder} ({_first_line(error)}); "
                "those that were there are left"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self._writing():
                self._manager.close()
        except GlideError as error:
            if kind is None:
                raise
            # What ended the run matters more.
            print(f"warning: {error}", file=sys.stderr)

    @property
    def latest(self) -> int | None:
        """The newest saved step, None before the first.

        Raises:
            GlideError: it could not be written.
        """
        if not self._manager.is_saving_in_progress():
            with self._writing():
                self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any], source: str) -> None:
        """Writes the state after `step` updates; nothing if it is there.

        Args:
            data: the state of the data's iterator, after as many steps.
            source: the data's fingerprint.

        Raises:
            GlideError: this checkpoint, or the one before, could not be written.
        """
        if step == self._manager.latest_step():
            return
        record = {"arrays": _arrays(state), "checksums": checksums(state)}
        record |= {"data": data, "source": source}
        record |= {"digest": _digest(record)}
        items = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState, source: str) -> Saved:
        """The newest whole checkpoint.

        One that is incomplete or altered is named, put aside in `broken/`, and the one before is
        used. Says so if the data are not those that the run was trained on.

        Args:
            like: a state of the same shapes: numpy arrays, or abstract ones with their sharding.
            source: the data's fingerprint.

        Raises:
            GlideError: the checkpoints are of another model or optimiser, or all are broken.
        """
        state, record, broken = newest(self._folder, like)
        if broken:
            on_first(lambda: self._put_aside(broken))
            self._manager.reload()
        if source != record["source"] and jax.process_index() == 0:
            print(
                f"warning: the run goes on with other data: {source}; they were {record['source']}",
                file=sys.stderr,
            )
        return Saved(int(state.step), state, record["data"])

    def _put_aside(self, steps: Sequence[int]) -> None:
        """Moves checkpoints out of the run's way, to `broken/` beside the others."""
        aside = self._folder.parent / "broken"
        try:
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / f"{step}-{len(list(aside.iterdir()))}"
                (self._folder / str(step)).rename(target)
        except OSError as error:
            raise GlideError(f"cannot move a broken checkpoint aside: {error}") from None
