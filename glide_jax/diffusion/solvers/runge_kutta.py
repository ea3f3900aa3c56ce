"""Samplers with several network evaluations per step: Heun, DPM-Solver++(2S), PLMS and PRK."""

from typing import Any

import numpy as np

from glide_jax.diffusion.schedule import Schedule, x_0_per_gradient
from glide_jax.diffusion.solvers.table import (
    HISTORY,
    Table,
    levels,
    on_history,
    one_row_per_step,
    predicting_noise,
)
from glide_jax.errors import UsageError


def two_rows_per_step(
    schedule: Schedule, timesteps: np.ndarray, second: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[Table, np.ndarray]:
    """Return a table with two rows per step (one for the last), and which rows are second ones.

    The first row of a step keeps x as the anchor.

    Args:
        second: `t`, `alpha`, `sigma` of each step's second evaluation, each `(N - 1,)`.
    """
    row = np.arange(2 * len(timesteps) - 1)
    is_second = row % 2 == 1
    table = one_row_per_step(schedule, timesteps).rows(row // 2)
    for name, values in zip(("t", "alpha", "sigma"), second, strict=True):
        column = getattr(table, name).copy()
        column[is_second] = values
        table = table._replace(**{name: column})
    factor = x_0_per_gradient(table.alpha, table.sigma)
    table = table._replace(
        Px=1.0 - is_second, Py=1.0 * is_second, x_0_per_gradient=factor, index=row
    )
    return table, is_second


def heun(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """Heun's method: `x'/alpha' = x/alpha + (rho' - rho) (eps + eps')/2`, `rho = sigma/alpha`.

    `eps'` is the prediction at the end of a first-order step  (EDM, 2206.00364, algorithm 1).
    N steps take 2 N - 1 evaluations.
    """
    alpha, sigma, _ = levels(schedule, timesteps)
    table, is_second = two_rows_per_step(
        schedule, timesteps, (timesteps[1:], alpha[1:-1], sigma[1:-1])
    )
    a, next_a = alpha[table.step], table.next_alpha
    slope = table.next_sigma - next_a * sigma[table.step] / a
    return predicting_noise(table)._replace(
        Qx=np.where(is_second, 0.0, next_a / a),
        Qy=np.where(is_second, next_a / a, 0.0),
        E=on_history(np.where(is_second, slope / 2, slope), np.where(is_second, slope / 2, 0.0)),
    )


def dpm_solver_2s(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(2S): `x' = (sigma'/sigma) x + alpha' (1 - e^-h) x_0(middle)`  (2211.01095).

    A first-order step leads to the middle of the step in log(alpha/sigma), where the second
    evaluation is (algorithm 1 with r = 1/2). N steps take 2 N - 1 evaluations.
    """
    alpha, sigma, half_log_snr = levels(schedule, timesteps)
    middle = (half_log_snr[1:-1] + half_log_snr[:-2]) / 2
    a, s = 1 / np.sqrt(1 + np.exp(-2 * middle)), 1 / np.sqrt(1 + np.exp(2 * middle))
    table, is_second = two_rows_per_step(
        schedule, timesteps, (schedule.t_at_half_log_snr(middle), a, s)
    )
    # The level that each row leads to: the middle, then the end.
    target_alpha, target_sigma = table.next_alpha.copy(), table.next_sigma.copy()
    target_alpha[:-1:2], target_sigma[:-1:2] = a, s
    ratio = target_sigma / sigma[table.step]
    return table._replace(
        Qx=np.where(is_second, 0.0, ratio),
        Qy=np.where(is_second, ratio, 0.0),
        E=on_history(target_alpha - ratio * alpha[table.step]),
    )


# --- PLMS and PRK

# The matrices S, `history = S [entry, *history]`. A multistep row shifts the history of slopes.
SHIFT = np.eye(HISTORY, HISTORY + 1)
# Within a Runge-Kutta step the history is (slope, sum of slopes so far, slopes of the two steps
# before). The sum k_1 + 2 k_2 + 2 k_3 + k_4 grows row by row; a sixth of it is the step's slope.
FIRST_STAGE = np.array(
    [
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
    ],
    np.float64,
)
INNER_STAGE = np.array(
    [
        [1, 0, 0, 0, 0],
        [2, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ],
    np.float64,
)
LAST_STAGE = np.array(
    [
        [1 / 6, 0, 1 / 6, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ],
    np.float64,
)
ADAMS_BASHFORTH_4 = np.array([55, -59, 37, -9]) / 24

# A noise level with its timestep: `(t, alpha, sigma)`.
NoiseLevel = tuple[float, float, float]


def _row(
    step: int,
    start: NoiseLevel,
    point: NoiseLevel,
    target: NoiseLevel,
    end: NoiseLevel,
    S: np.ndarray,
    slopes: np.ndarray,
    multistep: bool,
) -> dict[str, Any]:
    """Return a row that evaluates eps at `point` and leads from a step's `start` to `target`.

    `x' = (alpha' / alpha) x + (sigma' - alpha' sigma / alpha) sum slopes_i eps_i`, from `start` to
    `target`, which has the primes.
    """
    (_, alpha, sigma), (_, target_alpha, target_sigma) = start, target
    change = target_sigma - target_alpha * sigma / alpha
    return {
        "step": step,
        **dict(zip(("t", "alpha", "sigma"), point, strict=True)),
        "next_alpha": end[1],
        "next_sigma": end[2],
        "S": S,
        "E": change * np.pad(slopes, (0, HISTORY - len(slopes))),
        "Qx" if multistep else "Qy": target_alpha / alpha,
    }


def _multistep_rows(step: int, start: NoiseLevel, end: NoiseLevel) -> list[dict[str, Any]]:
    return [_row(step, start, start, end, end, SHIFT, ADAMS_BASHFORTH_4, multistep=True)]


def _runge_kutta_rows(
    step: int, start: NoiseLevel, middle: NoiseLevel, end: NoiseLevel
) -> list[dict[str, Any]]:
    # The anchor y keeps x at the start of the step.
    newest = np.ones(1)
    return [
        _row(step, start, start, middle, end, FIRST_STAGE, newest, multistep=False) | {"Px": 1.0},
        _row(step, start, middle, middle, end, INNER_STAGE, newest, multistep=False) | {"Py": 1.0},
        _row(step, start, middle, end, end, INNER_STAGE, newest, multistep=False) | {"Py": 1.0},
        _row(step, start, end, end, end, LAST_STAGE, newest, multistep=False) | {"Py": 1.0},
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of rows whose history holds noise; columns that a row leaves out are zero."""
    empty = {"S": np.zeros((HISTORY, HISTORY + 1)), "B": np.zeros(HISTORY), "E": np.zeros(HISTORY)}
    defaults = {"keep": 1.0, "index": 0, "step": 0, "guidance_set": 0}
    columns = {
        name: np.array([row.get(name, defaults.get(name, empty.get(name, 0.0))) for row in rows])
        for name in Table._fields
    }
    table = Table(**columns)
    return predicting_noise(table)._replace(
        x_0_per_gradient=x_0_per_gradient(table.alpha, table.sigma), index=np.arange(len(rows))
    )


def plms(
    schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray, *, runge_kutta: bool = False
) -> Table:
    """Pseudo linear multistep on the noise, warmed up by Runge-Kutta  (PNDM, 2202.09778).

    As in the forks of OpenAI's code: levels between two steps interpolate alpha-bar, the first
    level of the timesteps is left out, and so is the step from the last level to the clean image.
    So N levels make N - 2 steps, and the image keeps the noise of the cleanest level. The first
    three steps take four evaluations each.

    Args:
        runge_kutta: every step by Runge-Kutta (PRK), with four evaluations each.

    Raises:
        UsageError: fewer than three levels.
    """
    if len(timesteps) < 3:
        name = "prk" if runge_kutta else "plms"
        raise UsageError(f"{name} needs at least three levels, not {len(timesteps)}")
    alpha_bar = schedule.alpha_bar_at(timesteps)

    def between(i: int, j: int) -> NoiseLevel:
        alpha_bar_between = (alpha_bar[i] + alpha_bar[j]) / 2
        return (
            (timesteps[i] + timesteps[j]) / 2,
            np.sqrt(alpha_bar_between),
            np.sqrt(1 - alpha_bar_between),
        )

    rows, history_length = [], 0
    for i in range(1, len(timesteps) - 1):
        history_length = 0 if breaks[i] else history_length
        start, middle, end = between(i, i), between(i, i + 1), between(i + 1, i + 1)
        if history_length >= 3 and not runge_kutta:
            rows += _multistep_rows(i, start, end)
        else:
            rows += _runge_kutta_rows(i, start, middle, end)
        history_length += 1
    return _table(rows)
