"""Guidance by gradients with respect to x_t: of classifiers, a noised CLIP, losses of the image.

The functions here compute a gradient g, already times its scale. The loop over the sampler's table
(`run_rows` in `sampling.py`) adds it in one of two ways:

    mean + Sigma g              ancestral samplers  (ADM, 2105.05233, algorithm 1)
    x_0 + (sigma^2 / alpha) g   all other samplers  (ADM, algorithm 2)

The table's columns choose between them: `mean_per_gradient` is 1 or 0, `x_0_per_gradient` is 0 or
`sigma^2 / alpha`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glide_jax.diffusion.guidance.interface import Guidance, guidance, per_image
from glide_jax.diffusion.guidance.predictor import Network, Number, Point, Predict, Prediction
from glide_jax.diffusion.schedule import x_0_per_gradient
from glide_jax.errors import check_finite

# Standard deviation of pixels in [-1, 1]  (sigma_data of EDM, 2206.00364).
DATA_STD = 0.5


@guidance(limit=(0, float("inf")))
def classifier_guidance(
    predict: Predict,
    x: jax.Array,
    point: Point,
    *,
    log_prob: Network,
    cond: Any,
    scale: Number,
    limit: Number | None = None,
) -> Prediction:
    """Classifier guidance and CLIP guidance: `gradient + s grad log p(y | x_t)`  (ADM, 2105.05233).

    `log_prob` is any classifier of noised images (ADM, algorithms 1 and 2), or the noised CLIP of
    `glide_jax.load_clip`. For the CLIP, `log p = k f(x_t, t) . g(c)`, where k is its logit scale
    (GLIDE, sec. 2.4).

    Args:
        log_prob: a network with output `(B,)`: the log-probability up to a constant.
        cond: its conditioning (y); arrays with the batch as first axis.
        scale: s; larger follows the classifier more closely.
        limit: largest change of x_0, in standard deviations, at least 0: see `limit_gradient`. It
            is meant for samplers that add the gradient to x_0; None: no limit.
    """
    p = predict(x, point)
    slope = jax.grad(lambda x: _total(log_prob, x, point, cond))(x)
    gradient = per_image(scale) * slope
    if limit is not None:
        gradient = limit_gradient(gradient, point, limit)
    return p._replace(guidance_gradient=p.guidance_gradient + gradient)


def limit_gradient(gradient: jax.Array, point: Point, limit: Number) -> jax.Array:
    """Shorten a gradient, so that `rms(sigma^2 / alpha gradient) <= limit sd(x_0 | x_t)`.

    `sd(x_0 | x_t) = 1 / sqrt(1 / 0.5^2 + (alpha / sigma)^2)`, for Gaussian pixels of standard
    deviation 0.5: about sigma / alpha at low noise, and at most 0.5. The true gradient obeys such
    a law: it changes x_0 by `Cov(x_0 | x_t) grad_{x_0} log p`. A network's gradient does not,
    and at high noise `sigma^2 / alpha` multiplies it by more than a hundred.

    Args:
        gradient: `(B, H, W, C)`; each image has its own factor, of at most 1.
        limit: at least 0.
    """
    posterior_std = 1 / jnp.sqrt(1 / DATA_STD**2 + (point.alpha / point.sigma) ** 2)
    rms = jnp.sqrt((gradient**2).mean(axis=(1, 2, 3), keepdims=True))
    change = x_0_per_gradient(point.alpha, point.sigma) * rms
    change = jnp.maximum(change, jnp.finfo(rms.dtype).tiny)
    return gradient * jnp.minimum(1, per_image(limit) * posterior_std / change)


def image_loss(
    loss: Network, cond: Any, scale: Number, *, through_network: bool = True
) -> Guidance:
    """Image loss: `gradient - s grad loss(x_0(x_t))` on clean images  (2209.14687; 2302.07121).

    Args:
        loss: a network with `fn(params, x_0, t, cond) -> (B,)`. Its `x_0` is the result of the
            guidances listed before this one; no gradient flows where they clip it.
        cond: what the loss compares with; arrays with the batch as first axis.
        scale: s; larger follows the loss more closely.
        through_network: differentiate through the network, at the cost and with the memory of a
            backward pass; otherwise `d x_0 / d x_t` is taken to be `1 / alpha`.

    Raises:
        UsageError: the scale is not finite.
    """
    check_finite({"scale of image_loss": scale})
    args = {"loss": loss, "cond": cond, "scale": scale}
    return Guidance(_image_loss if through_network else _image_loss_of_x_0, args)


def _image_loss(
    predict: Predict, x: jax.Array, point: Point, *, loss: Network, cond: Any, scale: Number
) -> Prediction:
    def value(x: jax.Array) -> tuple[jax.Array, Prediction]:
        p = predict(x, point)
        return _total(loss, p.x_0, point, cond), p

    slope, p = jax.grad(value, has_aux=True)(x)
    return p._replace(guidance_gradient=p.guidance_gradient - per_image(scale) * slope)


def _image_loss_of_x_0(
    predict: Predict, x: jax.Array, point: Point, *, loss: Network, cond: Any, scale: Number
) -> Prediction:
    p = predict(x, point)
    slope = jax.grad(lambda x_0: _total(loss, x_0, point, cond))(p.x_0) / point.alpha
    return p._replace(guidance_gradient=p.guidance_gradient - per_image(scale) * slope)


def _total(network: Network, x: jax.Array, point: Point, cond: Any) -> jax.Array:
    """Return the sum of the outputs over the batch.

    An output depends on its own image alone, so the gradient of the sum holds the gradient of each
    image's output.
    """
    return network(x, jnp.full(len(x), point.t), cond).sum()
