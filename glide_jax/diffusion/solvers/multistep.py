"""Multistep samplers: a polynomial through the last predictions, integrated over the step.

One network evaluation per step. There are two families, by what is interpolated: the prediction of
the clean image over log-SNR (`exponential`), or the noise (`noise_multistep`). At the beginning, and
after a break, the polynomial has as many nodes as there are predictions. The last step, to the clean
image, is infinitely long in log-SNR and uses the newest prediction alone.
"""

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import (
    HISTORY,
    Table,
    ages,
    levels,
    one_row_per_step,
    predicting_noise,
)
from glide_jax.errors import UsageError

# Gauss-Legendre on [0, 1]: exact to rounding for a cubic times an exponential that falls by e^-30
# over the step; a step over the whole of the cosine schedule, with noise, falls by e^-30.
PLACES, SHARES = np.polynomial.legendre.leggauss(32)
PLACES, SHARES = (PLACES + 1) / 2, SHARES / 2


def interpolating(nodes: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`w (R, K)` with `sum_j w_j f(nodes_j) = sum_q weights_q p(points_q)`, p through f (Lagrange).

    Args:
        nodes: `(R, K)`, distinct in each row; points, weights: `(R, Q)`.
    """
    count = nodes.shape[1]
    columns = []
    for j in range(count):
        basis = weights
        for k in range(count):
            if k != j:
                basis = basis * (points - nodes[:, k, None]) / (nodes[:, j] - nodes[:, k])[:, None]
        columns.append(basis.sum(axis=1))
    return np.stack(columns, axis=1)


def on_predictions(
    at: np.ndarray, newest: np.ndarray, counts: np.ndarray, points: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weights `(R, 4)` on the history of the integral that `points` and `weights (R, Q)` are.

    Args:
        at: where each step's prediction stands; newest: `(R,)`, the row's newest prediction;
            counts: `(R,)`, how many it uses.
    """
    found = np.zeros((len(counts), HISTORY))
    for count in range(1, HISTORY + 1):
        rows = np.flatnonzero(counts == count)
        nodes = at[newest[rows, None] - np.arange(count)]
        found[rows, :count] = interpolating(nodes, points[rows], weights[rows])
    return found


def exponential(
    schedule: Schedule,
    grid: np.ndarray,
    breaks: np.ndarray,
    *,
    predictor: int,
    corrector: int = 0,
    midpoint: bool = False,
    tau: np.ndarray | float = 0.0,
) -> Table:
    """The semi-linear equation of x_0, with a polynomial in log-SNR in the place of x_0:

    `x' = (sigma'/sigma) e^{-tau^2 h} x + alpha' int_0^h (1 + tau^2) e^{-(1 + tau^2) u} x_0(lambda'
    - u) du + sigma' sqrt(1 - e^{-2 tau^2 h}) z`  (2211.01095; SA-Solver, 2309.05019).

    Args:
        predictor: how many predictions the step looks back on, at most.
        corrector: how many the same step is done again with, once that at its end is there, which
            costs no evaluation (UniPC, 2302.04867); 0: never.
        midpoint: a straight line (two predictions) is read in the middle of the step, rather than
            integrated, as the DPM-Solvers do.
        tau: noise of each step; 0 is the probability-flow ODE, 1 the reverse SDE.

    Raises:
        UsageError: the history does not hold as many predictions.
    """
    most = HISTORY - 1 if corrector else HISTORY
    if not (1 <= predictor <= most and 0 <= corrector <= HISTORY):
        raise UsageError(
            f"a predictor looks back on 1 to {most} predictions and a corrector on at most "
            f"{HISTORY}, not {predictor} and {corrector}"
        )
    table = one_row_per_step(schedule, grid)
    alpha, sigma, log_snr = levels(schedule, grid)
    # The last step, into the clean picture, is the prediction itself.
    alpha, ratio, h = alpha[1:-1, None], sigma[1:-1] / sigma[:-2], np.diff(log_snr[:-1])
    tau = np.broadcast_to(tau, len(grid))[:-1]
    fall = (1 + tau**2) * h
    weights = fall[:, None] * SHARES * np.exp(-fall[:, None] * PLACES)
    age, first = ages(breaks), np.arange(len(h))

    def weigh(newest, counts):
        places = np.where(midpoint & (counts == 2)[:, None], 0.5, PLACES)
        points = log_snr[1:-1, None] - h[:, None] * places
        return alpha * on_predictions(log_snr, newest, counts, points, weights)

    E, B = np.zeros((2, len(grid), HISTORY))
    E[-1, 0] = 1.0
    E[:-1] = predicted = weigh(first, np.minimum(predictor, age[:-1] + 1))
    decay = np.append(ratio * np.exp(-(tau**2) * h), 0.0)
    s = np.append(sigma[1:-1] * np.sqrt(-np.expm1(-2 * tau**2 * h)), 0.0)
    if not corrector:
        return table._replace(Qx=decay, E=E, s=s)
    # The step before again, with this row's prediction: what it was done with is taken off, so that
    # its noise stays. Not over a break, where this prediction is of another function.
    counts = np.where(age[1:] > 0, np.minimum(corrector, age[1:] + 1), 0)
    before = np.pad(predicted, ((0, 0), (1, 0)))[:, :HISTORY]
    B[1:] = np.where(counts[:, None] > 0, weigh(first + 1, counts) - before, 0.0)
    return table._replace(Px=np.ones(len(grid)), B=B, Qy=decay, E=E, s=s)


def noise_multistep(
    schedule: Schedule,
    grid: np.ndarray,
    breaks: np.ndarray,
    *,
    order: int,
    variable: str,
) -> Table:
    """`x' / alpha' = x / alpha + int eps drho`, `rho = sigma / alpha`, with a polynomial for eps.

    Args:
        order: how many noises the step looks back on, at most.
        variable: of the polynomial: "rho" (LMS), "t" (DEIS tAB, 2204.13902), or "step",
            the step's number, which gives the weights of Adams and Bashforth (iPNDM).

    Raises:
        UsageError: the history does not hold as many noises.
    """
    if not 1 <= order <= HISTORY:
        raise UsageError(f"a sampler looks back on 1 to {HISTORY} noises, not {order}")
    table = predicting_noise(one_row_per_step(schedule, grid))
    rho = np.append(table.sigma / table.alpha, 0.0)
    change = np.diff(rho)[:, None]
    steps = np.arange(len(grid))
    points = rho[:-1, None] + change * PLACES
    nodes, points = {
        "rho": (rho, points),
        "t": (table.t, schedule.at_log_snr(-np.log(points))),
        "step": (steps, steps[:, None] + PLACES),
    }[variable]
    counts = np.minimum(order, ages(breaks) + 1)
    counts[-1] = 1
    weights = on_predictions(nodes, steps, counts, points, change * SHARES)
    return table._replace(Qx=table.next_alpha / table.alpha, E=table.next_alpha[:, None] * weights)


def dpm_solver_2m(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(2M): second-order multistep on x_0  (2211.01095, algorithm 2).

    `x = (sigma'/sigma) x + alpha' (1 - e^-h) D`, `D = x_0 + (x_0 - x_0_previous) / 2r`.
    """
    return exponential(schedule, grid, breaks, predictor=2, midpoint=True)


def sde_dpm_solver_2m(
    schedule: Schedule, grid: np.ndarray, breaks: np.ndarray, *, eta: float = 1.0
) -> Table:
    """SDE-DPM-Solver++(2M): the same for the reverse SDE  (2211.01095).

    Args:
        eta: 1 is the reverse SDE, 0 the flow, what is between the tau of `exponential`.
    """
    return exponential(schedule, grid, breaks, predictor=2, midpoint=True, tau=eta)


def dpm_solver_3m(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(3M) of third order  (2211.01095).

    The published formula lacks a factor 2 in the term of second differences, which leaves it at
    second order; here the parabola is integrated.
    """
    return exponential(schedule, grid, breaks, predictor=3, midpoint=True)


def unipc(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray, *, order: int = 2) -> Table:
    """UniPC-p, `B(h) = e^h - 1` (bh2): order p + 1 at one evaluation a step  (2302.04867, sec. 3).

    Its equations are those of interpolation: p predictions for the step, p + 1 to correct it.

    Args:
        order: p, 2 or 3.
    """
    return exponential(schedule, grid, breaks, predictor=order, corrector=order + 1, midpoint=True)


def sa_solver(
    schedule: Schedule,
    grid: np.ndarray,
    breaks: np.ndarray,
    *,
    eta: float = 1.0,
    predictor: int = 3,
    corrector: int = 4,
) -> Table:
    """SA-Solver: stochastic Adams, predictor and corrector  (2309.05019).

    Args:
        eta: noise, tau in the middle of the chain, 0.2 <= t / T <= 0.8; elsewhere none.
        predictor, corrector: how many predictions each looks at: 3 and 4, or 2 and 2, which the
            authors recommend where guidance is strong.
    """
    part = np.asarray(grid) / len(schedule)
    tau = eta * ((part >= 0.2) & (part <= 0.8))
    return exponential(schedule, grid, breaks, predictor=predictor, corrector=corrector, tau=tau)
