"""kill -9 at random moments, again and again: python -m tests.tools.kill_runs --out FOLDER

A tiny run that saves every few steps is killed, and started again with the same command, until it
has been killed so many times; then it goes on to its end. It must begin again each time, where its
newest finished checkpoint was made, and end bit for bit where a run ends that nobody disturbed.
Prints what docs/training.md says of it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from glide_jax.training.checkpoint import RECORD, steps_in
from glide_jax.training.export import restore_run
from glide_jax.training.logger import Logger
from tests.support.commands import RECIPE, ROOT, environment, make_images
from train import main as train_main

SAVE_EVERY = 5
# A start is killed at most so many steps after its first one (and in a save, the next one).
REACH = 6 * SAVE_EVERY
# Shares of the kills: before the first step, and while a checkpoint is being written.
AT_START, IN_SAVE = 0.25, 0.4
# Seconds, of a machine with much other work.
PATIENCE = 900.0


@dataclass(frozen=True)
class Kill:
    """One start of a run, and its end.

    Attributes:
        began: the step of the checkpoint that it began from; 0: from nothing; None: it was killed
            before its first step.
        done: steps that had been done when it was killed.
        saved: the newest finished checkpoint then; 0: none.
        writing: whether one was being written.
        start: seconds up to its first step; 0: it was killed before.
        warnings: lines on stderr that say a checkpoint is broken.
    """

    began: int | None
    done: int
    saved: int
    writing: bool
    start: float
    warnings: int

    @property
    def lost(self) -> int:
        """Steps that are to be done again."""
        return self.done - self.saved


def tell_steps(path: str, arguments: list[str]) -> None:
    """`train.py`, which appends the number of each step to a file as it is done."""
    file, step = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), Logger.step

    def told(self: Logger, number: int, *more: Any) -> None:
        os.write(file, f"{number}\n".encode())
        step(self, number, *more)

    Logger.step = told
    sys.argv = ["train.py", *arguments]
    train_main()


class Run:
    """One process of a run, and what it says."""

    def __init__(self, pictures: Path, out: Path, steps: int):
        self._told, self._errors = out.with_suffix(".steps"), out.with_suffix(".errors")
        self._told.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "tests.tools.kill_runs", "train", self._told, "--config", RECIPE,
            "--data.source", pictures, "--out", out, "--steps", steps,
            "--save-every", SAVE_EVERY, "--sample-every", 0,
        ]  # fmt: skip
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=self._errors.open("w"),
        )

    def steps(self) -> list[int]:
        """That were done."""
        return list(map(int, self._told.read_text().split())) if self._told.exists() else []

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text()

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits; raises AssertionError where the run ends before, or nothing happens."""
        while not happened():
            assert self.process.poll() is None, f"the run ended by itself: {self.errors()}"
            assert time.monotonic() - self.begun < PATIENCE, self.errors()
            time.sleep(0.02)

    def end(self) -> None:
        """Waits for its end, which must be a good one."""
        assert self.process.wait(PATIENCE) == 0, self.errors()


def unfinished(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    folder = out / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def start_and_kill(
    pictures: Path, out: Path, steps: int, draw: random.Random, start: float
) -> Kill:
    """Starts a run and kills it at a random moment.

    Args:
        start: seconds that it takes up to its first step, about; 0: not known.
    """
    run, moment, took = Run(pictures, out, steps), draw.random(), 0.0
    if start and moment < AT_START:
        time.sleep(draw.uniform(0, start))
    else:
        run.until(lambda: bool(run.steps()))
        took = time.monotonic() - run.begun
        target = run.steps()[0] + draw.randrange(REACH)
        run.until(lambda: run.steps()[-1] >= target)
        if moment < AT_START + IN_SAVE:
            run.until(lambda: unfinished(out))
        time.sleep(draw.uniform(0, 0.05))
    assert run.process.poll() is None, f"the run ended by itself: {run.errors()}"
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    told, saved = run.steps(), max(steps_in(out / "checkpoints"), default=0)
    return Kill(
        began=told[0] - 1 if told else None,
        done=told[-1] if told else saved,
        saved=saved,
        # What an earlier kill left lies there until the run has begun.
        writing=bool(told) and unfinished(out),
        start=took,
        warnings=run.errors().count("is broken"),
    )


def record(out: Path) -> dict[str, Any]:
    """The newest checkpoint's record: checksums, and the place in the data."""
    newest = out / "checkpoints" / str(steps_in(out / "checkpoints")[0])
    return json.loads((newest / RECORD / "metadata").read_bytes())


def check(kills: list[Kill]) -> None:
    """Raises AssertionError unless each start went on where its newest checkpoint was made."""
    saved = 0
    for kill in kills:
        assert kill.began in (None, saved), kill
        # A save goes on beside the steps: the next one waits for it.
        assert kill.lost <= 2 * SAVE_EVERY, kill
        assert not kill.warnings, kill
        assert kill.saved >= saved, kill
        saved = kill.saved


def kill_again_and_again(out: Path, kills: int, steps: int, seed: int) -> list[Kill]:
    """Kills a run so many times, lets it come to its end, and checks what came of it."""
    draw, pictures = random.Random(seed), make_images(out / "pictures")
    Run(pictures, out / "whole", steps).end()

    found: list[Kill] = []
    for number in range(kills):
        start = next((kill.start for kill in reversed(found) if kill.start), 0.0)
        found.append(start_and_kill(pictures, out / "killed", steps, draw, start))
        print(number + 1, found[-1], file=sys.stderr, flush=True)
        check(found)
    last = Run(pictures, out / "killed", steps)
    last.end()
    assert last.steps() == list(range(found[-1].saved + 1, steps + 1))

    states = [restore_run(out / name)[1] for name in ("killed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0].step) == steps
    # Checksums of the state, and the place in the data.
    assert record(out / "killed") == record(out / "whole")
    assert not (out / "killed" / "broken").exists()
    return found


def summary(kills: list[Kill], steps: int) -> str:
    """The sentence of docs/training.md."""
    lost = [kill.lost for kill in kills]
    return (
        f"{len(kills)} kills in a run of {steps} steps that saved every {SAVE_EVERY}: "
        f"{sum(kill.began is None for kill in kills)} before the first step of a start, "
        f"{sum(kill.writing for kill in kills)} while a checkpoint was being written; "
        f"{sum(lost) / len(lost):.1f} steps lost on average, {max(lost)} at most; every restart "
        "went on from the newest finished checkpoint, and the last state, its optimiser and its "
        "place in the data equal those of an undisturbed run bit for bit"
    )


def main(out: Path, kills: int = 20, steps: int = 400, seed: int = 0) -> None:
    """Kills a tiny run again and again.

    Args:
        out: a new folder, for its pictures, runs and checkpoints.
        kills: how many times.
        steps: of the run; more than it can do between all its kills.
        seed: of the moments.
    """
    print(summary(kill_again_and_again(out, kills, steps, seed), steps))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        tell_steps(sys.argv[2], sys.argv[3:])
    else:
        tyro.cli(main)
