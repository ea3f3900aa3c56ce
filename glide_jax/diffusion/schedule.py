"""Noise schedules: betas, alpha-bar, log(alpha/sigma); built on the host in float64.

`x_t = alpha_t x_0 + sigma_t eps`, `alpha = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from glide_jax.errors import UsageError

# The cap of both schedules (2102.09672, sec. 3.2): with beta 1 nothing of x_0 would be left, and no
# step could reverse that.
MAX_BETA = 0.999


def linear_betas(length: int) -> np.ndarray:
    """`beta` from 1e-4 to 0.02 over 1000 steps, scaled to other lengths  (DDPM, 2006.11239).

    With 20 steps or fewer, beta would reach 1: it is capped like that of the cosine schedule.
    """
    scale = 1000 / length
    betas = np.linspace(scale * 1e-4, scale * 0.02, length, dtype=np.float64)
    return np.minimum(betas, MAX_BETA)


def cosine_betas(length: int) -> np.ndarray:
    """`alpha_bar(u) ~ cos^2((u + 0.008) / 1.008 * pi / 2)`, beta <= 0.999  (2102.09672, eq. 17)."""

    def f(u: np.ndarray) -> np.ndarray:
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    i = np.arange(length, dtype=np.float64)
    return np.minimum(1 - f((i + 1) / length) / f(i / length), MAX_BETA)


BETAS: dict[str, Callable[[int], np.ndarray]] = {"cosine": cosine_betas, "linear": linear_betas}


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of a diffusion process of T steps; an integer `t` is an index into them.

    Attributes:
        betas: `(T,)` float64, in (0, 1).
        alpha_bar: `(T,)` float64, the cumulative product of `1 - beta`.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise UsageError("betas must be a list of numbers in (0, 1)")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alpha_bar", np.cumprod(1 - betas))

    def __len__(self) -> int:
        return len(self.betas)

    def half_log_snr(self, t: ArrayLike) -> np.ndarray:
        """Return `log(alpha / sigma)` at `t`: half of the log-SNR `log(alpha^2 / sigma^2)`.

        The value is linear between integers, and constant beyond the ends.
        """
        half_log_snrs = 0.5 * (np.log(self.alpha_bar) - np.log1p(-self.alpha_bar))
        return np.interp(np.asarray(t), np.arange(len(self)), half_log_snrs)

    def t_at_half_log_snr(self, half_log_snr: ArrayLike) -> np.ndarray:
        """Return the fractional `t` with this log(alpha / sigma): the inverse of `half_log_snr`.

        A value beyond the ends of the schedule gives the end: 0 or T - 1.
        """
        half_log_snrs = self.half_log_snr(np.arange(len(self)))
        return np.interp(-np.asarray(half_log_snr), -half_log_snrs, np.arange(len(self)))

    def alpha_bar_at(self, t: ArrayLike) -> np.ndarray:
        """Return `alpha_bar` at `t`: exact at integers, from `half_log_snr` between them."""
        t = np.asarray(t, np.float64)
        exact = self.alpha_bar[np.clip(np.round(t).astype(int), 0, len(self) - 1)]
        between = 1 / (1 + np.exp(-2 * self.half_log_snr(t)))
        return np.where(t == np.round(t), exact, between)


# What a network may predict: the noise, v = alpha eps - sigma x_0, or the clean image x_0.
PREDICTION_TYPES = ("eps", "v", "x_0")


def to_eps(prediction_type: str, output: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """Return eps from the prediction.

    `eps` itself, `alpha v + sigma x_t` (2202.00512), or `(x_t - alpha x_0) / sigma`.
    """
    if prediction_type == "x_0":
        return (x - alpha * output) / sigma
    return output if prediction_type == "eps" else alpha * output + sigma * x


def to_x_0(prediction_type: str, output: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """Return x_0 from the prediction.

    `(x_t - sigma eps) / alpha`, `alpha x_t - sigma v` (2202.00512), or `x_0` itself. Through eps,
    the rounding errors of a prediction of v or x_0 would grow with sigma / alpha.
    """
    if prediction_type == "x_0":
        return output
    return (x - sigma * output) / alpha if prediction_type == "eps" else alpha * x - sigma * output


def x_0_per_gradient(alpha: Any, sigma: Any) -> Any:
    """`sigma^2 / alpha`: factor of a gradient that is added to x_0.

    The score of x_t is `-eps / sigma`. Adding g to it changes eps by `-sigma g`, and x_0 by
    `sigma^2 / alpha g`.
    """
    return sigma**2 / alpha


def target_of(prediction_type: str, x_0: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
    """Return what a network is to predict: `eps`, `alpha eps - sigma x_0` for v, or `x_0`."""
    if prediction_type == "x_0":
        return x_0
    return eps if prediction_type == "eps" else alpha * eps - sigma * x_0


@dataclass(frozen=True, eq=False)
class Posterior:
    """`q(x_{t-1} | x_t, x_0)` at every step, `(N,)` float64  (DDPM, eqs. 6-7).

    Attributes:
        log_beta: `log beta`, the upper end of a learned variance.
        beta_tilde: the variance; zero at the cleanest step.
        log_beta_tilde: `log beta_tilde`, the lower end of a learned variance. The entry of the
            cleanest step is copied from the second cleanest, as in Improved DDPM; with a single
            step it is `log_beta`.
        mean_weight_x_0, mean_weight_x_t: the mean is `mean_weight_x_0 x_0 + mean_weight_x_t x_t`.
    """

    log_beta: np.ndarray
    beta_tilde: np.ndarray
    log_beta_tilde: np.ndarray
    mean_weight_x_0: np.ndarray
    mean_weight_x_t: np.ndarray


def posterior(betas: np.ndarray) -> Posterior:
    """Return the posterior of a diffusion process from its betas `(N,)`, cleanest first."""
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    beta_tilde = betas * (1 - previous) / (1 - alpha_bar)
    floor = beta_tilde[1] if len(betas) > 1 else betas[0]
    return Posterior(
        log_beta=np.log(betas),
        beta_tilde=beta_tilde,
        log_beta_tilde=np.log(np.append(floor, beta_tilde[1:])),
        mean_weight_x_0=betas * np.sqrt(previous) / (1 - alpha_bar),
        mean_weight_x_t=(1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
    )


def make_schedule(name: str, length: int = 1000) -> Schedule:
    """Return the noise schedule of that name.

    Args:
        name: "cosine" (the 64x64 models) or "linear" (OpenAI's upsamplers).
        length: number of timesteps T.

    Raises:
        UsageError: the name is unknown, or there is no step.
    """
    if name not in BETAS:
        raise UsageError(f"unknown noise schedule {name!r}: choose one of {', '.join(BETAS)}")
    if length < 1:
        raise UsageError(f"a noise schedule needs at least one step, not {length}")
    return Schedule(BETAS[name](length))
