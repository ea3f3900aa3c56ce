"""What each model needs of two TPU slices: python -m benchmarks.dry_run_table

Compiles the training step of the six recipes, in the released and in the paper's sizes, for each
slice, and writes the table of docs/dry_run.md. Each cell is a process of its own, which has 20
minutes; what is done is kept in a folder, so that the same command goes on after a break.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from glide_jax.dry_run import Needs, assumed_seconds, fitting, gib, measure, minutes, step_seconds
from glide_jax.hardware import parse_slice
from glide_jax.training.recipes import load_recipe

RECIPES = tuple(
    f"configs/{name}.py:{size}"
    for name in ("text64", "upsample256", "clip64")
    for size in ("released", "paper")
)
SLICES = ("v5e:16x16", "v5p:2x2x4")
# What a recipe must be given to fit a slice.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {}


@dataclass(frozen=True)
class Options:
    """Compiles the steps of six recipes for two slices."""

    out: Path = Path("docs/dry_run.md")
    """The page."""
    folder: Path = Path("runs/dry_run_table")
    """Where finished cells are kept."""
    limit: int = 1200
    """Seconds that a cell may take."""
    cell: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """A recipe and a slice: that cell alone, as JSON; what the processes are started with."""


def fill(recipe: str, slice_name: str) -> dict[str, Any]:
    """One cell, compiled here."""
    config = replace(load_recipe(recipe), **CHANGES.get((recipe, slice_name), {}))
    needs = measure(config, parse_slice(slice_name))
    return asdict(needs) | {
        "cpu_seconds": time.process_time(),
        # Kilobytes on Linux.
        "own_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def kept(recipe: str, slice_name: str, options: Options) -> dict[str, Any]:
    """One cell: from the folder, or from a process that has `options.limit` seconds."""
    changes = CHANGES.get((recipe, slice_name), {})
    name = "-".join([Path(recipe).name, slice_name, *(f"{k}={v}" for k, v in changes.items())])
    path = options.folder / f"{name.replace(':', '-')}.json"
    if path.exists():
        return json.loads(path.read_text())
    command = [sys.executable, "-m", "benchmarks.dry_run_table", "--cell", recipe, slice_name]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=options.limit, check=True
        )
        cell = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        cell = {}
    path.write_text(json.dumps(cell, indent=1))
    return cell


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    if options.cell:
        print(json.dumps(fill(*options.cell)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
