"""How good the pictures are: one command for each question.

nearest   the nearest training picture of drawn ones
ranking   does an independent CLIP find the right caption among a hundred?
sweep     fidelity, diversity and alignment over guidance scales, samplers, steps, ...
loss      the noise-prediction loss on splits of the data
scenes    what pictures of procedural scenes have right, exactly

python -m glide_jax.evaluation ranking --data emoji64.npz
python -m glide_jax.evaluation --weights emoji64 --sweep guidance-scale
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from glide_jax.pipeline.runner import check_32_bits
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.evaluation import drawn_scenes, figures, nearest, ranking, sweep
from glide_jax.evaluation.captions import held_out
from glide_jax.evaluation.features import SCORER, open_scorer, open_space
from glide_jax.evaluation.reports import write_json
from glide_jax.evaluation.sweep_options import tasks
from glide_jax.pipeline.options import Sampling
from glide_jax.pipeline.images import writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.loading import load
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.training.config import TrainConfig
from glide_jax.training.recipes import load_recipe
from glide_jax.weights.registry import NONE, load_model


@dataclass(frozen=True)
class Weights:
    """What draws, and where."""

    weights: str = "emoji64"
    """A name, a folder of weights, or a run of train.py."""
    upsampler: str | None = None
    """Weights of an upsampler: measure its pictures."""
    clip: str | None = None
    """Weights of the noised CLIP that guides; embedded weights have one."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto chooses by device."""
    devices: str = "1"
    """Over how many devices to spread each batch, or all; it changes no picture."""
    batch_size: int | None = None
    """How many to draw at a time; it changes no picture."""

    def pipeline(self) -> Pipeline:
        """Loads them."""
        # An upsampler is for those who ask for it, not the companion of the weights.
        return load(
            self.weights,
            upsampler=self.upsampler or NONE,
            clip=self.clip,
            dtype=self.dtype,
            devices=self.devices,
        )


@dataclass(frozen=True)
class Data:
    """What is asked for."""

    recipe: Path = Path("configs/emoji64.py")
    """The recipe that the weights were trained with: which data they saw."""
    data: str = "emoji64.npz"
    """The data set, an .npz file."""
    seed: int = 0
    """Of the choice of captions, and of the pictures."""

    def config(self) -> TrainConfig:
        """The recipe, with its data."""
        check_32_bits("seed", self.seed)
        config = load_recipe(self.recipe)
        if not isinstance(config, TrainConfig):
            raise UsageError(f"{self.recipe} is no recipe of a model that draws")
        return replace(config, data=replace(config.data, source=self.data))


@dataclass(frozen=True)
class Nearest:
    """Draws training captions and held-out pairs, and finds the nearest training pictures."""

    out: Path = Path("evaluation")
    """Folder for the sheets and nearest.json."""
    model: OmitArgPrefixes[Weights] = Weights()
    asked: OmitArgPrefixes[Data] = Data()

    def run(self) -> None:
        """Draws, and says what was found."""
        config = self.asked.config()
        found = nearest.report(
            self.model.pipeline(),
            config,
            self.out,
            seed=self.asked.seed,
            batch_size=self.model.batch_size,
        )
        for name in ("training_captions", "held_out_pairs"):
            right, of = found[name]["right"], found[name]["of"]
            print(f"{name}: the nearest training picture is right for {right} of {of}")
        print(f"sheets in {self.out}")


@dataclass(frozen=True)
class Ranking:
    """Draws training concepts and held-out cells; an independent CLIP ranks their captions."""

    out: Path = Path("evaluation")
    """Folder for ranking.json and both sheets."""
    scorer: str = "emoji_scorer64"
    """The independent CLIP: a name, a folder of weights, or a run of train.py."""
    views: Literal[10, 1] = 10
    """Of each picture that it is shown, to average: 10 (corners, middle, and mirrored) or 1."""
    pictures: int = 50
    """Of each kind."""
    captions: int = 100
    """To choose from, of each picture."""
    model: OmitArgPrefixes[Weights] = Weights()
    asked: OmitArgPrefixes[Data] = Data()
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)

    def run(self) -> None:
        """Draws, and says what was found."""
        config, pipe = self.asked.config(), self.model.pipeline()
        found = ranking.report(
            pipe,
            open_scorer(self.scorer, guide=pipe.clip, views=self.views),
            config,
            self.out,
            seed=self.asked.seed,
            pictures=self.pictures,
            captions=self.captions,
            batch_size=self.model.batch_size,
            settings=_said(self.sampling),
        )
        for part in ranking.PARTS:
            f = found[part]
            share = "no share" if f["ratio"] is None else f"{f['ratio']:.2f} of it"
            print(
                f"{part}: {f['right']} of {f['of']} drawn, {f['right_of_real']} real pictures: "
                f"{share}"
            )
        print(f"sheets and ranking.json in {self.out}")


@dataclass(frozen=True)
class Sweeping:
    """Draws the same captions at many settings, and the paper's trade-off figures.

    The same command goes on after a break; other sweeps of the same weights may use the same folder
    and come into the same figures.
    """

    sweep: tuple[str, ...]
    """What to vary: guidance-scale, clip-scale, steps, sampler, spacing, guidance-interval."""
    values: tuple[str, ...] = ()
    """In the place of the usual ones, of one sweep (guidance-interval: low:high, or all)."""
    out: Path = Path("evaluation")
    """Folder for sweep.json, the figures and a sheet of the pictures of each point."""
    scorer: str = "emoji_scorer64"
    """The independent CLIP: a name, a folder of weights, or a run of train.py."""
    views: Literal[10, 1] = 10
    """Of each picture that it is shown, to average: 10 (corners, middle, and mirrored) or 1."""
    features: tuple[str, ...] = (SCORER,)
    """Feature spaces: scorer, or an extractor's weights from local files."""
    pictures: int = 64
    """Of each point."""
    captions: int = 100
    """To choose from, of each picture."""
    neighbour: int = 3
    """Which one precision and recall look at: of few pictures the third is soon any other."""
    model: OmitArgPrefixes[Weights] = Weights()
    asked: OmitArgPrefixes[Data] = Data()
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)

    def run(self) -> None:
        """Draws what is left of it, and the figures."""
        todo = tasks(self.sweep, self.values, _said(self.sampling))
        figures.figure_class()  # missed before the first point rather than after the last
        config, pipe = self.asked.config(), self.model.pipeline()
        scorer = open_scorer(self.scorer, guide=pipe.clip, views=self.views)
        experiment = sweep.Experiment(
            pipe,
            scorer,
            tuple(open_space(name, scorer) for name in self.features),
            config,
            pictures=self.pictures,
            captions=self.captions,
            seed=self.asked.seed,
            batch_size=self.model.batch_size,
            neighbour=self.neighbour,
        )
        found = sweep.run(experiment, todo, self.out)
        for path in figures.draw(found, self.out):
            print(path)
        print(self.out / sweep.FILE)


@dataclass(frozen=True)
class Loss:
    """Measures the noise-prediction loss on splits, with and without captions."""

    splits: Positional[tuple[str, ...]] = ("train", "test_style")
    """Of the data."""
    out: Path | None = None
    """Folder for loss.json."""
    pictures: int = 256
    """At least so many from each split, in shuffled passes: whole batches."""
    weights: str = "emoji64"
    """A name, a folder of weights, or a run of train.py; of any variant."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto chooses by device."""
    batch_size: int = 16
    """How many to work out at a time."""
    asked: OmitArgPrefixes[Data] = Data()

    def run(self) -> None:
        """Measures, and says what was found."""
        if min(self.pictures, self.batch_size) < 1:
            raise UsageError("pictures and batch_size must be at least 1")
        config, model = self.asked.config(), load_model(self.weights)
        found = held_out.report(
            model,
            config,
            self.splits,
            pictures=self.pictures,
            batch_size=self.batch_size,
            dtype=self.dtype,
        )
        for split, measured in found.items():
            print(f"{split}: {measured['pictures']} pictures")
            for kind in ("captions", "no captions"):
                loss, quartiles = measured[kind]["loss"], measured[kind]["quartiles"]
                parts = " ".join("-" if q is None else f"{q:.4f}" for q in quartiles)
                print(f"  {kind}: {loss:.4f}; by quarter of the chain: {parts}")
        if self.out is not None:
            writable(self.out)
            write_json(self.out / "loss.json", {"weights": model.name, "splits": found})


@dataclass(frozen=True)
class Scenes:
    """Draws captions of procedural scenes, and scores exactly what the pictures have right."""

    weights: str
    """Of a model that was trained on them: a folder, or a run of train.py."""
    out: Path = Path("evaluation")
    """Folder for scenes.json and a sheet."""
    split: str = "test"
    """train, or test: combinations that training never shows."""
    pictures: int = 60
    """How many to draw: scenes 0, 1, ... of the split."""
    seed: int = 0
    """Of the pictures."""
    batch_size: int | None = None
    """How many to draw at a time."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)

    def run(self) -> None:
        """Draws, and says what was found."""
        found = drawn_scenes.report(
            Weights(self.weights).pipeline(),
            self.out,
            split=self.split,
            pictures=self.pictures,
            seed=self.seed,
            batch_size=self.batch_size,
            settings=_said(self.sampling),
        )
        for name, share in found["right"].items():
            print(f"{name}: {share:.3f}")
        print(f"scenes.json and scenes.png in {self.out}")


COMMANDS = {
    "nearest": Nearest,
    "ranking": Ranking,
    "sweep": Sweeping,
    "loss": Loss,
    "scenes": Scenes,
}


def _said(sampling: Any) -> dict[str, Any]:
    """The settings that are not left to the weights."""
    return {name: value for name, value in vars(sampling).items() if value is not None}


def read(arguments: Sequence[str]) -> Any:
    """The command that a command line asks for; --sweep alone says which."""
    arguments = list(arguments)
    asks = any(a == "--sweep" or a.startswith("--sweep=") for a in arguments)
    if asks and arguments[0] not in COMMANDS:
        arguments = ["sweep", *arguments]
    kinds = tuple(Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items())
    union = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return tyro.cli(
        union,
        prog="python -m glide_jax.evaluation",
        description=__doc__.splitlines()[0],
        args=arguments,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
    )


def main() -> None:
    """The command line."""
    command = read(sys.argv[1:])
    with one_line_errors("stopped; the same command goes on with a sweep"):
        enable_compilation_cache()
        command.run()


if __name__ == "__main__":
    main()
