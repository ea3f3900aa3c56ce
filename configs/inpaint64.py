"""inpaint64: the 64x64 inpainting model  (GLIDE, 2112.10741, sec. 4.3).

It starts from a trained model, with four more input channels: the image with random regions masked,
and the mask of the known pixels. Their weights start at zero. The known pixels are not noised.

Sizes: "released", from `openai/base`, or from your own run with `--init-from`: 500K steps (B.1
states them "for classifier-free guidance and inpainting" together); "paper", 3.5B, from a run of
cfg64:paper, whose steps are not stated (here the same). Also not stated:
- the shape of the regions: here rectangles and brush strokes; 10% of the images are masked
  completely, so that the model can still generate from text alone;
- whether captions are replaced by the empty one: here 20%, since the paper samples with guidance;
- batch and learning rate: here as in cfg64.

Result:   not trained here.
Hardware: as cfg64: docs/results/dry_run.md and `--dry-run`.
Time:     not measured here.
Command:  glide-jax train --config inpaint64 --data.source FOLDER
          glide-jax sample "a party hat" --weights runs/inpaint64 --image x.png --mask m.png
"""

from dataclasses import replace

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    model = presets.base64_paper() if paper else presets.base64()
    return TrainConfig(
        name="inpaint64-paper" if paper else "inpaint64",
        model=replace(model, variant="inpaint"),
        init_from="runs/cfg64-paper" if paper else "openai/base",
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=500_000,
        batch_size=2048,
        caption_dropout=0.2,
        mask_all_share=0.1,
        parallelism="fsdp" if paper else "pmap",
        remat=paper,
        save_every=5000,
        log_every=100,
        sample_every=10_000,
        # Generated with every pixel masked.
        sample_prompts=("a corgi in a field", "a red cube on top of a blue cube"),
        sample_steps=50,
        # OpenAI's code inpaints at scale 5.
        sample_guidance_scale=5.0,
    )
