"""What is swept, and at which values.

Each sweep varies one setting; everything else is as the weights have it, or as it is said for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.errors import UsageError, nearest

# Higher than any noise level: JSON has no infinity.
EVERYWHERE = (0.0, 1e9)


def _number(text: str) -> float:
    return float(text)


def _steps(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _word(text: str) -> str:
    return text


def _span(text: str) -> tuple[float, float]:
    if text == "all":
        return EVERYWHERE
    low, high = text.split(":")
    return float(low), float(high) if high else EVERYWHERE[1]


@dataclass(frozen=True)
class Sweep:
    """One setting at several values.

    Attributes:
        setting: the field of `Settings`.
        values: as they are written on the command line.
        read: from there to the setting.
        fixed: settings that go with it unless others are given.
        label: of its curve.
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
        # Also where the weights take a CLIP beside it.
        {"clip_scale": 0.0},
        label="classifier-free guidance",
    ),
    # As in the paper: of the unguided model, by the ancestral sampler (GLIDE, sec. 2.4 and 5.1).
    "clip-scale": Sweep(
        "clip_scale",
        ("0", "1", "2", "4", "8", "16"),
        _number,
        {"guidance_scale": 1.0, "sampler": "ddpm"},
        label="CLIP guidance",
    ),
    "steps": Sweep("steps", ("5", "8", "10", "15", "20", "25", "35", "50"), _steps),
    "sampler": Sweep("sampler", tuple(SOLVERS), _word),
    "spacing": Sweep("spacing", ("logsnr", "uniform", "rho", "trailing", "optimised"), _word),
    "guidance-interval": Sweep(
        "guidance_interval", ("all", "0:5", "0.3:", "0.3:5", "0.3:10", "1:10"), _span
    ),
}
# Those whose curves belong into one figure.
TRADE_OFF = ("guidance-scale", "clip-scale")


@dataclass(frozen=True)
class Task:
    """A point to be measured.

    Attributes:
        sweep, value: which; the value as it was written.
        settings: of `Settings`, that differ from the weights' own.
    """

    sweep: str
    value: str
    settings: dict[str, Any]


def tasks(
    names: Sequence[str], values: Sequence[str] = (), settings: dict[str, Any] | None = None
) -> list[Task]:
    """The points of some sweeps.

    Args:
        values: in the place of the usual ones, of a single sweep.
        settings: what is said for all.

    Raises:
        UsageError: there is no such sweep or value, values for several sweeps, or the setting that
            is swept is said as well.
    """
    settings = {k: v for k, v in (settings or {}).items() if v is not None}
    if not names:
        raise UsageError(f"name what to sweep: {', '.join(SWEEPS)}")
    if values and len(names) > 1:
        raise UsageError("--values are of one sweep: sweep the others with another command")
    found = []
    for name in names:
        if name not in SWEEPS:
            raise UsageError(
                f"there is no sweep {name!r}{nearest(name, SWEEPS)}: choose of {', '.join(SWEEPS)}"
            )
        sweep = SWEEPS[name]
        if sweep.setting in settings:
            option = sweep.setting.replace("_", "-")
            raise UsageError(f"--{option} is what is swept: give its --values")
        for value in values or sweep.values:
            try:
                swept = {sweep.setting: sweep.read(value)}
            except ValueError:
                raise UsageError(f"{value!r} is no value of the sweep {name}") from None
            found.append(Task(name, value, sweep.fixed | settings | swept))
    return found
