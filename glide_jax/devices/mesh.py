"""Meshes of devices, and how batches and states are split over them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glide_jax.errors import UsageError

# The axis of the devices that share a batch; under hybrid sharding, of those of one copy.
AXIS = "batch"
# The axis of the copies of a state under hybrid sharding.
COPIES = "copies"
# A training step `(state, batch, control) -> (state, metrics)`, or several, compiled or not.
Step = Callable[..., tuple[Any, Any]]
# Below this number of values an array is not worth a gather before each use.
MIN_SHARDED = 2**14


def device_mesh(devices: list[jax.Device]) -> Mesh:
    """Return all devices as one axis, of the type that linen's convolutions accept."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def hybrid_mesh(devices: list[jax.Device], per_copy: int = 0) -> Mesh:
    """Return the devices as copies of a state, each split over the devices of one copy.

    The devices of a copy are those with a fast network between them: weights move within a copy
    alone, and gradients between copies  (hybrid sharding, 2304.11277).

    Args:
        devices: all devices of all processes.
        per_copy: devices of one copy; 0: the devices of one slice (of TPUs, or of GPUs that share
            a machine or NVLink), or of one process where the devices name no slice.

    Returns:
        A mesh of the axes `COPIES` and `AXIS`; its devices are in the order of slices, processes
        and numbers.

    Raises:
        UsageError: `per_copy` does not divide the number of devices, or slices differ in size.
    """

    def group(device: jax.Device) -> int:
        return getattr(device, "slice_index", device.process_index)

    devices = sorted(devices, key=lambda device: (group(device), device.process_index, device.id))
    if not per_copy:
        sizes = {len(list(members)) for _, members in groupby(devices, group)}
        if len(sizes) > 1:
            counts = " and ".join(map(str, sorted(sizes)))
            raise UsageError(
                f"slices of {counts} devices cannot hold equal copies: add --devices-per-copy N"
            )
        per_copy = sizes.pop()
    if len(devices) % per_copy:
        raise UsageError(
            f"{len(devices)} devices do not divide into copies on {per_copy} devices: "
            "change --devices-per-copy"
        )
    grid = np.array(devices).reshape(-1, per_copy)
    return Mesh(grid, (COPIES, AXIS), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh | AbstractMesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of arrays whose given axis is the batch: over all devices of a mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device of a mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_spec(shape: tuple[int, ...], count: int) -> PartitionSpec:
    """Split the largest axis that divides by `count`; small arrays stay whole on every device."""
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not axes or int(np.prod(shape)) < MIN_SHARDED:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == largest else None for axis in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a state, abstract or not, under `fsdp` and `hybrid`."""
    count = mesh.shape[AXIS]
    return jax.tree.map(lambda x: NamedSharding(mesh, shard_spec(np.shape(x), count)), state)


@contextmanager
def pin_batch(mesh: AbstractMesh) -> Iterator[None]:
    """Keep the batch of every activation split over a mesh, while modules are traced.

    Otherwise XLA leaves some parameters sharded and gathers the whole batch instead.
    """
    batch = batch_sharding(mesh)

    # The first axis of every activation is the batch.
    def stays(x: Any) -> Any:
        if np.ndim(x) > 1 and np.shape(x)[0] % mesh.size == 0:
            return jax.lax.with_sharding_constraint(x, batch)
        return x

    def pinned(method: Callable[..., Any], args: Any, kwargs: Any, _: Any) -> Any:
        return jax.tree.map(stays, method(*args, **kwargs))

    # Kernels of our own read from the current mesh how batches are split.
    with jax.sharding.use_abstract_mesh(mesh), nn.intercept_methods(pinned):
        yield
