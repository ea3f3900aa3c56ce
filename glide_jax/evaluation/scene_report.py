"""Scores of generated images of procedural scenes, with a report and a sheet."""

from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from glide_jax.data.scenes import SPLITS, Scene, ScenesSource
from glide_jax.errors import UsageError
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.scene_score import rates, score
from glide_jax.evaluation.sheets import Tile, contact_sheet
from glide_jax.folders import check_writable
from glide_jax.pipeline.pipeline import Pipeline

# Scenes on the sheet.
SHOWN = 50
KINDS = ("one object", "several equal objects", "two related objects")


def kind_of(scene: Scene) -> str:
    """Return which of the three kinds a scene is."""
    if scene.relation:
        return KINDS[2]
    return KINDS[len(scene.objects) > 1]


def report(
    pipe: Pipeline,
    out: Path,
    *,
    split: str = "test",
    images: int = 60,
    seed: int = 0,
    batch_size: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate the captions of scenes 0, 1, ... of a split, and score the images.

    Writes `scenes.json`, and `scenes.png` with the first images, to `out`.

    Args:
        images: number of images, one per scene.
        seed: seeds the images.
        settings: sampling settings that differ from those of the weights.

    Returns:
        The share of images that show each detail correctly, in all and by kind of scene. For
        comparison: the scores of the true images, rendered at the model's size.

    Raises:
        UsageError: there is no such split; or see `Pipeline`.
        GlideError: the folder cannot be written.
    """
    if split not in SPLITS:
        raise UsageError(f"scenes have the splits {' and '.join(SPLITS)}, not {split!r}")
    if images < 1:
        raise UsageError(f"generate at least one image, not {images}")
    check_writable(out)
    overrides: dict[str, Any] = settings or {}
    source = ScenesSource(images, pipe.model.config.image_size, split)
    scenes = [source.scene(i) for i in range(images)]
    true = np.stack([source[i]["image"] for i in range(images)])
    captions = [scene.caption for scene in scenes]
    generated = pipe(captions, seed=seed, batch_size=batch_size, **overrides)
    scores = [score(image, scene) for image, scene in zip(generated.images, scenes, strict=True)]
    by_kind = {
        kind: [s for s, scene in zip(scores, scenes, strict=True) if kind_of(scene) == kind]
        for kind in KINDS
    }
    results = {
        "weights": pipe.model.name,
        "split": split,
        "images": images,
        "seed": seed,
        "settings": generated.settings,
        "right": rates(scores),
        "right_by_kind": {
            kind: {"of": len(group), **rates(group)} for kind, group in by_kind.items() if group
        },
        "right_of_true_images": rates(
            [score(image, scene) for image, scene in zip(true, scenes, strict=True)]
        ),
    }
    tiles = [
        Tile(
            image=generated.images[i],
            lines=tuple(wrap(scene.caption, 22)),
            right=scores[i].all,
            small=true[i],
            small_lines=("true",),
        )
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    write_png(out / "scenes.png", contact_sheet(tiles))
    write_json(out / "scenes.json", results)
    return results
