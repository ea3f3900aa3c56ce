"""The Inception v3 that FID uses  (1512.00567; TTUR, 1706.08500).

This is the network of 2015-12-05 behind the FID of the literature, in the layout of pytorch-fid's
`pt_inception-2015-12-05-6726825d.pth`. It differs from other Inceptions: average pooling leaves
out the padding, the last block uses max pooling, and there are 1008 classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from glide_jax.evaluation.extractors.extractor import Features

SIDE = 299
DIMENSIONS, CLASSES = 2048, 1008
# One pixel on each side. flax takes it, but declares the argument as text.
PADDING: Any = ((1, 1), (1, 1))
# The epsilon of the batch normalisations.
EPSILON = 1e-3


class Convolution(nn.Module):
    """A convolution with ReLU; batch normalisation is folded into it, see `from_torch`."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, H, W, C) -> (B, H', W', features)`."""
        margins = [k // 2 if self.same else 0 for k in self.kernel]
        padding = [(margin, margin) for margin in margins]
        return nn.relu(nn.Conv(self.features, self.kernel, self.stride, padding, name="conv")(x))


def _mean_around(x: jax.Array) -> jax.Array:
    """Average 3x3 pixels; pixels beyond the border are left out, not counted as zeros."""
    return nn.avg_pool(x, (3, 3), (1, 1), PADDING, count_include_pad=False)


def _maximum_around(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), PADDING)


def _halved(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


# One convolution of a branch: its name, features, kernel, and whether it halves the size.
Layer = tuple[Any, ...]
ROW, COLUMN = (1, 7), (7, 1)
# A module without its name.
Block = Callable[..., nn.Module]


class Mixed(nn.Module):
    """Parallel branches, each a sequence of convolutions, concatenated on the channel axis.

    Attributes:
        branches: the convolutions of each branch. A tuple of layers at the end is a fork: its
            outputs are concatenated too.
        pool: the pooling at the start of the last branch.
    """

    branches: tuple[tuple[Layer, ...], ...]
    pool: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, H, W, C) -> (B, H', W', C')`."""
        joined = []
        for i, branch in enumerate(self.branches):
            y = self.pool(x) if i == len(self.branches) - 1 else x
            for layer in branch:
                if isinstance(layer[0], tuple):
                    y = jnp.concatenate([self._convolve(y, *end) for end in layer], axis=-1)
                else:
                    y = self._convolve(y, *layer)
            joined.append(y)
        return jnp.concatenate(joined, axis=-1)

    def _convolve(
        self, x: jax.Array, name: str, features: int, kernel: Any = (1, 1), halve: bool = False
    ) -> jax.Array:
        return Convolution(features, kernel, 1 + halve, not halve, name=name)(x)


def _thrice(name: str, last: int = 96, halve: bool = False) -> tuple[Layer, ...]:
    """Return the layers of a branch: one 1x1 convolution, then two of 3x3."""
    return (
        (f"{name}_1", 64),
        (f"{name}_2", 96, (3, 3)),
        (f"{name}_3", last, (3, 3), halve),
    )


def _a(pooled: int) -> Block:
    return partial(
        Mixed,
        (
            (("branch1x1", 64),),
            (("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5))),
            _thrice("branch3x3dbl"),
            (("branch_pool", pooled),),
        ),
        _mean_around,
    )


def _c(width: int) -> Block:
    once, twice = "branch7x7", "branch7x7dbl"
    return partial(
        Mixed,
        (
            (("branch1x1", 192),),
            ((f"{once}_1", width), (f"{once}_2", width, ROW), (f"{once}_3", 192, COLUMN)),
            (
                (f"{twice}_1", width),
                (f"{twice}_2", width, COLUMN),
                (f"{twice}_3", width, ROW),
                (f"{twice}_4", width, COLUMN),
                (f"{twice}_5", 192, ROW),
            ),
            (("branch_pool", 192),),
        ),
        _mean_around,
    )


def _fork(name: str) -> tuple[Layer, Layer]:
    return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))


def _e(pool: Any) -> Block:
    return partial(
        Mixed,
        (
            (("branch1x1", 320),),
            (("branch3x3_1", 384), _fork("branch3x3_2")),
            (
                ("branch3x3dbl_1", 448),
                ("branch3x3dbl_2", 384, (3, 3)),
                _fork("branch3x3dbl_3"),
            ),
            (("branch_pool", 192),),
        ),
        pool,
    )


BLOCKS = {
    "Conv2d_1a_3x3": partial(Convolution, 32, (3, 3), 2, same=False),
    "Conv2d_2a_3x3": partial(Convolution, 32, (3, 3), same=False),
    "Conv2d_2b_3x3": partial(Convolution, 64, (3, 3)),
    "maxpool1": _halved,
    "Conv2d_3b_1x1": partial(Convolution, 80),
    "Conv2d_4a_3x3": partial(Convolution, 192, (3, 3), same=False),
    "maxpool2": _halved,
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": partial(
        Mixed,
        ((("branch3x3", 384, (3, 3), True),), _thrice("branch3x3dbl", halve=True), ()),
        _halved,
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": partial(
        Mixed,
        (
            (("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3), True)),
            (
                ("branch7x7x3_1", 192),
                ("branch7x7x3_2", 192, ROW),
                ("branch7x7x3_3", 192, COLUMN),
                ("branch7x7x3_4", 192, (3, 3), True),
            ),
            (),
        ),
        _halved,
    ),
    "Mixed_7b": _e(_mean_around),
    "Mixed_7c": _e(_maximum_around),
}


class Inception(nn.Module):
    """The network: images of any size -> features of the last average pooling and probabilities.

    The features are those that TensorFlow calls "pool3".
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Map `(B, H, W, 3)` uint8 -> `(B, 2048)`, `(B, 1008)`."""
        x = images.astype(jnp.float32) / 255
        # Unfiltered where it shrinks, as in the reference.
        shape = (len(x), SIDE, SIDE, 3)
        x = 2 * jax.image.resize(x, shape, "bilinear", antialias=False) - 1
        for name, block in BLOCKS.items():
            x = block(name=name)(x) if isinstance(block, partial) else block(x)
        pooled = x.mean(axis=(1, 2))
        # The Inception score leaves out the bias, in its authors' code and since  (1606.03498).
        logits = nn.Dense(CLASSES, use_bias=False, name="fc")(pooled)
        return Features(pooled, nn.softmax(logits))


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert the arrays of the file to parameters, `conv/kernel` and `conv/bias` of each block.

    Batch normalisation is folded in, in float64: `w g / sqrt(v + e)`, `b - m g / sqrt(v + e)`.

    Raises:
        KeyError: the file lacks a name.
    """
    params: dict[str, Any] = {"fc/kernel": np.asarray(tensors["fc.weight"], np.float32).T}
    for name in tensors:
        if not name.endswith(".conv.weight"):
            continue
        base = name.removesuffix(".conv.weight")
        scale, shift, mean, variance = (
            np.asarray(tensors[f"{base}.bn.{part}"], np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = scale / np.sqrt(variance + EPSILON)
        kernel = np.asarray(tensors[name], np.float64).transpose(2, 3, 1, 0) * gain
        path = base.replace(".", "/")
        params[f"{path}/conv/kernel"] = kernel.astype(np.float32)
        params[f"{path}/conv/bias"] = (shift - mean * gain).astype(np.float32)
    return params
