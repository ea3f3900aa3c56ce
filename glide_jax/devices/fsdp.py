"""Fully sharded training: parameters, optimiser and EMA split over the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from glide_jax.devices.mesh import (
    Step,
    batch_sharding,
    device_mesh,
    pin_batch,
    replicated_sharding,
    state_sharding,
)
from glide_jax.devices.runtime import fast_compile_options


class FSDP:
    """Parameters, optimiser and EMA sharded over a mesh  (ZeRO, 1910.02054): `jax.jit`.

    Args:
        mesh: all devices of all processes: `device_mesh`, or `hybrid_mesh` for several copies.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.devices = list(self._mesh.devices.flat)

    def compile(self, step: Step) -> Step:
        return fsdp_step(step, self._mesh)

    def compile_steps(self, steps: Step, data: Any) -> Step:
        program = fsdp_step(steps, self._mesh, batch_axis=1)
        whole = replicated_sharding(self._mesh)
        held = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, whole, lambda i: x[i]),
            data,
        )
        return lambda state, items, control: program(state, items, control, held)

    def put_items(self, items: Any) -> Any:
        where = batch_sharding(self._mesh, 1)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), items)

    def initialise(self, function: Callable[..., Any], *arguments: Any) -> Any:
        arguments = jax.tree.map(
            lambda x: shard(x, self._mesh) if isinstance(x, np.ndarray) else x, arguments
        )
        return fsdp_make(function, arguments, self._mesh)(*arguments)

    def put_state(self, state: Any) -> Any:
        return shard(state, self._mesh)

    def put_batch(self, batch: Any) -> Any:
        where = batch_sharding(self._mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)

    def compile_measure(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        def pinned(params: Any, batch: Any, key: Any) -> Any:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(self._mesh))
            with pin_batch(self._mesh.abstract_mesh):
                metrics = measure(params, batch, key, axis=None)
            return jax.lax.with_sharding_constraint(metrics, replicated_sharding(self._mesh))

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


def fsdp_step(step: Step, mesh: Mesh, batch_axis: int = 0) -> Step:
    """Return the jitted step of `fsdp`: XLA gathers each parameter where it is used.

    Args:
        step: `(state, batch, control, *shared, axis)`; the dry run passes a key as control.
        mesh: all devices.
        batch_axis: axis of the arrays in `batch` that is the batch.
    """

    def sharded(state: Any, batch: Any, control: Any, *shared: Any) -> tuple[Any, Any]:
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh, batch_axis))
        with pin_batch(mesh.abstract_mesh):
            state, metrics = step(state, batch, control, *shared, axis=None)
        metrics = jax.lax.with_sharding_constraint(metrics, replicated_sharding(mesh))
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
