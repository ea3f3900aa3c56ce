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

from glide_jax.models.target import on_cpu, split_axes

# Bytes of the products of a block of pixels: those of more pixels exceed the caches of a CPU.
BLOCK_BYTES = 2**24
# With fewer channels, most of a unit would be idle.
MIN_CHANNELS = 32


class Kernel(NamedTuple):
    """A kernel arranged for `convolve`, in the place of the kernel in the parameters of a layer.

    Attributes:
        matrix: `(C, 9 F)`.
    """

    matrix: jax.Array


def suits(x: jax.Array) -> bool:
    """Return whether these products serve the layers of an array `(..., C)`."""
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


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x kernel` of `x (..., C)` and `kernel (C, F)`, bfloat16; sums are float32."""
    return _sums(x, kernel).astype(x.dtype)


def _sums(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `matmul` in float32."""
    axes = ((x.ndim - 1,), (0,)), ((), ())
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `matmul(x, kernel)`; its gradients are products of bfloat16 too."""
    return matmul(x, kernel)


def _linear_gradients(
    arrays: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    rows, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return matmul(gradient, kernel.T), matmul(rows.T, outputs)


linear.defvjp(lambda *arrays: (linear(*arrays), arrays), _linear_gradients)


def convolve(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Return the convolution, padded by zeros.

    Args:
        x: `(B, H, W, C)` bfloat16.
        kernel: arranged, bfloat16.

    Returns:
        `(B, H, W, F)` bfloat16; sums are float32.
    """
    batch, height, width, channels = x.shape
    padded = _pad(x)
    pixel = 4 * kernel.matrix.shape[1]
    row = pixel * (width + 2)
    image = row * (height + 2)
    if batch * image <= BLOCK_BYTES:
        return _convolve_block(padded, kernel)
    if image <= BLOCK_BYTES:
        count = _largest_divisor(batch, BLOCK_BYTES // image)
        blocks = padded.reshape(batch // count, count, *padded.shape[1:])
        y = jax.lax.map(lambda block: _convolve_block(block, kernel), blocks)
    else:
        rows = _largest_divisor(height, BLOCK_BYTES // row - 2)
        places = np.stack(np.mgrid[:batch, :height:rows], axis=-1).reshape(-1, 2)

        def convolve_rows(place: jax.Array) -> jax.Array:
            size = (1, rows + 2, width + 2, channels)
            block = jax.lax.dynamic_slice(padded, (place[0], place[1], 0, 0), size)
            return _convolve_block(block, kernel)

        y = jax.lax.map(convolve_rows, jnp.asarray(places))
    return y.reshape(batch, height, width, -1)


@jax.custom_vjp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `convolve` with a kernel `(3, 3, C, F)`; its gradients are such products too."""
    return convolve(x, arrange_kernel(kernel))


def _convolution_gradients(
    arrays: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    x_gradient = convolve(gradient, arrange_kernel(kernel[::-1, ::-1].swapaxes(2, 3)))
    padded, outputs = _pad(x), gradient.reshape(-1, gradient.shape[-1])
    places = [
        matmul(_shifted(padded, i, j).reshape(-1, x.shape[-1]).T, outputs)
        for i in range(3)
        for j in range(3)
    ]
    return x_gradient, jnp.stack(places).reshape(kernel.shape)


convolution.defvjp(lambda *arrays: (convolution(*arrays), arrays), _convolution_gradients)


def _convolve_block(padded: jax.Array, kernel: Kernel) -> jax.Array:
    """Convolve `(b, h + 2, w + 2, C)` to `(b, h, w, F)`."""
    y = _sums(padded, kernel.matrix)
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
