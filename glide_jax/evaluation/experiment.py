"""Sweeps: a model measured at many settings for fidelity, diversity and alignment with captions.

All points use the same captions and the same noise. Each point is written to `sweep.json` when it
is measured, so the same command resumes after an interruption. Other sweeps of the same weights can
use the same folder and appear in the same figures.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from glide_jax.data.emoji.npz import fingerprint
from glide_jax.data.records import digest
from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.captions import (
    npz_of,
    prompt_of,
    sample_in_passes,
    training_pairs,
    vocabulary,
)
from glide_jax.evaluation.extractors.extractor import checksum
from glide_jax.evaluation.features import FeatureSpace, Scorer, similarity
from glide_jax.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    r_precision,
)
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.sweep_options import Task
from glide_jax.folders import check_writable
from glide_jax.pipeline.clip_guide import CLIP
from glide_jax.pipeline.images import Images, image_grid, slug
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.prompts import read_prompts
from glide_jax.pipeline.settings import describe
from glide_jax.training.config import RunConfig
from glide_jax.weights.registry import Model

FILE = "sweep.json"


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all points of a sweep share.

    Attributes:
        pipe: the model that generates.
        scorer: the independent CLIP that scores.
        spaces: the feature spaces for distances between sets of images.
        config: the recipe, with its data.
        images: number of images of each point.
        captions: captions to choose from, for each image.
        seed: selects the captions and seeds the images.
        batch_size: images generated at a time; see `Pipeline`.
        nearest_k: the k of precision and recall; see `precision_recall`.
    """

    pipe: Pipeline
    scorer: Scorer
    spaces: tuple[FeatureSpace, ...]
    config: RunConfig
    images: int = 64
    captions: int = 100
    seed: int = 0
    batch_size: int | None = None
    nearest_k: int = 3

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """All training records in random order, the generated ones first, repeated if need be."""
        records = training_pairs(self.config)
        rng = np.random.default_rng((self.seed, 0))
        return sample_in_passes(records, max(self.images, len(records)), rng)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The record of each generated image."""
        return self.pairs[: self.images]

    @cached_property
    def reference(self) -> np.ndarray:
        """The real images of the generated pairs, each once."""
        return _images({record["index"]: record for record in self.records}.values())

    @cached_property
    def choices(self) -> list[list[str]]:
        """The captions to choose from, for each image, the right one first."""
        words, rng = vocabulary(self.config), np.random.default_rng((self.seed, 1))
        return [words.concept_choices(record, self.captions, rng) for record in self.records]

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """The features of the real images, in each space."""
        return {space.name: space(self.reference) for space in self.spaces}

    def head(self) -> dict[str, Any]:
        """Return what identifies the experiment, as JSON values.

        Raises:
            UsageError, GlideError: the data or the captions cannot be read.
        """
        if not 1 <= self.nearest_k < self.images:
            raise UsageError(
                f"nearest_k is {self.nearest_k}: it must be at least 1 and below the number of "
                f"images of a point, {self.images}"
            )
        upsampler, weak_stage = self.pipe.upsampler, self.pipe.weak_stage
        return {
            "weights": _identity(self.pipe.model),
            "upsampler": upsampler and _identity(upsampler.model),
            "weak_model": weak_stage and _identity(weak_stage.model),
            "scorer": [self.scorer.clip.name, self.scorer.checksum],
            "views": self.scorer.views,
            "features": [space.name for space in self.spaces],
            "feature_weights": [space.checksum for space in self.spaces],
            "recipe": self.config.name,
            "data": fingerprint(npz_of(self.config)),
            "images": self.images,
            "real_images": len(self.reference),
            "captions": len(self.choices[0]),
            "seed": self.seed,
            "nearest_k": self.nearest_k,
            "choices": digest([caption for row in self.choices for caption in row]),
        }

    def real(self) -> dict[str, Any]:
        """Return the same measures for real images.

        Alignment is that of the generated pairs. If the data has as many further pairs, the
        distances are those of their images to the images of the generated pairs.
        """
        records = {record["index"]: i for i, record in enumerate(self.records)}
        choices = [self.choices[i] for i in records.values()]
        scores: dict[str, Any] = self._alignment(self.scorer(self.reference), choices)
        others = self.pairs[len(self.reference) : 2 * len(self.reference)]
        if len(others) == len(self.reference) == self.images:
            scores["distances_of_others"] = self._distances(_images(others))
        return scores

    def description(self, task: Task) -> dict[str, Any]:
        """Return how a task generates, as JSON values: its settings, and the guiding CLIP, if any.

        Raises:
            UsageError: the settings cannot be used.
        """
        settings = self.pipe.settings.changed(**task.settings)
        guide = self.pipe.clip if settings.clip_guidance_scale else None
        if settings.clip_guidance_scale and guide is None:
            raise UsageError("CLIP guidance needs a noised CLIP: name one with --clip-model")
        guidances = settings.guidances(read_prompts(prompt_of(self.records[0])))
        return json_round_trip(
            {
                "settings": describe(settings),
                "evaluations": len(settings.plan(self.pipe.schedule, guidances)),
                "clip": guide and _identity(guide),
            }
        )

    def point(self, task: Task) -> tuple[dict[str, Any], Images]:
        """Generate the images of a task and measure them.

        Raises:
            UsageError: the settings cannot be used.
        """
        prompts = [prompt_of(record) for record in self.records]
        generated = self.pipe(prompts, seed=self.seed, batch_size=self.batch_size, **task.settings)
        return {
            "sweep": task.sweep,
            "value": task.value,
            **self.description(task),
            **self._alignment(self.scorer(generated.images), self.choices),
            "distances": self._distances(generated.images),
        }, generated

    def _alignment(self, features: np.ndarray, choices: list[list[str]]) -> dict[str, float]:
        table = similarity(self.scorer, features, choices)
        return {
            # E[k f(image) . g(caption)]  (GLIDE, sec. 5.2).
            "clip_score": self.scorer.scale * float(table[:, 0].mean()),
            "r_precision": r_precision(table, np.zeros(len(table), int)),
        }

    def _distances(self, images: np.ndarray) -> dict[str, dict[str, float]]:
        distances = {}
        for space in self.spaces:
            real = self.features[space.name]
            generated, classes = space.both(images)
            precision, recall = precision_recall(real, generated, self.nearest_k)
            distances[space.name] = {
                "frechet_distance": frechet_distance(real, generated),
                "kernel_distance": kernel_distance(real, generated),
                "precision": precision,
                "recall": recall,
            }
            if classes is not None:
                distances[space.name]["inception_score"] = inception_score(classes)
        return distances


def run(experiment: Experiment, todo: Sequence[Task], out: Path) -> dict[str, Any]:
    """Measure the points that `out` does not hold yet; each is written when it is measured.

    Besides `sweep.json`, each point leaves a sheet of its images in `out/images`.

    Returns:
        The contents of `sweep.json`.

    Raises:
        UsageError: the folder holds another experiment, or a setting cannot be used.
        GlideError: the folder cannot be written, or its file cannot be read.
    """
    check_writable(out / "images")
    head = experiment.head()
    sweep = read(out)
    if sweep is None:
        sweep = {"experiment": head, "real": experiment.real(), "points": []}
    elif wrong := [key for key in head if sweep["experiment"].get(key) != head[key]]:
        what = wrong[0].replace("_", " ")
        raise UsageError(f"{out} holds a sweep with other {what}: choose another --out")
    measured = {_key(point): point for point in sweep["points"]}
    # An impossible setting must fail before the first point, not after an hour.
    keys = [_key({"sweep": task.sweep} | experiment.description(task)) for task in todo]
    remaining = {key: task for task, key in zip(todo, keys, strict=True) if key not in measured}
    by_settings = {settings: point for (_, settings), point in measured.items()}
    with tqdm.tqdm(remaining.items(), unit="point", desc="sweep", disable=not remaining) as bar:
        for (_, settings), task in bar:
            bar.set_postfix_str(f"{task.sweep} {task.value}")
            if settings in by_settings:
                # Sweeps cross: the default settings are a point of each.
                point = by_settings[settings] | {"sweep": task.sweep, "value": task.value}
            else:
                point, generated = experiment.point(task)
                by_settings[settings] = point
                name = slug(f"{task.sweep} {task.value} {point['settings']['sampler']}")
                name += f"-{point['settings']['steps']}-{digest([settings])[:6]}.png"
                write_png(out / "images" / name, Image.fromarray(image_grid(generated.images)))
            sweep["points"].append(point)
            write_json(out / FILE, sweep)
    write_json(out / FILE, sweep)
    return sweep


def read(out: Path) -> dict[str, Any] | None:
    """Return the contents of a folder's `sweep.json`; None if there is no such file.

    Raises:
        GlideError: the file cannot be read.
    """
    path = out / FILE
    if not path.exists():
        return None
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sweep["points"], list) or not isinstance(sweep["experiment"], dict):
            raise ValueError("it does not hold a sweep")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GlideError(f"cannot read {path}: {error}") from None
    return sweep


def json_round_trip(value: Any) -> Any:
    """Return a value as JSON would read it back."""
    return json.loads(json.dumps(value))


def _key(point: dict[str, Any]) -> tuple[str, str]:
    """Return what identifies a point: its sweep, and its settings and guiding CLIP as JSON."""
    return point["sweep"], json.dumps([point["settings"], point["clip"]], sort_keys=True)


def _identity(weights: Model | CLIP) -> list[str]:
    return [weights.name, checksum(weights.params)]


def _images(records: Iterable[dict[str, Any]]) -> np.ndarray:
    return np.stack([record["image"] for record in records])
