"""Visual anagram: one image, and another when it is turned upside down  (2311.17919).

Each view is guided away from the other's prompt. Cost: 4 network evaluations per step, two prompts
in two views.

python examples/guidance/anagram.py
"""

import numpy as np
from show import show

from glide_jax import Branch, Guidance
from glide_jax.diffusion.guidance import per_image


def anagram(other, scale=3.0):
    """Return the guidance; `other` is the prompt of the image upside down."""
    return Guidance(_anagram, {"scale": scale}, (Branch("other", prompt=other),))


def _anagram(predict, x, point, *, scale):
    """The mean of both views, each `eps(own) + (s - 1)(eps(own) - eps(other's))`."""
    p, turned = predict(x, point), predict(x[:, ::-1], point).branches
    strength = per_image(scale) - 1
    up = p.eps + strength * (p.branches["caption"] - p.branches["other"])
    down = turned["other"] + strength * (turned["other"] - turned["caption"])
    return p.with_eps((up + down[:, ::-1]) / 2, x, point)


def main(out="samples", weights="emoji64", **settings):
    def view(images):
        return np.concatenate([images, images[:, ::-1]])

    prompts, after = ["a frog"], [anagram("a mushroom")]
    return show("anagram", prompts, [], after, view=view, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
