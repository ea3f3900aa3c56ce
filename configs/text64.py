"""text64: the 64x64 model with a caption for every image  (GLIDE, 2112.10741, sec. 4.1).

The paper's first stage: noise prediction with learned variance; text in the time embedding and in
every attention layer. Sizes: "released", the 385M model of GLIDE (filtered), 1.1M steps (B.1);
"paper", the 3.5B model, 2.5M steps of 2048 images (4.1).

Not in the paper:
- the batch of the filtered model: here that of the large model;
- the learning rate: 3e-4 as in 2105.05233 for the same network on ImageNet 64x64; for 3.5B the
  default of its code, 1e-4;
- Adam's betas, EMA rate and no weight decay: defaults of that code;
- cosine schedule and dropout 0.1: those of the released code;
- warm-up and gradient clipping: ours.

Result:   not trained here. GLIDE reports a zero-shot MS-COCO FID of 12.24 at 256x256 for the paper
          size, after cfg64 and upsample256.
Hardware: a TPU or GPU host, bfloat16; the paper size needs a pod slice. What fits where:
          docs/results/dry_run.md and `--dry-run`.
Time:     not measured here.
Command:  glide-jax train --config text64 --data.source FOLDER
          glide-jax train --config text64:paper --data.source 'gs://bucket/*.tar'
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="text64-paper" if paper else "text64",
        model=presets.base64_paper() if paper else presets.base64(),
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4 if paper else 3e-4, warmup=5000),
        steps=2_500_000 if paper else 1_100_000,
        batch_size=2048,
        parallelism="fsdp" if paper else "pmap",
        remat=paper,
        save_every=5000,
        log_every=100,
        sample_every=10_000,
        sample_prompts=(
            "a hedgehog using a calculator",
            "a corgi wearing a red bowtie and a purple party hat",
            "a red cube on top of a blue cube",
            "a fall landscape with a small cottage next to a lake",
        ),
        sample_steps=50,
        # It was not trained with the empty caption.
        sample_guidance_scale=1.0,
    )
