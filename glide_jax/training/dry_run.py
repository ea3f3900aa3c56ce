"""Estimates of what a recipe needs: `train.py --config ... --dry-run v5e:16x16`.

The training step is compiled for a TPU slice by the TPU compiler, which needs no TPU; nothing runs
and no array is allocated. `cpu` compiles the step for this machine.
"""

import importlib.util
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.devices.fsdp import fsdp_step
from glide_jax.devices.hardware import Slice, parse_slice
from glide_jax.devices.mesh import (
    AXIS,
    COPIES,
    batch_sharding,
    device_mesh,
    hybrid_mesh,
    replicated_sharding,
    state_sharding,
)
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.platform import compile_for
from glide_jax.training.config import RunConfig, trains_lora
from glide_jax.training.dry_run_report import (
    Needs,
    format_minutes,
    microbatches_of,
    report,
    shortage,
)
from glide_jax.training.flops import cost_of_update, flops_per_image
from glide_jax.training.freezing import drop_frozen
from glide_jax.training.objectives import Batch, abstract_batch, make_objective
from glide_jax.training.state import TrainState, abstract_state
from glide_jax.training.step import make_step

# libtpu looks for a TPU machine, and allows one process only; a dry run needs neither.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The default effort took 3.6 times as long for 250M parameters, and allocated 15% more memory.
QUICK = {"exec_time_optimization_effort": -1.0}
# Messages of the TPU compiler about a program that does not fit.
TOO_LARGE = (
    re.compile(r"HLO temporaries \((?P<number>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM"),
    re.compile(r"Used (?P<number>[\d.]+)(?P<unit>[KMGT]?) of [\d.]+[KMGT]? hbm"),
)
# Seconds between two lines of the clock, by whether stderr is a terminal.
PERIODS = {False: 30.0, True: 1.0}
UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def dry_run(config: RunConfig, hardware: str) -> str:
    """Compile a recipe's step for some hardware, and return a report of what it needs.

    Args:
        config: the recipe.
        hardware: a TPU slice, such as "v5e:16x16", which need not exist, or "cpu".

    Raises:
        UsageError: no such hardware, or the batch does not divide over its devices.
        GlideError: the step does not fit, or there is no TPU compiler.
    """
    chips = None if hardware == "cpu" else parse_slice(hardware)
    needs = measure(config, chips)
    if chips and needs.memory > chips.device.memory:
        raise GlideError(f"{config.name} on {hardware} {shortage(config, needs, chips)}")
    return report(config, needs, chips)


# --- compiling


def slice_devices(chips: Slice) -> list[jax.Device]:
    """Return the devices of a TPU slice, to compile for; they cannot run anything.

    Raises:
        GlideError: there is no TPU compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise GlideError("the TPU compiler is not installed: pip install '.[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "platform": "tpu",
        "topology_name": chips.topology,
        "num_slices": chips.slices,
    }
    if math.prod(chips.sides) == 1:
        # A host has four chips, and this slice is a part of it.
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(**options, **chips.family.options).devices)


def measure(config: RunConfig, chips: Slice | None) -> Needs:
    """Return what a recipe's step needs on a TPU slice, or on this machine's CPU (None).

    Raises:
        UsageError: the batch does not divide over the devices.
        GlideError: there is no TPU compiler.
    """
    devices = slice_devices(chips) if chips else jax.devices("cpu")
    # "auto" depends on the devices compiled for, not on those of this machine.
    config = replace(config, dtype=jnp.dtype(trunk_dtype(config.dtype, devices[0])).name)
    count, microbatches, options = len(devices), config.accumulate, QUICK if chips else None
    microbatch = images_per_device(config, count)
    begun = time.monotonic()
    showing = show_elapsed(f"compiling {config.name} for {chips.name if chips else 'cpu'}")
    # The machine's own GPU, if it has one, takes no part.
    with showing, compile_for("tpu" if chips else "cpu"):
        mesh = training_mesh(config, devices)
        program, arguments = parallel_step(config, mesh)
        flops, moved, code = math.nan, math.nan, 0
        try:
            compiled = program.lower(*arguments).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            temporaries = reported_temporaries(str(error))
        else:
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            temporaries, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
            flops, moved = cost["flops"], cost["bytes accessed"]
            if microbatches > 1:
                # The compiler counts one iteration of the loop; the update comes after it.
                once = cost_of_update(config, arguments[0], options)
                flops += (microbatches - 1) * (flops - once["flops"])
                moved += (microbatches - 1) * (moved - once["bytes accessed"])
        seconds = time.monotonic() - begun
        model_flops = config.batch_size * flops_per_image(config)
    state = arguments[0]
    # With LoRA the network is the base and its pairs.
    params = (state.params, state.reference_params if trains_lora(config) else {})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    gathered = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    trained = drop_frozen(state.params, config.optimiser.freeze)
    summed = sum(leaf.size for leaf in jax.tree.leaves(trained))
    # pmap sums all gradients once. The others, in each microbatch, gather all parameters for the
    # forward and for the backward pass, and sum all gradients. Frozen parameters have none.
    is_replicated = config.parallelism == "pmap"
    passed = 8 * summed if is_replicated else microbatches * (2 * gathered + 4 * summed)
    sharing, copies = mesh.shape[AXIS], mesh.shape.get(COPIES, 1)
    return Needs(
        parameters=parameters,
        devices=count,
        microbatch=microbatch,
        state=bytes_of_one(state),
        gradients=bytes_of_one(trained),
        temporaries=temporaries,
        program=code,
        model_flops=model_flops,
        flops=flops,
        moved=moved,
        network=passed * (sharing - 1) / sharing,
        between=8 * microbatches * summed / sharing * (copies - 1) / copies,
        seconds=seconds,
        trained=summed,
    )


def images_per_device(config: RunConfig, devices: int) -> int:
    """Return the images that each device processes at a time.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    pieces = devices * config.accumulate
    if config.batch_size % pieces:
        raise UsageError(
            f"a batch of {config.batch_size}{microbatches_of(config)} does not divide over "
            f"{devices} devices: try --batch-size {pieces * math.ceil(config.batch_size / pieces)}"
        )
    return config.batch_size // pieces


def training_mesh(config: RunConfig, devices: list[jax.Device]) -> Mesh:
    """Return the mesh over which a recipe trains on these devices.

    Raises:
        UsageError: the devices do not divide into copies.
    """
    if config.parallelism == "hybrid":
        return hybrid_mesh(devices, config.devices_per_copy)
    return device_mesh(devices)


def parallel_step(
    config: RunConfig, mesh: Mesh
) -> tuple[Any, tuple[TrainState, Batch, jax.ShapeDtypeStruct]]:
    """Return a recipe's jitted step over a mesh, as in training, and its abstract arguments."""
    objective = make_objective(config)
    step, state = make_step(config, objective), abstract_state(config, objective)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if config.parallelism != "pmap":
        program, where = fsdp_step(step, mesh), state_sharding(state, mesh)
    else:
        # The same program as from `jax.pmap`, which takes this machine's devices only.
        split, copies = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(
            partial(step, axis=AXIS),
            mesh=mesh,
            in_specs=(copies, split, copies),
            out_specs=copies,
            check_vma=False,
        )
        program, where = (
            jax.jit(mapped, donate_argnums=0),
            jax.tree.map(lambda _: replicated_sharding(mesh), state),
        )
    state = jax.tree.map(_placed, state, where)
    batch = jax.tree.map(
        partial(_placed, where=batch_sharding(mesh)), abstract_batch(config, config.batch_size)
    )
    return program, (state, batch, _placed(key, replicated_sharding(mesh)))


def _placed(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def bytes_of_one(tree: Any) -> int:
    """Return the bytes that a tree of sharded arrays takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def reported_temporaries(message: str) -> float:
    """Return the bytes of temporaries in the compiler's error about a step that does not fit.

    Raises:
        GlideError: it is another error.
    """
    for pattern in TOO_LARGE:
        if match := pattern.search(message):
            return float(match["number"]) * UNITS[match["unit"]]
    raise GlideError(f"the compiler failed: {message.strip().splitlines()[0]}")


@contextmanager
def show_elapsed(what: str) -> Iterator[None]:
    """Show the elapsed time on stderr: each second on a terminal, otherwise each half minute.

    On a terminal the line is overwritten.
    """
    terminal = sys.stderr.isatty()
    begun, done = time.monotonic(), threading.Event()

    def show() -> None:
        while not done.wait(PERIODS[terminal]):
            line = f"{what}: {format_minutes(time.monotonic() - begun)}"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
