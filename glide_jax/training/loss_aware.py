"""Loss-aware timesteps: a timestep is sampled in proportion to the size of its loss.

`p_t ~ sqrt(E[L_t^2])` over the last ten losses at t, and weights `1 / (T p_t)`, which leave the
expected loss that of uniform timesteps and reduce the noise of its gradient  (Improved DDPM,
2102.09672, sec. 3.3). The history is part of the training state; all devices have the same one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Both as in the code of Improved DDPM: losses per timestep, and the share of uniform timesteps.
MEMORY, UNIFORM = 10, 0.001
# Random bits of a timestep. Cumulative probabilities in these units are sums of integers: exact,
# and equal on all devices. With float32 the rare timesteps, at 1e-6, would be off by 6%.
UNITS = 2.0**31


class LossHistory(NamedTuple):
    """The last losses at each timestep.

    Attributes:
        losses: `(T, 10)` float32; the k-th loss of a timestep is at k mod 10.
        count: `(T,)` int32, the number of losses that each timestep has had.
    """

    losses: jax.Array
    count: jax.Array


class TimestepLosses(NamedTuple):
    """The images of a step: row in the whole batch, timestep and loss; each `(B,)`."""

    row: jax.Array
    t: jax.Array
    loss: jax.Array


def empty_history(length: int) -> LossHistory:
    """Return the history before the first step."""
    return LossHistory(jnp.zeros((length, MEMORY)), jnp.zeros(length, jnp.int32))


def probabilities(history: LossHistory) -> jax.Array:
    """`p_t = 0.999 sqrt(E[L_t^2]) / sum + 0.001 / T`, uniform until all timesteps have ten losses.

    Returns:
        `(T,)` float32.
    """
    length = len(history.count)
    size = jnp.sqrt((history.losses**2).mean(axis=1))
    total = size.sum()
    uniform = jnp.full(length, 1 / length)
    ready = (history.count >= MEMORY).all() & (total > 0)
    aware = (1 - UNIFORM) * size / jnp.where(ready, total, 1) + UNIFORM / length
    return jnp.where(ready, aware, uniform)


def sample_timestep(key: jax.Array, probability: jax.Array) -> jax.Array:
    """Return one timestep, int32, by the inverse of the distribution function."""
    ends = jnp.cumsum((probability * UNITS).astype(jnp.uint32))
    # The last end is left out: by rounding it is not exactly UNITS.
    point = jax.random.bits(key, dtype=jnp.uint32) >> 1
    return jnp.searchsorted(ends[:-1], point, side="right").astype(jnp.int32)


def importance(probability: jax.Array, t: jax.Array) -> jax.Array:
    """`1 / (T p_t)` of timesteps."""
    return 1 / (len(probability) * probability[t])


def add_losses(
    history: LossHistory, records: TimestepLosses, axis: str | None = None
) -> LossHistory:
    """Return the history after a step, with its losses in the order of their rows.

    Args:
        history: before the step.
        records: of this device, or of all if `axis` is None.
        axis: name of the mapped axis over which the batch is split, if any.
    """
    if axis is not None:
        records = jax.lax.all_gather(records, axis, tiled=True)
    order = jnp.lexsort((records.row, records.t))
    t, loss = records.t[order], records.loss[order]
    # Rank of each loss among those at its timestep, and how many come after it.
    earlier_records = jnp.arange(len(t)) - jnp.searchsorted(t, t, side="left")
    later_records = jnp.searchsorted(t, t, side="right") - 1 - jnp.arange(len(t))
    slot = (history.count[t] + earlier_records) % MEMORY
    # Of more than ten losses at a timestep the last ten stay: no place is written twice.
    written_t = jnp.where(later_records < MEMORY, t, len(history.count))
    losses = history.losses.at[written_t, slot].set(loss, mode="drop", unique_indices=True)
    return LossHistory(losses, history.count.at[t].add(1))
