"""Guidance: functions from a noise prediction to a noise prediction.

A guidance is a pure function `Predict -> Predict` with a small host-side record around it
that says which branches the network must evaluate, which numbers it takes, and at which noise
levels it acts. Guidances are applied left to right, innermost first: `[a, b]` is `b(a(predict))`.
List them in this order:

1. linear in the branches, in any order among themselves: `autoguidance`, and one of
   `classifier_free`, `negative`, `all_of`, `cfg_plus_plus` and `apg`, whose pushes would add up;
2. maps of `x_0`, each of the one before it: `rescale`, `dynamic_threshold`, `known_pixels`, `clip`;
3. scores, which read the `x_0` that is left and act beside it: `gradient`, `image_loss`.

Every number may be a scalar or have one value an image, `(B,)`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.prediction import (
    CONDITIONAL,
    NULL,
    Branch,
    Guidance,
    Network,
    Number,
    Point,
    Predict,
    Prediction,
    guidance,
    per_image,
)
from glide_jax.diffusion.prediction import branches_of as branches_of
from glide_jax.diffusion.prediction import compose as compose
from glide_jax.errors import UsageError

# --- linear in the branches: all are written on top of eps, so that they add up, and so that
# scale 1 changes no bit


@guidance(NULL)
def classifier_free(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """`eps(null) + s (eps(c) - eps(null))`  (2207.12598; GLIDE, sec. 2.3); 1 is no guidance."""
    p = predict(x, point)
    push = p.branches["cond"] - p.branches["null"]
    return p.with_eps(p.eps + (per_image(scale) - 1) * push, x, point)


def negative(*, prompt: str, scale: Number) -> Guidance:
    """`eps(n) + s (eps(c) - eps(n))`: away from a prompt n rather than from the empty one.

    Takes the place of `classifier_free`, which it equals for the empty prompt, and costs as much.
    """
    return Guidance(_negative, {"scale": scale}, (Branch("negative", prompt=prompt),))


def _negative(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    p = predict(x, point)
    push = p.branches["cond"] - p.branches["negative"]
    return p.with_eps(p.eps + (per_image(scale) - 1) * push, x, point)


def all_of(
    *, prompts: Sequence[str | None], weights: Sequence[Number], name: str = "prompt"
) -> Guidance:
    """`eps(null) + sum_i w_i (eps(c_i) - eps(null))`  (composable diffusion, 2206.01714, sec. 4).

    Weights above zero are AND, below zero NOT. `all_of(prompts=[None], weights=[s])` is
    `classifier_free(scale=s)`.

    Args:
        prompts: one caption each; None is the picture's own.
        weights: as many.
        name: of the branches; two of these with different prompts need two names.

    Raises:
        UsageError: there are not as many weights as prompts.
    """
    if len(prompts) != len(weights):
        raise UsageError(f"all_of has {len(prompts)} prompts but {len(weights)} weights")
    # On top of eps, which holds the caption once already.
    names, total = {None: CONDITIONAL.name, "": NULL.name}, {CONDITIONAL.name: np.float32(-1)}
    for prompt, weight in zip(prompts, weights, strict=True):
        branch = names.setdefault(prompt, f"{name} {len(names) - 2}")
        total[branch] = total.get(branch, 0) + np.asarray(weight, np.float32)
    needs = (Branch(branch, prompt=prompt) for prompt, branch in names.items() if prompt)
    return Guidance(_all_of, {"weights": total}, (NULL, *needs))


def _all_of(
    predict: Predict, x: jax.Array, point: Point, *, weights: dict[str, Number]
) -> Prediction:
    p = predict(x, point)
    null = p.branches["null"]
    push = sum(per_image(w) * (p.branches[name] - null) for name, w in weights.items())
    return p.with_eps(p.eps + push, x, point)


@guidance(NULL, looks_ahead=True)
def cfg_plus_plus(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """`eps(null) + w (eps(c) - eps(null))`, `w = s / (1 - e^-h)`  (CFG++, 2406.08070).

    h is the log-SNR that the step gains. With DDIM this is the paper's update, which takes `x_0`
    from `eps(null) + s (eps(c) - eps(null))` and renoises it by `eps(null)`; s lies in [0, 1].
    """
    p = predict(x, point)
    gain = 1 - point.next_sigma * point.alpha / (point.next_alpha * point.sigma)
    push = p.branches["cond"] - p.branches["null"]
    return p.with_eps(p.eps + (per_image(scale) / gain - 1) * push, x, point)


@guidance(Branch("guide", network="guide"))
def autoguidance(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """`eps_0(c) + s (eps_1(c) - eps_0(c))`: away from a worse network, "guide"  (2406.02507)."""
    p = predict(x, point)
    push = p.branches["cond"] - p.branches["guide"]
    return p.with_eps(p.eps + (per_image(scale) - 1) * push, x, point)


# Keeps a picture of nothing, or of one colour, from being divided by zero.
TINY = 1e-12


# Eta 0 and a momentum below zero are the paper's advice. The radius goes with the model and the
# size of its pictures: 2.5 keeps the colours of the embedded one at scale 8, where others stain.
@guidance(NULL, remembers=("apg",), momentum=(-1, 1), radius=(0, float("inf")))
def apg(
    predict: Predict,
    x: jax.Array,
    point: Point,
    *,
    scale: Number,
    eta: Number = 0.0,
    momentum: Number = -0.5,
    radius: Number = 2.5,
) -> Prediction:
    """`x_0 + (s - 1)(D_orth + eta D_par)`  (adaptive projected guidance, 2410.02416, alg. 1).

    D is `x_0(c) - x_0(null)`, plus momentum times the D of the step before, shrunk to the length
    `radius`; parallel is along `x_0(c)`. With eta 1, no momentum and radius inf it is
    `classifier_free`.
    """
    p = predict(x, point)
    cond = point.to_x_0(p.branches["cond"], x)
    push = point.sigma / point.alpha * (p.branches["null"] - p.branches["cond"])
    push = push + per_image(momentum) * p.memory["apg"]
    p = p._replace(memory=p.memory | {"apg": push})
    push = push * jnp.minimum(1, per_image(radius) / jnp.sqrt(jnp.maximum(_dot(push, push), TINY)))
    parallel = _dot(push, cond) / jnp.maximum(_dot(cond, cond), TINY) * cond
    push = push - parallel + per_image(eta) * parallel
    return p.with_x_0(p.x_0 + (per_image(scale) - 1) * push, x, point)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)


# --- maps of x_0


@guidance(amount=(0, 1))
def rescale(predict: Predict, x: jax.Array, point: Point, *, amount: Number = 0.7) -> Prediction:
    """`a x_0 std(x_0(c)) / std(x_0) + (1 - a) x_0`, std of each picture  (2305.08891, eqs. 15-16).

    Against the contrast that linear guidance adds; 0.7 is the paper's.
    """
    p = predict(x, point)
    cond = point.to_x_0(p.branches["cond"], x)
    wanted, found = (jnp.std(x_0, axis=(1, 2, 3), keepdims=True) for x_0 in (cond, p.x_0))
    gain = wanted / jnp.maximum(found, TINY)
    return p.with_x_0(p.x_0 * (1 + per_image(amount) * (gain - 1)), x, point)


@guidance(quantile=(0, 1))
def dynamic_threshold(
    predict: Predict, x: jax.Array, point: Point, *, quantile: Number = 0.995
) -> Prediction:
    """`clip(x_0, -s, s) / s`, `s = max(1, quantile of |x_0|)`  (Imagen, 2205.11487, sec. 2.3)."""
    p = predict(x, point)
    # Sorted whole: the rank is traced, and on a CPU top_k of a fixed rank is not faster.
    ordered = jnp.sort(jnp.abs(p.x_0).reshape(len(x), -1), axis=1)
    last = ordered.shape[1] - 1
    rank = jnp.broadcast_to(jnp.asarray(quantile), len(x))[:, None] * last
    low = rank.astype(int)
    below, above = (
        jnp.take_along_axis(ordered, i, axis=1) for i in (low, jnp.minimum(low + 1, last))
    )
    bound = per_image(jnp.maximum(below + (rank - low) * (above - below), 1)[:, 0])
    return p.with_x_0(jnp.clip(p.x_0, -bound, bound) / bound, x, point)


@guidance()
def clip(
    predict: Predict, x: jax.Array, point: Point, *, low: Number = -1.0, high: Number = 1.0
) -> Prediction:
    """`x_0` clipped to the range of pictures  (DDPM's and GLIDE's `clip_denoised`)."""
    p = predict(x, point)
    return p.with_x_0(jnp.clip(p.x_0, per_image(low), per_image(high)), x, point)


@guidance()
def known_pixels(
    predict: Predict, x: jax.Array, point: Point, *, image: jax.Array, mask: jax.Array
) -> Prediction:
    """`x_0 (1 - m) + image m`: where the mask is 1 the picture is known  (GLIDE, sec. 4.3).

    Args:
        image: `(B, H, W, 3)` in [-1, 1]; mask: `(B, H, W, 1)`.
    """
    p = predict(x, point)
    return p.with_x_0(p.x_0 * (1 - mask) + image * mask, x, point)


# --- scores: gradients of a log-probability of x_t; the sampler's table says what they move


@guidance()
def gradient(
    predict: Predict, x: jax.Array, point: Point, *, log_prob: Network, cond: Any, scale: Number
) -> Prediction:
    """`score + s grad log p(y | x_t)`: classifier guidance  (ADM, 2105.05233, algs. 1 and 2).

    For any noised classifier, and for noised CLIP (`glide_jax.load_clip`).

    Args:
        log_prob: a network whose output is `(B,)`, the log-probability up to a constant; for
            noised CLIP `100 f(x_t, t) . g(c)`  (GLIDE, sec. 2.4).
        cond: its conditioning (y), arrays batch first.
    """
    p = predict(x, point)
    slope = jax.grad(lambda x: _total(log_prob, x, point, cond))(x)
    return p._replace(score=p.score + per_image(scale) * slope)


def image_loss(*, loss: Network, cond: Any, scale: Number, through: bool = True) -> Guidance:
    """`score - s grad loss(x_0(x_t))`, a loss on clean pictures  (DPS, 2209.14687; 2302.07121).

    Args:
        loss: `fn(params, x_0, t, cond) -> (B,)`, of the `x_0` that the guidances before this one
            leave; no gradient flows where they clip it.
        cond: what the loss compares with, arrays batch first.
        through: differentiate through the network, at the cost and with the memory of a backward
            pass; else `d x_0 / d x_t` is taken to be `1 / alpha`.
    """
    args = {"loss": loss, "cond": cond, "scale": scale}
    return Guidance(_image_loss_through if through else _image_loss, args)


def _image_loss_through(
    predict: Predict, x: jax.Array, point: Point, *, loss: Network, cond: Any, scale: Number
) -> Prediction:
    def value(x: jax.Array) -> tuple[jax.Array, Prediction]:
        p = predict(x, point)
        return _total(loss, p.x_0, point, cond), p

    slope, p = jax.grad(value, has_aux=True)(x)
    return p._replace(score=p.score - per_image(scale) * slope)


def _image_loss(
    predict: Predict, x: jax.Array, point: Point, *, loss: Network, cond: Any, scale: Number
) -> Prediction:
    p = predict(x, point)
    slope = jax.grad(lambda x_0: _total(loss, x_0, point, cond))(p.x_0) / point.alpha
    return p._replace(score=p.score - per_image(scale) * slope)


def _total(network: Network, x: jax.Array, point: Point, cond: Any) -> jax.Array:
    """The sum over the batch, whose gradient has each image's own in its place."""
    return network(x, jnp.full(len(x), point.t), cond).sum()
