"""The ADM UNet with text conditioning, and `GLIDE`: the UNet together with its text transformer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glide_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    ResBlock,
    conv3x3,
    dense,
    downsample,
    timestep_embedding,
    upsample,
)
from glide_jax.models.presets import ModelConfig
from glide_jax.models.text import TextFeatures, TextTransformer


class UNet(nn.Module):
    """Noise and variance fraction from a noised image  (ADM, 2105.05233, sec. 3; GLIDE, sec. 3).

    Blocks are numbered as in the released weights: `down_0` is the stem, `down_i` and `up_i`
    the i-th entry of the encoder and of the decoder.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: TextFeatures | None,
        train: bool,
        level: jax.Array | None = None,
    ) -> jax.Array:
        """`x (B, H, W, C_in)` float32, `t (B,)` -> `(B, H, W, out_channels)` float32.

        `level (B,)` is the timestep of the noise in the low-resolution picture, where the config
        has `low_res_level`.
        """
        c = self.config
        factor = 2 ** (len(c.channel_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {x.shape[1:3]}")

        emb = timestep_embedding(t, c.model_channels)
        emb = dense(c.embed_width, jnp.float32, "time_1")(emb)
        emb = dense(c.embed_width, jnp.float32, "time_2")(nn.silu(emb))
        if level is not None:
            # Starts at nothing, so that weights trained without it keep their outputs.
            told = dense(c.embed_width, jnp.float32, "level_1")(
                timestep_embedding(level, c.model_channels)
            )
            emb = emb + dense(c.embed_width, jnp.float32, "level_2", zero=True)(nn.silu(told))
        if text is not None:
            emb = emb + text.pooled
        # Recomputed in the backward pass: a block keeps its input alone.
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention_block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        sequence = None if text is None else text.sequence.astype(self.dtype)

        def res(h, features, name, resample=None):
            return res_block(
                features,
                c.dropout,
                self.dtype,
                film=c.use_scale_shift_norm,
                resample=resample,
                name=name,
            )(h, emb, train)

        def attention(h, name, heads=c.num_heads):
            if c.num_head_channels > 0:
                heads = h.shape[-1] // c.num_head_channels
            return attention_block(heads, self.dtype, name=name)(h, sequence)

        # Encoder: every entry's output is kept for the decoder.
        h = conv3x3(c.model_channels * c.channel_mult[0], self.dtype, "down_0")(
            x.astype(self.dtype)
        )
        skips, ds, i = [h], 1, 1
        for level, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks):
                h = res(h, c.model_channels * mult, f"down_{i}_res")
                if ds in c.attention_ds:
                    h = attention(h, f"down_{i}_attn")
                skips.append(h)
                i += 1
            if level < len(c.channel_mult) - 1:
                if c.resblock_updown:
                    h = res(h, h.shape[-1], f"down_{i}_res", downsample)
                else:
                    h = conv3x3(h.shape[-1], self.dtype, f"down_{i}_conv", stride=2)(h)
                skips.append(h)
                ds, i = ds * 2, i + 1

        h = res(h, h.shape[-1], "mid_res_1")
        h = attention(h, "mid_attn")
        h = res(h, h.shape[-1], "mid_res_2")

        # Decoder: the newest skip first.
        i = 0
        up_heads = c.num_heads if c.num_heads_upsample == -1 else c.num_heads_upsample
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for block in range(c.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(h, c.model_channels * mult, f"up_{i}_res")
                if ds in c.attention_ds:
                    h = attention(h, f"up_{i}_attn", up_heads)
                if level and block == c.num_res_blocks:
                    if c.resblock_updown:
                        h = res(h, h.shape[-1], f"up_{i}_up", upsample)
                    else:
                        h = conv3x3(h.shape[-1], self.dtype, f"up_{i}_conv")(upsample(h))
                    ds //= 2
                i += 1

        h = GroupNorm(swish=1.0, name="head_norm")(h.astype(jnp.float32))
        return conv3x3(c.out_channels, jnp.float32, "head", zero=True)(h)


class GLIDE(nn.Module):
    """A text-conditional diffusion network of any variant  (GLIDE, 2112.10741).

    Two calls: `encode_text` once a prompt, `__call__` once a step.

    Attributes:
        config: sizes and variant; see `glide_jax.models.presets`.
        dtype: dtype of the trunk; parameters, norms, time embedding and head stay float32.
        remat: in training, keep each block's input alone and compute the rest again (less
            memory, about a third more time).
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        c = self.config
        self.unet = UNet(c, self.dtype, self.remat)
        if c.xf_width:
            self.text = TextTransformer(
                context=c.text_ctx,
                n_vocab=c.n_vocab,
                width=c.xf_width,
                layers=c.xf_layers,
                heads=c.xf_heads,
                pooled_width=c.embed_width,
                final_norm=c.xf_final_ln,
                padding=c.xf_padding,
                dtype=self.dtype,
                remat=self.remat,
            )

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> TextFeatures | None:
        """`tokens (B, L)` int32, `mask (B, L)` bool -> `TextFeatures`; None without a text side."""
        return self.text(tokens, mask) if self.config.xf_width else None

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: TextFeatures | None = None,
        *,
        low_res: jax.Array | None = None,
        inpaint_image: jax.Array | None = None,
        inpaint_mask: jax.Array | None = None,
        low_res_level: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Noise prediction and variance output of a noised image.

        Args:
            x: `(B, H, W, 3)` float32, the noised image `x_t`.
            t: `(B,)` timesteps of the original chain; integer or fractional.
            text: from `encode_text`; None only where the network has no text side.
            low_res: `(B, h, w, 3)` in [-1, 1], for the upsamplers; enlarged bilinearly here.
            inpaint_image: `(B, H, W, 3)` in [-1, 1], for the inpainting variants; multiplied by
                the mask here. Missing: nothing is known.
            inpaint_mask: `(B, H, W, 1)`, 1 where the picture is known.
            low_res_level: `(B,)` timesteps of the noise in `low_res`, where the config has it;
                missing: none, t = 0.
            train: dropout on (needs a "dropout" rng).

        Returns:
            `(B, H, W, out_channels)` float32: noise, then (learned variance) its fraction in
            [-1, 1] nominally.

        Raises:
            ValueError: an input that this variant does not take, or lacks.
        """
        c = self.config
        if (low_res is None) == c.upsamples:
            raise ValueError(
                f"variant {c.variant!r} {'needs' if c.upsamples else 'takes no'} low_res"
            )
        if not c.inpaints and not (inpaint_image is None and inpaint_mask is None):
            raise ValueError(f"variant {c.variant!r} takes no inpaint_image or inpaint_mask")
        if low_res_level is not None and not c.low_res_level:
            raise ValueError("this network is not told the noise level of low_res")
        if c.low_res_level and low_res_level is None:
            low_res_level = jnp.zeros(x.shape[:1])
        if (text is None) == bool(c.xf_width):
            raise ValueError("text features must be given exactly where xf_width > 0")

        inputs = [x]
        if c.inpaints:
            mask = jnp.zeros_like(x[..., :1]) if inpaint_mask is None else inpaint_mask
            known = jnp.zeros_like(x) if inpaint_image is None else inpaint_image * mask
            inputs += [known, mask]
        if c.upsamples:
            shape = (x.shape[0], *x.shape[1:3], low_res.shape[-1])
            inputs.append(jax.image.resize(low_res, shape, "bilinear", antialias=False))
        return self.unet(jnp.concatenate(inputs, axis=-1), t, text, train, low_res_level)

    def initialise(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Touches every parameter once; for `init`: `model.init(key, tokens, mask, method=...)`."""
        c, batch = self.config, tokens.shape[0]
        x = jnp.zeros((batch, c.image_size, c.image_size, 3))
        low_res = x[:, ::4, ::4] if c.upsamples else None
        return self(x, jnp.zeros((batch,)), self.encode_text(tokens, mask), low_res=low_res)


def init_params(model: GLIDE, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn parameters: nested dictionaries of float32 arrays."""
    tokens = jnp.zeros((1, model.config.text_ctx), jnp.int32)
    mask = jnp.zeros((1, model.config.text_ctx), bool)
    return model.init(key, tokens, mask, method=GLIDE.initialise)["params"]
