"""Measures a model at many settings: fidelity, diversity, and alignment with the captions.

Every point draws the same captions from the same noise. Points are kept in `sweep.json` as they are
measured, so that the same command goes on after a break; other sweeps of the same weights can be
added to the same folder, and come into the same figures.
"""

import json
from collections.abc import Sequence
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
    in_passes,
    npz_of,
    prompt_of,
    training_cells,
    vocabulary,
)
from glide_jax.evaluation.features import Extractor, Scorer, checksum, similarity
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    r_precision,
)
from glide_jax.evaluation.sweep_options import Task
from glide_jax.pipeline.clip_guide import CLIP
from glide_jax.pipeline.images import Images, image_grid, slug, writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.prompts import read_prompts
from glide_jax.pipeline.settings import describe
from glide_jax.training.config import RunConfig
from glide_jax.weights.registry import Model

FILE = "sweep.json"


@dataclass(frozen=True)
class Experiment:
    """What all points share.

    Attributes:
        pipe, scorer: what draws, and the independent CLIP that judges.
        spaces: in which distances between sets of pictures are measured.
        config: the recipe, with its data.
        pictures: of each point.
        captions: among which the right one is ranked.
        seed: of the choice of captions, and of the pictures.
        neighbour: which one precision and recall look at.
    """

    pipe: Pipeline
    scorer: Scorer
    spaces: tuple[Extractor, ...]
    config: RunConfig
    pictures: int = 64
    captions: int = 100
    seed: int = 0
    batch_size: int | None = None
    neighbour: int = 3

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """All training cells in random order: the first are drawn, in passes if need be."""
        records = training_cells(self.config)
        rng = np.random.default_rng((self.seed, 0))
        return in_passes(records, max(self.pictures, len(records)), rng)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What is drawn."""
        return self.cells[: self.pictures]

    @cached_property
    def reference(self) -> np.ndarray:
        """The real pictures of the cells that are drawn, each once."""
        return _images({record["index"]: record for record in self.records}.values())

    @cached_property
    def choices(self) -> list[list[str]]:
        """The captions of each picture, the right one first."""
        words, rng = vocabulary(self.config), np.random.default_rng((self.seed, 1))
        return [words.concept_choices(record, self.captions, rng) for record in self.records]

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Of the real pictures, in each space."""
        return {space.name: space(self.reference) for space in self.spaces}

    def head(self) -> dict[str, Any]:
        """What identifies the experiment, as JSON has it.

        Raises:
            UsageError, GlideError: data or captions cannot be had.
        """
        if not 1 <= self.neighbour < self.pictures:
            raise UsageError(
                f"precision and recall look at the neighbour {self.neighbour}: a point needs more "
                f"pictures than that, not {self.pictures}, and it lies at 1 or above"
            )
        larger = self.pipe.upsampler
        return {
            "weights": _identity(self.pipe.model),
            "upsampler": larger and _identity(larger.model),
            "scorer": [self.scorer.clip.name, self.scorer.checksum],
            "views": self.scorer.views,
            "features": [space.name for space in self.spaces],
            "feature_weights": [space.checksum for space in self.spaces],
            "recipe": self.config.name,
            "data": fingerprint(npz_of(self.config)),
            "pictures": self.pictures,
            "real_pictures": len(self.reference),
            "captions": len(self.choices[0]),
            "seed": self.seed,
            "neighbour": self.neighbour,
            "choices": digest([caption for row in self.choices for caption in row]),
        }

    def real(self) -> dict[str, Any]:
        """The same figures of real pictures: alignment of those that are asked for; and distances
        to them of as many others, where there are as many."""
        records = {record["index"]: i for i, record in enumerate(self.records)}
        choices = [self.choices[i] for i in records.values()]
        found = self._alignment(self.scorer(self.reference), choices)
        others = self.cells[len(self.reference) : 2 * len(self.reference)]
        if len(others) == len(self.reference) == self.pictures:
            found["distances_of_others"] = self._distances(_images(others))
        return found

    def said(self, task: Task) -> dict[str, Any]:
        """How a task draws, as JSON has it: its settings, and the CLIP that guides, if one does.

        Raises:
            UsageError: it cannot be carried out.
        """
        settings = self.pipe.settings.changed(**task.settings)
        guide = self.pipe.clip if settings.clip_scale else None
        if settings.clip_scale and guide is None:
            raise UsageError("CLIP guidance needs a noised CLIP: name one with --clip")
        guidances = settings.guidances(read_prompts(prompt_of(self.records[0])))
        return plain(
            {
                "settings": describe(settings),
                "evaluations": len(settings.plan(self.pipe.schedule, guidances)),
                "clip": guide and _identity(guide),
            }
        )

    def point(self, task: Task) -> tuple[dict[str, Any], Images]:
        """Draws and measures.

        Raises:
            UsageError: the settings cannot be carried out.
        """
        prompts = [prompt_of(record) for record in self.records]
        drawn = self.pipe(prompts, seed=self.seed, batch_size=self.batch_size, **task.settings)
        return {
            "sweep": task.sweep,
            "value": task.value,
            **self.said(task),
            **self._alignment(self.scorer(drawn.images), self.choices),
            "distances": self._distances(drawn.images),
        }, drawn

    def _alignment(self, features: np.ndarray, choices: list[list[str]]) -> dict[str, float]:
        table = similarity(self.scorer, features, choices)
        return {
            # E[s f(image) . g(caption)]  (GLIDE, sec. 5.2).
            "clip_score": self.scorer.scale * float(table[:, 0].mean()),
            "r_precision": r_precision(table, np.zeros(len(table), int)),
        }

    def _distances(self, images: np.ndarray) -> dict[str, dict[str, float]]:
        found = {}
        for space in self.spaces:
            real, classes = self.features[space.name], None
            if getattr(space, "classes", None):
                drawn, classes = space.both(images)
            else:
                drawn = space(images)
            precision, recall = precision_recall(real, drawn, self.neighbour)
            found[space.name] = {
                "frechet_distance": frechet_distance(real, drawn),
                "kernel_distance": kernel_distance(real, drawn),
                "precision": precision,
                "recall": recall,
            }
            if classes is not None:
                found[space.name]["inception_score"] = inception_score(classes)
        return found


def run(experiment: Experiment, todo: Sequence[Task], out: Path) -> dict[str, Any]:
    """Measures what `out` does not hold yet, writing after each point.

    Beside `sweep.json` each point leaves a sheet of its pictures in `out/pictures`.

    Returns:
        The contents of the file.

    Raises:
        UsageError: the folder holds another experiment, or a setting cannot be carried out.
        GlideError: the folder cannot be written, or its file not be read.
    """
    writable(out / "pictures")
    head = experiment.head()
    found = read(out)
    if found is None:
        found = {"experiment": head, "real": experiment.real(), "points": []}
    elif wrong := [key for key in head if found["experiment"].get(key) != head[key]]:
        what = wrong[0].replace("_", " ")
        raise UsageError(f"{out} holds a sweep with other {what}: choose another --out")
    measured = {_key(point): point for point in found["points"]}
    # What cannot be carried out is better said before the first point than after an hour.
    keys = [_key({"sweep": task.sweep} | experiment.said(task)) for task in todo]
    left = {key: task for task, key in zip(todo, keys, strict=True) if key not in measured}
    drawn_before = {drawing: point for (_, drawing), point in measured.items()}
    with tqdm.tqdm(left.items(), unit="point", desc="sweep", disable=not left) as bar:
        for (_, drawing), task in bar:
            bar.set_postfix_str(f"{task.sweep} {task.value}")
            if drawing in drawn_before:
                # Sweeps cross: the default settings are a point of each.
                point = drawn_before[drawing] | {"sweep": task.sweep, "value": task.value}
            else:
                point, drawn = experiment.point(task)
                drawn_before[drawing] = point
                name = slug(f"{task.sweep} {task.value} {point['settings']['sampler']}")
                name += f"-{point['settings']['steps']}-{digest([drawing])[:6]}.png"
                write_png(out / "pictures" / name, Image.fromarray(image_grid(drawn.images)))
            found["points"].append(point)
            write_json(out / FILE, found)
    write_json(out / FILE, found)
    return found


def read(out: Path) -> dict[str, Any] | None:
    """What a folder's `sweep.json` holds; None where there is none.

    Raises:
        GlideError: it cannot be read.
    """
    path = out / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["points"], list) or not isinstance(found["experiment"], dict):
            raise ValueError("it is no sweep")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GlideError(f"cannot read {path}: {error}") from None
    return found


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _key(point: dict[str, Any]) -> tuple[str, str]:
    """Of a point: what is swept, and how it draws."""
    return point["sweep"], json.dumps([point["settings"], point["clip"]], sort_keys=True)


def _identity(weights: Model | CLIP) -> list[str]:
    return [weights.name, checksum(weights.params)]


def _images(records: Any) -> np.ndarray:
    return np.stack([record["image"] for record in records])
