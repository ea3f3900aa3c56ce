"""What a recipe needs on hardware that is not there: `train.py --config ... --dry-run v5e:16x16`.

The step of training is compiled, by the TPU's own compiler where a TPU slice is named, and
nothing is run or allocated. `cpu` compiles it for this machine.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.errors import GlideError, UsageError
from glide_jax.devices.hardware import GIB, Device, Slice, parse_slice
from glide_jax.devices.parallel import AXIS, device_mesh, fsdp_step, state_sharding
from glide_jax.training.config import CLIPTrainConfig, RunConfig
from glide_jax.training.flops import flops_per_image
from glide_jax.training.initial import abstract_state
from glide_jax.training.objectives import Batch, make_objective, make_tokenizer
from glide_jax.training.state import TrainState
from glide_jax.training.step import make_step

# libtpu looks for a TPU's machine, and lets one process alone load it; this one needs no TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The default effort took 3.6 times as long for 250M parameters, and asked for 15% more memory.
QUICK = {"exec_time_optimization_effort": -1.0}
# Share of the peak that a network of this shape was seen to reach: NVIDIA's Imagen base of 500M
# (JAX-Toolbox, 107 pictures a second on an A100 in bfloat16, batches of 64).
SEEN_SHARE = 0.4
# How a TPU's compiler says that a program does not fit.
TOO_LARGE = (
    re.compile(r"HLO temporaries \((?P<number>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM"),
    re.compile(r"Used (?P<number>[\d.]+)(?P<unit>[KMGT]?) of [\d.]+[KMGT]? hbm"),
)
# Seconds between two looks at the clock: in a file, and on a terminal.
PERIODS = {False: 30.0, True: 1.0}
UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Needs:
    """What a step needs, as its compiler says; memory, and traffic, of one device, in bytes.

    Attributes:
        parameters: how many the model has.
        devices: over which the step is spread.
        pictures: that one device works on at the same time.
        state: parameters, optimiser and averages.
        gradients: which are part of the temporaries, and do not grow with the pictures.
        temporaries: all else that a step makes.
        program: the code.
        model_flops: of the whole step, without what is computed again.
        flops: of one device, as compiled.
        moved: between memory and device, if no intermediate value stayed on the chip.
        network: into a device from the others.
        seconds: that compiling took.
    """

    parameters: int
    devices: int
    pictures: int
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
        """Of a device, in all."""
        return self.state + self.temporaries + self.program


def dry_run(config: RunConfig, hardware: str) -> str:
    """Compiles a recipe's step for hardware that need not be there, and tells what it needs.

    Args:
        hardware: a TPU slice, such as "v5e:16x16", or "cpu".

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
    """The devices of a TPU slice, to compile for: they cannot run anything.

    Raises:
        GlideError: there is no TPU compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise GlideError("the TPU's compiler is not installed: pip install '.[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A slice of one chip is a part of a machine, which has four.
    host = {"chips_per_host_bounds": (1, 1, 1)} if chips.count == 1 else {}
    options = {"platform": "tpu", "topology_name": chips.name}
    return topologies.get_topology_desc(**options, **chips.family.options, **host).devices


def measure(config: RunConfig, chips: Slice | None) -> Needs:
    """What a recipe's step needs, spread over a TPU slice, or over this machine's CPU (None).

    Raises:
        UsageError: the batch does not divide over the devices.
        GlideError: there is no TPU compiler.
    """
    devices = slice_devices(chips) if chips else jax.devices("cpu")
    if config.dtype == "auto":
        # What "auto" would be there; here it asks this machine.
        config = replace(config, dtype="bfloat16" if chips else "float32")
    count, parts = len(devices), config.accumulate
    pictures = images_per_device(config, count)
    begun = time.monotonic()
    with clock(f"compiling {config.name} for {chips.name if chips else 'cpu'}"):
        program, arguments = spread_step(config, device_mesh(devices))
        flops, moved, code = math.nan, math.nan, 0
        try:
            compiled = program.lower(*arguments).compile(compiler_options=QUICK if chips else None)
        except jax.errors.JaxRuntimeError as error:
            temporaries = told_temporaries(str(error))
        else:
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            temporaries, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
            # The loop over the parts is counted as if it turned once.
            flops, moved = parts * cost["flops"], parts * cost["bytes accessed"]
        seconds = time.monotonic() - begun
        model_flops = config.batch_size * flops_per_image(config)
    state = arguments[0]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # All gradients are summed once; or, in each part, all parameters gathered for the forward
    # and for the backward pass and all gradients summed.
    passes = 3 * parts if config.parallelism == "fsdp" else 2
    return Needs(
        parameters=parameters,
        devices=count,
        pictures=pictures,
        state=bytes_of_one(state),
        gradients=bytes_of_one(state.params),
        temporaries=temporaries,
        program=code,
        model_flops=model_flops,
        flops=flops,
        moved=moved,
        network=passes * 4 * parameters * (count - 1) / count,
        seconds=seconds,
    )


def images_per_device(config: RunConfig, devices: int) -> int:
    """How many pictures each device works on at a time.

    Raises:
        UsageError: the batch does not divide over the devices.
    """
    pieces = devices * config.accumulate
    if config.batch_size % pieces:
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        raise UsageError(
            f"a batch of {config.batch_size}{parts} does not divide over {devices} devices: try "
            f"--batch-size {pieces * math.ceil(config.batch_size / pieces)}"
        )
    return config.batch_size // pieces


def spread_step(config: RunConfig, mesh: Mesh) -> tuple[Any, tuple[TrainState, Batch, jax.Array]]:
    """A recipe's jitted step, spread as in training, and its arguments without values."""
    objective = make_objective(config)
    step, state = make_step(config, objective), abstract_state(config, objective)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
    if config.parallelism == "fsdp":
        program, where = fsdp_step(step, mesh), state_sharding(state, mesh)
    else:
        # What `jax.pmap` makes of a step: that itself takes none but this machine's devices.
        parts, copies = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(
            partial(step, axis=AXIS),
            mesh=mesh,
            in_specs=(copies, parts, copies),
            out_specs=copies,
            check_vma=False,
        )
        program, where = jax.jit(mapped, donate_argnums=0), jax.tree.map(lambda _: whole, state)
    state = jax.tree.map(_placed, state, where)
    batch = jax.tree.map(partial(_placed, where=rows), abstract_batch(config))
    return program, (state, batch, _placed(key, whole))


def abstract_batch(config: RunConfig) -> Batch:
    """The shapes of a recipe's batch."""
    size, context = config.side, make_tokenizer(config).context
    shapes = Batch((size, size, 3), (context,), (context,), ())
    dtypes = Batch(np.uint8, np.int32, np.bool_, np.int32)
    return Batch(
        *(
            jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
    )


def _placed(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def bytes_of_one(tree: Any) -> int:
    """Of the parts of a tree of placed arrays that lie on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def told_temporaries(message: str) -> float:
    """Bytes that the compiler says a step needs on a device beside its state, where it has less.

    Raises:
        GlideError: it says something else.
    """
    for pattern in TOO_LARGE:
        if told := pattern.search(message):
            return float(told["number"]) * UNITS[told["unit"]]
    raise GlideError(f"the compiler failed: {message.strip().splitlines()[0]}")


@contextmanager
def clock(what: str) -> Iterator[None]:
    """A clock on stderr while something goes on: each second on a terminal, else each half minute.

    It is a line of its own, which is overwritten on a terminal.
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


# --- telling


def fitting(needs: Needs, memory: float) -> int:
    """About how many pictures a device can work on at a time, with `memory` bytes.

    Taken is that all temporaries but the gradients grow with the pictures.
    """
    room = memory - needs.state - needs.program - needs.gradients
    return max(math.floor(needs.pictures * room / (needs.temporaries - needs.gradients)), 0)


def step_seconds(needs: Needs, device: Device) -> dict[str, float]:
    """Seconds of a step if nothing but one thing took time: compute, memory, network."""
    return {
        "compute": needs.flops / device.flops,
        "memory": needs.moved / device.bandwidth,
        "network": needs.network / device.network,
    }


def guessed_seconds(needs: Needs, device: Device) -> float:
    """Seconds of a step at the share of the peak that was seen elsewhere, or at these bounds."""
    seen = needs.model_flops / (needs.devices * device.flops * SEEN_SHARE)
    return max(seen, *step_seconds(needs, device).values())


def shortage(config: RunConfig, needs: Needs, chips: Slice) -> str:
    """ "needs X of Y GiB", and what a user can do."""
    memory = chips.device.memory
    ways = [] if config.remat else ["--remat"]
    if config.parallelism == "pmap" and needs.devices > 1:
        ways.append("--parallelism fsdp")
    if pictures := fitting(needs, memory):
        least = math.ceil(needs.pictures / pictures) * config.accumulate
        rows = config.batch_size // needs.devices
        parts = next(n for n in range(least, rows + 1) if rows % n == 0)
        ways.append(
            f"--batch-size {needs.devices * pictures}"
            if isinstance(config, CLIPTrainConfig)
            else f"--accumulate {parts}"
        )
    if needs.state > memory / 2 and config.optimiser.moments == "float32":
        ways.append("--optimiser.moments bfloat16")
    ways.append("a larger slice" if config.parallelism == "fsdp" else "chips with more memory")
    return (
        f"needs {gib(needs.memory)} of {gib(memory)} GiB a device (state {gib(needs.state)}, "
        f"temporaries {gib(needs.temporaries)}): try {', '.join(ways[:-1])} or {ways[-1]}"
    )


def report(config: RunConfig, needs: Needs, chips: Slice | None) -> str:
    """A block of lines about a step that fits a slice, or that is for this machine's CPU (None)."""
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    remat = ", activations computed again" if config.remat else ""
    limit = f" of {gib(chips.device.memory)}" if chips else ""
    lines = {
        "model": f"{config.name}, {needs.parameters:,} parameters",
        "hardware": "this machine's CPU",
        "spread": f"{config.parallelism} over {needs.devices} devices{remat}",
        "batch": f"{config.batch_size:,}{parts}: {needs.pictures} a device at a time",
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
    pictures = fitting(needs, device.memory)
    batch = pictures * needs.devices * config.accumulate
    bounds = step_seconds(needs, device)
    least, guess = max(bounds.values()), guessed_seconds(needs, device)
    each = ", ".join(f"{name} {value:.2g}" for name, value in bounds.items())
    days = guess * config.steps / 86_400
    return {
        "hardware": f"{chips.name}, {chips.count} chips; a device ({chips.family.kind}): "
        f"{gib(device.memory)} GiB, {device.flops / 1e12:g} TFLOP/s, memory "
        f"{device.bandwidth / 1e9:g} GB/s, network {device.network / 1e9:g} GB/s",
        "batch that fits": f"about {pictures} a device at a time: --batch-size {batch} (estimate)",
        "step time": f"at least {least:.2g} s ({each}): "
        f"{config.batch_size / least:,.0f} pictures a second",
        "": f"a guess, at {SEEN_SHARE:.0%} of the peak or at the bound: {guess:.2g} s, "
        f"{config.batch_size / guess:,.0f} pictures a second, {days:,.1f} days in all",
    }


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}" if size >= GIB or not size else f"{size / GIB:.2g}"


def minutes(seconds: float) -> str:
    """`m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
