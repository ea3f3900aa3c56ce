"""DDIM with classifier-free guidance as a plain loop, compared with the library's sampler.

python examples/ddim_loop.py "a red apple"
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import glide_jax as glide


def ddim(pipe: glide.Pipeline, prompt: str, noise: jnp.ndarray, steps: int, scale: float):
    """Return the image `(1, H, W, 3)` in [-1, 1] that DDIM computes from the noise."""
    network, evaluate = pipe.network, jax.jit(glide.Network.__call__)
    timesteps = glide.make_timesteps(pipe.schedule, steps, "uniform")
    alpha_bar = np.append(pipe.schedule.alpha_bar_at(timesteps), 1.0)
    text = pipe.encode_captions([prompt, ""])
    x = noise
    for t, now, then in zip(timesteps, alpha_bar[:-1], alpha_bar[1:], strict=True):
        alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
        output = evaluate(network, jnp.concatenate([x, x]), jnp.full(2, t), {"text": text})[..., :3]
        both = output if network.prediction_type == "eps" else alpha * output + sigma * x
        eps = both[1:] + scale * (both[:1] - both[1:])  # eps(null) + s (eps(c) - eps(null))
        x_0 = jnp.clip((x - sigma * eps) / alpha, -1, 1)
        eps = (x - alpha * x_0) / sigma
        x = np.sqrt(then) * x_0 + np.sqrt(1 - then) * eps
    return x


def library(pipe: glide.Pipeline, prompt: str, noise: jnp.ndarray, steps: int, scale: float):
    """Return the same image, computed with `glide.make_plan` and `glide.run_plan`."""
    plan = glide.make_plan(
        pipe.schedule,
        glide.make_timesteps(pipe.schedule, steps, "uniform"),
        glide.SOLVERS["ddim"],
        [glide.classifier_free(scale), glide.clamp_x_0()],
    )
    conds = {n: {"text": pipe.encode_captions([p])} for n, p in (("caption", prompt), ("null", ""))}
    return glide.run_plan({"main": pipe.network}, conds, plan, noise, jax.random.key(0)[None]).x


def main(prompt: str = "a red apple", weights: str = "emoji64", steps: int = 10, scale: float = 3):
    """Return the largest difference: loop and library in [-1, 1], loop and pipeline in 8 bits."""
    pipe = glide.load(weights, upsampler="none", clip_model="none", dtype="float32")
    side = pipe.model.config.image_size
    noise = jnp.float32(np.random.default_rng(0).standard_normal((1, side, side, 3)))
    a, b = (sampler(pipe, prompt, noise, steps, scale) for sampler in (ddim, library))
    options = {"sampler": "ddim", "spacing": "uniform", "steps": steps, "guidance_scale": scale}
    images = pipe(prompt, noise=noise, progress=False, **options)
    found = np.abs(a - b).max(), np.abs(np.round((a + 1) * 127.5) - images.images).max()
    print(f"largest difference: {found[0]:.1e}, in 8 bits: {found[1]:.0f}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
