"""Averages of weights chosen after training  (EDM2, 2312.02696, sec. 3).

The average over a power function, `sum_s w(s) params_s` with `w(s) ~ s^gamma`, looks back over a
share of the training so far, its *width*. Training keeps two of them and saves them now and then;
the average of any other width, at any step, is nearly a sum of what was saved.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.errors import UsageError
from glide_jax.devices.processes import on_first
from glide_jax.training.config import RunConfig, check_width, read_config
from glide_jax.training.export import description
from glide_jax.training.step import power_exponent
from glide_jax.weights.store import CONFIG, flatten, load_weights, save_weights

FOLDER = "ema"
# A sum whose profile is further off is another average than the one asked for.
WORST_FIT = 0.1


@dataclass(frozen=True)
class Profile:
    """The weights `w(s) = (gamma + 1) s^gamma / step^(gamma + 1)` of steps s, 0 < s <= step.

    Attributes:
        step: of which it is the average.
        width: standard deviation as a share of `step`.
    """

    step: int
    width: float

    @cached_property
    def gamma(self) -> float:
        """The exponent of this width."""
        return power_exponent(self.width)


def snapshot(config: RunConfig, step: int, averages: Iterable[Any]) -> None:
    """Writes the power-function averages as float16 weights, `ema/<step>_<width>`.

    At every `optimiser.ema_every` steps and at the last. Float16, since a sum of snapshots adds up
    their rounding, and bfloat16 has an eighth of its precision.

    Args:
        averages: `TrainState.powers`, whole, in every process; one at a time is asked for.

    Raises:
        GlideError: they cannot be written.
    """
    if step % config.optimiser.ema_every and step != config.steps:
        return
    for width, average in zip(config.optimiser.ema_power, averages, strict=True):
        flat = {path: _half(array) for path, array in flatten(average).items()}
        folder = config.folder / FOLDER / f"{step:08}_{width:g}"
        on_first(partial(save_weights, folder, description(config, step), flat))


def _half(array: Any) -> np.ndarray:
    """The array in float16, or as it is where it has numbers beyond it."""
    array = np.asarray(array)
    return array.astype(np.float16) if np.abs(array).max() < np.finfo(np.float16).max else array


def snapshots(run: Path) -> dict[Profile, Path]:
    """The averages that a run has saved, by step and width."""
    found = {}
    for folder in sorted((run / FOLDER).glob("*")):
        name = re.fullmatch(r"(\d+)_([\d.e-]+)", folder.name)
        if name and (folder / CONFIG).is_file():
            found[Profile(int(name[1]), float(name[2]))] = folder
    return found


def inner(a: Profile, b: Profile) -> float:
    """`int w_a(s) w_b(s) ds`, which the fit of sec. 3.2 is made of.

    Over the steps that both have, those up to the earlier one's `t_a`:
    `(g_a + 1) (g_b + 1) / (g_a + g_b + 1) * (t_a / t_b)^g_b / t_b`.
    """
    first, last = sorted((a, b), key=lambda profile: profile.step)
    x, y = first.gamma, last.gamma
    ratio = first.step / last.step
    return (x + 1) * (y + 1) / (x + y + 1) * ratio**y / last.step


def fit(saved: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The sum of saved profiles that is nearest to a wanted one, its coefficients adding up to 1.

    Least squares  (EDM2, sec. 3.2) under that condition: with `A_ij = <w_i, w_j>` and
    `b_i = <w_i, w>`, `[[A, 1], [1, 0]] [c, l] = [b, 1]`.

    Returns:
        Coefficients `(N,)` float64, and what is left, `|sum c_i w_i - w| / |w|`.
    """
    count, scale = len(saved), inner(wanted, wanted)
    gram = np.array([[inner(a, b) for b in saved] for a in saved]) / scale
    right = np.array([inner(a, wanted) for a in saved]) / scale
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = gram, 0.0
    found = np.linalg.lstsq(system, np.append(right, 1.0), rcond=None)[0][:count]
    left = found @ gram @ found - 2 * found @ right + 1
    return found, float(np.sqrt(max(left, 0.0)))


def reconstruct(
    run: Path, width: float, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    """The average of another width, from the snapshots of a run.

    Args:
        width: as a share of the training up to `step`, as in `OptimiserConfig.ema_power`.
        step: None: the last one that was saved.

    Returns:
        Flat parameters in float32, the `config.json` that belongs to them, and how far the sum is
        from the wanted profile (see `fit`).

    Raises:
        UsageError: the run has saved no averages, or none from which this one follows.
        GlideError: a snapshot is broken.
    """
    check_width(width)
    found = snapshots(run)
    if not found:
        raise UsageError(f"{run} has saved no averages: train with --optimiser.ema-power 0.05 0.1")
    last = max(profile.step for profile in found)
    wanted = Profile(last if step is None else step, width)
    saved = [profile for profile in found if profile.step <= wanted.step]
    if not saved:
        first = min(profile.step for profile in found)
        raise UsageError(f"the first averages were saved at step {first}, after {wanted.step}")
    coefficients, left = fit(saved, wanted)
    if left > WORST_FIT:
        widths = sorted({profile.width for profile in saved})
        raise UsageError(
            f"{len(saved)} averages of width {', '.join(map(str, widths))} do not make one of "
            f"{width} at step {wanted.step} ({left:.0%} off): choose a width that is nearer, or "
            "save more often (--optimiser.ema-every)"
        )
    total: dict[str, np.ndarray] = {}
    for profile, coefficient in zip(saved, coefficients, strict=True):
        _, flat, _ = load_weights(found[profile])
        for path, array in flat.items():
            part = np.float32(coefficient) * array.astype(np.float32)
            total[path] = total[path] + part if path in total else part
    config = read_config(run / "config.json")
    return total, description(config, wanted.step) | {"ema_width": width}, left


def write_average(run: Path, to: Path, width: float, step: int | None = None) -> float:
    """Writes what `reconstruct` makes as a folder of float32 weights.

    Returns:
        How far the average's profile is from the wanted one.

    Raises:
        UsageError, GlideError: see `reconstruct`; or the folder cannot be written.
    """
    flat, config, left = reconstruct(run, width, step)
    save_weights(to, config, flat)
    return left
