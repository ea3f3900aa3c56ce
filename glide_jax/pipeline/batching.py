"""Cutting a run of images into batches of one size."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.diffusion.guidance import Guidance, Network
from glide_jax.errors import UsageError

# Images of 64x64 per device.
USUAL_BATCH = {"cpu": 16, "accelerator": 64}


def batches(count: int, size: int, devices: int = 1) -> list[np.ndarray]:
    """Return the indices of `count` images, in batches of one length.

    They then run the same compiled program. The length is at most `size`, rounded up to a multiple
    of the devices; the last image is repeated to fill the last batch.

    Raises:
        UsageError: the size is below 1.
    """
    if size < 1:
        raise UsageError(f"a batch holds at least one image, not {size}")
    even = -(-count // -(-count // size))
    even = -(-even // devices) * devices
    rows = np.arange(-(-count // even) * even).reshape(-1, even)
    return list(np.minimum(rows, count - 1))


def usual_batch(side: int) -> int:
    """Return how many images a device generates at a time, by their side in pixels.

    16 images of 64x64 on a CPU, 64 on other devices; a quarter of that at 256x256, where networks
    are narrower at full resolution.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    return max(1, USUAL_BATCH[kind] * 64 // max(64, side))


def select_images(
    guidances: Sequence[Guidance], index: np.ndarray, count: int
) -> tuple[Guidance, ...]:
    """Return the guidances for some of `count` images: parameters with one value each are indexed.

    Raises:
        UsageError: a parameter has neither one value nor one per image.
    """

    def numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)

    def select(name: str, value: Any) -> Any:
        if isinstance(value, Network) or np.ndim(value) == 0:
            return value
        value = np.asarray(value) if numbers(value) else value
        if len(value) not in (1, count):
            raise UsageError(f"{name} has {len(value)} values for {count} images: give one each")
        return value[index if len(value) == count else np.zeros(len(index), int)]

    def leaf(value: Any) -> bool:
        return isinstance(value, Network) or numbers(value)

    return tuple(
        replace(g, args=jax.tree.map(partial(select, g.name), g.args, is_leaf=leaf))
        for whole in guidances
        for g in whole.parts()
    )
