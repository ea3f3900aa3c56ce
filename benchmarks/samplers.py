"""Which sampler at how many evaluations: python -m benchmarks.samplers --out docs/images

Draws `samplers.png` and writes its figures to `samplers.json`. On the left the exact error on
Gaussian images of natural statistics (`glide_jax.diffusion.optimised`), of every sampler. On the
right the embedded model with classifier-free guidance alone: distance of a picture from that of
1000 steps of dpm++2m from the same noise, of the samplers that follow the flow (from one noise,
stochastic samplers draw another picture each time).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

import glide_jax as glide
from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import classifier_free, clip
from glide_jax.diffusion.optimised import image_error
from glide_jax.diffusion.sampling import plan, stream
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.diffusion.table import Solver
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.pipeline import Pipeline
from glide_jax.runtime import enable_compilation_cache

STOCHASTIC = ("dpm++2m-sde", "sa", "ddpm", "ddpm-small", "ddpm-large")
# Others than the default spacing, for two samplers: the default one, and the release's.
SPACED = (
    ("dpm++2m", "optimised"),
    ("dpm++2m", "rho"),
    ("dpm++2m", "trailing"),
    ("dpm++2m", "uniform"),
    ("ddim", "uniform"),
    ("ddpm", "uniform"),
)

MARKERS = {"logsnr": "o", "optimised": "*", "rho": "v", "trailing": "<", "uniform": "x"}

# Distance by sampler (and spacing) and evaluations.
Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Options:
    """Compares the samplers; some twenty minutes on two cores."""

    out: Path = Path("docs/images")
    """Folder for samplers.png and samplers.json."""
    evaluations: tuple[int, ...] = (5, 6, 8, 10, 12, 15, 20, 25, 35, 50)
    """Of the network a picture (without guidance's), on the exact statistics."""
    drawn_evaluations: tuple[int, ...] = (6, 8, 10, 15, 20, 25)
    """The same with the embedded model."""
    reference: int = 1000
    """Steps of the reference."""
    pictures: int = 6
    """Pictures, of the model's own prompts in turn."""
    seed: int = 0
    """Of the noise that they begin with."""
    scale: float = 3.0
    """Of classifier-free guidance."""


def choices() -> dict[str, tuple[Solver, str]]:
    """Solver and spacing of each curve, by its name."""
    found = {name: (solver, "logsnr") for name, solver in SOLVERS.items()}
    return found | {f"{name}, {spacing}": (SOLVERS[name], spacing) for name, spacing in SPACED}


def rows_of(schedule: Schedule, grid: np.ndarray, solver: Solver) -> int:
    """Evaluations that a solver takes on a grid."""
    return len(solver(schedule, grid, np.zeros(len(grid), bool)).t)


def levels_for(schedule: Schedule, solver: Solver, evaluations: int) -> int | None:
    """Most levels that a solver visits in so many evaluations; None: too few for it."""
    for levels in range(evaluations + 2, 0, -1):
        try:
            if rows_of(schedule, make_grid(schedule, levels), solver) <= evaluations:
                return levels
        except UsageError:  # PLMS cannot take as few.
            return None
    return None


def curves(
    schedule: Schedule,
    names: tuple[str, ...],
    evaluations: tuple[int, ...],
    distance: Callable[[np.ndarray, Solver], float],
) -> Curves:
    """The distance of each choice at each number of evaluations."""
    found: Curves = {}
    for name in tqdm.tqdm(names):
        solver, spacing = choices()[name]
        found[name] = {}
        for count in evaluations:
            levels = levels_for(schedule, solver, count)
            if levels is not None:
                grid = make_grid(schedule, levels, spacing, solver=solver)
                found[name][rows_of(schedule, grid, solver)] = distance(grid, solver)
    return found


def drawing(pipe: Pipeline, options: Options) -> Callable[[np.ndarray, Solver], np.ndarray]:
    """`(grid, solver) -> (B, H, W, 3)`: the same pictures each time; no CLIP guides."""
    prompts = pipe.model.prompts or ("",)
    captions = [prompts[i % len(prompts)] for i in range(options.pictures)]
    size = pipe.model.config.image_size
    x = jax.random.normal(jax.random.key(options.seed), (len(captions), size, size, 3))
    # The noise of rows, which those who follow the flow do not use.
    keys = jax.random.split(jax.random.key(options.seed), len(captions))
    conds = {
        name: {"text": pipe.text_features(texts)}
        for name, texts in (("cond", captions), ("null", [""] * len(captions)))
    }
    guidance = [classifier_free(scale=options.scale), clip()]

    def draw(grid: np.ndarray, solver: Solver) -> np.ndarray:
        run = plan(pipe.schedule, grid, solver, guidance)
        for _, state in stream({"main": pipe.network}, conds, run, x, keys):
            jax.block_until_ready(state.x)
        return np.asarray(jnp.clip(state.x, -1, 1))

    return draw


def measure(options: Options) -> dict[str, Any]:
    """Both comparisons, as they go into `samplers.json`."""
    pipe = glide.load("emoji64", upsampler="none")
    exact = curves(
        pipe.schedule, tuple(choices()), options.evaluations, partial(image_error, pipe.schedule)
    )
    draw = drawing(pipe, options)
    reference = draw(make_grid(pipe.schedule, options.reference), SOLVERS["dpm++2m"])

    def distance(grid: np.ndarray, solver: Solver) -> float:
        return float(np.sqrt(((draw(grid, solver) - reference) ** 2).mean()))

    flows = tuple(name for name in choices() if name.split(",")[0] not in STOCHASTIC)
    drawn = curves(pipe.schedule, flows, options.drawn_evaluations, distance)
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    return {"settings": settings, "image statistics": exact, "embedded model": drawn}


def draw_figure(found: dict[str, Any], path: Path) -> None:
    """Both comparisons beside each other, distance in units of [-1, 1] on a logarithmic scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the figure needs matplotlib: pip install '.[eval]'") from None
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = {name: i for i, name in enumerate(SOLVERS)}
    handles = {}
    for axes, part, title, ticks in (
        (left, "image statistics", "exact error on 1/f² Gaussian images", "evaluations"),
        (right, "embedded model", "embedded model: distance to the reference", "drawn_evaluations"),
    ):
        for name, points in found[part].items():
            solver, _, spacing = name.partition(", ")
            (handles[name],) = axes.plot(
                list(map(int, points)),
                list(points.values()),
                linestyle=":" if spacing else "--" if place[solver] >= 10 else "-",
                marker=MARKERS[spacing or "logsnr"],
                color=f"C{place[solver] % 10}",
                markersize=5,
                linewidth=1.3,
            )
        axes.set(title=title, xlabel="evaluations of the network", xscale="log", yscale="log")
        axes.set_xticks(found["settings"][ticks], found["settings"][ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set(ylabel="root mean square a pixel, pictures in [-1, 1]", ylim=(1e-5, 1))
    right.set(ylim=(0.01, 1))
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.samplers")
    with one_line_errors():
        enable_compilation_cache()
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(options)
        table = options.out / "samplers.json"
        table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw_figure(json.loads(table.read_text(encoding="utf-8")), options.out / "samplers.png")
        print(f"{options.out / 'samplers.png'} and {table}")


if __name__ == "__main__":
    main()
