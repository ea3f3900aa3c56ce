"""`glide-jax evaluate`: scores a model or a folder of images, one command per question.

glide-jax evaluate ranking --data emoji64.npz
glide-jax evaluate sweep --data emoji64.npz --vary guidance-scale
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from glide_jax.commands.guidance_curve import Curve
from glide_jax.commands.score_folders import Fid
from glide_jax.devices.runtime import prepare_process
from glide_jax.errors import UsageError, one_line_errors
from glide_jax.evaluation import (
    experiment,
    figures,
    nearest,
    noise_loss,
    ranking,
    scene_report,
    sweep_options,
)
from glide_jax.evaluation.features import SCORER, open_scorer, open_space
from glide_jax.evaluation.reports import write_json
from glide_jax.folders import check_writable, expand_words
from glide_jax.pipeline.loading import load
from glide_jax.pipeline.options import (
    NO_DEFAULT_SHOWN,
    UNEXPANDED_OPTIONS,
    NetworkOptions,
    SamplingOptions,
    SharedModelOptions,
    check_scales,
    show_defaults_of,
)
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.runner import check_32_bits
from glide_jax.training.config import TrainConfig
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import open_model
from glide_jax.weights.registry import NONE


@dataclass(frozen=True)
class MeasuredOptions(SharedModelOptions):
    """The model, and the devices it runs on."""

    # Weights and upsampler are measured together only on request.
    upsampler: str | None = NONE

    def pipeline(self) -> Pipeline:
        """Load the pipeline."""
        return load(**self.load_arguments())


@dataclass(frozen=True)
class DataOptions:
    """The captions and the real images.

    Attributes:
        recipe: The recipe that the weights were trained with, by name or path: it lists the
            concepts, styles and concept-style pairs that they were trained on.
        data: The data set, an .npz file (see glide-jax data).
        seed: Seed from 0 to 2^32 - 1; it selects the captions and seeds the images.
    """

    recipe: str = "emoji64"
    data: str = "emoji64.npz"
    seed: int = 0

    def config(self) -> TrainConfig:
        """Return the recipe with this data.

        Raises:
            UsageError: there is no such recipe, it trains a CLIP, or the seed is out of its range.
        """
        check_32_bits("seed", self.seed)
        config = load_recipe(self.recipe)
        if not isinstance(config, TrainConfig):
            raise UsageError(f"{self.recipe} trains a CLIP: name the recipe of a diffusion model")
        return replace(config, data=replace(config.data, source=self.data))


@dataclass(frozen=True)
class ScorerOptions:
    """The independent CLIP that scores images.

    Attributes:
        scorer: A noised CLIP other than the one that guides: a name, a folder of weights, or a run
            of train.py.
        views: Views of each image whose embeddings are averaged. 10: corners and centre, each 7/8
            of the side, and their mirror images. 1: the image alone, for captions that name left
            or right.
    """

    scorer: str = "emoji_scorer64"
    views: Literal[10, 1] = 10


@dataclass(frozen=True)
class Nearest:
    """Find the training image nearest to each generated image: a test of memorisation.

    It generates images for ten training captions and five held-out concept-style pairs.

    Attributes:
        out: Folder for nearest.json and two sheets.
    """

    out: Path = Path("evaluation")
    model: OmitArgPrefixes[MeasuredOptions] = MeasuredOptions()
    dataset: OmitArgPrefixes[DataOptions] = DataOptions()

    def run(self) -> None:
        """Generate, compare, and print the counts."""
        config = self.dataset.config()
        report = nearest.report(
            self.model.pipeline(),
            config,
            self.out,
            seed=self.dataset.seed,
            batch_size=self.model.batch_size,
        )
        for name in ("training_captions", "held_out_pairs"):
            right, total = report[name]["right"], report[name]["of"]
            print(f"{name}: {right} of {total} nearest training images have the right concept")
        print(f"nearest.json and sheets in {self.out}")


@dataclass(frozen=True)
class Ranking:
    """Test whether an independent CLIP ranks an image's caption first among a hundred.

    It generates images of training concepts and held-out concept-style pairs. The real images of
    these pairs are ranked too.

    Attributes:
        out: Folder for ranking.json and two sheets with all images.
        images: Images of each kind, from 1 to the number of concepts and of held-out pairs; more
            images give more precise rates.
        choices: Captions to choose from for each image, the correct one included; at least the
            number of styles plus 20. More make the test harder.
    """

    out: Path = Path("evaluation")
    images: int = 50
    choices: int = 100
    scoring: OmitArgPrefixes[ScorerOptions] = ScorerOptions()
    model: OmitArgPrefixes[MeasuredOptions] = MeasuredOptions()
    dataset: OmitArgPrefixes[DataOptions] = DataOptions()
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        """Generate, rank, and print the counts."""
        check_scales(self.model, self.sampling.given_settings())
        config, pipe = self.dataset.config(), self.model.pipeline()
        report = ranking.report(
            pipe,
            open_scorer(self.scoring.scorer, guide=pipe.clip, views=self.scoring.views),
            config,
            self.out,
            seed=self.dataset.seed,
            images=self.images,
            captions=self.choices,
            batch_size=self.model.batch_size,
            settings=self.sampling.given_settings(),
        )
        for kind in ranking.KINDS:
            counts = report[kind]
            ratio = "no ratio" if counts["ratio"] is None else f"ratio {counts['ratio']:.2f}"
            print(
                f"{kind}: right caption first for {counts['right']} of {counts['of']} generated "
                f"images, {counts['right_of_real']} of {counts['of']} real images: {ratio}"
            )
        print(f"ranking.json and sheets in {self.out}")


@dataclass(frozen=True)
class Sweep:
    """Measure fidelity, diversity and alignment while one setting varies; with figures.

    All points use the same captions and noise. Repeat the command to continue where it stopped.
    Sweeps of the same weights, captions and scorer can share a folder and its figures.

    Attributes:
        vary: What to vary, one or several of guidance-scale, clip-guidance-scale, steps, sampler,
            spacing, guidance-interval. A sweep of guidance-scale has no CLIP guidance unless you
            set --clip-guidance-scale. A sweep of clip-guidance-scale has guidance scale 1 and
            the sampler ddpm, unless you set others.
        values: Values of a single sweep, in place of its defaults: guidance-scale 1 1.5 2 3 4 6 8,
            clip-guidance-scale 0 1 2 4 8 16, steps 5 8 10 15 20 25 35 50, every sampler and
            spacing, guidance-interval all 0:5 0.3: 0.3:5 0.3:10 1:10 (low:high, or all).
        out: Folder for sweep.json, the figures, and a sheet of the images per point.
        features: Feature spaces for distances between sets of images: scorer, or weight files
            of other networks (Inception v3 of FID, CLIP, DINOv2).
        images: Images per point, more than --nearest-k; more images make the measures more precise.
            Only points with equal numbers are comparable.
        choices: Captions to choose from for each image, the correct one included; at least 2. More
            make R-precision harder.
        nearest_k: k of the k-nearest-neighbour precision and recall (1904.06991), at least 1 and
            below the number of images. A larger k raises both; with few images use 1.
    """

    vary: tuple[str, ...]
    values: Annotated[tuple[str, ...], NO_DEFAULT_SHOWN] = ()
    out: Path = Path("evaluation")
    features: tuple[str, ...] = (SCORER,)
    images: int = 64
    choices: int = 100
    nearest_k: int = 3
    scoring: OmitArgPrefixes[ScorerOptions] = ScorerOptions()
    model: OmitArgPrefixes[MeasuredOptions] = MeasuredOptions()
    dataset: OmitArgPrefixes[DataOptions] = DataOptions()
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        """Measure the missing points, and write the figures."""
        todo = sweep_options.tasks(self.vary, self.values, self.sampling.given_settings())
        swept = {task.sweep.replace("-", "_"): task.value for task in todo}
        check_scales(self.model, self.sampling.given_settings() | swept)
        # A missing matplotlib must fail before the first point, not after the last.
        figures.figure_class()
        config, pipe = self.dataset.config(), self.model.pipeline()
        scorer = open_scorer(self.scoring.scorer, guide=pipe.clip, views=self.scoring.views)
        shared = experiment.Experiment(
            pipe,
            scorer,
            tuple(open_space(name, scorer) for name in self.features),
            config,
            images=self.images,
            captions=self.choices,
            seed=self.dataset.seed,
            batch_size=self.model.batch_size,
            nearest_k=self.nearest_k,
        )
        results = experiment.run(shared, todo, self.out)
        for path in figures.write_figures(results, self.out):
            print(path)
        print(self.out / experiment.FILE)


@dataclass(frozen=True)
class Loss:
    """Measure the noise-prediction loss on splits of the data, with and without captions.

    Images, timesteps and noise are the same each time. The command works for models of every
    variant.

    Attributes:
        splits: Splits of the data.
        out: Folder for loss.json. Default: the losses are only printed.
        images: Images per split, at least 1, in whole batches; more give a more precise loss.
        batch_size: Images at a time, at least 1; more needs more memory.
    """

    splits: Positional[tuple[str, ...]] = ("train", "test_style")
    out: Annotated[Path | None, NO_DEFAULT_SHOWN] = None
    images: int = 256
    batch_size: int = 16
    network: OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    dataset: OmitArgPrefixes[DataOptions] = DataOptions()

    def run(self) -> None:
        """Measure, and print the losses."""
        images, size = self.images, self.batch_size
        if min(images, size) < 1:
            raise UsageError("--images and --batch-size must be at least 1")
        config, model = self.dataset.config(), open_model(self.network.weights)
        losses = noise_loss.report(
            model, config, self.splits, images=images, batch_size=size, dtype=self.network.dtype
        )
        for split, measured in losses.items():
            print(f"{split}: {measured['images']} images")
            for kind in ("captions", "no captions"):
                loss, quartiles = measured[kind]["loss"], measured[kind]["quartiles"]
                values = " ".join("-" if q is None else f"{q:.4f}" for q in quartiles)
                print(f"  {kind}: {loss:.4f}; by quarter of the timesteps: {values}")
        if self.out is not None:
            check_writable(self.out)
            write_json(self.out / "loss.json", {"weights": model.name, "splits": losses})


@dataclass(frozen=True)
class Scenes:
    """Count the details of procedural scenes that a model's images show correctly.

    Attributes:
        weights: Weights trained on procedural scenes: a folder, or a run of train.py.
        out: Folder for scenes.json and a sheet.
        split: train, or test (combinations that are not in the training split).
        images: Images to generate, at least 1, of scenes 0, 1, ... of the split; more images give
            more precise rates.
        seed: Seed of the images, from 0 to 2^32 - 1.
        batch_size: Images generated at a time; more needs more memory. It changes an image by
            rounding errors only.
    """

    weights: str
    out: Path = Path("evaluation")
    split: str = "test"
    images: int = 60
    seed: int = 0
    batch_size: Annotated[int | None, NO_DEFAULT_SHOWN] = None
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)

    def run(self) -> None:
        """Generate, score, and print the rates."""
        report = scene_report.report(
            MeasuredOptions(self.weights).pipeline(),
            self.out,
            split=self.split,
            images=self.images,
            seed=self.seed,
            batch_size=self.batch_size,
            settings=self.sampling.given_settings(),
        )
        for name, rate in report["right"].items():
            print(f"{name}: {rate:.3f}")
        print(f"scenes.json and scenes.png in {self.out}")


Command = Nearest | Ranking | Sweep | Loss | Scenes | Fid | Curve

COMMANDS: dict[str, type[Command]] = {
    "nearest": Nearest,
    "ranking": Ranking,
    "sweep": Sweep,
    "loss": Loss,
    "scenes": Scenes,
    "fid": Fid,
    "curve": Curve,
}


def read(arguments: Sequence[str]) -> Command:
    """Return the command of a command line."""
    words = expand_words(arguments, UNEXPANDED_OPTIONS)
    if weights := _weights(words):
        show_defaults_of(weights, words)
    kinds: list[Any] = [Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items()]
    return tyro.cli(
        reduce(or_, kinds),
        prog="glide-jax evaluate",
        description="Score a model, or any folder of images.",
        args=words,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
    )


def _weights(words: Sequence[str]) -> str:
    """Return the weights of a command line, whose defaults its help shows; "" if unknown."""
    for word, following in pairwise((*words, "")):
        if word == "--weights":
            return following
        if word.startswith("--weights="):
            return word.removeprefix("--weights=")
    return "" if words[:1] in (["scenes"], ["fid"]) else SharedModelOptions.weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `glide-jax evaluate`, with the arguments of this process by default."""
    with one_line_errors("stopped; the same command continues a sweep or a curve"):
        command = read(sys.argv[1:] if arguments is None else arguments)
        getattr(command, "own_process", None)  # before jax starts: it may choose the GPUs
        prepare_process()
        command.run()
