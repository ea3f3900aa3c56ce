"""emoji64: the embedded text-to-image model, trained from scratch on two CPU cores.

Result:   recognisable 64x64 emoji of 40 things in 4 styles, the style chosen by the caption.
Data:     146 pictures of emoji64 (`python -m glide_jax.data.emoji64 --help` makes it).
Hardware: 2 CPU cores; any GPU is faster.
Time:     see docs/model_card.md for what was measured.
Command:  two, the first on pictures of 32x32, where words and shapes are learned at a quarter of
          the cost (the network is convolutional: its weights serve both sizes):

    python train.py --config configs/emoji64.py --data.source emoji64.npz --out runs/emoji32 \\
        --model.image-size 32 --batch-size 16 --steps 3600 \\
        --optimiser.learning-rate 2e-3 --optimiser.decay constant
    python train.py --config configs/emoji64.py --data.source emoji64.npz --init-from runs/emoji32
"""

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

CONCEPTS = (
    "airplane", "alien", "automobile", "banana", "basketball", "bicycle", "cactus", "cat face",
    "Christmas tree", "crown", "dog face", "doughnut", "fish", "full moon", "ghost", "guitar",
    "hamburger", "house", "key", "light bulb", "mushroom", "octopus", "penguin", "pizza",
    "red apple", "red heart", "rocket", "rose", "sailboat", "skull", "snowman", "soccer ball",
    "star", "strawberry", "sun", "tulip", "turtle", "umbrella", "watermelon",
    "wrapped gift",
)  # fmt: skip

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
            learning_rate=1.5e-3, decay="cosine", warmup=100, beta_2=0.99, ema=0.998
        ),
        steps=3000,
        batch_size=8,
        # From the start, rather than in a second training: the model is too small to fine-tune.
        caption_dropout=0.1,
        save_every=500,
        sample_every=1000,
        sample_prompts=(
            "a red apple",
            "a penguin, Twitter flat style",
            "a rocket",
            "a hamburger, Google Noto style",
            "a cactus",
            "an octopus, Fluent flat style",
        ),
    )
