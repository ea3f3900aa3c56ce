"""One training step over many devices: replicated, fully sharded, or sharded in copies.

All run the same step `(state, batch, control) -> (state, metrics)` and give the same result up to
rounding. The devices may belong to several processes, on one machine or on many.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.devices.fsdp import FSDP
from glide_jax.devices.mesh import AXIS, Step, device_mesh, hybrid_mesh
from glide_jax.devices.runtime import fast_compile_options
from glide_jax.errors import UsageError


class Parallel(Protocol):
    """How the devices share a training step: where arrays lie, and the compiled step.

    Attributes:
        devices: all devices of all processes.
    """

    devices: list[jax.Device]

    def compile(self, step: Step) -> Step:
        """Return the compiled step `(state, batch, control)`; it reuses the old state's memory.

        Args:
            step: `(state, batch, control, *, axis)`; `axis` is the name of the mapped axis, or None
                where the whole batch is seen at once.
        """
        ...

    def compile_steps(self, steps: Step, data: Any) -> Step:
        """Return the compiled program of several steps `(state, items, control)`.

        Args:
            steps: `(state, items, control, data, *, axis)`; every array of `items` begins with the
                step, then has this device's rows.
            data: arrays that every device holds whole.
        """
        ...

    def put_items(self, items: Any) -> Any:
        """Put this process's rows of several steps `(k, b, ...)` on its devices."""
        ...

    def initialise(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`, a state, on all devices."""
        ...

    def put_state(self, state: Any) -> Any:
        """Put a state of the host, or a restored one, on all devices."""
        ...

    def put_batch(self, batch: Any) -> Any:
        """Put this process's rows of a batch on its devices."""
        ...

    def compile_measure(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the compiled `(params, batch, key) -> metrics` over all devices.

        It takes parameters of a state as they lie, and this process's rows of a batch; the metrics
        are averaged and gathered. For the `axis` of `measure` see `compile`.
        """
        ...

    def for_sampling(self, params: Any) -> Any:
        """Return parameters of a state on all of this process's devices: as copies, or in parts.

        All processes must call it.
        """
        ...

    def gather(self, tree: Any) -> Any:
        """Return parameters or metrics as arrays that a process can use without the others.

        All processes must call it.
        """
        ...

    def one_copy(self, state: Any) -> Any:
        """Return the arrays of `for_checkpoint` on the devices, not copied.

        They may have one more axis, of length 1, in front.
        """
        ...

    def for_checkpoint(self, state: Any) -> Any:
        """Return the arrays of a state that a checkpoint keeps."""
        ...

    def restore_target(self, abstract: Any) -> Any:
        """Return the arrays, or abstract ones with their sharding, that a checkpoint is read into.

        `put_state` takes it from there.
        """
        ...


def make_parallel(kind: str, batch_size: int, per_copy: int = 0) -> Parallel:
    """Return the parallelism over all devices of all processes.

    Args:
        kind: "pmap", "fsdp" or "hybrid".
        batch_size: images that all devices process at the same time.
        per_copy: devices that share a copy of the state under "hybrid"; 0: see `hybrid_mesh`.

    Raises:
        UsageError: the batch does not divide over the devices, or the devices into copies.
    """
    count = jax.device_count()
    if batch_size % count:
        raise UsageError(f"a batch of {batch_size} does not divide over {count} devices")
    if kind == "pmap":
        return PMap()
    devices = jax.devices()
    return FSDP(hybrid_mesh(devices, per_copy) if kind == "hybrid" else device_mesh(devices))


# --- pmap


class PMap:
    """The whole state on every device, the batch split, gradients averaged: `jax.pmap`."""

    def __init__(self) -> None:
        self.devices = jax.devices()
        self._local = jax.local_devices()

    def compile(self, step: Step) -> Step:
        return jax.pmap(
            partial(step, axis=AXIS), axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0
        )

    def compile_steps(self, steps: Step, data: Any) -> Step:
        program = jax.pmap(
            partial(steps, axis=AXIS), axis_name=AXIS, in_axes=(0, 0, None, 0), donate_argnums=0
        )
        held = replicate(data, self._local)
        return lambda state, items, control: program(state, items, control, held)

    def put_items(self, items: Any) -> Any:
        count = len(self._local)
        return jax.tree.map(
            lambda x: x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1), items
        )

    def initialise(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # Each device makes its own: copies for all the others would not fit beside the first.
        def copies(*arguments: Any) -> Any:
            return jax.tree.map(
                lambda x: jnp.broadcast_to(x, (len(self._local), *jnp.shape(x))),
                function(*arguments),
            )

        return jax.jit(
            copies, out_shardings=_rows(self._local), compiler_options=fast_compile_options()
        )(*arguments)

    def put_state(self, state: Any) -> Any:
        return replicate(state, self._local)

    def put_batch(self, batch: Any) -> Any:
        return split_batch(batch, len(self._local))

    def compile_measure(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        def averaged(params: Any, rows: Any, key: Any) -> Any:
            return jax.lax.pmean(measure(params, rows, key, axis=AXIS), AXIS)

        program = jax.pmap(averaged, axis_name=AXIS, in_axes=(0, 0, None))
        return lambda params, batch, key: self.gather(program(params, self.put_batch(batch), key))

    def for_sampling(self, params: Any) -> Any:
        where = NamedSharding(device_mesh(self._local), PartitionSpec())

        def as_replicated(x: jax.Array) -> jax.Array:
            # Each device's own copy: nothing moves between devices.
            copies = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], where, copies)

        return jax.tree.map(as_replicated, params)

    def gather(self, tree: Any) -> Any:
        return unreplicate(tree)

    def one_copy(self, state: Any) -> Any:
        return jax.tree.map(lambda x: x.addressable_data(0), state)

    def for_checkpoint(self, state: Any) -> Any:
        # Not through `unreplicate`: a second copy of a state may not fit on the device.
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), state)

    def restore_target(self, abstract: Any) -> Any:
        # Untouched zeros cost no memory.
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)


def _rows(devices: list[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Copy each array to each device: `(...) -> (devices, ...)`."""
    where = _rows(devices)

    def put(x: Any) -> jax.Array:
        host = np.asarray(x)
        shape = (len(devices), *host.shape)
        return jax.make_array_from_callback(shape, where, lambda _: host[None])

    return jax.tree.map(put, tree)


def unreplicate(tree: Any) -> Any:
    """Return the first device's copy, on that device."""
    return jax.tree.map(lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree)


def split_batch(tree: Any, count: int) -> Any:
    """Reshape each array `(B, ...) -> (count, B / count, ...)`."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
