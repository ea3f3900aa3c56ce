"""In-situ autoguidance: away from the same network with dropout  (2510.17136).

The second evaluation drops a share of the features of every residual block; the weak model of
autoguidance costs no training. Cost: 2 network evaluations per step.

python examples/guidance/in_situ.py
"""

import jax
import numpy as np
from flax import linen as nn
from show import show

import glide_jax as glide
from glide_jax.diffusion.guidance import per_image


@glide.guidance(rate=(0, 0.9))
def in_situ(predict, x, point, *, scale, rate=0.1):
    """`eps_drop + s (eps - eps_drop)`: scale 1 is off."""
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), point.t.astype(int)), 99))

    def dropout(call, args, kwargs, context):
        h = call(*args, **kwargs)
        if (context.module.name, context.method_name) != ("norm_2", "__call__"):
            return h
        kept = jax.random.bernoulli(next(keys), 1 - rate, h.shape[1:])
        return (h * kept / (1 - rate)).astype(h.dtype)

    p = predict(x, point)
    with nn.intercept_methods(dropout):
        weak = predict(x, point)
    return p.with_eps(p.eps + (per_image(scale) - 1) * (p.eps - weak.eps), x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a castle", "a parrot", "a hamburger"]
    after = [in_situ(3.0).within(1.0, np.inf)]
    return show("in_situ", prompts, [], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
