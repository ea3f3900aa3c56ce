"""Peak figures of accelerators, by their `device_kind` in jax, and TPU slices.

Sources: docs.cloud.google.com/tpu/docs (v3 to v6e, tpu7x); NVIDIA's data sheets of T4, V100, A100,
L4, H100 and H200, and its white papers of the Ampere GA102 and Ada GPUs. Peaks are for dense
products with float32 accumulation, in bfloat16, or in float16 on GPUs without it (T4, V100).
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glide_jax.errors import UsageError, did_you_mean

GIB = 2.0**30


class Device(NamedTuple):
    """Peak figures of one jax device: a GPU, a TPU chip, or half a TPU chip (v3, tpu7x).

    Attributes:
        flops: multiplications and additions a second.
        memory: bytes; for a TPU those that its compiler gives to a program.
        bandwidth: bytes a second between memory and compute units.
        network: bytes a second into a TPU from the others of its slice, over all links; nan for
            GPUs.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float = math.nan


DEVICES = {
    # TPU memory is what libtpu 0.0.42 reports when a program does not fit. TPU network is half of
    # the "bidirectional" figure; v4 has six links of 50 GB/s (2304.01433), v3 four links of
    # 656 Gbit/s (Jouppi et al., CACM 63(7), 2020).
    "TPU v3": Device(123e12 / 2, 15.48 * GIB, 900e9 / 2, 328e9 / 2),
    "TPU v4": Device(275e12, 30.75 * GIB, 1200e9, 300e9),
    "TPU v5 lite": Device(197e12, 15.75 * GIB, 819e9, 200e9),
    "TPU v5": Device(459e12, 95.74 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Device(918e12, 31.25 * GIB, 1638e9, 400e9),
    "TPU7x": Device(2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 600e9 / 2),
    "Tesla T4": Device(65e12, 16e9, 320e9),
    "Tesla V100-SXM2-16GB": Device(125e12, 16e9, 900e9),
    "Tesla V100-SXM2-32GB": Device(125e12, 32e9, 900e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80e9, 2039e9),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 40e9, 1555e9),
    "NVIDIA A100 80GB PCIe": Device(312e12, 80e9, 1935e9),
    "NVIDIA L4": Device(121e12, 24e9, 300e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9, 3350e9),
    "NVIDIA H100 PCIe": Device(756e12, 80e9, 2000e9),
    "NVIDIA H200": Device(989e12, 141e9, 4800e9),
    "NVIDIA GeForce RTX 3090": Device(71e12, 24e9, 936e9),
    "NVIDIA GeForce RTX 4090": Device(165.2e12, 24e9, 1008e9),
}


def peak_flops(kind: str) -> float | None:
    """Return the peak FLOP/s of a `device_kind`; None for CPUs and unknown devices."""
    return DEVICES[kind].flops if kind in DEVICES else None


# --- TPU slices


@dataclass(frozen=True)
class Family:
    """A generation of TPUs.

    Attributes:
        kind: `device_kind` of its devices.
        shapes: its slices; only the small ones if larger ones are made of cubes.
        max_chips: chips of the largest slice made of cubes; 0: there are none.
        devices_per_chip: number of jax devices of a chip.
        options: arguments of `jax.experimental.topologies.get_topology_desc`.
    """

    kind: str
    shapes: tuple[str, ...]
    max_chips: int = 0
    devices_per_chip: int = 1
    options: dict[str, Any] = field(default_factory=dict)


FLAT = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
# Side of a cube: the sides of larger slices of the 3D families are multiples of it.
CUBE = 4
FAMILIES = {
    "v3": Family("TPU v3", (*FLAT, "16x32", "32x32"), devices_per_chip=2),
    # Both cores of a v4 chip are one device, as on the machines themselves.
    "v4": Family("TPU v4", SMALL, 4096, options={"chip_config_name": "megacore"}),
    "v5e": Family("TPU v5 lite", ("1x1", "2x4", *FLAT)),
    "v5p": Family("TPU v5", SMALL, 6144),
    "v6e": Family("TPU v6 lite", ("1x1", "2x4", *FLAT)),
    "tpu7x": Family("TPU7x", SMALL, 9216, devices_per_chip=2),
}
EXAMPLES = "cpu, v5e:4x4, v5e:16x16, v5p:2x2x4, v4:2x2x4, v3:4x4, v6e:4x4, tpu7x:2x2x4"


@dataclass(frozen=True)
class Slice:
    """One or several grids of TPU chips, such as `v5e:16x16` and `2xv5e:16x16`.

    Attributes:
        name: as written by the user.
        family: generation of the chips.
        sides: chips along each side of a grid.
        slices: number of grids.
    """

    name: str
    family: Family
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Number of chips."""
        return self.slices * math.prod(self.sides)

    @property
    def topology(self) -> str:
        """Name of one of the grids."""
        return self.name.partition("x")[2] if self.name[0].isdigit() else self.name

    @property
    def device(self) -> Device:
        """Peak figures of each of its devices."""
        return DEVICES[self.family.kind]


def parse_slice(name: str) -> Slice:
    """Return the slice of a name `family:sides`, or several slices, `Nxfamily:sides`.

    Raises:
        UsageError: there is no such family, or it has no such slice.
    """
    several = re.fullmatch(r"([1-9]\d*)x(.+)", name)
    slices, single = (int(several[1]), several[2]) if several else (1, name)
    family, _, shape = single.partition(":")
    if family not in FAMILIES:
        raise UsageError(
            f"unknown hardware {name!r}{did_you_mean(family, FAMILIES)}: "
            f"choose for example {EXAMPLES}"
        )
    kind = FAMILIES[family]
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)+", shape) else ()
    cubes = len(sides) == 3 and all(side and side % CUBE == 0 for side in sides)
    if shape not in kind.shapes and not (cubes and math.prod(sides) <= kind.max_chips):
        more = f", and multiples of {CUBE} up to {kind.max_chips} chips" if kind.max_chips else ""
        raise UsageError(
            f"{family} has no slice {shape!r}: choose one of {', '.join(kind.shapes)}{more}"
        )
    return Slice(name, kind, sides, slices)
