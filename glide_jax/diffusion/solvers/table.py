"""The table of a sampler: its coefficients, one row per network evaluation.

One linear recursion runs every sampler (`glide_jax.diffusion.sampling.run_rows`). With the guided
prediction x_0, the history H of earlier predictions (newest first), the anchor y (x at the start
of a step), a guidance gradient g and fresh noise z, each row does:

    H <- S [u x + v (x_0 + x_0_per_gradient g), *H]         store x_0 or eps, shift the history
    y <- Py y + Px x + B H                                  keep or correct the anchor
    x <- Qy y + Qx x + E H + mean_per_gradient variance g   the solver's step
         + (s + s_learned sqrt(variance)) z                 noise, fixed or learned
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from glide_jax.diffusion.schedule import Schedule, posterior, x_0_per_gradient

# Number of predictions that the history holds.
HISTORY = 4

# numpy arrays on the host, jax arrays inside the sampler.
Column = TypeVar("Column", np.ndarray, jax.Array)


class Table(NamedTuple, Generic[Column]):
    """The coefficients of a run: one row per network evaluation, `(N,)` float64 unless stated.

    Attributes:
        t, alpha, sigma, next_alpha, next_sigma: see `glide_jax.diffusion.guidance.Point`.
        u, v: the history's new entry `u x + v x_0`: (0, 1) is x_0, (1/sigma, -alpha/sigma) is eps.
        S: `(N, 4, 5)`, the new history from entry and old history: a shift, or a combination.
        Py, Px: the anchor's update, weights of y and x.
        B: `(N, 4)`, the anchor's update, weights of the history.
        Qy, Qx: the update of x, weights of y and x.
        E: `(N, 4)`, the update of x, weights of the history.
        log_beta, log_beta_tilde: the two ends of a learned variance.
        s, s_learned: noise, fixed or in units of the learned standard deviation.
        x_0_per_gradient, mean_per_gradient: how a guidance gradient g enters: `x_0_per_gradient g`
            is added to x_0 (all but ancestral rows), or `mean_per_gradient variance g` to x
            (ancestral, ADM algorithm 1).
        keep: 0 where the memory of guidance is reset, else 1.
        index, step, guidance_set: int; the row's number, the step it belongs to, and the set of
            guidances that acts in it.
    """

    t: Column
    alpha: Column
    sigma: Column
    next_alpha: Column
    next_sigma: Column
    u: Column
    v: Column
    S: Column
    Py: Column
    Px: Column
    B: Column
    Qy: Column
    Qx: Column
    E: Column
    log_beta: Column
    log_beta_tilde: Column
    s: Column
    s_learned: Column
    x_0_per_gradient: Column
    mean_per_gradient: Column
    keep: Column
    index: Column
    step: Column
    guidance_set: Column

    def rows(self, index: np.ndarray | slice | int) -> "Table[Column]":
        """Return some rows, or, for an integer, one row as a table of scalars."""
        return Table(*(column[index] for column in self))


# A sampler is the name, a solver the function that writes its table: `(schedule, timesteps, breaks)
# -> Table`, where breaks `(N,)` bool marks steps where the history is reset. Solvers whose steps
# read no prediction of an earlier step ignore it.
Solver = Callable[[Schedule, np.ndarray, np.ndarray], Table[np.ndarray]]


class Levels(NamedTuple):
    """Noise levels of N timesteps: `(N + 1,)` float64, the last one clean.

    Attributes:
        alpha, sigma: `x_t = alpha x_0 + sigma eps`.
        half_log_snr: `log(alpha / sigma)`, half of `log(alpha^2 / sigma^2)`.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    half_log_snr: np.ndarray


def levels(schedule: Schedule, timesteps: np.ndarray, float32_alpha_bar: bool = False) -> Levels:
    """Return the noise levels; `float32_alpha_bar` rounds alpha-bar as OpenAI's code does."""
    alpha_bar = np.append(schedule.alpha_bar_at(timesteps), 1.0)
    if float32_alpha_bar:
        alpha_bar = alpha_bar.astype(np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        half_log_snr = 0.5 * (np.log(alpha_bar) - np.log(1 - alpha_bar))
    return Levels(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), half_log_snr)


def history_lengths(breaks: np.ndarray) -> np.ndarray:
    """Return how many steps the history reaches back, `(N,)` int: 0 first and after a break."""
    steps = np.arange(len(breaks))
    return steps - np.maximum.accumulate(np.where(breaks, steps, 0))


def step_betas(schedule: Schedule, timesteps: np.ndarray) -> np.ndarray:
    """Return the betas of a process with these timesteps, cleanest first  (2102.09672, eq. 19)."""
    alpha_bar = schedule.alpha_bar_at(timesteps[::-1])
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def on_history(first: np.ndarray, *older: np.ndarray) -> np.ndarray:
    """Stack weights on the history, newest first, as `(N, 4)`."""
    columns = [first, *older]
    columns += [np.zeros_like(first)] * (HISTORY - len(columns))
    return np.stack(columns, axis=-1)


def one_row_per_step(schedule: Schedule, timesteps: np.ndarray) -> Table[np.ndarray]:
    """Return a table that shifts a history of x_0; the caller fills in the update of x."""
    n = len(timesteps)
    alpha, sigma, _ = levels(schedule, timesteps)
    zero, one = np.zeros(n), np.ones(n)
    shift = np.eye(HISTORY, HISTORY + 1)
    rows = np.arange(n)
    q = posterior(step_betas(schedule, timesteps))
    return Table(
        t=np.asarray(timesteps, np.float64),
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
        x_0_per_gradient=x_0_per_gradient(alpha[:-1], sigma[:-1]),
        mean_per_gradient=zero,
        keep=one,
        index=rows,
        step=rows,
        guidance_set=np.zeros(n, int),
    )


def predicting_noise(table: Table[np.ndarray]) -> Table[np.ndarray]:
    """Return the table with `eps = (x - alpha x_0) / sigma` as the entry of its history."""
    return table._replace(u=1 / table.sigma, v=-table.alpha / table.sigma)
