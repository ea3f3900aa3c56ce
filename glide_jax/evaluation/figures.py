"""The figures of sweeps: the paper's trade-offs, and one setting against every measure."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.reports import write_json
from glide_jax.evaluation.sweep_options import SWEEPS, TRADE_OFF

Point = dict[str, Any]
# The measures and their axis labels; distances belong to a feature space.
AXES = {
    "clip_score": "CLIP score (independent CLIP)",
    "r_precision": "R-precision (independent CLIP)",
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision (fidelity)",
    "recall": "recall (diversity)",
    "inception_score": "inception score",
}
ALIGNMENT = ("clip_score", "r_precision")
# x and y of the panels (GLIDE, fig. 6; the last: alignment at matched diversity).
PANELS = (
    ("recall", "precision"),
    ("clip_score", "frechet_distance"),
    ("r_precision", "frechet_distance"),
    ("recall", "clip_score"),
)
NUMBERS = ("guidance-scale", "clip-guidance-scale", "steps")
GUIDE = "guided by"
MATCHED = ("precision", "frechet_distance", "clip_score", "r_precision")


def measure(point: Point, name: str, space: str) -> float:
    """Return a measure of a point; distances are those in a feature space."""
    return point[name] if name in ALIGNMENT else point["distances"][space][name]


def curves(points: Sequence[Point], names: Sequence[str] = TRADE_OFF) -> dict[str, list[Point]]:
    """Group points into curves: one for each sweep and each set of its other settings.

    The name of a curve contains the swept setting, the sampler and the steps, and any other setting
    in which curves of the same name differ. The points of a curve are in order.
    """
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point["sweep"] in names:
            groups.setdefault(json.dumps([point["sweep"], _unswept_settings(point)]), []).append(
                point
            )
    _share_unguided(groups)
    alike: dict[str, list[list[Point]]] = {}
    for curve in groups.values():
        alike.setdefault(_label(curve[0]), []).append(curve)
    by_label = {}
    for label, same in alike.items():
        for curve in same:
            others = [_unswept_settings(other[0]) for other in same]
            differing = {n: v for n, v in others[0].items() if any(o[n] != v for o in others)}
            mine = _unswept_settings(curve[0])
            name = ", ".join([label, *(f"{n} {mine[n]}" for n in differing)])
            by_label[name] = sorted(curve, key=_order) if curve[0]["sweep"] in NUMBERS else curve
    return by_label


def _unswept_settings(point: Point) -> dict[str, Any]:
    """Return the settings of a point that are not swept, and the guiding CLIP, if any."""
    swept = SWEEPS[point["sweep"]].setting
    settings = {name: value for name, value in point["settings"].items() if name != swept}
    return settings | {GUIDE: " ".join(point["clip"] or ())}


def _share_unguided(groups: dict[str, list[Point]]) -> None:
    """Add the points of CLIP scale 0, which no CLIP guides, to the curve of every CLIP."""
    for key, unguided in list(groups.items()):
        sweep, others = json.loads(key)
        if SWEEPS[sweep].setting != "clip_guidance_scale" or others[GUIDE]:
            continue
        guided = [
            curve
            for curve in groups.values()
            if curve[0]["sweep"] == sweep
            and _unswept_settings(curve[0])[GUIDE]
            and _unswept_settings(curve[0]) | {GUIDE: ""} == others
        ]
        for curve in guided:
            curve.extend(unguided)
        if guided:
            del groups[key]


def _order(point: Point) -> float:
    return float(point["evaluations" if point["sweep"] == "steps" else "value"])


def _label(point: Point) -> str:
    sweep, settings = SWEEPS[point["sweep"]], point["settings"]
    texts = {"sampler": settings["sampler"], "steps": f"{settings['steps']} steps"}
    shown = [text for name, text in texts.items() if name != sweep.setting]
    if point["sweep"] not in TRADE_OFF:
        shown.append(f"guidance {settings['guidance_scale']:g}")
    return f"{sweep.label or point['sweep']}, {', '.join(shown)}"


def matched(points: Sequence[Point], space: str) -> list[dict[str, Any]]:
    """Compare classifier-free with CLIP guidance at equal recall, as the paper does.

    For each point of CLIP guidance, and each position on a classifier-free curve with the same
    recall, it returns scale and measures of both. Those on the curve are interpolated linearly
    between neighbouring scales. Recall can rise and fall with the scale: there may be several such
    positions, or none.
    """
    by_sweep = {name: curves(points, (name,)) for name in TRADE_OFF}
    matches = []
    for free_name, free in by_sweep["guidance-scale"].items():
        scales = [float(point["value"]) for point in free]
        for clip_name, guided in by_sweep["clip-guidance-scale"].items():
            for point in guided:
                at = measure(point, "recall", space)
                for position in _crossings([measure(p, "recall", space) for p in free], at):
                    cfg = {"curve": free_name, "scale": _between(scales, position)}
                    clip = {"curve": clip_name, "scale": float(point["value"])}
                    for name in MATCHED:
                        cfg[name] = _between([measure(p, name, space) for p in free], position)
                        clip[name] = measure(point, name, space)
                    matches.append({"recall": at, "classifier-free": cfg, "clip": clip})
    return matches


def _crossings(values: Sequence[float], wanted: float) -> list[float]:
    """Return the positions at which a line through values at 0, 1, ... has the value wanted."""
    positions = [float(i) for i, value in enumerate(values) if value == wanted]
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if (a - wanted) * (b - wanted) < 0:
            positions.append(i + (wanted - a) / (b - a))
    return sorted(positions)


def _between(values: Sequence[float], position: float) -> float:
    return float(np.interp(position, range(len(values)), values))


def write_figures(results: dict[str, Any], out: Path) -> list[Path]:
    """Write `trade_off.png`, and one figure for each sweep, to `out`.

    If both kinds of guidance were swept, `trade_off.json` holds `matched` for each feature space.

    Args:
        results: the contents of `sweep.json`.

    Returns:
        The files.

    Raises:
        UsageError: matplotlib is not installed.
        GlideError: a file cannot be written.
    """
    spaces, points = results["experiment"]["features"], results["points"]
    files = []
    if all(any(point["sweep"] == name for point in points) for name in TRADE_OFF):
        files.append(out / "trade_off.json")
        write_json(files[0], {space: matched(points, space) for space in spaces})
    if any(point["sweep"] in TRADE_OFF for point in points):
        files.append(_save(_trade_off(results, spaces), out / "trade_off.png"))
    for name in SWEEPS:
        if any(point["sweep"] == name for point in points):
            figure = _setting_figure(results, name, spaces)
            files.append(_save(figure, out / f"{name.replace('-', '_')}.png"))
    return files


def figure_class() -> Any:
    """Return matplotlib's class `Figure`.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("the figures need matplotlib: pip install '.[eval]'") from None
    return Figure


def _figure(rows: int, columns: int, title: str) -> Any:
    figure = figure_class()(figsize=(4.2 * columns, 3.9 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def _title(results: dict[str, Any]) -> str:
    e = results["experiment"]
    return (
        f"{e['weights'][0]}: {e['images']} images a point, seed {e['seed']}; "
        f"scored by {e['scorer'][0]} among {e['captions']} captions"
    )


def _trade_off(results: dict[str, Any], spaces: Sequence[str]) -> Any:
    figure = _figure(len(spaces), len(PANELS), _title(results))
    rows = figure.subplots(len(spaces), len(PANELS), squeeze=False)
    lines = {}
    for space, row in zip(spaces, rows, strict=True):
        for axes, (across, up) in zip(row, PANELS, strict=True):
            for i, (name, curve) in enumerate(curves(results["points"]).items()):
                x, y = ([measure(p, n, space) for p in curve] for n in (across, up))
                (lines[name],) = axes.plot(x, y, "o-", color=f"C{i}", markersize=4, linewidth=1.2)
                for point, *at in zip(curve, x, y, strict=True):
                    offset = {"xytext": (3, 3), "textcoords": "offset points"}
                    axes.annotate(point["value"], at, **offset, fontsize=7, color=f"C{i}")
            if across in ALIGNMENT:
                line = axes.axvline(results["real"][across], color="grey", linestyle=":")
                lines["real images"] = line
            if up in ALIGNMENT:
                axes.axhline(results["real"][up], color="grey", linestyle=":")
            axes.set(xlabel=AXES[across], ylabel=AXES[up])
            axes.grid(alpha=0.3)
        row[0].set_title(space, fontsize=9, loc="left")
    figure.legend(lines.values(), lines, loc="outside lower center", fontsize=8, ncols=3)
    return figure


def _setting_figure(results: dict[str, Any], sweep: str, spaces: Sequence[str]) -> Any:
    panels = [(name, spaces[0]) for name in ALIGNMENT]
    for space in spaces:
        known = results["points"][0]["distances"][space]
        panels += [(name, space) for name in AXES if name in known and name != "kernel_distance"]
    columns = 3
    rows = -(-len(panels) // columns)
    figure = _figure(rows, columns, _title(results))
    grid = figure.subplots(rows, columns, squeeze=False).flat
    lines = {}
    for (name, space), axes in zip(panels, grid, strict=False):
        for i, (label, curve) in enumerate(curves(results["points"], (sweep,)).items()):
            y = [measure(point, name, space) for point in curve]
            x = _positions(curve)
            style = "o-" if sweep in NUMBERS else "o"
            (lines[label],) = axes.plot(x, y, style, color=f"C{i}", markersize=4, linewidth=1.2)
        if name in ALIGNMENT:
            axes.axhline(results["real"][name], color="grey", linestyle=":")
        if sweep not in NUMBERS:
            axes.tick_params(axis="x", rotation=90)
        suffix = "" if name in ALIGNMENT else f"\n{space}"
        axes.set_title(f"{AXES[name]}{suffix}", fontsize=8)
        axes.set_xlabel("network evaluations per image" if sweep == "steps" else sweep)
        axes.grid(alpha=0.3)
    for axes in list(grid):
        axes.remove()
    figure.legend(lines.values(), lines, loc="outside lower center", fontsize=8)
    return figure


def _positions(curve: Sequence[Point]) -> list[float] | list[str]:
    """Return the positions of points on the x axis."""
    if curve[0]["sweep"] in NUMBERS:
        return [_order(point) for point in curve]
    return [f"{point['value']} ({point['evaluations']})" for point in curve]


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error}") from None
    return path
