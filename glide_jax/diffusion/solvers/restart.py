"""Samplers that go back: Restart and RePaint, for any solver, as rows of the same table."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import Solver, Table, levels
from glide_jax.errors import UsageError


def restart(solver: Solver, spans: Sequence[tuple[float, float, int]]) -> Solver:
    """A solver that goes back up through each span, with fresh noise, and down again
    (Restart, 2306.14878).

    Args:
        spans: `(low, high, times)`, noise levels sigma / alpha, each taken at the nearest level of
            the grid: whenever low is reached, x goes back up to high, `times` times.

    Raises:
        UsageError: a span is none; or, when it runs, lies within one step of the grid.
    """
    for low, high, times in spans:
        if not (0 < low < high and times >= 1):
            raise UsageError(
                f"a restart needs 0 < low < high and at least one time, not {(low, high, times)}"
            )

    def restarted(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
        rising = levels(schedule, grid).log_snr[:-1]

        def nearest_step(level):
            return int(np.abs(rising + np.log(level)).argmin())

        jumps = []
        for low, high, times in spans:
            bottom, top = nearest_step(low), nearest_step(high)
            if bottom == top:
                raise UsageError(
                    f"restart from {low} to {high}: the grid has no step there; take more steps"
                )
            jumps += [(bottom, top)] * times
        return with_jumps(solver, schedule, grid, breaks, sorted(jumps, key=lambda jump: jump[0]))

    return restarted


def repaint(solver: Solver, jump: int = 10, times: int = 10) -> Solver:
    """A solver that goes back up after every `jump` steps and does them again, `times` times in
    all, so that what is drawn and what is known agree  (RePaint, 2201.09865, sec. 4.2).

    Raises:
        UsageError: `jump` or `times` is none; or, when it runs, the grid has no `jump` steps.
    """
    if jump < 1 or times < 1:
        raise UsageError(f"repaint needs a jump and times of at least 1, not {jump} and {times}")

    def repainted(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
        if len(grid) <= jump:
            raise UsageError(f"repaint goes back {jump} steps: take more than {len(grid)}")
        # Counted from the cleanest level, which is visited `times` times too.
        bottoms = range(jump + (len(grid) - 1) % jump, len(grid), jump)
        jumps = [(bottom, bottom - jump) for bottom in bottoms for _ in range(times - 1)]
        return with_jumps(solver, schedule, grid, breaks, jumps)

    return repainted


def with_jumps(
    solver: Solver,
    schedule: Schedule,
    grid: np.ndarray,
    breaks: np.ndarray,
    jumps: Sequence[tuple[int, int]],
) -> Table:
    """The solver's table, going back from step to step in turn; the history begins anew each time.

    Args:
        jumps: `(bottom, top)`, numbers of steps, bottoms never falling.
    """
    starts = [0, *(top for _, top in jumps)]
    ends = [*(bottom for bottom, _ in jumps), len(grid)]
    tables: dict[int, Table] = {}
    parts = []
    for start, end in zip(starts, ends, strict=True):
        if start not in tables:
            tables[start] = solver(schedule, grid, breaks | (np.arange(len(grid)) == start))
        table = tables[start]
        part = table.rows((start <= table.step) & (table.step < end))
        if not len(part.t):
            raise UsageError("the sampler has no step between two levels of a jump")
        parts.append(part)
    parts = [back(part, after) for part, after in pairwise(parts)] + parts[-1:]
    table = Table(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    anew = np.cumsum([len(part.t) for part in parts[:-1]], dtype=int)
    keep = table.keep.copy()
    keep[anew] = 0.0
    return table._replace(keep=keep, index=np.arange(len(keep)))


# What a jump changes in the row that it follows.
MOVED = ("Qy", "Qx", "E", "s", "s_learned", "score_mean", "log_beta", "log_beta_tilde")


def back(part: Table, after: Table) -> Table:
    """Rows whose last goes on to the level where `after` begins:

    `x <- g x + sqrt(sigma_top^2 - g^2 sigma^2) z`, `g = alpha_top / alpha`.

    The two noises of that row are drawn as one. Of a learned variance the ends are moved: exact at
    either end, and between them to the curvature of a logarithm.
    """
    columns = {name: getattr(part, name).astype(np.float64) for name in MOVED}
    last = {name: column[-1] for name, column in columns.items()}
    g = after.alpha[0] / part.next_alpha[-1]
    fresh = after.sigma[0] ** 2 - (g * part.next_sigma[-1]) ** 2
    moved = {name: g * last[name] for name in ("Qy", "Qx", "E", "score_mean")}
    if last["s_learned"]:
        ends = ("log_beta", "log_beta_tilde")
        moved |= {name: np.log(g**2 * np.exp(last[name]) + fresh) for name in ends}
        # The score still enters by the learned variance alone.
        moved["score_mean"] *= np.exp(sum(last[name] - moved[name] for name in ends) / 2)
    else:
        moved["s"] = np.hypot(g * last["s"], np.sqrt(fresh))
    for name, value in moved.items():
        columns[name][-1] = value
    return part._replace(**columns)
