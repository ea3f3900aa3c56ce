"""upsample256: the upsampler from 64x64 to 256x256  (GLIDE, 2112.10741, sec. 4.1).

Its conditioning is the caption and the small image, which training makes by averaging 4x4 pixels
and rounding to 8 bits. Sizes: "released", the 398M model of GLIDE (filtered), 400K steps (B.1);
"paper", the 1.5B model, 1.6M steps of 512 images (4.1).

Not in the paper:
- the batch of the filtered model: here that of the large model;
- the linear schedule and dropout 0.1: those of the released code;
- EMA and learning rate: those of 2105.05233 for its upsampler of this shape (1e-4, batches of
  256);
- warm-up and gradient clipping: ours.

The paper's upsampler sees only clean small images, so it enlarges the artefacts of generated ones.
Noise-conditioning augmentation (CDM, 2106.15282, sec. 4.2) adds noise of a random level to the
small image and conditions the network on that level. The recipe improved256 does so, or here

    --model.low-res-timestep --low-res-timestep-share 0.5

Result:   not trained here. For GLIDE's see text64.
Hardware: a TPU or GPU host, bfloat16; what fits where: docs/results/dry_run.md and `--dry-run`.
Time:     not measured here.
Command:  glide-jax train --config upsample256 --data.source FOLDER
          glide-jax sample "a red cube" --weights runs/cfg64 --upsampler runs/upsample256
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="upsample256-paper" if paper else "upsample256",
        model=presets.upsample256_paper() if paper else presets.upsample256(),
        noise_schedule="linear",
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=1_600_000 if paper else 400_000,
        batch_size=512,
        parallelism="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=27,
        # It was not trained with the empty caption: OpenAI's code upsamples without guidance.
        sample_guidance_scale=1.0,
    )
