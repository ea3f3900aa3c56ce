"""The optimiser: schedules, weight decay on kernels alone, Muon's orthogonal updates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glide_jax.errors import UsageError
from glide_jax.models.clip import NoisedCLIP
from glide_jax.models.clip import init_params as init_clip
from glide_jax.models.presets import ModelConfig, clip64
from glide_jax.models.unet import GLIDE, init_params
from glide_jax.training.config import CLIPTrainConfig
from glide_jax.training.optimiser import kernels, learning_rate, make_optimiser, matrices
from glide_jax.training.optimiser_config import OptimiserConfig
from glide_jax.weights.store import flatten
from tests.support.commands import TINY
from tests.support.parallel_layouts import CLIP


def test_linear_decay_is_constant_and_then_falls_to_zero():
    config = OptimiserConfig(learning_rate=2.0, warmup=10, lr_decay="wsd", lr_decay_share=0.4)
    rate = learning_rate(config, 100)
    assert [float(rate(step)) for step in (0, 4, 9, 60, 80, 100)] == pytest.approx(
        [0.2, 1, 2, 2, 1, 0]
    )
    # With a clock the host multiplies by the decay.
    assert float(learning_rate(config, 100, follows_clock=True)(99)) == 2


@pytest.mark.parametrize("decay", ["constant", "wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 50])
def test_every_update_of_the_warm_up_has_a_rate(decay, warmup):
    config = OptimiserConfig(learning_rate=2.0, warmup=warmup, lr_decay=decay, lr_decay_share=0.1)
    rate = learning_rate(config, 40)
    found = np.array([float(rate(step)) for step in range(40)])
    assert (found > 0).all()
    # A cosine reaches its peak before the last step, whatever the warm-up.
    rises = min(warmup, 39) if decay == "cosine" else warmup
    first = np.arange(1, min(rises, 36) + 1)
    np.testing.assert_allclose(found[: len(first)], 2 * first / max(rises, 1), rtol=1e-6)
    if rises <= 4:
        assert found[max(rises - 1, 0)] == found[rises] == 2.0
    expected = {"constant": 2.0, "wsd": 0.5, "cosine": 1 - np.cos(np.pi / (40 - rises))}
    if rises < 36:
        assert found[-1] == pytest.approx(expected[decay], rel=1e-3)


def params_of(config: ModelConfig = TINY) -> dict:
    return jax.eval_shape(lambda: init_params(GLIDE(config), jax.random.key(0)))


def test_weight_decay_acts_on_kernels_alone():
    chosen = kernels(params_of())
    assert chosen["unet"]["down_0"] == {"bias": False, "kernel": True}
    assert chosen["unet"]["head_norm"]["norm"] == {"bias": False, "scale": False}
    assert chosen["text"]["token_embedding"] is False
    sizes = replace(CLIP, learn_logit_scale=True)
    clip = jax.eval_shape(lambda: init_clip(NoisedCLIP(sizes), jax.random.key(0)))
    of_clip = {path for path, decays in flatten(kernels(clip)).items() if decays}
    assert of_clip == {path for path in flatten(clip) if path.endswith("kernel")}
    assert {"log_scale", "text/token_embedding"} <= set(flatten(clip)) - of_clip
    config = OptimiserConfig(learning_rate=0.1, weight_decay=0.5)
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    optimiser = make_optimiser(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimiser.update(zeros, optimiser.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0)


def test_muon_makes_updates_of_kernels_orthogonal():
    config = OptimiserConfig(kind="muon", learning_rate=0.1, grad_clip=0)
    rng = np.random.default_rng(0)
    params = {
        "unet": {
            "down_1_res": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)},
            "down_0": {"kernel": jnp.ones((3, 3, 2, 6)), "bias": jnp.ones(6)},
        }
    }
    optimiser = make_optimiser(config, 10)
    state = optimiser.init(params)
    updates, _ = optimiser.update(jax.tree.map(lambda x: x**2 - 1.3, params), state, params)
    inner = updates["unet"]["down_1_res"]["kernel"].reshape(36, 6)
    values = np.linalg.svd(inner, compute_uv=False)
    # Newton-Schulz brings all singular values near one another; the root mean square is 0.2 rates.
    assert values.max() / values.min() < 2
    assert float(jnp.sqrt((inner**2).mean())) == pytest.approx(0.02, rel=0.3)
    # The first layer and biases belong to AdamW (with Nesterov's momentum), whose first update has
    # the size of the rate and the sign of the gradient.
    first = np.asarray(updates["unet"]["down_0"]["kernel"])
    np.testing.assert_allclose(first, first[0, 0, 0, 0], rtol=1e-3)
    assert 0.09 < first[0, 0, 0, 0] < 0.2


def test_muon_takes_no_first_and_last_layer_nor_embeddings():
    chosen = matrices(params_of())
    assert chosen["unet"]["down_0"]["kernel"] is None and chosen["unet"]["head"]["kernel"] is None
    assert chosen["text"]["token_embedding"] is None
    assert chosen["unet"]["mid_res_1"]["conv_1"]["kernel"].reduction_axis == (0, 1, 2)
    assert isinstance(make_optimiser(OptimiserConfig(kind="muon"), 5), optax.GradientTransformation)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="kind is adamw or muon, not 'sgd'"):
        OptimiserConfig(kind="sgd")
    with pytest.raises(UsageError, match="lr_decay_share"):
        OptimiserConfig(lr_decay_share=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta_1", 1.0, "beta_1 must be at least 0 and below 1, not 1.0"),
        ("beta_2", -0.1, "beta_2 must be at least 0 and below 1, not -0.1"),
        ("ema", 1.5, "ema must be at least 0 and below 1, not 1.5"),
        ("grad_clip", -1.0, "grad_clip cannot be negative: -1.0"),
        ("weight_decay", -0.5, "weight_decay cannot be negative: -0.5"),
        ("warmup", -1, "warmup cannot be negative: -1"),
        ("epsilon", 0.0, "epsilon must be above 0, not 0.0"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, value, message):
    with pytest.raises(UsageError) as caught:
        OptimiserConfig(**{name: value})
    assert str(caught.value) == message


def test_a_clip_needs_a_row_for_each_timestep():
    message = "^model.n_timestep is 1000: it must be at least 1001, the diffusion_steps$"
    with pytest.raises(UsageError, match=message):
        CLIPTrainConfig(name="x", model=clip64(), diffusion_steps=1001)
    assert CLIPTrainConfig(name="x", model=clip64()).diffusion_steps == 1000
