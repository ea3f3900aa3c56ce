"""What training minimises: L_simple, and L_vlb for the learned variance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.schedule import Schedule, posterior, to_eps

# How L_simple weighs the noise levels, and what the paper of "min-snr" recommends.
WEIGHTINGS = ("none", "min-snr")
MIN_SNR_GAMMA = 5.0


class Tables(NamedTuple):
    """What the losses read at a step `t`: each `(T,)` float32, from float64 on the host."""

    alpha: jax.Array
    sigma: jax.Array
    log_beta: jax.Array
    log_beta_tilde: jax.Array
    mean_x_0: jax.Array
    mean_x_t: jax.Array


class Terms(NamedTuple):
    """Each `(B,)`: the loss of a picture and its two parts."""

    loss: jax.Array
    mse: jax.Array
    vlb: jax.Array


def make_tables(schedule: Schedule) -> Tables:
    """The float32 tables of a schedule (as numpy arrays: constants of the compiled step)."""
    q = posterior(schedule.betas)
    columns = (
        np.sqrt(schedule.alpha_bar),
        np.sqrt(1 - schedule.alpha_bar),
        q.log_beta,
        q.log_beta_tilde,
        q.mean_x_0,
        q.mean_x_t,
    )
    return Tables(*(column.astype(np.float32) for column in columns))


def at(table: jax.Array, t: jax.Array) -> jax.Array:
    """`table[t]` shaped `(B, 1, 1, 1)`."""
    return jnp.asarray(table)[t][:, None, None, None]


def q_sample(tables: Tables, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """`x_t = alpha_t x_0 + sigma_t eps`  (DDPM, eq. 4)."""
    return at(tables.alpha, t) * x_0 + at(tables.sigma, t) * eps


def mean_flat(x: jax.Array) -> jax.Array:
    """Mean over all but the batch axis: `(B, ...) -> (B,)`."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(mean_1, log_var_1, mean_2, log_var_2) -> jax.Array:
    """`KL(N_1 || N_2)` in nats, elementwise."""
    return 0.5 * (
        -1.0
        + log_var_2
        - log_var_1
        + jnp.exp(log_var_1 - log_var_2)
        + (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    )


def _normal_logit(x: jax.Array) -> jax.Array:
    # The tanh form of the normal's distribution, as Improved DDPM trained with:
    # (1 + tanh(z)) / 2 = sigmoid(2 z).
    return 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-probability in nats of the 8-bit value `x` in [-1, 1]  (DDPM, eq. 13)."""
    centred, inverse = x - mean, jnp.exp(-log_scale)
    above = _normal_logit(inverse * (centred + 1 / 255))
    below = _normal_logit(inverse * (centred - 1 / 255))
    # log(sigmoid(a) - sigmoid(b)): as a difference it, and more so its gradient, would be rounding
    # alone in the tails.
    up_to, beyond = jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-below)
    width = jnp.maximum(-jnp.expm1(below - above), 1e-30)  # the logarithm's gradient stays finite
    inner = up_to + beyond + jnp.log(width)
    log_p = jnp.where(x > 0.999, beyond, jnp.where(x < -0.999, up_to, inner))
    return jnp.maximum(log_p, np.log(1e-12))


def vlb_terms(
    tables: Tables, x_0: jax.Array, x_t: jax.Array, t: jax.Array, eps: jax.Array, v: jax.Array
) -> jax.Array:
    """One term of the variational bound, in bits a dimension  (Improved DDPM, 2102.09672, eq. 4-7).

    `KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`, and the negative log-likelihood at t = 0.

    Args:
        x_0, x_t, eps, v: `(B, H, W, C)`; `eps` predicted, `v` the variance output, whose fraction
            `(v + 1) / 2` lies between `beta_tilde` (0) and `beta` (1) on a log scale.
        t: `(B,)` integers.

    Returns:
        `(B,)` float32.
    """
    frac = (v + 1) / 2
    low, high = at(tables.log_beta_tilde, t), at(tables.log_beta, t)
    log_variance = frac * high + (1 - frac) * low
    predicted_x_0 = (x_t - at(tables.sigma, t) * eps) / at(tables.alpha, t)
    mean = at(tables.mean_x_0, t) * predicted_x_0 + at(tables.mean_x_t, t) * x_t
    true_mean = at(tables.mean_x_0, t) * x_0 + at(tables.mean_x_t, t) * x_t

    kl = mean_flat(normal_kl(true_mean, low, mean, log_variance))
    nll = mean_flat(-discretised_log_likelihood(x_0, mean, 0.5 * log_variance))
    return jnp.where(t == 0, nll, kl) / np.log(2.0)


def min_snr_weight(alpha: jax.Array, sigma: jax.Array, prediction: str) -> jax.Array:
    """`min(SNR, gamma)`, as a factor on the loss of the prediction  (Min-SNR, 2303.09556).

    The squared error of x_0 times `min(SNR, gamma)`; that of eps is SNR times as large, that of
    v SNR + 1 times.
    """
    snr = (alpha / sigma) ** 2
    return jnp.minimum(snr, MIN_SNR_GAMMA) / (snr if prediction == "eps" else snr + 1)


def hybrid_loss(
    tables: Tables,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    output: jax.Array,
    *,
    prediction: str = "eps",
    weighting: str = "none",
    vlb_weight: float | None = None,
) -> Terms:
    """`L_simple + vlb_weight L_vlb`  (Improved DDPM, eq. 16; GLIDE, sec. 2.1).

    The bound trains the variance alone: no gradient flows from it into the noise prediction.

    Args:
        x_0, x_t, eps: `(B, H, W, C)`; `eps` is the true noise.
        t: `(B,)` integers.
        output: `(B, H, W, 2C)` prediction and variance, or `(B, H, W, C)` prediction alone (no
            bound then).
        prediction: what the network predicts: "eps", or "v" = `alpha eps - sigma x_0`
            (2202.00512).
        weighting: of L_simple over noise levels: "none", or "min-snr".
        vlb_weight: None for T / 1000, that is 0.001 times the estimate `T L_t` of the whole bound.

    Returns:
        `Terms`, in the mean over all dimensions of a picture; `mse` unweighted.
    """
    channels = x_0.shape[-1]
    predicted, variance = output[..., :channels], output[..., channels:]
    alpha, sigma = at(tables.alpha, t), at(tables.sigma, t)
    target = eps if prediction == "eps" else alpha * eps - sigma * x_0
    mse = mean_flat((predicted - target) ** 2)
    simple = mse
    if weighting == "min-snr":
        simple = mse * min_snr_weight(alpha, sigma, prediction)[:, 0, 0, 0]
    if not variance.shape[-1]:
        return Terms(simple, mse, jnp.zeros_like(mse))
    predicted_eps = to_eps(prediction, predicted, x_t, alpha, sigma)
    if vlb_weight is None:
        vlb_weight = len(tables.alpha) / 1000
    vlb = vlb_weight * vlb_terms(
        tables, x_0, x_t, t, jax.lax.stop_gradient(predicted_eps), variance
    )
    return Terms(simple + vlb, mse, vlb)
