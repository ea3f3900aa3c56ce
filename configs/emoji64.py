"""emoji64: the embedded text-to-image model, on two CPU cores.

Two trainings: size "32" on pictures of 32x32, where words and shapes are learned at a quarter of
the cost, then "64" (the network is convolutional: its weights serve both sizes).

Result:   recognisable 64x64 emoji of 100 things in 4 styles, the style chosen by the caption.
Data:     324 pictures of emoji64 (`python -m glide_jax.data.emoji64 --help` makes it); for 69 of
          the things one style is held out.
Hardware: 2 CPU cores; any GPU is faster.
Time:     see docs/model_card.md for what was measured.
Command:  two:

    python train.py --config configs/emoji64.py:32 --data.source emoji64.npz
    python train.py --config configs/emoji64.py --data.source emoji64.npz
"""

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

CONCEPTS = (
    "airplane", "alien", "ambulance", "automobile", "baby chick", "backpack", "banana",
    "basketball", "bed", "bicycle", "blossom", "bus", "cactus", "camel", "camera", "canoe",
    "cat face", "cherries", "Christmas tree", "closed book", "closed umbrella", "cooking", "cow",
    "croissant", "crown", "crystal ball", "dog face", "doughnut", "evergreen tree",
    "ferris wheel", "fire", "fire engine", "fish", "full moon", "gear", "ghost", "glasses",
    "green apple", "green heart", "guitar", "hamburger", "hammer", "heart with ribbon",
    "hibiscus", "hot beverage", "hot pepper", "hourglass done", "house", "ice cream", "key",
    "lady beetle", "lemon", "light bulb", "lipstick", "locomotive", "mantelpiece clock", "melon",
    "mobile phone", "monkey", "mushroom", "octopus", "party popper", "penguin", "pig face",
    "pile of poo", "pizza", "red apple", "red heart", "ring", "rocket", "rooster", "rose",
    "sailboat", "shortcake", "skull", "snail", "snowman", "soccer ball", "soft ice cream",
    "spider", "star", "strawberry", "sun", "sunglasses", "tangerine", "taxi", "tent", "tiger",
    "top hat", "tulip", "turtle", "umbrella", "video game", "violin", "volcano", "watermelon",
    "wine glass", "wolf", "woman’s hat", "wrapped gift",
)  # fmt: skip

STYLES = ("Google Noto style", "Twitter flat style", "Fluent flat style", "EmojiOne style")


SIZES = ("32", "64")


def get_config(size: str = "64") -> TrainConfig:
    first = size == "32"
    return TrainConfig(
        name="emoji32" if first else "emoji64",
        model=presets.emoji64(),
        train_size=32 if first else 0,
        init_from="" if first else "runs/emoji32",
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
            learning_rate=2e-3 if first else 1.5e-3,
            decay="constant" if first else "cosine",
            warmup=100,
            beta_2=0.99,
            ema=0.998,
        ),
        steps=5400 if first else 3000,
        batch_size=16 if first else 8,
        # From the start, rather than in a second training: the model is too small to fine-tune.
        caption_dropout=0.1,
        save_every=500,
        sample_every=0 if first else 1000,
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
