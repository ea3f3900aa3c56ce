"""emoji_upsample256: the embedded upsampler from 64x64 to 256x256.

It adds its output to the bicubic enlargement, and predicts the clean image: one or two evaluations
are enough. It is trained on squares of 128 pixels out of the images of `emoji64` at 256x256.

Result:   the embedded weights: docs/results/model_card.md has their error and their edges.
Data:     2,579 images of emoji64 at 256x256 (docs/guide/data.md says how to make them).
Hardware: one GPU, 10 GB of its memory.
Time:     4,200 steps in 1.5 minutes on one H200, at the same time as emoji64.
Command:  glide-jax train --config emoji_upsample256 --data.source emoji256.npz
"""

from dataclasses import replace

from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.recipes import load_recipe


def get_config() -> TrainConfig:
    """Return the recipe."""
    data = load_recipe("emoji64").data
    return TrainConfig(
        name="emoji_upsample256",
        model=presets.emoji_upsample256(),
        train_image_size=128,
        prediction_type="x_0",
        # Flat art has edges between two colours: the absolute error picks one, the squared error
        # their mean.
        huber_width=0.05,
        low_res_timestep_share=0.1,
        data=replace(data, source="emoji256", crop="window"),
        optimiser=OptimiserConfig(
            kind="muon",
            learning_rate=1.5e-3,
            warmup=100,
            beta_2=0.99,
            weight_decay=0.01,
            lr_decay="wsd",
            lr_decay_share=0.7,
            ema=0.998,
        ),
        steps=200_000,
        minutes=1.5,
        batch_size=128,
        caption_dropout=0.1,
        save_every=1000,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=2,
        sample_spacing="trailing-capped",
        sample_guidance_scale=1.0,
    )
