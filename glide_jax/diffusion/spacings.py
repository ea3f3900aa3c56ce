"""Spacings of noise levels: functions from a number of steps to timesteps.

The spacings return `(N,)` float64: positions in the diffusion process that the model was trained
on, strictly falling. After the last one, solvers end at the clean image (`alpha = 1`, `sigma = 0`).
Exceptions: plms and prk end at the last timestep, and ddim_reverse ends in noise.
"""

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.errors import UsageError


def respaced_timesteps(length: int, spec: str) -> np.ndarray:
    """Return the timesteps that a respacing string of OpenAI's code keeps, rising.

    "" keeps all. "100" or "10,10,3,2,2" cuts the process into equal sections and keeps that many
    evenly spaced timesteps of each, both ends included; a single one is the section's first.
    "ddim50" takes the smallest integer stride that gives 50. "fast27" is "10,10,3,2,2" with the
    last timestep two earlier  (GLIDE, B.2).

    Args:
        length: number of timesteps of the process.

    Returns:
        `(N,)` int64.

    Raises:
        UsageError: the string is not a respacing, or the process is too short for it.
    """
    if spec == "":
        return np.arange(length)
    if spec == "fast27":
        timesteps = respaced_timesteps(length, "10,10,3,2,2")
        timesteps[timesteps == length - 1] = length - 3
        return timesteps
    try:
        if spec.startswith("ddim"):
            return _strided(length, int(spec.removeprefix("ddim")))
        counts = [int(part) for part in spec.split(",")]
    except ValueError:
        raise UsageError(
            f"cannot read steps {spec!r}: write a number (100), a number per section "
            "(10,10,3,2,2), ddim50 or fast27"
        ) from None
    sections = np.array_split(np.arange(length), len(counts))
    return np.concatenate([_spread(s, k, spec) for s, k in zip(sections, counts, strict=True)])


def _strided(length: int, count: int) -> np.ndarray:
    for stride in range(1, length):
        if len(range(0, length, stride)) == count:
            return np.arange(0, length, stride)
    # A plain number is an alternative only where there are so many timesteps.
    instead = f"write {count}" if 1 <= count <= length else f"take between 1 and {length}"
    raise UsageError(
        f"ddim{count} does not exist for {length} timesteps (no integer stride gives it): {instead}"
    )


def _spread(section: np.ndarray, count: int, spec: str) -> np.ndarray:
    if not 1 <= count <= len(section):
        raise UsageError(
            f"steps {spec!r} asks for {count} of {len(section)} timesteps: take between 1 and all"
        )
    # A running sum and round-half-to-even, since the released timesteps are made of exactly these.
    stride = 1 if count == 1 else (len(section) - 1) / (count - 1)
    position, kept = 0.0, []
    for _ in range(count):
        kept.append(section[round(position)])
        position += stride
    return np.array(kept)


def respaced(schedule: Schedule, spec: str) -> np.ndarray:
    """Return the timesteps of a respacing string: see `respaced_timesteps`."""
    return respaced_timesteps(len(schedule), spec)[::-1].astype(np.float64)


# The cosine schedule is capped at its noisy end: there the error of x_0 is 20,291 times that of
# eps at t = 999, 71 times at t = 990.
NOISIEST_HALF_LOG_SNR = -5.1
# Below sigma / alpha ~ 0.006 nothing is left to remove from an 8-bit image.
CLEANEST_HALF_LOG_SNR = 5.05


def end_half_log_snrs(schedule: Schedule) -> tuple[float, float]:
    """Return log(alpha / sigma) of the noisiest and of the cleanest level of logsnr and karras."""
    low = max(schedule.half_log_snr(len(schedule) - 1), NOISIEST_HALF_LOG_SNR)
    high = min(schedule.half_log_snr(0), CLEANEST_HALF_LOG_SNR)
    return float(low), float(high)


def log_snr_uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in log(alpha / sigma)  (DPM-Solver, 2206.00927, sec. 3.4)."""
    return schedule.t_at_half_log_snr(np.linspace(*end_half_log_snrs(schedule), steps))


def uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in time, over the whole process, as in OpenAI's code.

    One step starts in noise; the respacing "1" of OpenAI's code is the cleanest timestep.
    """
    if steps == 1:
        return np.array([len(schedule) - 1.0])
    return respaced(schedule, str(steps))


def karras(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` levels evenly spaced in `(sigma / alpha)^(1/7)`  (EDM, 2206.00364, eq. 5)."""
    roots = np.exp(-np.array(end_half_log_snrs(schedule)) / 7)
    return schedule.t_at_half_log_snr(-7 * np.log(np.linspace(roots[0], roots[1], steps)))


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """`round(T - k T / N) - 1`, from the last timestep down  (2305.08891, table 2).

    Halves are rounded up: no two levels coincide.
    """
    length = len(schedule)
    remaining = np.arange(steps, 0, -1)
    return ((2 * length * remaining + steps) // (2 * steps) - 1).astype(np.float64)


def noisiest_timestep(schedule: Schedule) -> float:
    """Return the timestep, maybe fractional, of the noisiest level of logsnr and karras."""
    return float(schedule.t_at_half_log_snr(end_half_log_snrs(schedule)[0]))


def trailing_capped(schedule: Schedule, steps: int) -> np.ndarray:
    """`L k / N - 1` for k = N ... 1, where `L - 1` is `noisiest_timestep`.

    For few steps. Like `trailing`, but without the noisiest timesteps of the cosine schedule, where
    nothing is left of the image. With more than L steps, they are evenly spaced from L - 1 to 0.
    """
    length = noisiest_timestep(schedule) + 1
    if steps > length:  # the cleanest levels would be below 0
        return np.linspace(length - 1, 0, steps)
    return length * np.arange(steps, 0, -1) / steps - 1
