"""The blocks of the UNet: residual blocks, attention blocks, and what changes the resolution."""

import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.models.attention import attend, split_heads
from glide_jax.models.layers import GroupNorm, Projections, conv3x3, dense


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
    place_hash = np.uint32(zlib.crc32(place.encode()))

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place_hash), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), jnp.zeros_like(x))


class AttentionBlock(nn.Module):
    """Self-attention over pixels, whose keys and values begin with those of the text  (GLIDE, 2.1).

    One softmax runs over text and pixels together. There is no mask: with `xf_padding`, padded
    positions of the text have a learned embedding of their own.

    Attributes:
        projects_text: whether the block projects the text to keys and values; otherwise `text` is
            `(B, L, 2 C)`, projected already.
    """

    heads: int
    dtype: jnp.dtype
    projects_text: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """Map `x (B, H, W, C)` and `text (B, L, W_text)`, or None, to `(B, H, W, C)`."""
        channels = x.shape[-1]
        h = GroupNorm(name="norm")(x).reshape(x.shape[0], -1, channels)
        query, key, value = Projections(channels, self.heads, 3, self.dtype, name="qkv")(h)
        if text is not None:
            if self.projects_text:
                packed = Projections(channels, self.heads, 2, self.dtype, name="text_kv")
                text_key, text_value = packed(text)
            else:
                text_key, text_value = split_heads(text, self.heads, 2)
            key = jnp.concatenate([text_key, key], axis=1)
            value = jnp.concatenate([text_value, value], axis=1)
        h = dense(channels, self.dtype, "proj", zero=True)(attend(query, key, value))
        return x + h.reshape(x.shape)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them  (ADM, 2105.05233, sec. 3).

    Attributes:
        features: channels of the result.
        use_scale_shift_norm: whether the embedding scales and shifts the second norm, as in all of
            OpenAI's models; otherwise it is added before that norm.
        resample: `upsample` or `downsample`, applied to both paths, or None.
        projects_emb: whether the block projects the embedding; otherwise `emb` is `(B, features)`,
            with `use_scale_shift_norm` `(B, 2 features)`, projected already.
    """

    features: int
    dropout: float
    dtype: jnp.dtype
    use_scale_shift_norm: bool = True
    resample: Callable[[jax.Array], jax.Array] | None = None
    projects_emb: bool = True

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

        if self.projects_emb:
            width = self.features * (2 if self.use_scale_shift_norm else 1)
            emb = dense(width, jnp.float32, "emb")(nn.silu(emb))
        norm = GroupNorm(swish=1.0, name="norm_2")
        h = (
            norm(h, emb)
            if self.use_scale_shift_norm
            else norm(h + emb.astype(h.dtype)[:, None, None])
        )
        if dropout_keys is not None and self.dropout:
            h = drop(h, dropout_keys, self.dropout, "/".join(self.path))
        h = conv3x3(self.features, self.dtype, "conv_2", zero=True)(h)

        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, "skip")(x)
        return x + h
