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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
OURS, EAGER, COMPILED = "glide-jax", "original", "original, compiled"
GROUPS = ("ours", "original", "compiled", "numerics", "training", "batches")
# Before each line of a worker that is meant for this module.
MARK = "@row "
# Seconds for imports, the start of the device, and weights, before the first row of a process.
START = 60
# Bytes and operations a second that were measured: copies, and products of 8192x8192 bfloat16.
MEASURED_PEAK = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}
NO_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory", "MemoryError")

Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        code: glide-jax, the original, or the original compiled.
        kind: forward, step, procedure, quick, numerics or training.
        model: base or upsampler; "both" for a procedure.
        dtype: dtype of the trunk.
        batch: batch size.
    """

    code: str
    kind: str
    model: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.code}: {self.kind}, {self.model}, {self.dtype}, {self.batch} at a time"


def rows_of(groups: Sequence[str], toy: bool = False) -> list[Row]:
    """Return the rows of some groups, in order of worth; toys are float32 and at most 2 at a time.

    Large batches of training come last: their best is found upwards.
    """

    def same(code: str, dtype: str) -> list[Row]:
        return [
            Row(code, "forward", "base", dtype, 16),
            Row(code, "forward", "upsampler", dtype, 16),
            Row(code, "step", "base", dtype, 1),
            Row(code, "step", "upsampler", dtype, 1),
            Row(code, "procedure", "both", dtype, 1),
        ]

    half, brain = "float16", "bfloat16"
    compiled = same(COMPILED, brain)
    groups_of_rows = {
        "ours": same(OURS, brain),
        "original": same(EAGER, half),
        # Compiling takes most of its time, and the whole procedure needs the two steps alone.
        "compiled": compiled[2:] + compiled[:2],
        "numerics": [Row(OURS, "numerics", model, half, 1) for model in ("base", "upsampler")],
        "training": [
            Row(OURS, "training", model, brain, batch)
            for model, batch in (
                ("base", 64), ("upsampler", 16), ("base", 128), ("upsampler", 32),
                ("base", 256), ("upsampler", 64),
            )
        ],
        "batches": [
            Row(OURS, "quick", "both", brain, 1),
            Row(OURS, "forward", "base", brain, 64),
            Row(OURS, "forward", "upsampler", brain, 64),
            Row(OURS, "step", "base", brain, 16),
            Row(OURS, "forward", "base", brain, 4),
            Row(OURS, "forward", "upsampler", brain, 4),
            Row(OURS, "procedure", "both", brain, 16),
            Row(OURS, "forward", "base", half, 16),
            Row(OURS, "forward", "upsampler", half, 16),
            Row(OURS, "forward", "base", brain, 1),
            Row(OURS, "forward", "upsampler", brain, 1),
        ],
    }  # fmt: skip
    found = [row for group in groups for row in groups_of_rows[group]]
    if toy:
        found = [
            Row(r.code, r.kind, r.model, half if r.kind == "numerics" else "float32", min(r.batch, 2))
            for r in found
        ]
    return list(dict.fromkeys(found))


# --- the process of an implementation


def say(**message: Any) -> None:
    """Tell the parent process something: a result, or the stage of a measurement."""
    print(MARK + json.dumps(message), flush=True)


def serve(measure: Callable[[Row], Result], after: Callable[[Row], None] | None = None) -> None:
    """Measure the rows of `sys.argv[1]` and tell the parent each result.

    Args:
        measure: the result of a row.
        after: what may be done once the result of a row is known.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for fields in json.loads(sys.argv[1])["rows"]:
        row = Row(**fields)
        try:
            say(result=measure(row))
            if after:
                after(row)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            lost = any(sign in reason for sign in NO_MEMORY)
            say(result={"error": "out of memory" if lost else reason.splitlines()[0][:300]})


def _end_with_parent() -> None:
    # The parent holds the other end of this pipe, and never writes.
    sys.stdin.read()
    os._exit(1)


def timed(
    call: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    seconds: float = 2.0,
    queued: int = 10,
    warm: int = 2,
    parts: int = 1,
) -> Result:
    """Return milliseconds per part of a call: the median of up to five means.

    Args:
        wait: waits for the result of a call.
        seconds: about as long as the timings take together.
        queued: calls in a row before one waits, at most.
        warm: calls before the first timing.
        parts: parts of a call, such as steps.
    """
    for _ in range(warm):
        wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    repeats = max(1, min(5, int(seconds / once)))
    queued = max(1, min(queued, int(seconds / once / repeats)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued - 1):
            call()
        wait(call())
        times.append((time.perf_counter() - start) * 1000 / queued / parts)
    return {"ms": statistics.median(times), "all_ms": [round(t, 4) for t in times]}


class Worker:
    """A process that measures rows, and what it says."""

    def __init__(self, rows: Sequence[Row], options: argparse.Namespace, folder: Path, log: TextIO):
        task = {
            "rows": [asdict(row) for row in rows],
            "size": options.size,
            "cache": str(folder),
            "out": str(options.out.resolve()),
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
            worker, extra, going = Worker(rows, options, folder, log), START, True
            try:
                while rows and going and time.perf_counter() < deadline:
                    row, began = rows.pop(0), time.perf_counter()
                    found, going = worker.result(options.row_limit + extra, deadline)
                    now, extra = time.perf_counter(), 0
                    clock = {"row_s": round(now - began, 1), "at_s": round(now - start, 1)}
                    yield asdict(row) | found | clock
            finally:
                worker.stop()


# --- output


COLUMNS = ("code", "what", "model", "trunk", "batch", "ms", "images/s", "TFLOP/s", "of peak")
COLUMNS += ("GB moved", "roofline", "temporaries", "compile", "eager / this", "compiled / this")


def table(results: Sequence[Result]) -> str:
    """Return Markdown: the machines and versions, one table, and the notes of rows."""
    lines = [f"- {machine}" for machine in sorted({r["machine"] for r in results if "machine" in r})]
    lines += ["", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["|---|---|---|---|" + "---:|" * (len(COLUMNS) - 4)]
    lines += ["| " + " | ".join(_cells(result, results)) + " |" for result in results]
    notes = [f"- {Row(**_row(r))}: {r['note']}" for r in results if "note" in r]
    return "\n".join([*lines, "", *notes, ""])


def _row(result: Result) -> Result:
    return {name: result[name] for name in Row.__dataclass_fields__}


def _cells(result: Result, results: Sequence[Result]) -> list[str]:
    names = [str(result[name]) for name in ("code", "kind", "model", "dtype", "batch")]
    if "ms" not in result:
        text = result.get("error") or result.get("note", "")
        return [*names, text.replace("|", "/"), *[""] * (len(COLUMNS) - 6)]
    flops, peak = result.get("flops"), result.get("peak")
    rate = flops and flops * 1000 / result["ms"]
    moved, temporary = result.get("bytes"), result.get("temporary_bytes")
    share = roofline(result)
    return [
        *names,
        f"{result['ms']:.2f}",
        f"{result['batch'] * 1000 / result['ms']:.2f}" if result["kind"] != "step" else "",
        f"{rate / 1e12:.3g}" if rate else "",
        f"{100 * rate / peak:.0f}%" if rate and peak else "",
        f"{moved / 1e9:.2f}" if moved else "",
        f"{100 * share:.0f}%" if share else "",
        f"{temporary / 1e6:.0f} MB" if temporary else "",
        f"{result['compile_s']:.0f} s" if "compile_s" in result else "",
        *(_ratio(result, results, code) for code in (EAGER, COMPILED)),
    ]


def roofline(result: Result) -> float | None:
    """Return the least time that the card's memory and arithmetic allow, over the time measured."""
    limits = MEASURED_PEAK.get(result.get("device", ""))
    if not limits or not result.get("bytes") or not result.get("flops"):
        return None
    least = max(result["bytes"] / limits[0], result["flops"] / limits[1])
    return least * 1000 / result["ms"]


def _ratio(result: Result, results: Sequence[Result], code: str) -> str:
    """Return the time of the original code for the same, divided by the time of the result."""
    if result["code"] != OURS:
        return ""
    for other in results:
        same = all(other[name] == result[name] for name in ("kind", "model", "batch"))
        if same and other["code"] == code and "ms" in other:
            return f"{other['ms'] / result['ms']:.2f}x"
    return ""


def known(path: Path) -> dict[Row, Result]:
    """Return the last result of each row in a file; a line that a kill cut short is left out."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[Row(**_row(result))] = result
    return results


def write_table(folder: Path, results: Sequence[Result]) -> None:
    """Replace `rows.md`; it is whole at any time."""
    temporary = folder / "rows.md.part"
    temporary.write_text(table(results), encoding="utf-8")
    temporary.replace(folder / "rows.md")


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
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="groups, in this order (all)")
    add("--original", type=Path, help="a copy of openai/glide-text2im, which is only read")
    add(
        "--original-python",
        type=Path,
        default=Path(sys.executable),
        help="the Python that has torch, for the original (this one)",
    )
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
            results[Row(**_row(result))] = result
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            write_table(options.out, list(results.values()))
            text = f"{result['ms']:.2f} ms" if "ms" in result else result.get("error")
            print(f"{result['at_s']:5.0f} s  {Row(**_row(result))}: {text or result['note']}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if measured < len(todo):
        print(f"no time for {len(todo) - measured} of {len(todo)} rows")


if __name__ == "__main__":
    main()
