"""What each model needs of two TPU slices: python -m benchmarks.dry_run_table

Compiles the training step of six recipes (three models, in the released and in the paper's sizes)
for each slice, and writes the tables of docs/dry_run.md. Each cell is a process of its own, which
has 20 minutes of one core; what is done is kept in a folder, so that the same command goes on
after a break.
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

from glide_jax.dry_run import Needs, fitting, gib, guessed_seconds, measure, minutes, step_seconds
from glide_jax.errors import GlideError, UsageError, one_line_errors
from glide_jax.hardware import Slice, parse_slice
from glide_jax.training.recipes import load_recipe

RECIPES = tuple(
    f"configs/{name}.py:{size}"
    for name in ("text64", "upsample256", "clip64")
    for size in ("released", "paper")
)
SLICES = ("v5e:16x16", "v5p:2x2x4")
# What a recipe must be given to fit a slice: on v5e:16x16 it takes 1.03 GiB a picture.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("configs/text64.py:paper", "v5p:2x2x4"): {"accumulate": 2},
}
BEGIN, END = "<!-- python -m benchmarks.dry_run_table -->", "<!-- end -->"
HEAD = (
    "recipe",
    "parameters",
    "spread",
    "batch: a device, at a time",
    "state",
    "temporaries",
    "in all",
    "would fit, a device",
    "FLOPs a step",
    "s a step, at least",
    "guess: pictures/s",
    "compiled in",
)


@dataclass(frozen=True)
class Options:
    """Compiles the steps of six recipes for two slices."""

    out: Path = Path("docs/dry_run.md")
    """The page; the tables between its two marks are written anew."""
    folder: Path = Path("runs/dry_run_table")
    """Where finished cells are kept."""
    limit: int = 1200
    """Seconds of processor time that a cell may take."""
    compile: bool = True
    """Without: cells that the folder does not have are "not compiled yet"."""
    machine: str = "two CPU cores"
    """What the page says about the machine that compiled."""
    cell: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """A recipe and a slice: that cell alone, as JSON; what the processes are started with."""


def fill(recipe: str, slice_name: str) -> dict[str, Any]:
    """One cell, compiled in this process."""
    config = replace(load_recipe(recipe), **CHANGES.get((recipe, slice_name), {}))
    needs = measure(config, parse_slice(slice_name))
    return asdict(needs) | {
        "processor_seconds": time.process_time(),
        # Kilobytes, on Linux.
        "compiler_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def kept(recipe: str, slice_name: str, options: Options) -> dict[str, Any] | None:
    """One cell, from the folder or from a process; empty where it did not finish.

    None where it is not there yet, and is not to be compiled.

    Raises:
        GlideError: the process failed.
    """
    changed = "".join(f"-{k}={v}" for k, v in CHANGES.get((recipe, slice_name), {}).items())
    name = f"{Path(recipe).name}-{slice_name}{changed}".replace(":", "-")
    path = options.folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    if not options.compile:
        return None
    print(f"{recipe} on {slice_name}", file=sys.stderr, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.dry_run_table", "--cell", recipe, slice_name],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (options.limit,) * 2),
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode == 0:
        cell = json.loads(process.stdout.splitlines()[-1])
    elif took >= options.limit - 1:
        cell = {}
    else:
        raise GlideError(f"{recipe} on {slice_name} ended with code {process.returncode}")
    path.write_text(json.dumps(cell, indent=1))
    return cell


def row(recipe: str, chips: Slice, cell: dict[str, Any] | None) -> list[str]:
    """One line of a slice's table."""
    changes = CHANGES.get((recipe, chips.name), {})
    name = " ".join(
        [f"`{recipe}`", *(f"`--{k.replace('_', '-')} {v}`" for k, v in changes.items())]
    )
    if not cell:
        what = "not compiled yet" if cell is None else "did not finish"
        return [name, what, *[""] * (len(HEAD) - 2)]
    extra = ("processor_seconds", "compiler_memory")
    needs = Needs(**{k: v for k, v in cell.items() if k not in extra})
    config = replace(load_recipe(recipe), **changes)
    memory = chips.device.memory
    fits = needs.memory <= memory
    bound, seconds = max(step_seconds(needs, chips.device).items(), key=lambda item: item[1])
    guess = config.batch_size / guessed_seconds(needs, chips.device)
    parts = f" x {config.accumulate}" if config.accumulate > 1 else ""
    return [
        name,
        f"{needs.parameters / 1e6:,.0f}M",
        config.spread + ", remat" * config.remat,
        f"{config.batch_size:,}: {needs.pictures}{parts}",
        gib(needs.state),
        gib(needs.temporaries),
        gib(needs.memory) if fits else f"**{gib(needs.memory)}: too much**",
        str(fitting(needs, memory)),
        f"{needs.model_flops:.2g}",
        f"{seconds:.2g} ({bound})" if fits else "",
        f"{guess:,.0f}" if fits else "",
        f"{minutes(cell['processor_seconds'])}, {gib(cell['compiler_memory'])} GiB",
    ]


def table(chips: Slice, rows: list[list[str]]) -> str:
    """A slice's table in Markdown."""
    device = chips.device
    lines = [
        f"### {chips.name}: {chips.count} chips, {gib(device.memory)} GiB each",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    if options.cell:
        print(json.dumps(fill(*options.cell)))
        return
    with one_line_errors():
        before, after = page_around(options.out)
        options.folder.mkdir(parents=True, exist_ok=True)
        tables = []
        for slice_name in SLICES:
            chips = parse_slice(slice_name)
            rows = [row(recipe, chips, kept(recipe, slice_name, options)) for recipe in RECIPES]
            tables.append(table(chips, rows))
        versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
        note = f"Compiled on {options.machine}; {versions}.\n"
        options.out.write_text("\n".join([before + BEGIN, note, *tables, END + after]))


def page_around(path: Path) -> tuple[str, str]:
    """What stands before and after the tables of a page.

    Raises:
        UsageError: it cannot be read, or has not the two marks.
    """
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        return before, rest.split(END)[1]
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is no page with {BEGIN!r} and {END!r}: {error}") from None


if __name__ == "__main__":
    main()
