"""One training step, pure: state and batch in, state and metrics out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glide_jax.training.config import OptimiserConfig, RunConfig
from glide_jax.training.objectives import Batch, Metrics, Objective, Params
from glide_jax.training.state import TrainState, make_optimiser

# The running mean of the loss that a spike is measured by, and the steps before it means much.
SPIKE_MEMORY, SPIKE_WARMUP = 0.99, 100
# Dynamic loss scaling of float16, as a power of two: it grows so in ADM's code, and falls by one
# on overflow. Below the lowest, it is not the scale that is wrong.
LOSS_SCALE_GROWTH, LOWEST_LOSS_SCALE = 1e-3, 1.0


def make_step(config: RunConfig, objective: Objective) -> Callable[..., tuple[TrainState, Metrics]]:
    """A recipe's `train_step`: a function of `state`, `batch`, `key` and `axis`."""
    return partial(
        train_step,
        loss=objective.loss,
        optimiser=make_optimiser(config.optimiser, config.steps),
        averages=config.optimiser,
        accumulate=config.accumulate,
        spike=config.spike,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    loss: Callable[..., tuple[jax.Array, Metrics]],
    optimiser: optax.GradientTransformation,
    averages: OptimiserConfig,
    accumulate: int = 1,
    spike: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of parameters and of their moving averages.

    An update whose loss or gradient is not finite, or whose loss is `spike` times its running
    mean, is not made: the state stays as it was but for its count, and metric `bad` is 1. An
    overflow of scaled float16 gradients is not bad: the next step's scale is half as large.

    Args:
        batch: this device's part, or the whole where `axis` is None.
        key: of the run; the step and each record's place are folded in here.
        loss: see `glide_jax.training.objectives.Objective`.
        averages: which moving averages to keep.
        accumulate: parts that the batch is worked through in.
        axis: name of the mapped axis over which losses and gradients are averaged, if any.

    Returns:
        The new state, and metrics averaged over the batch, with `grad_norm` and `bad`.
    """
    key = jax.random.fold_in(key, state.step)
    record_key, dropout_key = jax.random.split(key)
    if axis is not None:
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
    scale = 2.0**state.loss_scale

    def gradient(params: Params, part: Batch, dropout_key: jax.Array) -> tuple[Params, Metrics]:
        def scaled(params: Params) -> tuple[jax.Array, Metrics]:
            value, metrics = loss(params, part, record_key, dropout_key=dropout_key, axis=axis)
            return value * scale, metrics

        return jax.grad(scaled, has_aux=True)(params)

    grads, metrics = _accumulated(gradient, state.params, batch, dropout_key, accumulate)
    if axis is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)
    grads = jax.tree.map(lambda g: g / scale, grads)

    norm = optax.tree.norm(grads)
    overflow = ~jnp.isfinite(norm) & (state.loss_scale > LOWEST_LOSS_SCALE)
    bad = ~jnp.isfinite(metrics["loss"]) | (~jnp.isfinite(norm) & ~overflow)
    if spike:
        warm = state.step >= SPIKE_WARMUP
        bad = bad | (warm & (metrics["loss"] > spike * state.loss_mean))
    new = _updated(state, grads, metrics["loss"], optimiser, averages)
    state = jax.tree.map(partial(jnp.where, bad | overflow), _stayed(state, overflow), new)
    return state, metrics | {"grad_norm": norm, "bad": bad.astype(jnp.float32)}


def _accumulated(
    gradient: Callable, params: Params, batch: Batch, dropout_key: jax.Array, parts: int
) -> tuple[Params, Metrics]:
    """Mean gradient and metrics over parts of a batch, one after the other."""
    if parts == 1:
        return gradient(params, batch, dropout_key)
    # Every parts-th row, so that a batch that is sharded stays where it is.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(dropout_key, parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split), keys[0]),
    )

    def add(total, part):
        # Else sharded parameters would be gathered before the loop, to lie whole all through it.
        held, part = jax.lax.optimization_barrier((params, part))
        return jax.tree.map(jnp.add, total, gradient(held, *part)), None

    total, _ = jax.lax.scan(add, zeros, (split, keys))
    return jax.tree.map(lambda x: x / parts, total)


def _updated(
    state: TrainState,
    grads: Params,
    loss: jax.Array,
    optimiser: optax.GradientTransformation,
    averages: OptimiserConfig,
) -> TrainState:
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    rate = jnp.minimum(averages.ema, (1 + step) / (10 + step))
    powers = tuple(
        _towards(average, params, power_rate(step, width))
        for average, width in zip(state.powers, averages.ema_power, strict=True)
    )
    memory = jnp.minimum(SPIKE_MEMORY, state.step / step)
    return TrainState(
        step=step,
        params=params,
        ema=_towards(state.ema, params, rate),
        powers=powers,
        opt_state=opt_state,
        loss_mean=loss + memory * (state.loss_mean - loss),
        loss_scale=state.loss_scale + LOSS_SCALE_GROWTH * (state.loss_scale > 0),
    )


def _stayed(state: TrainState, overflow: jax.Array) -> TrainState:
    """The state after an update that was not made."""
    return replace(state, step=state.step + 1, loss_scale=state.loss_scale - overflow)


def _towards(average: Params, params: Params, rate: jax.Array) -> Params:
    return jax.tree.map(lambda a, p: a + (1 - rate) * (p - a), average, params)


def power_rate(step: jax.Array, width: float) -> jax.Array:
    """`(1 - 1 / t)^(gamma + 1)`, for an average over a power function  (EDM2, 2312.02696).

    Args:
        step: t, from 1.
        width: standard deviation of the profile, as a share of the training's length.
    """
    return (1 - 1 / step) ** (power_exponent(width) + 1)


def power_exponent(width: float) -> float:
    """Gamma of a relative width: `width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`  (EDM2)."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())
