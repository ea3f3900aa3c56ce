"""One training step: skipped updates, loss scaling, microbatches, activation checkpointing."""

import re
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.training import step as steps
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.objectives import Batch, make_objective
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.state import INITIAL_LOG2_LOSS_SCALE, new_state
from glide_jax.training.step import train_step
from tests.support.commands import TINY

OPTIMISER = OptimiserConfig(learning_rate=0.1, ema=0.5, ema_widths=(0.1,))
KEY = jax.random.key(0)


def make_batch(rows: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8),
        rng.integers(0, 100, (rows, 8), dtype=np.int32),
        np.ones((rows, 8), bool),
        np.arange(rows, dtype=np.int32),
    )


def bowl(params, batch, key, *, train=False, axis=None):
    """`mean_i |w - c_i|^2`, with random c_i from the row of record i."""
    centres = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (3,)))(batch.row)
    value = ((params["w"] - centres) ** 2).sum(axis=-1).mean()
    return value, {"loss": value}


def scaled(factor):
    """Return a bowl whose loss is multiplied by `factor` if all images are black."""

    def loss(params, batch, key, **more):
        value, _ = bowl(params, batch, key, **more)
        value = value * jnp.where(batch.image.any(), 1.0, factor)
        return value, {"loss": value}

    return loss


def run(loss, troubles, *, float16=False, **options):
    """Return states and metrics of a few steps, some of them on black images."""
    optimiser = make_optimiser(OPTIMISER, 100)
    state = new_state({"w": jnp.ones(3)}, optimiser, OPTIMISER, float16=float16)
    one = jax.jit(partial(train_step, loss=loss, optimiser=optimiser, config=OPTIMISER, **options))
    batch, found = make_batch(), []
    for trouble in troubles:
        images = batch._replace(image=batch.image * np.uint8(not trouble))
        state, metrics = one(state, images, KEY)
        found.append((state, metrics))
    return found


def kept(state):
    """Return everything that an update would change."""
    return jax.device_get(
        (state.params, state.ema, state.power_emas, state.opt_state, state.loss_mean)
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- skipped updates


@pytest.mark.parametrize("factor", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(factor):
    (before, good), (state, bad), (after, _) = run(scaled(factor), [0, 1, 0])
    assert (float(good["bad"]), float(bad["bad"])) == (0, 1)
    assert_equal(kept(state), kept(before))
    assert [int(s.step) for s in (before, state, after)] == [1, 2, 3]
    assert np.isfinite(after.params["w"]).all()
    assert not np.array_equal(after.params["w"], state.params["w"])


def test_a_gradient_that_is_not_finite_is_bad_even_if_the_loss_is_finite():
    def loss(params, batch, key, **_):
        value = jnp.sqrt(jnp.abs(params["w"]).sum() * 0)
        return value, {"loss": value}

    ((state, metrics),) = run(loss, [0])
    assert float(metrics["loss"]) == 0 and float(metrics["bad"]) == 1
    assert (np.asarray(state.params["w"]) == 1).all()


def test_a_loss_above_its_running_mean_by_the_factor_is_a_spike(monkeypatch):
    monkeypatch.setattr(steps, "SPIKE_WARMUP", 2)
    troubles = [0, 0, 0, 1, 0]
    found = run(scaled(10.0), troubles, spike_factor=3.0)
    assert [float(m["bad"]) for _, m in found] == [0, 0, 0, 1, 0]
    # No spikes are found in the first steps.
    assert [float(m["bad"]) for _, m in run(scaled(10.0), [0, 1], spike_factor=3.0)] == [0, 0]
    assert_equal(kept(found[3][0]), kept(found[2][0]))
    assert [float(m["bad"]) for _, m in run(scaled(10.0), troubles)] == [0] * 5


def test_the_running_mean_begins_at_the_first_loss():
    (state, metrics), (after, second) = run(bowl, [0, 0])
    assert float(state.loss_mean) == pytest.approx(float(metrics["loss"]))
    mean = (float(metrics["loss"]) + float(second["loss"])) / 2
    assert float(after.loss_mean) == pytest.approx(mean)


# --- float16


def test_scaling_a_loss_changes_no_update():
    ((plain, _),), ((half, _),) = run(bowl, [0]), run(bowl, [0], float16=True)
    assert_equal(half.params, plain.params)
    assert float(plain.log2_loss_scale) == 0
    assert float(half.log2_loss_scale) == pytest.approx(INITIAL_LOG2_LOSS_SCALE + 1e-3)


def test_an_overflow_halves_the_scale_and_skips_the_update_without_being_bad():
    """A gradient beyond float16's 65504 becomes infinite, as in a half-precision trunk."""

    def loss(params, batch, key, **more):
        w = params["w"] + jax.lax.stop_gradient(0 * params["w"])
        value, _ = bowl({"w": _as_half(w)}, batch, key, **more)
        return value, {"loss": value}

    found = run(loss, [0] * 12, float16=True)
    scales = [INITIAL_LOG2_LOSS_SCALE] + [float(state.log2_loss_scale) for state, _ in found]
    skipped = [after < before for before, after in pairwise(scales)]
    assert skipped[0] and not skipped[-1]
    for (state, metrics), skip, scale in zip(found, skipped, scales, strict=False):
        assert float(metrics["bad"]) == 0 and np.isfinite(metrics["loss"])
        if skip:
            assert float(state.log2_loss_scale) == scale - 1
            assert (np.asarray(state.params["w"]) == 1).all()
    assert not (np.asarray(found[-1][0].params["w"]) == 1).all()


@jax.custom_vjp
def _as_half(w):
    return w


_as_half.defvjp(lambda w: (w, None), lambda _, g: (g.astype(jnp.float16).astype(jnp.float32),))


def test_an_overflow_at_the_lowest_scale_is_bad():
    optimiser = make_optimiser(OPTIMISER, 100)
    state = new_state({"w": jnp.ones(3)}, optimiser, OPTIMISER, float16=True)
    state = replace(state, log2_loss_scale=jnp.float32(steps.MIN_LOG2_LOSS_SCALE))
    batch = make_batch()
    batch = batch._replace(image=batch.image * np.uint8(0))
    after, metrics = train_step(
        state, batch, KEY, loss=scaled(jnp.nan), optimiser=optimiser, config=OPTIMISER
    )
    assert float(metrics["bad"]) == 1
    assert float(after.log2_loss_scale) == steps.MIN_LOG2_LOSS_SCALE


# --- gradient accumulation


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_same_step(microbatches):
    ((whole, one),) = run(bowl, [0])
    ((split, several),) = run(bowl, [0], accumulate=microbatches)
    np.testing.assert_allclose(split.params["w"], whole.params["w"], rtol=1e-6)
    for name in one:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-6)


def test_microbatches_have_the_dropout_of_the_whole_batch():
    config = TrainConfig(name="x", model=replace(TINY, dropout=0.3), dtype="float32")
    objective = make_objective(config)
    params = jax.tree.map(
        lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape),
        jax.eval_shape(objective.init, KEY),
    )
    loss = jax.jit(objective.loss, static_argnames="train")
    batch = make_batch()
    whole, plain = (float(loss(params, batch, KEY, train=train)[0]) for train in (True, False))
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    split = [float(loss(params, part, KEY, train=True)[0]) for part in parts]
    assert np.mean(split) == pytest.approx(whole, rel=1e-5)
    assert whole != pytest.approx(plain, rel=1e-4)


# --- frozen parameters


def test_frozen_parameters_have_no_gradients_to_sum_nor_averages_to_compute():
    settings = replace(OPTIMISER, freeze=("text",), grad_clip=0.5)
    params = {"text": {"kernel": jnp.ones((500, 4))}, "w": jnp.ones(3)}

    def loss(params, batch, key, **more):
        value, metrics = bowl({"w": params["w"] * params["text"]["kernel"].mean()}, batch, key)
        return value, metrics

    optimiser = make_optimiser(settings, 100)
    state = new_state(params, optimiser, settings)
    step = partial(train_step, loss=loss, optimiser=optimiser, config=settings, accumulate=2)
    mapped = jax.vmap(partial(step, axis="batch"), in_axes=(None, 0, None), axis_name="batch")
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), make_batch())
    program = str(jax.make_jaxpr(mapped)(state, batch, KEY))
    # What is used (not "_") and has its size is passed through, chosen, or a constant.
    made = set(re.findall(r"(?<!_):f32\[(?:2,)?500,4\] = (\w+)", program))
    assert made <= {"broadcast_in_dim", "jit", "select_n", "optimization_barrier"}
    after, metrics = jax.jit(step)(state, make_batch(), KEY)
    assert_equal(after.params["text"], params["text"])
    assert_equal((after.ema["text"], after.power_emas[0]["text"]), (params["text"],) * 2)
    # The others are those of a network whose frozen part is a constant.
    alone = replace(settings, freeze=())
    optimiser = make_optimiser(alone, 100)
    only = new_state({"w": jnp.ones(3)}, optimiser, alone)
    expected, same = train_step(
        only, make_batch(), KEY, loss=bowl, optimiser=optimiser, config=alone
    )
    np.testing.assert_allclose(after.params["w"], expected.params["w"], rtol=1e-6)
    np.testing.assert_allclose(after.ema["w"], expected.ema["w"], rtol=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(same["grad_norm"]), rel=1e-6)


# --- the network


@cache
def gradient(dtype: str, remat: bool):
    """Return loss and gradients of a tiny model, and their memory."""
    config = TrainConfig(name="x", model=replace(TINY, dropout=0.0), dtype=dtype, remat=remat)
    objective = make_objective(config)

    def value_and_grad(params, batch, key):
        return jax.value_and_grad(objective.loss, has_aux=True)(params, batch, key)

    # On the host, since random weights on the device are another program to compile.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.float32(0.1 * rng.standard_normal(x.shape)),
        jax.eval_shape(objective.init, KEY),
    )
    compiled = (
        jax.jit(value_and_grad)
        .lower(params, make_batch(), KEY)
        .compile(compiler_options={"xla_backend_optimization_level": 0})
    )
    (loss, _), grads = compiled(params, make_batch(), KEY)
    return float(loss), grads, compiled.memory_analysis().temp_size_in_bytes


def test_activation_checkpointing_changes_no_gradient():
    (loss, grads, _), (same, again, _) = gradient("float32", False), gradient("float32", True)
    assert same == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6 * largest)


def test_a_bfloat16_trunk_has_float32_parameters_gradients_and_loss():
    (loss, grads, _), (near, rough, _) = gradient("float32", False), gradient("bfloat16", False)
    assert near == pytest.approx(loss, rel=2e-2) and near != loss
    assert {x.dtype for x in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    norms = [np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g))) for g in (grads, rough)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)
