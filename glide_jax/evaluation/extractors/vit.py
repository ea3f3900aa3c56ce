"""The vision transformers of CLIP and DINOv2  (2010.11929; 2103.00020; 2304.07193)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from glide_jax.evaluation.extractors.extractor import Features, normalised

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Channels of an attention head, the same in all of OpenAI's and in DINOv2.
HEAD = 64


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes:
        kind: "clip" or "dinov2": CLIP normalises before the first block, its GELU is
            `x sigmoid(1.702 x)` unless `exact_gelu`, and its features are projected; DINOv2 scales
            each branch.
        side: side of the images, in pixels.
        patch: side of a patch, in pixels.
        width, layers: channels and blocks of the transformer.
        output: number of features.
        registers: number of register tokens  (2309.16588).
        head: channels of an attention head.
        exact_gelu: a CLIP with the exact GELU, as some that OpenCLIP trained.
    """

    kind: str
    side: int
    patch: int
    width: int
    layers: int
    output: int
    registers: int = 0
    head: int = HEAD
    exact_gelu: bool = False

    @property
    def clip(self) -> bool:
        """Whether it is an image encoder of CLIP."""
        return self.kind == "clip"

    @property
    def epsilon(self) -> float:
        """The epsilon of the layer normalisations."""
        return 1e-5 if self.clip else 1e-6

    @property
    def tokens(self) -> int:
        """Number of tokens: the class token and the patches."""
        return 1 + (self.side // self.patch) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder of a CLIP; see `ViTConfig`.

    Attributes:
        vocabulary, context: number of token ids, and of tokens of a caption.
        width, layers: channels and blocks of the transformer.
        output: number of features.
        head: channels of an attention head.
        exact_gelu: whether its GELU is the exact one.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    output: int
    head: int = HEAD
    exact_gelu: bool = False
    clip: bool = True
    epsilon: float = 1e-5


class Block(nn.Module):
    """A block: `x + a(norm(x))`, then `x + m(norm(x))`, with attention a and two dense layers m."""

    config: ViTConfig | TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map `(B, L, W) -> (B, L, W)`; a mask `(1, 1, L, L)` is True where tokens attend."""
        config, width = self.config, self.config.width

        def scaled(y: jax.Array, name: str) -> jax.Array:
            return y if config.clip else y * self.param(name, nn.initializers.ones, (width,))

        y = nn.LayerNorm(config.epsilon, name="norm_1")(x)
        heads = (*y.shape[:2], 3, width // config.head, config.head)
        q, k, v = jnp.moveaxis(nn.Dense(3 * width, name="qkv")(y).reshape(heads), 2, 0)
        y = nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
        x = x + scaled(nn.Dense(width, name="out")(y), "scale_1")
        y = nn.LayerNorm(config.epsilon, name="norm_2")(x)
        y = nn.Dense(4 * width, name="up")(y)
        quick = config.clip and not config.exact_gelu
        y = y * nn.sigmoid(1.702 * y) if quick else nn.gelu(y, approximate=False)
        return x + scaled(nn.Dense(width, name="down")(y), "scale_2")


class ViT(nn.Module):
    """The network: images -> class token after the last normalisation (CLIP: and projection)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Map `(B, side, side, 3)` uint8 -> `(B, output)`."""
        config = self.config
        clip, imagenet = (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)
        x = normalised(images, *(clip if config.clip else imagenet))
        patch, zeros = (config.patch, config.patch), nn.initializers.zeros
        x = nn.Conv(config.width, patch, patch, "VALID", use_bias=not config.clip, name="patch")(x)
        x = x.reshape(len(x), -1, config.width)

        def repeated(name: str, count: int) -> jax.Array:
            tokens = self.param(name, zeros, (count, config.width))
            return jnp.broadcast_to(tokens, (len(x), *tokens.shape))

        position = self.param("position", zeros, (config.tokens, config.width))
        x = jnp.concatenate([repeated("class", 1), x], axis=1) + position
        if config.registers:
            # Registers belong to no patch, and have no position embedding.
            extra = repeated("registers", config.registers)
            x = jnp.concatenate([x[:, :1], extra, x[:, 1:]], axis=1)
        if config.clip:
            x = nn.LayerNorm(config.epsilon, name="norm_before")(x)
        for i in range(config.layers):
            x = Block(config, name=f"block_{i}")(x)
        x = nn.LayerNorm(config.epsilon, name="norm")(x[:, 0])
        if config.clip:
            x = nn.Dense(config.output, use_bias=False, name="projection")(x)
        return Features(x)


class CLIPText(nn.Module):
    """The text encoder of CLIP: token ids -> projected features of the end token."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map `(B, L)` int32 -> `(B, output)`; the end token has the largest id."""
        config, zeros = self.config, nn.initializers.zeros
        tokens = self.param("tokens", zeros, (config.vocabulary, config.width))
        position = self.param("position", zeros, (config.context, config.width))
        x = tokens[ids] + position
        causal = jnp.tril(jnp.ones((1, 1, config.context, config.context), bool))
        for i in range(config.layers):
            x = Block(config, name=f"block_{i}")(x, causal)
        x = nn.LayerNorm(config.epsilon, name="norm")(x)
        x = x[jnp.arange(len(x)), ids.argmax(axis=1)]
        return nn.Dense(config.output, use_bias=False, name="projection")(x)
