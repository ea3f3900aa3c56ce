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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.devices.hardware import GIB, Device, Slice, parse_slice
from glide_jax.devices.parallel import AXIS, device_mesh, fsdp_step, state_sharding
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.attention import compile_for
from glide_jax.training.config import CLIPTrainConfig, RunConfig
from glide_jax.training.flops import cost_of_update, flops_per_image
from glide_jax.training.freezing import without_frozen
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
# Model FLOP utilisation reported for a network of this shape: NVIDIA's Imagen base of 500M
# (JAX-Toolbox, 107 images a second on an A100 in bfloat16, batches of 64).
UTILISATION = 0.4
# Messages of the TPU compiler about a program that does not fit.
TOO_LARGE = (
    re.compile(r"HLO temporaries \((?P<number>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM"),
    re.compile(r"Used (?P<number>[\d.]+)(?P<unit>[KMGT]?) of [\d.]+[KMGT]? hbm"),
)
# Seconds between two lines of the clock, by whether stderr is a terminal.
PERIODS = {False: 30.0, True: 1.0}
UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Needs:
    """What a training step needs, as compiled; memory and traffic are bytes of one device.

    Attributes:
        parameters: number of parameters of the model.
        devices: number of devices that share the step.
        microbatch: images that one device processes at a time.
        state: parameters, optimiser and EMA.
        gradients: the part of `temporaries` that does not grow with the microbatch.
        temporaries: everything else that the step allocates.
        program: the code.
        model_flops: of the whole step, without recomputed activations.
        flops: of one device, as compiled.
        moved: between memory and compute units, if no intermediate value stays on the chip.
        network: into a device from the others.
        seconds: compile time.
    """

    parameters: int
    devices: int
    microbatch: int
    state: float
    gradients: float
    temporaries: float
    program: float
    model_flops: float
    flops: float
    moved: float
    network: float
    seconds: float

    @property
    def memory(self) -> float:
        """Total memory of a device."""
        return self.state + self.temporaries + self.program


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
    options: dict[str, Any] = {"platform": "tpu", "topology_name": chips.name}
    if chips.count == 1:
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
    if config.dtype == "auto":
        # "auto" depends on the devices of this machine, not on those compiled for.
        config = replace(config, dtype="bfloat16" if chips else "float32")
    count, microbatches, options = len(devices), config.accumulate, QUICK if chips else None
    microbatch = images_per_device(config, count)
    begun = time.monotonic()
    clocked = clock(f"compiling {config.name} for {chips.name if chips else 'cpu'}")
    # The machine's own GPU, if it has one, takes no part.
    with clocked, compile_for("tpu" if chips else "cpu"):
        program, arguments = parallel_step(config, device_mesh(devices))
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
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    trained = without_frozen(state.params, config.optimiser.freeze)
    summed = sum(leaf.size for leaf in jax.tree.leaves(trained))
    # pmap sums all gradients once. fsdp, in each microbatch, gathers all parameters for the forward
    # and for the backward pass, and sums all gradients. Frozen parameters have none.
    passed = (
        microbatches * (2 * parameters + summed) if config.parallelism == "fsdp" else 2 * summed
    )
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
        network=4 * passed * (count - 1) / count,
        seconds=seconds,
    )


def images_per_device(config: RunConfig, devices: int) -> int:
    """Return the images that each device processes at a time.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    pieces = devices * config.accumulate
    if config.batch_size % pieces:
        raise UsageError(
            f"a batch of {config.batch_size}{_microbatches(config)} does not divide over {devices} "
            f"devices: try --batch-size {pieces * math.ceil(config.batch_size / pieces)}"
        )
    return config.batch_size // pieces


def _microbatches(config: RunConfig) -> str:
    return f" in {config.accumulate} microbatches" if config.accumulate > 1 else ""


def parallel_step(
    config: RunConfig, mesh: Mesh
) -> tuple[Any, tuple[TrainState, Batch, jax.ShapeDtypeStruct]]:
    """Return a recipe's jitted step over a mesh, as in training, and its abstract arguments."""
    objective = make_objective(config)
    step, state = make_step(config, objective), abstract_state(config, objective)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
    if config.parallelism == "fsdp":
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
        program, where = jax.jit(mapped, donate_argnums=0), jax.tree.map(lambda _: whole, state)
    state = jax.tree.map(_placed, state, where)
    batch = jax.tree.map(partial(_placed, where=rows), abstract_batch(config, config.batch_size))
    return program, (state, batch, _placed(key, whole))


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
def clock(what: str) -> Iterator[None]:
    """Show the elapsed time on stderr: each second on a terminal, otherwise each half minute.

    On a terminal the line is overwritten.
    """
    terminal = sys.stderr.isatty()
    begun, done = time.monotonic(), threading.Event()

    def show() -> None:
        while not done.wait(PERIODS[terminal]):
            line = f"{what}: {minutes(time.monotonic() - begun)}"
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


# --- reporting


def largest_microbatch(needs: Needs, memory: float) -> int:
    """Estimate how many images a device with `memory` bytes can process at a time.

    Assumes that all temporaries except the gradients grow with the microbatch.
    """
    room = memory - needs.state - needs.program - needs.gradients
    return max(math.floor(needs.microbatch * room / (needs.temporaries - needs.gradients)), 0)


def step_seconds(needs: Needs, device: Device) -> dict[str, float]:
    """Return lower bounds of the time of a step: from compute, memory and network alone."""
    return {
        "compute": needs.flops / device.flops,
        "memory": needs.moved / device.bandwidth,
        "network": needs.network / device.network,
    }


def estimated_seconds(needs: Needs, device: Device) -> float:
    """Estimate the time of a step: at `UTILISATION` of the peak, but not below the bounds."""
    usual = needs.model_flops / (needs.devices * device.flops * UTILISATION)
    return max(usual, *step_seconds(needs, device).values())


def shortage(config: RunConfig, needs: Needs, chips: Slice) -> str:
    """Return "needs X of Y GiB", and the options that help."""
    memory = chips.device.memory
    ways = [] if config.remat else ["--remat"]
    if config.parallelism == "pmap" and needs.devices > 1:
        ways.append("--parallelism fsdp")
    if largest := largest_microbatch(needs, memory):
        least = math.ceil(needs.microbatch / largest) * config.accumulate
        rows = config.batch_size // needs.devices
        microbatches = next(n for n in range(least, rows + 1) if rows % n == 0)
        ways.append(
            f"--batch-size {needs.devices * largest}"
            if isinstance(config, CLIPTrainConfig)
            else f"--accumulate {microbatches}"
        )
    if needs.state > memory / 2 and config.optimiser.moments == "float32":
        ways.append("--optimiser.moments bfloat16")
    ways.append("a larger slice" if config.parallelism == "fsdp" else "chips with more memory")
    return (
        f"needs {gib(needs.memory)} of {gib(memory)} GiB a device (state {gib(needs.state)}, "
        f"temporaries {gib(needs.temporaries)}): try {', '.join(ways[:-1])} or {ways[-1]}"
    )


def report(config: RunConfig, needs: Needs, chips: Slice | None) -> str:
    """Return the report of a step on a slice, or on this machine's CPU (None), as lines."""
    remat = ", activation checkpointing" if config.remat else ""
    limit = f" of {gib(chips.device.memory)}" if chips else ""
    lines = {
        "model": f"{config.name}, {needs.parameters:,} parameters",
        "hardware": "this machine's CPU",
        "parallelism": f"{config.parallelism} over {needs.devices} devices{remat}",
        "batch": f"{config.batch_size:,}{_microbatches(config)}: {needs.microbatch} images a "
        "device at a time",
        "memory a device": f"state {gib(needs.state)} + temporaries {gib(needs.temporaries)} + "
        f"program {gib(needs.program)} = {gib(needs.memory)}{limit} GiB",
        "FLOPs a step": f"{needs.model_flops:.3g}; as compiled {needs.flops:.3g} a device",
    }
    if chips:
        lines |= _on_slice(config, needs, chips)
    lines["compiled in"] = minutes(needs.seconds)
    return "\n".join(f"{name:16} {text}" for name, text in lines.items())


def _on_slice(config: RunConfig, needs: Needs, chips: Slice) -> dict[str, str]:
    device = chips.device
    largest = largest_microbatch(needs, device.memory)
    batch = largest * needs.devices * config.accumulate
    bounds = step_seconds(needs, device)
    least, usual = max(bounds.values()), estimated_seconds(needs, device)
    each = ", ".join(f"{name} {value:.2g}" for name, value in bounds.items())
    days = usual * config.steps / 86_400
    return {
        "hardware": f"{chips.name}, {chips.count} chips; a device ({chips.family.kind}): "
        f"{gib(device.memory)} GiB, {device.flops / 1e12:g} TFLOP/s, memory "
        f"{device.bandwidth / 1e9:g} GB/s, network {device.network / 1e9:g} GB/s",
        "batch that fits": f"about {largest} a device at a time: --batch-size {batch} (estimate)",
        "step time": f"at least {least:.2g} s ({each}): "
        f"{config.batch_size / least:,.0f} images a second",
        "": f"estimate, at {UTILISATION:.0%} of the peak or at the bound: {usual:.2g} s, "
        f"{config.batch_size / usual:,.0f} images a second, {days:,.1f} days in all",
    }


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:.2f}" if size >= GIB or not size else f"{size / GIB:.2g}"


def minutes(seconds: float) -> str:
    """Format seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
