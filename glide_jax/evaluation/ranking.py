"""The ranking test: does an independent CLIP rank an image's caption first among a hundred?

There are two results, one for training concepts and one for held-out concept-style pairs. Each is
the ratio to what the same CLIP reaches on the real images of the same pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from glide_jax.evaluation.captions import (
    Vocabulary,
    held_out_pairs,
    one_of_each_concept,
    prompt_of,
    random_records,
    training_pairs,
    vocabulary,
)
from glide_jax.evaluation.features import Scorer, similarity
from glide_jax.evaluation.metrics import r_precision
from glide_jax.evaluation.reports import write_json, write_png
from glide_jax.evaluation.sheets import Tile, contact_sheet
from glide_jax.folders import check_writable
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.training.config import RunConfig

KINDS = ("training_concepts", "held_out_pairs")


@dataclass(frozen=True, eq=False)
class Ranks:
    """How a scorer ranks the captions of images.

    Attributes:
        rank: `(N,)`, the rank of the right caption, 1 for the first; a tie counts against it.
        best: the caption that fits each image best.
        rate: share of images whose right caption ranks first.
    """

    rank: np.ndarray
    best: tuple[str, ...]
    rate: float

    @property
    def right(self) -> np.ndarray:
        """Whether the right caption alone ranks first, `(N,)` bool."""
        return self.rank == 1


def rank(scorer: Scorer, images: np.ndarray, choices: Sequence[Sequence[str]]) -> Ranks:
    """Rank the captions of each image; the first of them is right.

    Args:
        images: `(N, H, W, 3)` uint8.
        choices: the captions of each image, the same number for all.
    """
    table = similarity(scorer, scorer(images), choices)
    best = tuple(row[int(i)] for row, i in zip(choices, table.argmax(axis=1), strict=True))
    right = np.zeros(len(images), int)
    return Ranks((table >= table[:, :1]).sum(axis=1), best, r_precision(table, right))


def choose_pairs(
    config: RunConfig, words: Vocabulary, *, seed: int, images: int, captions: int
) -> dict[str, tuple[list[dict[str, Any]], list[list[str]]]]:
    """Choose the records of each kind, and the captions of each record, the right one first.

    Args:
        seed: selects records and captions.
        images: number of records of each kind.
        captions: number of captions of each record.

    Raises:
        UsageError: the data has too few pairs or captions.
    """
    pairs = {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((seed, number))
        if kind == "training_concepts":
            records = one_of_each_concept(training_pairs(config), images, rng)
            choose = words.concept_choices
        else:
            records = random_records(held_out_pairs(config), images, rng)
            choose = words.pair_choices
        pairs[kind] = records, [choose(record, captions, rng) for record in records]
    return pairs


def report(
    pipe: Pipeline,
    scorer: Scorer,
    config: RunConfig,
    out: Path,
    *,
    seed: int = 0,
    images: int = 50,
    captions: int = 100,
    batch_size: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate images of both kinds and rank their captions.

    Writes `ranking.json` and a sheet of each kind to `out`.

    Args:
        seed: selects pairs and captions, and seeds the images.
        images: number of images of each kind, one per pair.
        captions: captions to choose from, for each image.
        settings: sampling settings that differ from those of the weights.

    Raises:
        UsageError: the data has too few pairs or captions.
        GlideError: the data cannot be read, or the folder cannot be written.
    """
    check_writable(out)
    overrides: dict[str, Any] = settings or {}
    chosen = choose_pairs(config, vocabulary(config), seed=seed, images=images, captions=captions)
    results: dict[str, Any] = {
        "weights": pipe.model.name,
        "scorer": scorer.clip.name,
        "views": scorer.views,
        "recipe": config.name,
        "seed": seed,
        "captions": captions,
    }
    for kind, (records, choices) in chosen.items():
        prompts = [prompt_of(record) for record in records]
        generated = pipe(prompts, seed=seed, batch_size=batch_size, **overrides)
        real = np.stack([record["image"] for record in records])
        ranks = rank(scorer, generated.images, choices), rank(scorer, real, choices)
        results["settings"] = generated.settings
        results[kind] = _results(prompts, *ranks)
        write_png(out / f"{kind}.png", contact_sheet(_tiles(records, generated.images, *ranks)))
    write_json(out / "ranking.json", results)
    return results


def _results(prompts: Sequence[str], generated: Ranks, real: Ranks) -> dict[str, Any]:
    return {
        "of": len(prompts),
        "right": int(generated.right.sum()),
        "right_of_real": int(real.right.sum()),
        # There is no ratio for a scorer that recognises none of the real images.
        "ratio": generated.rate / real.rate if real.rate else None,
        "images": [
            {
                "prompt": prompt,
                "rank": int(generated.rank[i]),
                "first": generated.best[i],
                "real_rank": int(real.rank[i]),
                "real_first": real.best[i],
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def _tiles(
    records: Sequence[dict[str, Any]], images: np.ndarray, generated: Ranks, real: Ranks
) -> list[Tile]:
    return [
        Tile(
            image=images[i],
            lines=(record["caption"], record["style"], *wrap(_mistaken_for(generated, i), 21)[:2]),
            right=bool(generated.right[i]),
            small=record["image"],
            small_lines=("real", *wrap(_mistaken_for(real, i), 11)[:4]),
            small_right=bool(real.right[i]),
        )
        for i, record in enumerate(records)
    ]


def _mistaken_for(ranks: Ranks, i: int) -> str:
    return "" if ranks.right[i] else f"-> {ranks.best[i]}"
