"""Which noise levels a sampler visits: lists of timesteps, noisiest first.

A grid is `(N,)` float64 of timesteps in the original chain, strictly falling; every solver
ends it at the clean picture (`alpha = 1`, `sigma = 0`).
"""

from collections.abc import Callable

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.table import Solver
from glide_jax.errors import UsageError, nearest


def respaced_steps(length: int, spec: str) -> np.ndarray:
    """The steps of a chain that a respacing string of the release keeps, rising.

    "" keeps all; "100" or "10,10,3,2,2" cuts the chain into equal sections and takes so
    many evenly spaced steps of each, its ends included; "ddim50" takes the smallest whole stride
    that gives 50; "fast27" is "10,10,3,2,2" with the last step two earlier (GLIDE, B.2).

    Returns:
        `(N,)` int64.

    Raises:
        UsageError: the string is no such thing, or the chain is too short for it.
    """
    if spec == "":
        return np.arange(length)
    if spec == "fast27":
        steps = respaced_steps(length, "10,10,3,2,2")
        steps[steps == length - 1] = length - 3
        return steps
    try:
        if spec.startswith("ddim"):
            return _strided(length, int(spec.removeprefix("ddim")))
        counts = [int(part) for part in spec.split(",")]
    except ValueError:
        raise UsageError(
            f"unknown spacing {spec!r}: write a number (100), one for each section "
            "(10,10,3,2,2), ddim50 or fast27"
        ) from None
    sections = np.array_split(np.arange(length), len(counts))
    return np.concatenate([_spread(s, k, spec) for s, k in zip(sections, counts, strict=True)])


def _strided(length: int, count: int) -> np.ndarray:
    for stride in range(1, length):
        if len(range(0, length, stride)) == count:
            return np.arange(0, length, stride)
    raise UsageError(f"no whole stride takes {count} steps of a chain of {length}: try {count}")


def _spread(section: np.ndarray, count: int, spec: str) -> np.ndarray:
    if not 1 <= count <= len(section):
        raise UsageError(
            f"spacing {spec!r} asks for {count} of {len(section)} steps: take between 1 and all"
        )
    # A running sum and round-half-to-even, since the released grids are made of exactly these.
    stride = 1 if count == 1 else (len(section) - 1) / (count - 1)
    position, kept = 0.0, []
    for _ in range(count):
        kept.append(section[round(position)])
        position += stride
    return np.array(kept)


def respaced(schedule: Schedule, spec: str) -> np.ndarray:
    """The grid of a respacing string: see `respaced_steps`."""
    return respaced_steps(len(schedule), spec)[::-1].astype(np.float64)


# The cosine schedule is capped at its noisy end: there the error of x_0 is 20,291 times that of
# eps at t = 999, 71 times at t = 990.
NOISIEST_LOG_SNR = -5.1
# Below sigma / alpha ~ 0.006 nothing is left to remove from an 8-bit picture.
CLEANEST_LOG_SNR = 5.05


def end_levels(schedule: Schedule) -> tuple[float, float]:
    """Log-SNR of the noisiest and of the cleanest level that is worth a visit."""
    low = max(schedule.log_snr(len(schedule) - 1), NOISIEST_LOG_SNR)
    high = min(schedule.log_snr(0), CLEANEST_LOG_SNR)
    return float(low), float(high)


def log_snr_uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in log(alpha / sigma)  (DPM-Solver, 2206.00927, sec. 3.4)."""
    return schedule.at_log_snr(np.linspace(*end_levels(schedule), steps))


def uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in time, from end to end of the chain, as in the release."""
    return respaced(schedule, str(steps))


def rho(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in `(sigma / alpha)^(1/7)`  (EDM, 2206.00364, eq. 5)."""
    roots = np.exp(-np.array(end_levels(schedule)) / 7)
    return schedule.at_log_snr(-7 * np.log(np.linspace(*roots, steps)))


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """`round(T - k T / N) - 1`: from the end of the chain down  (2305.08891, table 2).

    Halves are rounded up, so that no two fall together.
    """
    length = len(schedule)
    left = np.arange(steps, 0, -1)
    return ((2 * length * left + steps) // (2 * steps) - 1).astype(np.float64)


def optimised(schedule: Schedule, steps: int, solver: Solver | None = None) -> np.ndarray:
    """`steps` levels at which a solver errs least: see `glide_jax.diffusion.optimised`."""
    # Not at the top: that module builds on this one.
    from glide_jax.diffusion.optimised import optimised_grid

    return optimised_grid(schedule, steps, solver)


SPACINGS: dict[str, Callable[..., np.ndarray]] = {
    "logsnr": log_snr_uniform,
    "uniform": uniform,
    "rho": rho,
    "trailing": trailing,
    "optimised": optimised,
}


def make_grid(
    schedule: Schedule, steps: int | str, spacing: str = "logsnr", *, solver: Solver | None = None
) -> np.ndarray:
    """The grid for `steps` levels.

    Args:
        steps: a number, or a respacing string of the release ("100", "ddim50", "fast27").
        spacing: for a number, one of `SPACINGS`: "logsnr" (even in log signal-to-noise), "uniform"
            (the release's even steps), "rho" (EDM), "trailing", or "optimised" (for `solver`); for
            a string of the release it is not used.
        solver: that the grid is for; None: dpm++2m.

    Raises:
        UsageError: zero steps, an unknown spacing, or a grid that the chain cannot hold.
    """
    if isinstance(steps, str) and not steps.isdecimal():
        return respaced(schedule, steps)
    steps = int(steps)
    if steps < 1:
        raise UsageError(f"sampling needs at least one step, not {steps}")
    if spacing not in SPACINGS:
        raise UsageError(
            f"unknown spacing {spacing!r}{nearest(spacing, SPACINGS)}: "
            f"choose one of {', '.join(SPACINGS)}"
        )
    if steps > len(schedule):
        length = len(schedule)
        raise UsageError(f"cannot take {steps} of {length} steps: take at most {length}")
    if spacing == "optimised":
        return optimised(schedule, steps, solver)
    return SPACINGS[spacing](schedule, steps)
