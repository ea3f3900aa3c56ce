"""emoji_upsample256: the embedded upsampler from 64x64 to 256x256, on two CPU cores.

It learns from the pictures of `emoji64` rendered at 256x256. Vector drawings look alike at every
scale, and the network is convolutional: so it learns from squares of random scale, from the whole
picture down to a part of it, first many of 64x64 (size "64"), then some of 128x128.

Result:   smooth edges of 256x256 where the small picture has steps: docs/model_card.md.
Data:     324 pictures of emoji64 at 256x256 (`python -m glide_jax.data.emoji64 --help` makes them).
Hardware: 2 CPU cores; any GPU is faster.
Time:     see docs/model_card.md for what was measured.
Command:  two:

    python train.py --config configs/emoji_upsample256.py:64 --data.source emoji256.npz
    python train.py --config configs/emoji_upsample256.py --data.source emoji256.npz
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.recipes import load_recipe

SIZES = ("64", "128")


def get_config(size: str = "128") -> TrainConfig:
    first = size == "64"
    side = int(size)
    pictures = load_recipe(Path(__file__).with_name("emoji64.py")).data
    return TrainConfig(
        name="emoji_upsample64" if first else "emoji_upsample256",
        model=presets.emoji_upsample256(),
        train_size=side,
        init_from="" if first else "runs/emoji_upsample64",
        prediction="v",
        data=replace(pictures, source="emoji256", crop="random", min_crop=side / 256),
        optimiser=OptimiserConfig(
            learning_rate=2e-3 if first else 1e-3,
            decay="constant" if first else "cosine",
            warmup=30 if first else 10,
            beta_2=0.99,
            ema=0.98,
        ),
        steps=900 if first else 150,
        batch_size=8 if first else 2,
        save_every=100,
        log_every=10,
        # A grid would need small pictures to enlarge.
        sample_every=0,
        sample_steps=8,
        sample_guidance_scale=1.0,
        # Half of the steps, and colours that are those of the small picture.
        sample_strength=0.5,
    )
