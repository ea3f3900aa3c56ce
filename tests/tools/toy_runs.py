"""Run every recipe at size `toy`: python -m tests.tools.toy_runs --out FOLDER

From the command line each recipe trains on sixteen captioned images, is stopped half-way and
resumed, exported, and sampled from. The loss is measured with fixed noise, before and after, and
with the conditioning removed. Prints the table of docs/results/toy_runs.md.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from glide_jax.data.batches import make_batches
from glide_jax.data.decoding import from_uint8
from glide_jax.data.sources import open_source
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.diffusion.losses import make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.initial import params_from
from glide_jax.training.objectives import (
    Batch,
    contrastive_loss,
    denoising_loss,
    make_objective,
    make_tokenizer,
    to_batch,
)
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import restore_run
from tests.support.commands import ROOT, environment

# Two sets of sixteen images, shape and colours on backgrounds: a model that another training
# starts from has not seen the images of that training.
SETS = (
    ("circle", ("red", "green", "blue", "black"), ("white", "yellow", "pink", "grey")),
    ("square", ("yellow", "white", "pink", "grey"), ("black", "blue", "red", "green")),
)
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 70, 210), "black": (20, 20, 20),
    "white": (240, 240, 240), "yellow": (230, 200, 40), "pink": (245, 150, 190),
    "grey": (128, 128, 128),
}  # fmt: skip
PROMPT = "a red circle on white"
# Number of passes over the images, each with its own noise, in a measurement of the loss.
PASSES = 8


@dataclass(frozen=True)
class Toy:
    """How a recipe is tested.

    Attributes:
        removed: inputs that are removed from the trained model, one at a time.
        starts_from: the toy that it starts from, trained on the other set.
        block: side of the blocks, in pixels, of random patterns, whose captions name the colours
            only, so that the small image or the known pixels are needed; 0: images of shapes.
    """

    removed: tuple[str, ...] = ("captions",)
    starts_from: str = ""
    block: int = 0


TOYS = {
    "text64": Toy(),
    "cfg64": Toy(),
    "improved64": Toy(),
    "upsample256": Toy(("low_res",), block=4),
    "improved256": Toy(("low_res",), block=4),
    "inpaint64": Toy(("inpaint_known",), "text64", block=2),
    "inpaint256": Toy(("low_res", "inpaint_known"), "upsample256", block=2),
    "finetune64": Toy(starts_from="text64"),
    "clip64": Toy(),
}


def write_images(folder: Path, which: int = 0, size: int = 32, block: int = 0) -> Path:
    """Write sixteen images with captions, of shapes or of patterns of blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, colours, grounds = SETS[which]
    rng = np.random.default_rng(which)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    inside = x**2 + y**2 < 0.12 if shape == "circle" else np.maximum(abs(x), abs(y)) < 0.3
    for colour in colours:
        for ground in grounds:
            image = np.full((size, size, 3), COLOURS[ground], np.uint8)
            if block:
                inside = rng.random((size // block, size // block)) < 0.5
                inside = inside.repeat(block, axis=0).repeat(block, axis=1)
            image[inside] = COLOURS[colour]
            Image.fromarray(image).save(folder / f"{colour}-{ground}.png")
            caption = f"a {colour} {'pattern' if block else shape} on {ground}"
            (folder / f"{colour}-{ground}.txt").write_text(caption)
    return folder


def command(*arguments: object) -> str:
    """Run a command of the project, and return its output."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{result.stdout}{result.stderr}")
    return result.stdout


def train(name: str, images: Path, out: Path, *more: object, steps: int = 0) -> None:
    """Train a recipe's toy, stopped and resumed half-way, for `steps`, or its own number (0)."""
    steps = steps or load_recipe(f"{name}:toy").steps
    arguments: tuple[object, ...] = ("train.py", "--config", f"{name}:toy", "--data.source", images)
    arguments += ("--out", out, *more)
    command(*arguments, "--steps", steps // 2)
    resumed = command(*arguments, "--steps", steps)
    assert f"step {steps // 2} of {steps}" in resumed, resumed


def all_images(config: RunConfig) -> Batch:
    """Return all sixteen images, as training sees them."""
    arrays = next(
        make_batches(
            open_source(config.data),
            config.data,
            batch_size=16,
            tokenizer=make_tokenizer(config),
            size=config.side,
            seed=0,
        )
    )
    return to_batch(arrays)


class Without:
    """A network with one input set to zero."""

    def __init__(self, model: Any, removed: str):
        self._model, self._removed = model, removed

    def apply(self, variables: Any, *inputs: Any, **conditioning: Any) -> Any:
        """Apply the network, with zeros for the removed input."""
        if self._removed in conditioning:
            conditioning[self._removed] = jnp.zeros_like(conditioning[self._removed])
        return self._model.apply(variables, *inputs, **conditioning)


@cache
def mean_loss(config: RunConfig, removed: str = "") -> Callable[[Any, Batch], jax.Array]:
    """Return the compiled loss `(params, batch) -> loss`, with all captions and fixed noise."""
    model: Any = Without(make_objective(config).model, removed)
    tables = make_tables(make_schedule(config.noise_schedule, config.diffusion_steps))

    def one(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        if isinstance(config, CLIPTrainConfig):
            return contrastive_loss(params, batch, key, model=model, tables=tables)[0]
        assert isinstance(config, TrainConfig)
        kept = replace(config, caption_dropout=0.0)
        return denoising_loss(params, batch, key, model=model, tables=tables, config=kept)[0]

    keys = jax.random.split(jax.random.key(7), PASSES)
    return jax.jit(lambda *inputs: jax.lax.map(partial(one, *inputs), keys).mean())


def loss_of(config: RunConfig, params: Any, removed: str = "") -> float:
    """Return the loss of the sixteen images; without "captions" each gets another's caption."""
    batch = all_images(config)
    if removed == "captions":
        tokens, mask = (np.roll(x, 5, axis=0) for x in (batch.tokens, batch.caption_mask))
        batch, removed = batch._replace(tokens=tokens, caption_mask=mask), ""
    return float(mean_loss(config, removed)(params, batch))


def ranked_first(weights: Path, config: RunConfig, t: int) -> float:
    """Return the share of images, noised to timestep t, that prefer their own caption."""
    clip, batch = load_clip(weights), all_images(config)
    tables = make_tables(make_schedule(config.noise_schedule, config.diffusion_steps))
    steps = np.full(len(batch.image), t)
    eps = jax.random.normal(jax.random.key(7), batch.image.shape)
    x_t = q_sample(tables, from_uint8(batch.image), steps, eps)
    logits: Any = NoisedCLIP(clip.config).apply(
        {"params": clip.params}, x_t, steps, batch.tokens, batch.caption_mask.sum(axis=1)
    )
    return float((logits.argmax(axis=1) == np.arange(len(logits))).mean())


@dataclass(frozen=True)
class Result:
    """The result of a toy run.

    Attributes:
        before: loss of the first weights.
        after: loss of the EMA weights.
        without: losses of the trained model, by the input that was removed.
        ranked: noised CLIP: share of captions ranked first, by timestep.
        seconds: processor time of all its commands.
    """

    before: float
    after: float
    without: dict[str, float]
    ranked: dict[int, float]
    seconds: float


def try_recipe(name: str, out: Path, steps: int = 0) -> Result:
    """Train, resume, export, sample and measure the toy of one recipe.

    Args:
        name: of the recipe.
        out: folder of all toys. It has the weights of other toys that are needed for sampling; a
            toy that this one starts from is trained there.
        steps: number of steps; 0: the toy's own.
    """
    toy = TOYS[name]
    data = out / (f"patterns-{toy.block}" if toy.block else "images")
    images, folder = write_images(data, block=toy.block), out / name
    more: tuple[object, ...] = ()
    if toy.starts_from:
        other = write_images(out / "other", which=1)
        if not (out / "other-runs" / toy.starts_from).exists():
            train(toy.starts_from, other, out / "other-runs" / toy.starts_from, steps=50)
        more = ("--init-from", out / "other-runs" / toy.starts_from)
    began = processor_seconds()
    train(name, images, folder / "run", *more, steps=steps)
    command("-m", "glide_jax", "weights", "export", folder / "run", folder / "weights")
    run_plan(name, out)
    seconds = processor_seconds() - began

    config, state = restore_run(folder / "run")
    objective, key = make_objective(config), jax.random.key(config.seed)
    inherits = bool(toy.starts_from)
    first = params_from(config, objective, key) if inherits else jax.jit(objective.init)(key)
    is_clip = isinstance(config, CLIPTrainConfig)
    return Result(
        before=loss_of(config, first),
        after=loss_of(config, state.ema),
        without={what: loss_of(config, state.ema, what) for what in toy.removed},
        ranked={t: ranked_first(folder / "weights", config, t) for t in (0, 500) if is_clip},
        seconds=seconds,
    )


def processor_seconds() -> float:
    """Return the processor time of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_plan(name: str, out: Path) -> None:
    """Sample an image with the exported weights of a toy, and those of other toys it needs."""
    weights = out / name / "weights"
    base = weights
    more: tuple[object, ...] = ()
    if name.endswith("256"):
        base = out / ("inpaint64" if name == "inpaint256" else "text64") / "weights"
        more += ("--upsampler", weights)
    if name.startswith("inpaint"):
        mask = out / "mask.png"
        nearest = Image.Resampling.NEAREST
        Image.fromarray(np.eye(2, dtype=np.uint8) * 255).resize((32, 32), nearest).save(mask)
        image = write_images(out / "images") / "red-white.png"
        more += ("--image", image, "--mask", mask)
    if name == "clip64":
        base = out / "text64" / "weights"
        more += ("--clip-model", weights, "--clip-guidance-scale", 1)
        more += ("--guidance-scale", 1, "--sampler", "ddpm")
    folder = out / name / "samples"
    command("sample.py", PROMPT, "--weights", base, "--steps", 10, "--out", folder, *more)
    result = np.asarray(Image.open(next(folder.glob("*.png"))))
    assert result.shape[0] == (32 if name.endswith("256") else 16), result.shape


def table(results: dict[str, Result]) -> str:
    """Return the results in Markdown."""
    rows = [
        "| recipe | steps | loss before | loss after | after / before "
        "| loss ratio with the conditioning removed | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        steps = load_recipe(f"{name}:toy").steps
        without = [f"{k} {v / result.after:.1f}" for k, v in result.without.items()]
        without += [f"ranks {v:.0%} first at t = {t}" for t, v in result.ranked.items()]
        rows.append(
            f"| {name} | {steps} | {result.before:.3f} | {result.after:.3f} | "
            f"{result.after / result.before:.0%} | {', '.join(without)} | {result.seconds:.0f} |"
        )
    return "\n".join(rows)


def main(out: Path, only: tuple[str, ...] = tuple(TOYS)) -> None:
    """Run recipes at size toy.

    Args:
        out: Folder for runs, weights and images.
        only: Names of recipes; the default is all.
    """
    enable_compilation_cache()
    results = {}
    for name in only:
        results[name] = try_recipe(name, out)
        print(table({name: results[name]}), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main)
