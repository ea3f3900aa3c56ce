"""Restart and RePaint: return to a noisier level and repeat the steps, with any solver."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import Solver, Table, levels
from glide_jax.errors import UsageError


def restart(solver: Solver, intervals: Sequence[tuple[float, float, int]]) -> Solver:
    """Restart: a solver that repeats intervals of noise levels with fresh noise  (2306.14878).

    Args:
        intervals: `(low, high, repeats)`, low and high as noise levels sigma / alpha. Each is moved
            to the nearest of the timesteps. When x reaches low, fresh noise brings it back to
            high, and the steps from high to low are run again. `repeats` is the number of these
            repetitions.

    Raises:
        UsageError: not `0 < low < high`, or `repeats` is below 1. The solver raises it too, where
            the timesteps have no step between low and high.
    """
    for low, high, repeats in intervals:
        if not (0 < low < high and repeats >= 1):
            raise UsageError(
                "a restart needs 0 < low < high and repeats of at least 1, "
                f"not {(low, high, repeats)}"
            )

    def restarted(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
        half_log_snrs = levels(schedule, timesteps).half_log_snr[:-1]

        def nearest_step(noise_level: float) -> int:
            return int(np.abs(half_log_snrs + np.log(noise_level)).argmin())

        jumps = []
        for low, high, repeats in intervals:
            bottom, top = nearest_step(low), nearest_step(high)
            if bottom == top:
                raise UsageError(
                    f"restart from {low} to {high}: no step lies between them, take more steps"
                )
            jumps += [(bottom, top)] * repeats
        return add_jumps(
            solver, schedule, timesteps, breaks, sorted(jumps, key=lambda jump: jump[0])
        )

    return restarted


def repaint(solver: Solver, jump: int = 10, resamplings: int = 10) -> Solver:
    """RePaint: run each block of `jump` steps several times  (2201.09865, sec. 4.2).

    Fresh noise brings x back between the repetitions. They make the generated region agree with the
    known one.

    Args:
        jump: jump length in steps.
        resamplings: how often each block is run in all; 1 repeats none.

    Raises:
        UsageError: `jump` or `resamplings` is below 1. The solver raises it too, where the
            timesteps have no more than `jump` levels.
    """
    if jump < 1 or resamplings < 1:
        raise UsageError(
            f"repaint needs a jump and resamplings of at least 1, not {jump} and {resamplings}"
        )

    def repainted(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
        if len(timesteps) <= jump:
            raise UsageError(
                f"repaint jumps back {jump} steps: take more steps than {len(timesteps)}"
            )
        # Jumps are counted back from the cleanest level, so that the last block is repeated too.
        bottoms = range(jump + (len(timesteps) - 1) % jump, len(timesteps), jump)
        jumps = [(bottom, bottom - jump) for bottom in bottoms for _ in range(resamplings - 1)]
        return add_jumps(solver, schedule, timesteps, breaks, jumps)

    return repainted


def add_jumps(
    solver: Solver,
    schedule: Schedule,
    timesteps: np.ndarray,
    breaks: np.ndarray,
    jumps: Sequence[tuple[int, int]],
) -> Table:
    """Return the solver's table with jumps back to earlier steps; each jump resets the history.

    Args:
        jumps: `(bottom, top)`, indices of steps, in the order of the run: from the level that step
            `bottom` starts at, back to the level that step `top` starts at. Sorted by `bottom`.

    Raises:
        UsageError: the sampler has no row between two levels of a jump.
    """
    starts = [0, *(top for _, top in jumps)]
    ends = [*(bottom for bottom, _ in jumps), len(timesteps)]
    tables: dict[int, Table] = {}
    segments = []
    for start, end in zip(starts, ends, strict=True):
        if start not in tables:
            tables[start] = solver(
                schedule, timesteps, breaks | (np.arange(len(timesteps)) == start)
            )
        table = tables[start]
        segment = table.rows((start <= table.step) & (table.step < end))
        if not len(segment.t):
            raise UsageError(
                "this sampler has no step between the two levels of a jump: take longer jumps"
            )
        segments.append(segment)
    segments = [jump_back(segment, after) for segment, after in pairwise(segments)] + segments[-1:]
    table = Table(*(np.concatenate(columns) for columns in zip(*segments, strict=True)))
    first_rows = np.cumsum([len(segment.t) for segment in segments[:-1]], dtype=int)
    keep = table.keep.copy()
    keep[first_rows] = 0.0
    return table._replace(keep=keep, index=np.arange(len(keep)))


# The columns that a jump changes in the row before it.
JUMP_COLUMNS = (
    "Qy",
    "Qx",
    "E",
    "s",
    "s_learned",
    "mean_per_gradient",
    "log_beta",
    "log_beta_tilde",
)


def jump_back(segment: Table, after: Table) -> Table:
    """Extend the last row of a segment to the noise level where the segment `after` starts.

    `x <- shrink x + sqrt(sigma_top^2 - shrink^2 sigma^2) z`, `shrink = alpha_top / alpha`.

    The noise of the row and the noise of the jump are sampled as one. Where the variance is
    learned, the jump moves both ends of its range. That is exact at the two ends; between them the
    log of the total variance is taken as linear in the variance fraction.
    """
    columns = {name: getattr(segment, name).astype(np.float64) for name in JUMP_COLUMNS}
    last = {name: column[-1] for name, column in columns.items()}
    shrink = after.alpha[0] / segment.next_alpha[-1]
    fresh_variance = after.sigma[0] ** 2 - (shrink * segment.next_sigma[-1]) ** 2
    changed = {name: shrink * last[name] for name in ("Qy", "Qx", "E", "mean_per_gradient")}
    if last["s_learned"]:
        ends = ("log_beta", "log_beta_tilde")
        changed |= {name: np.log(shrink**2 * np.exp(last[name]) + fresh_variance) for name in ends}
        # `run_rows` scales the gradient by the variance, which now includes the fresh noise. This
        # factor removes the fresh noise again: exactly where the variance fraction is 1/2.
        changed["mean_per_gradient"] *= np.exp(sum(last[name] - changed[name] for name in ends) / 2)
    else:
        changed["s"] = np.hypot(shrink * last["s"], np.sqrt(fresh_variance))
    for name, value in changed.items():
        columns[name][-1] = value
    return segment._replace(**columns)
