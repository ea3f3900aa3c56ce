"""A network that turns pictures into features, with its weights and its way of scaling pictures."""

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
from glide_jax.evaluation.features import checksum


class Features(NamedTuple):
    """What a network gives: features `(N, D)` and, where it classifies, probabilities `(N, K)`."""

    features: jax.Array
    probabilities: jax.Array | None = None


@dataclass(frozen=True)
class Extractor:
    """Images -> features; make one with `open_extractor`.

    Attributes:
        name: of the network, "Inception v3 (FID)".
        dimensions: of its features, D.
        classes: of its probabilities, K; None: it has none.
        module: the network, `(N, H, W, 3)` uint8 -> `Features`.
        params: its weights, nested dictionaries of float32 arrays.
        prepare: scales pictures on the host, uint8 -> uint8.
        batch_size: pictures at a time.
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
        """Of its weights."""
        return checksum(self.params)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features `(N, D)` float32 of pictures `(N, H, W, 3)` uint8.

        Raises:
            UsageError: they are of another shape or dtype.
        """
        return self.both(images)[0]

    def probabilities(self, images: np.ndarray) -> np.ndarray | None:
        """Class probabilities `(N, K)` float32 of pictures `(N, H, W, 3)` uint8, if there are any.

        Raises:
            UsageError: they are of another shape or dtype.
        """
        return self.both(images)[1]

    def both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and probabilities in one pass.

        Raises:
            UsageError: the pictures are of another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UsageError(
                f"features are of (N, H, W, 3) uint8, not {images.shape} {images.dtype}"
            )
        features = np.empty((len(images), self.dimensions), np.float32)
        classes = None if self.classes is None else np.empty((len(images), self.classes), "f4")
        size = min(self.batch_size, len(images))
        for start in range(0, len(images), max(size, 1)):
            part = images[start : start + size]
            # The last batch is filled up: another size would compile anew.
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            found = _apply(self.module, self.params, self.prepare(filled))
            stop = start + len(part)
            features[start:stop] = found.features[: len(part)]
            if classes is not None:
                classes[start:stop] = found.probabilities[: len(part)]
        return features, classes


@partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, params: Any, images: jax.Array) -> Features:
    # GPUs and TPUs would multiply in fewer bits, and the features would not be the reference's.
    with jax.default_matmul_precision("highest"):
        return module.apply({"params": params}, images)


def resized(images: np.ndarray, *, side: int) -> np.ndarray:
    """Images whose shorter side is `side`, bicubic as Pillow does it, cut to their middle.

    Args:
        images: `(N, H, W, 3)` uint8.

    Returns:
        `(N, side, side, 3)` uint8.
    """
    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images
    shorter = min(height, width)
    # As torchvision rounds: down for the longer side, to even for the corner of the cut.
    tall, wide = (int(side * n / shorter) for n in (height, width))
    top, left = round((tall - side) / 2), round((wide - side) / 2)
    scaled = (
        np.asarray(Image.fromarray(i).resize((wide, tall), Image.Resampling.BICUBIC))
        for i in images
    )
    return np.stack([i[top : top + side, left : left + side] for i in scaled])


def normalised(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`(x / 255 - mean) / std` of each colour, float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
