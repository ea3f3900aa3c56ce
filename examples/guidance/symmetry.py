"""Kaleidoscope: an image that all mirrors and quarter turns leave unchanged  (2402.03559).

A projection of x_0 onto the images with this symmetry, at every step. Cost: no network evaluation
of its own.

python examples/guidance/symmetry.py
"""

from show import CFG, show

import glide_jax as glide


@glide.guidance()
def kaleidoscope(predict, x, point):
    """The mean of x_0 over the eight symmetries of the square."""
    p = predict(x, point)
    total = p.x_0 + p.x_0[:, :, ::-1]
    total = total + total[:, ::-1]
    total = total + total.swapaxes(1, 2)
    return p.with_x_0(total / 8, x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a blossom", "a pizza", "a cyclone"]
    after = [CFG, kaleidoscope()]
    return show("symmetry", prompts, [CFG], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
