"""3x3 convolutions on a CPU with fewer products: Winograd's minimal filtering  (1509.09308).

F(2x2) computes blocks of 2x2 pixels from 4x4 by 16 products, where the plain form has 36; F(4x4)
blocks of 4x4 from 6x6 by 36 products in place of 144. The kernels are transformed once, when a
pipeline is made. In float32, the result differs from the plain form by 1e-6 of the largest value
with F(2x2), by 2e-5 with F(4x4).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.models.presets import ModelConfig

# `y = A^T [(G g G^T) (B^T d B)] A`: A^T, B^T and G of each form, by the length of its blocks d.
FORMS: dict[int, tuple[list[list[float]], ...]] = {
    4: (
        [[1, 1, 1, 0], [0, 1, -1, -1]],
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    ),
    6: (
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
    ),
}
# At this side and above, the blocks of F(2x2) exceed the caches of a CPU, and F(4x4) is faster.
F4_SIDE = 64
# Programs take longer to compile and to load: a small network would lose more than it gains.
MIN_CHANNELS = 128


class Kernel(NamedTuple):
    """A transformed kernel, in the place of the kernel in the parameters of a layer.

    Attributes:
        matrices: `U[i][j]`, `(C, F)`, of each place in a block. They are separate arrays: out of
            a single one, each call would copy them.
    """

    matrices: tuple[tuple[jax.Array, ...], ...]


def downsampling_factors(config: ModelConfig) -> dict[str, int]:
    """Return the downsampling factor of each residual block, by name."""
    last = len(config.channel_mult) - 1
    factors, factor, i = {}, 1, 1
    for resolution in range(last + 1):
        for _ in range(config.num_res_blocks):
            factors[f"down_{i}_res"] = factor
            i += 1
        if resolution < last:
            factor *= 2
            factors[f"down_{i}_res"] = factor
            i += 1
    factors |= {"mid_res_1": factor, "mid_res_2": factor}
    for i in range((last + 1) * (config.num_res_blocks + 1)):
        factors[f"up_{i}_res"] = factor
        if factor > 1 and (i + 1) % (config.num_res_blocks + 1) == 0:
            factor //= 2
            factors[f"up_{i}_up"] = factor
    return factors


def transform_kernels(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the parameters of a network with the kernels of its residual blocks transformed.

    Networks with fewer than 128 channels are returned unchanged.

    Args:
        params: of `GLIDE`, float32.
    """
    if config.model_channels < MIN_CHANNELS:
        return params
    side = config.image_size // config.patch
    unet, kernels = dict(params["unet"]), {length: {} for length in FORMS}
    for block, factor in downsampling_factors(config).items():
        for layer in ("conv_1", "conv_2"):
            kernel = unet.get(block, {}).get(layer, {}).get("kernel")
            length = length_for(side // factor)
            if kernel is not None and length:
                kernels[length][block, layer] = kernel
    for length, group in kernels.items():
        for (block, layer), kernel in _transformed(group, length).items():
            unet[block] = unet[block] | {layer: unet[block][layer] | {"kernel": kernel}}
    return params | {"unet": unet}


def length_for(side: int) -> int:
    """Return the length of the blocks for an image of this side; 0: the plain form."""
    if side >= F4_SIDE and side % 4 == 0:
        return 6
    return 4 if side % 2 == 0 else 0


@partial(jax.jit, static_argnums=1)
def _transformed(kernels: dict[Any, jax.Array], length: int) -> dict[Any, Kernel]:
    return {name: transform_kernel(kernel, length) for name, kernel in kernels.items()}


def transform_kernel(kernel: jax.Array, length: int) -> Kernel:
    """Return `U = G g G^T` of a kernel `(3, 3, C, F)`, for blocks d of length 4 or 6."""
    g = FORMS[length][2]
    rows = _products(g, [kernel[i] for i in range(3)])
    return Kernel(tuple(tuple(_products(g, [row[j] for j in range(3)])) for row in rows))


def convolve(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Return `y = A^T [U (B^T d B)] A` for each block d of pixels, padded by zeros.

    Args:
        x: `(B, H, W, C)`; H and W are multiples of the blocks of the result.
        kernel: U.

    Returns:
        `(B, H, W, F)`.
    """
    u = kernel.matrices
    a, b, _ = FORMS[len(u)]
    step, length = len(a), len(b)

    def blocks(d: jax.Array, axis: int) -> list[jax.Array]:
        end = d.shape[axis] - length + 1
        parts = [jax.lax.slice_in_dim(d, i, end + i, step, axis) for i in range(length)]
        return _products(b, parts)

    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Without the barrier XLA would compute the rows again for each column.
    rows = jax.lax.optimization_barrier(blocks(padded, 1))
    pixels = [blocks(row, 2) for row in rows]
    # Products of matrices one by one: as one batched product they run at half the speed.
    products = [[pixels[i][j] @ u[i][j] for i in range(length)] for j in range(length)]
    columns = [_products(a, column) for column in products]
    rows = [_products(a, [column[i] for column in columns]) for i in range(step)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    return y.reshape(*x.shape[:3], -1)


def _products(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Multiply a constant matrix by arrays, without what is multiplied by 0."""
    sums = []
    for row in matrix:
        terms = (np.float32(c) * x if c != 1 else x for c, x in zip(row, arrays, strict=True) if c)
        sums.append(sum(terms, start=next(terms)))
    return sums
