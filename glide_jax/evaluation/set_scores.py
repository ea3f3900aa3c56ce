"""Scores of one set of images against another, or against statistics of another."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import UsageError
from glide_jax.evaluation.feature_files import features_of, identity
from glide_jax.evaluation.features import FeatureSpace
from glide_jax.evaluation.frechet import Moments, distance, moments
from glide_jax.evaluation.image_sets import ImageSet
from glide_jax.evaluation.metrics import kernel_distance, precision_recall


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two sets, in a feature space.

    Attributes:
        moments: mean and covariance.
        features: `(N, D)` float32; None: only mean and covariance are known.
        shape: height and width of the images; None: unknown.
    """

    moments: Moments
    features: np.ndarray | None = None
    shape: tuple[int, int] | None = None


def measure(
    source: ImageSet | Moments,
    space: FeatureSpace,
    folder: Path,
    *,
    path: str,
    allow_few: bool = False,
) -> Side:
    """Return one of the sets in a feature space.

    Args:
        source: images, or their mean and covariance.
        folder: for the files of features.
        path: of the source, for messages.
        allow_few: accept sets that have no more images than dimensions.

    Raises:
        UsageError: there are too few images, or the statistics are those of another network.
        GlideError: see `features_of`.
    """
    network = tuple(identity(space).items())
    if isinstance(source, Moments):
        _check_source(source, network, path)
        return Side(source, shape=_shape(dict(source.source).get("size", "")))
    if len(source) < 2:
        raise UsageError(f"{path} has one image: a distance between sets needs at least two")
    features, shape = features_of(source, space, folder)
    if len(features) <= features.shape[1] and not allow_few:
        raise UsageError(
            f"{path} has {len(features):,} images, and {space.name} has {features.shape[1]:,} "
            f"dimensions: give more than {features.shape[1]:,} images, or --allow-few-images, "
            "which makes the Frechet distance too large"
        )
    origin = (*network, ("size", f"{shape[0]}x{shape[1]}"))
    return Side(moments(features, origin), features, shape)


def _shape(text: str) -> tuple[int, int] | None:
    height, _, width = text.partition("x")
    return (int(height), int(width)) if height.isdecimal() and width.isdecimal() else None


def _check_source(moments: Moments, network: tuple[tuple[str, str], ...], path: str) -> None:
    known = dict(moments.source)
    if not known:
        print(
            f"{path} does not say which network and size of images it was made with: the Frechet "
            "distance is right only for the same ones",
            file=sys.stderr,
        )
    for name, value in network:
        if known.get(name, value) != value:
            raise UsageError(
                f"{path} was made with another network ({name} {known[name]}, here {value}): give "
                "that one to --features, or make the file again with --save-statistics"
            )


def compare(
    real: Side, generated: Side, space: FeatureSpace, *, path: str, nearest_k: int = 3
) -> dict[str, Any]:
    """Return the scores of one feature space.

    Kernel distance, precision and recall need the features of both sets; without them they are
    None.

    Args:
        path: of the real set, for messages.
        nearest_k: the k of precision and recall.

    Raises:
        UsageError: the numbers of dimensions differ, or a set has k images or fewer.
    """
    a, b = real.moments, generated.moments
    if a.dimensions != b.dimensions:
        raise UsageError(
            f"{path} has statistics of {a.dimensions:,} dimensions, {space.name} has "
            f"{b.dimensions:,}: give the network that made them to --features"
        )
    scores: dict[str, Any] = {
        **identity(space),
        "dimensions": a.dimensions,
        "images": {"real": a.count, "generated": b.count},
        "frechet_distance": distance(a, b),
        "kernel_distance": None,
        "precision": None,
        "recall": None,
    }
    if real.features is not None and generated.features is not None:
        scores["kernel_distance"] = kernel_distance(real.features, generated.features)
        precision, recall = precision_recall(real.features, generated.features, nearest_k)
        scores |= {"precision": precision, "recall": recall, "nearest_k": nearest_k}
    return scores


COLUMNS = {
    "frechet_distance": ("Frechet distance", "{:.4f}"),
    "kernel_distance": ("kernel distance", "{:.6f}"),
    "precision": ("precision", "{:.4f}"),
    "recall": ("recall", "{:.4f}"),
}


def label(extractor: str) -> str:
    """Return the name of a feature space, with that of its Frechet distance in papers."""
    if extractor.startswith("Inception v3 (FID)"):
        return "FID: Inception v3"
    return f"FD-DINOv2: {extractor}" if extractor.startswith("DINOv2") else extractor


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Return the scores as a table, a line for each feature space; `-`: not measured."""
    rows = [["features", *(title for title, _ in COLUMNS.values())]]
    for score in scores:
        values = ((score[name], form) for name, (_, form) in COLUMNS.items())
        numbers = ["-" if value is None else form.format(value) for value, form in values]
        rows.append([label(score["extractor"]), *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
