"""Attention on TPUs: a Pallas kernel that does not write the logits to memory."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.sharding import PartitionSpec

from glide_jax.models.platform import split_axes

# A TPU's registers hold 128 columns.
LANES = 128
# Queries of one call of the kernel, and the most keys: their logits then take 4 MB on chip.
QUERIES = 256
KEYS = 4096


def is_supported(query: jax.Array, key: jax.Array) -> bool:
    """Return whether the kernel takes these `(B, T, heads, d)` and `(B, S, heads, d)`."""
    (_, length, heads, head_width), keys = query.shape, key.shape[1]
    axes = split_axes()
    if axes is None:
        return False
    shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    divisible = (
        query.shape[0] % shards == 0 and LANES % head_width == 0 and heads * head_width % LANES == 0
    )
    return divisible and length % QUERIES == 0 and keys % LANES == 0 and keys <= KEYS


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False
) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v`; logits and softmax in float32, on chip.

    In memory, heads lie side by side in the last axis, as linear layers return them, and the kernel
    reads whole registers of 128 columns, so of two heads of 64. With an axis of their own, heads of
    64 columns would be padded to 128, and every array would be copied.

    Args:
        query: `(B, T, heads, d)`.
        key, value: `(B, S, heads, d)`.
        interpret: run the kernel's body as ordinary operations, on any device.

    Returns:
        `(B, T, heads * d)`. Where the batch is split over several devices outside of `pmap` and
        `shard_map`, their mesh must be the current one (`jax.sharding.use_abstract_mesh`).
    """
    call = partial(_call, head=query.shape[-1], interpret=interpret)
    if axes := split_axes():
        # XLA cannot split a kernel by itself.
        spec = PartitionSpec(axes)
        call = jax.shard_map(call, in_specs=spec, out_specs=spec, check_vma=False)
    query, key, value = (array.reshape(*array.shape[:2], -1) for array in (query, key, value))
    return call(query, key, value)


def _call(
    query: jax.Array, key: jax.Array, value: jax.Array, head: int, interpret: bool
) -> jax.Array:
    batch, length, width = query.shape
    keys = key.shape[1]

    def block(rows: int, whole: bool) -> pallas.BlockSpec:
        # Keys and values of an image and a pair of heads stay on chip for all of its queries.
        return pallas.BlockSpec((1, rows, LANES), lambda b, h, t: (b, 0 if whole else t, h))

    return pallas.pallas_call(
        partial(_kernel, head=head),
        grid=(batch, width // LANES, length // QUERIES),
        in_specs=[block(QUERIES, False), block(keys, True), block(keys, True)],
        out_specs=block(QUERIES, False),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        cost_estimate=pallas.CostEstimate(
            flops=4 * batch * length * keys * width,
            transcendentals=batch * length * keys * width // head,
            bytes_accessed=2 * query.dtype.itemsize * batch * (length + keys) * width,
        ),
        interpret=interpret,
    )(query, key, value)


def _kernel(query: Any, key: Any, value: Any, out: Any, *, head: int) -> None:
    def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        contract = (((1,), (axis,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    for start in range(0, LANES, head):
        columns = slice(start, start + head)
        logits = product(query[0, :, columns], key[0, :, columns], 1) * head**-0.5
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        attended = product(weights.astype(value.dtype), value[0, :, columns], 0)
        out[0, :, columns] = attended.astype(out.dtype)
