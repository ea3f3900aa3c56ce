"""Kill a run with `kill -9` at random moments: python -m tests.tools.kill_runs --out FOLDER

A tiny run that saves every few steps is killed and started again with the same command, many
times; then it runs to its end. Each start must resume from the newest finished checkpoint, and the
end must equal that of an undisturbed run bit for bit. Of two processes, either one or both are
killed; one that is left has half a minute to end by itself, then it is killed too. Prints JSON, and
the sentence for docs/results/faults.md.

    python -m tests.tools.kill_runs --out FOLDER --kills 100 --steps 2000 --workers 1
    python -m tests.tools.kill_runs --out FOLDER --kills 100 --steps 2000 --workers 1 \\
        --parallelism fsdp --num-processes 2
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from glide_jax.training.checkpoint import MANIFEST, steps_in
from glide_jax.training.logger import Logger
from glide_jax.training.runs import restore_run
from tests.devices.test_parallel import free_port
from tests.support.commands import RECIPE, ROOT, environment, make_images
from train import main as train_main

SAVE_EVERY = 5
# A start is killed at most so many steps after its first one (or in the save after that).
REACH = 6 * SAVE_EVERY
# Shares of kills before the first step, and while a checkpoint is being written.
AT_START, IN_SAVE = 0.25, 0.4
# Timeout in seconds, for a busy machine.
PATIENCE = 3600.0
# Seconds that a process has to end by itself after the other was killed.
LEFT = 30.0


@dataclass(frozen=True)
class Layout:
    """How the runs are spread.

    Attributes:
        parallelism: "pmap" or "fsdp".
        processes: one or two, on this machine, each with one device.
        workers: data workers of each process.
    """

    parallelism: Literal["pmap", "fsdp"] = "pmap"
    processes: int = 1
    workers: int = 0


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
        victims: the processes that were killed.
        left: what became of another process: "" if there was none, "ended" by itself, or "killed"
            after half a minute.
    """

    began: int | None
    done: int
    saved: int
    writing: bool
    start: float
    warnings: int
    victims: str = "0"
    left: str = ""

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
    """The processes of a run, and their output."""

    def __init__(self, images: Path, out: Path, steps: int, layout: Layout = Layout()):
        self._steps, self._errors = out.with_suffix(".steps"), out.with_suffix(".errors")
        port = free_port()
        self.begun = time.monotonic()
        self.processes = []
        for index in range(layout.processes):
            log, errors = self._of(self._steps, index), self._of(self._errors, index)
            log.unlink(missing_ok=True)
            command = [
                sys.executable, "-m", "tests.tools.kill_runs", "train", log, "--config", RECIPE,
                "--data.source", images, "--out", out, "--steps", steps,
                "--save-every", SAVE_EVERY, "--sample-every", 0,
                "--parallelism", layout.parallelism, "--data.workers", layout.workers,
            ]  # fmt: skip
            if layout.processes > 1:
                command += [
                    "--coordinator",
                    f"localhost:{port}",
                    "--num-processes",
                    layout.processes,
                ]
                command += ["--process-id", index]
            with errors.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        cwd=ROOT,
                        env=environment(),
                        stdout=subprocess.DEVNULL,
                        stderr=file,
                        start_new_session=True,
                    )
                )

    def _of(self, path: Path, index: int) -> Path:
        return path.with_name(f"{path.name}{index}")

    def steps(self) -> list[int]:
        """Return the steps that the first process has finished."""
        path = self._of(self._steps, 0)
        return list(map(int, path.read_text().split())) if path.exists() else []

    def errors(self) -> str:
        """Return the stderr of all processes."""
        indices = range(len(self.processes))
        return "".join(self._of(self._errors, index).read_text() for index in indices)

    def ended(self) -> bool:
        """Whether a process has ended."""
        return any(process.poll() is not None for process in self.processes)

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something to happen; fail if the run ends before, or at the timeout."""
        while not happened():
            assert not self.ended(), f"the run ended by itself: {self.errors()}"
            assert time.monotonic() - self.begun < PATIENCE, self.errors()
            time.sleep(0.02)

    def kill(self, victims: list[int]) -> str:
        """Kill processes, wait for the others, and return what became of these: see `Kill.left`."""
        for index in victims:
            self.processes[index].send_signal(signal.SIGKILL)
        left, became = set(range(len(self.processes))) - set(victims), ""
        for index in left:
            became = "ended"
            try:
                self.processes[index].wait(LEFT)
            except subprocess.TimeoutExpired:
                became = "killed"
        for process in self.processes:
            # Data workers that outlive their process, too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return became

    def end(self) -> None:
        """Wait for its end, and check the exit codes."""
        for process in self.processes:
            assert process.wait(PATIENCE) == 0, self.errors()


def unfinished(out: Path) -> bool:
    """Whether a checkpoint is unfinished."""
    folder = out / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def start_and_kill(
    images: Path,
    out: Path,
    steps: int,
    rng: random.Random,
    start: float,
    layout: Layout = Layout(),
) -> Kill:
    """Start a run and kill it at a random moment.

    Args:
        images: folder of the data.
        out: folder of the run.
        steps: its last step.
        rng: chooses the moment.
        start: seconds until its first step, about; 0: not known.
        layout: how the run is spread.
    """
    run, moment, took = Run(images, out, steps, layout), rng.random(), 0.0
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
    assert not run.ended(), f"the run ended by itself: {run.errors()}"
    victims = rng.choice([[0], [1], [0, 1]]) if layout.processes > 1 else [0]
    left = run.kill(victims)
    done, saved = run.steps(), max(steps_in(out / "checkpoints"), default=0)
    return Kill(
        began=done[0] - 1 if done else None,
        done=done[-1] if done else saved,
        saved=saved,
        # Before its first step, an unfinished checkpoint may be that of an earlier kill.
        writing=bool(done) and unfinished(out),
        start=took,
        warnings=run.errors().count("is broken"),
        victims=" and ".join(map(str, victims)),
        left=left,
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


def kill_again_and_again(
    out: Path, kills: int, steps: int, seed: int, layout: Layout = Layout()
) -> list[Kill]:
    """Kill a run so many times, let it run to its end, and check the result."""
    rng, images = random.Random(seed), make_images(out / "images")
    Run(images, out / "whole", steps, layout).end()

    found: list[Kill] = []
    for number in range(kills):
        start = next((kill.start for kill in reversed(found) if kill.start), 0.0)
        found.append(start_and_kill(images, out / "killed", steps, rng, start, layout))
        print(number + 1, found[-1], file=sys.stderr, flush=True)
        check(found)
    last = Run(images, out / "killed", steps, layout)
    last.end()
    assert last.steps() == list(range(found[-1].saved + 1, steps + 1))

    states = [restore_run(out / name)[1] for name in ("killed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0].step) == steps
    # Checksums of the state, and the position in the data.
    assert manifest(out / "killed") == manifest(out / "whole")
    assert not (out / "killed" / "broken").exists()
    return found


def summary(kills: list[Kill], steps: int, layout: Layout = Layout()) -> str:
    """Return the sentence of docs/results/faults.md."""
    lost, left = [kill.lost for kill in kills], [kill.left for kill in kills]
    alone = ""
    if layout.processes > 1:
        alone = (
            f"{left.count('')} of both processes, {len(left) - left.count('')} of one, after which "
            f"the other ended by itself {left.count('ended')} times and was killed after "
            f"{LEFT:.0f} s {left.count('killed')} times; "
        )
    return (
        f"{layout.parallelism}, {layout.processes} processes, {layout.workers} data workers each: "
        f"{len(kills)} kills in a run of {steps} steps that saved every {SAVE_EVERY}: {alone}"
        f"{sum(kill.began is None for kill in kills)} before the first step of a start, "
        f"{sum(kill.writing for kill in kills)} while a checkpoint was being written; "
        f"{sum(lost) / len(lost):.1f} steps lost on average, {max(lost)} at most; every restart "
        "resumed from the newest finished checkpoint, and the final weights, optimiser, EMA and "
        "data position equal those of an undisturbed run bit for bit"
    )


def main(
    out: Path,
    kills: int = 20,
    steps: int = 400,
    seed: int = 0,
    parallelism: Literal["pmap", "fsdp"] = "pmap",
    processes: Literal[1, 2] = 1,
    workers: int = 0,
) -> None:
    """Kill a tiny run many times.

    Args:
        out: A new folder, for the images, runs and checkpoints.
        kills: Number of kills.
        steps: Last step of the run; more than it can do in all the starts that are killed.
        seed: Seed of the random moments.
        parallelism: How the run is spread.
        processes: Number of processes, on this machine.
        workers: Data workers of each process.
    """
    layout = Layout(parallelism, processes, workers)
    found = kill_again_and_again(out, kills, steps, seed, layout)
    print(json.dumps([asdict(kill) for kill in found]))
    print(summary(found, steps, layout))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        log_steps(sys.argv[2], sys.argv[3:])
    else:
        tyro.cli(main)
