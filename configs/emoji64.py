"""emoji64: the embedded text-to-image model.

Two trainings, one after the other. Size "concepts766" learns 766 concepts in eleven styles, on a
GPU. Size "concepts100", the default, starts from it and learns a hundred of these concepts in four
styles, with small batches, on a CPU.

The embedded weights came from five stages (docs/results/model_card.md). These two sizes are a
simplified version of them and were not run in full.

Result:   not measured. The embedded weights generate 64x64 emoji of a hundred concepts in four
          styles; the caption selects the style.
Data:     324 images of emoji64 (docs/guide/data.md says how to make it), 4,909 for "concepts766";
          for 69 of the hundred concepts one or two styles are held out.
Hardware: "concepts766": one GPU, 5 GB of its memory; "concepts100": two CPU cores, 2 GB.
Time:     "concepts766": nine minutes on one H200, estimated from 11,400 images/s; "concepts100":
          two hours on two cores of a 2 GHz AMD EPYC as two devices (docs/guide/training.md),
          estimated from 5.4 images/s.
Command:  glide-jax train --config emoji64:concepts766 --data.source emoji64.npz --data.workers 4
          glide-jax train --config emoji64 --data.source emoji64.npz
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("concepts100", "concepts766")
STYLES = ("Google Noto style", "Twitter flat style", "Fluent flat style", "EmojiOne style")


def concepts(size: str) -> tuple[str, ...]:
    """Return the names of the concepts that a size knows.

    Those of "concepts766" exist in at least three of STYLES and have names of one or two words:
    animals, plants, food, places, objects and games; some faces and hearts.
    """
    path = Path(__file__).with_name(f"emoji64_{size}.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def get_config(size: str = "concepts100") -> TrainConfig:
    config = TrainConfig(
        name="emoji64_concepts766",
        model=presets.emoji64(),
        # In so few steps, noise prediction does not learn the large shapes and colours.
        prediction="v",
        data=DataConfig(
            source="emoji64",
            # "red apple" is in test_concept; this small model is not tested on new concepts.
            split="train+test_concept",
            concepts=concepts(size),
            captions=("{caption}", "{a_caption}", "{caption}, {style}", "{a_caption}, {style}"),
        ),
        optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup=500, beta_2=0.99, ema=0.999),
        steps=23_000,
        batch_size=256,
        # From the start; the paper does so in a training of its own.
        caption_dropout=0.1,
        save_every=1000,
        sample_every=1000,
        # Chosen by a sweep: docs/results/evaluation.md.
        sample_guidance_scale=1.5,
        sample_clip_scale=4.0,
        sample_prompts=(
            "a red apple",
            "a penguin, Twitter flat style",
            "a rocket",
            "a hamburger, Google Noto style",
            "a cactus",
            "an octopus, Fluent flat style",
        ),
    )
    if size == "concepts766":
        return config
    return replace(
        config,
        name="emoji64",
        init_from="runs/emoji64_concepts766",
        data=replace(config.data, styles=STYLES),
        # A CPU processes few images per second: many small batches are better than few large ones.
        optimiser=replace(config.optimiser, learning_rate=5e-4, warmup=100, decay="cosine"),
        steps=5000,
        batch_size=8,
        save_every=200,
        sample_every=0,
    )
