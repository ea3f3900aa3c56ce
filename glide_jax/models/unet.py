"""The ADM UNet with text conditioning, and `GLIDE`: the UNet with its text transformer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glide_jax.models.blocks import (
    AttentionBlock,
    ResBlock,
    depth_to_space,
    downsample,
    space_to_depth,
    upsample,
)
from glide_jax.models.joined_projections import JOINED, JoinedOutputs
from glide_jax.models.layers import GroupNorm, conv3x3, dense, timestep_embedding
from glide_jax.models.presets import ModelConfig
from glide_jax.models.text import TextFeatures, TextTransformer

# Scales of guidance are embedded like timesteps, 250 for each unit: usual scales, 1 to 5, then
# cover the range of the timesteps. Scale 1, no guidance, is position 0.
SCALE_POSITION = 250.0


class UNet(nn.Module):
    """The network from a noised image to its prediction  (ADM, 2105.05233, sec. 3; GLIDE, sec. 3).

    Blocks are numbered as in OpenAI's weights: `down_0` is the first convolution, `down_i` block i
    of the encoder, `up_i` block i of the decoder.
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
        dropout_keys: jax.Array | None = None,
        low_res_timestep: jax.Array | None = None,
        guidance_scale: jax.Array | None = None,
    ) -> jax.Array:
        """Return the prediction (eps, v or x_0) and, with learned variance, the variance output.

        Args:
            x: `(B, H, W, C_in)` float32.
            t: `(B,)` timesteps, integer or fractional.
            text: features of the captions, or None.
            dropout_keys: see `GLIDE`.
            low_res_timestep: `(B,)` timesteps of the noise in the low-resolution image, for
                configs with `low_res_timestep`.
            guidance_scale: `(B,)` scales of classifier-free guidance, for configs with
                `guidance_scale_input`.

        Returns:
            `(B, H, W, out_channels)` float32.

        Raises:
            ValueError: a height or width that is not a multiple of the total downsampling.
        """
        c = self.config
        factor = c.size_multiple
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {x.shape[1:3]}")

        emb = timestep_embedding(t, c.model_channels)
        emb = dense(c.embed_width, jnp.float32, "time_1")(emb)
        emb = dense(c.embed_width, jnp.float32, "time_2")(nn.silu(emb))

        def embed(position: jax.Array, name: str) -> jax.Array:
            hidden = timestep_embedding(position, c.model_channels)
            hidden = nn.silu(dense(c.embed_width, jnp.float32, f"{name}_1")(hidden))
            # Zero at first: weights that were trained without it keep their outputs.
            return dense(c.embed_width, jnp.float32, f"{name}_2", zero=True)(hidden)

        # The names in the weights are "level" and "guidance".
        if low_res_timestep is not None:
            emb = emb + embed(low_res_timestep, "level")
        if guidance_scale is not None:
            emb = emb + embed(SCALE_POSITION * (guidance_scale - 1), "guidance")
        if text is not None:
            emb = emb + text.pooled
        # Activation checkpointing: the backward pass recomputes all but the input of each block.
        res_block = nn.remat(ResBlock) if self.remat else ResBlock
        attention_block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        sequence = None if text is None else text.sequence.astype(self.dtype)
        time_outputs = self._joined("emb", nn.silu(emb), jnp.float32)
        text_outputs = None if sequence is None else self._joined("text_kv", sequence, self.dtype)

        def res(
            h: jax.Array,
            features: int,
            name: str,
            resample: Callable[[jax.Array], jax.Array] | None = None,
        ) -> jax.Array:
            width = features * (2 if c.use_scale_shift_norm else 1)
            return res_block(
                features,
                c.dropout,
                self.dtype,
                use_scale_shift_norm=c.use_scale_shift_norm,
                resample=resample,
                projects_emb=time_outputs is None,
                name=name,
            )(h, emb if time_outputs is None else time_outputs.take(width), dropout_keys)

        def attention(h: jax.Array, name: str, heads: int = c.num_heads) -> jax.Array:
            if c.num_head_channels > 0:
                heads = h.shape[-1] // c.num_head_channels
            keys_values = sequence if text_outputs is None else text_outputs.take(2 * h.shape[-1])
            block = attention_block(
                heads, self.dtype, projects_text=text_outputs is None, name=name
            )
            return block(h, keys_values)

        # Encoder: the decoder concatenates the output of every entry.
        h = conv3x3(c.model_channels * c.channel_mult[0], self.dtype, "down_0")(
            space_to_depth(x, c.patch).astype(self.dtype)
        )
        skips, ds, i = [h], 1, 1
        for resolution, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks):
                h = res(h, c.model_channels * mult, f"down_{i}_res")
                if ds in c.attention_ds:
                    h = attention(h, f"down_{i}_attn")
                skips.append(h)
                i += 1
            if resolution < len(c.channel_mult) - 1:
                if c.resblock_updown:
                    h = res(h, h.shape[-1], f"down_{i}_res", downsample)
                else:
                    h = conv3x3(h.shape[-1], self.dtype, f"down_{i}_conv", stride=2)(h)
                skips.append(h)
                ds, i = ds * 2, i + 1

        h = res(h, h.shape[-1], "mid_res_1")
        h = attention(h, "mid_attn")
        h = res(h, h.shape[-1], "mid_res_2")

        # Decoder: the last skip comes first.
        i = 0
        up_heads = c.num_heads if c.num_heads_upsample == -1 else c.num_heads_upsample
        for resolution, mult in reversed(list(enumerate(c.channel_mult))):
            for block in range(c.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(h, c.model_channels * mult, f"up_{i}_res")
                if ds in c.attention_ds:
                    h = attention(h, f"up_{i}_attn", up_heads)
                if resolution and block == c.num_res_blocks:
                    if c.resblock_updown:
                        h = res(h, h.shape[-1], f"up_{i}_up", upsample)
                    else:
                        h = conv3x3(h.shape[-1], self.dtype, f"up_{i}_conv")(upsample(h))
                    ds //= 2
                i += 1

        h = GroupNorm(swish=1.0, name="head_norm")(h.astype(jnp.float32))
        h = conv3x3(c.out_channels * c.patch**2, jnp.float32, "head", zero=True)(h)
        return depth_to_space(h, c.patch)

    def _joined(self, layer: str, x: jax.Array, dtype: jnp.dtype) -> JoinedOutputs | None:
        """Return the outputs of a layer of all blocks, if their weights are joined."""
        name = JOINED[layer]
        if not self.has_variable("params", name):
            return None
        features = self.get_variable("params", name)["bias"].shape[0]
        return JoinedOutputs(dense(features, dtype, name)(x))


class GLIDE(nn.Module):
    """A text-conditional diffusion network of any variant  (GLIDE, 2112.10741).

    Call `encode_text` once per prompt and `__call__` once per step.

    Attributes:
        config: sizes and variant; see `glide_jax.models.presets`.
        dtype: dtype of the trunk; norms, time embedding and head are float32.
        remat: activation checkpointing in training: less memory, about a third more time.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
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

    def encode_text(self, tokens: jax.Array, caption_mask: jax.Array) -> TextFeatures | None:
        """Return the text features of captions, or None if the network has no text transformer.

        Args:
            tokens: `(B, L)` int32.
            caption_mask: `(B, L)` bool, False at padding.
        """
        return self.text(tokens, caption_mask) if self.config.xf_width else None

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: TextFeatures | None = None,
        *,
        low_res: jax.Array | None = None,
        inpaint_image: jax.Array | None = None,
        inpaint_known: jax.Array | None = None,
        low_res_timestep: jax.Array | None = None,
        guidance_scale: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Return the prediction (eps, v or x_0) and the variance output for noised images.

        Args:
            x: `(B, H, W, 3)` float32, the noised images `x_t`.
            t: `(B,)` timesteps of the training schedule, integer or fractional.
            text: from `encode_text`; None only if the network has no text transformer.
            low_res: `(B, h, w, 3)` in [-1, 1], for upsamplers; enlarged bilinearly here.
            inpaint_image: `(B, H, W, 3)` in [-1, 1], for inpainting variants; multiplied by
                `inpaint_known` here. None: no pixel is known.
            inpaint_known: `(B, H, W, 1)`, 1 where the pixel is known.
            low_res_timestep: `(B,)` timesteps of the noise in `low_res`, for configs with
                `low_res_timestep`. None: no noise, t = 0.
            guidance_scale: `(B,)` scales of classifier-free guidance, for configs with
                `guidance_scale_input`. None: no guidance, scale 1.
            dropout_keys: `(B,)` keys of the records, from which the masks of dropout are sampled.
                None: no dropout, as in sampling.

        Returns:
            `(B, H, W, out_channels)` float32: the prediction, then, with learned variance, the
            variance output, nominally in [-1, 1].

        Raises:
            ValueError: an input is missing, or this variant does not take it.
        """
        c = self.config
        if (low_res is None) == c.upsamples:
            raise ValueError(
                f"variant {c.variant!r} {'needs' if c.upsamples else 'takes no'} low_res"
            )
        if not c.inpaints and not (inpaint_image is None and inpaint_known is None):
            raise ValueError(f"variant {c.variant!r} takes no inpaint_image or inpaint_known")
        if (inpaint_image is None) != (inpaint_known is None):
            raise ValueError("inpaint_image and inpaint_known go together")
        if low_res_timestep is not None and not c.low_res_timestep:
            raise ValueError("this network takes no low_res_timestep")
        if c.low_res_timestep and low_res_timestep is None:
            low_res_timestep = jnp.zeros(x.shape[:1])
        if guidance_scale is not None and not c.guidance_scale_input:
            raise ValueError("this network takes no guidance_scale")
        if c.guidance_scale_input and guidance_scale is None:
            guidance_scale = jnp.ones(x.shape[:1])
        if (text is None) == bool(c.xf_width):
            verb = "needs" if text is None else "takes no"
            raise ValueError(f"this network {verb} text features")

        inputs = [x]
        if c.inpaints:
            known_mask = jnp.zeros_like(x[..., :1]) if inpaint_known is None else inpaint_known
            known_image = jnp.zeros_like(x) if inpaint_image is None else inpaint_image * known_mask
            inputs += [known_image, known_mask]
        if low_res is not None:
            shape = (x.shape[0], *x.shape[1:3], low_res.shape[-1])
            inputs.append(jax.image.resize(low_res, shape, "bilinear", antialias=False))
        h = jnp.concatenate(inputs, axis=-1)
        output = self.unet(h, t, text, dropout_keys, low_res_timestep, guidance_scale)
        if c.residual:
            assert low_res is not None
            enlarged = jax.image.resize(low_res, shape, "bicubic", antialias=False)
            output = output.at[..., : enlarged.shape[-1]].add(enlarged)
        return output

    def initialise(self, tokens: jax.Array, caption_mask: jax.Array) -> jax.Array:
        """Use every parameter once, for `model.init(key, tokens, caption_mask, method=...)`."""
        c, batch = self.config, tokens.shape[0]
        x = jnp.zeros((batch, c.image_size, c.image_size, 3))
        low_res = x[:, ::4, ::4] if c.upsamples else None
        return self(x, jnp.zeros((batch,)), self.encode_text(tokens, caption_mask), low_res=low_res)


def init_params(model: GLIDE, key: jax.Array) -> dict[str, Any]:
    """Return newly initialised parameters: nested dictionaries of float32 arrays."""
    tokens = jnp.zeros((1, model.config.text_ctx), jnp.int32)
    caption_mask = jnp.zeros((1, model.config.text_ctx), bool)
    return dict(model.init(key, tokens, caption_mask, method=GLIDE.initialise)["params"])
