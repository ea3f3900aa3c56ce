"""Exact cases for the solvers, in float64: no network, and not the project's sampler.

The recursion is written here a second time, in numpy; it reads nothing but the `Table`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers.table import HISTORY, Solver, Table

SCHEDULE = make_schedule("cosine")

# `(x, row) -> x_0`; a row is a `Table` of scalars.
Denoise = Callable[[np.ndarray, Table], np.ndarray]


class Trace(NamedTuple):
    """x, y and history before the first row and after each: `(N + 1, ...)`."""

    x: np.ndarray
    y: np.ndarray
    history: np.ndarray


def no_variance(x, row) -> float:
    """The variance fraction of a network that predicts `beta_tilde` everywhere."""
    return 0.0


def interpret(
    table: Table,
    denoise: Denoise,
    start: ArrayLike,
    noise: np.ndarray | None = None,
    *,
    variance_fraction: Callable = no_variance,
    history: np.ndarray | None = None,
    first: int = 0,
) -> Trace:
    """Run a table.

    Args:
        start: x before the first row, of any shape.
        noise: `(N, ...)`, the noise of each row.
        variance_fraction: the learned variance, `(x, row)`.
        history: `(4, ...)`; None: zeros.
        first: the row to start at.
    """
    x = np.asarray(start, np.float64)
    y, H = np.zeros_like(x), np.zeros((HISTORY, *x.shape)) if history is None else history
    trace = [(x, y, H)]
    for i in range(first, len(table.t)):
        row = table.rows(i)
        fraction, entry = variance_fraction(x, row), row.u * x + row.v * denoise(x, row)
        H = np.tensordot(row.S, np.stack([entry, *H]), axes=1)
        y = row.Py * y + row.Px * x + np.tensordot(row.B, H, axes=1)
        x = row.Qy * y + row.Qx * x + np.tensordot(row.E, H, axes=1)
        if noise is not None:
            log_variance = fraction * row.log_beta + (1 - fraction) * row.log_beta_tilde
            x = x + (row.s + row.s_learned * np.exp(log_variance / 2)) * noise[i]
        trace.append((x, y, H))
    return Trace(*map(np.stack, zip(*trace, strict=True)))


def table_of(
    solver: Solver, timesteps: ArrayLike, breaks: Sequence[int] | np.ndarray = ()
) -> Table:
    """Return the solver's table on the cosine schedule, its history reset at the steps `breaks`."""
    timesteps = np.asarray(timesteps)
    return solver(SCHEDULE, timesteps, np.isin(np.arange(len(timesteps)), breaks))


def without_last_step(table: Table) -> Table:
    """Remove the step from the last level to the clean image: it is of first order."""
    return table.rows(table.step < table.step[-1])


def log_snr_timesteps(low: float, high: float, steps: int) -> np.ndarray:
    """Return the `steps + 1` levels of `steps` even steps in log-SNR."""
    return SCHEDULE.t_at_half_log_snr(np.linspace(low, high, steps + 1))


def alpha_sigma(half_log_snr: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return alpha and sigma of variance-preserving diffusion."""
    half_log_snr = np.asarray(half_log_snr, np.float64)
    return (1 + np.exp(-2 * half_log_snr)) ** -0.5, (1 + np.exp(2 * half_log_snr)) ** -0.5


def order(error: Callable[[int], float], coarse: int) -> float:
    """Return the order of convergence: how fast `error(steps)` falls when the steps double."""
    return float(np.log2(error(coarse) / error(2 * coarse)))


def rms(difference: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt((difference**2).mean()))


# --- a mixture of Gaussians: the flow keeps quantiles, F_t(x_t) = F_s(x_s)

MEANS, STDS, WEIGHTS = (
    np.array([-1.0, 0.1, 0.8]),
    np.array([0.2, 0.1, 0.3]),
    np.array([0.3, 0.3, 0.4]),
)
QUANTILES = np.linspace(0.02, 0.98, 33)


def denoise_mixture(x: np.ndarray, row: Table) -> np.ndarray:
    """`E[x_0 | x_t]`: each mode's posterior mean, weighted by its posterior probability."""
    x = np.asarray(x)[..., None]
    variance = row.alpha**2 * STDS**2 + row.sigma**2
    logit = np.log(WEIGHTS) - np.log(variance) / 2 - (x - row.alpha * MEANS) ** 2 / (2 * variance)
    likely = np.exp(logit - logit.max(-1, keepdims=True))
    mean = MEANS + row.alpha * STDS**2 / variance * (x - row.alpha * MEANS)
    return (likely * mean).sum(-1) / likely.sum(-1)


def mixture_at(half_log_snr: float, quantiles: np.ndarray = QUANTILES) -> np.ndarray:
    """Return the quantiles of the mixture noised to a level, by bisection."""
    alpha, sigma = alpha_sigma(half_log_snr)
    std = np.sqrt(alpha**2 * STDS**2 + sigma**2)
    low, high = np.full_like(quantiles, -20.0), np.full_like(quantiles, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = (WEIGHTS * ndtr((middle[:, None] - alpha * MEANS) / std)).sum(-1) < quantiles
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


# --- one Gaussian


def denoise_gaussian(mean: float, std: float) -> Denoise:
    """Return `E[x_0 | x_t]` of `N(mean, std^2)`; both numbers, or arrays that broadcast with x."""

    def denoise(x, row):
        gain = row.alpha * std**2 / (row.alpha**2 * std**2 + row.sigma**2)
        return mean + gain * (x - row.alpha * mean)

    return denoise


def gaussian_flow(x: np.ndarray, mean: float, std: float, start: float, end: float) -> np.ndarray:
    """Return the point that the flow takes x to, from one half log-SNR to another."""
    (a, s), (b, t) = alpha_sigma(start), alpha_sigma(end)
    growth = np.sqrt((b**2 * std**2 + t**2) / (a**2 * std**2 + s**2))
    return b * mean + (x - a * mean) * growth


def best_fraction(std: float) -> Callable:
    """Return the learned variance that a perfect network predicts for a Gaussian.

    It is `beta_tilde + c^2 Var[x_0 | x_t]`, as a fraction; 0 where the step adds no noise.
    """

    def fraction(x, row):
        beta = 1 - (row.alpha / row.next_alpha) ** 2
        if row.next_sigma == 0:
            return 0.0
        beta_tilde = beta * row.next_sigma**2 / row.sigma**2
        uncertain = std**2 * row.sigma**2 / (row.alpha**2 * std**2 + row.sigma**2)
        best = beta_tilde + (beta * row.next_alpha / row.sigma**2) ** 2 * uncertain
        return np.log(best / beta_tilde) / np.log(beta / beta_tilde)

    return fraction


def levels_after(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return alpha and sigma of x after each row."""
    return (
        np.append(table.alpha[1:], table.next_alpha[-1]),
        np.append(table.sigma[1:], table.next_sigma[-1]),
    )


def mean_and_variance(
    table: Table,
    denoise: Denoise,
    mean: float,
    variance: float,
    variance_fraction: Callable = no_variance,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of x after each row, `(N,)`, for a linear denoiser.

    Args:
        mean, variance: those of x before the first row.
    """
    # By linearity a few runs say everything: one without start and noise, one that starts at 1, and
    # one for the noise of each row.
    n = len(table.t)
    x = np.append([0.0, 1.0], np.zeros(n))
    noise = np.eye(n, n + 2, 2)
    found = interpret(table, denoise, x, noise, variance_fraction=variance_fraction).x[1:]
    still, unit = found[:, :1], found[:, 1:] - found[:, :1]
    of_noise = (unit[:, 1:] ** 2).sum(1)
    return still[:, 0] + unit[:, 0] * mean, unit[:, 0] ** 2 * variance + of_noise
