"""Samplers: each a function that writes its coefficients into a `Table`, in float64 on the host.

One linear recursion runs them all (`glide_jax.diffusion.sampling`). At each row, with x_0 the
guided prediction, history H (newest first) and anchor y:

    H <- S [u x + v x_0, *H]
    y <- Py y + Px x + B H
    x <- Qy y + Qx x + E H + (s + s_learned sqrt(variance)) z
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from glide_jax.diffusion.schedule import Schedule, posterior
from glide_jax.errors import UsageError

HISTORY = 4


class Table(NamedTuple):
    """One row a network evaluation; `(N,)` float64 unless said otherwise.

    Attributes:
        t, alpha, sigma, next_alpha, next_sigma: see `glide_jax.diffusion.guidance.Point`.
        u, v: what enters the history; (0, 1) predicts data, (1/sigma, -alpha/sigma) noise.
        S: `(N, 4, 5)`, how the history moves on: a shift, or a combination.
        Py, Px, B (N, 4): the anchor's update. Qy, Qx, E (N, 4): the update of x.
        log_beta, log_beta_tilde: ends of a learned variance.
        s, s_learned: noise, fixed or in units of the learned standard deviation.
        score_x_0, score_mean: how a score enters: `score_x_0 score` is added to x_0 (ODE rows), or
            `score_mean variance score` to x (ancestral rows, ADM algorithm 1).
        keep: 0 where what guidance remembers is forgotten, else 1.
        index, step, program: int; the row's number, the step it belongs to, and which guidance
            acts in it.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    next_alpha: np.ndarray
    next_sigma: np.ndarray
    u: np.ndarray
    v: np.ndarray
    S: np.ndarray
    Py: np.ndarray
    Px: np.ndarray
    B: np.ndarray
    Qy: np.ndarray
    Qx: np.ndarray
    E: np.ndarray
    log_beta: np.ndarray
    log_beta_tilde: np.ndarray
    s: np.ndarray
    s_learned: np.ndarray
    score_x_0: np.ndarray
    score_mean: np.ndarray
    keep: np.ndarray
    index: np.ndarray
    step: np.ndarray
    program: np.ndarray


# `(schedule, grid, breaks) -> Table`; breaks `(N,)` bool says where the history begins anew.
Solver = Callable[[Schedule, np.ndarray, np.ndarray], Table]


class Levels(NamedTuple):
    """Noise levels of a grid of N evaluations: `(N + 1,)` float64, the last one clean."""

    alpha: np.ndarray
    sigma: np.ndarray
    log_snr: np.ndarray


def levels(schedule: Schedule, grid: np.ndarray, released: bool = False) -> Levels:
    """The levels of a grid; `released` rounds alpha-bar to float32, as the released code does."""
    alpha_bar = np.append(schedule.alpha_bar_at(grid), 1.0)
    if released:
        alpha_bar = alpha_bar.astype(np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        log_snr = 0.5 * (np.log(alpha_bar) - np.log(1 - alpha_bar))
    return Levels(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), log_snr)


def one_row_a_step(schedule: Schedule, grid: np.ndarray) -> Table:
    """A table that shifts the history and predicts data, its update of x still zero."""
    n = len(grid)
    alpha, sigma, _ = levels(schedule, grid)
    zero, one = np.zeros(n), np.ones(n)
    shift = np.eye(HISTORY, HISTORY + 1)
    rows = np.arange(n)
    q = posterior(step_betas(schedule, grid))
    return Table(
        t=np.asarray(grid, np.float64),
        alpha=alpha[:-1],
        sigma=sigma[:-1],
        next_alpha=alpha[1:],
        next_sigma=sigma[1:],
        u=zero,
        v=one,
        S=np.broadcast_to(shift, (n, *shift.shape)),
        Py=zero,
        Px=zero,
        B=np.zeros((n, HISTORY)),
        Qy=zero,
        Qx=zero,
        E=np.zeros((n, HISTORY)),
        log_beta=q.log_beta[::-1],
        log_beta_tilde=q.log_beta_tilde[::-1],
        s=zero,
        s_learned=zero,
        score_x_0=sigma[:-1] ** 2 / alpha[:-1],
        score_mean=zero,
        keep=one,
        index=rows,
        step=rows,
        program=np.zeros(n, int),
    )


def step_betas(schedule: Schedule, grid: np.ndarray) -> np.ndarray:
    """Betas of the shorter chain that a grid makes, cleanest first  (Improved DDPM, eq. 19)."""
    alpha_bar = schedule.alpha_bar_at(grid[::-1])
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def _history(first: np.ndarray, *older: np.ndarray) -> np.ndarray:
    """Weights on the history, newest first, as `(N, 4)`."""
    columns = [first, *older]
    columns += [np.zeros_like(first)] * (HISTORY - len(columns))
    return np.stack(columns, axis=-1)


def ddpm(
    schedule: Schedule, grid: np.ndarray, breaks: np.ndarray, *, variance: str = "learned"
) -> Table:
    """Ancestral sampling: `x ~ N(mean(x_0, x_t), variance)`  (DDPM, algorithm 2).

    Args:
        variance: "learned" (Improved DDPM, eq. 15), or fixed: "small" (beta_tilde), "large" (beta).
    """
    table = one_row_a_step(schedule, grid)
    betas = step_betas(schedule, grid)
    q = posterior(betas)
    noisy = (np.arange(len(grid)) < len(grid) - 1).astype(float)
    fixed = {"learned": 0 * betas, "small": np.sqrt(q.beta_tilde), "large": np.sqrt(betas)}
    return table._replace(
        E=_history(q.mean_x_0[::-1]),
        Qx=q.mean_x_t[::-1],
        s=fixed[variance][::-1] * noisy,
        s_learned=noisy * (variance == "learned"),
        score_x_0=np.zeros(len(grid)),
        score_mean=np.ones(len(grid)),
    )


def ddim(
    schedule: Schedule,
    grid: np.ndarray,
    breaks: np.ndarray,
    *,
    eta: float = 0.0,
    released: bool = False,
) -> Table:
    """`x = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z`  (DDIM, 2010.02502, eq. 12).

    Args:
        eta: 0 is deterministic; 1 has the noise of ancestral sampling with beta_tilde.
        released: round alpha-bar to float32, as the released code does.
    """
    table = one_row_a_step(schedule, grid)
    alpha, sigma, _ = levels(schedule, grid, released)
    ratio = np.minimum(alpha[:-1] ** 2 / alpha[1:] ** 2, 1.0)
    s = eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - ratio)
    # At eta = 1 rounding can take the radicand below zero, where the original code makes NaNs.
    direction = np.sqrt(np.maximum(sigma[1:] ** 2 - s**2, 0.0))
    towards = direction / table.sigma
    return table._replace(Qx=towards, E=_history(alpha[1:] - towards * table.alpha), s=s)


def dpm_solver_2m(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(2M): second-order multistep on x_0  (2211.01095, algorithm 2).

    `x = (sigma'/sigma) x + alpha' (1 - e^-h) D`, `D = x_0 + (x_0 - x_0_previous) / 2r`.
    First order at the beginning, after a break, and into the clean picture.
    """
    table = one_row_a_step(schedule, grid)
    alpha, sigma, log_snr = levels(schedule, grid)
    h = np.diff(log_snr)
    first_order = breaks | (np.arange(len(grid)) == 0) | ~np.isfinite(h)
    # 1 / 2r with r = h_previous / h, the midpoint form.
    slope = np.zeros(len(grid))
    multistep = np.flatnonzero(~first_order)
    slope[multistep] = h[multistep] / (2 * h[multistep - 1])
    weight = -alpha[1:] * np.expm1(-h)
    return table._replace(
        Qx=sigma[1:] / sigma[:-1],
        E=_history(weight * (1 + slope), -weight * slope),
    )


def ddim_reverse(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """DDIM run backwards, from a picture to the noise that draws it  (DDIM, sec. 4.3; GLIDE, A.2).

    Visits the grid from its cleanest level, and ends in pure noise.
    """
    forward = one_row_a_step(schedule, grid)
    flipped = Table(*(column[::-1] for column in forward))
    noisier = np.append(flipped.alpha[1:], 0.0)
    next_sigma = np.append(flipped.sigma[1:], 1.0)
    away = next_sigma / flipped.sigma
    return flipped._replace(
        next_alpha=noisier,
        next_sigma=next_sigma,
        Qx=away,
        E=_history(noisier - away * flipped.alpha),
        index=forward.index,
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


SOLVERS: dict[str, Solver] = {
    "dpm++2m": dpm_solver_2m,
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "prk": partial(plms, runge_kutta=True),
}
