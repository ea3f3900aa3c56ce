"""emoji64: the embedded model, text-to-image and inpainting in one network.

Two trainings, one after the other, on a GPU with a time limit each. Size "eleven-styles" learns 766
concepts in eleven styles at a constant learning rate. Size "four-styles", the default, starts from
it and learns the four styles that the model is for, with a learning rate that falls to zero. In
seven of ten images everything is masked: text-to-image. In the others a random region is masked
(GLIDE, sec. 4.3).

Result:   the embedded weights: 64x64 emoji, and masked regions filled: docs/results/model_card.md.
          Loss 0.055 after the first training, 0.023 at the end.
Data:     4,909 images of emoji64 (docs/guide/data.md says how to make it), 2,579 in four styles;
          401 pairs of concept and style are held out, 234 of them in the four styles.
Hardware: one GPU, 15 GB of its memory.
Time:     2.2 and 4.6 minutes on one H200. During 1.5 of these minutes the upsampler was trained on
          the same GPU. Without it, the training does 7,900 images/s. `configs/emoji_minutes.sh`
          runs both trainings and that of the upsampler.
Command:  glide-jax train --config emoji64:eleven-styles --data.source emoji64.npz
          glide-jax train --config emoji64 --data.source emoji64.npz
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("four-styles", "eleven-styles")
STYLES = ("Google Noto style", "Twitter flat style", "Fluent flat style", "EmojiOne style")
PROMPTS = (
    "a red apple", "a penguin, Twitter flat style", "a rocket",
    "a hamburger, Google Noto style", "a cactus", "an octopus, Fluent flat style",
)  # fmt: skip
# Of ten captions one is empty, one is the style alone, two are the concept alone, six have both.
# Captions of one part are what `combine_prompts([concept, style], [w, w])` needs for other pairs.
BOTH = ("{caption}, {style}", "{a_caption}, {style}")
CAPTION_TEMPLATES = ("{style}", "{caption}", "{a_caption}", *BOTH, *BOTH, *BOTH)


def concepts() -> tuple[str, ...]:
    """Return the 766 names of the concepts that are in at least three of STYLES."""
    path = Path(__file__).with_name("emoji64_concepts766.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def get_config(size: str = "four-styles") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    data = DataConfig(
        source="emoji64",
        # "red apple" is in test_concept; this small model is not tested on new concepts.
        split="train+test_concept",
        concepts=concepts(),
        caption_templates=CAPTION_TEMPLATES,
    )
    # Almost no decay: the second training has it.
    optimiser = OptimiserConfig(
        kind="muon", learning_rate=1.5e-3, warmup=100, beta_2=0.99, weight_decay=0.01,
        lr_decay="wsd", lr_decay_share=0.05, ema=0.999,
    )  # fmt: skip
    config = TrainConfig(
        name="emoji64_eleven_styles",
        model=presets.emoji64(),
        # In so few steps, noise prediction does not learn the large shapes and colours.
        prediction_type="v",
        data=data,
        optimiser=optimiser,
        steps=200_000,
        minutes=2.2,
        batch_size=256,
        mask_all_share=0.7,
        # From the start; the paper does so in a training of its own.
        caption_dropout=0.1,
        save_every=1000,
        sample_every=0,
        sample_steps=12,
        sample_sampler="ddpm",
        sample_spacing="trailing-capped",
        sample_guidance_scale=2.5,
        sample_prompts=PROMPTS,
    )
    if size == "eleven-styles":
        return config
    return replace(
        config,
        name="emoji64",
        init_from="runs/emoji64_eleven_styles",
        data=replace(data, styles=STYLES),
        minutes=4.6,
        optimiser=replace(optimiser, lr_decay_share=0.9, ema=0.998),
    )
