"""The blocks that the networks share: normalisation, attention, residual blocks, time embedding.

Images are `(B, H, W, C)`, sequences `(B, L, C)`. Convolutions and linear layers of the trunk run
in `dtype`. Norms, softmax, the path of the time embedding, and all parameters are float32, as in
OpenAI's models.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from glide_jax.models import winograd
from glide_jax.models.attention import HALF, accelerator, attend, split_heads

# The default of torch, with which OpenAI's models were trained; the default of flax is 1e-6.
NORM_EPSILON = 1e-5
NORM_GROUPS = 32


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal features `[cos(t f), sin(t f)]`, `f_i = 10000^(-i / (dim // 2))`  (DDPM).

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


class _Stored:
    """A layer of flax that takes stored parameters as they are.

    flax traces the initialisation of each parameter again to compare its shape: half of the time
    that it takes to trace a network. Weights are compared when they are loaded.
    """

    def param(self: Any, name: str, *args: Any, **options: Any) -> Any:
        """Return the stored parameter, or initialise it."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]


class Conv(_Stored, nn.Conv):
    """`flax.linen.Conv`."""


# Names of a low-rank pair beside a kernel  (LoRA, 2106.09685): `(in, r)` and `(r, out)`.
PAIR = ("lora_a", "lora_b")


def stored_pair(layer: nn.Module, dtype: Any) -> list[jax.Array]:
    """Return the low-rank pair that is stored beside a layer's kernel, or an empty list."""
    if not layer.has_variable("params", PAIR[0]):
        return []
    return [layer.get_variable("params", name).astype(dtype) for name in PAIR]


class Dense(_Stored, nn.Dense):
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
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if pair := stored_pair(self, y.dtype):
            y = y + x @ pair[0] @ pair[1]
        return y if bias is None else y + bias


class _GroupNorm(_Stored, nn.GroupNorm):
    pass


class LayerNorm(_Stored, nn.LayerNorm):
    """`flax.linen.LayerNorm`."""


class GroupNorm(nn.Module):
    """GroupNorm over 32 groups, computed in float32, then optionally `y * sigmoid(swish * y)`.

    In float32 the variance is computed in two passes, as in OpenAI's models, otherwise in one as
    `E[x^2] - E[x]^2`, which reads x once. Measured on 256x256 pixels, the largest error of the
    result is 1e-5 where the mean is 3 standard deviations, 6e-5 at 10 and 5e-4 at 30. Rounding to
    bfloat16 changes it by up to 2e-3 of its size, to float16 by 5e-4.
    """

    swish: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, film: jax.Array | None = None) -> jax.Array:
        """Normalise `x (B, ..., C)`.

        Args:
            film: `(B, 2 C)` float32, a scale and a shift: `norm(x) (1 + scale) + shift`
                (FiLM, 1709.07871), before the nonlinearity.
        """
        if x.dtype in HALF:
            y = self._in_one_pass(x, film)
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

    def _in_one_pass(self, x: jax.Array, film: jax.Array | None) -> jax.Array:
        """Return the norm in float32; all factors become one for each image and channel."""
        scale, bias = Affine(x.shape[-1], name="norm")()
        wide, pixels = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))

        def mean(of: jax.Array) -> jax.Array:
            of = of.mean(pixels).reshape(x.shape[0], NORM_GROUPS, -1)
            return jnp.broadcast_to(of.mean(-1, keepdims=True), of.shape).reshape(x.shape[0], -1)

        mu = mean(wide)
        variance = jnp.maximum(mean(jnp.square(wide)) - jnp.square(mu), 0)
        factor = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
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


def _per_pixel(x: jax.Array, ndim: int) -> jax.Array:
    """Return `(B, C)` with axes of length 1 for pixels."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 2), x.shape[-1])


def layer_norm(name: str) -> LayerNorm:
    """Return a LayerNorm in float32; the caller casts its result."""
    return LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class Conv3x3(_Stored, nn.Module):
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
        if isinstance(kernel, winograd.Kernel):
            return winograd.convolve(x, kernel) + bias
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
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


class Projections(_Stored, nn.Module):
    """A linear layer to queries, keys and values, or to keys and values, of all heads.

    Attributes:
        width: channels of each, over all heads.
        heads: number of heads, the outer axis of the packing, as in OpenAI's weights.
        parts: how many are packed: 3 or 2.
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
        if accelerator() != "tpu":
            y = x @ kernel + bias
            if pair:
                y = y + x @ pair[0] @ pair[1]
            return split_heads(y, self.heads, self.parts)
        # On a TPU, to take the packed result apart would copy it: heads are narrower than a
        # register. The kernel is small.
        kernels = split_heads(kernel[None], self.heads, self.parts)
        biases = split_heads(bias[None, None], self.heads, self.parts)
        found = [
            x @ k.reshape(shape[0], -1) + b.reshape(-1)
            for k, b in zip(kernels, biases, strict=True)
        ]
        if pair:
            narrow = split_heads(pair[1][None], self.heads, self.parts)
            low = x @ pair[0]
            found = [
                y + low @ k.reshape(low.shape[-1], -1) for y, k in zip(found, narrow, strict=True)
            ]
        return [y.reshape(*y.shape[:2], self.heads, -1) for y in found]


def upsample(x: jax.Array) -> jax.Array:
    """Enlarge by nearest neighbours: `(B, H, W, C) -> (B, 2H, 2W, C)`."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x: jax.Array) -> jax.Array:
    """Take the mean of 2x2 blocks: `(B, H, W, C) -> (B, H/2, W/2, C)`."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """Move blocks of pixels into channels: `(B, H, W, C) -> (B, H/b, W/b, b*b*C)`."""
    if block == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // block, block, width // block, block, channels)
    return x.swapaxes(2, 3).reshape(batch, height // block, width // block, -1)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """Move channels back into blocks of pixels: the inverse of `space_to_depth`."""
    if block == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, block, block, channels // block**2).swapaxes(2, 3)
    return x.reshape(batch, height * block, width * block, -1)


def drop(x: jax.Array, keys: jax.Array, rate: float, place: str) -> jax.Array:
    """Set values to zero at a rate, and enlarge the others so that means stay  (1207.0580).

    A record's mask depends on its own key alone, not on the batch or the devices.

    Args:
        x: `(B, ...)`.
        keys: `(B,)` keys.
        rate: at least 0 and below 1.
        place: where in the network; each place has masks of its own.
    """
    number = np.uint32(zlib.crc32(place.encode()))

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), jnp.zeros_like(x))


class AttentionBlock(nn.Module):
    """Self-attention over pixels, whose keys and values begin with those of the text  (GLIDE, 2.1).

    One softmax runs over text and pixels together. There is no mask: padded positions of the text
    have a learned embedding of their own.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """Map `x (B, H, W, C)` and `text (B, L, W_text)`, or None, to `(B, H, W, C)`."""
        channels = x.shape[-1]
        h = GroupNorm(name="norm")(x).reshape(x.shape[0], -1, channels)
        query, key, value = Projections(channels, self.heads, 3, self.dtype, name="qkv")(h)
        if text is not None:
            packed = Projections(channels, self.heads, 2, self.dtype, name="text_kv")
            text_key, text_value = packed(text)
            key = jnp.concatenate([text_key, key], axis=1)
            value = jnp.concatenate([text_value, value], axis=1)
        h = dense(channels, self.dtype, "proj", zero=True)(attend(query, key, value))
        return x + h.reshape(x.shape)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them  (ADM, 2105.05233, sec. 3).

    Attributes:
        features: channels of the result.
        film: whether the embedding scales and shifts the second norm, as in all of OpenAI's models;
            otherwise it is added before that norm.
        resample: `upsample` or `downsample`, applied to both paths, or None.
        skip_3x3: whether the skip connection is a 3x3 convolution where the channels change;
            otherwise it is a linear layer.
    """

    features: int
    dropout: float
    dtype: jnp.dtype
    film: bool = True
    resample: Callable[[jax.Array], jax.Array] | None = None
    skip_3x3: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, emb: jax.Array, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Map `x (B, H, W, C)` and `emb (B, E)` float32 to `(B, H', W', features)`.

        With `(B,)` keys, one for each record, there is dropout.
        """
        h = GroupNorm(swish=1.0, name="norm_1")(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv3x3(self.features, self.dtype, "conv_1")(h)

        width = self.features * (2 if self.film else 1)
        emb = dense(width, jnp.float32, "emb")(nn.silu(emb))
        norm = GroupNorm(swish=1.0, name="norm_2")
        h = norm(h, emb) if self.film else norm(h + emb.astype(h.dtype)[:, None, None])
        if dropout_keys is not None and self.dropout:
            h = drop(h, dropout_keys, self.dropout, "/".join(self.path))
        h = conv3x3(self.features, self.dtype, "conv_2", zero=True)(h)

        if x.shape[-1] != self.features:
            if self.skip_3x3:
                x = conv3x3(self.features, self.dtype, "skip")(x)
            else:
                x = dense(self.features, self.dtype, "skip")(x)
        return x + h
