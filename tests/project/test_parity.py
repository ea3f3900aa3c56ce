"""Outputs of the original code that no other test compares: steps of editing, small functions."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.diffusion.losses import hybrid_loss
from glide_jax.diffusion.solvers.first_order import ddim, ddim_reverse, ddpm
from tests.diffusion.test_losses import inputs, reference_tables
from tests.diffusion.test_sampling import each_process, echo, reference, timesteps_of
from tests.models.test_layers import weights_of
from tests.support.golden import assert_close, assert_relative, load, rows


def step(process: str, i: int, solver, guidances: Sequence, *, backwards: bool = False):
    """Take one step of image i of the reference, with its network output: the state after it."""
    schedule, timesteps = timesteps_of(process)
    one, t = slice(i, i + 1), reference(process, "t")[i]
    row = t if backwards else len(timesteps) - 1 - t
    part = rows(glide.make_plan(schedule, timesteps, solver, guidances), slice(row, row + 1))
    conds = {"caption": reference(process, "model_output")[one]}
    x, tape = reference(process, "x")[one], reference(process, "noise")[one][None]
    return glide.run_plan({"main": glide.Network(echo, None)}, conds, part, x, tape)


def known(process: str, i: int) -> list:
    """Return the guidances of inpainting in OpenAI's code: known pixels, then clipping."""
    image, known = (reference(process, name)[i : i + 1] for name in ("known", "hole"))
    return [glide.known_pixels(image, known), glide.clamp_x_0()]


@each_process
def test_an_ancestral_step_keeps_known_pixels(process):
    states = [step(process, i, ddpm, known(process, i)) for i in range(6)]
    x, x_0 = (np.concatenate([getattr(s, name) for s in states]) for name in ("x", "x_0"))
    assert_close(x, reference(process, "p_sample_inp"), 1e-5)
    assert_close(x_0, reference(process, "pmv_inp_pred_xstart"), 4e-6)


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 1e-5), (0.5, 1e-5), (1.0, 1e-3)])
@each_process
def test_a_step_of_ddim_keeps_known_pixels(process, eta, tolerance):
    solver = partial(ddim, eta=eta, float32_alpha_bar=True)
    x = np.concatenate([step(process, i, solver, known(process, i)).x for i in range(6)])
    assert_relative(x, reference(process, f"ddim_inp_eta{eta}"), tolerance, floor=1)


@each_process
def test_a_step_of_reverse_ddim(process):
    """The original rounds alpha-bar to float32, which is 2e-4 of a step at t = 1 of cosine."""
    states = [step(process, i, ddim_reverse, [glide.clamp_x_0()], backwards=True) for i in range(6)]
    assert_close(np.concatenate([s.x for s in states]), reference(process, "ddim_reverse"), 3e-4)


@glide.guidance()
def replaced(predict, x, point, *, image):
    """Replace x_0 by an image, and return the noise that agrees with it as x_0."""
    p = predict(x, point).with_x_0(image, x, point)
    return p._replace(x_0=p.eps)


@each_process
def test_the_noise_that_agrees_with_an_image(process):
    image = reference(process, "x0")
    found = [step(process, i, ddpm, [replaced(image[i : i + 1])]).x_0 for i in range(6)]
    assert_relative(np.concatenate(found), reference(process, "eps_from_x0"), 1e-5, floor=1)


@glide.guidance()
def scored(predict, x, point):
    """Return the gradient as x_0."""
    p = predict(x, point)
    return p._replace(x_0=p.guidance_gradient)


@each_process
def test_gradient_guidance_sees_timesteps_of_the_training_process(process):
    # The gradient of this log-probability is the timestep.
    log_prob = glide.Network(lambda _, x, t, cond: jnp.sum(x, axis=(1, 2, 3)) * t, None)
    guidances = [glide.classifier_guidance(log_prob, (), 1.0), scored()]
    found = np.concatenate([step(process, i, ddpm, guidances).x_0[:, 0, 0, 0] for i in range(6)])
    np.testing.assert_array_equal(found, reference(process, "t_seen_by_cond"))


def test_the_two_layers_of_a_text_block():
    """The reference feeds them x itself, not its norm."""
    units, weights = load("units"), weights_of("tb.sd.")

    def linear(name, x):
        weight, bias = (
            next(v for k, v in weights.items() if k.startswith(f"mlp.{name}.{kind}"))
            for kind in ("weight", "bias")
        )
        return x @ weight.T + bias

    hidden = jax.nn.gelu(linear("c_fc", units["tb.x"]), approximate=False)
    assert_close(linear("c_proj", hidden), units["tb.mlp"], 4e-6)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
def test_losses_of_a_network_that_predicts_noise(variance):
    """A fixed variance is no part of the loss."""
    key = f"types|EPSILON|{variance}"
    wanted, (x_0, x_t, t, eps, output) = load("training_losses"), inputs("linear", "none")
    if variance != "LEARNED_RANGE":
        output = output[..., :3]
    terms = hybrid_loss(reference_tables("linear", "none"), x_0, x_t, t, eps, output)
    # At t = 0, in the tails of the likelihood, float32 leaves three digits.
    assert_close(terms.loss, wanted[f"{key}|loss"], 1e-3 * wanted[f"{key}|loss"].max())
    if variance == "LEARNED_RANGE":
        assert_close(terms.vlb, wanted[f"{key}|vb"], 1e-3 * wanted[f"{key}|vb"].max())
