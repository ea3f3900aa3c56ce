"""Batches of images on one device, or split over several."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glide_jax.devices.parallel import AXIS, device_mesh
from glide_jax.errors import UsageError


def local_devices(count: int | str) -> list[jax.Device]:
    """Return that many of this process's devices, or "all".

    Raises:
        UsageError: there are fewer.
    """
    here = jax.local_devices()
    if count == "all":
        return here
    if not (str(count).isdecimal() and 1 <= int(count) <= len(here)):
        raise UsageError(f"cannot use {count} devices: there are {len(here)} here; or give all")
    return here[: int(count)]


@dataclass(frozen=True)
class Placement:
    """Where images are generated: on the default device, or on several.

    Attributes:
        devices: how many, or "all".
    """

    devices: int | str = 1

    @cached_property
    def mesh(self) -> Mesh:
        """The devices as one axis."""
        return device_mesh(local_devices(self.devices))

    def replicate(self, tree: Any) -> Any:
        """Put whole arrays on each device."""
        if self.mesh.size == 1:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split(self, tree: Any, whole: Callable[[Any], bool] = lambda node: False) -> Any:
        """Split arrays, batch first, over the devices; scalars go to each device.

        Args:
            whole: whether a node of the tree, such as a network, is not batched: it goes to each
                device.
        """
        if self.mesh.size == 1:
            return tree
        rows = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def put(leaf: Any) -> Any:
            if whole(leaf) or np.ndim(leaf) == 0:
                return self.replicate(leaf)
            return jax.device_put(leaf, rows)

        return jax.tree.map(put, tree, is_leaf=whole)
