"""The figure of guidance scales against real images  (GLIDE, fig. 6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glide_jax.errors import GlideError
from glide_jax.evaluation.figures import AXES, figure_class

# x and y of the panels.
PANELS = (
    ("recall", "precision"),
    ("inception_score", "frechet_distance"),
    ("clip_score", "frechet_distance"),
    ("clip_score", "inception_score"),
)
NAMES = {"guidance_scale": "classifier-free guidance", "clip_guidance_scale": "CLIP guidance"}


def write_curve_figure(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write the trade-offs of guidance scales, a curve for each kind of guidance.

    Args:
        points: each with its `kind` and `scale`, and its measures.

    Raises:
        GlideError: the file cannot be written.
    """
    figure = figure_class()(figsize=(4.2 * len(PANELS), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    labels = {**AXES, "clip_score": "CLIP score", "frechet_distance": "FID"}
    lines = {}
    for axes, (across, up) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for i, kind in enumerate(dict.fromkeys(point["kind"] for point in points)):
            curve = sorted((p for p in points if p["kind"] == kind), key=lambda p: p["scale"])
            x, y = ([point[name] for point in curve] for name in (across, up))
            (lines[NAMES[kind]],) = axes.plot(x, y, "o-", color=f"C{i}", markersize=4)
            for point, *at in zip(curve, x, y, strict=True):
                axes.annotate(f"{point['scale']:g}", at, fontsize=7, color=f"C{i}")
        axes.set(xlabel=labels[across], ylabel=labels[up])
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside lower center", fontsize=8, ncols=2)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None
