"""Kill a run with `kill -9` at random moments: python -m tests.tools.kill_runs --out FOLDER

A tiny run that saves every few steps is killed and started again with the same command, many
times; then it runs to its end. Each start must resume from the newest finished checkpoint, and the
end must equal that of an undisturbed run bit for bit. Prints the sentence for
docs/guide/training.md.
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

from glide_jax.training.checkpoint import MANIFEST, steps_in
from glide_jax.training.logger import Logger
from glide_jax.training.runs import restore_run
from tests.support.commands import RECIPE, ROOT, environment, make_images
from train import main as train_main

SAVE_EVERY = 5
# A start is killed at most so many steps after its first one (or in the save after that).
REACH = 6 * SAVE_EVERY
# Shares of kills before the first step, and while a checkpoint is being written.
AT_START, IN_SAVE = 0.25, 0.4
# Timeout in seconds, for a busy machine.
PATIENCE = 900.0


@dataclass(frozen=True)
class Kill:
    """One start of a run, and its end.

    Attributes:
        began: the step it resumed from; 0: it started anew; None: it was killed before its first
            step.
        done: number of steps done when it was killed.
        saved: the newest finished checkpoint at that time; 0: none.
        writing: whether a checkpoint was being written.
        start: seconds until its first step; 0: it was killed before.
        warnings: number of warnings about a broken checkpoint.
    """

    began: int | None
    done: int
    saved: int
    writing: bool
    start: float
    warnings: int

    @property
    def lost(self) -> int:
        """Number of steps that have to be repeated."""
        return self.done - self.saved


def log_steps(path: str, arguments: list[str]) -> None:
    """Run `train.py`, and append the number of each finished step to a file."""
    file, steps = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), Logger.steps

    def logged(self: Logger, number: int, *more: Any, **named: Any) -> None:
        os.write(file, f"{number}\n".encode())
        steps(self, number, *more, **named)

    Logger.steps = logged
    sys.argv = ["train.py", *arguments]
    train_main()


class Run:
    """One process of a run, and its output."""

    def __init__(self, images: Path, out: Path, steps: int):
        self._steps, self._errors = out.with_suffix(".steps"), out.with_suffix(".errors")
        self._steps.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "tests.tools.kill_runs", "train", self._steps, "--config", RECIPE,
            "--data.source", images, "--out", out, "--steps", steps,
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
        """Return the finished steps."""
        return list(map(int, self._steps.read_text().split())) if self._steps.exists() else []

    def errors(self) -> str:
        """Return its stderr."""
        return self._errors.read_text()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something to happen; fail if the run ends before, or at the timeout."""
        while not happened():
            assert self.process.poll() is None, f"the run ended by itself: {self.errors()}"
            assert time.monotonic() - self.begun < PATIENCE, self.errors()
            time.sleep(0.02)

    def end(self) -> None:
        """Wait for its end, and check its exit code."""
        assert self.process.wait(PATIENCE) == 0, self.errors()


def unfinished(out: Path) -> bool:
    """Whether a checkpoint is unfinished."""
    folder = out / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def start_and_kill(images: Path, out: Path, steps: int, rng: random.Random, start: float) -> Kill:
    """Start a run and kill it at a random moment.

    Args:
        images: folder of the data.
        out: folder of the run.
        steps: its last step.
        rng: chooses the moment.
        start: seconds until its first step, about; 0: not known.
    """
    run, moment, took = Run(images, out, steps), rng.random(), 0.0
    if start and moment < AT_START:
        time.sleep(rng.uniform(0, start))
    else:
        run.until(lambda: bool(run.steps()))
        took = time.monotonic() - run.begun
        target = run.steps()[0] + rng.randrange(REACH)
        run.until(lambda: run.steps()[-1] >= target)
        if moment < AT_START + IN_SAVE:
            run.until(lambda: unfinished(out))
        time.sleep(rng.uniform(0, 0.05))
    assert run.process.poll() is None, f"the run ended by itself: {run.errors()}"
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    done, saved = run.steps(), max(steps_in(out / "checkpoints"), default=0)
    return Kill(
        began=done[0] - 1 if done else None,
        done=done[-1] if done else saved,
        saved=saved,
        # Before its first step, an unfinished checkpoint may be that of an earlier kill.
        writing=bool(done) and unfinished(out),
        start=took,
        warnings=run.errors().count("is broken"),
    )


def manifest(out: Path) -> dict[str, Any]:
    """Return the newest checkpoint's manifest: checksums, and the position in the data."""
    newest = out / "checkpoints" / str(steps_in(out / "checkpoints")[0])
    return json.loads((newest / MANIFEST / "metadata").read_bytes())


def check(kills: list[Kill]) -> None:
    """Check that each start resumed from its newest checkpoint."""
    saved = 0
    for kill in kills:
        assert kill.began in (None, saved), kill
        # A save runs beside the steps, and the next save waits for it.
        assert kill.lost <= 2 * SAVE_EVERY, kill
        assert not kill.warnings, kill
        assert kill.saved >= saved, kill
        saved = kill.saved


def kill_again_and_again(out: Path, kills: int, steps: int, seed: int) -> list[Kill]:
    """Kill a run so many times, let it run to its end, and check the result."""
    rng, images = random.Random(seed), make_images(out / "images")
    Run(images, out / "whole", steps).end()

    found: list[Kill] = []
    for number in range(kills):
        start = next((kill.start for kill in reversed(found) if kill.start), 0.0)
        found.append(start_and_kill(images, out / "killed", steps, rng, start))
        print(number + 1, found[-1], file=sys.stderr, flush=True)
        check(found)
    last = Run(images, out / "killed", steps)
    last.end()
    assert last.steps() == list(range(found[-1].saved + 1, steps + 1))

    states = [restore_run(out / name)[1] for name in ("killed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0].step) == steps
    # Checksums of the state, and the position in the data.
    assert manifest(out / "killed") == manifest(out / "whole")
    assert not (out / "killed" / "broken").exists()
    return found


def summary(kills: list[Kill], steps: int) -> str:
    """Return the sentence of docs/guide/training.md."""
    lost = [kill.lost for kill in kills]
    return (
        f"{len(kills)} kills in a run of {steps} steps that saved every {SAVE_EVERY}: "
        f"{sum(kill.began is None for kill in kills)} before the first step of a start, "
        f"{sum(kill.writing for kill in kills)} while a checkpoint was being written; "
        f"{sum(lost) / len(lost):.1f} steps lost on average, {max(lost)} at most; every restart "
        "resumed from the newest finished checkpoint, and the final weights, optimiser, EMA and "
        "data position equal those of an undisturbed run bit for bit"
    )


def main(out: Path, kills: int = 20, steps: int = 400, seed: int = 0) -> None:
    """Kill a tiny run many times.

    Args:
        out: A new folder, for the images, runs and checkpoints.
        kills: Number of kills.
        steps: Last step of the run; more than it can do in all the starts that are killed.
        seed: Seed of the random moments.
    """
    print(summary(kill_again_and_again(out, kills, steps, seed), steps))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        log_steps(sys.argv[2], sys.argv[3:])
    else:
        tyro.cli(main)
