"""Report of a dry run: what a training step needs, whether it fits, and how long it takes."""

import math
from dataclasses import dataclass

from glide_jax.devices.hardware import GIB, Device, Slice
from glide_jax.training.config import CLIPTrainConfig, RunConfig, trains_lora

# Model FLOP utilisation reported for a network of this shape: NVIDIA's Imagen base of 500M
# (JAX-Toolbox, 107 images a second on an A100 in bfloat16, batches of 64).
UTILISATION = 0.4


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
        network: into a device from the others, under hybrid sharding from those of its copy.
        between: into a device from other copies, under hybrid sharding.
        seconds: compile time.
        trained: number of parameters that are trained.
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
    between: float
    seconds: float
    trained: int = 0

    @property
    def memory(self) -> float:
        """Total memory of a device."""
        return self.state + self.temporaries + self.program


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
    if needs.state > memory / 2 and config.optimiser.first_moment_dtype == "float32":
        ways.append("--optimiser.first-moment-dtype bfloat16")
    if config.parallelism == "hybrid":
        ways.append("--parallelism fsdp")
    ways.append("a larger slice" if config.parallelism != "pmap" else "chips with more memory")
    return (
        f"needs {gib(needs.memory)} of {gib(memory)} GiB a device (state {gib(needs.state)}, "
        f"temporaries {gib(needs.temporaries)}): try {', '.join(ways[:-1])} or {ways[-1]}"
    )


def report(config: RunConfig, needs: Needs, chips: Slice | None) -> str:
    """Return the report of a step on a slice, or on this machine's CPU (None), as lines."""
    remat = ", activation checkpointing" if config.remat else ""
    limit = f" of {gib(chips.device.memory)}" if chips else ""
    trained = f", {needs.trained:,} of them trained" if trains_lora(config) else ""
    lines = {
        "model": f"{config.name}, {needs.parameters:,} parameters{trained}",
        "hardware": "this machine's CPU",
        "parallelism": f"{config.parallelism} over {needs.devices} devices{remat}",
        "batch": f"{config.batch_size:,}{microbatches_of(config)}: {needs.microbatch} images a "
        "device at a time",
        "memory a device": f"state {gib(needs.state)} + temporaries {gib(needs.temporaries)} + "
        f"program {gib(needs.program)} = {gib(needs.memory)}{limit} GiB",
        "FLOPs a step": f"{needs.model_flops:.3g}; as compiled {needs.flops:.3g} a device",
    }
    if chips:
        lines |= _slice_lines(config, needs, chips)
    lines["compiled in"] = format_minutes(needs.seconds)
    return "\n".join(f"{name:16} {text}" for name, text in lines.items())


def _slice_lines(config: RunConfig, needs: Needs, chips: Slice) -> dict[str, str]:
    device = chips.device
    largest = largest_microbatch(needs, device.memory)
    batch = largest * needs.devices * config.accumulate
    bounds = step_seconds(needs, device)
    least, usual = max(bounds.values()), estimated_seconds(needs, device)
    each = ", ".join(f"{name} {value:.2g}" for name, value in bounds.items())
    days = usual * config.steps / 86_400
    lines = {
        "hardware": f"{chips.name}, {chips.count} chips; a device ({chips.family.kind}): "
        f"{gib(device.memory)} GiB, {device.flops / 1e12:g} TFLOP/s, memory "
        f"{device.bandwidth / 1e9:g} GB/s, network {device.network / 1e9:g} GB/s",
        "batch that fits": f"about {largest} a device at a time: --batch-size {batch} (estimate)",
        "step time": f"at least {least:.2g} s ({each}): "
        f"{config.batch_size / least:,.0f} images a second",
        "": f"estimate, at {UTILISATION:.0%} of the peak or at the bound: {usual:.2g} s, "
        f"{config.batch_size / usual:,.0f} images a second, {days:,.1f} days in all",
    }
    if needs.between:
        lines["between copies"] = (
            f"{needs.between / 1e6:,.0f} MB into a device in a step; not part of these times"
        )
    return lines


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:.2f}" if size >= GIB or not size else f"{size / GIB:.2g}"


def format_minutes(seconds: float) -> str:
    """Format seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def microbatches_of(config: RunConfig) -> str:
    """Return " in N microbatches", or nothing for one."""
    return f" in {config.accumulate} microbatches" if config.accumulate > 1 else ""
