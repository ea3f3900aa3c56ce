"""Samplers whose steps take several evaluations: Heun, DPM-Solver++(2S), PLMS and PRK."""

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.table import (
    HISTORY,
    Table,
    levels,
    on_history,
    one_row_a_step,
    predicting_noise,
)
from glide_jax.errors import UsageError


def two_rows_a_step(
    schedule: Schedule, grid: np.ndarray, second: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[Table, np.ndarray]:
    """Two rows for each step but the last, which has one; and which rows are second ones.

    The first row keeps x as the anchor.

    Args:
        second: `t`, `alpha`, `sigma` of each step's second evaluation, each `(N - 1,)`.
    """
    row = np.arange(2 * len(grid) - 1)
    again = row % 2 == 1
    table = one_row_a_step(schedule, grid).rows(row // 2)
    for name, values in zip(("t", "alpha", "sigma"), second, strict=True):
        column = getattr(table, name).copy()
        column[again] = values
        table = table._replace(**{name: column})
    score_x_0 = table.sigma**2 / table.alpha
    table = table._replace(Px=1.0 - again, Py=1.0 * again, score_x_0=score_x_0, index=row)
    return table, again


def heun(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """`x'/alpha' = x/alpha + (rho' - rho) (eps + eps')/2`, `rho = sigma/alpha`: Heun's method, eps'
    from the end of a step without it  (EDM, 2206.00364, algorithm 1).

    N levels take 2 N - 1 evaluations.
    """
    alpha, sigma, _ = levels(schedule, grid)
    table, again = two_rows_a_step(schedule, grid, (grid[1:], alpha[1:-1], sigma[1:-1]))
    a, next_a = alpha[table.step], table.next_alpha
    slope = table.next_sigma - next_a * sigma[table.step] / a
    return predicting_noise(table)._replace(
        Qx=np.where(again, 0.0, next_a / a),
        Qy=np.where(again, next_a / a, 0.0),
        E=on_history(np.where(again, slope / 2, slope), np.where(again, slope / 2, 0.0)),
    )


def dpm_solver_2s(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """`x' = (sigma'/sigma) x + alpha' (1 - e^-h) x_0(middle)`, the middle of the step in log-SNR,
    whither one of first order goes  (DPM-Solver++(2S), 2211.01095, algorithm 1, r = 1/2).

    N levels take 2 N - 1 evaluations.
    """
    alpha, sigma, log_snr = levels(schedule, grid)
    middle = (log_snr[1:-1] + log_snr[:-2]) / 2
    a, s = 1 / np.sqrt(1 + np.exp(-2 * middle)), 1 / np.sqrt(1 + np.exp(2 * middle))
    table, again = two_rows_a_step(schedule, grid, (schedule.at_log_snr(middle), a, s))
    # Where each row goes: the middle, the end.
    to_a, to_s = table.next_alpha.copy(), table.next_sigma.copy()
    to_a[:-1:2], to_s[:-1:2] = a, s
    ratio = to_s / sigma[table.step]
    return table._replace(
        Qx=np.where(again, 0.0, ratio),
        Qy=np.where(again, ratio, 0.0),
        E=on_history(to_a - ratio * alpha[table.step]),
    )


def _rows(rows: list[dict]) -> Table:
    """A table from rows that predict noise; columns left out are zero."""
    empty = {"S": np.zeros((HISTORY, HISTORY + 1)), "B": np.zeros(HISTORY), "E": np.zeros(HISTORY)}
    whole = {"keep": 1.0, "index": 0, "step": 0, "program": 0}
    columns = {
        name: np.array([row.get(name, whole.get(name, empty.get(name, 0.0))) for row in rows])
        for name in Table._fields
    }
    table = Table(**columns)
    return table._replace(
        u=1 / table.sigma,
        v=-table.alpha / table.sigma,
        score_x_0=table.sigma**2 / table.alpha,
        index=np.arange(len(rows)),
    )


def _step_rows(step: int, points: list[tuple], multistep: bool) -> list[dict]:
    """Rows of a step of PLMS or PRK; `points` are `(t, alpha, sigma)` at start, middle, end."""
    (_, a, s), (_, next_a, next_s) = points[0], points[-1]

    def evaluate(point, to, moves, weights, **more):
        # Transfer of x from the step's start along a slope: alpha'/alpha x + (...) eps.
        _, to_a, to_s = to
        slope = to_s - to_a * s / a
        at = dict(zip(("t", "alpha", "sigma"), point, strict=True))
        at |= {"step": step, "next_alpha": next_a, "next_sigma": next_s}
        history = np.zeros((HISTORY, HISTORY + 1))
        for place, (column, weight) in moves:
            history[place, column] = weight
        x_from = "Qx" if multistep else "Qy"
        towards = {
            x_from: to_a / a,
            "E": slope * np.pad(weights, (0, HISTORY - len(weights))),
        }
        return at | towards | {"S": history} | more

    start, middle, end = points
    if multistep:
        shift = [(i, (i, 1.0)) for i in range(HISTORY)]
        return [evaluate(start, end, shift, np.array([55, -59, 37, -9]) / 24)]
    # Within a step the history holds the slope, the sum so far, and two slopes of steps before.
    old = [(2, (3, 1.0)), (3, (4, 1.0))]
    first = [(0, (0, 1.0)), (1, (0, 1.0)), (2, (1, 1.0)), (3, (2, 1.0))]
    inner = [(0, (0, 1.0)), (1, (0, 2.0)), (1, (2, 1.0)), *old]
    last = [(0, (0, 1 / 6)), (0, (2, 1 / 6)), (1, (3, 1.0)), (2, (4, 1.0))]
    return [
        evaluate(start, middle, first, [1], Px=1.0),
        evaluate(middle, middle, inner, [1], Py=1.0),
        evaluate(middle, end, inner, [1], Py=1.0),
        evaluate(end, end, last, [1], Py=1.0),
    ]


def plms(
    schedule: Schedule, grid: np.ndarray, breaks: np.ndarray, *, runge_kutta: bool = False
) -> Table:
    """Pseudo linear multistep on the noise, warmed up by Runge-Kutta  (PNDM, 2202.09778).

    As in the forks of the released code: levels between two steps interpolate alpha-bar, and
    the first and the last level of the grid are left out, so that N levels make N - 2 steps and the
    picture keeps the noise of the cleanest one.

    Args:
        runge_kutta: every step by Runge-Kutta (PRK), four evaluations each.

    Raises:
        UsageError: fewer than three levels.
    """
    if len(grid) < 3:
        raise UsageError(f"plms needs at least three levels, not {len(grid)}")
    alpha_bar = schedule.alpha_bar_at(grid)

    def point(i, j):
        level = (alpha_bar[i] + alpha_bar[j]) / 2
        return (grid[i] + grid[j]) / 2, np.sqrt(level), np.sqrt(1 - level)

    rows, since = [], 0
    for i in range(1, len(grid) - 1):
        since = 0 if breaks[i] else since
        points = [point(i, i), point(i, i + 1), point(i + 1, i + 1)]
        rows += _step_rows(i, points, multistep=since >= 3 and not runge_kutta)
        since += 1
    return _rows(rows)
