"""fewstep64: a student of one to four steps, distilled from a trained 64x64 model.

Consistency distillation (2303.01469) with classifier-free guidance inside (2210.03142): one
evaluation a step, for any scale between 1 and 4. The student starts from its teacher and takes the
scale as an input. The teacher is a model of the same size that predicts v, as improved64 trains:
at high noise an error of eps is a far larger error of the image.

- the loss is a pseudo-Huber of the error of v, and the number of teacher steps doubles from 8 to 64
  (2310.14189);
- for 90% of the images the scale is sampled from 1 to 4, the others have no guidance;
- 10% empty captions keep the model without caption, for negative prompts and AND.

A training step costs twice that of the teacher. A student of four steps (2403.06807) has less to
learn; it is sampled with 4 steps of ddim, spacing trailing-capped:

    --distillation.student-steps 4 --sample-sampler ddim

Result:   not trained here at these sizes.
Hardware: as improved64, and one more copy of the weights.
Time:     not measured here.
Command:  glide-jax train --config fewstep64 --data.source FOLDER \\
              --distillation.teacher runs/improved64
          glide-jax sample "a red cube" --weights runs/fewstep64 --steps 2 --guidance-scale 2
"""

from dataclasses import replace

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.distillation_config import DistillationConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    model = presets.base64_paper() if paper else presets.base64()
    return TrainConfig(
        name="fewstep64-paper" if paper else "fewstep64",
        model=replace(model, guidance_scale_input=True),
        prediction_type="v",
        objective="consistency",
        distillation=DistillationConfig(guidance_scales=(1.0, 4.0)),
        caption_dropout=0.1,
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000, lr_decay="cosine", ema=0.999),
        steps=50_000,
        batch_size=2048,
        parallelism="fsdp" if paper else "pmap",
        remat=paper,
        save_every=5000,
        log_every=100,
        sample_every=5000,
        sample_prompts=(
            "a hedgehog using a calculator",
            "a corgi wearing a red bowtie and a purple party hat",
            "a red cube on top of a blue cube",
            "a boat in the canals of venice",
        ),
        sample_steps=4,
        sample_sampler="consistency",
        sample_spacing="trailing-capped",
    )
