"""Do pictures show what they were asked for? The nearest training picture tells."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glide_jax.evaluation.captions import held_out, prompt_of, some, training_cells
from glide_jax.evaluation.features import fit
from glide_jax.evaluation.reports import write_json
from glide_jax.pipeline.images import writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.training.config import TrainConfig


@dataclass(frozen=True)
class Drawn:
    """A picture, what was asked for, and the training picture nearest to it.

    Attributes:
        prompt, concept, style: what was asked for.
        image: `(H, W, 3)` uint8.
        nearest: the training picture at the smallest distance, with its concept and style.
        distance: root mean square of the difference in pixel values, 0 to 255.
    """

    prompt: str
    concept: str
    style: str
    image: np.ndarray
    nearest: dict[str, Any]
    distance: float

    @property
    def right(self) -> bool:
        """Whether the nearest training picture shows the concept asked for."""
        return self.nearest["concept"] == self.concept


def distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Root mean squared difference of `(N, ...)` and `(M, ...)` uint8 pictures: `(N, M)`."""
    a = images.reshape(len(images), -1).astype(np.float64)
    b = references.reshape(len(references), -1).astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


def draw_and_compare(
    pipe: Pipeline,
    asked: Sequence[dict[str, str]],
    train: Sequence[dict],
    seed: int,
    batch_size: int | None = None,
) -> list[Drawn]:
    """Draws one picture of each record's caption in its style, and finds the nearest in `train`.

    Images of another size than those in `train` are compared at theirs.
    """
    prompts = [prompt_of(record) for record in asked]
    pictures = pipe(prompts, seed=seed, batch_size=batch_size)
    references = np.stack([record["image"] for record in train])
    table = distances(fit(pictures.images, references.shape[1]), references)
    return [
        Drawn(
            prompt,
            record["concept"],
            record["style"],
            image,
            train[int(row.argmin())],
            float(row.min()),
        )
        for prompt, record, image, row in zip(prompts, asked, pictures.images, table, strict=True)
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
    """Draws captions of the training set and held-out style x concept pairs, as they come.

    Writes `training_captions.png`, `held_out_pairs.png` (each picture above the training
    picture nearest to it) and `nearest.json` to `out`.

    Raises:
        UsageError: the data are no .npz file, have no styles to hold out, or fewer captions.
    """
    writable(out)
    train = training_cells(config)
    rng = np.random.default_rng(seed)
    learned = some(train, captions, rng)
    cells = held_out(config)
    cells = some(cells, min(5, len(cells)), rng)

    found = {"seed": seed, "weights": pipe.model.name}
    for name, asked in (("training_captions", learned), ("held_out_pairs", cells)):
        drawn = draw_and_compare(pipe, asked, train, seed, batch_size)
        sheet(drawn).save(out / f"{name}.png")
        found[name] = {
            "right": sum(d.right for d in drawn),
            "of": len(drawn),
            "pictures": [
                {
                    "prompt": d.prompt,
                    "nearest": f"{d.nearest['concept']}, {d.nearest['style']}",
                    "distance": round(d.distance, 1),
                }
                for d in drawn
            ],
        }
    write_json(out / "nearest.json", found)
    return found


def sheet(drawn: Sequence[Drawn], scale: int = 2, columns: int = 5) -> Image.Image:
    """Each picture, its prompt, and smaller below it the nearest training picture."""
    side = len(drawn[0].image) * scale
    width, height = side + 12, side + side // 2 + 44
    rows = -(-len(drawn) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, d in enumerate(drawn):
        x, y = i % columns * width + 6, i // columns * height + 4
        canvas.paste(
            Image.fromarray(d.image).resize((side, side), Image.Resampling.NEAREST), (x, y)
        )
        pen.text((x, y + side + 2), d.concept, fill="black")
        pen.text((x, y + side + 14), d.style, fill="gray")
        small = Image.fromarray(d.nearest["image"]).resize((side // 2, side // 2))
        canvas.paste(small, (x, y + side + 30))
        pen.text((x + side // 2 + 4, y + side + 30), "nearest in\ntraining", fill="gray")
    return canvas
