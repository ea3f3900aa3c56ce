"""The nearest training image of each generated image: a test of memorisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glide_jax.evaluation.captions import (
    held_out_pairs,
    prompt_of,
    random_records,
    training_pairs,
)
from glide_jax.evaluation.features import fit
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.folders import check_writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.training.config import TrainConfig


@dataclass(frozen=True, eq=False)
class Match:
    """A generated image and the training image nearest to it.

    Attributes:
        prompt, concept, style: of the generated image.
        image: the generated image, `(H, W, 3)` uint8.
        nearest: the record of the nearest training image, with its concept and style.
        distance: root mean square difference of pixel values, from 0 to 255.
    """

    prompt: str
    concept: str
    style: str
    image: np.ndarray
    nearest: dict[str, Any]
    distance: float

    @property
    def right(self) -> bool:
        """Whether the nearest training image has the concept of the prompt."""
        return self.nearest["concept"] == self.concept


def distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return root mean square differences of uint8 images: `(N, ...)`, `(M, ...)` -> `(N, M)`."""
    a = images.reshape(len(images), -1).astype(np.float64)
    b = references.reshape(len(references), -1).astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


def generate_and_match(
    pipe: Pipeline,
    records: Sequence[dict[str, Any]],
    train: Sequence[dict[str, Any]],
    seed: int,
    batch_size: int | None = None,
) -> list[Match]:
    """Generate one image for each record's prompt, and find the nearest image in `train`.

    Generated images of another size are compared at the size of those in `train`.
    """
    prompts = [prompt_of(record) for record in records]
    generated = pipe(prompts, seed=seed, batch_size=batch_size)
    references = np.stack([record["image"] for record in train])
    table = distances(fit(generated.images, references.shape[1]), references)
    return [
        Match(
            prompt,
            record["concept"],
            record["style"],
            image,
            train[int(row.argmin())],
            float(row.min()),
        )
        for prompt, record, image, row in zip(
            prompts, records, generated.images, table, strict=True
        )
    ]


def report(
    pipe: Pipeline,
    config: TrainConfig,
    out: Path,
    *,
    seed: int = 0,
    captions: int = 10,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Generate random training captions and up to five held-out pairs; find the nearest images.

    Writes `training_captions.png` and `held_out_pairs.png` (each generated image above its nearest
    training image, unselected) and `nearest.json` to `out`.

    Args:
        seed: selects the captions and seeds the images.
        captions: number of training captions.

    Raises:
        UsageError: the data is not an .npz file, has no held-out pairs, or has fewer captions.
    """
    check_writable(out)
    train = training_pairs(config)
    rng = np.random.default_rng(seed)
    trained_on = random_records(train, captions, rng)
    held_out = held_out_pairs(config)
    held_out = random_records(held_out, min(5, len(held_out)), rng)

    results: dict[str, Any] = {"seed": seed, "weights": pipe.model.name}
    for name, records in (("training_captions", trained_on), ("held_out_pairs", held_out)):
        matches = generate_and_match(pipe, records, train, seed, batch_size)
        write_png(out / f"{name}.png", sheet(matches))
        results[name] = {
            "right": sum(match.right for match in matches),
            "of": len(matches),
            "images": [
                {
                    "prompt": match.prompt,
                    "nearest": f"{match.nearest['concept']}, {match.nearest['style']}",
                    "distance": round(match.distance, 1),
                }
                for match in matches
            ],
        }
    write_json(out / "nearest.json", results)
    return results


def sheet(matches: Sequence[Match], scale: int = 2, columns: int = 5) -> Image.Image:
    """Return a sheet: each image, its prompt, and below it the nearest training image, smaller."""
    side = len(matches[0].image) * scale
    width, height = side + 12, side + side // 2 + 44
    rows = -(-len(matches) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, match in enumerate(matches):
        x, y = i % columns * width + 6, i // columns * height + 4
        canvas.paste(
            Image.fromarray(match.image).resize((side, side), Image.Resampling.NEAREST), (x, y)
        )
        pen.text((x, y + side + 2), match.concept, fill="black")
        pen.text((x, y + side + 14), match.style, fill="gray")
        small = Image.fromarray(match.nearest["image"]).resize((side // 2, side // 2))
        canvas.paste(small, (x, y + side + 30))
        pen.text((x + side // 2 + 4, y + side + 30), "nearest in\ntraining", fill="gray")
    return canvas
