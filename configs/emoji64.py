"""emoji64: the embedded text-to-image model.

Result:   64x64 emoji of 766 things in 4 styles, the style chosen by the caption.
Data:     2,579 pictures of emoji64 (`python -m glide_jax.data.emoji64 --help` makes it); for 219
          of the things one or two styles are held out.
Hardware: one GPU; 5 GB of its memory.
Time:     4 minutes and a half on one H200, at 11,400 pictures/s; days on two CPU cores.
Command:  python train.py --config configs/emoji64.py --data.source emoji64.npz --data.workers 4
"""

from pathlib import Path

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

# What is drawn in at least three of the styles, of animals, plants, food, places, things and games,
# under a name of one or two words; some faces and hearts.
CONCEPTS = tuple(
    Path(__file__).with_name("emoji64_things.txt").read_text(encoding="utf-8").splitlines()
)

STYLES = ("Google Noto style", "Twitter flat style", "Fluent flat style", "EmojiOne style")


def get_config() -> TrainConfig:
    return TrainConfig(
        name="emoji64",
        model=presets.emoji64(),
        # At so few steps, predicting noise leaves the large shapes and colours untrained.
        prediction="v",
        data=DataConfig(
            source="emoji64",
            # "red apple" lies in test_concept, whose concepts this small model is not tested on.
            split="train+test_concept",
            concepts=CONCEPTS,
            styles=STYLES,
            captions=(
                "{caption}",
                "{a_caption}",
                "{caption}, {style}",
                "{a_caption}, {style}",
            ),
        ),
        optimiser=OptimiserConfig(
            learning_rate=1.5e-3,
            warmup=500,
            beta_2=0.99,
            ema=0.999,
        ),
        steps=10_900,
        batch_size=256,
        # From the start, rather than in a second training: the model is too small to fine-tune.
        caption_dropout=0.1,
        save_every=1000,
        sample_every=1000,
        # Chosen by a sweep: docs/evaluation.md.
        sample_guidance_scale=2.0,
        sample_prompts=(
            "a red apple",
            "a penguin, Twitter flat style",
            "a rocket",
            "a hamburger, Google Noto style",
            "a cactus",
            "an octopus, Fluent flat style",
        ),
    )
