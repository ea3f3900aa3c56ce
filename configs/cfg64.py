"""cfg64: the 64x64 model for classifier-free guidance  (GLIDE, 2112.10741, sec. 4.2).

The paper's second stage: text64 is trained further, with 20% of the captions replaced by the empty
one, for classifier-free guidance. Start from a base model: `--init-from runs/text64`, as in the
paper, or `--init-from openai/base`. To start from random weights, set --steps to those of text64.

Sizes: "released", 385M: 500K steps, which B.1 states "for classifier-free guidance and inpainting"
together; "paper", 3.5B, whose steps are not stated (here the same). Batch and schedule are as in
text64; the lower learning rate is the default of the code of 2105.05233.

Result:   not trained here. GLIDE reports a zero-shot MS-COCO FID of 12.24 at 256x256 for the paper
          size at guidance scale 1.5.
Hardware: a TPU or GPU host, bfloat16; the paper size needs a pod slice. What fits where:
          docs/results/dry_run.md and `--dry-run`.
Time:     not measured here.
Command:  glide-jax train --config cfg64 --data.source FOLDER --init-from runs/text64
          glide-jax train --config cfg64:paper --data.source 'gs://bucket/*.tar' \\
              --init-from runs/text64-paper
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="cfg64-paper" if paper else "cfg64",
        model=presets.base64_paper() if paper else presets.base64(),
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=500_000,
        batch_size=2048,
        caption_dropout=0.2,
        parallelism="fsdp" if paper else "pmap",
        remat=paper,
        save_every=5000,
        log_every=100,
        sample_every=10_000,
        sample_prompts=(
            "a hedgehog using a calculator",
            "a corgi wearing a red bowtie and a purple party hat",
            "a red cube on top of a blue cube",
            "a boat in the canals of venice",
        ),
        sample_steps=50,
    )
