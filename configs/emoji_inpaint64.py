"""emoji_inpaint64: the embedded model, made to fill holes  (GLIDE, sec. 4.3).

Size "things" of `emoji64` goes on with four more input channels, the picture with random regions
erased and the mask of what is left, whose weights begin at zero.

Result:   fills a hole with what the caption says, and goes on with what is around it.
Data:     2,579 pictures of emoji64 (docs/data.md says how to make it).
Hardware: one GPU; 5 GB of its memory.
Time:     2 minutes and a half on one H200 that trained the upsampler beside it, at 5,200
          pictures/s.
Command:  python train.py --config configs/emoji_inpaint64.py --data.source emoji64.npz \\
              --data.workers 4
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.training.config import TrainConfig
from glide_jax.training.recipes import load_recipe


def get_config() -> TrainConfig:
    base = load_recipe(f"{Path(__file__).with_name('emoji64.py')}:things")
    styles = load_recipe(str(Path(__file__).with_name("emoji64.py"))).data.styles
    return replace(
        base,
        name="emoji_inpaint64",
        model=replace(base.model, variant="inpaint"),
        init_from="runs/emoji64_things",
        data=replace(base.data, styles=styles),
        optimiser=replace(base.optimiser, learning_rate=1e-3, warmup=200),
        steps=2200,
        mask_all=0.1,
        save_every=500,
        sample_every=0,
    )
