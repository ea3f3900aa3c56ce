"""emoji_inpaint64: the embedded inpainting model  (GLIDE, sec. 4.3).

It starts from size "concepts766" of `emoji64`, with four more input channels: the image with random
regions masked, and the mask of the known pixels. Their weights start at zero.

The embedded weights started from stage 1 of `emoji64` (docs/results/model_card.md) and were trained
for 2,224 steps. This recipe is a simplified version and was not run in full.

Result:   not measured. The embedded weights fill a masked region from the caption and continue its
          surroundings.
Data:     2,579 images of emoji64 (docs/guide/data.md says how to make it).
Hardware: one GPU; 5 GB of its memory.
Time:     the embedded weights took 2.4 minutes on one H200, at the same time as
          `emoji_upsample256`; speed 5,200 images/s.
Command:  glide-jax train --config emoji_inpaint64 --data.source emoji64.npz --data.workers 4
"""

from dataclasses import replace

from glide_jax.training.config import TrainConfig
from glide_jax.training.recipes import load_recipe


def get_config() -> TrainConfig:
    base = load_recipe("emoji64:eleven-styles")
    assert isinstance(base, TrainConfig)
    styles = load_recipe("emoji64").data.styles
    return replace(
        base,
        name="emoji_inpaint64",
        model=replace(base.model, variant="inpaint"),
        init_from="runs/emoji64_concepts766",
        data=replace(base.data, styles=styles),
        optimiser=replace(base.optimiser, learning_rate=1e-3, warmup=200),
        steps=2200,
        mask_all=0.1,
        save_every=500,
        sample_every=0,
    )
