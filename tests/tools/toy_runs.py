"""Every recipe at its toy size, from the command line: python -m tests.tools.toy_runs --out FOLDER

Each one learns sixteen captioned pictures, is stopped half-way and resumed, exported, and sampled
from. The loss is measured at noise that is drawn once: before and after, and without what the
model ought to look at. Prints the table of docs/training.md.
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
from glide_jax.training.objectives import to_batch
from glide_jax.data.sources import open_source
from glide_jax.diffusion.losses import make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.clip_guide import load_clip
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.training.config import CLIPTrainConfig, RunConfig
from glide_jax.training.export import restore_run
from glide_jax.training.initial import params_from
from glide_jax.training.objectives import (
    Batch,
    contrastive_loss,
    denoising_loss,
    make_objective,
    make_tokenizer,
    to_range,
)
from glide_jax.training.recipes import load_recipe
from tests.support.commands import ROOT, environment

# Two sets of sixteen, what on what: a model to begin from has not seen what is trained afterwards.
PICTURES = (
    ("circle", ("red", "green", "blue", "black"), ("white", "yellow", "pink", "grey")),
    ("square", ("yellow", "white", "pink", "grey"), ("black", "blue", "red", "green")),
)
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 70, 210), "black": (20, 20, 20),
    "white": (240, 240, 240), "yellow": (230, 200, 40), "pink": (245, 150, 190),
    "grey": (128, 128, 128),
}  # fmt: skip
PROMPT = "a red circle on white"
# Noise of so many passes over the pictures.
PASSES = 8


@dataclass(frozen=True)
class Toy:
    """How a recipe is tried.

    Attributes:
        without: inputs that are taken away from the trained model.
        begins: the toy that it begins from, trained on the other pictures.
        block: its pictures are random patterns of blocks of so many pixels, of which captions tell
            the colours alone: what the small picture or the known pixels tell is needed. 0: things.
    """

    without: tuple[str, ...] = ("captions",)
    begins: str = ""
    block: int = 0


TOYS = {
    "text64": Toy(),
    "cfg64": Toy(),
    "improved64": Toy(),
    "upsample256": Toy(("low_res",), block=4),
    "improved256": Toy(("low_res",), block=4),
    "inpaint64": Toy(("inpaint_mask",), "text64", block=2),
    "inpaint256": Toy(("low_res", "inpaint_mask"), "upsample256", block=2),
    "finetune64": Toy(begins="text64"),
    "clip64": Toy(),
}


def draw_pictures(folder: Path, which: int = 0, size: int = 32, block: int = 0) -> Path:
    """Sixteen pictures with captions: things, or patterns of blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, colours, grounds = PICTURES[which]
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
    """Runs a command of the project; its output."""
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


def train(name: str, pictures: Path, out: Path, *more: object, steps: int = 0) -> None:
    """Trains a recipe's toy, stopping and resuming it half-way; 0: its own number of steps."""
    steps = steps or load_recipe(f"configs/{name}.py:toy").steps
    arguments = ("train.py", "--config", f"configs/{name}.py:toy", "--data.source", pictures)
    arguments += ("--out", out, *more)
    command(*arguments, "--steps", steps // 2)
    resumed = command(*arguments, "--steps", steps)
    assert f"step {steps // 2} of {steps}" in resumed, resumed


def all_pictures(config: RunConfig) -> Batch:
    """All sixteen, as training sees them."""
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
    """A network from which an input is hidden."""

    def __init__(self, model: Any, hidden: str):
        self._model, self._hidden = model, hidden

    def apply(self, variables: Any, *inputs: Any, **given: Any) -> Any:
        """The network's, with zeros for what is hidden."""
        if self._hidden in given:
            given[self._hidden] = jnp.zeros_like(given[self._hidden])
        return self._model.apply(variables, *inputs, **given)


@cache
def mean_loss(config: RunConfig, hidden: str = "") -> Callable[[Any, Batch], jax.Array]:
    """`(params, batch) -> loss`, compiled: every caption kept, the noise always the same."""
    model = Without(make_objective(config).model, hidden)
    tables = make_tables(make_schedule(config.schedule, config.diffusion_steps))

    def one(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        if isinstance(config, CLIPTrainConfig):
            return contrastive_loss(params, batch, key, model=model, tables=tables)[0]
        kept = replace(config, caption_dropout=0.0)
        return denoising_loss(params, batch, key, model=model, tables=tables, config=kept)[0]

    keys = jax.random.split(jax.random.key(7), PASSES)
    return jax.jit(lambda *given: jax.lax.map(partial(one, *given), keys).mean())


def loss_of(config: RunConfig, params: Any, without: str = "") -> float:
    """The loss of the sixteen pictures; "captions": with each other's."""
    batch, hidden = all_pictures(config), without
    if without == "captions":
        tokens, mask = (np.roll(x, 5, axis=0) for x in (batch.tokens, batch.mask))
        batch, hidden = batch._replace(tokens=tokens, mask=mask), ""
    return float(mean_loss(config, hidden)(params, batch))


def ranked_first(weights: Path, config: RunConfig, t: int) -> float:
    """The share of the pictures, noised to step t, that prefer their own caption."""
    clip, batch = load_clip(weights), all_pictures(config)
    tables = make_tables(make_schedule(config.schedule, config.diffusion_steps))
    steps = np.full(len(batch.image), t)
    eps = jax.random.normal(jax.random.key(7), batch.image.shape)
    x_t = q_sample(tables, to_range(batch.image), steps, eps)
    logits = NoisedCLIP(clip.config).apply(
        {"params": clip.params}, x_t, steps, batch.tokens, batch.mask.sum(axis=1)
    )
    return float((logits.argmax(axis=1) == np.arange(len(logits))).mean())


@dataclass(frozen=True)
class Result:
    """What a toy run came to.

    Attributes:
        before, after: losses.
        without: losses of the trained model, by what it was not given.
        ranked: noised CLIP: shares of captions ranked first, by timestep.
        seconds: of processor time, of all its commands.
    """

    before: float
    after: float
    without: dict[str, float]
    ranked: dict[int, float]
    seconds: float


def try_recipe(name: str, out: Path, steps: int = 0) -> Result:
    """Trains, resumes, exports, samples and measures the toy of one recipe.

    Args:
        out: folder; the toys whose weights it is sampled with, or begins from, are there or made.
        steps: 0: its own.
    """
    toy = TOYS[name]
    place = out / (f"patterns-{toy.block}" if toy.block else "pictures")
    pictures, folder = draw_pictures(place, block=toy.block), out / name
    more: tuple[object, ...] = ()
    if toy.begins:
        other = draw_pictures(out / "other", which=1)
        if not (out / "other-runs" / toy.begins).exists():
            train(toy.begins, other, out / "other-runs" / toy.begins, steps=50)
        more = ("--init-from", out / "other-runs" / toy.begins)
    began = processor_seconds()
    train(name, pictures, folder / "run", *more, steps=steps)
    command("-m", "glide_jax.weights", "export", folder / "run", folder / "weights")
    sample(name, out)
    seconds = processor_seconds() - began

    config, state = restore_run(folder / "run")
    objective, key = make_objective(config), jax.random.key(config.seed)
    fresh = params_from(config, objective, key) if toy.begins else jax.jit(objective.init)(key)
    is_clip = isinstance(config, CLIPTrainConfig)
    return Result(
        before=loss_of(config, fresh),
        after=loss_of(config, state.ema),
        without={what: loss_of(config, state.ema, what) for what in toy.without},
        ranked={t: ranked_first(folder / "weights", config, t) for t in (0, 500) if is_clip},
        seconds=seconds,
    )


def processor_seconds() -> float:
    """Of all commands so far, which share the machine with others."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sample(name: str, out: Path) -> None:
    """Draws a picture with the exported weights of a toy, and those of others that it needs."""
    weights = out / name / "weights"
    base, more = weights, ()
    if name.endswith("256"):
        base = out / ("inpaint64" if name == "inpaint256" else "text64") / "weights"
        more += ("--upsampler", weights)
    if name.startswith("inpaint"):
        hole = out / "hole.png"
        Image.fromarray(np.eye(2, dtype=np.uint8) * 255).resize((32, 32), 0).save(hole)
        image = draw_pictures(out / "pictures") / "red-white.png"
        more += ("--init-image", image, "--mask", hole)
    if name == "clip64":
        base = out / "text64" / "weights"
        more += ("--clip", weights, "--clip-scale", 1, "--guidance-scale", 1, "--sampler", "ddpm")
    folder = out / name / "samples"
    command("sample.py", PROMPT, "--weights", base, "--steps", 10, "--out", folder, *more)
    picture = np.asarray(Image.open(next(folder.glob("*.png"))))
    assert picture.shape[0] == (32 if name.endswith("256") else 16), picture.shape


def table(results: dict[str, Result]) -> str:
    """The results in Markdown."""
    rows = [
        "| recipe | steps | loss before | after | of it | without: times as much | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        steps = load_recipe(f"configs/{name}.py:toy").steps
        without = [f"{k} {v / result.after:.1f}" for k, v in result.without.items()]
        without += [f"ranks {v:.0%} first at t = {t}" for t, v in result.ranked.items()]
        rows.append(
            f"| {name} | {steps} | {result.before:.3f} | {result.after:.3f} | "
            f"{result.after / result.before:.0%} | {', '.join(without)} | {result.seconds:.0f} |"
        )
    return "\n".join(rows)


def main(out: Path, only: tuple[str, ...] = tuple(TOYS)) -> None:
    """Tries recipes at toy size.

    Args:
        out: folder for runs, weights and pictures.
        only: which recipes.
    """
    enable_compilation_cache()
    results = {}
    for name in only:
        results[name] = try_recipe(name, out)
        print(table({name: results[name]}), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main)
