"""The text transformer of GLIDE: tokens in, one vector and one sequence out."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glide_jax.models.layers import attend, dense, layer_norm, split_heads


class TextFeatures(NamedTuple):
    """What the UNet reads of a caption; computed once a prompt.

    Attributes:
        pooled: `(B, E)` float32, added to the time embedding.
        sequence: `(B, L, W)`, attended to by every attention block.
    """

    pooled: jax.Array
    sequence: jax.Array


class TextBlock(nn.Module):
    """`x += attention(norm x); x += mlp(norm x)`, bidirectional, without any mask."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = layer_norm("norm_1")(x).astype(self.dtype)
        query, key, value = split_heads(dense(3 * width, self.dtype, "qkv")(h), self.heads, parts=3)
        x = x + dense(width, self.dtype, "proj")(attend(query, key, value))
        h = layer_norm("norm_2")(x).astype(self.dtype)
        # The exact (erf) form: the tanh form, jax's default, is off by 3e-4.
        h = nn.gelu(dense(4 * width, self.dtype, "fc_1")(h), approximate=False)
        return x + dense(width, self.dtype, "fc_2")(h)


class TextTransformer(nn.Module):
    """Encodes captions  (GLIDE, 2112.10741, sec. 3.1).

    A position whose mask is False takes a learned embedding of its own, which replaces
    both token and position embedding; a caption of nothing but such positions is the
    empty caption of classifier-free guidance.

    Attributes:
        pooled_width: width E of the vector that joins the time embedding.
        remat: see `glide_jax.models.unet.GLIDE`.
    """

    context: int
    n_vocab: int
    width: int
    layers: int
    heads: int
    pooled_width: int
    final_norm: bool
    padding: bool
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> TextFeatures:
        """`tokens (B, context)` int32 and `mask (B, context)` bool -> `TextFeatures`."""
        if tokens.shape[1:] != (self.context,):
            raise ValueError(f"tokens must be (B, {self.context}), not {tokens.shape}")
        # The original leaves the two position tables uninitialised; 0.01 is CLIP's choice.
        table = nn.initializers.normal(0.01)
        embedding = self.param(
            "token_embedding", nn.initializers.normal(1.0), (self.n_vocab, self.width)
        )
        x = embedding[tokens] + self.param("position_embedding", table, (self.context, self.width))
        if self.padding:
            padding = self.param("padding_embedding", table, (self.context, self.width))
            x = jnp.where(mask[..., None], x, padding)
        x = x.astype(self.dtype)
        block = nn.remat(TextBlock) if self.remat else TextBlock
        for i in range(self.layers):
            x = block(self.heads, self.dtype, name=f"block_{i}")(x)
        if self.final_norm:
            x = layer_norm("final_norm")(x).astype(self.dtype)
        pooled = dense(self.pooled_width, self.dtype, "pooled")(x[:, -1])
        return TextFeatures(pooled.astype(jnp.float32), x)
