"""The sweeps: which setting each varies, and its default values.

A sweep varies one setting. All others are those of the weights, unless overridden for all points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.errors import UsageError, did_you_mean

# Higher than any noise level: JSON has no infinity.
EVERYWHERE = (0.0, 1e9)


def _number(text: str) -> float:
    return float(text)


def _steps(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _word(text: str) -> str:
    return text


def _interval(text: str) -> tuple[float, float]:
    if text == "all":
        return EVERYWHERE
    low, high = text.split(":")
    return float(low), float(high) if high else EVERYWHERE[1]


@dataclass(frozen=True)
class Sweep:
    """One setting at several values.

    Attributes:
        setting: the field of `Settings`.
        values: the default values, as on the command line.
        read: converts such a value to the setting.
        fixed: settings that go with the sweep unless overridden.
        label: the name of its curve.
    """

    setting: str
    values: tuple[str, ...]
    read: Callable[[str], Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    label: str = ""


SWEEPS = {
    "guidance-scale": Sweep(
        "guidance_scale",
        ("1", "1.5", "2", "3", "4", "6", "8"),
        _number,
        # Some weights use CLIP guidance by default: the sweep compares one guidance alone.
        {"clip_guidance_scale": 0.0},
        label="classifier-free guidance",
    ),
    # As in the paper: the unguided model with the ancestral sampler (GLIDE, sec. 2.4 and 5.1).
    "clip-guidance-scale": Sweep(
        "clip_guidance_scale",
        ("0", "1", "2", "4", "8", "16"),
        _number,
        {"guidance_scale": 1.0, "sampler": "ddpm"},
        label="CLIP guidance",
    ),
    "steps": Sweep("steps", ("5", "8", "10", "15", "20", "25", "35", "50"), _steps),
    "sampler": Sweep("sampler", tuple(SOLVERS), _word),
    "spacing": Sweep("spacing", ("logsnr", "uniform", "karras", "trailing", "optimised"), _word),
    "guidance-interval": Sweep(
        "guidance_interval", ("all", "0:5", "0.3:", "0.3:5", "0.3:10", "1:10"), _interval
    ),
}
# The sweeps whose curves share one figure.
TRADE_OFF = ("guidance-scale", "clip-guidance-scale")


@dataclass(frozen=True)
class Task:
    """A point to measure.

    Attributes:
        sweep: the name of its sweep.
        value: the swept value, as on the command line.
        settings: fields of `Settings` that differ from those of the weights.
    """

    sweep: str
    value: str
    settings: dict[str, Any]


def tasks(
    names: Sequence[str], values: Sequence[str] = (), settings: dict[str, Any] | None = None
) -> list[Task]:
    """Return the points of sweeps.

    Args:
        names: the sweeps.
        values: replace the default values of a single sweep.
        settings: override the settings of the weights at all points.

    Raises:
        UsageError: there is no such sweep or value, there are values for several sweeps, or the
            swept setting is also set.
    """
    settings = {k: v for k, v in (settings or {}).items() if v is not None}
    if not names:
        raise UsageError(f"name what to sweep: {', '.join(SWEEPS)}")
    if values and len(names) > 1:
        raise UsageError("--values are for one sweep: run one command for each sweep")
    chosen_tasks = []
    for name in names:
        if name not in SWEEPS:
            raise UsageError(
                f"there is no sweep {name!r}{did_you_mean(name, SWEEPS)}: choose from "
                f"{', '.join(SWEEPS)}"
            )
        sweep = SWEEPS[name]
        if sweep.setting in settings:
            option = sweep.setting.replace("_", "-")
            raise UsageError(f"--{option} is swept and cannot also be set: give its --values")
        for value in values or sweep.values:
            try:
                swept = {sweep.setting: sweep.read(value)}
            except ValueError:
                raise UsageError(f"{value!r} is not a value of the sweep {name}") from None
            chosen_tasks.append(Task(name, value, sweep.fixed | settings | swept))
    return chosen_tasks
