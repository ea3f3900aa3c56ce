"""emoji_upsample256: the embedded upsampler from 64x64 to 256x256.

It learns from the pictures of `emoji64` rendered at 256x256. Vector drawings look alike at every
scale, and the network is convolutional: so it learns from squares of 128x128, of random scale, from
the whole picture down to a quarter of it.

Result:   smooth edges of 256x256 where the small picture has steps: docs/model_card.md.
Data:     2,579 pictures of emoji64 at 256x256 (docs/data.md says how to make them).
Hardware: one GPU; 2 GB of its memory.
Time:     3 minutes on one H200 that trained `emoji_inpaint64` beside it, at 1,200 pictures/s.
Command:  python train.py --config configs/emoji_upsample256.py --data.source emoji256.npz \\
              --data.workers 4
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.recipes import load_recipe

SIDE = 128


def get_config() -> TrainConfig:
    pictures = load_recipe(f"{Path(__file__).with_name('emoji64.py')}:things").data
    styles = load_recipe(str(Path(__file__).with_name("emoji64.py"))).data.styles
    return TrainConfig(
        name="emoji_upsample256",
        model=presets.emoji_upsample256(),
        train_size=SIDE,
        prediction="v",
        data=replace(
            pictures, source="emoji256", styles=styles, crop="random", min_crop=SIDE / 256
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup=500,
            beta_2=0.99,
            ema=0.999,
        ),
        steps=5100,
        batch_size=32,
        save_every=500,
        # A grid would need small pictures to enlarge.
        sample_every=0,
        sample_steps=8,
        sample_guidance_scale=1.0,
        # Half of the steps, and colours that are those of the small picture.
        sample_strength=0.5,
    )
