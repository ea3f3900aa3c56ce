"""Guidance that maps the estimate of the clean image: rescaling, thresholds, known pixels."""

import jax
import jax.numpy as jnp

from glide_jax.diffusion.guidance.interface import guidance, per_image
from glide_jax.diffusion.guidance.linear import TINY
from glide_jax.diffusion.guidance.predictor import CAPTION, Number, Point, Predict, Prediction


@guidance(amount=(0, 1))
def guidance_rescale(
    predict: Predict, x: jax.Array, point: Point, *, amount: Number = 0.7
) -> Prediction:
    """CFG rescale: `a x_0 std(x_0(c)) / std(x_0) + (1 - a) x_0`  (2305.08891, eqs. 15-16).

    std is the standard deviation of each image. The guidance removes the contrast that linear
    guidance adds; 0.7 is the paper's value.
    """
    p = predict(x, point)
    caption_x_0 = point.x_0_of(p.branches[CAPTION.name], x)
    both = caption_x_0, p.x_0
    wanted, actual = (jnp.std(x_0, axis=(1, 2, 3), keepdims=True) for x_0 in both)
    gain = wanted / jnp.maximum(actual, TINY)
    return p.with_x_0(p.x_0 * (1 + per_image(amount) * (gain - 1)), x, point)


@guidance(quantile=(0, 1))
def dynamic_threshold(
    predict: Predict, x: jax.Array, point: Point, *, quantile: Number = 0.995
) -> Prediction:
    """Dynamic thresholding: `clip(x_0, -b, b) / b`, `b = max(1, quantile of |x_0|)`.

    From Imagen (2205.11487, sec. 2.3).
    """
    p = predict(x, point)
    # A full sort: the rank is traced, and on a CPU top_k of a fixed rank is not faster.
    ordered = jnp.sort(jnp.abs(p.x_0).reshape(len(x), -1), axis=1)
    last = ordered.shape[1] - 1
    rank = jnp.broadcast_to(jnp.asarray(quantile), len(x))[:, None] * last
    low = rank.astype(int)
    below, above = (
        jnp.take_along_axis(ordered, i, axis=1) for i in (low, jnp.minimum(low + 1, last))
    )
    bound = per_image(jnp.maximum(below + (rank - low) * (above - below), 1)[:, 0])
    return p.with_x_0(jnp.clip(p.x_0, -bound, bound) / bound, x, point)


@guidance(low=(-float("inf"), "high"))
def clamp_x_0(
    predict: Predict, x: jax.Array, point: Point, *, low: Number = -1.0, high: Number = 1.0
) -> Prediction:
    """Clipping: `clip(x_0, low, high)`, the range of images  (`clip_denoised` of OpenAI's code)."""
    p = predict(x, point)
    return p.with_x_0(jnp.clip(p.x_0, per_image(low), per_image(high)), x, point)


@guidance()
def known_pixels(
    predict: Predict, x: jax.Array, point: Point, *, image: jax.Array, known: jax.Array
) -> Prediction:
    """Known pixels: `x_0 (1 - known) + image known`  (GLIDE, sec. 4.3).

    Args:
        image: `(B, H, W, 3)` in [-1, 1].
        known: `(B, H, W, 1)`, 1 where the pixel is kept.
    """
    p = predict(x, point)
    return p.with_x_0(p.x_0 * (1 - known) + image * known, x, point)
