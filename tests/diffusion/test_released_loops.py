"""Short runs of the procedures of OpenAI's code, step by step, against that code.

The reference loops have the noise of four images: two conditional ones, then two unconditional
ones, whose noise OpenAI's code samples and discards. The first two are used here.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.guidance import (
    Network,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    known_pixels,
)
from glide_jax.diffusion.sampling import make_plan, stream_plan
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.diffusion.solvers.first_order import ddim, ddim_reverse
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.clip_guide import Similarity
from tests.models.test_clip import config as clip_config
from tests.models.test_clip import params as clip_params
from tests.support import golden
from tests.support.golden import assert_close, assert_relative, load, nhwc, steps_nhwc


@cache
def features(name: str):
    """Return the text features of the loops' four captions: two prompts, two empty ones."""
    loops = load("loops")
    return golden.encode(name, loops["tokens"], loops["mask"])


def conditions(name: str, **images) -> dict:
    text = features(name)
    cond = jax.tree.map(lambda leaf: leaf[:2], text)
    null = jax.tree.map(lambda leaf: leaf[2:], text)
    return {"caption": (cond, images), "null": (null, images)}


def run(name, schedule, steps, solver, guidance, x, noise=None, **images):
    """Return x after each step (not each row), `(steps, B, H, W, C)`, and the last state."""
    schedule = make_schedule(schedule)
    p = make_plan(schedule, make_timesteps(schedule, str(steps), "uniform"), solver, guidance)
    x = jnp.asarray(x)
    tape = jnp.zeros((len(p), *x.shape)) if noise is None else jnp.asarray(noise)
    networks = {"main": golden.network(name)}
    found = []
    for done, state in stream_plan(networks, conditions(name, **images), p, x, tape):
        if done == len(p) or p.table.step[done] != p.table.step[done - 1]:
            found.append(np.asarray(state.x))
    return np.stack(found), state


def start(prefix: str = "base") -> tuple[np.ndarray, np.ndarray]:
    """Return `x_T` and the noise tape of the first two images."""
    loops = load("loops")
    return nhwc(loops[f"{prefix}.x_T"])[:2], steps_nhwc(loops[f"{prefix}.noise"])[:, :2]


def image_and_known(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and its known pixels (1: kept), as two images."""
    loops = load("loops")
    arrays = (nhwc(loops[f"{prefix}.{name}"]) for name in ("image", "mask"))
    image, known = (np.broadcast_to(array, (2, *array.shape[1:])) for array in arrays)
    return image, known


@pytest.mark.parametrize("solver", ["plms", "prk"])
def test_pseudo_linear_multistep_on_the_tiny_model(solver):
    guidance = [classifier_free(3.0)]
    found, _ = run("base", "cosine", 10, SOLVERS[solver], guidance, start()[0])
    assert_close(found, steps_nhwc(load("loops")[f"base_{solver}.steps"]), 5e-3)


@pytest.mark.parametrize("solver", ["plms", "prk"])
@pytest.mark.parametrize("steps", [10, 27])
@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "linear"])
def test_pseudo_linear_multistep_on_a_known_noise(name, steps, solver):
    reference, key = load("plms_math"), f"{name}|{steps}|{solver}"
    schedule = make_schedule(golden.SCHEDULES[name])
    p = make_plan(schedule, make_timesteps(schedule, steps, "uniform"), SOLVERS[solver])
    np.testing.assert_allclose(p.table.t, reference[f"{key}|t_seen"], atol=4e-3)

    def eps(_, x, t, cond):
        return jnp.tanh(0.8 * x + 0.5 * t[:, None, None, None] / 1000 - 0.2)

    x = jnp.asarray(nhwc(reference["x_T"]))
    found = []
    tape = jnp.zeros((len(p), *x.shape))
    for done, state in stream_plan({"main": Network(eps, None)}, {"caption": ()}, p, x, tape):
        if done == len(p) or p.table.step[done] != p.table.step[done - 1]:
            found.append(np.asarray(state.x))
    assert_close(np.stack(found), steps_nhwc(reference[f"{key}|x"]), 7e-4)
    # The reference takes x_0 from the last slope in prk, from the last evaluation in plms.
    at = p.table.step == p.table.step[-1]
    alpha, sigma = p.table.alpha[at][0], p.table.sigma[at][0]
    before = found[-2]
    slope = np.asarray(state.history[0]) if solver == "prk" else None
    x_0 = np.asarray(state.x_0) if slope is None else (before - sigma * slope) / alpha
    assert_close(np.clip(x_0, -1, 1), nhwc(reference[f"{key}|pred_xstart"]), 1e-5)


def test_inpainting_keeps_known_pixels_and_guides():
    image, known = image_and_known("inpaint")
    guidance = [classifier_free(5.0), known_pixels(image, known), clamp_x_0()]
    images = {"inpaint_image": image, "inpaint_known": known}
    x, noise = start()
    found, state = run("inpaint", "cosine", 6, SOLVERS["ddpm"], guidance, x, noise, **images)
    assert_close(found, steps_nhwc(load("loops")["inpaint_p.steps"]), 3e-4)
    keep = np.broadcast_to(known == 1, image.shape)
    assert_close(np.asarray(state.x)[keep], image[keep], 1e-6)


def test_inpainting_through_the_upsampler():
    loops, (image, known) = load("loops"), image_and_known("up_inpaint")
    images = {
        "inpaint_image": image,
        "inpaint_known": known,
        "low_res": nhwc(loops["up.low_res"]),
    }
    guidance = [known_pixels(image, known), clamp_x_0()]
    x, noise = start("up")
    solver = SOLVERS["ddpm"]
    found, _ = run("superres_inpaint", "linear", 4, solver, guidance, x, noise, **images)
    assert_close(found, steps_nhwc(loops["up_inpaint_p.steps"]), 3e-3)


def clip_guidance(scale: float):
    loops = load("loops")
    model = NoisedCLIP(clip_config())
    tokens, lengths = (loops[f"clipguided.clip_{k}"].astype(np.int32) for k in ("tokens", "lens"))
    text = model.apply({"params": clip_params()}, tokens, lengths, method="encode_text")
    return classifier_guidance(Network(Similarity(model), clip_params()), text, scale)


def test_clip_guidance_moves_the_mean_by_the_learned_variance():
    x, noise = start()
    found, _ = run(
        "base", "cosine", 6, SOLVERS["ddpm"], [clamp_x_0(), clip_guidance(3.0)], x, noise
    )
    assert_close(found, steps_nhwc(load("loops")["clipguided_p.steps"]), 2e-4)


def test_clip_guidance_of_the_deterministic_sampler():
    solver = partial(ddim, float32_alpha_bar=True)
    found, _ = run("base", "cosine", 4, solver, [clamp_x_0(), clip_guidance(3.0)], start()[0])
    # x_0 is not clipped again after the gradient: the noisiest step grows huge, as in the original.
    assert_relative(found, steps_nhwc(load("loops")["clipguided_ddim.steps"]), 2e-4)


def test_ddim_inversion_turns_an_image_into_noise():
    loops = load("loops")
    x = nhwc(loops["ddim_reverse.x0"])
    reference = steps_nhwc(loops["ddim_reverse.steps"])
    found, _ = run("base", "cosine", 4, ddim_reverse, [clamp_x_0()], x)
    assert_close(found[: len(reference)], reference, 2e-4)
