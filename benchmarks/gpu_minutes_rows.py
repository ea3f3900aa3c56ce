"""The rows of `benchmarks.gpu_minutes`, and what each of its processes does with them.

It needs Python alone.
"""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OURS, EAGER, COMPILED = "glide-jax", "original", "original, compiled"
GROUPS = ("ours", "original", "compiled", "numerics", "training", "batches")
# Before each line of a process that is meant for its parent.
MARK = "@row "
NO_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory", "MemoryError")

Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        code: glide-jax, the original, or the original compiled.
        kind: forward, step, procedure, quick, numerics or training.
        model: base or upsampler, or an embedded model; "both" for a procedure.
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
        "numerics": [
            Row(OURS, "numerics", model, half, 1)
            for model in ("base", "emoji64", "emoji_upsample256", "upsampler")
        ],
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
            Row(
                r.code,
                r.kind,
                r.model,
                half if r.kind == "numerics" else "float32",
                min(r.batch, 2),
            )
            for r in found
        ]
    return list(dict.fromkeys(found))


def say(**message: Any) -> None:
    """Tell the parent process something: a result, or the stage of a measurement."""
    print(MARK + json.dumps(message), flush=True)


def serve(
    rows: Sequence[Result],
    measure: Callable[[Row], Result],
    after: Callable[[Row], None] = lambda row: None,
) -> None:
    """Measure rows and tell the parent process each result.

    Args:
        rows: the fields of each.
        measure: the result of a row.
        after: what may be done once the result of a row is known.
    """
    for row in (Row(**fields) for fields in rows):
        try:
            found = measure(row)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            lost = any(sign in reason for sign in NO_MEMORY)
            found = {"error": "out of memory" if lost else reason.splitlines()[0][:300]}
        say(result=found)
        try:
            after(row)
        except Exception:
            # The result is out; what is lost is in the log.
            traceback.print_exc()


def end_with_parent() -> None:
    """Let this process end when its parent ends, however that ends."""

    def wait() -> None:
        # The parent holds the other end of this pipe, and never writes.
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
