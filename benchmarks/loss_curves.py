"""Plot the loss curves of training runs: python -m benchmarks.loss_curves --runs runs/emoji64

Reads the losses that `train.py` logged for TensorBoard. Each run is a panel: the loss of each log
line, pale, and its running mean. Steps logged twice, after an interruption, count once.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from glide_jax.errors import GlideError, UsageError, one_line_errors

# Decay rate of the running mean, per log line.
DECAY = 0.7


@dataclass(frozen=True)
class Options:
    """Plot the loss curves of runs."""

    runs: tuple[Path, ...]
    """Folders of runs of train.py."""
    out: Path = Path("docs/results/images/loss_curves.png")
    """The plot; its numbers go beside it as JSON."""
    metric: str = "train/loss"
    """Name of the curve in TensorBoard."""


def events(path: Path) -> Iterator[tuple[int, str, float]]:
    """Yield (step, name, value) of the numbers in a TensorBoard file.

    A truncated last record is left out.
    """
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    # A record: length, its checksum, the event, its checksum (TFRecord).
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        if len(body) < length:
            return
        event = Event.FromString(body)
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                yield event.step, value.tag, value.simple_value
        at += 16 + length


def curve(run: Path, metric: str) -> dict[int, float]:
    """Return a run's metric by step.

    Raises:
        GlideError: the run has no such metric.
    """
    found: dict[int, float] = {}
    for path in sorted((run / "logs").glob("events.*")):
        for step, name, value in events(path):
            if name == metric:
                found = {s: v for s, v in found.items() if s < step} | {step: value}
    if not found:
        raise GlideError(f"{run} has logged no {metric!r}: name a run of train.py")
    return found


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the exponential running mean, corrected for its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = DECAY * total + value, DECAY * weight + 1
        means.append(total / weight)
    return np.array(means)


def plot(curves: dict[str, dict[int, float]], metric: str, path: Path) -> None:
    """Write the plot.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("the plot needs matplotlib: pip install '.[eval]'") from None
    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    for axes, (name, points) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        steps, values = list(points), np.array(list(points.values()))
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values), color="C0")
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel(metric.rpartition("/")[2])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.loss_curves")
    with one_line_errors():
        curves = {run.name: curve(run, options.metric) for run in options.runs}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rounded = {n: {s: round(v, 5) for s, v in c.items()} for n, c in curves.items()}
        options.out.with_suffix(".json").write_text(json.dumps(rounded) + "\n", encoding="utf-8")
        plot(curves, options.metric, options.out)
        print(options.out)


if __name__ == "__main__":
    main()
