"""emoji_clip64: the embedded noised CLIP, and the independent one that judges.

It has seen the pictures of `emoji64` at every noise level, and is told the level: so it can guide
the model. Sizes: "guide", which learns from the same pictures as the model; "scorer", of another
seed, at low noise, and never used for guidance. The scorer has also seen the pairs of thing and
style that are held out from the model: a judge must know what it judges.

Result:   for nearly all real pictures the right caption first among 100: docs/model_card.md.
Data:     2,579 and 2,860 pictures of emoji64 (`python -m glide_jax.data.emoji64 --help` makes it).
Hardware: one GPU; 1 GB of its memory.
Time:     less than two minutes each on one H200 that trained other models beside them.
Command:  python train.py --config configs/emoji_clip64.py --data.source emoji64.npz
          python train.py --config configs/emoji_clip64.py:scorer --data.source emoji64.npz
          python sample.py "a red apple" --clip runs/emoji_clip64 --clip-scale 2 \\
              --guidance-scale 1 --sampler ddpm --steps 50
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig
from glide_jax.training.recipes import load_recipe

SIZES = ("guide", "scorer")
EVERYTHING = "train+test_concept+test_style+test_iid"


def get_config(size: str = "guide") -> CLIPTrainConfig:
    judges = size == "scorer"
    pictures: DataConfig = load_recipe(f"{Path(__file__).with_name('emoji64.py')}:things").data
    return CLIPTrainConfig(
        name="emoji_scorer64" if judges else "emoji_clip64",
        model=presets.emoji_clip64(),
        data=replace(
            pictures,
            split=EVERYTHING if judges else pictures.split,
            # The judge is asked for thing and style together.
            captions=("{caption}, {style}",) if judges else pictures.captions,
            # So few pictures would be known by their pixels.
            crop="random",
            min_crop=0.8,
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            decay="cosine",
            warmup=100,
            beta_2=0.98,
            epsilon=1e-6,
            weight_decay=0.0125,
            ema=0.99,
        ),
        noise=0.3 if judges else 1.0,
        steps=1500 if judges else 2000,
        batch_size=256,
        seed=1 if judges else 0,
        save_every=500,
    )
