"""A custom guidance: make the image more symmetric, left to right.

python examples/own_guidance.py "a fish" samples
"""

import sys

import numpy as np

import glide_jax as glide


@glide.guidance(amount=(0, 1))
def symmetry(predict, x, point, *, amount):
    """`(1 - a / 2) x_0 + a / 2 mirror(x_0)`: amount 1 is exact symmetry."""
    # amount is a number; for one per image: per_image(amount), from glide_jax.diffusion.guidance.
    p = predict(x, point)
    mirrored = p.x_0[:, :, ::-1]
    return p.with_x_0(p.x_0 + amount / 2 * (mirrored - p.x_0), x, point)


def asymmetry(images: np.ndarray) -> float:
    """Return the mean difference of images from their mirror images, in 8-bit levels."""
    return float(np.abs(images.astype(int) - images[:, :, ::-1]).mean())


def main(prompt: str = "a fish", out: str = "samples", weights: str = "emoji64") -> list[float]:
    found = []
    pipe = glide.load(weights, upsampler="none", clip_model="none")
    for amount in (0.0, 0.5, 1.0):
        # Linear guidance first, then maps of x_0, clipping last. `within`: only at high noise.
        guidance = [
            glide.classifier_free(3.0),
            symmetry(amount).within(0.2, np.inf),
            glide.clamp_x_0(),
        ]
        images = pipe(prompt, steps=15, seed=1, guidance=guidance)
        found.append(asymmetry(images.images))
        print(f"amount {amount}: asymmetry {found[-1]:.1f}, {images.save(out)[0]}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
