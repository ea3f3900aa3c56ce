"""emoji_upsample256: the embedded upsampler from 64x64 to 256x256.

It is trained on the images of `emoji64` rendered at 256x256. Vector art looks alike at every scale,
and the network is convolutional. So it is trained on square crops of random size, from a quarter of
the area to the whole image, all resized to 128x128.

Result:   smooth edges at 256x256 where the small image has steps: docs/results/model_card.md.
Data:     2,579 images of emoji64 at 256x256 (docs/guide/data.md says how to make them).
Hardware: one GPU; 2 GB of its memory.
Time:     2.8 minutes for 5,107 steps on one H200, at the same time as `emoji_inpaint64`;
          1,200 images/s.
Command:  glide-jax train --config emoji_upsample256 --data.source emoji256.npz --data.workers 4
"""

from dataclasses import replace

from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.recipes import load_recipe

SIDE = 128


def get_config() -> TrainConfig:
    data = load_recipe("emoji64:concepts766").data
    styles = load_recipe("emoji64").data.styles
    return TrainConfig(
        name="emoji_upsample256",
        model=presets.emoji_upsample256(),
        train_size=SIDE,
        prediction="v",
        data=replace(data, source="emoji256", styles=styles, crop="random", min_crop=SIDE / 256),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            warmup=500,
            beta_2=0.99,
            ema=0.999,
        ),
        steps=5100,
        batch_size=32,
        save_every=500,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=8,
        sample_guidance_scale=1.0,
        # Half of the steps; the colours stay those of the small image.
        sample_strength=0.5,
    )
