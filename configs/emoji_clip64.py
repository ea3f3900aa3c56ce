"""emoji_clip64: the embedded noised CLIP, and the independent one that judges.

It has seen pictures at every noise level, and is told the level: so it can guide the model
`emoji64`. Sizes: "guide", which learns from none of the pairs of thing and style that are held out
from the model; "scorer", of another seed, at low noise, and never used for guidance, which has seen
these too: a judge must know what it judges.

A CLIP that has seen a few pictures knows them by heart and is at a loss before any other. So both
learn from more things and styles than the model draws, turned to either side and cropped, and with
all styles of a thing in one batch, where nothing but the style tells them apart.

Result:   docs/model_card.md says what they see in pictures that are new to them.
Data:     8,195 and 9,051 pictures of emoji64 (docs/data.md says how to make it): 1,326 things in
          eleven styles.
Hardware: one GPU; 2 GB of its memory.
Time:     four minutes each on one H200 that trained other models beside them.
Command:  python train.py --config configs/emoji_clip64.py --data.source emoji64.npz \\
              --data.workers 4
          python train.py --config configs/emoji_clip64.py:scorer --data.source emoji64.npz \\
              --data.workers 4
          python sample.py "a red apple" --clip runs/emoji_clip64 --clip-scale 2 \\
              --guidance-scale 1 --sampler ddpm --steps 50
"""

from pathlib import Path

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig

SIZES = ("guide", "scorer")
SPLIT = "train+test_concept"
EVERYTHING = f"{SPLIT}+test_style+test_iid"


def concepts() -> tuple[str, ...]:
    """Names of the things, those of `emoji64` among them: drawn in at least three styles, without
    people and hands, which have skin tones."""
    path = Path(__file__).with_suffix(".txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def get_config(size: str = "guide") -> CLIPTrainConfig:
    judges = size == "scorer"
    styled = ("{caption}, {style}", "{a_caption}, {style}")
    several = 3 * styled + ("{caption}", "{a_caption}", "{style}")
    return CLIPTrainConfig(
        name="emoji_scorer64" if judges else "emoji_clip64",
        model=presets.emoji_clip64(),
        data=DataConfig(
            source="emoji64",
            split=EVERYTHING if judges else SPLIT,
            concepts=concepts(),
            # The judge is asked for thing and style together.
            captions=styled if judges else several,
            crop="random",
            min_crop=0.6,
            flip=True,
            group_by="concept",
        ),
        optimiser=OptimiserConfig(
            learning_rate=1e-3,
            decay="cosine",
            warmup=200,
            beta_2=0.98,
            epsilon=1e-6,
            weight_decay=0.05,
            ema=0.99,
        ),
        noise=0.3 if judges else 1.0,
        steps=4000,
        batch_size=512,
        seed=1 if judges else 0,
        save_every=500,
    )
