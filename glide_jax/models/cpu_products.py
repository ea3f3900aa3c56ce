"""Linear layers and 3x3 convolutions in bfloat16 on a CPU, as products of matrices.

XLA has no convolution in bfloat16 for a CPU, but it has products of matrices. They use the units
for bfloat16 (AMX of Intel's CPUs), several times as fast as those for float32, if the result is
float32. A convolution multiplies each pixel by the kernels of all nine places at once; the nine
results are then added, each shifted to its place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.models.platform import on_cpu, split_axes

# Limit of the float32 products of a block of pixels: more would exceed the caches of a CPU.
BLOCK_BYTES = 2**24
# With fewer channels, most of a unit would be idle.
MIN_CHANNELS = 32


class Kernel(NamedTuple):
    """A kernel arranged for `convolve`, in the place of the kernel in the parameters of a layer.

    Attributes:
        matrix: `(C, 9 F)`; the F columns of the place in row i and column j are the (3 i + j)th.
    """

    matrix: jax.Array


def is_supported(x: jax.Array) -> bool:
    """Whether a layer with this input `(..., C)` uses the products of this file."""
    # Blocks of a batch that is split over devices would be gathered.
    whole = split_axes() == ()
    return on_cpu() and whole and x.dtype == jnp.bfloat16 and x.shape[-1] >= MIN_CHANNELS


def arrange_kernel(kernel: Any) -> Kernel:
    """Arrange a kernel `(3, 3, C, F)`, of numpy or jax."""
    return Kernel(kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1))


def arrange_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a network with the kernels of its residual blocks arranged.

    Args:
        params: of `GLIDE`, with the trunk in bfloat16.
    """
    unet = dict(params["unet"])
    for name, block in unet.items():
        layers = {
            layer: block[layer] | {"kernel": arrange_kernel(block[layer]["kernel"])}
            for layer in ("conv_1", "conv_2")
            if layer in block
        }
        unet[name] = block | layers
    return params | {"unet": unet}


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x kernel` in bfloat16; sums are float32."""
    return _float32_product(x, kernel).astype(x.dtype)


def _float32_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x kernel` of bfloat16 operands in float32."""
    axes = ((x.ndim - 1,), (0,)), ((), ())
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x kernel` of `x (..., C)` and `kernel (C, F)`, and gradients, in bfloat16.

    Its own gradients exclude forward mode (`jax.jvp`), as those of `arrange_and_convolve` do.
    """
    return _product(x, kernel)


def _matmul_gradients(
    arrays: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    x_rows, gradient_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return _product(gradient, kernel.T), _product(x_rows.T, gradient_rows)


matmul.defvjp(lambda *arrays: (matmul(*arrays), arrays), _matmul_gradients)


def convolve(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Return a 3x3 convolution, padded by zeros.

    Args:
        x: `(B, H, W, C)` bfloat16.
        kernel: arranged, bfloat16.

    Returns:
        `(B, H, W, F)` bfloat16; sums are float32.
    """
    batch, height, width, channels = x.shape
    padded = _pad(x)
    # The products of a block, float32, take up to `BLOCK_BYTES`.
    pixel_bytes = 4 * kernel.matrix.shape[1]
    row_bytes = pixel_bytes * (width + 2)
    image_bytes = row_bytes * (height + 2)
    if batch * image_bytes <= BLOCK_BYTES:
        return _convolve_block(padded, kernel)
    if image_bytes <= BLOCK_BYTES:
        block_images = _largest_divisor(batch, BLOCK_BYTES // image_bytes)
        blocks = padded.reshape(batch // block_images, block_images, *padded.shape[1:])
        y = jax.lax.map(lambda block: _convolve_block(block, kernel), blocks)
    else:
        block_rows = _largest_divisor(height, BLOCK_BYTES // row_bytes - 2)
        starts = np.moveaxis(np.mgrid[:batch, :height:block_rows], 0, -1).reshape(-1, 2)

        def convolve_rows(start: jax.Array) -> jax.Array:
            size = (1, block_rows + 2, width + 2, channels)
            block = jax.lax.dynamic_slice(padded, (start[0], start[1], 0, 0), size)
            return _convolve_block(block, kernel)

        y = jax.lax.map(convolve_rows, jnp.asarray(starts))
    return y.reshape(batch, height, width, -1)


@jax.custom_vjp
def arrange_and_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `convolve` with a kernel `(3, 3, C, F)`; gradients are in bfloat16 too."""
    return convolve(x, arrange_kernel(kernel))


def _convolve_gradients(
    arrays: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    x_gradient = convolve(gradient, arrange_kernel(kernel[::-1, ::-1].swapaxes(2, 3)))
    padded, gradient_rows = _pad(x), gradient.reshape(-1, gradient.shape[-1])
    kernel_gradients = [
        _product(_shifted(padded, i, j).reshape(-1, x.shape[-1]).T, gradient_rows)
        for i in range(3)
        for j in range(3)
    ]
    return x_gradient, jnp.stack(kernel_gradients).reshape(kernel.shape)


arrange_and_convolve.defvjp(
    lambda *arrays: (arrange_and_convolve(*arrays), arrays), _convolve_gradients
)


def _convolve_block(padded: jax.Array, kernel: Kernel) -> jax.Array:
    """Convolve `(b, h + 2, w + 2, C)` to `(b, h, w, F)`."""
    y = _float32_product(padded, kernel.matrix)
    places = [_shifted(y, i, j, place=3 * i + j) for i in range(3) for j in range(3)]
    return functools.reduce(jax.lax.add, places).astype(padded.dtype)


def _pad(x: jax.Array) -> jax.Array:
    """Surround images by a pixel of zeros."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _shifted(padded: jax.Array, i: int, j: int, place: int | None = None) -> jax.Array:
    """Return the images inside a border of one pixel, moved up by `i - 1` and left by `j - 1`.

    Args:
        place: which ninth of the channels to return; None: all of them.
    """
    batch, height, width, channels = padded.shape
    first, channels = (0, channels) if place is None else (place * channels // 9, channels // 9)
    # Not by indexing, which takes ten times as long to trace.
    starts, sizes = (0, i, j, first), (batch, height - 2, width - 2, channels)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    return jax.lax.slice(padded, starts, ends)


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor up to a limit, at least 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and (n <= limit or n == 1))
