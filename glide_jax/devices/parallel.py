"""One training step over many devices: replicated (`pmap`) or fully sharded (`fsdp`).

Both run the same step `(state, batch, key) -> (state, metrics)` and give the same result up to
rounding. The devices may belong to several processes, on one machine or on many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glide_jax.errors import UsageError

AXIS = "batch"
# Below this number of values an array is not worth a gather before each use.
SMALLEST_SHARDED = 2**14

Step = Callable[..., tuple[Any, Any]]


class Parallel(Protocol):
    """How the devices share a training step: where arrays lie, and the compiled step.

    Attributes:
        devices: all devices of all processes.
    """

    devices: list[jax.Device]

    def compile(self, step: Step) -> Step:
        """Return the compiled step `(state, batch, key)`; it reuses the old state's memory.

        Args:
            step: `(state, batch, key, *, axis)`; `axis` is the name of the mapped axis, or None
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
        """Return the values of `for_checkpoint` where they lie, maybe in other shapes."""
        ...

    def for_checkpoint(self, state: Any) -> Any:
        """Return the arrays of a state that a checkpoint keeps."""
        ...

    def restore_target(self, abstract: Any) -> Any:
        """Return the arrays, or abstract ones with their sharding, that a checkpoint is read into.

        `put_state` takes it from there.
        """
        ...


def make_parallel(kind: str, batch_size: int) -> Parallel:
    """Return the parallelism over all devices of all processes.

    Args:
        kind: "pmap" or "fsdp".
        batch_size: images that all devices process at the same time.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    count = jax.device_count()
    if batch_size % count:
        raise UsageError(f"a batch of {batch_size} does not divide over {count} devices")
    return {"pmap": PMap, "fsdp": FSDP}[kind]()


def fast_compile_options() -> dict[str, Any] | None:
    """Return `compiler_options` for a program that runs once.

    A CPU takes far longer to compile the sampling of some hundred arrays well than to sample them.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


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

        def whole(x: jax.Array) -> jax.Array:
            # Each device's own copy: nothing moves between devices.
            copies = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], where, copies)

        return jax.tree.map(whole, params)

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


# --- fsdp


class FSDP:
    """Parameters, optimiser and EMA sharded over a mesh  (ZeRO, 1910.02054): `jax.jit`."""

    def __init__(self) -> None:
        self._mesh = device_mesh(jax.devices())
        self.devices = list(self._mesh.devices.flat)

    def compile(self, step: Step) -> Step:
        return fsdp_step(step, self._mesh)

    def compile_steps(self, steps: Step, data: Any) -> Step:
        program = fsdp_step(steps, self._mesh, batch_axis=1)
        held = jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, NamedSharding(self._mesh, PartitionSpec()), lambda index: x[index]
            ),
            data,
        )
        return lambda state, items, control: program(state, items, control, held)

    def put_items(self, items: Any) -> Any:
        rows = NamedSharding(self._mesh, PartitionSpec(None, AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), items)

    def initialise(self, function: Callable[..., Any], *arguments: Any) -> Any:
        arguments = jax.tree.map(
            lambda x: shard(x, self._mesh) if isinstance(x, np.ndarray) else x, arguments
        )
        return fsdp_make(function, arguments, self._mesh)(*arguments)

    def put_state(self, state: Any) -> Any:
        return shard(state, self._mesh)

    def put_batch(self, batch: Any) -> Any:
        rows = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def compile_measure(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        rows, everywhere = (NamedSharding(self._mesh, PartitionSpec(*a)) for a in ((AXIS,), ()))

        def pinned(params: Any, batch: Any, key: Any) -> Any:
            batch = jax.lax.with_sharding_constraint(batch, rows)
            with pin_batch(self._mesh.abstract_mesh):
                metrics = measure(params, batch, key, axis=None)
            return jax.lax.with_sharding_constraint(metrics, everywhere)

        program = jax.jit(pinned)
        return lambda params, batch, key: self.gather(program(params, self.put_batch(batch), key))

    def for_sampling(self, params: Any) -> Any:
        if jax.process_count() == 1:
            return params
        # One process samples: it holds all parts, each on one of its devices.
        return shard(self.gather(params), device_mesh(jax.local_devices()))

    def gather(self, tree: Any) -> Any:
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(_gathered, tree)

    def one_copy(self, state: Any) -> Any:
        return state

    def for_checkpoint(self, state: Any) -> Any:
        return state

    def restore_target(self, abstract: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            abstract,
            state_sharding(abstract, self._mesh),
        )


def _gathered(x: jax.Array) -> Any:
    # Metrics and small parameters are on every device already: no process waits for another.
    if x.is_fully_replicated:
        return x.addressable_data(0)
    return multihost_utils.process_allgather(x, tiled=True)


def device_mesh(devices: list[jax.Device]) -> Mesh:
    """Return all devices as one axis, of the type that linen's convolutions accept."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def shard_spec(shape: tuple[int, ...], count: int) -> PartitionSpec:
    """Split the largest axis that divides by `count`; small arrays stay whole on every device."""
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not axes or int(np.prod(shape)) < SMALLEST_SHARDED:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == largest else None for axis in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a state, abstract or not, under `fsdp`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, shard_spec(np.shape(x), mesh.size)), state)


@contextmanager
def pin_batch(mesh: AbstractMesh) -> Iterator[None]:
    """Keep the batch of every activation split over a mesh, while modules are traced.

    Otherwise XLA leaves some parameters sharded and gathers the whole batch instead.
    """
    batch = NamedSharding(mesh, PartitionSpec(AXIS))

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


def fsdp_step(step: Step, mesh: Mesh, batch_axis: int = 0) -> Step:
    """Return the jitted step of `fsdp`: XLA gathers each parameter where it is used.

    Args:
        step: `(state, rows, key, *shared, axis)`.
        mesh: all devices.
        batch_axis: axis of the arrays in `rows` that is the batch.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    given = NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, AXIS))

    def sharded(state: Any, rows: Any, key: Any, *shared: Any) -> tuple[Any, Any]:
        rows = jax.lax.with_sharding_constraint(rows, given)
        with pin_batch(mesh.abstract_mesh):
            state, metrics = step(state, rows, key, *shared, axis=None)
        metrics = jax.lax.with_sharding_constraint(metrics, everywhere)
        layout = state_sharding(state, mesh)
        return jax.lax.with_sharding_constraint(state, layout), metrics

    return jax.jit(sharded, donate_argnums=0)


def fsdp_make(make: Callable[..., Any], arguments: Any, mesh: Mesh) -> Callable[..., Any]:
    """Return the jitted maker of a state for `fsdp`: nothing large is ever whole on one device."""
    layout = state_sharding(jax.eval_shape(make, *arguments), mesh)
    return jax.jit(make, out_shardings=layout, compiler_options=fast_compile_options())


def shard(tree: Any, mesh: Mesh) -> Any:
    """Shard a host's arrays; each process holds all of each array and keeps its own parts."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == where:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(put, tree, state_sharding(tree, mesh))
