"""Perturbed-attention guidance: away from a network whose pixels see only themselves  (2403.17377).

In the second evaluation the attention map is the identity, here in all attention blocks; the paper
chooses some. Needs no empty prompt. Cost: 2 network evaluations per step.

python examples/guidance/perturbed_attention.py
"""

from flax import linen as nn
from show import show

import glide_jax as glide
from glide_jax.diffusion.guidance import per_image


@glide.guidance()
def perturbed_attention(predict, x, point, *, scale):
    """`eps_id + s (eps - eps_id)`, eps_id with identity attention: scale 1 is off."""
    values = []

    def identity(call, args, kwargs, context):
        if context.module.name == "proj":  # it takes what attention returns
            args = (values.pop().reshape(args[0].shape),)
        result = call(*args, **kwargs)
        if context.module.name == "qkv":
            values.append(result[2])
        return result

    p = predict(x, point)
    with nn.intercept_methods(identity):
        weak = predict(x, point)
    return p.with_eps(p.eps + (per_image(scale) - 1) * (p.eps - weak.eps), x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a castle", "a parrot", "a hamburger"]
    after = [perturbed_attention(2.0)]
    return show("perturbed_attention", prompts, [], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
