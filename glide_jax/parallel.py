"""One training step over many devices: replicated (`pmap`) or fully sharded (`fsdp`).

Both take the same step `(state, batch, key) -> (state, metrics)`, and give the same result. The
devices may belong to several processes, of one machine or of many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glide_jax.errors import GlideError, UsageError

AXIS = "batch"
# Below this many values an array is not worth a gather before each use.
SMALLEST_SHARDED = 2**14
# Of a message from one process to the others.
TEXT_BYTES = 1024


# --- processes


class Peers(NamedTuple):
    """How a process finds the others.

    Attributes:
        coordinator: `host:port` of process 0, or "auto": as the cluster says.
        processes: how many there are; None where the cluster says.
        process: which one this is; None where the cluster says.
    """

    coordinator: str
    processes: int | None = None
    process: int | None = None


def join(peers: Peers) -> None:
    """Makes one machine of several processes; before anything else is asked of jax.

    "auto" knows TPU slices, Slurm, Open MPI and Kubernetes.

    Raises:
        GlideError: the others cannot be found.
    """
    by_hand = peers.coordinator != "auto"
    try:
        jax.distributed.initialize(
            peers.coordinator if by_hand else None,
            peers.processes,
            peers.process,
            cluster_detection_method="deactivate" if by_hand else None,
        )
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise GlideError(
            f"cannot join the other processes ({why}): name them with "
            "--coordinator HOST:PORT --processes N --process I"
        ) from None


def shared_text(text: str) -> str:
    """The first text that is not empty, of those that all processes bring; "" if all are."""
    if jax.process_count() == 1:
        return text
    own = np.zeros(TEXT_BYTES, np.uint8)
    data = text.encode()[:TEXT_BYTES]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in every)
    return next(filter(None, texts), "")


def on_first(do: Callable[[], Any]) -> None:
    """Calls a function in process 0 alone, while the others wait.

    Raises:
        GlideError: the function raised one; in every process, so that none is left waiting.
    """
    failed: GlideError | None = None
    if jax.process_index() == 0:
        try:
            do()
        except GlideError as error:
            failed = error
    if message := shared_text(f"{type(failed).__name__}: {failed}" if failed else ""):
        kind, _, text = message.partition(": ")
        raise failed or (UsageError if kind == UsageError.__name__ else GlideError)(text)


# --- a step over devices


@dataclass(frozen=True)
class Spread:
    """A training step spread over devices.

    Attributes:
        devices: all of them, of all processes.
        step: the compiled step; takes and gives what the functions below place. The old state's
            memory is reused.
        make_state: `(function, *arguments)`: the state that the function gives, on all devices.
        place_state: a host's or a restored state -> the state on all devices.
        place_batch: this process's rows of a batch, numpy -> the batch on all devices.
        one_copy: state or metrics on all devices -> the same with each value once.
        whole: parameters on all devices -> arrays that a process can use without the others; to be
            called in all processes.
        saved: a state on all devices -> the arrays that a checkpoint keeps.
        layout: an abstract state -> arrays, or abstract ones with their sharding, that say where a
            checkpoint is restored to; `place_state` takes it from there.
    """

    devices: list[jax.Device]
    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
    make_state: Callable[..., Any]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    one_copy: Callable[[Any], Any]
    whole: Callable[[Any], Any]
    saved: Callable[[Any], Any]
    layout: Callable[[Any], Any]


def spread(kind: str, step: Callable[..., Any], batch_size: int) -> Spread:
    """Spreads a step over all devices of all processes.

    Args:
        kind: "pmap" or "fsdp".
        step: `(state, batch, key, *, axis)`; `axis` is the name of the mapped axis, or None where
            the whole batch is seen at once.
        batch_size: pictures that all devices work on at the same time.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    count = jax.device_count()
    if batch_size % count:
        raise UsageError(f"a batch of {batch_size} does not divide over {count} devices")
    return {"pmap": _pmap, "fsdp": _fsdp}[kind](step)


def quickly() -> dict[str, Any] | None:
    """`compiler_options` of what runs once.

    To compile the drawing of some hundred arrays well takes a CPU far longer than to draw them.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


# --- pmap


def _pmap(step: Callable[..., Any]) -> Spread:
    local = jax.local_devices()
    return Spread(
        devices=jax.devices(),
        step=jax.pmap(
            partial(step, axis=AXIS), axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0
        ),
        make_state=partial(_make_replicated, local),
        place_state=partial(replicate, devices=local),
        place_batch=partial(split_batch, count=len(local)),
        one_copy=unreplicate,
        whole=unreplicate,
        saved=_to_host,
        layout=_on_host,
    )


def _rows(devices: list[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def _make_replicated(devices: list[jax.Device], make: Callable[..., Any], *given: Any) -> Any:
    # Each device makes its own: a copy for each of the others would not fit beside the first.
    def copies(*given: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (len(devices), *jnp.shape(x))), make(*given)
        )

    return jax.jit(copies, out_shardings=_rows(devices), compiler_options=quickly())(*given)


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """A copy of each array on each device: `(...) -> (devices, ...)`."""
    where = _rows(devices)

    def put(x: Any) -> jax.Array:
        host = np.asarray(x)
        shape = (len(devices), *host.shape)
        return jax.make_array_from_callback(shape, where, lambda _: host[None])

    return jax.tree.map(put, tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy, on that device."""
    return jax.tree.map(lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree)


def _to_host(tree: Any) -> Any:
    # Not through `unreplicate`: a second copy of a state may not fit on the device.
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)).reshape(x.shape[1:]), tree)


def _on_host(abstract: Any) -> Any:
    # Untouched zeros cost no memory.
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)


def split_batch(tree: Any, count: int) -> Any:
    """`(B, ...) -> (count, B / count, ...)` of each array."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


# --- fsdp


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

    def stays(x: Any) -> Any:
        if np.ndim(x) > 1 and np.shape(x)[0] % mesh.size == 0:
            return jax.lax.with_sharding_constraint(x, batch)
        return x

    def pinned(method: Callable[..., Any], args: Any, kwargs: Any, _: Any) -> Any:
        # Or XLA would leave some parameters where they are, and gather the whole batch instead.
        return jax.tree.map(stays, method(*args, **kwargs))

    def sharded(state: Any, rows: Any, key: jax.Array) -> tuple[Any, Any]:
        rows = jax.lax.with_sharding_constraint(rows, batch)
        with nn.intercept_methods(pinned):
            state, metrics = step(state, rows, key, axis=None)
        metrics = jax.lax.with_sharding_constraint(metrics, everywhere)
        layout = state_sharding(state, mesh)
        return jax.lax.with_sharding_constraint(state, layout), metrics

    return jax.jit(sharded, donate_argnums=0)


def fsdp_make(make: Callable[..., Any], given: Any, mesh: Mesh) -> Callable[..., Any]:
    """The jitted maker of a state for `fsdp`: nothing large is ever whole on one device."""
    layout = state_sharding(jax.eval_shape(make, *given), mesh)
    return jax.jit(make, out_shardings=layout, compiler_options=quickly())


def shard(tree: Any, mesh: Mesh) -> Any:
    """Arrays of a host, shared out; each process brings all of each and keeps its own parts."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == where:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(put, tree, state_sharding(tree, mesh))


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
        given = jax.tree.map(lambda x: shard(x, mesh) if isinstance(x, np.ndarray) else x, given)
        return fsdp_make(make, given, mesh)(*given)

    def whole(tree: Any) -> Any:
        if jax.process_count() == 1:
            return tree
        return multihost_utils.process_allgather(tree, tiled=True)

    return Spread(
        devices=list(mesh.devices.flat),
        step=fsdp_step(step, mesh),
        make_state=make_state,
        place_state=partial(shard, mesh=mesh),
        place_batch=lambda batch: jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(rows, x), batch
        ),
        one_copy=lambda tree: tree,
        whole=whole,
        saved=lambda state: state,
        layout=layout,
    )
