"""fewstep256: an upsampler of one to four steps, distilled from a trained one.

Consistency distillation (2303.01469) of upsample256 or improved256 without guidance, as OpenAI's
upsampler has none. The noise levels are the first half of the diffusion process: sampling starts
from the enlarged small image, noised to the middle of the process, so that two of the four steps
remain.

Sizes as upsample256. The teacher has the sizes, the noise schedule and the prediction of the
recipe; for improved256 set --noise-schedule cosine, --model.low-res-timestep and
--low-res-timestep-share 0.5. For the rest see fewstep64.

Result:   not trained here at these sizes.
Hardware: as upsample256, and one more copy of the weights.
Time:     not measured here.
Command:  glide-jax train --config fewstep256 --data.source FOLDER \\
              --distillation.teacher runs/upsample256
          glide-jax sample "a red cube" --weights runs/fewstep64 --upsampler runs/fewstep256
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.distillation_config import DistillationConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="fewstep256-paper" if paper else "fewstep256",
        model=presets.upsample256_paper() if paper else presets.upsample256(),
        noise_schedule="linear",
        objective="consistency",
        distillation=DistillationConfig(timestep_share=0.5),
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000, lr_decay="cosine", ema=0.999),
        steps=50_000,
        batch_size=512,
        parallelism="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=4,
        sample_guidance_scale=1.0,
        sample_strength=0.5,
        sample_sampler="consistency",
        sample_spacing="trailing-capped",
    )
