"""One training step over many devices: replicated (`pmap`) or fully sharded (`fsdp`).

Both take the same step `(state, batch, key) -> (state, metrics)`, and give the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glide_jax.errors import UsageError

AXIS = "batch"
# Below this many values an array is not worth a gather before each use.
SMALLEST_SHARDED = 2**14


@dataclass(frozen=True)
class Spread:
    """A training step spread over devices.

    Attributes:
        devices: all of them, of all processes.
        step: the compiled step; takes and gives what the functions below place. The old state's
            memory is reused.
        make_state: `(function, *arguments)`: the state that the function gives, on all devices.
        place_state: a host's state -> the state on all devices.
        place_batch: this process's rows of a batch, numpy -> the batch on all devices.
        one_copy: state or metrics on all devices -> the same with each value once.
        layout: an abstract state -> arrays, or abstract ones with their sharding, that say where a
            checkpoint is restored to; `place_state` takes it from there.
    """

    devices: list[jax.Device]
    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
    make_state: Callable[..., Any]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    one_copy: Callable[[Any], Any]
    layout: Callable[[Any], Any]


def spread(kind: str, step: Callable[..., Any], batch_size: int) -> Spread:
    """Spreads a step over all devices of all processes.

    Args:
        kind: "pmap" or "fsdp".
        step: `(state, batch, key, *, axis)`; `axis` is the name of the mapped axis, or None where
            the whole batch is seen at once.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    count = jax.device_count()
    if batch_size % count:
        raise UsageError(f"a batch of {batch_size} does not divide over {count} devices")
    return {"pmap": _pmap, "fsdp": _fsdp}[kind](step)


def _pmap(step: Callable[..., Any]) -> Spread:
    local = jax.local_devices()

    def host(abstract: Any) -> Any:
        # Untouched zeros cost no memory.
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)

    return Spread(
        devices=jax.devices(),
        step=jax.pmap(
            partial(step, axis=AXIS), axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0
        ),
        make_state=lambda make, *given: replicate(jax.jit(make)(*given), local),
        place_state=partial(replicate, devices=local),
        place_batch=partial(split_batch, count=len(local)),
        one_copy=unreplicate,
        layout=host,
    )


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """A copy of each array on each device: `(...) -> (devices, ...)`."""
    count = len(devices)
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(
        lambda x: jax.device_put(jnp.broadcast_to(x, (count, *jnp.shape(x))), sharding), tree
    )


def unreplicate(tree: Any) -> Any:
    """The first device's copy."""
    return jax.tree.map(lambda x: x[0], tree)


def split_batch(tree: Any, count: int) -> Any:
    """`(B, ...) -> (count, B / count, ...)` of each array."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


def device_mesh(devices: list[jax.Device]) -> Mesh:
    """All devices in one row; axes that linen's convolutions accept."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def shard_spec(shape: tuple[int, ...], count: int) -> PartitionSpec:
    """Over its largest axis that divides by `count`; small arrays stay whole on every device."""
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not axes or int(np.prod(shape)) < SMALLEST_SHARDED:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == largest else None for axis in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Where each array of a state (abstract or not) lies under `fsdp`  (ZeRO, 1910.02054)."""
    return jax.tree.map(lambda x: NamedSharding(mesh, shard_spec(np.shape(x), mesh.size)), state)


def fsdp_step(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The jitted step of `fsdp`: XLA gathers each parameter where it is used."""
    batch, everywhere = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((AXIS,), ()))

    def sharded(state: Any, rows: Any, key: jax.Array) -> tuple[Any, Any]:
        layout = state_sharding(state, mesh)
        rows = jax.lax.with_sharding_constraint(rows, batch)
        state, metrics = step(state, rows, key, axis=None)
        metrics = jax.lax.with_sharding_constraint(metrics, everywhere)
        return jax.lax.with_sharding_constraint(state, layout), metrics

    return jax.jit(sharded, donate_argnums=0)


def _fsdp(step: Callable[..., Any]) -> Spread:
    mesh = device_mesh(jax.devices())
    rows = NamedSharding(mesh, PartitionSpec(AXIS))

    def layout(state: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            state,
            state_sharding(state, mesh),
        )

    def make_state(make: Callable[..., Any], *given: Any) -> Any:
        # Never whole on one device.
        where = state_sharding(jax.eval_shape(make, *given), mesh)
        return jax.jit(make, out_shardings=where)(*given)

    def place_state(state: Any) -> Any:
        # Each process brings the whole array and keeps its own shards.
        def put(x: Any, where: NamedSharding) -> jax.Array:
            if isinstance(x, jax.Array) and x.sharding == where:
                return x
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

        return jax.tree.map(put, state, state_sharding(state, mesh))

    return Spread(
        devices=list(mesh.devices.flat),
        step=fsdp_step(step, mesh),
        make_state=make_state,
        place_state=place_state,
        place_batch=lambda batch: jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(rows, x), batch
        ),
        one_copy=lambda state: state,
        layout=layout,
    )
