"""The blocks that the networks share: normalisation, attention, residual blocks, time embedding.

Images are `(B, H, W, C)`, sequences `(B, L, C)`. Convolutions and linear layers of the trunk run
in `dtype`. Norms, softmax, the path of the time embedding, and all parameters are float32, as in
OpenAI's models.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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


class GroupNorm(nn.Module):
    """GroupNorm over 32 groups, computed in float32, then optionally `y * sigmoid(swish * y)`."""

    swish: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.GroupNorm(
            num_groups=NORM_GROUPS,
            epsilon=NORM_EPSILON,
            dtype=jnp.float32,
            use_fast_variance=False,
            name="norm",
        )(x)
        if self.swish:
            y = y * nn.sigmoid(self.swish * y)
        return y.astype(x.dtype)


def layer_norm(name: str) -> nn.LayerNorm:
    """Return a LayerNorm in float32; the caller casts its result."""
    return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


def conv3x3(
    features: int, dtype: jnp.dtype, name: str | None, zero: bool = False, stride: int = 1
) -> nn.Conv:
    """Return a 3x3 convolution with symmetric padding.

    With XLA's padding "SAME" the result would be shifted by one pixel at stride 2.
    """
    return nn.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else CONV_INIT,
        name=name,
    )


# The default of torch for convolutions and linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def dense(features: int, dtype: jnp.dtype, name: str, zero: bool = False) -> nn.Dense:
    """Return a linear layer with the initialisation of the original code."""
    init = nn.initializers.zeros if zero else CONV_INIT
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


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


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` with the softmax in float32.

    Args:
        query: `(B, T, heads, d)`.
        key, value: `(B, S, heads, d)`.
        mask: boolean, broadcast to `(B, heads, T, S)`; False positions are ignored.

    Returns:
        `(B, T, heads * d)` in the dtype of `query`.
    """
    # Scaling both sides by d^(-1/4) keeps the products inside the range of float16.
    scale = jnp.asarray(query.shape[-1] ** -0.25, query.dtype)
    logits = jnp.einsum("bthd,bshd->bhts", query * scale, key * scale)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e10)
    weights = nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("bhts,bshd->bthd", weights, value)
    return out.reshape(*out.shape[:2], -1)


def split_heads(x: jax.Array, heads: int, parts: int) -> list[jax.Array]:
    """Split a packed projection into query, key and value, or into key and value.

    `(B, L, heads * parts * d)` becomes `parts` arrays `(B, L, heads, d)`. The heads are the outer
    axis of the packing, as in OpenAI's weights.
    """
    x = x.reshape(*x.shape[:2], heads, parts, -1)
    return [x[:, :, :, i] for i in range(parts)]


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
        query, key, value = split_heads(
            dense(3 * channels, self.dtype, "qkv")(h), self.heads, parts=3
        )
        if text is not None:
            text_kv = dense(2 * channels, self.dtype, "text_kv")(text)
            text_key, text_value = split_heads(text_kv, self.heads, parts=2)
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
    def __call__(self, x: jax.Array, emb: jax.Array, train: bool) -> jax.Array:
        """Map `x (B, H, W, C)` and `emb (B, E)` float32 to `(B, H', W', features)`."""
        h = GroupNorm(swish=1.0, name="norm_1")(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv3x3(self.features, self.dtype, "conv_1")(h)

        width = self.features * (2 if self.film else 1)
        emb = dense(width, jnp.float32, "emb")(nn.silu(emb)).astype(h.dtype)[:, None, None]
        if self.film:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = nn.silu(GroupNorm(name="norm_2")(h) * (1 + scale) + shift)
        else:
            h = GroupNorm(swish=1.0, name="norm_2")(h + emb)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv3x3(self.features, self.dtype, "conv_2", zero=True)(h)

        if x.shape[-1] != self.features:
            if self.skip_3x3:
                x = conv3x3(self.features, self.dtype, "skip")(x)
            else:
                x = dense(self.features, self.dtype, "skip")(x)
        return x + h
