"""Palette: every pixel gets the nearest of a few colours  (projection of x_0, 2402.03559).

Soft at high noise levels, hard at the end of sampling, below sigma/alpha 0.25. Cost: no network
evaluation of its own.

python examples/guidance/palette.py
"""

import jax
import jax.numpy as jnp
from show import CFG, show

import glide_jax as glide

FOUR = jnp.array([[15, 56, 15], [48, 98, 48], [139, 172, 15], [240, 250, 220]]) / 127.5 - 1


@glide.guidance()
def palette(predict, x, point, *, colours):
    """`sum_k softmax(-|x_0 - c_k|^2 / (2 v))_k c_k`, `v = max(sigma / alpha - 0.25, 0.01)^2`."""
    p = predict(x, point)
    distance = jnp.sum((p.x_0[..., None, :] - colours[:, None, None]) ** 2, axis=-1)
    width = jnp.maximum(point.sigma / point.alpha - 0.25, 0.01) ** 2
    shares = jax.nn.softmax(-distance / (2 * width), axis=-1)
    return p.with_x_0(jnp.einsum("bhwk,bkc->bhwc", shares, colours), x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a castle", "a parrot", "a hamburger"]
    after = [CFG, palette(FOUR[None]).within(0.0, 3.0)]
    return show("palette", prompts, [CFG], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
