"""Noise schedules: betas, alpha-bar, log-SNR; built on the host in float64.

`x_t = alpha_t x_0 + sigma_t eps`, `alpha = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glide_jax.errors import UsageError

# Of both schedules (2102.09672, sec. 3.2): a step that left nothing of x_0 could not be gone back.
MOST_BETA = 0.999


def linear_betas(steps: int) -> np.ndarray:
    """`beta` from 1e-4 to 0.02 over 1000 steps, scaled to other lengths  (DDPM, 2006.11239).

    Chains of 20 steps and fewer would pass 1: they are capped where the cosine schedule is.
    """
    scale = 1000 / steps
    betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    return np.minimum(betas, MOST_BETA)


def cosine_betas(steps: int) -> np.ndarray:
    """`alpha_bar(u) ~ cos^2((u + 0.008) / 1.008 * pi / 2)`, beta <= 0.999  (2102.09672, eq. 17)."""

    def f(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    i = np.arange(steps, dtype=np.float64)
    return np.minimum(1 - f((i + 1) / steps) / f(i / steps), MOST_BETA)


BETAS: dict[str, Callable[[int], np.ndarray]] = {"cosine": cosine_betas, "linear": linear_betas}


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a chain of `len(betas)` steps; integer `t` is an index into it.

    Attributes:
        betas: `(T,)` float64, in (0, 1).
        alpha_bar: `(T,)` float64, the cumulative product of `1 - beta`.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray = field(init=False)

    def __post_init__(self):
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise UsageError("betas must be a list of numbers in (0, 1)")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alpha_bar", np.cumprod(1 - betas))

    def __len__(self) -> int:
        return len(self.betas)

    def log_snr(self, t: np.ndarray | float) -> np.ndarray:
        """`log(alpha / sigma)` at `t`, linear in `t` between the steps of the chain."""
        levels = 0.5 * (np.log(self.alpha_bar) - np.log1p(-self.alpha_bar))
        return np.interp(t, np.arange(len(self)), levels)

    def at_log_snr(self, log_snr: np.ndarray | float) -> np.ndarray:
        """The fractional `t` whose log-SNR this is (the inverse of `log_snr`)."""
        levels = self.log_snr(np.arange(len(self)))
        return np.interp(-np.asarray(log_snr), -levels, np.arange(len(self)))

    def alpha_bar_at(self, t: np.ndarray | float) -> np.ndarray:
        """`alpha_bar` at `t`; exact at integers, through the log-SNR between them."""
        t = np.asarray(t, np.float64)
        exact = self.alpha_bar[np.clip(np.round(t).astype(int), 0, len(self) - 1)]
        between = 1 / (1 + np.exp(-2 * self.log_snr(t)))
        return np.where(t == np.round(t), exact, between)


PREDICTIONS = ("eps", "v")


def to_eps(prediction: str, output: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """The noise that a network's output means: itself, or `alpha v + sigma x_t`  (2202.00512)."""
    return output if prediction == "eps" else alpha * output + sigma * x


@dataclass(frozen=True)
class Posterior:
    """`q(x_{t-1} | x_t, x_0)` of every step of a chain  (DDPM, eqs. 6-7).

    Attributes:
        log_beta: `log beta`, the upper end of a learned variance.
        log_beta_tilde: log of the posterior variance, its lower end; the first entry, whose
            variance is zero, repeats the second (Improved DDPM), or `log_beta` in a chain of one.
        mean_x_0, mean_x_t: the mean is `mean_x_0 x_0 + mean_x_t x_t`.
    """

    log_beta: np.ndarray
    beta_tilde: np.ndarray
    log_beta_tilde: np.ndarray
    mean_x_0: np.ndarray
    mean_x_t: np.ndarray


def posterior(betas: np.ndarray) -> Posterior:
    """The posterior of a chain, from its betas `(N,)`, each result `(N,)` float64."""
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    beta_tilde = betas * (1 - previous) / (1 - alpha_bar)
    floor = beta_tilde[1] if len(betas) > 1 else betas[0]
    return Posterior(
        log_beta=np.log(betas),
        beta_tilde=beta_tilde,
        log_beta_tilde=np.log(np.append(floor, beta_tilde[1:])),
        mean_x_0=betas * np.sqrt(previous) / (1 - alpha_bar),
        mean_x_t=(1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
    )


def make_schedule(name: str, steps: int = 1000) -> Schedule:
    """The named schedule.

    Args:
        name: "cosine" (64x64 models) or "linear" (upsamplers).
        steps: length T of the chain.

    Raises:
        UsageError: an unknown name, or fewer than one step.
    """
    if name not in BETAS:
        raise UsageError(f"unknown noise schedule {name!r}: choose one of {', '.join(BETAS)}")
    if steps < 1:
        raise UsageError(f"a noise schedule needs at least one step, not {steps}")
    return Schedule(BETAS[name](steps))
