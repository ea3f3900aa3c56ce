"""Sizes: the released models, the paper's, and the small embedded one.

Field names are those of the released code, so that its users find their way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

# What each variant concatenates to the noised image; channels in all.
VARIANTS = {"base": 3, "superres": 6, "inpaint": 7, "superres_inpaint": 10}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a network (and its weights).

    Attributes:
        variant: "base", "superres", "inpaint" or "superres_inpaint".
        image_size: side of the square that it was trained on, in pixels.
        model_channels: channels of the first level; a multiple of 32.
        channel_mult: channels of each level as multiples of `model_channels`.
        num_res_blocks: residual blocks a level.
        attention_ds: downsampling factors at which there is attention.
        num_head_channels: channels a head; -1: `num_heads` heads everywhere
            (`num_heads_upsample` in the decoder, -1: the same).
        dropout: in the residual blocks, in training only.
        use_scale_shift_norm: scale and shift by the time embedding, rather than add it.
        resblock_updown: resample inside residual blocks, rather than by convolutions.
        out_channels: 6 with learned variance, 3 without.
        text_ctx, n_vocab: length of a caption in tokens, and number of tokens.
        xf_width, xf_layers, xf_heads: the text transformer; width 0: no text at all.
        xf_final_ln, xf_padding: final norm, and learned embeddings at padded positions.
        low_res_level: upsamplers only: tell the network how much noise was added to the small
            picture (CDM, 2106.15282, sec. 4.2); no released model has it.
    """

    variant: str = "base"
    image_size: int = 64
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_ds: tuple[int, ...] = (2, 4, 8)
    num_head_channels: int = 64
    num_heads: int = 1
    num_heads_upsample: int = -1
    dropout: float = 0.1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    out_channels: int = 6
    text_ctx: int = 128
    n_vocab: int = 50257
    xf_width: int = 512
    xf_layers: int = 16
    xf_heads: int = 8
    xf_final_ln: bool = True
    xf_padding: bool = True
    low_res_level: bool = False

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is none of {', '.join(VARIANTS)}")
        if self.model_channels % 32:
            raise ValueError(f"model_channels must be a multiple of 32, not {self.model_channels}")
        if self.low_res_level and not self.upsamples:
            raise ValueError("low_res_level is for upsamplers")

    @property
    def embed_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.model_channels

    @property
    def in_channels(self) -> int:
        """Channels that the stem sees."""
        return VARIANTS[self.variant]

    @property
    def upsamples(self) -> bool:
        """Whether the network is given a low-resolution picture."""
        return self.variant.startswith("superres")

    @property
    def inpaints(self) -> bool:
        """Whether the network is given known pixels and their mask."""
        return self.variant.endswith("inpaint")


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from plain values, as JSON holds them (lists become tuples).

    Raises:
        ValueError: an unknown field, named, or a value that makes no model.
    """
    if unknown := sorted(set(values) - {f.name for f in fields(ModelConfig)}):
        raise ValueError(f"unknown field {', '.join(unknown)}")
    return ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def base64() -> ModelConfig:
    """GLIDE (filtered), the released 64x64 model: 385,030,726 parameters."""
    return ModelConfig()


def upsample256() -> ModelConfig:
    """GLIDE (filtered), the released upsampler 64 -> 256: 398,361,286 parameters."""
    return ModelConfig(
        variant="superres",
        image_size=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_ds=(8, 16, 32),
    )


def base64_paper() -> ModelConfig:
    """The paper's 3.5-billion-parameter model: 2.3B image side, 1.2B text side  (GLIDE, 4.1).

    The number of text heads is not stated; it does not change the parameter count.
    """
    return ModelConfig(model_channels=512, xf_width=2048, xf_layers=24, xf_heads=32)


def upsample256_paper() -> ModelConfig:
    """The paper's 1.5-billion-parameter upsampler  (GLIDE, 4.1).

    The depth of its text transformer is not stated; 16 layers give 1.54 billion.
    """
    return replace(upsample256(), model_channels=384, xf_width=1024, xf_layers=16, xf_heads=16)


def emoji64() -> ModelConfig:
    """The embedded model: the same architecture, small enough to draw on a laptop."""
    return ModelConfig(
        model_channels=32,
        channel_mult=(1, 1, 2, 3),
        num_res_blocks=1,
        attention_ds=(4, 8),
        num_head_channels=32,
        dropout=0.0,
        text_ctx=32,
        xf_width=128,
        xf_layers=4,
        xf_heads=4,
    )


def emoji_upsample256() -> ModelConfig:
    """The embedded upsampler 64 -> 256: 18 GFLOP a forward pass."""
    return replace(
        emoji64(),
        variant="superres",
        image_size=256,
        channel_mult=(1, 1, 2, 2),
        # In the middle alone: the small picture says what is where.
        attention_ds=(),
        xf_width=64,
        xf_layers=1,
        xf_heads=2,
    )


@dataclass(frozen=True)
class CLIPConfig:
    """Everything that shapes a noised CLIP (and its weights).

    Attributes:
        image_size, patch_size: sides of the square image and of its patches, in pixels.
        n_timestep: rows of the table of timesteps; 0: a CLIP that is told no noise level.
        image_width, image_layers: the image transformer.
        text_width, text_layers: the text transformer.
        head_size: channels an attention head; the number of heads is what the widths leave.
        n_vocab, max_text_len: number of tokens, and length of a caption in tokens.
        embed_width: width of the embeddings that are compared.
        logit_scale: what their cosine is multiplied by; where it is learned, its start
            (CLIP starts at 1 / 0.07).
        learn_logit_scale: make the scale a parameter; the released one is the constant 100.
    """

    image_size: int = 64
    patch_size: int = 4
    n_timestep: int = 1000
    image_width: int = 768
    image_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    head_size: int = 64
    n_vocab: int = 65536
    max_text_len: int = 77
    embed_width: int = 512
    logit_scale: float = 100.0
    learn_logit_scale: bool = False

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        for name in ("image_width", "text_width"):
            if getattr(self, name) % self.head_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is no multiple of head_size {self.head_size}"
                )
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale must be positive, not {self.logit_scale}")

    @property
    def image_heads(self) -> int:
        """Attention heads of the image transformer."""
        return self.image_width // self.head_size

    @property
    def text_heads(self) -> int:
        """Attention heads of the text transformer."""
        return self.text_width // self.head_size


def clip64() -> CLIPConfig:
    """The released noised CLIP: 86,443,776 parameters for images, 71,679,488 for text.

    Its table of tokens has 65,536 rows, of which the tokenizer uses 49,408.
    """
    return CLIPConfig()


def clip64_paper() -> CLIPConfig:
    """The paper's noised CLIP, never released: 304,411,648 + 123,641,088 parameters.

    The paper has a ViT-L at 64x64 with patches of 4x4 (GLIDE, sec. 4 and B.1): 24 blocks of
    width 1024 with 16 heads (2010.11929, table 1). It does not state the rest, which is here
    that of CLIP's ViT-L/14 (2103.00020, table 20): 12 blocks of width 768 with 12 heads for
    text, embeddings of 768, and CLIP's 49,408 tokens.
    """
    return CLIPConfig(
        image_width=1024, image_layers=24, text_width=768, n_vocab=49408, embed_width=768
    )


def emoji_clip64() -> CLIPConfig:
    """The embedded noised CLIP: patches of 8x8, small enough to train in minutes."""
    return CLIPConfig(
        patch_size=8,
        image_width=128,
        image_layers=4,
        text_width=128,
        text_layers=2,
        head_size=32,
        n_vocab=49408,
        max_text_len=24,
        embed_width=128,
        logit_scale=1 / 0.07,
        learn_logit_scale=True,
    )


PRESETS = {
    "base64": base64,
    "base64-paper": base64_paper,
    "inpaint64": lambda: replace(base64(), variant="inpaint"),
    "upsample256": upsample256,
    "upsample256-paper": upsample256_paper,
    "inpaint256": lambda: replace(upsample256(), variant="superres_inpaint"),
    "emoji64": emoji64,
    "emoji_inpaint64": lambda: replace(emoji64(), variant="inpaint"),
    "emoji_upsample256": emoji_upsample256,
}

CLIP_PRESETS = {
    "clip64": clip64,
    "clip64-paper": clip64_paper,
    "emoji_clip64": emoji_clip64,
}


def toy_model(config: ModelConfig) -> ModelConfig:
    """The same kind of model, small enough to learn sixteen pictures on a CPU in a minute.

    Base and inpainting models draw 16x16 pictures, upsamplers make 32x32 of 8x8.
    """
    return replace(
        config,
        image_size=32 if config.upsamples else 16,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_ds=(2,),
        num_head_channels=32,
        dropout=0.0,
        text_ctx=16,
        xf_width=64,
        xf_layers=1,
        xf_heads=2,
    )


def toy_clip(config: CLIPConfig) -> CLIPConfig:
    """The same kind of CLIP for 16x16 pictures, as small as `toy_model`."""
    return replace(
        config,
        image_size=16,
        image_width=64,
        image_layers=2,
        text_width=64,
        text_layers=2,
        head_size=32,
        max_text_len=16,
        embed_width=64,
    )
