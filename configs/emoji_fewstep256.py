"""emoji_fewstep256: an upsampler of one or two steps, distilled from emoji_upsample256.

Consistency distillation without guidance: see fewstep256. It starts from its teacher, and is
trained on the same images.

Result:   not trained here.
Data:     as emoji_upsample256.
Hardware: one GPU, or two CPU cores for small batches (`--batch-size 4`).
Time:     not measured here; a step costs 1.7 times that of emoji_upsample256.
Command:  glide-jax train --config emoji_fewstep256 --data.source emoji256.npz --data.workers 4
"""

from dataclasses import replace

from glide_jax.training.config import TrainConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.recipes import load_recipe


def get_config() -> TrainConfig:
    """Return the recipe."""
    base = load_recipe("emoji_upsample256")
    assert isinstance(base, TrainConfig)
    return replace(
        base,
        name="emoji_fewstep256",
        init_from="",
        objective="consistency",
        huber_width=0.0,  # of the teacher's loss
        distillation=DistillationConfig(teacher="runs/emoji_upsample256", teacher_steps=(4, 16)),
        optimiser=replace(
            base.optimiser,
            learning_rate=3e-4,
            warmup=100,
            lr_decay="cosine",
            lr_decay_share=0.4,
            ema=0.995,
        ),
        steps=2000,
        minutes=0,
        sample_steps=2,
        sample_sampler="consistency",
        sample_spacing="trailing-capped",
    )
