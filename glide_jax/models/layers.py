"""The layers that the networks share: norms, convolutions, projections, time embedding.

Images are `(B, H, W, C)`, sequences `(B, L, C)`. Convolutions and linear layers of the trunk run
in `dtype`. Norms, softmax and the path of the time embedding are float32, as in OpenAI's models.
Parameters are float32 in training; a pipeline casts those of the trunk.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from glide_jax.models import cpu_products, winograd
from glide_jax.models.attention import HALF_DTYPES, split_heads
from glide_jax.models.platform import fused_attention_platform, on_cpu

# The default of torch, with which OpenAI's models were trained; the default of flax is 1e-6.
NORM_EPSILON = 1e-5
NORM_GROUPS = 32


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Return sinusoidal features `[cos(t f), sin(t f)]`, `f_i = 10000^(-i / (dim // 2))`  (DDPM).

    Args:
        t: `(B,)` timesteps of the training schedule, integer or fractional.
        dim: width of the result; an odd width ends with a column of zeros.

    Returns:
        `(B, dim)` float32.
    """
    half = dim // 2
    # The original code rounds the exponent to float32 before it takes the exponential. At t ~ 1000
    # one unit in the last place of a frequency changes the phase by 6e-5.
    exponent = -np.log(10000.0).astype(np.float32) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = t.astype(jnp.float32)[:, None] * frequencies
    features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    return jnp.pad(features, ((0, 0), (0, dim % 2)))


class _UsesStoredParams:
    """A layer of flax that takes stored parameters as they are.

    flax traces the initialisation of each parameter again to compare its shape: half of the time
    that it takes to trace a network. Weights are compared when they are loaded.
    """

    def param(self: Any, name: str, *args: Any, **options: Any) -> Any:
        """Return the stored parameter, or initialise it."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]


class Conv(_UsesStoredParams, nn.Conv):
    """`flax.linen.Conv`, without a check of the shapes of stored parameters."""


# Names of a low-rank pair beside a kernel  (LoRA, 2106.09685): `(in, r)` and `(r, out)`.
LORA_PAIR = ("lora_a", "lora_b")


def stored_pair(layer: nn.Module, dtype: Any) -> list[jax.Array]:
    """Return the low-rank pair that is stored beside a layer's kernel, or an empty list."""
    if not layer.has_variable("params", LORA_PAIR[0]):
        return []
    return [layer.get_variable("params", name).astype(dtype) for name in LORA_PAIR]


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return `x kernel` of `x (..., C)` and `kernel (C, F)` in their dtype; sums are float32."""
    return cpu_products.matmul(x, kernel) if cpu_products.is_supported(x) else x @ kernel


class Dense(_UsesStoredParams, nn.Dense):
    """`flax.linen.Dense`; with a stored low-rank pair `x (W + A B) + b`, as `x W + (x A) B + b`."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map `inputs (..., in)` to `(..., features)`."""
        # Not by `super().__call__`: interceptors of flax would see the layer twice.
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = matmul(x, kernel)
        if pair := stored_pair(self, y.dtype):
            y = y + x @ pair[0] @ pair[1]
        return y if bias is None else y + bias


class _GroupNorm(_UsesStoredParams, nn.GroupNorm):
    pass


class LayerNorm(_UsesStoredParams, nn.LayerNorm):
    """`flax.linen.LayerNorm`, without a check of the shapes of stored parameters."""


class GroupNorm(nn.Module):
    """GroupNorm over 32 groups, computed in float32, then optionally `y * sigmoid(swish * y)`.

    For float32 inputs the variance is computed in two passes, as in OpenAI's models. For 16-bit
    inputs it is `E[x^2] - E[x]^2`, computed in one pass, which reads x once. The error of this
    formula grows with the mean. Measured on 256x256 pixels, the largest error of the result is 1e-5
    where the mean is 3 standard deviations, 6e-5 at 10 and 5e-4 at 30. For comparison: rounding the
    result to bfloat16 changes it by up to 2e-3 of its size, to float16 by 5e-4.
    """

    swish: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, film: jax.Array | None = None) -> jax.Array:
        """Normalise `x (B, ..., C)`.

        Args:
            film: `(B, 2 C)` float32, a scale and a shift: `norm(x) (1 + scale) + shift`
                (FiLM, 1709.07871), before the nonlinearity.
        """
        if x.dtype in HALF_DTYPES:
            y = self._fused_norm(x, film)
        else:
            y = _GroupNorm(
                num_groups=NORM_GROUPS,
                epsilon=NORM_EPSILON,
                dtype=jnp.float32,
                use_fast_variance=False,
                name="norm",
            )(x)
            if film is not None:
                scale, shift = jnp.split(_per_pixel(film, x.ndim), 2, axis=-1)
                y = y * (1 + scale) + shift
        if self.swish:
            y = y * nn.sigmoid(self.swish * y)
        return y.astype(x.dtype)

    def _fused_norm(self, x: jax.Array, film: jax.Array | None) -> jax.Array:
        """Return the norm in float32; all factors become one for each image and channel."""
        scale, bias = Affine(x.shape[-1], name="norm")()
        wide, pixels = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))

        def mean(of: jax.Array) -> jax.Array:
            return of.mean(pixels).reshape(x.shape[0], NORM_GROUPS, -1).mean(-1)

        mu = mean(wide)
        variance = jnp.maximum(mean(jnp.square(wide)) - jnp.square(mu), 0)
        inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
        mu, inverse = _per_channel(mu, x.shape[-1]), _per_channel(inverse, x.shape[-1])
        factor = scale * inverse
        offset = bias - mu * factor
        if film is not None:
            scale, shift = jnp.split(film, 2, axis=-1)
            factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
        return wide * _per_pixel(factor, x.ndim) + _per_pixel(offset, x.ndim)


class Affine(nn.Module):
    """The parameters of a norm over `features` channels, with the names of flax."""

    features: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Return scale and bias, `(features,)` float32."""
        shape = (self.features,)
        scale = self.param("scale", nn.initializers.ones, shape)
        return scale, self.param("bias", nn.initializers.zeros, shape)


def _per_channel(x: jax.Array, channels: int) -> jax.Array:
    """Repeat `(B, groups)` for the channels of each group: `(B, C)`."""
    repeats = channels // NORM_GROUPS
    if on_cpu():
        # A product of matrices: XLA would look up the group again for each pixel, one by one.
        groups = np.kron(np.eye(NORM_GROUPS), np.ones(repeats)).astype(np.float32)
        return jnp.dot(x, groups, precision="highest")
    return jnp.broadcast_to(x[..., None], (*x.shape, repeats)).reshape(x.shape[0], -1)


def _per_pixel(x: jax.Array, ndim: int) -> jax.Array:
    """Return `(B, C)` with axes of length 1 for pixels."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 2), x.shape[-1])


def layer_norm(name: str) -> LayerNorm:
    """Return a LayerNorm in float32; the caller casts its result."""
    return LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class Conv3x3(_UsesStoredParams, nn.Module):
    """A 3x3 convolution with symmetric padding.

    With XLA's padding "SAME" the result would be shifted by one pixel at stride 2.

    Attributes:
        features: channels of the result.
        zero: whether the kernel starts at zero.
    """

    features: int
    dtype: jnp.dtype
    zero: bool = False
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x (B, H, W, C)` to `(B, H', W', features)`."""
        init = nn.initializers.zeros if self.zero else CONV_INIT
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Only kernels of float32 and stride 1 are transformed: see `Stage.network` and
        # `transform_kernels`.
        if isinstance(kernel, winograd.Kernel):
            return winograd.convolve(x, kernel) + bias
        # Only kernels of bfloat16 and stride 1 are arranged: see `Stage.network`.
        if isinstance(kernel, cpu_products.Kernel):
            return cpu_products.convolve(x, kernel) + bias
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        if self.stride == 1 and cpu_products.is_supported(x):
            return cpu_products.arrange_and_convolve(x, kernel) + bias
        strides, padding = (self.stride,) * 2, ((1, 1),) * 2
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=axes)
        return y + bias


def conv3x3(
    features: int, dtype: jnp.dtype, name: str | None, zero: bool = False, stride: int = 1
) -> Conv3x3:
    """Return a 3x3 convolution with the initialisation of the original code."""
    return Conv3x3(features, dtype, zero, stride, name=name)


# The default of torch for convolutions and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def dense(features: int, dtype: jnp.dtype, name: str, zero: bool = False) -> Dense:
    """Return a linear layer with the initialisation of the original code."""
    init = nn.initializers.zeros if zero else CONV_INIT
    return Dense(features, dtype=dtype, kernel_init=init, name=name)


class Projections(_UsesStoredParams, nn.Module):
    """A linear layer to queries, keys and values, or to keys and values, of all heads.

    Attributes:
        width: channels of queries, keys and values each, over all heads.
        heads: number of heads, the outer axis of the packing, as in OpenAI's weights.
        parts: number of packed outputs: 3, or 2 without queries.
    """

    width: int
    heads: int
    parts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Map `x (B, L, C)` to `parts` arrays `(B, L, heads, d)`.

        With a stored low-rank pair the kernel is `W + A B`, as in `Dense`.
        """
        shape = x.shape[-1], self.width * self.parts
        kernel = self.param("kernel", CONV_INIT, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        pair = stored_pair(self, self.dtype)
        if fused_attention_platform() != "tpu":
            y = matmul(x, kernel) + bias
            if pair:
                y = y + x @ pair[0] @ pair[1]
            return split_heads(y, self.heads, self.parts)
        # On a TPU, to take the packed result apart would copy it: heads are narrower than a
        # register. The kernel is small.
        kernels = split_heads(kernel[None], self.heads, self.parts)
        biases = split_heads(bias[None, None], self.heads, self.parts)
        projections = [
            x @ k.reshape(shape[0], -1) + b.reshape(-1)
            for k, b in zip(kernels, biases, strict=True)
        ]
        if pair:
            narrow = split_heads(pair[1][None], self.heads, self.parts)
            low = x @ pair[0]
            projections = [
                y + low @ k.reshape(low.shape[-1], -1)
                for y, k in zip(projections, narrow, strict=True)
            ]
        return [y.reshape(*y.shape[:2], self.heads, -1) for y in projections]
