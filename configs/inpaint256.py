"""inpaint256: the inpainting upsampler from 64x64 to 256x256  (GLIDE, 2112.10741, sec. 4.3).

It starts from a trained upsampler, with four more input channels, whose weights start at zero. Its
conditioning is the whole small image and the known part of the large one.

Sizes: "released", from `openai/upsample`; "paper", 1.5B, from a run of upsample256:paper. For
this stage the paper does not state steps, batch, learning rate or the shape of the regions. The
steps are ours; the rest is as in upsample256 and inpaint64.

Result:   not trained here.
Hardware: as upsample256: docs/results/dry_run.md and `--dry-run`.
Time:     not measured here.
Command:  glide-jax train --config inpaint256 --data.source FOLDER
          glide-jax sample "a party hat" --weights runs/inpaint64 --upsampler runs/inpaint256 \\
              --image x.png --mask m.png
"""

from dataclasses import replace

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    model = presets.upsample256_paper() if paper else presets.upsample256()
    return TrainConfig(
        name="inpaint256-paper" if paper else "inpaint256",
        model=replace(model, variant="superres_inpaint"),
        noise_schedule="linear",
        init_from="runs/upsample256-paper" if paper else "openai/upsample",
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=100_000,
        batch_size=512,
        mask_all_share=0.1,
        parallelism="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=27,
        sample_guidance_scale=1.0,
    )
