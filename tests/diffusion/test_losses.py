"""Losses, their gradients and one whole update, against the original training code."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glide_jax.diffusion.losses import (
    LossTables,
    discretised_log_likelihood,
    hybrid_loss,
    make_tables,
    normal_kl,
    q_sample,
    vlb_term,
)
from glide_jax.diffusion.schedule import Schedule, make_schedule, to_eps
from glide_jax.diffusion.solvers.table import step_betas
from glide_jax.diffusion.spacings import respaced
from glide_jax.training import objectives
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.state import new_state
from glide_jax.training.step import train_step
from glide_jax.weights import to_released
from tests.support import golden
from tests.support.golden import assert_close, assert_relative, load, nhwc

# Tolerance relative to the largest value of a reference: zeros do not pass.
RELATIVE = 1e-4
# "none" is the process of 1000 steps, "100" the process respaced to 100 steps.
each_respacing = pytest.mark.parametrize("respacing", ["none", "100"])
each_schedule = pytest.mark.parametrize("name", ["linear", "cosine"])


def reference_tables(name: str, respacing: str) -> LossTables:
    schedule = make_schedule(name)
    if respacing != "none":
        schedule = Schedule(step_betas(schedule, respaced(schedule, respacing)))
    return make_tables(schedule)


def inputs(name: str, respacing: str):
    """Return `x_0, x_t, t, eps, output` of the reference batch."""
    reference = load("training_losses")
    x_t, t = reference[f"{name}|{respacing}|x_t"], reference[f"{respacing}|t"]
    x_0, eps, output = (nhwc(reference[k]) for k in ("x0", "noise", "model_output"))
    return x_0, nhwc(x_t), t, eps, output


# --- functions


@each_respacing
@each_schedule
def test_q_sample(name, respacing):
    x_0, x_t, t, eps, _ = inputs(name, respacing)
    assert_close(q_sample(reference_tables(name, respacing), x_0, t, eps), x_t, 1e-6)


def test_normal_kl():
    reference = load("training_losses")
    x_0, noise, variance = reference["x0"], reference["noise"], reference["model_output"][:, 3:]
    assert_close(normal_kl(x_0, 0.3 * noise, noise, variance), reference["kl"], 1e-5)


def test_discretised_log_likelihood():
    reference = load("training_losses")
    x_0, noise, variance = reference["x0"], reference["noise"], reference["model_output"][:, 3:]
    found = discretised_log_likelihood(x_0, x_0 + 0.2 * noise, variance - 3)
    # In the tails float32 leaves only the clamp at 1e-12: there the probability is compared.
    likely = reference["dgll"] > -5
    assert 0.4 < likely.mean() < 0.6
    assert_close(found[likely], reference["dgll"][likely], 5e-5)
    assert_close(np.exp(found), np.exp(reference["dgll"]), 1e-6)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -2.0), (0.9, -1.0), (-3.0, 0.0)])
def test_the_256_values_of_a_pixel_have_probability_one(mean, log_scale):
    values = np.linspace(-1, 1, 256, dtype=np.float32)
    found = discretised_log_likelihood(values, jnp.float32(mean), jnp.float32(log_scale))
    assert float(jnp.exp(found).sum()) == pytest.approx(1, abs=1e-5)


# --- the loss


def assert_terms(found, wanted, t):
    """Compare each image; in the tails of the likelihood at t = 0 float32 leaves three digits."""
    tolerance = np.where(t == 0, 1e-3, 1e-5)
    assert (np.abs(found / wanted - 1) <= tolerance).all()


def assert_gradients(found, wanted, t):
    """Compare noise and variance apart: each would hide a wrong gradient of the other.

    At t = 0 some pixels in the tails of the likelihood are left out: the reference's own rounding
    is 10% there, against float64.
    """
    for channels in (slice(0, 3), slice(3, 6)):
        a, b = np.asarray(found)[..., channels], wanted[..., channels]
        assert_close(a[t > 0], b[t > 0], RELATIVE * np.abs(b[t > 0]).max())
        off = np.abs(a - b)[t == 0] / np.abs(b[t == 0]).max(axis=(1, 2, 3), keepdims=True)
        assert np.quantile(off, 0.95) <= RELATIVE


@pytest.mark.parametrize(("kind", "weight"), [("RESCALED_MSE", None), ("MSE", 1.0)])
@each_respacing
@each_schedule
def test_hybrid_loss(name, respacing, kind, weight):
    """Weight None is T / 1000: 1 for 1000 timesteps, 0.1 for 100."""
    reference, tables = load("training_losses"), reference_tables(name, respacing)
    x_0, x_t, t, eps, output = inputs(name, respacing)

    @jax.jit
    def total(output):
        terms = hybrid_loss(tables, x_0, x_t, t, eps, output, vlb_weight=weight)
        return terms.loss.sum(), terms

    grad, terms = jax.grad(total, has_aux=True)(output)
    key = f"{name}|{kind}|{respacing}"
    assert_terms(terms.loss, reference[f"{key}|loss"], t)
    assert_relative(terms.mse, reference[f"{key}|mse"], 1e-5)
    assert_terms(terms.vlb, reference[f"{key}|vb"], t)
    assert_gradients(grad, nhwc(reference[f"{key}|grad_model_output"]), t)


@each_respacing
@each_schedule
def test_bound_alone(name, respacing):
    """With its gradient into the noise prediction, which the hybrid loss stops."""
    reference, tables = load("training_losses"), reference_tables(name, respacing)
    x_0, x_t, t, _, output = inputs(name, respacing)

    @jax.jit
    def total(output):
        bound = vlb_term(tables, x_0, x_t, t, output[..., :3], output[..., 3:])
        return bound.sum(), bound

    grad, bound = jax.grad(total, has_aux=True)(output)
    key = f"{name}|KL|{respacing}"
    assert_terms(bound, reference[f"{key}|loss"], t)
    assert_gradients(grad, nhwc(reference[f"{key}|grad_model_output"]), t)


def test_loss_without_learned_variance():
    reference = load("training_losses")
    x_0, x_t, t, eps, output = inputs("linear", "none")
    tables = reference_tables("linear", "none")
    terms = hybrid_loss(tables, x_0, x_t, t, eps, output[..., :3])
    assert_relative(terms.loss, reference["types|EPSILON|FIXED_SMALL|loss"], RELATIVE)
    assert not terms.vlb.any() and (terms.loss == terms.mse).all()


def test_predicting_v_is_the_same_bound_and_a_loss_of_v():
    """`v = alpha eps - sigma x_0` (2202.00512): a perfect v is a perfect eps."""
    tables = reference_tables("cosine", "none")
    x_0, x_t, t, eps, output = inputs("cosine", "none")
    alpha, sigma = (column[t][:, None, None, None] for column in (tables.alpha, tables.sigma))
    v = alpha * eps - sigma * x_0
    assert_close(to_eps("v", v, x_t, alpha, sigma), eps, 1e-6)

    off = np.concatenate([v + 0.1, output[..., 3:]], axis=-1)
    terms = hybrid_loss(tables, x_0, x_t, t, eps, off, prediction_type="v")
    assert_close(terms.mse, np.full(len(t), 0.01), 1e-6)
    meant = np.concatenate([eps + 0.1 * alpha, output[..., 3:]], axis=-1)
    same = hybrid_loss(tables, x_0, x_t, t, eps, meant)
    # At t = 999 alpha is 5e-5: nothing but rounding is left.
    assert_relative(terms.vlb[:-1], same.vlb[:-1], 1e-4)


# --- one update of a whole network


@cache
def update():
    """Run `train_step` with the reference's timesteps and noise: `(grads, state, metrics)`."""
    reference = load("train_grads")
    optimiser = OptimiserConfig(learning_rate=1e-4, grad_clip=0.0)
    config = TrainConfig(
        name="golden",
        model=replace(golden.config("base"), dropout=0.0),
        caption_dropout=0.0,
        optimiser=optimiser,
        dtype="float32",
    )
    batch = objectives.Batch(
        image=(nhwc(reference["x0"]) + 1) * 127.5,
        tokens=np.asarray(reference["tokens"], np.int32),
        caption_mask=reference["mask"],
        row=np.arange(4),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    noise = objectives.Noise(reference["t"], nhwc(reference["noise"]), keys)
    adamw = make_optimiser(optimiser, steps=1)
    fresh = new_state(jax.tree.map(jnp.asarray, golden.weights("base")), adamw, optimiser)
    # So late that the EMA has reached its final rate.
    state = replace(fresh, step=jnp.int32(200_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "sample_noise", lambda key, batch, levels: noise)
        loss = objectives.make_objective(config).loss
        one = partial(train_step, loss=loss, optimiser=adamw, config=optimiser)
        state, metrics = jax.jit(one)(state, batch, jax.random.key(0))
    # After one step Adam's first moment is the gradient times 1 - beta_1.
    moments = optax.tree.get(state.opt_state, "mu")
    return to_released(jax.tree.map(lambda m: m / 0.1, moments)), state, metrics


def test_losses_of_the_network():
    reference, metrics = load("train_grads"), update()[2]
    for ours, theirs in {"loss": "loss", "mse": "mse", "vlb": "vb"}.items():
        assert float(metrics[ours]) == pytest.approx(reference[theirs].mean(), rel=RELATIVE)


def test_gradient_of_every_parameter():
    reference, (grads, _, metrics) = load("train_grads"), update()
    assert set(grads) == set(reference["names"])
    norms = np.array(
        [np.linalg.norm(grads[name].astype(np.float64)) for name in reference["names"]]
    )
    # The gradient of a bias before a norm of single channels is rounding alone, 1e-8.
    np.testing.assert_allclose(norms, reference["grad_norms"], rtol=2e-5, atol=1e-7)
    total = np.linalg.norm(reference["grad_norms"])
    assert float(metrics["grad_norm"]) == pytest.approx(total, rel=RELATIVE)


REFERENCE = load("train_grads")
NAMES = [key.removeprefix("adamw1|") for key in REFERENCE if key.startswith("adamw1|")]


@pytest.mark.parametrize("name", [*NAMES, "token_embedding.weight"])
def test_gradient(name):
    assert_relative(update()[0][name][None], REFERENCE[f"grad|{name}"][None], RELATIVE)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_their_ema_after_one_step(name):
    """Adam's first step is the learning rate in the direction of the gradient's sign."""
    grads, state, _ = update()
    before = np.asarray(golden.state_dict("base")[name], np.float64)
    moved = REFERENCE[f"adamw1|{name}"] - before
    # Where the gradient is rounding alone (the bias of the keys), Adam's step is noise.
    sure = np.abs(REFERENCE[f"grad|{name}"]) > 1e-5 * np.abs(grads[name]).max()
    assert sure.mean() > 0.6
    found = to_released(state.params)[name] - before
    assert_close(np.where(sure, found, moved), moved, 2e-7)
    averaged = REFERENCE[f"ema0.9999|{name}"]
    assert_close(np.where(sure, to_released(state.ema)[name], averaged), averaged, 1e-7)
