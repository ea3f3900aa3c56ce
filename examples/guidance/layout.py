"""Layout: everything outside a box is white while the shapes form  (2302.07121, sec. 3.2).

The backward guidance of that paper for the loss `sum (1 - x_0)^2` outside the box, whose minimiser
is known. Cost: no network evaluation of its own.

python examples/guidance/layout.py
"""

import jax.numpy as jnp
import numpy as np
from show import CFG, show

import glide_jax as glide
from glide_jax.diffusion.guidance import per_image


@glide.guidance(amount=(0, 1))
def layout(predict, x, point, *, box, amount=1.0):
    """`x_0 + a (1 - x_0)` outside `box (B, 4)`: left, top, right, bottom in shares of the side."""
    p = predict(x, point)
    at = (jnp.arange(x.shape[1]) + 0.5) / x.shape[1]
    left, top, right, bottom = (side[:, None] for side in box.T)
    inside = ((top <= at) & (at < bottom))[:, :, None] & ((left <= at) & (at < right))[:, None]
    change = per_image(amount) * (1 - p.x_0)
    return p.with_x_0(jnp.where(inside[..., None], p.x_0, p.x_0 + change), x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a red apple", "a fish", "a cactus"]
    after = [CFG, layout(np.array([[0.0, 0.0, 0.6, 0.6]])).within(0.5, np.inf)]
    return show("layout", prompts, [CFG], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
