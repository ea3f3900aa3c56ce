"""Training losses: L_simple, and the variational bound L_vlb for the learned variance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.schedule import Schedule, posterior, target_of, to_eps

# Weightings of L_simple over noise levels.
WEIGHTINGS = ("none", "min-snr", "v")
# The value that the paper recommends (2303.09556).
MIN_SNR_GAMMA = 5.0


class LossTables(NamedTuple):
    """The coefficients of the losses at each timestep: `(T,)` float32, rounded from float64.

    Attributes:
        alpha, sigma: `x_t = alpha x_0 + sigma eps`.
        log_beta, log_beta_tilde, mean_weight_x_0, mean_weight_x_t: see `Posterior`.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    log_beta: np.ndarray
    log_beta_tilde: np.ndarray
    mean_weight_x_0: np.ndarray
    mean_weight_x_t: np.ndarray


class LossTerms(NamedTuple):
    """The loss of each image and its two terms, `(B,)` float32.

    Attributes:
        loss: the weighted squared or pseudo-Huber error, plus `vlb`.
        mse: the squared error of the prediction, not weighted.
        vlb: the variational bound times its weight; zero where no variance is learned.
    """

    loss: jax.Array
    mse: jax.Array
    vlb: jax.Array


def make_tables(schedule: Schedule) -> LossTables:
    """Return the tables of a schedule: numpy arrays, that is constants of the compiled step."""
    q = posterior(schedule.betas)
    columns = (
        np.sqrt(schedule.alpha_bar),
        np.sqrt(1 - schedule.alpha_bar),
        q.log_beta,
        q.log_beta_tilde,
        q.mean_weight_x_0,
        q.mean_weight_x_t,
    )
    return LossTables(*(column.astype(np.float32) for column in columns))


def at_timesteps(table: np.ndarray, t: jax.Array) -> jax.Array:
    """Return `table[t]` as `(B, 1, 1, 1)`, to multiply images with."""
    return jnp.asarray(table)[t][:, None, None, None]


def q_sample(tables: LossTables, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Return `x_t = alpha_t x_0 + sigma_t eps`  (DDPM, eq. 4)."""
    return at_timesteps(tables.alpha, t) * x_0 + at_timesteps(tables.sigma, t) * eps


def mean_flat(x: jax.Array) -> jax.Array:
    """Return the mean over all axes but the first: `(B, ...) -> (B,)`."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(
    mean_1: jax.Array, log_var_1: jax.Array, mean_2: jax.Array, log_var_2: jax.Array
) -> jax.Array:
    """Return `KL(N_1 || N_2)` in nats, elementwise."""
    return 0.5 * (
        -1.0
        + log_var_2
        - log_var_1
        + jnp.exp(log_var_1 - log_var_2)
        + (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    )


def _normal_logit(x: jax.Array) -> jax.Array:
    # The tanh approximation of the normal distribution function, as in the code of Improved DDPM:
    # (1 + tanh(z)) / 2 = sigmoid(2 z).
    return 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Return the log-probability in nats of the 8-bit value `x` in [-1, 1]  (DDPM, eq. 13)."""
    centred, inverse = x - mean, jnp.exp(-log_scale)
    above = _normal_logit(inverse * (centred + 1 / 255))
    below = _normal_logit(inverse * (centred - 1 / 255))
    # log(sigmoid(above) - sigmoid(below)). Computed as a difference, its value and above all its
    # gradient would be nothing but rounding in the tails.
    up_to, beyond = jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-below)
    width = jnp.maximum(-jnp.expm1(below - above), 1e-30)  # the logarithm's gradient stays finite
    inner = up_to + beyond + jnp.log(width)
    log_p = jnp.where(x > 0.999, beyond, jnp.where(x < -0.999, up_to, inner))
    return jnp.maximum(log_p, np.log(1e-12))


def vlb_term(
    tables: LossTables,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    variance_output: jax.Array,
) -> jax.Array:
    """Return a term of the bound: `L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`.

    The variational bound is the sum of its terms over t. A term is in bits per dimension. At t = 0
    it is the negative log-likelihood of x_0  (Improved DDPM, 2102.09672, eqs. 4-7).

    Args:
        x_0, x_t, eps: `(B, H, W, C)`; `eps` is the predicted noise.
        t: `(B,)` integers.
        variance_output: `(B, H, W, C)`, the network's variance output. `(variance_output + 1) / 2`
            is a fraction between `beta_tilde` (0) and `beta` (1) on a log scale.

    Returns:
        `(B,)` float32.
    """
    variance_fraction = (variance_output + 1) / 2
    low, high = at_timesteps(tables.log_beta_tilde, t), at_timesteps(tables.log_beta, t)
    log_variance = variance_fraction * high + (1 - variance_fraction) * low
    predicted_x_0 = (x_t - at_timesteps(tables.sigma, t) * eps) / at_timesteps(tables.alpha, t)
    weight_x_0 = at_timesteps(tables.mean_weight_x_0, t)
    weight_x_t = at_timesteps(tables.mean_weight_x_t, t)
    mean = weight_x_0 * predicted_x_0 + weight_x_t * x_t
    true_mean = weight_x_0 * x_0 + weight_x_t * x_t

    kl = mean_flat(normal_kl(true_mean, low, mean, log_variance))
    nll = mean_flat(-discretised_log_likelihood(x_0, mean, 0.5 * log_variance))
    return jnp.where(t == 0, nll, kl) / np.log(2.0)


def loss_weight(
    weighting: str, prediction_type: str, alpha: jax.Array, sigma: jax.Array, gamma: float
) -> jax.Array:
    """Return the weight of the squared error of a prediction at a noise level.

    "none" weights every level alike. "min-snr" weights the squared error of x_0 by
    `min(SNR, gamma)`  (2303.09556). "v" weights it by `SNR + 1`, so that the loss is the squared
    error of v whatever is predicted  (2511.13720). The squared error of eps is SNR times that of
    x_0, and the squared error of v is SNR + 1 times that of x_0: the weights for these predictions
    are smaller by the same factors.
    """
    if weighting == "none":
        return jnp.ones_like(alpha)
    snr = (alpha / sigma) ** 2
    of_x_0 = jnp.minimum(snr, gamma) if weighting == "min-snr" else snr + 1
    return of_x_0 / {"eps": snr, "v": snr + 1, "x_0": 1.0}[prediction_type]


def pseudo_huber(error: jax.Array, width: float) -> jax.Array:
    """Return `2 w (sqrt(e^2 + w^2) - w)`: `e^2` for small errors, `2 w |e|` for large ones.

    For flat art this loss prefers one of two likely colours; the squared error prefers their mean.
    """
    return 2 * width * (jnp.sqrt(error**2 + width**2) - width)


def hybrid_loss(
    tables: LossTables,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    output: jax.Array,
    *,
    prediction_type: str = "eps",
    weighting: str = "none",
    gamma: float = MIN_SNR_GAMMA,
    huber_width: float = 0.0,
    vlb_weight: float | None = None,
) -> LossTerms:
    """Return `L_simple + vlb_weight L_vlb`, the hybrid loss  (2102.09672, eq. 16; GLIDE, 2.1).

    L_vlb trains the variance alone: no gradient flows from it into the noise prediction.

    Args:
        x_0, x_t, eps: `(B, H, W, C)`; `eps` is the true noise.
        t: `(B,)` integers.
        output: the network's output: `(B, H, W, 2C)`, prediction and variance output, or
            `(B, H, W, C)`, the prediction alone; L_vlb is zero then.
        prediction_type: meaning of the prediction: "eps", "v" = `alpha eps - sigma x_0`
            (2202.00512), or "x_0".
        weighting: weighting of L_simple over noise levels: see `loss_weight`.
        gamma: the gamma of "min-snr".
        huber_width: width of the pseudo-Huber loss instead of the squared error; 0: none.
        vlb_weight: weight of L_vlb; None: T / 1000, that is 0.001 times T, since `T L_t` estimates
            the whole bound.

    Returns:
        `LossTerms`, each the mean over all dimensions of an image.
    """
    channels = x_0.shape[-1]
    predicted, variance_output = output[..., :channels], output[..., channels:]
    alpha, sigma = at_timesteps(tables.alpha, t), at_timesteps(tables.sigma, t)
    error = predicted - target_of(prediction_type, x_0, eps, alpha, sigma)
    mse = mean_flat(error**2)
    simple = mean_flat(pseudo_huber(error, huber_width)) if huber_width else mse
    if weighting != "none":
        weight = loss_weight(weighting, prediction_type, alpha, sigma, gamma)
        simple = simple * weight[:, 0, 0, 0]
    if not variance_output.shape[-1]:
        return LossTerms(simple, mse, jnp.zeros_like(mse))
    predicted_eps = to_eps(prediction_type, predicted, x_t, alpha, sigma)
    if vlb_weight is None:
        vlb_weight = len(tables.alpha) / 1000
    vlb = vlb_weight * vlb_term(
        tables, x_0, x_t, t, jax.lax.stop_gradient(predicted_eps), variance_output
    )
    return LossTerms(simple + vlb, mse, vlb)
