"""Accuracy of the samplers by network evaluations: python -m benchmarks.samplers

Writes the figure `samplers.png` and its data `samplers.json`. Left: the exact error of every
sampler on Gaussian images with the spectrum of natural images
(`glide_jax.diffusion.optimised_timesteps`). Right: the embedded model with classifier-free guidance
alone, its distance from the result of 1000 steps of dpm++2m with the same starting noise. The right
panel has deterministic samplers only: with added noise the result is another image.
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
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.diffusion.guidance import clamp_x_0, classifier_free
from glide_jax.diffusion.optimised_timesteps import image_error
from glide_jax.diffusion.sampling import make_plan, stream_plan
from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers import SOLVERS, traits_of
from glide_jax.diffusion.solvers.table import Solver
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.pipeline.pipeline import Pipeline

# Spacings other than the general default: for the default sampler, those of glide-text2im, and the
# default of the embedded model.
SPACED = (
    ("dpm++2m", "optimised"),
    ("dpm++2m", "karras"),
    ("dpm++2m", "trailing"),
    ("dpm++2m", "uniform"),
    ("dpm++2m", "trailing-capped"),
    ("ddim", "uniform"),
    ("ddim", "trailing-capped"),
    ("ddpm", "uniform"),
)

MARKERS = {
    "logsnr": "o",
    "optimised": "*",
    "karras": "v",
    "trailing": "<",
    "uniform": "x",
    "trailing-capped": "^",
}

# Distance by sampler (and spacing) and network evaluations.
Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Options:
    """Compare the samplers; it takes some tens of minutes on two CPU cores.

    Attributes:
        out: Folder for samplers.png and samplers.json.
        evaluations: Network evaluations per image (without guidance), for the exact error.
        model_evaluations: The same, for the embedded model.
        reference: Steps of the reference; more is more accurate.
        images: Number of images, with the model's own prompts in turn.
        seed: Seed of the starting noise.
        scale: Classifier-free guidance scale, by default that of the embedded model; 1 = off.
    """

    out: Path = Path("docs/results/images")
    evaluations: tuple[int, ...] = (5, 6, 8, 10, 12, 15, 20, 25, 35, 50)
    model_evaluations: tuple[int, ...] = (6, 8, 10, 15, 20, 25)
    reference: int = 1000
    images: int = 6
    seed: int = 0
    scale: float = 1.5


def choices() -> dict[str, tuple[Solver, str]]:
    """Return the solver and the spacing of each curve, by its name."""
    found = {name: (solver, "logsnr") for name, solver in SOLVERS.items()}
    return found | {f"{name}, {spacing}": (SOLVERS[name], spacing) for name, spacing in SPACED}


def evaluations_of(schedule: Schedule, timesteps: np.ndarray, solver: Solver) -> int:
    """Return the number of network evaluations of a solver at some timesteps."""
    return len(solver(schedule, timesteps, np.zeros(len(timesteps), bool)).t)


def levels_for(schedule: Schedule, solver: Solver, evaluations: int) -> int | None:
    """Return the most noise levels that a solver visits in so many evaluations; None: too few."""
    for levels in range(evaluations + 2, 0, -1):
        try:
            if evaluations_of(schedule, make_timesteps(schedule, levels), solver) <= evaluations:
                return levels
        except UsageError:  # PLMS needs more levels.
            return None
    return None


def curves(
    schedule: Schedule,
    names: tuple[str, ...],
    evaluations: tuple[int, ...],
    distance: Callable[[np.ndarray, Solver], float],
) -> Curves:
    """Return the distance of each curve at each number of evaluations."""
    found: Curves = {}
    for name in tqdm.tqdm(names):
        solver, spacing = choices()[name]
        found[name] = {}
        for count in evaluations:
            levels = levels_for(schedule, solver, count)
            if levels is not None:
                timesteps = make_timesteps(schedule, levels, spacing, solver=solver)
                found[name][evaluations_of(schedule, timesteps, solver)] = distance(
                    timesteps, solver
                )
    return found


def make_sampler(pipe: Pipeline, options: Options) -> Callable[[np.ndarray, Solver], np.ndarray]:
    """Return a function `(timesteps, solver) -> (B, H, W, 3)` without CLIP guidance.

    Prompts and starting noise are the same in each call.
    """
    prompts = pipe.model.prompts or ("",)
    captions = [prompts[i % len(prompts)] for i in range(options.images)]
    size = pipe.model.config.image_size
    x = jax.random.normal(jax.random.key(options.seed), (len(captions), size, size, 3))
    # The noise of the steps; deterministic samplers do not use it.
    keys = jax.random.split(jax.random.key(options.seed), len(captions))
    conds = {
        name: {"text": pipe.encode_captions(texts)}
        for name, texts in (("caption", captions), ("null", [""] * len(captions)))
    }
    guidance = [classifier_free(options.scale), clamp_x_0()]

    def generate(timesteps: np.ndarray, solver: Solver) -> np.ndarray:
        run = make_plan(pipe.schedule, timesteps, solver, guidance)
        for _, state in stream_plan({"main": pipe.network}, conds, run, x, keys):
            jax.block_until_ready(state.x)
        return np.asarray(jnp.clip(state.x, -1, 1))

    return generate


def measure(options: Options) -> dict[str, Any]:
    """Return both comparisons, the contents of `samplers.json`."""
    pipe = glide.load("emoji64", upsampler="none")
    exact = curves(
        pipe.schedule, tuple(choices()), options.evaluations, partial(image_error, pipe.schedule)
    )
    generate = make_sampler(pipe, options)
    reference = generate(make_timesteps(pipe.schedule, options.reference), SOLVERS["dpm++2m"])

    def distance(timesteps: np.ndarray, solver: Solver) -> float:
        return float(np.sqrt(((generate(timesteps, solver) - reference) ** 2).mean()))

    deterministic = tuple(name for name in choices() if not traits_of(name.split(",")[0]).is_noisy)
    model = curves(pipe.schedule, deterministic, options.model_evaluations, distance)
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    return {"settings": settings, "image statistics": exact, "embedded model": model}


def write_figure(found: dict[str, Any], path: Path) -> None:
    """Plot both comparisons side by side, distance against evaluations, both logarithmic.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("the figure needs matplotlib: pip install '.[eval]'") from None
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = {name: i for i, name in enumerate(SOLVERS)}
    handles = {}
    for axes, panel, title, ticks in (
        (left, "image statistics", "exact error on 1/f² Gaussian images", "evaluations"),
        (right, "embedded model", "embedded model: distance to the reference", "model_evaluations"),
    ):
        for name, points in found[panel].items():
            solver, _, spacing = name.partition(", ")
            (handles[name],) = axes.plot(
                list(map(int, points)),
                list(points.values()),
                linestyle=":" if spacing else "--" if number[solver] >= 10 else "-",
                marker=MARKERS[spacing or "logsnr"],
                color=f"C{number[solver] % 10}",
                markersize=5,
                linewidth=1.3,
            )
        axes.set(title=title, xlabel="network evaluations", xscale="log", yscale="log")
        axes.set_xticks(found["settings"][ticks], found["settings"][ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set(ylabel="root mean square per pixel, images in [-1, 1]", ylim=(1e-5, 1))
    right.set(ylim=(0.002, 1))
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.samplers")
    with one_line_errors():
        enable_compilation_cache()
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(options)
        table = options.out / "samplers.json"
        table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_figure(json.loads(table.read_text(encoding="utf-8")), options.out / "samplers.png")
        print(f"{options.out / 'samplers.png'} and {table}")


if __name__ == "__main__":
    main()
