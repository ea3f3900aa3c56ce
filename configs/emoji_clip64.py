"""emoji_clip64: the embedded noised CLIP, and the independent scorer.

Sizes: "guide" guides the model `emoji64`. It is trained at every noise level, is conditioned on
the timestep, and sees none of the pairs held out from `emoji64`. "scorer" scores samples and is
never used for guidance. It has another seed, is trained at low noise, and sees the held-out pairs
too, since it has to score them.

A CLIP trained on few images memorises them and fails on all others. So both see more concepts and
styles than `emoji64` generates, and the images are mirrored and cropped. All styles of a concept
are in one batch, so that the CLIP has to distinguish the styles.

Result:   docs/results/evaluation.md has what the guiding CLIP recognises in unseen images.
Data:     8,195 and 9,051 images of emoji64 (docs/guide/data.md says how to make it): 1,326
          concepts in eleven styles.
Hardware: one GPU; 2 GB of its memory.
Time:     four minutes each on one H200, at the same time as other trainings.
Command:  glide-jax train --config emoji_clip64 --data.source emoji64.npz --data.workers 4
          glide-jax train --config emoji_clip64:scorer --data.source emoji64.npz --data.workers 4
          glide-jax sample "a red apple" --clip-model runs/emoji_clip64 --clip-guidance-scale 2 \\
              --guidance-scale 1 --sampler ddpm --steps 50
"""

from pathlib import Path

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig

SIZES = ("guide", "scorer")
SPLIT = "train+test_concept"
ALL_SPLITS = f"{SPLIT}+test_style+test_iid"


def concepts() -> tuple[str, ...]:
    """Return the names of the concepts, those of `emoji64` among them.

    They exist in at least three styles; people and hands, which have skin tones, are left out.
    """
    path = Path(__file__).with_name("emoji_clip64_concepts.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def get_config(size: str = "guide") -> CLIPTrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    scores = size == "scorer"
    styled = ("{caption}, {style}", "{a_caption}, {style}")
    several = 3 * styled + ("{caption}", "{a_caption}", "{style}")
    return CLIPTrainConfig(
        name="emoji_scorer64" if scores else "emoji_clip64",
        model=presets.emoji_clip64(),
        data=DataConfig(
            source="emoji64",
            split=ALL_SPLITS if scores else SPLIT,
            concepts=concepts(),
            # The scorer ranks captions of concept and style together.
            caption_templates=styled if scores else several,
            crop="random",
            min_crop=0.6,
            flip=True,
            group_by="concept",
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            lr_decay="cosine",
            warmup=200,
            beta_2=0.98,
            epsilon=1e-6,
            weight_decay=0.05,
            ema=0.99,
        ),
        timestep_share=0.3 if scores else 1.0,
        steps=4000,
        batch_size=512,
        seed=1 if scores else 0,
        save_every=500,
    )
