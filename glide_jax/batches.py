"""Many pictures a batch at a time, on one device or spread over several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.diffusion.guidance import Guidance, Network
from glide_jax.errors import UsageError
from glide_jax.parallel import AXIS, device_mesh

# At 64x64.
USUAL_BATCH = {"cpu": 16, "accelerator": 64}


def batches(count: int, size: int, devices: int = 1) -> list[np.ndarray]:
    """Indices of `count` pictures, in batches of at most `size` and all of one length, so that they
    run the same compiled program; a multiple of the devices. The last picture fills the last batch.

    Raises:
        UsageError: a batch of none.
    """
    if size < 1:
        raise UsageError(f"a batch holds at least one picture, not {size}")
    even = -(-count // -(-count // size))
    even = -(-even // devices) * devices
    rows = np.arange(-(-count // even) * even).reshape(-1, even)
    return list(np.minimum(rows, count - 1))


def usual_batch(side: int) -> int:
    """Pictures that a device draws at a time: 16 of 64x64 on a CPU, 64 elsewhere, fewer of larger
    ones (a quarter at 256x256, whose networks are narrower where they are large)."""
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    return max(1, USUAL_BATCH[kind] * 64 // max(64, side))


def rows_of(guidances: Sequence[Guidance], index: np.ndarray, count: int) -> tuple[Guidance, ...]:
    """Guidances for some of `count` pictures: numbers and arrays that are one each are indexed.

    Raises:
        UsageError: an argument is neither one for all nor one each.
    """

    def numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)

    def rows(name: str, value: Any) -> Any:
        if isinstance(value, Network) or np.ndim(value) == 0:
            return value
        value = np.asarray(value) if numbers(value) else value
        if len(value) not in (1, count):
            raise UsageError(f"{name} has {len(value)} values for {count} pictures: give one each")
        return value[index if len(value) == count else np.zeros(len(index), int)]

    def leaf(value: Any) -> bool:
        return isinstance(value, Network) or numbers(value)

    return tuple(
        replace(g, args=jax.tree.map(partial(rows, g.name), g.args, is_leaf=leaf))
        for whole in guidances
        for g in whole.parts()
    )


# --- devices


def local_devices(asked: int | str) -> list[jax.Device]:
    """So many of this process's devices, or "all".

    Raises:
        UsageError: there are not as many.
    """
    here = jax.local_devices()
    if asked == "all":
        return here
    if not (str(asked).isdecimal() and 1 <= int(asked) <= len(here)):
        raise UsageError(f"cannot use {asked} devices: there are {len(here)} here; or say all")
    return here[: int(asked)]


@dataclass(frozen=True)
class Place:
    """Where pictures are drawn: on the default device, or spread over several.

    Attributes:
        devices: how many, or "all".
    """

    devices: int | str = 1

    @cached_property
    def mesh(self) -> Mesh:
        """The devices in a row."""
        return device_mesh(local_devices(self.devices))

    def everywhere(self, tree: Any) -> Any:
        """Arrays, whole, on each device."""
        if self.mesh.size == 1:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def spread(self, tree: Any) -> Any:
        """Arrays batch first, split over the devices; single numbers and networks on each."""
        if self.mesh.size == 1:
            return tree
        rows = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def put(leaf: Any) -> Any:
            whole = isinstance(leaf, Network) or np.ndim(leaf) == 0
            return self.everywhere(leaf) if whole else jax.device_put(leaf, rows)

        return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, Network))
