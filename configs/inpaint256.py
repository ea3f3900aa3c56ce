"""inpaint256: the upsampler, made to fill holes  (GLIDE, 2112.10741, sec. 4.3).

A trained upsampler goes on with four more input channels, whose weights begin at zero. It is
always given the whole small picture, but only the known part of the large one.

Sizes: "released", from `openai/upsample`; "paper", 1.5B, from a run of upsample256:paper. The
paper states neither steps, nor batch, nor rates of this stage, nor the shape of the regions: the
steps are ours, the rest as in upsample256 and inpaint64.

Result:   not trained here.
Hardware: as upsample256: docs/training.md and `--dry-run`.
Time:     not measured here.
Command:  python train.py --config configs/inpaint256.py --data.source FOLDER
          python sample.py "a party hat" --weights runs/inpaint64 --upsampler runs/inpaint256 \\
              --init-image x.png --mask m.png
"""

from dataclasses import replace

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    paper = size == "paper"
    model = presets.upsample256_paper() if paper else presets.upsample256()
    return TrainConfig(
        name="inpaint256-paper" if paper else "inpaint256",
        model=replace(model, variant="superres_inpaint"),
        schedule="linear",
        init_from="runs/upsample256-paper" if paper else "openai/upsample",
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=100_000,
        batch_size=512,
        mask_all=0.1,
        spread="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small pictures to enlarge.
        sample_every=0,
        sample_steps=27,
        sample_guidance_scale=1.0,
    )
