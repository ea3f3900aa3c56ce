"""Draws captions of procedural scenes, and scores exactly what the pictures have right."""

from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from glide_jax.data.scenes import SPLITS, Scene, ScenesSource
from glide_jax.errors import UsageError
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.scene_score import rates, score
from glide_jax.evaluation.sheets import Tile, contact_sheet
from glide_jax.pipeline.images import writable
from glide_jax.pipeline.pipeline import Pipeline

# Scenes that the sheet shows.
SHOWN = 50
KINDS = ("one thing", "several equal things", "two things in a relation")


def kind_of(scene: Scene) -> str:
    """Which of the three kinds of scenes it is."""
    if scene.relation:
        return KINDS[2]
    return KINDS[len(scene.things) > 1]


def report(
    pipe: Pipeline,
    out: Path,
    *,
    split: str = "test",
    pictures: int = 60,
    seed: int = 0,
    batch_size: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draws scenes 0, 1, ... of a split; writes `scenes.json`, and `scenes.png` of the first ones.

    Returns:
        The share of pictures that have each field right, of all and of each kind of scene; beside
        it what the scorer finds in the true pictures, drawn at the model's size.

    Raises:
        UsageError: there is no such split; or see the pipeline.
        GlideError: the folder cannot be written.
    """
    if split not in SPLITS:
        raise UsageError(f"scenes have the splits {' and '.join(SPLITS)}, not {split!r}")
    if pictures < 1:
        raise UsageError(f"draw at least one picture, not {pictures}")
    writable(out)
    source = ScenesSource(pictures, pipe.model.config.image_size, split)
    scenes = [source.scene(i) for i in range(pictures)]
    true = np.stack([source[i]["image"] for i in range(pictures)])
    drawn = pipe(
        [scene.caption for scene in scenes], seed=seed, batch_size=batch_size, **(settings or {})
    )
    scores = [score(image, scene) for image, scene in zip(drawn.images, scenes, strict=True)]
    by_kind = {
        kind: [s for s, scene in zip(scores, scenes, strict=True) if kind_of(scene) == kind]
        for kind in KINDS
    }
    found = {
        "weights": pipe.model.name,
        "split": split,
        "pictures": pictures,
        "seed": seed,
        "settings": drawn.settings,
        "right": rates(scores),
        "right_by_kind": {
            kind: {"of": len(some), **rates(some)} for kind, some in by_kind.items() if some
        },
        "right_of_true_pictures": rates(
            [score(image, scene) for image, scene in zip(true, scenes, strict=True)]
        ),
    }
    tiles = [
        Tile(
            image=drawn.images[i],
            lines=tuple(wrap(scene.caption, 22)),
            right=scores[i].all,
            small=true[i],
            small_lines=("true",),
        )
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    write_png(out / "scenes.png", contact_sheet(tiles))
    write_json(out / "scenes.json", found)
    return found
