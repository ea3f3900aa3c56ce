"""Colour: the mean colour of the object becomes a given colour  (2302.07121, sec. 3.2).

The backward guidance of that paper for the loss `|m - colour|^2`, whose minimiser is known. White
is the background: a pixel counts by its distance from it. Cost: no network evaluation of its own.

python examples/guidance/colour.py
"""

import jax.numpy as jnp
from show import CFG, show

import glide_jax as glide
from glide_jax.diffusion.guidance import per_image


@glide.guidance(amount=(0, 1))
def colour(predict, x, point, *, goal, amount=1.0):
    """`x_0 + a w (goal - m) sum w / sum w^2`, m: mean of x_0 with weights `w = 1 - min_rgb x_0`."""
    p = predict(x, point)
    weight = 1 - jnp.clip(p.x_0, -1, 1).min(axis=-1, keepdims=True)
    total, squares = (jnp.sum(w, (1, 2), keepdims=True) + 1e-3 for w in (weight, weight**2))
    mean = jnp.sum(weight * p.x_0, (1, 2), keepdims=True) / total
    change = weight * total / squares * (goal[:, None, None] - mean)
    return p.with_x_0(p.x_0 + per_image(amount) * change, x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a strawberry", "a cat", "an automobile"]
    blue = jnp.array([[-0.7, -0.2, 0.8]])
    after = [CFG, colour(blue).within(0.3, 20.0)]
    return show("colour", prompts, [CFG], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
