"""emoji_fewstep64: a student of one to four steps of emoji64.

Consistency distillation with guidance inside: see fewstep64. It starts from its teacher, and is
trained on the same images and masks.

Result:   trained once, for 1,240 steps of 256, and not kept; not measured.
Data:     as emoji64.
Hardware: one GPU, or two CPU cores for small batches (`--batch-size 8`).
Time:     1,240 steps in 1.7 minutes on one H200; a step costs twice that of emoji64.
Command:  glide-jax train --config emoji_fewstep64 --data.source emoji64.npz --data.workers 4
"""

from dataclasses import replace

from glide_jax.training.config import TrainConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.recipes import load_recipe


def get_config() -> TrainConfig:
    """Return the recipe."""
    base = load_recipe("emoji64")
    assert isinstance(base, TrainConfig)
    return replace(
        base,
        name="emoji_fewstep64",
        model=replace(base.model, guidance_scale_input=True),
        init_from="",
        objective="consistency",
        # In so few steps, more teacher steps are not learned.
        distillation=DistillationConfig(
            teacher="runs/emoji64", guidance_scales=(1.0, 4.0), teacher_steps=(4, 16)
        ),
        optimiser=replace(
            base.optimiser,
            learning_rate=5e-4,
            warmup=100,
            lr_decay="cosine",
            lr_decay_share=0.4,
            ema=0.995,
        ),
        steps=1500,
        minutes=0,
        save_every=100,
        sample_every=0,
        sample_steps=4,
        sample_guidance_scale=2.0,
        sample_clip_guidance_scale=0.0,
        sample_sampler="consistency",
        sample_spacing="trailing-capped",
    )
