"""Checkpoints of a run: state, position in the data, and checksums of both, through orbax.

In `checkpoints/<step>/`, `state` is orbax's. `manifest` is JSON: the dtype, shape and checksum of
each array, the fingerprint of the data, the `loop_state`, and a digest of the manifest itself.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from glide_jax.devices.processes import on_first_process, shared_text
from glide_jax.errors import GlideError
from glide_jax.training.checksums import checksums, name_of
from glide_jax.training.state import TrainState

STATE, MANIFEST = "state", "manifest"
# Whether the array of a path is read.
Wanted = Callable[[str], bool]


class Saved(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        step: the number of steps done.
        state: the training state.
        loop_state: the state of the data iterator and of the clock.
    """

    step: int
    state: TrainState
    loop_state: dict[str, Any]


def _saved_fields(state: TrainState) -> dict[str, Any]:
    """Return the fields that orbax is given: without None, which older checkpoints do not have."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _arrays(tree: Any) -> dict[str, list[Any]]:
    """Return dtype and shape of each array by its path, as JSON values."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


# --- reading


class BrokenCheckpoint(Exception):
    """A checkpoint is incomplete, or differs from what was saved."""


def steps_in(folder: Path) -> list[int]:
    """Return the steps whose checkpoints a folder has, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def newest(
    folder: Path, like: TrainState, wanted: Wanted | None = None
) -> tuple[TrainState, dict[str, Any], list[int]]:
    """Return the newest whole state, its manifest, and the steps of newer, broken checkpoints.

    Broken checkpoints are named on stderr. All processes of a run must call this.

    Args:
        folder: holds a folder for each step.
        like: a state of the same shapes: numpy arrays, or abstract ones with their sharding.
        wanted: see `read`.

    Raises:
        GlideError: a checkpoint is of another recipe, or none is whole.
    """
    _quieten()
    broken: dict[int, str] = {}
    for step in steps_in(folder):
        try:
            state, manifest = read(folder / str(step), like, wanted)
            return state, manifest, list(broken)
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


def read(
    folder: Path, like: TrainState, wanted: Wanted | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state and the manifest of a checkpoint.

    Args:
        folder: of the checkpoint.
        like: see `newest`; numpy arrays if some arrays are not wanted.
        wanted: whether the array of a path is read; the others are `...` in the state. None: all.

    Raises:
        BrokenCheckpoint: it is incomplete or altered; raised in all processes if one finds it so.
        GlideError: it is whole, and of another recipe.
    """
    manifest = _together(lambda: _read_manifest(folder / MANIFEST))
    saved, expected = manifest["arrays"], _arrays(like)
    if different := sorted(p for p in expected | saved if expected.get(p) != saved.get(p)):
        raise GlideError(
            f"cannot resume from step {folder.name} in {folder.parent}: it was made by another "
            f"recipe ({len(different)} arrays differ: {', '.join(different[:3])}); choose another "
            "folder with --out"
        )
    state = _together(lambda: _read_state(folder / STATE, like, wanted))
    _together(lambda: _check_values(state, manifest))
    return state, manifest


def _together(do: Callable[[], Any]) -> Any:
    """Return a function's result; raise BrokenCheckpoint if it does so in any process."""
    result, problem = None, ""
    try:
        result = do()
    except BrokenCheckpoint as error:
        problem = str(error)
    if problem := shared_text(problem):
        raise BrokenCheckpoint(problem)
    return result


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "metadata").read_bytes())
        digest = manifest.pop("digest")
    except OSError as error:
        raise BrokenCheckpoint(f"its manifest: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        digest, manifest = "", {}
    if digest != _digest(manifest):
        raise BrokenCheckpoint("its manifest was altered")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_state(folder: Path, like: TrainState, wanted: Wanted | None) -> TrainState:
    # Not the manager's `restore`: it waits for other processes, which may have failed.
    handler: Any = ocp.StandardCheckpointHandler()
    arguments: Any = ocp.args.StandardRestore(_saved_fields(like))
    if wanted is not None:
        handler = ocp.PyTreeCheckpointHandler()
        wanted_leaves = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if wanted(name_of(path)) else ocp.PLACEHOLDER, like
        )
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted_leaves)
        arguments = ocp.args.PyTreeRestore(
            item=_saved_fields(wanted_leaves), restore_args=_saved_fields(kinds)
        )
    try:
        return TrainState(**handler.restore(folder, args=arguments))
    except Exception as error:  # orbax and tensorstore raise many types
        raise BrokenCheckpoint(f"cannot be read: {_first_line(error)}") from None
    finally:
        handler.close()


def _check_values(state: TrainState, manifest: dict[str, Any]) -> None:
    now, then = checksums(_present(state)), manifest["checksums"]
    if wrong := sorted(path for path in now if now[path] != then[path]):
        raise BrokenCheckpoint(f"values of {', '.join(wrong[:3])} differ from those saved")


def _present(state: TrainState) -> dict[str, Any]:
    """Return the arrays that were read, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name_of(path): leaf for path, leaf in leaves if leaf is not ocp.PLACEHOLDER}


def _first_line(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    # tensorstore names the operation and many files first, and the cause at the end.
    return line if len(line) <= 160 else f"{line[:50]}...{line[-110:]}"


@cache
def _quieten() -> None:
    """Silence the tracebacks of orbax, asyncio and tensorstore in this process.

    If a read or write fails, they print one for each array, in addition to the error that is
    raised.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


# --- writing


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed save left.

    Not by orbax, which does it in the background: a save of the same step would lose its folder.
    """
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run, written in the background.

    A context manager: leaving it waits until everything is written.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        """Open a folder for writing, and remove unfinished checkpoints of a killed run.

        Args:
            folder: of the checkpoints; it is created.
            keep: number of newest checkpoints that are kept.
            keep_every: checkpoints at multiples of this step are kept for good; 0: none.

        Raises:
            GlideError: the folder cannot be written.
        """
        _quieten()
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            # The metadata of the steps is not needed here, and may be broken.
            lightweight_initialize=True,
        )
        with self._writing():
            on_first_process(partial(_remove_unfinished, folder))
            self._manager = ocp.CheckpointManager(folder, options=options)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for any cause
            raise GlideError(
                f"cannot write a checkpoint to {self._folder} ({_first_line(error)}); "
                "older ones are kept"
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
            # The error that ended the run is more important.
            print(f"warning: {error}", file=sys.stderr)

    @property
    def latest(self) -> int | None:
        """Newest saved step; None before the first.

        Raises:
            GlideError: it could not be written.
        """
        if not self._manager.is_saving_in_progress():
            with self._writing():
                self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        loop_state: dict[str, Any],
        fingerprint: str,
        sums: dict[str, int] | None = None,
    ) -> None:
        """Write the state after `step` steps, unless it is there already.

        Args:
            step: number of steps done.
            state: the training state.
            loop_state: the state of the data iterator and of the clock after these steps.
            fingerprint: of the data.
            sums: the checksums of the state, of its arrays on the devices; None: of `state`.

        Raises:
            GlideError: this checkpoint, or the one before, could not be written.
        """
        if step == self._manager.latest_step():
            return
        sums = checksums(state) if sums is None else sums
        manifest: dict[str, Any] = {"arrays": _arrays(state), "checksums": sums}
        manifest |= {"data": loop_state, "source": fingerprint}
        manifest |= {"digest": _digest(manifest)}
        items = {
            STATE: ocp.args.StandardSave(_saved_fields(state)),
            MANIFEST: ocp.args.JsonSave(manifest),
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState, fingerprint: str) -> Saved:
        """Return the newest whole checkpoint.

        A checkpoint that is incomplete or altered is named on stderr and moved to `broken/`, and
        the one before it is used. A warning names data that differ from those trained on before.

        Args:
            like: a state of the same shapes: numpy arrays, or abstract ones with their sharding.
            fingerprint: of the data.

        Raises:
            GlideError: the checkpoints are of another model or optimiser, or all are broken.
        """
        state, manifest, broken = newest(self._folder, like)
        if broken:
            on_first_process(lambda: self._set_aside(broken))
            self._manager.reload()
        before = manifest["source"]
        if fingerprint != before and jax.process_index() == 0:
            print(
                f"warning: the run resumes with other data: {fingerprint}; they were {before}",
                file=sys.stderr,
            )
        return Saved(int(state.step), state, manifest["data"])

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Move checkpoints to `broken/` in the run's folder."""
        aside = self._folder.parent / "broken"
        try:
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / f"{step}-{len(list(aside.iterdir()))}"
                (self._folder / str(step)).rename(target)
        except OSError as error:
            raise GlideError(f"cannot set a broken checkpoint aside: {error}") from None
