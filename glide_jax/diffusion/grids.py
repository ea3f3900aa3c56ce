"""Which noise levels a sampler visits: lists of timesteps, noisiest first.

A grid is `(N,)` float64 of timesteps in the original chain, strictly falling; every solver
ends it at the clean picture (`alpha = 1`, `sigma = 0`).
"""

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.errors import UsageError


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
            "(10,10,3,2,2), ddim50, fast27 or logsnr"
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


def log_snr_uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in log(alpha / sigma)  (DPM-Solver, 2206.00927, sec. 3.4)."""
    if steps < 1:
        raise UsageError(f"sampling needs at least one step, not {steps}")
    if steps > len(schedule):
        raise UsageError(f"{steps} steps are more than the chain has: at most {len(schedule)}")
    low = max(schedule.log_snr(len(schedule) - 1), NOISIEST_LOG_SNR)
    high = min(schedule.log_snr(0), CLEANEST_LOG_SNR)
    levels = np.linspace(low, high, steps) if steps > 1 else np.array([low])
    return schedule.at_log_snr(levels)


def make_grid(schedule: Schedule, steps: int | str, spacing: str = "logsnr") -> np.ndarray:
    """The grid for `steps` evaluations.

    Args:
        steps: a number, or a respacing string of the release ("100", "ddim50", "fast27").
        spacing: for a number, "logsnr" or "uniform" (the release's even steps); for a string of the
            release it is not used.

    Raises:
        UsageError: zero steps, an unknown spacing, or a grid that the chain cannot hold.
    """
    if isinstance(steps, str) and not steps.isdecimal():
        return respaced(schedule, steps)
    steps = int(steps)
    if steps < 1:
        raise UsageError(f"sampling needs at least one step, not {steps}")
    if spacing == "logsnr":
        return log_snr_uniform(schedule, steps)
    if spacing == "uniform":
        return respaced(schedule, str(steps))
    raise UsageError(f"unknown spacing {spacing!r}: choose logsnr or uniform")
