"""Prompt schedule: one prompt for the shape, another for the details  (eDiff-I, 2211.01324).

At high noise the other prompt replaces the caption. Cost: 2 network evaluations per step above the
level, 1 below it.

python examples/guidance/prompt_schedule.py
"""

import numpy as np
from show import show

from glide_jax import Branch, Guidance


def first(prompt, level=1.0):
    """Return the guidance: `eps(prompt)` in place of `eps(c)` where sigma/alpha > level."""
    return Guidance(_first, {}, (Branch("first", prompt=prompt),)).within(level, np.inf)


def _first(predict, x, point):
    p = predict(x, point)
    return p.with_eps(p.eps + p.branches["first"] - p.branches["caption"], x, point)


def main(out="samples", weights="emoji64", **settings):
    prompts = ["a soccer ball", "a full moon", "a cookie"]
    after = [first("a red apple", 10.0)]
    return show("prompt_schedule", prompts, [], after, out=out, weights=weights, **settings)


if __name__ == "__main__":
    main()
