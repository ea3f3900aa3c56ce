"""Post-hoc EMA: the length of the EMA is chosen after training  (EDM2, 2312.02696, sec. 3).

A power-function EMA, `sum_s w(s) params_s` with `w(s) ~ s^gamma`, has a *width*: its standard
deviation as a share of the steps so far. Training keeps EMAs of two widths and saves snapshots of
them; the EMA of any other width, at any step, is close to a weighted sum of these snapshots.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from glide_jax.devices.processes import on_first_process
from glide_jax.errors import UsageError
from glide_jax.training.config import RunConfig, read_config
from glide_jax.training.export import description
from glide_jax.training.optimiser_config import check_width
from glide_jax.training.step import power_exponent
from glide_jax.weights.store import CONFIG, flatten, load_weights, save_weights

FOLDER = "ema"
# A sum whose profile is further off is refused: it is another EMA than the one asked for.
MAX_ERROR = 0.1


@dataclass(frozen=True)
class Profile:
    """Weights `w(s) = (gamma + 1) s^gamma / step^(gamma + 1)` of the steps s, 0 < s <= step.

    Attributes:
        step: the last step of the EMA.
        width: standard deviation as a share of `step`.
    """

    step: int
    width: float

    @cached_property
    def gamma(self) -> float:
        """Exponent of this width."""
        return power_exponent(self.width)


def save_ema_snapshots(config: RunConfig, step: int, emas: Iterable[Any]) -> None:
    """Write the power-function EMAs as float16 weights, `ema/<step>_<width>`.

    Does nothing except at multiples of `optimiser.ema_snapshot_every` and at the last step. A sum
    of snapshots adds up their rounding errors, and bfloat16 has an eighth of float16's precision.

    Args:
        config: the recipe.
        step: number of steps done.
        emas: `TrainState.power_emas`, whole, in every process; taken one at a time.

    Raises:
        GlideError: they cannot be written.
    """
    if step % config.optimiser.ema_snapshot_every and step != config.steps:
        return
    for width, ema in zip(config.optimiser.ema_widths, emas, strict=True):
        flat = {path: _half(array) for path, array in flatten(ema).items()}
        folder = config.folder / FOLDER / f"{step:08}_{width:g}"
        on_first_process(partial(save_weights, folder, description(config, step), flat))


def _half(array: Any) -> np.ndarray:
    """Return the array in float16, or unchanged if it has values beyond float16's range."""
    array = np.asarray(array)
    return array.astype(np.float16) if np.abs(array).max() < np.finfo(np.float16).max else array


def snapshots(run: Path) -> dict[Profile, Path]:
    """Return the snapshots that a run has saved, by step and width."""
    folders = {}
    for folder in sorted((run / FOLDER).glob("*")):
        name = re.fullmatch(r"(\d+)_([\d.e-]+)", folder.name)
        if name and (folder / CONFIG).is_file():
            folders[Profile(int(name[1]), float(name[2]))] = folder
    return folders


def inner(a: Profile, b: Profile) -> float:
    """Return `int w_a(s) w_b(s) ds` over the steps of both profiles  (EDM2, sec. 3.2).

    With `t_a <= t_b` it is `(g_a + 1) (g_b + 1) / (g_a + g_b + 1) * (t_a / t_b)^g_b / t_b`.
    """
    first, last = sorted((a, b), key=lambda profile: profile.step)
    x, y = first.gamma, last.gamma
    ratio = first.step / last.step
    return (x + 1) * (y + 1) / (x + y + 1) * ratio**y / last.step


def fit(saved: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Fit a wanted profile by a sum of saved ones, with coefficients that add up to 1.

    Least squares under this constraint  (EDM2, sec. 3.2): with `A_ij = <w_i, w_j>` and
    `b_i = <w_i, w>`, `[[A, 1], [1, 0]] [c, l] = [b, 1]`.

    Returns:
        Coefficients `(N,)` float64, and the relative error `|sum c_i w_i - w| / |w|`.
    """
    count, scale = len(saved), inner(wanted, wanted)
    gram = np.array([[inner(a, b) for b in saved] for a in saved]) / scale
    right_side = np.array([inner(a, wanted) for a in saved]) / scale
    system = np.ones((count + 1, count + 1))
    system[:count, :count], system[count, count] = gram, 0.0
    coefficients = np.linalg.lstsq(system, np.append(right_side, 1.0), rcond=None)[0][:count]
    squared_error = coefficients @ gram @ coefficients - 2 * coefficients @ right_side + 1
    return coefficients, float(np.sqrt(max(squared_error, 0.0)))


def reconstruct(
    run: Path, width: float, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    """Return the EMA of any width, from the snapshots of a run.

    Args:
        run: folder of the run.
        width: as a share of the steps up to `step`, as in `OptimiserConfig.ema_widths`.
        step: the last step of the EMA; None: the last one that was saved.

    Returns:
        Flat parameters in float32, their `config.json`, and the relative error of the profile
        (see `fit`).

    Raises:
        UsageError: the run has saved no snapshots, or none that give this EMA.
        GlideError: a snapshot is broken.
    """
    check_width(width)
    folders = snapshots(run)
    if not folders:
        raise UsageError(f"{run} has saved no EMAs: train with --optimiser.ema-widths 0.05 0.1")
    last_step = max(profile.step for profile in folders)
    wanted = Profile(last_step if step is None else step, width)
    saved = [profile for profile in folders if profile.step <= wanted.step]
    if not saved:
        first_step = min(profile.step for profile in folders)
        raise UsageError(f"the first EMAs were saved at step {first_step}, after {wanted.step}")
    coefficients, error = fit(saved, wanted)
    if error > MAX_ERROR:
        widths = sorted({profile.width for profile in saved})
        raise UsageError(
            f"{len(saved)} EMAs of width {', '.join(map(str, widths))} do not give one of "
            f"{width} at step {wanted.step} ({error:.0%} off): choose a nearer width, or save more "
            "often (--optimiser.ema-snapshot-every)"
        )
    total: dict[str, np.ndarray] = {}
    for profile, coefficient in zip(saved, coefficients, strict=True):
        _, flat, _ = load_weights(folders[profile])
        for path, array in flat.items():
            term = np.float32(coefficient) * array.astype(np.float32)
            total[path] = total[path] + term if path in total else term
    config = read_config(run / "config.json")
    return total, description(config, wanted.step) | {"ema_width": width}, error


def write_ema(run: Path, to: Path, width: float, step: int | None = None) -> float:
    """Write the result of `reconstruct` as a folder of float32 weights.

    Returns:
        The relative error of its profile.

    Raises:
        UsageError: see `reconstruct`.
        GlideError: see `reconstruct`; or the folder cannot be written.
    """
    flat, config, error = reconstruct(run, width, step)
    save_weights(to, config, flat)
    return error
