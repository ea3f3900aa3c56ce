"""Ancestral sampling (DDPM), DDIM forwards and backwards, and consistency sampling.

`x_0` is the guided prediction; `eps` follows from it, `(x_t - alpha x_0) / sigma`.
"""

import numpy as np

from glide_jax.diffusion.schedule import Schedule, posterior
from glide_jax.diffusion.solvers.table import (
    Table,
    levels,
    on_history,
    one_row_per_step,
    step_betas,
)
from glide_jax.errors import UsageError, did_you_mean

VARIANCES = ("learned", "small", "large")


def ddpm(
    schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray, *, variance: str = "learned"
) -> Table:
    """DDPM, ancestral sampling: `x' ~ N(mean(x_0, x), variance)`  (2006.11239, algorithm 2).

    The learned variance enters through `s_learned`: the sampler multiplies the noise by the
    standard deviation that the network predicts.

    Args:
        variance: "learned" (Improved DDPM, eq. 15), or fixed: "small" (beta_tilde), "large" (beta).

    Raises:
        UsageError: an unknown variance.
    """
    if variance not in VARIANCES:
        raise UsageError(
            f"unknown variance {variance!r}{did_you_mean(variance, VARIANCES)}: "
            f"choose one of {', '.join(VARIANCES)}"
        )
    table = one_row_per_step(schedule, timesteps)
    q = posterior(step_betas(schedule, timesteps))
    noisy = (np.arange(len(timesteps)) < len(timesteps) - 1).astype(float)
    if variance != "learned":
        # Equal ends of the learned range: a gradient is scaled by the fixed variance too.
        fixed = table.log_beta_tilde if variance == "small" else table.log_beta
        table = table._replace(log_beta=fixed, log_beta_tilde=fixed, s=np.exp(fixed / 2) * noisy)
    return table._replace(
        E=on_history(q.mean_weight_x_0[::-1]),
        Qx=q.mean_weight_x_t[::-1],
        s_learned=noisy * (variance == "learned"),
        x_0_per_gradient=np.zeros(len(timesteps)),
        mean_per_gradient=np.ones(len(timesteps)),
    )


def ddim(
    schedule: Schedule,
    timesteps: np.ndarray,
    breaks: np.ndarray,
    *,
    eta: float = 0.0,
    float32_alpha_bar: bool = False,
) -> Table:
    """DDIM: `x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z`  (2010.02502, eq. 12).

    Args:
        eta: 0 is deterministic; 1 adds the noise of ancestral sampling with beta_tilde.
        float32_alpha_bar: round alpha-bar to float32, as OpenAI's code does: for comparing with it.
    """
    table = one_row_per_step(schedule, timesteps)
    alpha, sigma, _ = levels(schedule, timesteps, float32_alpha_bar)
    ratio = np.minimum(alpha[:-1] ** 2 / alpha[1:] ** 2, 1.0)
    s = eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - ratio)
    # At eta = 1 rounding can take the radicand below zero, where the original code makes NaNs.
    direction = np.sqrt(np.maximum(sigma[1:] ** 2 - s**2, 0.0))
    towards = direction / table.sigma
    return table._replace(Qx=towards, E=on_history(alpha[1:] - towards * table.alpha), s=s)


def consistency(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """Multistep consistency sampling: `x' = alpha' x_0 + sigma' z`  (2303.01469, algorithm 1).

    For few-step students, whose x_0 is a sample rather than a mean. Each step noises it again with
    fresh noise; the last one returns it.
    """
    table = one_row_per_step(schedule, timesteps)
    return table._replace(E=on_history(table.next_alpha), s=table.next_sigma)


def ddim_reverse(schedule: Schedule, timesteps: np.ndarray, breaks: np.ndarray) -> Table:
    """DDIM inversion: from an image to the noise that generates it  (DDIM, sec. 4.3; GLIDE, A.2).

    Visits the timesteps from the cleanest level, and ends in pure noise.
    """
    forward = one_row_per_step(schedule, timesteps)
    flipped = forward.rows(slice(None, None, -1))
    next_alpha = np.append(flipped.alpha[1:], 0.0)
    next_sigma = np.append(flipped.sigma[1:], 1.0)
    ratio = next_sigma / flipped.sigma
    return flipped._replace(
        next_alpha=next_alpha,
        next_sigma=next_sigma,
        Qx=ratio,
        E=on_history(next_alpha - ratio * flipped.alpha),
        index=forward.index,
    )
