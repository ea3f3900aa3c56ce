"""Samplers by name: each a function that writes its coefficients into a `Table`, in float64 on the
host; the recursion that runs them is in `glide_jax.diffusion.table`."""

from functools import partial

import numpy as np

from glide_jax.diffusion.adams import exponential, noise_multistep
from glide_jax.diffusion.schedule import Schedule, posterior
from glide_jax.diffusion.stages import dpm_solver_2s, heun, plms
from glide_jax.diffusion.table import HISTORY as HISTORY
from glide_jax.diffusion.table import (
    Solver,
    Table,
    levels,
    on_history,
    one_row_a_step,
    step_betas,
)
from glide_jax.errors import UsageError, nearest

VARIANCES = ("learned", "small", "large")


def ddpm(
    schedule: Schedule, grid: np.ndarray, breaks: np.ndarray, *, variance: str = "learned"
) -> Table:
    """Ancestral sampling: `x ~ N(mean(x_0, x_t), variance)`  (DDPM, algorithm 2).

    Args:
        variance: "learned" (Improved DDPM, eq. 15), or fixed: "small" (beta_tilde), "large" (beta).

    Raises:
        UsageError: there is no such variance.
    """
    if variance not in VARIANCES:
        raise UsageError(
            f"unknown variance {variance!r}{nearest(variance, VARIANCES)}: "
            f"choose one of {', '.join(VARIANCES)}"
        )
    table = one_row_a_step(schedule, grid)
    q = posterior(step_betas(schedule, grid))
    noisy = (np.arange(len(grid)) < len(grid) - 1).astype(float)
    if variance != "learned":
        # Both ends of what could be learned: a score, too, enters by the fixed variance.
        fixed = table.log_beta_tilde if variance == "small" else table.log_beta
        table = table._replace(log_beta=fixed, log_beta_tilde=fixed, s=np.exp(fixed / 2) * noisy)
    return table._replace(
        E=on_history(q.mean_x_0[::-1]),
        Qx=q.mean_x_t[::-1],
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
    return table._replace(Qx=towards, E=on_history(alpha[1:] - towards * table.alpha), s=s)


def ddim_reverse(schedule: Schedule, grid: np.ndarray, breaks: np.ndarray) -> Table:
    """DDIM run backwards, from a picture to the noise that draws it  (DDIM, sec. 4.3; GLIDE, A.2).

    Visits the grid from its cleanest level, and ends in pure noise.
    """
    forward = one_row_a_step(schedule, grid)
    flipped = forward.rows(slice(None, None, -1))
    noisier = np.append(flipped.alpha[1:], 0.0)
    next_sigma = np.append(flipped.sigma[1:], 1.0)
    away = next_sigma / flipped.sigma
    return flipped._replace(
        next_alpha=noisier,
        next_sigma=next_sigma,
        Qx=away,
        E=on_history(noisier - away * flipped.alpha),
        index=forward.index,
    )


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


SOLVERS: dict[str, Solver] = {
    "dpm++2m": dpm_solver_2m,
    "dpm++3m": dpm_solver_3m,
    "dpm++2s": dpm_solver_2s,
    "dpm++2m-sde": sde_dpm_solver_2m,
    "unipc2": unipc,
    "unipc3": partial(unipc, order=3),
    "sa": sa_solver,
    "heun": heun,
    "ddim": ddim,
    "deis": partial(noise_multistep, order=3, variable="t"),
    "lms": partial(noise_multistep, order=4, variable="rho"),
    "ipndm": partial(noise_multistep, order=4, variable="step"),
    "plms": plms,
    "prk": partial(plms, runge_kutta=True),
    "ddpm": ddpm,
    "ddpm-small": partial(ddpm, variance="small"),
    "ddpm-large": partial(ddpm, variance="large"),
}
