"""Whole short runs of the release's procedures, step by step, against the original code.

Reference loops carry the noise of four pictures: two conditional, then two unconditional, which
the release draws and discards; here the first two are used.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.grids import make_grid
from glide_jax.diffusion.guidance import Network, gradient, known_pixels
from glide_jax.diffusion.guidance.linear import classifier_free, clip
from glide_jax.diffusion.sampling import plan, stream
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.diffusion.solvers.ancestral import ddim, ddim_reverse
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.clip_guide import Similarity
from tests import golden
from tests.support.golden import assert_close, assert_relative, load, nhwc, steps_nhwc
from tests.models.test_clip import config as clip_config
from tests.models.test_clip import params as clip_params


@cache
def features(name: str):
    """Text features of the loops' four captions: two given, two empty."""
    loops = load("loops")
    return golden.encode(name, loops["tokens"], loops["mask"])


def conditions(name: str, **images) -> dict:
    text = features(name)
    cond = jax.tree.map(lambda leaf: leaf[:2], text)
    null = jax.tree.map(lambda leaf: leaf[2:], text)
    return {"cond": (cond, images), "null": (null, images)}


def run(name, schedule, steps, solver, guidance, x, noise=None, **images):
    """The states after each step (not each row), `(steps, B, H, W, C)`, and the last state."""
    schedule = make_schedule(schedule)
    p = plan(schedule, make_grid(schedule, str(steps), "uniform"), solver, guidance)
    x = jnp.asarray(x)
    tape = jnp.zeros((len(p), *x.shape)) if noise is None else jnp.asarray(noise)
    networks = {"main": golden.network(name)}
    found = []
    for done, state in stream(networks, conditions(name, **images), p, x, tape):
        if done == len(p) or p.table.step[done] != p.table.step[done - 1]:
            found.append(np.asarray(state.x))
    return np.stack(found), state


def start(prefix: str = "base") -> tuple[np.ndarray, np.ndarray]:
    """`x_T` and the noise tape of the first two pictures."""
    loops = load("loops")
    return nhwc(loops[f"{prefix}.x_T"])[:2], steps_nhwc(loops[f"{prefix}.noise"])[:, :2]


def known(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    loops = load("loops")
    image, mask = nhwc(loops[f"{prefix}.image"]), nhwc(loops[f"{prefix}.mask"])
    return np.broadcast_to(image, (2, *image.shape[1:])), np.broadcast_to(
        mask, (2, *mask.shape[1:])
    )


@pytest.mark.parametrize("solver", ["plms", "prk"])
def test_pseudo_linear_multistep_on_the_tiny_model(solver):
    scale = classifier_free(scale=3.0)
    found, _ = run("base", "cosine", 10, SOLVERS[solver], [scale], start()[0])
    assert_close(found, steps_nhwc(load("loops")[f"base_{solver}.steps"]), 5e-3)


@pytest.mark.parametrize("solver", ["plms", "prk"])
@pytest.mark.parametrize("steps", [10, 27])
@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear"])
def test_pseudo_linear_multistep_on_a_known_noise(name, steps, solver):
    reference, key = load("plms_math"), f"{name}|{steps}|{solver}"
    schedule = make_schedule(golden.SCHEDULES[name])
    p = plan(schedule, make_grid(schedule, steps, "uniform"), SOLVERS[solver])
    np.testing.assert_allclose(p.table.t, reference[f"{key}|t_seen"], atol=4e-3)

    def eps(_, x, t, cond):
        return jnp.tanh(0.8 * x + 0.5 * t[:, None, None, None] / 1000 - 0.2)

    x = jnp.asarray(nhwc(reference["x_T"]))
    found = []
    tape = jnp.zeros((len(p), *x.shape))
    for done, state in stream({"main": Network(eps, None)}, {"cond": ()}, p, x, tape):
        if done == len(p) or p.table.step[done] != p.table.step[done - 1]:
            found.append(np.asarray(state.x))
    assert_close(np.stack(found), steps_nhwc(reference[f"{key}|x"]), 7e-4)
    # What the last slope says of the clean picture; x_0 of the last evaluation in plms.
    at = p.table.step == p.table.step[-1]
    alpha, sigma = p.table.alpha[at][0], p.table.sigma[at][0]
    before = found[-2]
    slope = np.asarray(state.history[0]) if solver == "prk" else None
    x_0 = np.asarray(state.x_0) if slope is None else (before - sigma * slope) / alpha
    assert_close(np.clip(x_0, -1, 1), nhwc(reference[f"{key}|pred_xstart"]), 1e-5)


def test_inpainting_keeps_and_guides():
    image, mask = known("inpaint")
    guidance = [classifier_free(scale=5.0), known_pixels(image=image, mask=mask), clip()]
    images = {"inpaint_image": image, "inpaint_mask": mask}
    x, noise = start()
    found, state = run("inpaint", "cosine", 6, SOLVERS["ddpm"], guidance, x, noise, **images)
    assert_close(found, steps_nhwc(load("loops")["inpaint_p.steps"]), 3e-4)
    keep = np.broadcast_to(mask == 1, image.shape)
    assert_close(np.asarray(state.x)[keep], image[keep], 1e-6)


def test_inpainting_through_the_upsampler():
    loops, (image, mask) = load("loops"), known("up_inpaint")
    images = {
        "inpaint_image": image,
        "inpaint_mask": mask,
        "low_res": nhwc(loops["up.low_res"]),
    }
    guidance = [known_pixels(image=image, mask=mask), clip()]
    x, noise = start("up")
    solver = SOLVERS["ddpm"]
    found, _ = run("superres_inpaint", "linear", 4, solver, guidance, x, noise, **images)
    assert_close(found, steps_nhwc(loops["up_inpaint_p.steps"]), 3e-3)


def clip_guidance(scale: float):
    loops = load("loops")
    model = NoisedCLIP(clip_config())
    tokens, lengths = (loops[f"clipguided.clip_{k}"].astype(np.int32) for k in ("tokens", "lens"))
    text = model.apply({"params": clip_params()}, tokens, lengths, method="encode_text")
    return gradient(log_prob=Network(Similarity(model), clip_params()), cond=text, scale=scale)


def test_clip_guidance_moves_the_mean_by_the_learned_variance():
    x, noise = start()
    found, _ = run("base", "cosine", 6, SOLVERS["ddpm"], [clip(), clip_guidance(3.0)], x, noise)
    assert_close(found, steps_nhwc(load("loops")["clipguided_p.steps"]), 2e-4)


def test_clip_guidance_of_the_deterministic_sampler():
    solver = partial(ddim, released=True)
    found, _ = run("base", "cosine", 4, solver, [clip(), clip_guidance(3.0)], start()[0])
    # Without a second clip the noisiest step explodes, as it does in the original.
    assert_relative(found, steps_nhwc(load("loops")["clipguided_ddim.steps"]), 2e-4)


def test_reverse_ddim_turns_a_picture_into_noise():
    loops = load("loops")
    x = nhwc(loops["ddim_reverse.x0"])
    reference = steps_nhwc(loops["ddim_reverse.steps"])
    found, _ = run("base", "cosine", 4, ddim_reverse, [clip()], x)
    assert_close(found[: len(reference)], reference, 2e-4)
