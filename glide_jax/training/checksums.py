"""Checksums of the arrays of a training state."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """Return `sum_k b_k (2 k + 1) mod 2^32` of each array by its path, b its values as integers.

    Arrays of jax are summed where they lie, on all their devices, and those of numpy by threads. So
    a save does not wait for the host. The sum does not depend on the sharding. One altered value
    always changes it; several leave it unchanged with a probability of 2^-32.

    With several processes, all must call it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor() as pool:
        sums = [
            _summed_in_turn(leaf) if isinstance(leaf, jax.Array) else pool.submit(_host_sum, leaf)
            for _, leaf in leaves
        ]
        summed = [s.result() if isinstance(s, Future) else s.addressable_data(0) for s in sums]
    totals = jax.device_get(summed)
    return {name_of(path): int(total) for (path, _), total in zip(leaves, totals, strict=True)}


def _summed_in_turn(x: jax.Array) -> jax.Array:
    total = _device_sum(x)
    # A CPU runs several programs at once, so the processes would disagree on whose sum over the
    # network is next, and wait for each other forever. Other devices run them in order.
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        total.block_until_ready()
    return total


@jax.jit
def _device_sum(x: jax.Array) -> jax.Array:
    """Return the sum of an array; it has no temporaries of the array's size."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        axis_index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index, stride = index + axis_index * np.uint32(stride % 2**32), stride * x.shape[axis]
    return (bits * (2 * index + 1)).sum(dtype=jnp.uint32)


def _host_sum(x: np.ndarray) -> int:
    """Return the sum of an array on the host."""
    x = np.asarray(x)
    last = x.shape[-1] if x.ndim else 1
    rows = np.ascontiguousarray(x).view(f"u{x.itemsize}").reshape(-1, last)
    rows = rows.astype(np.uint32, copy=False)
    # Flat index of the first value of each row; all is modulo 2^32.
    first = np.arange(len(rows), dtype=np.uint32) * np.uint32(last)
    weights = 2 * np.arange(last, dtype=np.uint32) + 1
    return int((rows @ weights + 2 * first * rows.sum(axis=1, dtype=np.uint32)).sum()) % 2**32


def name_of(path: tuple[Any, ...]) -> str:
    """Return the path of an array in a tree, with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
