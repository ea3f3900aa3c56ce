"""Speed of the released sizes: python -m benchmarks.speed --out speed

Random weights of the released sizes: milliseconds of a forward pass, pictures a second of the whole
released procedure (100 guided steps at 64x64, 27 of the upsampler), pictures a second and model
FLOP utilisation of training, with peak memory and compile time of each. Every measurement is a
process of its own, so that its peak is its own and one that runs out of memory does not end the
others; `speed.json` and `speed.md` are written after each. See docs/benchmarks.md.
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

from glide_jax.errors import GlideError, UsageError, nearest, one_line_errors

ROOT = Path(__file__).parent.parent
KINDS = ("forward", "procedure", "training")
MODELS = ("base", "upsampler")
# What a process that found no memory says: jax, torch on a GPU, torch on a CPU, numpy, the kernel.
NO_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "can't allocate memory", "MemoryError")
KILLED = -9

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Measures speed, memory and compile time of the released sizes with random weights."""

    out: Path = Path("speed")
    """Folder for speed.json and speed.md, which are written anew."""
    size: str = "released"
    """released, or toy: a rehearsal that a CPU can do."""
    only: tuple[str, ...] = KINDS
    """Which of forward, procedure, training."""
    batches: tuple[int, ...] = (1, 16, 64)
    """Pictures at a time, in forward passes and procedures."""
    train_batches: tuple[int, ...] = (16, 64)
    """Pictures at a time, in training."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """Of the trunk in forward passes; procedure and training take the first."""
    original: Path | None = None
    """A copy of openai/glide-text2im, to be measured in the same run; it is only read."""
    original_python: Path = Path(sys.executable)
    """The Python that has torch, for the original code."""
    repeats: int = 5
    """Timings of each measurement, of which the median is given."""
    limit: float = 300
    """Seconds after which one measurement is given up."""
    part: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """One measurement as JSON, in this process: what the command calls itself with."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        code: "glide-jax" or "original".
        kind: forward, procedure or training.
        model: base or upsampler; of a procedure "both".
        dtype: of the trunk; the original has float16 on GPUs and float32 on CPUs, by itself.
        batch: pictures at a time.
    """

    code: str
    kind: str
    model: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.code} {self.kind}, {self.model}, {self.dtype}, {self.batch} at a time"


def parts_of(options: Options) -> list[Part]:
    """What there is to measure, in order: small before large, ours beside the original's.

    Raises:
        UsageError: an option that is none, or leaves nothing.
    """
    for name in options.only:
        if name not in KINDS:
            raise UsageError(f"unknown part {name!r}{nearest(name, KINDS)}: {', '.join(KINDS)}")
    if options.size not in ("released", "toy"):
        raise UsageError(f"size is released or toy, not {options.size!r}")
    if not options.dtypes or options.repeats < 1 or min(options.batches, default=0) < 1:
        raise UsageError("give at least one dtype, one repeat, and batches of at least 1")
    if options.original and not (options.original / "glide_text2im").is_dir():
        raise UsageError(f"{options.original} holds no glide_text2im: give a copy of the original")
    found = []
    for batch in options.batches if "forward" in options.only else ():
        for model in MODELS:
            found += [Part("glide-jax", "forward", model, d, batch) for d in options.dtypes]
            found += [Part("original", "forward", model, "own", batch)]
    for batch in options.batches if "procedure" in options.only else ():
        found += [Part("glide-jax", "procedure", "both", options.dtypes[0], batch)]
        found += [Part("original", "procedure", "both", "own", batch)]
    for batch in options.train_batches if "training" in options.only else ():
        found += [Part("glide-jax", "training", "base", options.dtypes[0], batch)]
    found = [part for part in found if options.original or part.code != "original"]
    if not found:
        raise UsageError("there is nothing to measure")
    return found


def measured(part: Part, options: Options) -> Result:
    """One measurement in a process of its own; "error" where there is no figure."""
    given = {"size": options.size, "repeats": options.repeats, **asdict(part)}
    if part.code == "original":
        script = Path(__file__).with_name("speed_original.py")
        command = [options.original_python, script, options.original.resolve(), json.dumps(given)]
    else:
        command = [sys.executable, "-m", "benchmarks.speed", "--part", json.dumps(given)]
    # As much of the memory as there is, in the place of jax's three quarters.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    begun = time.perf_counter()
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
        found: Result = {"error": f"not done after {options.limit:g} s"}
    except OSError as error:
        raise GlideError(f"cannot run {command[0]}: {error.strerror}") from None
    else:
        found = _answer(done)
    return asdict(part) | found | {"process_s": round(time.perf_counter() - begun, 1)}


def _answer(done: subprocess.CompletedProcess) -> Result:
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(sign in done.stderr for sign in NO_MEMORY) or done.returncode == KILLED:
        return {"error": "out of memory"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or [f"exit {done.returncode}"])[-1][:300]}


# --- what is written


def write(folder: Path, options: Options, results: list[Result]) -> None:
    """`speed.json` and `speed.md`."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name not in ("out", "part", "original", "original_python")
    }
    text = json.dumps({"settings": settings, "results": results}, indent=1)
    (folder / "speed.json").write_text(text + "\n", encoding="utf-8")
    (folder / "speed.md").write_text(tables(results), encoding="utf-8")


def tables(results: list[Result]) -> str:
    """Markdown: machines and versions, then one table a kind."""
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


COLUMNS = ("code", "model", "trunk", "batch", "ms", "pictures/s", "TFLOP/s", "of peak")
COLUMNS += ("peak memory", "compile", "original's time")


def _row(result: Result, beside: list[Result]) -> list[str]:
    start = [result["code"], result["model"], result["dtype"], str(result["batch"])]
    if "error" in result:
        return [*start, result["error"].replace("|", "/"), *[""] * (len(COLUMNS) - 5)]
    rate, use = result.get("tflops"), result.get("utilisation")
    compile_s = result.get("compile_s")
    return [
        *start,
        f"{result['ms']:.1f}",
        f"{result['pictures_s']:.2f}",
        "" if rate is None else f"{rate:.3g}",
        "" if use is None else f"{100 * use:.0f}%",
        f"{result['peak_bytes'] / 1e9:.2f} GB ({result['peak_of']})",
        "" if compile_s is None else f"{compile_s:.0f} s",
        _ratio(result, beside),
    ]


def _ratio(result: Result, beside: list[Result]) -> str:
    """How many times as long the original takes for the same."""
    if result["code"] == "original":
        return ""
    for other in beside:
        same = all(other[key] == result[key] for key in ("model", "batch"))
        if same and other["code"] == "original" and "ms" in other:
            return f"{other['ms'] / result['ms']:.2f}x"
    return ""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.speed")
    if options.part:
        from benchmarks.speed_parts import measure

        print(json.dumps(measure(**json.loads(options.part))))
        return
    with one_line_errors():
        parts = parts_of(options)
        options.out.mkdir(parents=True, exist_ok=True)
        results: list[Result] = []
        for i, part in enumerate(parts):
            print(f"[{i + 1}/{len(parts)}] {part}: ", end="", flush=True)
            result = measured(part, options)
            results.append(result)
            print(result.get("error") or f"{result['ms']:.1f} ms", flush=True)
            write(options.out, options, results)
        print(f"{options.out / 'speed.md'} and {options.out / 'speed.json'}")
        if all("error" in result for result in results):
            raise GlideError("no measurement succeeded")


if __name__ == "__main__":
    main()
