"""What the other tests leave of the original's outputs: single steps of editing, small pieces."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.diffusion.losses import hybrid_loss
from glide_jax.diffusion.solvers.ancestral import ddim, ddim_reverse, ddpm
from tests.support.golden import assert_close, assert_relative, load, rows
from tests.models.test_layers import weights_of
from tests.diffusion.test_losses import inputs, reference_tables
from tests.diffusion.test_sampling import each_chain, echo, grid_of, reference


def step(chain: str, i: int, solver, guidances: Sequence, *, backwards: bool = False):
    """One step of picture i of the reference, the network's output given: the state after it."""
    schedule, grid = grid_of(chain)
    one, t = slice(i, i + 1), reference(chain, "t")[i]
    row = t if backwards else len(grid) - 1 - t
    part = rows(glide.plan(schedule, grid, solver, guidances), slice(row, row + 1))
    conds = {"cond": reference(chain, "model_output")[one]}
    x, tape = reference(chain, "x")[one], reference(chain, "noise")[one][None]
    return glide.sample({"main": glide.Network(echo, None)}, conds, part, x, tape)


def known(chain: str, i: int) -> list:
    """The known pixels of picture i, then clipping, as the release inpaints."""
    image, mask = (reference(chain, name)[i : i + 1] for name in ("known", "hole"))
    return [glide.known_pixels(image=image, mask=mask), glide.clip_x0()]


@each_chain
def test_an_ancestral_step_keeps_known_pixels(chain):
    states = [step(chain, i, ddpm, known(chain, i)) for i in range(6)]
    x, x_0 = (np.concatenate([getattr(s, name) for s in states]) for name in ("x", "x_0"))
    assert_close(x, reference(chain, "p_sample_inp"), 1e-5)
    assert_close(x_0, reference(chain, "pmv_inp_pred_xstart"), 4e-6)


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 1e-5), (0.5, 1e-5), (1.0, 1e-3)])
@each_chain
def test_a_step_of_ddim_keeps_known_pixels(chain, eta, tolerance):
    solver = partial(ddim, eta=eta, released=True)
    x = np.concatenate([step(chain, i, solver, known(chain, i)).x for i in range(6)])
    assert_relative(x, reference(chain, f"ddim_inp_eta{eta}"), tolerance, floor=1)


@each_chain
def test_a_step_of_reverse_ddim(chain):
    """The original rounds alpha-bar to float32, which is 2e-4 of a step at t = 1 of cosine."""
    states = [step(chain, i, ddim_reverse, [glide.clip_x0()], backwards=True) for i in range(6)]
    assert_close(np.concatenate([s.x for s in states]), reference(chain, "ddim_reverse"), 3e-4)


@glide.guidance()
def replaced(predict, x, point, *, image):
    """A given x_0, and in its place what noise agrees with it."""
    p = predict(x, point).with_x_0(image, x, point)
    return p._replace(x_0=p.eps)


@each_chain
def test_the_noise_that_agrees_with_a_picture(chain):
    image = reference(chain, "x0")
    found = [step(chain, i, ddpm, [replaced(image=image[i : i + 1])]).x_0 for i in range(6)]
    assert_relative(np.concatenate(found), reference(chain, "eps_from_x0"), 1e-5, floor=1)


@glide.guidance()
def scored(predict, x, point):
    """Hands out the score in the place of x_0."""
    p = predict(x, point)
    return p._replace(x_0=p.score)


@each_chain
def test_gradient_guidance_sees_timesteps_of_the_original_chain(chain):
    tell_t = glide.Network(lambda _, x, t, cond: jnp.sum(x, axis=(1, 2, 3)) * t, None)
    guidances = [glide.gradient(log_prob=tell_t, cond=(), scale=1.0), scored()]
    found = np.concatenate([step(chain, i, ddpm, guidances).x_0[:, 0, 0, 0] for i in range(6)])
    np.testing.assert_array_equal(found, reference(chain, "t_seen_by_cond"))


def test_the_two_layers_of_a_text_block():
    """They were fed x itself, not its norm."""
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
    """Whatever a fixed variance is, it is no part of the loss."""
    key = f"types|EPSILON|{variance}"
    wanted, (x_0, x_t, t, eps, output) = load("training_losses"), inputs("linear", "none")
    if variance != "LEARNED_RANGE":
        output = output[..., :3]
    terms = hybrid_loss(reference_tables("linear", "none"), x_0, x_t, t, eps, output)
    # At t = 0, in the tails of the likelihood, float32 leaves three digits.
    assert_close(terms.loss, wanted[f"{key}|loss"], 1e-3 * wanted[f"{key}|loss"].max())
    if variance == "LEARNED_RANGE":
        assert_close(terms.vlb, wanted[f"{key}|vb"], 1e-3 * wanted[f"{key}|vb"].max())
