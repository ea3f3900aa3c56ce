"""The most valuable measurements in a few minutes of a GPU, in order of worth.

    python -m benchmarks.gpu_minutes --out minutes --seconds 240 --original ../glide-text2im

`--groups` selects and orders the groups of rows:

    ours       glide-jax: forward passes of 16 images; a guided step of the base and a step of the
               upsampler for one image; from text to 256x256 for one image
    original   the same rows of openai/glide-text2im, as published (float16, not compiled)
    compiled   the same rows of it with torch.compile, bfloat16 and channels_last
    numerics   sampled images of float16 against float32
    training   a training step of base and upsampler
    batches    forward passes of 64, 4 and 1 images, float16, fewer steps

Each row is appended to `rows.jsonl`, and `rows.md` rewritten, as soon as it is known. A row that
`rows.jsonl` holds already is not measured again. The rows of one implementation share a process; if
it crashes or a row exceeds its limit, a new one continues with the next row. Processes run one
after another. `programs.zip` has the compiled programs of glide-jax as text, `log.txt` what the
processes wrote. This module needs Python alone; a row needs jax and glide-jax's models, or torch
and the requirements of the original. See docs/results/benchmarks.md.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TextIO

from benchmarks.gpu_minutes_rows import GROUPS, MARK, OURS, Result, Row, rows_of
from benchmarks.gpu_minutes_table import known, row_of, write_table

ROOT = Path(__file__).parents[1]


class Worker:
    """A process that measures rows, and what it says."""

    def __init__(self, rows: Sequence[Row], options: argparse.Namespace, folder: Path, log: TextIO):
        task = {
            "rows": [asdict(row) for row in rows],
            "size": options.size,
            "cache": str(folder),
            "out": str(options.out.resolve()),
            "threads": options.compile_threads,
            "profile": options.profile,
            "original": options.original and str(options.original.resolve()),
        }
        ours = rows[0].code == OURS
        command = [sys.executable if ours else str(options.original_python), "-m"]
        command += [f"benchmarks.gpu_minutes_{'jax' if ours else 'torch'}", json.dumps(task)]
        environment = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        } | os.environ
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
        self.messages: queue.Queue[Result | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(log,), daemon=True).start()

    def _listen(self, log: TextIO) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.messages.put(json.loads(line.removeprefix(MARK)))
            else:
                log.write(line)
        self.messages.put(None)

    def result(self, limit: float, deadline: float) -> tuple[Result, bool]:
        """Wait for the result of a row.

        Args:
            limit: seconds of the row.
            deadline: end of all rows, on the clock of `time.perf_counter`.

        Returns:
            The result, and whether the process can measure the next row.
        """
        end, stage = min(time.perf_counter() + limit, deadline), "starting"
        while True:
            try:
                message = self.messages.get(timeout=max(0.0, end - time.perf_counter()))
            except queue.Empty:
                self.stop()
                over = "time was up" if end == deadline else f"stopped after {limit:g} s"
                return {"error": f"{over} while {stage}"}, False
            if message is None:
                return {"error": f"exit {self.process.wait()} while {stage}"}, False
            if "result" in message:
                return message["result"], True
            stage = message["stage"]

    def stop(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure_all(
    todo: Sequence[Row], options: argparse.Namespace, folder: Path, log: TextIO
) -> Iterator[Result]:
    """Measure rows until the time is up, and yield each result with its row."""
    start = time.perf_counter()
    deadline = start + options.seconds
    for _, same in groupby(todo, key=lambda row: row.code):
        rows = list(same)
        while rows and time.perf_counter() < deadline:
            worker, extra = Worker(rows, options, folder, log), options.start_limit
            going = True
            try:
                while rows and going and time.perf_counter() < deadline:
                    row, began = rows.pop(0), time.perf_counter()
                    found, going = worker.result(options.row_limit + extra, deadline)
                    now, extra = time.perf_counter(), 0
                    clock = {"row_s": round(now - began, 1), "at_s": round(now - start, 1)}
                    yield asdict(row) | found | clock
            finally:
                worker.stop()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("minutes"), help="folder of the results (minutes)")
    add("--seconds", type=float, default=240, help="time of all rows together (240)")
    add("--row-limit", type=float, default=120, help="time limit of one row in seconds (120)")
    add(
        "--start-limit",
        type=float,
        default=60,
        help="seconds more for the first row of a process: imports, the device, weights (60)",
    )
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="groups, in this order (all)")
    add("--original", type=Path, help="a copy of openai/glide-text2im, which is only read")
    add(
        "--original-python",
        type=Path,
        default=Path(sys.executable),
        help="the Python that has torch, for the original (this one)",
    )
    add(
        "--compile-threads",
        type=int,
        default=1,
        help="programs of glide-jax compiled side by side before the first is timed (1)",
    )
    add("--profile", action="store_true", help="write the time of each kernel to kernels.jsonl")
    add(
        "--size",
        choices=("released", "toy"),
        default="released",
        help="toy: small networks, to test the command on a CPU",
    )
    options = parser.parse_args(arguments)
    if options.original and not (options.original / "glide_text2im").is_dir():
        parser.error(f"{options.original} has no glide_text2im: give a copy of the original")
    return options


def main() -> None:
    """Measure the rows that are not known yet."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    results = known(path)
    todo = [
        row
        for row in rows_of(options.groups, options.size == "toy")
        if "error" in results.get(row, {"error": "not measured"})
    ]
    if not options.original:
        todo = [row for row in todo if row.code == OURS]
    folder = Path(tempfile.mkdtemp(prefix="gpu_minutes"))
    measured = 0
    with open(options.out / "log.txt", "a", encoding="utf-8") as log:
        for result in measure_all(todo, options, folder, log):
            measured += 1
            results[row_of(result)] = result
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            write_table(options.out, list(results.values()))
            text = f"{result['ms']:.2f} ms" if "ms" in result else result.get("error")
            print(
                f"{result['at_s']:5.0f} s  {row_of(result)}: {text or result['note']}",
                flush=True,
            )
    shutil.rmtree(folder, ignore_errors=True)
    if measured < len(todo):
        print(f"no time for {len(todo) - measured} of {len(todo)} rows")


if __name__ == "__main__":
    main()
