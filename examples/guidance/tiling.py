"""Seamless tiles: predictions of four cyclic shifts of the image, joined  (2302.08113).

MultiDiffusion with windows that wrap around: each pixel takes most from the shift in whose middle
it lies. Cost: 4 times the network evaluations of the guidances before it.

python examples/guidance/tiling.py
"""

import jax.numpy as jnp
import numpy as np
from show import CFG, show

import glide_jax as glide


@glide.guidance()
def tiling(predict, x, point):
    """`sum_k shift_k^-1 (w x_0(shift_k x_t))`, the windows w of the four shifts sum to 1."""
    side, total = x.shape[1], 0.0
    bump = jnp.sin(jnp.pi * (jnp.arange(side) + 0.5) / side) ** 2
    window = (bump[:, None] * bump)[..., None]
    for shift in ((0, 0), (0, side // 2), (side // 2, 0), (side // 2, side // 2)):
        p = predict(jnp.roll(x, shift, (1, 2)), point)
        total += jnp.roll(window * p.x_0, (-shift[0], -shift[1]), (1, 2))
    return p.with_x_0(total, x, point)


def twice(images):
    """Tile each image 2x2, at half the size."""
    return np.tile(images, (1, 2, 2, 1))


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a four leaf clover", "a brick", "confetti"]
    after = [CFG, tiling()]
    return show("tiling", prompts, [CFG], after, view=twice, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
