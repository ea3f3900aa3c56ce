"""One training step, pure: state and batch in, state and metrics out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glide_jax.training.config import RunConfig
from glide_jax.training.freezing import drop_frozen, merge_frozen
from glide_jax.training.loss_aware import LossHistory, TimestepLosses, add_losses
from glide_jax.training.objectives import TIMESTEP_LOSSES, Batch, Metrics, Objective, Params
from glide_jax.training.optimiser import learning_rate, make_optimiser, updates_made
from glide_jax.training.optimiser_config import OptimiserConfig
from glide_jax.training.state import TrainState

# Decay rate of the running mean of the loss, and the steps before spikes are measured by it.
SPIKE_MEMORY, SPIKE_WARMUP = 0.99, 100
# Dynamic loss scaling of float16, as a power of two: the growth per step is that of ADM's code, an
# overflow lowers it by one. An overflow at the lowest scale has another cause than the scale.
LOG2_LOSS_SCALE_GROWTH, MIN_LOG2_LOSS_SCALE = 1e-3, 1.0


def make_step(config: RunConfig, objective: Objective) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return `train_step(state, batch, *control, axis=...)` with the recipe's fields filled in."""
    return partial(
        train_step,
        loss=objective.loss,
        optimiser=make_optimiser(config.optimiser, config.steps, bool(config.minutes)),
        loss_inputs=objective.loss_inputs,
        config=config.optimiser,
        lr_schedule=learning_rate(config.optimiser, config.steps, bool(config.minutes)),
        accumulate=config.accumulate,
        spike_factor=config.spike_factor,
    )


class Control(NamedTuple):
    """What the host tells a call of one or several steps: arguments of `train_step`, in its order.

    Attributes:
        key: key of the run.
        lr_factor: factor of the learning rate; None: 1.
        time_share: share of the time limit that is used up; None: there is no limit.
    """

    key: jax.Array
    lr_factor: jax.Array | np.ndarray | None = None
    time_share: jax.Array | np.ndarray | None = None


def scan_steps(
    state: TrainState,
    items: Any,
    control: Control,
    data: Any = None,
    *,
    step: Callable[..., tuple[TrainState, Metrics]],
    read: Callable[[Any, Any], Batch],
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Do several steps in one program.

    Args:
        state: the state before the first step.
        items: what `read` needs for each step; the first axis of every array is the step.
        control: what the host tells each step.
        data: arrays that all steps share.
        step: from `make_step`.
        read: `(data, item) -> Batch`.
        axis: as in `train_step`.

    Returns:
        The new state, and the metrics of each step, or of the only step.
    """

    def single_step(state: TrainState, item: Any) -> tuple[TrainState, Metrics]:
        return step(state, read(data, item), *control, axis=axis)

    if jax.tree.leaves(items)[0].shape[0] == 1:
        return single_step(state, jax.tree.map(lambda x: x[0], items))
    return jax.lax.scan(single_step, state, items)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    lr_factor: jax.Array | np.ndarray | None = None,
    time_share: jax.Array | np.ndarray | None = None,
    *,
    loss: Callable[..., tuple[jax.Array, Metrics]],
    optimiser: optax.GradientTransformation,
    config: OptimiserConfig,
    lr_schedule: optax.Schedule | None = None,
    loss_inputs: Callable[..., dict[str, Any]] = lambda *_: {},
    accumulate: int = 1,
    spike_factor: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Update parameters, optimiser and EMAs once.

    The update is left out if the loss or gradient is not finite, or the loss is more than
    `spike_factor` times its running mean: only the step is counted, and metric `bad` is 1. An
    overflow of scaled float16 gradients is not bad: the update is left out, and the next step's
    scale is half as large.

    Args:
        state: the state before the step.
        batch: this device's part, or the whole batch if `axis` is None.
        key: key of the run; the step and each record's row are folded in here.
        lr_factor: factor of this step's learning rate; None: 1.
        time_share: see `Control`.
        loss: see `glide_jax.training.objectives.Objective`.
        optimiser: see `glide_jax.training.optimiser.make_optimiser`.
        config: rates and widths of the EMAs.
        lr_schedule: the optimiser's learning rate, for the metrics; None: they have none.
        loss_inputs: other arguments of the loss: see `Objective.loss_inputs`.
        accumulate: number of microbatches (gradient accumulation).
        spike_factor: see `RunConfig.spike_factor`.
        axis: name of the mapped axis over which losses and gradients are averaged, if any.

    Returns:
        The new state, and metrics averaged over the batch, with `grad_norm`, `bad` and
        `learning_rate`.
    """
    key = jax.random.fold_in(key, state.step)
    # Split, not used directly: this keeps the random numbers of earlier runs.
    record_key, _ = jax.random.split(key)
    loss_scale = 2.0**state.log2_loss_scale

    def gradient(
        both_params: tuple[Params, Params], rows: Batch
    ) -> tuple[tuple[Params, Metrics], TimestepLosses | None]:
        params, reference_params = both_params
        extra_inputs = loss_inputs(reference_params, state.step, time_share)
        if state.loss_history is not None:
            extra_inputs["loss_history"] = state.loss_history

        def scaled_loss(trained: Params) -> tuple[jax.Array, Metrics]:
            full_params = merge_frozen(trained, params)
            value, metrics = loss(
                full_params, rows, record_key, train=True, axis=axis, **extra_inputs
            )
            return value * loss_scale, metrics

        # Gradients of frozen parameters would be zeros that all devices sum.
        grads, metrics = jax.grad(scaled_loss, has_aux=True)(drop_frozen(params, config.freeze))
        timestep_losses: Any = metrics.pop(TIMESTEP_LOSSES, None)
        return (grads, metrics), timestep_losses

    both_params = (state.params, state.reference_params)
    (grads, metrics), timestep_losses = _accumulate(gradient, both_params, batch, accumulate)
    if axis is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)
    history = None
    if state.loss_history is not None and timestep_losses is not None:
        history = add_losses(state.loss_history, timestep_losses, axis)
    return apply_gradient(
        state,
        grads,
        metrics,
        optimiser=optimiser,
        config=config,
        lr_schedule=lr_schedule,
        spike_factor=spike_factor,
        lr_factor=lr_factor,
        loss_history=history,
    )


def apply_gradient(
    state: TrainState,
    grads: Params,
    metrics: Metrics,
    *,
    optimiser: optax.GradientTransformation,
    config: OptimiserConfig,
    lr_schedule: optax.Schedule | None = None,
    spike_factor: float = 0.0,
    lr_factor: jax.Array | np.ndarray | None = None,
    loss_history: LossHistory | None = None,
) -> tuple[TrainState, Metrics]:
    """Apply a gradient: the part of `train_step` after all microbatches.

    Args:
        grads: gradients of the scaled loss, averaged over the batch; without frozen parameters.
        metrics: metrics averaged over the batch.
        loss_history: the history with the losses of this step; None: it stays as it was.
    """
    grads = jax.tree.map(lambda g: g / 2.0**state.log2_loss_scale, grads)
    norm = optax.tree.norm(grads)
    overflow = ~jnp.isfinite(norm) & (state.log2_loss_scale > MIN_LOG2_LOSS_SCALE)
    bad = ~jnp.isfinite(metrics["loss"]) | (~jnp.isfinite(norm) & ~overflow)
    if spike_factor:
        past_warmup = state.step >= SPIKE_WARMUP
        bad = bad | (past_warmup & (metrics["loss"] > spike_factor * state.loss_mean))
    metrics |= {"grad_norm": norm, "bad": bad.astype(jnp.float32)}
    if lr_schedule is not None:
        factor = 1.0 if lr_factor is None else lr_factor
        # Steps without an update do not count.
        metrics["learning_rate"] = factor * jnp.float32(lr_schedule(updates_made(state.opt_state)))
    updated = _update(state, grads, metrics["loss"], optimiser, config, lr_factor)
    if loss_history is not None:
        updated = replace(updated, loss_history=loss_history)
    state = jax.tree.map(partial(jnp.where, bad | overflow), _skip(state, overflow), updated)
    return state, metrics


def _accumulate(
    gradient: Callable[
        [tuple[Params, Params], Batch], tuple[tuple[Params, Metrics], TimestepLosses | None]
    ],
    both_params: tuple[Params, Params],
    batch: Batch,
    count: int,
) -> tuple[tuple[Params, Metrics], TimestepLosses | None]:
    """Do `count` microbatches, one after the other.

    Returns:
        The mean gradient and metrics, and the records of all microbatches.
    """
    if count == 1:
        return gradient(both_params, batch)
    # A microbatch is every count-th row, so that a sharded batch is not moved between devices.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, both_params, jax.tree.map(lambda x: x[0], split))[0],
    )

    def add(total: Any, microbatch: Batch) -> tuple[Any, TimestepLosses | None]:
        # Without the barrier, XLA gathers sharded parameters before the loop and keeps them whole.
        held_params, microbatch = jax.lax.optimization_barrier((both_params, microbatch))
        gradient_sums, records = gradient(held_params, microbatch)
        return jax.tree.map(jnp.add, total, gradient_sums), records

    total, records = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda x: x / count, total), jax.tree.map(jnp.ravel, records)


def _update(
    state: TrainState,
    grads: Params,
    loss: jax.Array,
    optimiser: optax.GradientTransformation,
    config: OptimiserConfig,
    lr_factor: jax.Array | np.ndarray | None,
) -> TrainState:
    full_grads = merge_frozen(grads, state.params, fill=jnp.zeros_like)
    updates, opt_state = optimiser.update(full_grads, state.opt_state, state.params)
    if lr_factor is not None:
        updates = jax.tree.map(lambda x: x * lr_factor, updates)
    params = optax.apply_updates(state.params, updates)
    trained = drop_frozen(params, config.freeze)
    params = merge_frozen(trained, state.params)
    step = state.step + 1
    decay = jnp.minimum(config.ema, (1 + step) / (10 + step))
    power_emas = tuple(
        _decay(ema, trained, power_rate(step, width))
        for ema, width in zip(state.power_emas, config.ema_widths, strict=True)
    )
    memory = jnp.minimum(SPIKE_MEMORY, state.step / step)
    return TrainState(
        step=step,
        params=params,
        ema=_decay(state.ema, trained, decay),
        power_emas=power_emas,
        opt_state=opt_state,
        loss_mean=loss + memory * (state.loss_mean - loss),
        log2_loss_scale=state.log2_loss_scale
        + LOG2_LOSS_SCALE_GROWTH * (state.log2_loss_scale > 0),
        reference_params=state.reference_params,
        loss_history=state.loss_history,
    )


def _skip(state: TrainState, overflow: jax.Array) -> TrainState:
    """Return the state after a step without an update."""
    return replace(state, step=state.step + 1, log2_loss_scale=state.log2_loss_scale - overflow)


def _decay(ema: Params, trained: Params, decay: jax.Array) -> Params:
    """Return the EMA `decay ema + (1 - decay) params`; frozen parameters are their own average."""
    return jax.tree.map(
        lambda p, e: e if p is None else e + (1 - decay) * (p - e),
        trained,
        ema,
        is_leaf=lambda x: x is None,
    )


def power_rate(step: jax.Array, width: float) -> jax.Array:
    """Return `(1 - 1 / t)^(gamma + 1)`, the decay rate of a power-function EMA  (EDM2, 2312.02696).

    Args:
        step: t, from 1.
        width: standard deviation of the EMA's profile, as a share of the steps so far.
    """
    return (1 - 1 / step) ** (power_exponent(width) + 1)


def power_exponent(width: float) -> float:
    """Return gamma of `width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`  (EDM2)."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())
