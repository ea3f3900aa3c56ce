"""Multistep samplers: a polynomial through the last predictions, integrated over the step.

Every step takes one network evaluation. There are two families: `exponential_integrator`
interpolates the prediction of the clean image over the half log-SNR, log(alpha/sigma);
`noise_multistep` interpolates the noise. At the start and after a break, the polynomial has only as
many nodes as there are predictions since then. The last step, to the clean image, is infinitely
long in log-SNR and uses the newest prediction alone.
"""

import numpy as np

from glide_jax.diffusion.schedule import Schedule
from glide_jax.diffusion.solvers.table import (
    HISTORY,
    Table,
    history_lengths,
    levels,
    one_row_per_step,
    predicting_noise,
)
from glide_jax.errors import UsageError

# Nodes and weights of Gauss-Legendre quadrature on [0, 1]. 32 nodes are exact to rounding for a
# cubic times an exponential that falls by e^-30 over the step. A single step through the whole
# cosine schedule, with noise, falls by that much.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def lagrange_weights(nodes: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return `w (R, K)` with `sum_j w_j f(nodes_j) = sum_q weights_q p(points_q)`.

    p is the polynomial through the values of f at the nodes (Lagrange interpolation).

    Args:
        nodes: `(R, K)`, distinct within a row.
        points, weights: `(R, Q)`, the quadrature of each row.
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


def history_weights(
    positions: np.ndarray,
    newest: np.ndarray,
    counts: np.ndarray,
    points: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Return the weights `(R, 4)` on the history that integrate the interpolating polynomial.

    Args:
        positions: `(N,)`, the position of each step's prediction in the variable of the polynomial.
        newest: `(R,)`, the index in `positions` of the newest prediction of each row.
        counts: `(R,)`, how many predictions each row uses.
        points, weights: `(R, Q)`, the quadrature of each row.
    """
    coefficients = np.zeros((len(counts), HISTORY))
    for count in range(1, HISTORY + 1):
        rows = np.flatnonzero(counts == count)
        nodes = positions[newest[rows, None] - np.arange(count)]
        coefficients[rows, :count] = lagrange_weights(nodes, points[rows], weights[rows])
    return coefficients


def exponential_integrator(
    schedule: Schedule,
    timesteps: np.ndarray,
    breaks: np.ndarray,
    *,
    predictor: int,
    corrector: int = 0,
    midpoint: bool = False,
    tau: np.ndarray | float = 0.0,
) -> Table:
    """Exponential integrators: the semi-linear ODE or SDE, with a polynomial in log-SNR for x_0.

        x' = (sigma'/sigma) e^(-tau^2 h) x
             + alpha' int_0^h (1 + tau^2) e^(-(1 + tau^2) u) x_0(lambda' - u) du
             + sigma' sqrt(1 - e^(-2 tau^2 h)) z

    lambda' is log(alpha/sigma) at the end of the step, h its increase in the step
    (DPM-Solver++, 2211.01095; SA-Solver, 2309.05019).

    Args:
        predictor: the largest number of predictions that a step uses.
        corrector: the largest number of predictions that correct a step, among them the one at its
            end; correcting costs no evaluation (UniPC, 2302.04867). 0: no corrector.
        midpoint: with two predictions, take the value in the middle of the step instead of the
            integral, as the DPM-Solvers do.
        tau: noise of each step; 0 is the probability-flow ODE, 1 the reverse SDE.

    Raises:
        UsageError: the history does not hold that many predictions.
    """
    max_order = HISTORY - 1 if corrector else HISTORY
    if not (1 <= predictor <= max_order and 0 <= corrector <= HISTORY):
        raise UsageError(
            f"a predictor uses 1 to {max_order} predictions and a corrector at most {HISTORY}, "
            f"not {predictor} and {corrector}"
        )
    table = one_row_per_step(schedule, timesteps)
    alpha, sigma, half_log_snr = levels(schedule, timesteps)
    # The last step, to the clean image, is the prediction itself.
    next_alpha, ratio = alpha[1:-1, None], sigma[1:-1] / sigma[:-2]
    h = np.diff(half_log_snr[:-1])
    tau = np.broadcast_to(tau, len(timesteps))[:-1]
    fall = (1 + tau**2) * h
    weights = fall[:, None] * WEIGHTS * np.exp(-fall[:, None] * NODES)
    lengths, first = history_lengths(breaks), np.arange(len(h))

    def weigh(newest: np.ndarray, counts: np.ndarray) -> np.ndarray:
        places = np.where(midpoint & (counts == 2)[:, None], 0.5, NODES)
        points = half_log_snr[1:-1, None] - h[:, None] * places
        return next_alpha * history_weights(half_log_snr, newest, counts, points, weights)

    E, B = np.zeros((2, len(timesteps), HISTORY))
    E[-1, 0] = 1.0
    E[:-1] = predicted = weigh(first, np.minimum(predictor, lengths[:-1] + 1))
    decay = np.append(ratio * np.exp(-(tau**2) * h), 0.0)
    s = np.append(sigma[1:-1] * np.sqrt(-np.expm1(-2 * tau**2 * h)), 0.0)
    if not corrector:
        return table._replace(Qx=decay, E=E, s=s)
    # This row corrects the step before: the weights that include this row's prediction, minus those
    # that the step was taken with. The noise of that step stays. There is no correction across a
    # break: this row then predicts with another set of guidances.
    corrector_counts = np.where(lengths[1:] > 0, np.minimum(corrector, lengths[1:] + 1), 0)
    previous_weights = np.pad(predicted, ((0, 0), (1, 0)))[:, :HISTORY]
    correction = weigh(first + 1, corrector_counts) - previous_weights
    B[1:] = np.where(corrector_counts[:, None] > 0, correction, 0.0)
    return table._replace(Px=np.ones(len(timesteps)), B=B, Qy=decay, E=E, s=s)


def noise_multistep(
    schedule: Schedule,
    timesteps: np.ndarray,
    breaks: np.ndarray,
    *,
    order: int,
    variable: str,
) -> Table:
    """Multistep on the noise (LMS, DEIS, iPNDM): `x'/alpha' = x/alpha + int eps drho`.

    `rho = sigma/alpha`; a polynomial through the last predictions stands for eps.

    Args:
        order: the largest number of noise predictions that a step uses.
        variable: variable of the polynomial: "rho" (LMS), "t" (DEIS tAB, 2204.13902), or "step",
            the step's number, which gives the weights of Adams and Bashforth (iPNDM).

    Raises:
        UsageError: the history does not hold that many predictions.
    """
    if not 1 <= order <= HISTORY:
        raise UsageError(f"a sampler uses 1 to {HISTORY} noise predictions, not {order}")
    table = predicting_noise(one_row_per_step(schedule, timesteps))
    rho = np.append(table.sigma / table.alpha, 0.0)
    change = np.diff(rho)[:, None]
    steps = np.arange(len(timesteps))
    points = rho[:-1, None] + change * NODES
    positions, points = {
        "rho": (rho, points),
        "t": (table.t, schedule.t_at_half_log_snr(-np.log(points))),
        "step": (steps, steps[:, None] + NODES),
    }[variable]
    counts = np.minimum(order, history_lengths(breaks) + 1)
    counts[-1] = 1
    weights = history_weights(positions, steps, counts, points, change * WEIGHTS)
    return table._replace(Qx=table.next_alpha / table.alpha, E=table.next_alpha[:, None] * weights)


def dpm_solver_2m(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(2M): second-order multistep on x_0  (2211.01095, algorithm 2).

    `x = (sigma'/sigma) x + alpha' (1 - e^-h) D`, `D = x_0 + (x_0 - x_0_previous) / 2r`.
    """
    return exponential_integrator(schedule, timesteps, breaks, predictor=2, midpoint=True)


def sde_dpm_solver_2m(
    schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray, *, eta: float = 1.0
) -> Table:
    """SDE-DPM-Solver++(2M): the stochastic form of `dpm_solver_2m`  (2211.01095).

    Args:
        eta: amount of noise, the tau of `exponential_integrator`: 1 is the reverse SDE, 0 is
            `dpm_solver_2m`.
    """
    return exponential_integrator(schedule, timesteps, breaks, predictor=2, midpoint=True, tau=eta)


def dpm_solver_3m(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """DPM-Solver++(3M): third-order multistep on x_0  (2211.01095).

    The published formula lacks a factor 2 in the term of second differences and is of second order
    only. Here the parabola is integrated exactly.
    """
    return exponential_integrator(schedule, timesteps, breaks, predictor=3, midpoint=True)


def unipc(
    schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray, *, order: int = 2
) -> Table:
    """UniPC-p with `B(h) = e^h - 1` (bh2), of order p + 1  (2302.04867, sec. 3).

    Its equations are those of interpolation: p predictions take the step, p + 1 correct it.

    Args:
        order: p, 2 or 3.
    """
    return exponential_integrator(
        schedule, timesteps, breaks, predictor=order, corrector=order + 1, midpoint=True
    )


def sa_solver(
    schedule: Schedule,
    timesteps: np.ndarray,
    breaks: np.ndarray,
    *,
    eta: float = 1.0,
    predictor: int = 3,
    corrector: int = 4,
) -> Table:
    """SA-Solver: a stochastic Adams predictor and corrector  (2309.05019).

    Args:
        eta: amount of noise, the tau of `exponential_integrator`, where 0.2 <= t / T <= 0.8;
            elsewhere tau is zero.
        predictor, corrector: number of predictions that each uses. The authors recommend 3 and 4,
            or 2 and 2 with strong guidance.
    """
    time = np.asarray(timesteps) / len(schedule)
    tau = eta * ((time >= 0.2) & (time <= 0.8))
    return exponential_integrator(
        schedule, timesteps, breaks, predictor=predictor, corrector=corrector, tau=tau
    )
