"""The text transformer of GLIDE: from tokens to one vector and one sequence."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glide_jax.models.attention import attend
from glide_jax.models.layers import Projections, dense, layer_norm


class TextFeatures(NamedTuple):
    """The output of the text transformer, which the UNet reads; computed once per prompt.

    Attributes:
        pooled: `(B, E)` float32, added to the time embedding.
        sequence: `(B, L, W)`, keys and values for every attention block.
    """

    pooled: jax.Array
    sequence: jax.Array


class TextBlock(nn.Module):
    """A block: `x += attention(norm x); x += mlp(norm x)`, bidirectional, without a mask."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x (B, L, W)` to `(B, L, W)`."""
        width = x.shape[-1]
        h = layer_norm("norm_1")(x).astype(self.dtype)
        query, key, value = Projections(width, self.heads, 3, self.dtype, name="qkv")(h)
        x = x + dense(width, self.dtype, "proj")(attend(query, key, value))
        h = layer_norm("norm_2")(x).astype(self.dtype)
        # The exact (erf) form; the tanh form, the default of jax, differs by 3e-4.
        h = nn.gelu(dense(4 * width, self.dtype, "fc_1")(h), approximate=False)
        return x + dense(width, self.dtype, "fc_2")(h)


class TextTransformer(nn.Module):
    """The transformer that encodes captions  (GLIDE, 2112.10741, sec. 3.1).

    With `padding`, a learned padding embedding replaces the token and position embeddings at each
    position whose caption mask is False; without, the mask has no effect. A caption whose mask is
    False everywhere is the empty caption of classifier-free guidance.

    Attributes:
        context: length L of a caption in tokens.
        pooled_width: width E of the vector that is added to the time embedding.
        final_norm: whether a norm follows the last block.
        padding: whether there is a padding embedding.
        dtype: dtype of the blocks.
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
    def __call__(self, tokens: jax.Array, caption_mask: jax.Array) -> TextFeatures:
        """Encode `tokens (B, context)` int32 with `caption_mask (B, context)` bool.

        Raises:
            ValueError: tokens of another length.
        """
        if tokens.shape[1:] != (self.context,):
            raise ValueError(f"tokens must be (B, {self.context}), not {tokens.shape}")
        # The original code leaves both tables uninitialised; CLIP uses 0.01.
        table = nn.initializers.normal(0.01)
        embedding = self.param(
            "token_embedding", nn.initializers.normal(1.0), (self.n_vocab, self.width)
        )
        x = embedding[tokens] + self.param("position_embedding", table, (self.context, self.width))
        if self.padding:
            padding = self.param("padding_embedding", table, (self.context, self.width))
            x = jnp.where(caption_mask[..., None], x, padding)
        x = x.astype(self.dtype)
        block = nn.remat(TextBlock) if self.remat else TextBlock
        for i in range(self.layers):
            x = block(self.heads, self.dtype, name=f"block_{i}")(x)
        if self.final_norm:
            x = layer_norm("final_norm")(x).astype(self.dtype)
        pooled = dense(self.pooled_width, self.dtype, "pooled")(x[:, -1])
        return TextFeatures(pooled.astype(jnp.float32), x)
