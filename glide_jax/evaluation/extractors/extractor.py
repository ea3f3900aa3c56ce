"""A network that turns images into features, with its weights and its way of resizing images."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from glide_jax.errors import UsageError


class Features(NamedTuple):
    """Output of a network: features `(N, D)` and, if it classifies, probabilities `(N, K)`."""

    features: jax.Array
    probabilities: jax.Array | None = None


@dataclass(frozen=True, eq=False)
class Extractor:
    """A function from images to features; make one with `open_extractor`.

    Attributes:
        name: of the network, for example "Inception v3 (FID)".
        dimensions: number of features, D.
        classes: number of classes, K; None: the network does not classify.
        module: the network, `(N, H, W, 3)` uint8 -> `Features`.
        params: its weights, nested dictionaries of float32 arrays.
        prepare: resizes images on the host, uint8 -> uint8.
        batch_size: images at a time.
    """

    name: str
    dimensions: int
    classes: int | None
    module: nn.Module = field(repr=False)
    params: dict[str, Any] = field(repr=False)
    prepare: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    batch_size: int = 32

    @cached_property
    def checksum(self) -> str:
        """The checksum of the weights."""
        return checksum(self.params)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features of images: `(N, H, W, 3)` uint8 -> `(N, D)` float32.

        Raises:
            UsageError: the images have another shape or dtype.
        """
        return self.both(images)[0]

    def probabilities(self, images: np.ndarray) -> np.ndarray | None:
        """Return the class probabilities of images, `(N, K)` float32; None without classes.

        Raises:
            UsageError: the images have another shape or dtype.
        """
        return self.both(images)[1]

    def both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return features and probabilities in one pass.

        Raises:
            UsageError: the images have another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UsageError(
                f"images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}"
            )
        features = np.empty((len(images), self.dimensions), np.float32)
        classes = None if self.classes is None else np.empty((len(images), self.classes), "f4")
        size = min(self.batch_size, len(images))
        for start in range(0, len(images), max(size, 1)):
            batch = images[start : start + size]
            # The last batch is filled up: another size would compile anew.
            filled = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
            outputs = _apply(self.module, self.params, self.prepare(filled))
            stop = start + len(batch)
            features[start:stop] = outputs.features[: len(batch)]
            if classes is not None:
                assert outputs.probabilities is not None
                classes[start:stop] = outputs.probabilities[: len(batch)]
        return features, classes


@partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, params: Any, images: jax.Array) -> Features:
    # GPUs and TPUs would multiply in fewer bits, and the features would not be the reference's.
    with jax.default_matmul_precision("highest"):
        features = module.apply({"params": params}, images)
    assert isinstance(features, Features)
    return features


def checksum(params: Any) -> str:
    """Return the checksum of a tree of arrays, CRC-32 as eight hexadecimal digits."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = zlib.crc32(jax.tree_util.keystr(path).encode(), value)
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return f"{value:08x}"


def resized(images: np.ndarray, *, side: int) -> np.ndarray:
    """Resize images so that the shorter side is `side`, and crop the centre.

    The filter is Pillow's bicubic one.

    Args:
        images: `(N, H, W, 3)` uint8.

    Returns:
        `(N, side, side, 3)` uint8.
    """
    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images
    shorter = min(height, width)
    # As torchvision rounds: down for the longer side, to even for the corner of the crop.
    tall, wide = (int(side * n / shorter) for n in (height, width))
    top, left = round((tall - side) / 2), round((wide - side) / 2)
    scaled = (
        np.asarray(Image.fromarray(i).resize((wide, tall), Image.Resampling.BICUBIC))
        for i in images
    )
    return np.stack([i[top : top + side, left : left + side] for i in scaled])


def normalised(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Return `(x / 255 - mean) / std` for each colour channel, float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
