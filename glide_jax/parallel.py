"""One training step over all devices of this process."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import UsageError

AXIS = "batch"


def pmapped(step: Callable, devices: list[jax.Device]) -> Callable:
    """`jax.pmap` of a step `(state, batch, key) -> (state, metrics)` that names its axis `AXIS`.

    State and metrics are replicated, the batch is split on its first axis, the key is
    the same everywhere; the old state's memory is reused.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None), devices=devices, donate_argnums=0)


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """A copy of each array on each device: `(...) -> (devices, ...)`."""
    count = len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return jax.tree.map(
        lambda x: jax.device_put(jnp.broadcast_to(x, (count, *jnp.shape(x))), sharding), tree
    )


def unreplicate(tree: Any) -> Any:
    """The first device's copy."""
    return jax.tree.map(lambda x: x[0], tree)


def split_batch(tree: Any, count: int) -> Any:
    """`(B, ...) -> (count, B / count, ...)` of each array.

    Raises:
        UsageError: the batch does not divide.
    """

    def split(x):
        if len(x) % count:
            raise UsageError(f"a batch of {len(x)} does not divide over {count} devices")
        return x.reshape(count, -1, *x.shape[1:])

    return jax.tree.map(split, tree)
