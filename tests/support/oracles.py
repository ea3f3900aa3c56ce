"""Exact cases for the solvers: no network, no sampler of ours, float64.

The recursion is written here a second time, in numpy, and reads nothing but the `Table`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
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


def no_frac(x, row) -> float:
    return 0.0


def interpret(
    table: Table, denoise: Denoise, x, noise=None, *, frac=no_frac, history=None, first: int = 0
) -> Trace:
    """What a table does to `x`, any shape, with noise `(N, ...)`.

    Args:
        frac: learned variance, `(x, row)`; history: `(4, ...)`, if not empty; first: row to begin
            at.
    """
    x = np.asarray(x, np.float64)
    y, H = np.zeros_like(x), np.zeros((HISTORY, *x.shape)) if history is None else history
    trace = [(x, y, H)]
    for i in range(first, len(table.t)):
        row = table.rows(i)
        v, entry = frac(x, row), row.u * x + row.v * denoise(x, row)
        H = np.tensordot(row.S, np.stack([entry, *H]), axes=1)
        y = row.Py * y + row.Px * x + np.tensordot(row.B, H, axes=1)
        x = row.Qy * y + row.Qx * x + np.tensordot(row.E, H, axes=1)
        if noise is not None:
            log_variance = v * row.log_beta + (1 - v) * row.log_beta_tilde
            x = x + (row.s + row.s_learned * np.exp(log_variance / 2)) * noise[i]
        trace.append((x, y, H))
    return Trace(*map(np.stack, zip(*trace, strict=True)))


def table_of(solver: Solver, grid: np.ndarray, breaks=()) -> Table:
    """The solver's table on the cosine schedule, its history begun anew at the steps `breaks`."""
    return solver(SCHEDULE, np.asarray(grid), np.isin(np.arange(len(grid)), breaks))


def without_last_step(table: Table) -> Table:
    """From the first level of a grid to its last; not on to the clean picture, whither every solver
    takes one step of first order."""
    return table.rows(table.step < table.step[-1])


def log_snr_grid(low: float, high: float, steps: int) -> np.ndarray:
    """`steps` even steps, `steps + 1` levels."""
    return SCHEDULE.at_log_snr(np.linspace(low, high, steps + 1))


def alpha_sigma(log_snr) -> tuple[np.ndarray, np.ndarray]:
    """Of variance-preserving diffusion."""
    log_snr = np.asarray(log_snr, np.float64)
    return (1 + np.exp(-2 * log_snr)) ** -0.5, (1 + np.exp(2 * log_snr)) ** -0.5


def order(error: Callable[[int], float], coarse: int) -> float:
    """How fast `error(steps)` falls when steps are doubled."""
    return float(np.log2(error(coarse) / error(2 * coarse)))


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).mean()))


# --- a mixture of Gaussians: the flow keeps quantiles, F_t(x_t) = F_s(x_s)

MEANS, STDS, WEIGHTS = (
    np.array([-1.0, 0.1, 0.8]),
    np.array([0.2, 0.1, 0.3]),
    np.array([0.3, 0.3, 0.4]),
)
QUANTILES = np.linspace(0.02, 0.98, 33)


def denoise_mixture(x: np.ndarray, row: Table) -> np.ndarray:
    """`E[x_0 | x_t]`, each mode's posterior mean weighted by its posterior probability."""
    x = np.asarray(x)[..., None]
    variance = row.alpha**2 * STDS**2 + row.sigma**2
    logit = np.log(WEIGHTS) - np.log(variance) / 2 - (x - row.alpha * MEANS) ** 2 / (2 * variance)
    likely = np.exp(logit - logit.max(-1, keepdims=True))
    mean = MEANS + row.alpha * STDS**2 / variance * (x - row.alpha * MEANS)
    return (likely * mean).sum(-1) / likely.sum(-1)


def mixture_at(log_snr: float, quantiles: np.ndarray = QUANTILES) -> np.ndarray:
    """Where the mixture, noised to this level, has these cumulative probabilities; by bisection."""
    alpha, sigma = alpha_sigma(log_snr)
    std = np.sqrt(alpha**2 * STDS**2 + sigma**2)
    low, high = np.full_like(quantiles, -20.0), np.full_like(quantiles, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = (WEIGHTS * ndtr((middle[:, None] - alpha * MEANS) / std)).sum(-1) < quantiles
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


# --- one Gaussian


def denoise_gaussian(mean, std) -> Denoise:
    """`E[x_0 | x_t]` of `N(mean, std^2)`; numbers, or arrays that go with x."""

    def denoise(x, row):
        gain = row.alpha * std**2 / (row.alpha**2 * std**2 + row.sigma**2)
        return mean + gain * (x - row.alpha * mean)

    return denoise


def gaussian_flow(x, mean, std, start: float, end: float) -> np.ndarray:
    """Where the flow takes x from one log-SNR to another."""
    (a, s), (b, t) = alpha_sigma(start), alpha_sigma(end)
    growth = np.sqrt((b**2 * std**2 + t**2) / (a**2 * std**2 + s**2))
    return b * mean + (x - a * mean) * growth


def best_frac(std: float):
    """The learned variance that a perfect network would predict for a Gaussian,
    `beta_tilde + c^2 Var[x_0 | x_t]`, as a fraction; 0 where the step has no noise."""

    def frac(x, row):
        beta = 1 - (row.alpha / row.next_alpha) ** 2
        if row.next_sigma == 0:
            return 0.0
        beta_tilde = beta * row.next_sigma**2 / row.sigma**2
        uncertain = std**2 * row.sigma**2 / (row.alpha**2 * std**2 + row.sigma**2)
        best = beta_tilde + (beta * row.next_alpha / row.sigma**2) ** 2 * uncertain
        return np.log(best / beta_tilde) / np.log(beta / beta_tilde)

    return frac


def levels_after(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """`alpha`, `sigma` that x stands at after each row."""
    return (
        np.append(table.alpha[1:], table.next_alpha[-1]),
        np.append(table.sigma[1:], table.next_sigma[-1]),
    )


def spread(table: Table, denoise: Denoise, mean, variance, frac=no_frac) -> tuple:
    """Mean and variance after each row, `(N,)`, of what begins with these; for a linear denoiser.

    Picture 0 has neither start nor noise, picture 1 a start of one, each further one the noise of
    one row: by linearity these are all there is to know.
    """
    n = len(table.t)
    x = np.append([0.0, 1.0], np.zeros(n))
    noise = np.eye(n, n + 2, 2)
    found = interpret(table, denoise, x, noise, frac=frac).x[1:]
    still, unit = found[:, :1], found[:, 1:] - found[:, :1]
    of_noise = (unit[:, 1:] ** 2).sum(1)
    return still[:, 0] + unit[:, 0] * mean, unit[:, 0] ** 2 * variance + of_noise
