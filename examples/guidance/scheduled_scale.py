"""Scheduled scale: classifier-free guidance that grows while the noise falls  (2404.13040).

With `growth` 1 the factor of `(s - 1) (eps(c) - eps(null))` rises linearly from 0 at the noisiest
timestep to 2 at the cleanest; its mean is 1. 0 keeps it constant, -1 lets it fall from 2 to 0.
Cost: 2 network evaluations per step, as classifier-free guidance.

python examples/guidance/scheduled_scale.py
"""

from show import show

import glide_jax as glide
from glide_jax.diffusion.guidance import NULL, per_image

LAST = 999  # the noisiest timestep


@glide.guidance(NULL, growth=(-1, 1))
def scheduled_scale(predict, x, point, *, scale, growth=1.0):
    """`eps(c) + (s - 1)(1 + g (1 - 2 t / T)) (eps(c) - eps(null))`."""
    p = predict(x, point)
    difference = p.branches["caption"] - p.branches["null"]
    weight = 1 + per_image(growth) * (1 - 2 * point.t / LAST)
    return p.with_eps(p.eps + (per_image(scale) - 1) * weight * difference, x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a castle", "a parrot", "a hamburger"]
    before, after = [glide.classifier_free(6.0)], [scheduled_scale(6.0)]
    return show("scheduled_scale", prompts, before, after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
