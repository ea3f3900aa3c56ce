"""Guidance by differences of branches: classifier-free guidance and its relatives.

All but `apg` add multiples of differences of branches to the current eps. In this form
several of them add up, and scale 1 of `classifier_free` changes no bit of eps (x_0 of a network
that predicts v or x_0 changes by rounding, since `with_eps` computes it from eps):
`eps(c) + (s - 1) (eps(c) - eps(null)) = eps(null) + s (eps(c) - eps(null))`.
`apg` adds to x_0 instead: it projects the difference, and remembers a
running sum of the differences.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance.interface import Guidance, guidance, per_image
from glide_jax.diffusion.guidance.predictor import (
    CAPTION,
    NULL,
    WEAK,
    Branch,
    Number,
    Point,
    Predict,
    Prediction,
)
from glide_jax.errors import UsageError, check_finite

# Lower bound of a norm by which is divided: that of an image of zeros is 0.
TINY = 1e-12


@guidance(NULL)
def classifier_free(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """Classifier-free guidance: `eps(null) + s (eps(c) - eps(null))`  (2207.12598; GLIDE, 2.3).

    Scale 1 is off.
    """
    p = predict(x, point)
    difference = p.branches[CAPTION.name] - p.branches[NULL.name]
    return p.with_eps(p.eps + (per_image(scale) - 1) * difference, x, point)


def combine_prompts(
    prompts: Sequence[str | Sequence[Any] | None],
    weights: Sequence[Number],
    *,
    name: str = "prompt",
) -> Guidance:
    """Composable diffusion: `eps(null) + sum_i w_i (eps(c_i) - eps(null))`  (2206.01714, sec. 4).

    Weights above zero mean AND, below zero NOT. `combine_prompts([None], [s])` is
    `classifier_free(s)`.

    Args:
        prompts: one caption each, or a list of one per image. In both, None stands for the image's
            own caption.
        weights: one for each prompt: a number, or one per image. Not traced: build the guidance
            outside of jitted functions.
        name: prefix of the branch names. Two `combine_prompts` with different prompts need
            different names.

    Raises:
        UsageError: the numbers of weights and prompts differ, or a weight is not finite.
    """
    if len(prompts) != len(weights):
        raise UsageError(f"combine_prompts has {len(prompts)} prompts but {len(weights)} weights")
    check_finite({"weights of combine_prompts": list(weights)})
    # The sum is added to eps = eps(c), so the caption's own weight is reduced by 1.
    branch_names: dict[Any, str] = {None: CAPTION.name, "": NULL.name}
    branch_weights: dict[str, Number] = {CAPTION.name: np.asarray(-1, np.float32)}
    for prompt, weight in zip(prompts, weights, strict=True):
        prompt = tuple(prompt) if isinstance(prompt, list) else prompt
        branch = branch_names.setdefault(prompt, f"{name} {len(branch_names) - 2}")
        branch_weights[branch] = branch_weights.get(branch, 0) + np.asarray(weight, np.float32)
    needs = (Branch(key, prompt=text) for text, key in branch_names.items() if text)
    return Guidance(_combine_prompts, {"weights": branch_weights}, (NULL, *needs))


def _combine_prompts(
    predict: Predict, x: jax.Array, point: Point, *, weights: dict[str, Number]
) -> Prediction:
    p = predict(x, point)
    null = p.branches[NULL.name]
    change = sum(per_image(w) * (p.branches[name] - null) for name, w in weights.items())
    return p.with_eps(p.eps + change, x, point)


@guidance(NULL, looks_ahead=True, scale=(0, 1))
def cfg_plus_plus(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """CFG++: `eps(null) + w (eps(c) - eps(null))`, `w = s / (1 - e^-h)`  (2406.08070).

    h is the increase of log(alpha/sigma) in the step. With DDIM this is the paper's update: `x_0`
    is computed from `eps(null) + s (eps(c) - eps(null))`, and noised again with `eps(null)`; s lies
    in [0, 1].
    """
    p = predict(x, point)
    gain = 1 - point.next_sigma * point.alpha / (point.next_alpha * point.sigma)
    difference = p.branches[CAPTION.name] - p.branches[NULL.name]
    return p.with_eps(p.eps + (per_image(scale) / gain - 1) * difference, x, point)


@guidance(WEAK)
def autoguidance(predict: Predict, x: jax.Array, point: Point, *, scale: Number) -> Prediction:
    """Autoguidance: `eps_weak(c) + s (eps(c) - eps_weak(c))`, with a weak model  (2406.02507).

    Scale 1 is off.
    """
    p = predict(x, point)
    difference = p.branches[CAPTION.name] - p.branches[WEAK.name]
    return p.with_eps(p.eps + (per_image(scale) - 1) * difference, x, point)


# The paper recommends eta 0 and a negative momentum. The radius depends on the model and on the
# image size: with 2.5 the embedded model keeps its colours at scale 8; other values add stains.
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
    """Adaptive projected guidance: `x_0 + (s - 1)(D_orth + eta D_par)`  (2410.02416, alg. 1).

    M is `x_0(c) - x_0(null)` plus momentum times the M of the step before. D is M, scaled down to a
    norm of at most `radius`. D_par is the part of D parallel to `x_0(c)`, D_orth the rest. With
    eta 1, no momentum and radius inf it is `classifier_free`.
    """
    p = predict(x, point)
    caption_x_0 = point.x_0_of(p.branches[CAPTION.name], x)
    memory = point.sigma / point.alpha * (p.branches[NULL.name] - p.branches[CAPTION.name])
    memory = memory + per_image(momentum) * p.memory["apg"]
    p = p._replace(memory=p.memory | {"apg": memory})
    norm = jnp.sqrt(jnp.maximum(_dot(memory, memory), TINY))
    difference = memory * jnp.minimum(1, per_image(radius) / norm)
    square = jnp.maximum(_dot(caption_x_0, caption_x_0), TINY)
    parallel = _dot(difference, caption_x_0) / square * caption_x_0
    difference = difference - parallel + per_image(eta) * parallel
    return p.with_x_0(p.x_0 + (per_image(scale) - 1) * difference, x, point)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)
