"""Estimate the needs of each model on two TPU slices: python -m benchmarks.dry_run_table

Compiles the training step of six recipes (three models, in the released and in the paper's sizes)
for each slice, and writes the tables of docs/results/dry_run.md. Each row is compiled in its own
process, which has 20 minutes of processor time. Finished rows are kept in a folder: the same
command resumes after an interruption.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from glide_jax.devices.hardware import Slice, parse_slice
from glide_jax.errors import GlideError, UsageError, one_line_errors
from glide_jax.training.dry_run import measure
from glide_jax.training.dry_run_report import (
    Needs,
    estimated_seconds,
    format_minutes,
    gib,
    largest_microbatch,
    step_seconds,
)
from glide_jax.training.recipes import load_recipe

RECIPES = tuple(
    f"{name}:{size}"
    for name in ("text64", "upsample256", "clip64")
    for size in ("released", "paper")
)
SLICES = ("v5e:16x16", "v5p:2x2x4")
# Fields added to a recipe so that it fits a slice: on v5e:16x16 this one takes 1.03 GiB an image.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("text64:paper", "v5p:2x2x4"): {"accumulate": 2},
}
BEGIN, END = "<!-- python -m benchmarks.dry_run_table -->", "<!-- end -->"
HEAD = (
    "recipe",
    "parameters",
    "parallelism",
    "batch: microbatch per device (x number)",
    "state, GiB",
    "temporaries, GiB",
    "total, GiB",
    "largest microbatch per device",
    "FLOPs per step",
    "lower bound: s per step",
    "estimate: images/s",
    "compile time, memory",
)


@dataclass(frozen=True)
class Options:
    """Compile the steps of six recipes for two slices."""

    out: Path = Path("docs/results/dry_run.md")
    """The page; the tables between its two marks are replaced."""
    folder: Path = Path("runs/dry_run_table")
    """Folder of finished rows."""
    limit: int = 1200
    """Seconds of processor time that a row may take; a row that needs more "did not finish"."""
    compile: bool = True
    """Compile rows that the folder does not have; otherwise they are "not compiled yet"."""
    machine: str = "two CPU cores"
    """The machine that compiles, for the page."""
    one: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """A recipe and a slice: compile this row only and print it as JSON (used by the processes)."""


def compile_one(recipe: str, slice_name: str) -> dict[str, Any]:
    """Compile one row in this process."""
    config = replace(load_recipe(recipe), **CHANGES.get((recipe, slice_name), {}))
    needs = measure(config, parse_slice(slice_name))
    return asdict(needs) | {
        "processor_seconds": time.process_time(),
        # Kilobytes, on Linux.
        "compiler_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def find(recipe: str, slice_name: str, options: Options) -> dict[str, Any] | None:
    """Return one row from the folder, or from a process that compiles it.

    Returns:
        The row; empty if it did not finish; None if it is not in the folder and not to be compiled.

    Raises:
        GlideError: the process failed.
    """
    changed = "".join(f"-{k}={v}" for k, v in CHANGES.get((recipe, slice_name), {}).items())
    name = f"{recipe}-{slice_name}{changed}".replace(":", "-")
    path = options.folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    if not options.compile:
        return None
    print(f"{recipe} on {slice_name}", file=sys.stderr, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.dry_run_table", "--one", recipe, slice_name],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (options.limit,) * 2),
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode == 0:
        found = json.loads(process.stdout.splitlines()[-1])
    elif took >= options.limit - 1:
        found = {}
    else:
        raise GlideError(f"{recipe} on {slice_name} ended with code {process.returncode}")
    path.write_text(json.dumps(found, indent=1))
    return found


def row(recipe: str, chips: Slice, found: dict[str, Any] | None) -> list[str]:
    """Return the texts of one row of a slice's table."""
    changes = CHANGES.get((recipe, chips.name), {})
    name = " ".join(
        [f"`{recipe}`", *(f"`--{k.replace('_', '-')} {v}`" for k, v in changes.items())]
    )
    if not found:
        what = "not compiled yet" if found is None else "did not finish"
        return [name, what, *[""] * (len(HEAD) - 2)]
    extra = ("processor_seconds", "compiler_memory")
    needs = Needs(**{k: v for k, v in found.items() if k not in extra})
    config = replace(load_recipe(recipe), **changes)
    memory = chips.device.memory
    fits = needs.memory <= memory
    bound, seconds = max(step_seconds(needs, chips.device).items(), key=lambda item: item[1])
    estimate = config.batch_size / estimated_seconds(needs, chips.device)
    number = f" x {config.accumulate}" if config.accumulate > 1 else ""
    return [
        name,
        f"{needs.parameters / 1e6:,.0f}M",
        config.parallelism + ", remat" * config.remat,
        f"{config.batch_size:,}: {needs.microbatch}{number}",
        gib(needs.state),
        gib(needs.temporaries),
        gib(needs.memory) if fits else f"**{gib(needs.memory)}: does not fit**",
        str(largest_microbatch(needs, memory)),
        f"{needs.model_flops:.2g}",
        f"{seconds:.2g} ({bound})" if fits else "",
        f"{estimate:,.0f}" if fits else "",
        f"{format_minutes(found['processor_seconds'])}, {gib(found['compiler_memory'])} GiB",
    ]


def table(chips: Slice, rows: list[list[str]]) -> str:
    """Return a slice's table in Markdown."""
    device = chips.device
    lines = [
        f"### {chips.name}: {chips.count} chips, {gib(device.memory)} GiB each",
        "",
        *("| " + " | ".join(texts) + " |" for texts in (HEAD, ["---"] * len(HEAD), *rows)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.dry_run_table")
    if options.one:
        print(json.dumps(compile_one(*options.one)))
        return
    with one_line_errors():
        before, after = page_around(options.out)
        options.folder.mkdir(parents=True, exist_ok=True)
        tables = []
        for slice_name in SLICES:
            chips = parse_slice(slice_name)
            rows = [row(recipe, chips, find(recipe, slice_name, options)) for recipe in RECIPES]
            tables.append(table(chips, rows))
        versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
        note = f"Compiled on {options.machine}; {versions}.\n"
        options.out.write_text("\n".join([before + BEGIN, note, *tables, END + after]))


def page_around(path: Path) -> tuple[str, str]:
    """Return the text before and after the tables of a page.

    Raises:
        UsageError: it cannot be read, or does not have the two marks.
    """
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        return before, rest.split(END)[1]
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is no page with {BEGIN!r} and {END!r}: {error}") from None


if __name__ == "__main__":
    main()
