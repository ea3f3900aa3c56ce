"""Sizes of OpenAI's models, of the paper's models, and of the small embedded models.

Fields have the names of openai/glide-text2im.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from glide_jax.errors import did_you_mean

# Input channels of each variant: the noised image, and what is concatenated to it.
VARIANTS = {"base": 3, "superres": 6, "inpaint": 7, "superres_inpaint": 10}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a network, which determine the shapes of its weights.

    Attributes:
        variant: "base"; "superres", an upsampler; "inpaint", a base model that inpaints;
            or "superres_inpaint", an upsampler that inpaints.
        image_size: Side of the images that it generates, in pixels.
        model_channels: Channels of the first resolution; a multiple of 32.
        channel_mult: Channels of each resolution as multiples of `model_channels`.
        num_res_blocks: Residual blocks per resolution.
        attention_ds: Downsampling factors at which there is attention.
        num_head_channels: Channels per attention head; -1: `num_heads` sets the number of heads.
        num_heads: Attention heads if `num_head_channels` is -1.
        num_heads_upsample: Attention heads of the decoder if `num_head_channels` is -1; -1: the
            same number.
        dropout: Dropout rate of the residual blocks, in training only.
        use_scale_shift_norm: Whether the time embedding scales and shifts the second norm of a
            residual block; otherwise it is added.
        resblock_updown: Whether residual blocks do the resampling; otherwise convolutions do.
        out_channels: 6 with learned variance, 3 without.
        text_ctx: Length of a caption in tokens.
        n_vocab: Size of the vocabulary.
        xf_width: Width of the text transformer; 0: no text.
        xf_layers: Layers of the text transformer.
        xf_heads: Attention heads of the text transformer.
        xf_final_ln: Whether the text transformer has a final norm.
        xf_padding: Whether padded positions have a learned embedding.
        low_res_timestep: For upsamplers: whether the timestep of the noise that was added to the
            low-resolution image is an input (CDM, 2106.15282, sec. 4.2). No model of OpenAI's
            has it.
        patch: Side of the blocks of pixels that are one position of the UNet (space-to-depth at the
            input, depth-to-space at the output). `channel_mult` and `attention_ds` count from this
            resolution. 1: every pixel is a position, as in all of OpenAI's models. Larger: fewer
            positions, so wider layers at the same cost.
        residual: For upsamplers: whether the network adds its output to the bicubic enlargement of
            the low-resolution image. It then predicts x_0.
        guidance_scale_input: Whether the scale of classifier-free guidance is an input, for models
            with distilled guidance (2210.03142). No model of OpenAI's has it.
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
    low_res_timestep: bool = False
    patch: int = 1
    residual: bool = False
    guidance_scale_input: bool = False

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {self.variant!r}")
        if self.model_channels % 32:
            raise ValueError(f"model_channels must be a multiple of 32, not {self.model_channels}")
        if math.isfinite(self.dropout) and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.out_channels not in (3, 6):
            raise ValueError(
                f"out_channels must be 6, with learned variance, or 3, not {self.out_channels}"
            )
        self._check_heads()
        if self.low_res_timestep and not self.upsamples:
            raise ValueError("low_res_timestep is for upsamplers")
        if self.residual and not self.upsamples:
            raise ValueError("residual is for upsamplers")
        if self.patch < 1 or self.image_size % self.patch:
            raise ValueError(f"patch divides the image size {self.image_size}, not {self.patch}")
        if self.image_size < 1 or self.image_size % self.size_multiple:
            raise ValueError(
                f"image_size must be a multiple of {self.size_multiple}, not {self.image_size}"
            )

    def _check_heads(self) -> None:
        encoder_heads, decoder_heads = self.num_heads, self.num_heads_upsample
        if decoder_heads == -1:
            decoder_heads = encoder_heads
        for resolution, mult in enumerate(self.channel_mult):
            channels = self.model_channels * mult
            attends = 2**resolution in self.attention_ds
            # There is attention in the middle, too, with the heads of the encoder.
            is_last = resolution == len(self.channel_mult) - 1
            divisors = {}
            if self.num_head_channels > 0:
                divisors["num_head_channels"] = self.num_head_channels, attends or is_last
            else:
                divisors["num_heads"] = encoder_heads, attends or is_last
                divisors["num_heads_upsample"] = decoder_heads, attends
            for name, (divisor, acts) in divisors.items():
                if acts and (divisor < 1 or channels % divisor):
                    raise ValueError(
                        f"{name} {divisor} does not divide the {channels} channels at an "
                        "attention block"
                    )

    @property
    def embed_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.model_channels

    @property
    def in_channels(self) -> int:
        """Channels of the input of the first convolution."""
        return VARIANTS[self.variant]

    @property
    def size_multiple(self) -> int:
        """Height and width of its images are multiples of this."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def upsamples(self) -> bool:
        """Whether a low-resolution image is an input."""
        return self.variant.startswith("superres")

    @property
    def inpaints(self) -> bool:
        """Whether known pixels and their mask are inputs."""
        return self.variant.endswith("inpaint")


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return a `ModelConfig` of plain values, as JSON holds them (lists become tuples).

    Raises:
        ValueError: a field is unknown, or a value is not allowed; the message names it.
    """
    known = [f.name for f in fields(ModelConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ModelConfig(**plain)


def base64() -> ModelConfig:
    """Return the sizes of GLIDE (filtered), OpenAI's 64x64 model: 385,030,726 parameters."""
    return ModelConfig()


def upsample256() -> ModelConfig:
    """Return the sizes of OpenAI's upsampler from 64 to 256 pixels: 398,361,286 parameters."""
    return ModelConfig(
        variant="superres",
        image_size=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_ds=(8, 16, 32),
    )


def base64_paper() -> ModelConfig:
    """Return the sizes of the paper's model with 3.5 billion parameters  (GLIDE, sec. 4.1).

    2.3 billion are in the UNet, 1.2 billion in the text transformer. The paper does not state the
    number of heads of the text transformer; it does not change the number of parameters.
    """
    return ModelConfig(model_channels=512, xf_width=2048, xf_layers=24, xf_heads=32)


def upsample256_paper() -> ModelConfig:
    """Return the sizes of the paper's upsampler with 1.5 billion parameters  (GLIDE, sec. 4.1).

    The paper does not state the depth of its text transformer; 16 layers give 1.54 billion.
    """
    return replace(upsample256(), model_channels=384, xf_width=1024, xf_layers=16, xf_heads=16)


def emoji64() -> ModelConfig:
    """Return the sizes of the embedded model, small enough for a laptop: 14M parameters, 6 GFLOP.

    It inpaints, and generates from text where every pixel is masked. Blocks of 2x2 pixels are one
    position, so wide layers are affordable.
    """
    return ModelConfig(
        variant="inpaint",
        model_channels=96,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_ds=(2, 4),
        num_head_channels=32,
        dropout=0.0,
        text_ctx=32,
        xf_width=128,
        xf_layers=4,
        xf_heads=4,
        patch=2,
    )


def emoji_upsample256() -> ModelConfig:
    """Return the sizes of the embedded upsampler, 64 to 256 pixels: 6 GFLOP per forward pass."""
    return replace(
        emoji64(),
        variant="superres",
        image_size=256,
        model_channels=64,
        channel_mult=(1, 1, 2),
        # Attention in the middle only: the low-resolution image already has the composition.
        attention_ds=(),
        out_channels=3,
        xf_width=64,
        xf_layers=1,
        xf_heads=2,
        low_res_timestep=True,
        patch=4,
        residual=True,
    )


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of a noised CLIP, which determine the shapes of its weights.

    Attributes:
        image_size: Side of the square images, in pixels.
        patch_size: Side of the patches, in pixels.
        n_timestep: Rows of the table of timesteps; 0: a CLIP that takes no timestep.
        image_width: Width of the image transformer.
        image_layers: Layers of the image transformer.
        text_width: Width of the text transformer.
        text_layers: Layers of the text transformer.
        head_size: Channels per attention head; a width over it is the number of heads.
        n_vocab: Size of the vocabulary.
        max_text_len: Length of a caption in tokens.
        embed_width: Width of the embeddings that are compared.
        logit_scale: Factor of the cosine of two embeddings; its initial value if it is
            learned, as in CLIP (1 / 0.07).
        learn_logit_scale: Whether the factor is a parameter; in OpenAI's noised CLIP it is the
            constant 100.
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
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for name in ("image_width", "text_width"):
            if getattr(self, name) % self.head_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of head_size {self.head_size}"
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
    """Return the sizes of OpenAI's noised CLIP.

    The image encoder has 86,443,776 parameters, the text encoder 71,679,488. The table of tokens
    has 65,536 rows, of which the tokenizer uses 49,408.
    """
    return CLIPConfig()


def clip64_paper() -> CLIPConfig:
    """Return the sizes of the paper's noised CLIP, which OpenAI did not release.

    The image encoder has 304,411,648 parameters, the text encoder 123,641,088. The paper has a
    ViT-L at 64x64 with patches of 4x4 (GLIDE, sec. 4 and B.1): 24 blocks of width 1024 with 16
    heads (2010.11929, table 1). It does not state the rest, which here is that of CLIP's ViT-L/14
    (2103.00020, table 20): for text 12 blocks of width 768 with 12 heads, embeddings of width 768,
    and CLIP's 49,408 tokens.
    """
    return CLIPConfig(
        image_width=1024, image_layers=24, text_width=768, n_vocab=49408, embed_width=768
    )


def emoji_clip64() -> CLIPConfig:
    """Return the sizes of the embedded noised CLIP, small enough to train in minutes."""
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


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "base64": base64,
    "base64-paper": base64_paper,
    "inpaint64": lambda: replace(base64(), variant="inpaint"),
    "upsample256": upsample256,
    "upsample256-paper": upsample256_paper,
    "inpaint256": lambda: replace(upsample256(), variant="superres_inpaint"),
    "emoji64": emoji64,
    "emoji_upsample256": emoji_upsample256,
}
"""The sizes of GLIDE models by name: functions without arguments that return a `ModelConfig`."""

CLIP_PRESETS: dict[str, Callable[[], CLIPConfig]] = {
    "clip64": clip64,
    "clip64-paper": clip64_paper,
    "emoji_clip64": emoji_clip64,
}
"""The sizes of noised CLIPs by name: functions without arguments that return a `CLIPConfig`."""


def toy_model(config: ModelConfig) -> ModelConfig:
    """Return a tiny config of the same variant, which learns sixteen images in a minute on a CPU.

    Base and inpainting models generate 16x16 images, upsamplers enlarge 8x8 to 32x32.
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
    """Return a tiny config of a noised CLIP for 16x16 images, to go with `toy_model`."""
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
