"""Does the independent CLIP find the caption of a picture among a hundred?

The two figures of alignment, each as a share of what the same CLIP reaches on the real pictures of
the same cells: of training concepts, and of held-out cells of concept and style.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from glide_jax.evaluation.captions import (
    Vocabulary,
    held_out,
    one_of_each_concept,
    prompt_of,
    some,
    training_cells,
    vocabulary,
)
from glide_jax.evaluation.features import Scorer, similarity
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.metrics import r_precision
from glide_jax.evaluation.sheets import Tile, contact_sheet
from glide_jax.pipeline.images import writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.training.config import RunConfig

PARTS = ("training_concepts", "held_out_cells")


@dataclass(frozen=True)
class Ranks:
    """Where the right caption stands among a picture's choices, and which stands first.

    Attributes:
        rank: `(N,)`, 1 for the first; a tie counts against it.
        best: the caption of each picture that fits it best.
    """

    rank: np.ndarray
    best: tuple[str, ...]
    rate: float

    @property
    def right(self) -> np.ndarray:
        """`(N,)` bool: the right caption is first, alone."""
        return self.rank == 1


def rank(scorer: Scorer, images: np.ndarray, choices: Sequence[Sequence[str]]) -> Ranks:
    """Ranks the captions of each picture, of which the first is right.

    Args:
        images: `(N, H, W, 3)` uint8.
        choices: N times as many captions.
    """
    table = similarity(scorer, scorer(images), choices)
    best = tuple(row[i] for row, i in zip(choices, table.argmax(axis=1), strict=True))
    own = np.zeros(len(images), int)
    return Ranks((table >= table[:, :1]).sum(axis=1), best, r_precision(table, own))


def asked(
    config: RunConfig, words: Vocabulary, *, seed: int, pictures: int, captions: int
) -> dict[str, tuple[list[dict[str, Any]], list[list[str]]]]:
    """What each part asks for: its records, and the captions of each, the right one first.

    Raises:
        UsageError: the data have not as many cells or captions.
    """
    found = {}
    for number, part in enumerate(PARTS):
        rng = np.random.default_rng((seed, number))
        if part == "training_concepts":
            records = one_of_each_concept(training_cells(config), pictures, rng)
            choose = words.concept_choices
        else:
            records, choose = some(held_out(config), pictures, rng), words.cell_choices
        found[part] = records, [choose(record, captions, rng) for record in records]
    return found


def report(
    pipe: Pipeline,
    scorer: Scorer,
    config: RunConfig,
    out: Path,
    *,
    seed: int = 0,
    pictures: int = 50,
    captions: int = 100,
    batch_size: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draws both parts, ranks, and writes `ranking.json` and a sheet of each part to `out`.

    Args:
        seed: of the choice of cells and captions, and of the pictures.
        pictures: of each part, one a cell.
        captions: to choose from, of each picture.
        settings: of sampling, where they are not those of the weights.

    Raises:
        UsageError, GlideError: the data have not as many cells or captions, cannot be read, or the
            folder not be written.
    """
    writable(out)
    parts = asked(config, vocabulary(config), seed=seed, pictures=pictures, captions=captions)
    found: dict[str, Any] = {
        "weights": pipe.model.name,
        "scorer": scorer.clip.name,
        "views": scorer.views,
        "recipe": config.name,
        "seed": seed,
        "captions": captions,
    }
    for part, (records, choices) in parts.items():
        prompts = [prompt_of(record) for record in records]
        drawn = pipe(prompts, seed=seed, batch_size=batch_size, **(settings or {}))
        real = np.stack([record["image"] for record in records])
        ranks = rank(scorer, drawn.images, choices), rank(scorer, real, choices)
        found["settings"] = drawn.settings
        found[part] = _figures(prompts, *ranks)
        write_png(out / f"{part}.png", contact_sheet(_tiles(records, drawn.images, *ranks)))
    write_json(out / "ranking.json", found)
    return found


def _figures(prompts: Sequence[str], drawn: Ranks, real: Ranks) -> dict[str, Any]:
    return {
        "of": len(prompts),
        "right": int(drawn.right.sum()),
        "right_of_real": int(real.right.sum()),
        # Of a judge that knows nothing of the real pictures there is no share.
        "ratio": drawn.rate / real.rate if real.rate else None,
        "pictures": [
            {
                "prompt": prompt,
                "rank": int(drawn.rank[i]),
                "first": drawn.best[i],
                "real_rank": int(real.rank[i]),
                "real_first": real.best[i],
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def _tiles(
    records: Sequence[dict[str, Any]], images: np.ndarray, drawn: Ranks, real: Ranks
) -> list[Tile]:
    return [
        Tile(
            image=images[i],
            lines=(record["caption"], record["style"], *wrap(_taken_for(drawn, i), 21)[:2]),
            right=bool(drawn.right[i]),
            small=record["image"],
            small_lines=("real", *wrap(_taken_for(real, i), 11)[:4]),
            small_right=bool(real.right[i]),
        )
        for i, record in enumerate(records)
    ]


def _taken_for(ranks: Ranks, i: int) -> str:
    return "" if ranks.right[i] else f"-> {ranks.best[i]}"
