"""Cutting a run of images into batches of one size."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.diffusion.guidance import Branch, Guidance, is_network
from glide_jax.errors import UsageError

# Images of 64x64 per device.
USUAL_BATCH = {"cpu": 16, "accelerator": 64}


def batches(count: int, size: int, devices: int = 1) -> list[np.ndarray]:
    """Return the indices of `count` images, in batches of a few fixed sizes, largest first.

    Batch lengths per device are `size` and the powers of 4 below it, so that few programs are
    compiled. Each batch has the longest length that the remaining images fill to more than three
    quarters. Free places repeat the last image.

    Args:
        size: the most images at a time, rounded up to a multiple of the devices.

    Raises:
        UsageError: the size is below 1.
    """
    check_batch_size(size)
    longest = -(-size // devices)
    powers = (4**k for k in reversed(range(longest.bit_length())))
    lengths = [n * devices for n in (longest, *(n for n in powers if n < longest))]
    index_batches, done = [], 0
    while done < count:
        length = next((n for n in lengths if 4 * (count - done) > 3 * n), lengths[-1])
        index_batches.append(np.minimum(np.arange(done, done + length), count - 1))
        done += length
    return index_batches


def default_batch_size(side: int) -> int:
    """Return how many images of a side, in pixels, a device generates at a time.

    16 images of 64x64 on a CPU, 64 on other devices, and of larger images fewer, in inverse
    proportion to the side: a quarter at 256x256.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    return max(1, USUAL_BATCH[kind] * 64 // max(64, side))


def check_batch_size(size: int) -> None:
    """Check the number of images of a batch.

    Raises:
        UsageError: the number is below 1.
    """
    if size < 1:
        raise UsageError(f"a batch holds at least one image, not {size}")


def chosen_batch_size(size: int | None, side: int, devices: int) -> int:
    """Return the images of a batch over all devices: `size`, or the default of a side in pixels.

    Raises:
        UsageError: the size is below 1.
    """
    if size is None:
        return default_batch_size(side) * devices
    check_batch_size(size)
    return size


def select_images(
    guidances: Sequence[Guidance], index: np.ndarray, count: int
) -> tuple[Guidance, ...]:
    """Return the guidances for some of `count` images.

    Parameters with one value for each image are indexed, and so are captions of branches.

    Raises:
        UsageError: a parameter or a branch has neither one value nor one per image.
    """

    def numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)

    def chosen(name: str, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        if len(values) not in (1, count):
            raise UsageError(f"{name} has {len(values)} values for {count} images: give one each")
        return index if len(values) == count else np.zeros(len(index), int)

    def select(name: str, value: Any) -> Any:
        if is_network(value) or np.ndim(value) == 0:
            return value
        value = np.asarray(value) if numbers(value) else value
        return value[chosen(name, value)]

    def captions(branch: Branch) -> Branch:
        prompt = branch.prompt
        if prompt is None or isinstance(prompt, str):
            return branch
        name = f"branch {branch.name!r}"
        return branch._replace(prompt=tuple(prompt[i] for i in chosen(name, prompt)))

    def leaf(value: Any) -> bool:
        return is_network(value) or numbers(value)

    return tuple(
        replace(
            elementary,
            args=jax.tree.map(partial(select, elementary.name), elementary.args, is_leaf=leaf),
            needs=tuple(map(captions, elementary.needs)),
        )
        for guidance in guidances
        for elementary in guidance.members()
    )
