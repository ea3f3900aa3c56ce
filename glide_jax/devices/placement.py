"""Batches of images on one device, or split over several."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from glide_jax.devices.mesh import batch_sharding, device_mesh, replicated_sharding
from glide_jax.devices.runtime import preferred_devices
from glide_jax.errors import UsageError


def chosen_devices(count: int | str) -> list[jax.Device]:
    """Return the first `count` devices of this process, or all for "all"; the default one first.

    Raises:
        UsageError: there are fewer devices.
        GlideError: jax finds none.
    """
    available = preferred_devices()
    if count == "all":
        return available
    if not (str(count).isdecimal() and 1 <= int(count) <= len(available)):
        raise UsageError(
            f"cannot use {count} devices: there are {len(available)} here; or give all"
        )
    return available[: int(count)]


GPU_PLATFORMS = "gpu", "cuda"
# The axes of a kernel (height, width, in, out), from the slowest in memory to the fastest.
OHWI = Layout((3, 0, 1, 2))


def _is_kernel(leaf: jax.Array) -> bool:
    """Whether an array is a kernel of more than one pixel in 16 bits."""
    return leaf.ndim == 4 and leaf.shape[0] > 1 and leaf.dtype in (jnp.bfloat16, jnp.float16)


@dataclass(frozen=True)
class Placement:
    """Where images are generated: on the default device, or on several.

    Attributes:
        devices: number of devices, or "all".
    """

    devices: int | str = 1

    @cached_property
    def mesh(self) -> Mesh:
        """The devices as one axis."""
        return device_mesh(chosen_devices(self.devices))

    @property
    def platform(self) -> str:
        """The kind of the devices: "cpu", "gpu", "tpu"."""
        return self.mesh.devices.flat[0].platform

    def replicate(self, tree: Any) -> Any:
        """Put whole arrays on each device."""
        if self.mesh.size == 1:
            return jax.device_put(tree)
        return jax.device_put(tree, replicated_sharding(self.mesh))

    def put_weights(self, tree: Any) -> Any:
        """Put weights on each device; those that lie on these devices already stay as they are."""
        here = set(self.mesh.devices.flat)

        def put(leaf: Any) -> Any:
            stays = isinstance(leaf, jax.Array) and leaf.sharding.device_set == here
            return leaf if stays else self.replicate(leaf)

        return jax.tree.map(put, tree)

    def is_sharded(self, tree: Any) -> bool:
        """Whether some array is split over devices, so that none of these holds it whole."""
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        return not all(leaf.is_fully_replicated for leaf in leaves)

    def lay_out_kernels(self, tree: Any) -> Any:
        """Lay kernels of convolutions out in memory as a GPU's convolutions in 16 bits read them.

        Their order is then out, height, width, in. Otherwise each network evaluation would begin
        by transposing them. Shapes and values stay the same. On devices other than GPUs, the tree
        is returned unchanged.

        Args:
            tree: arrays on these devices.
        """
        if self.platform not in GPU_PLATFORMS:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        chosen = [i for i, leaf in enumerate(leaves) if _is_kernel(leaf)]
        formats = [Format(OHWI, leaves[i].sharding) for i in chosen]
        moved = jax.jit(lambda *kernels: kernels, out_shardings=tuple(formats))
        for i, kernel in zip(chosen, moved(*(leaves[i] for i in chosen)), strict=True):
            leaves[i] = kernel
        return jax.tree.unflatten(structure, leaves)

    def split(self, tree: Any, unsplit: Callable[[Any], bool] = lambda node: False) -> Any:
        """Split arrays, batch first, over the devices; scalars go to each device.

        Args:
            unsplit: whether a node of the tree, such as a network, is not batched: it goes to each
                device.
        """

        def put(leaf: Any) -> Any:
            if unsplit(leaf) or np.ndim(leaf) == 0:
                return self.replicate(leaf)
            return jax.device_put(leaf, batch_sharding(self.mesh) if self.mesh.size > 1 else None)

        return jax.tree.map(put, tree, is_leaf=unsplit)
