"""Speed of models of the size of OpenAI's: python -m benchmarks.speed --out speed

With random weights it measures milliseconds per forward pass, images per second of the procedure of
OpenAI's notebook (100 guided steps at 64x64, 27 of the upsampler), and images per second and model
FLOP utilisation of training, each with peak memory and compile time. Every measurement runs in its
own process: it has its own peak memory, and if it runs out of memory the others still run.
`speed.json` and `speed.md` are written after each measurement. See docs/results/benchmarks.md.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from glide_jax.errors import GlideError, UsageError, did_you_mean, one_line_errors

ROOT = Path(__file__).parents[1]
KINDS = ("forward", "procedure", "training")
MODELS = ("base", "upsampler")
# Errors when memory runs out: jax, torch on a GPU, torch on a CPU, numpy. Linux sends a signal.
NO_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "can't allocate memory", "MemoryError")
KILLED = -9

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Measure speed, memory and compile time of models of the size of OpenAI's."""

    out: Path = Path("speed")
    """Folder for speed.json and speed.md, which are overwritten."""
    size: str = "released"
    """released: the sizes of OpenAI's models; toy: small networks, to test the command on a CPU."""
    only: tuple[str, ...] = KINDS
    """Kinds of measurements: forward, procedure, training."""
    batches: tuple[int, ...] = (1, 16, 64)
    """Batch sizes of forward passes and procedures."""
    train_batches: tuple[int, ...] = (16, 64)
    """Batch sizes of training."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """Dtypes of the trunk in forward passes; procedure and training use the first."""
    original: Path | None = None
    """A copy of openai/glide-text2im, to be measured in the same run; it is only read."""
    original_python: Path = Path(sys.executable)
    """The Python that has torch, for the original code."""
    repeats: int = 5
    """Timings per measurement, at least 1; the result is their median."""
    limit: float = 300
    """Time limit of one measurement in seconds; a measurement that exceeds it is stopped."""
    measurement: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """Make one measurement, described as JSON, in this process; the command runs itself with it."""


@dataclass(frozen=True)
class Measurement:
    """A description of one measurement.

    Attributes:
        code: "glide-jax" or "original".
        kind: forward, procedure or training.
        model: base or upsampler; "both" for a procedure.
        dtype: dtype of the trunk; "own" for the original code, which uses float16 on GPUs and
            float32 on CPUs.
        batch: batch size.
    """

    code: str
    kind: str
    model: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.code} {self.kind}, {self.model}, {self.dtype}, {self.batch} at a time"


def measurements(options: Options) -> list[Measurement]:
    """Return all measurements of a run, small batches first, each followed by the original's.

    Raises:
        UsageError: an option has a wrong value, or there is nothing to measure.
    """
    for name in options.only:
        if name not in KINDS:
            raise UsageError(
                f"unknown kind {name!r}{did_you_mean(name, KINDS)}: {', '.join(KINDS)}"
            )
    if options.size not in ("released", "toy"):
        raise UsageError(f"size is released or toy, not {options.size!r}")
    if not options.dtypes or options.repeats < 1 or min(options.batches, default=0) < 1:
        raise UsageError("give at least one dtype, one repeat, and batches of at least 1")
    if options.original and not (options.original / "glide_text2im").is_dir():
        raise UsageError(f"{options.original} has no glide_text2im: give a copy of the original")
    found = []
    for batch in options.batches if "forward" in options.only else ():
        for model in MODELS:
            found += [Measurement("glide-jax", "forward", model, d, batch) for d in options.dtypes]
            found += [Measurement("original", "forward", model, "own", batch)]
    for batch in options.batches if "procedure" in options.only else ():
        found += [Measurement("glide-jax", "procedure", "both", options.dtypes[0], batch)]
        found += [Measurement("original", "procedure", "both", "own", batch)]
    for batch in options.train_batches if "training" in options.only else ():
        found += [Measurement("glide-jax", "training", "base", options.dtypes[0], batch)]
    found = [one for one in found if options.original or one.code != "original"]
    if not found:
        raise UsageError("there is nothing to measure")
    return found


def measured(measurement: Measurement, options: Options) -> Result:
    """Make one measurement in its own process; the result has "error" if it fails."""
    text = json.dumps({"size": options.size, "repeats": options.repeats, **asdict(measurement)})
    if measurement.code == "original":
        assert options.original is not None
        script = Path(__file__).with_name("speed_original.py")
        command = [options.original_python, script, options.original.resolve(), text]
    else:
        command = [sys.executable, "-m", "benchmarks.speed", "--measurement", text]
    # Nearly all of the device memory; the default of jax is three quarters.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    start = time.perf_counter()
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=options.limit,
        )
    except subprocess.TimeoutExpired:
        found: Result = {"error": f"stopped after {options.limit:g} s"}
    except OSError as error:
        raise GlideError(f"cannot run {command[0]}: {error.strerror}") from None
    else:
        found = _answer(done)
    return asdict(measurement) | found | {"process_s": round(time.perf_counter() - start, 1)}


def _answer(done: subprocess.CompletedProcess) -> Result:
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(sign in done.stderr for sign in NO_MEMORY) or done.returncode == KILLED:
        return {"error": "out of memory"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or [f"exit {done.returncode}"])[-1][:300]}


# --- output


def write(folder: Path, options: Options, results: list[Result]) -> None:
    """Write `speed.json` and `speed.md`."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name not in ("out", "measurement", "original", "original_python")
    }
    text = json.dumps({"settings": settings, "results": results}, indent=1)
    (folder / "speed.json").write_text(text + "\n", encoding="utf-8")
    (folder / "speed.md").write_text(tables(results), encoding="utf-8")


def tables(results: list[Result]) -> str:
    """Return Markdown: machines and versions, then one table for each kind."""
    machines = sorted({r["machine"] for r in results if "machine" in r})
    lines = [*(f"- {machine}" for machine in machines), ""]
    for kind in KINDS:
        chosen = [r for r in results if r["kind"] == kind]
        if not chosen:
            continue
        lines += [f"### {kind}", "", "| " + " | ".join(COLUMNS) + " |"]
        lines += ["|---|---|---|" + "---:|" * (len(COLUMNS) - 3)]
        lines += ["| " + " | ".join(_row(r, chosen)) + " |" for r in chosen]
        lines += [""]
    return "\n".join(lines)


COLUMNS = ("code", "model", "trunk", "batch", "ms", "images/s", "TFLOP/s", "of peak")
COLUMNS += ("peak memory", "compile", "original's time")


def _row(result: Result, table: list[Result]) -> list[str]:
    start = [result["code"], result["model"], result["dtype"], str(result["batch"])]
    if "error" in result:
        return [*start, result["error"].replace("|", "/"), *[""] * (len(COLUMNS) - 5)]
    rate, use = result.get("tflops"), result.get("utilisation")
    compile_s = result.get("compile_s")
    return [
        *start,
        f"{result['ms']:.1f}",
        f"{result['images_s']:.2f}",
        "" if rate is None else f"{rate:.3g}",
        "" if use is None else f"{100 * use:.0f}%",
        f"{result['peak_bytes'] / 1e9:.2f} GB ({result['peak_of']})",
        "" if compile_s is None else f"{compile_s:.0f} s",
        _ratio(result, table),
    ]


def _ratio(result: Result, table: list[Result]) -> str:
    """Return the time of the original code for the same, divided by the time of the result."""
    if result["code"] == "original":
        return ""
    for other in table:
        same = all(other[key] == result[key] for key in ("model", "batch"))
        if same and other["code"] == "original" and "ms" in other:
            return f"{other['ms'] / result['ms']:.2f}x"
    return ""


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, prog="python -m benchmarks.speed")
    if options.measurement:
        from benchmarks.speed_parts import measure

        print(json.dumps(measure(**json.loads(options.measurement))))
        return
    with one_line_errors():
        todo = measurements(options)
        options.out.mkdir(parents=True, exist_ok=True)
        results: list[Result] = []
        for i, measurement in enumerate(todo):
            print(f"[{i + 1}/{len(todo)}] {measurement}: ", end="", flush=True)
            result = measured(measurement, options)
            results.append(result)
            print(result.get("error") or f"{result['ms']:.1f} ms", flush=True)
            write(options.out, options, results)
        print(f"{options.out / 'speed.md'} and {options.out / 'speed.json'}")
        if all("error" in result for result in results):
            raise GlideError("no measurement succeeded")


if __name__ == "__main__":
    main()
