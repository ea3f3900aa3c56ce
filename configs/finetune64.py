"""finetune64: the released 64x64 model on your own captioned images, on one GPU.

The text transformer keeps its released weights ("text" is frozen): that saves memory, and suits a
few thousand images. `--optimiser.freeze` without a value trains it too.

Sizes, by the memory of the GPU, as estimated in docs/guide/fine-tuning.md (we had no access to
such GPUs), all with batches of 32 images:
- "16gb" (T4, RTX 4060 Ti, V100): microbatches of 8 and activation checkpointing;
- "24gb" (RTX 3090 and 4090, A10, L4): the whole batch in one microbatch; "released" is the same;
- "paper" starts from your own run of cfg64:paper.

20% of the captions are replaced by the empty one, so that classifier-free guidance keeps
working. Learning rate, steps and EMA rate are ours, for some thousand images: the paper has no such
stage. Min-SNR weighting also works for fine-tuning: `--weighting min-snr`.

Result:   not trained here: we had no access to the released weights.
Hardware: one GPU of 16 or 24 GB: see above.
Time:     not measured here.
Data:     a folder, the caption of cat.png in cat.txt; images are cropped to their central square.
Command:  glide-jax train --config finetune64:16gb --data.source FOLDER
          glide-jax sample "a caption like yours" --weights runs/finetune64
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "16gb", "24gb", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper, small = size == "paper", size == "16gb"
    return TrainConfig(
        name="finetune64-paper" if paper else "finetune64",
        model=presets.base64_paper() if paper else presets.base64(),
        init_from="runs/cfg64-paper" if paper else "openai/base",
        data=DataConfig(workers=4),
        optimiser=OptimiserConfig(
            learning_rate=1e-5,
            warmup=200,
            first_moment_dtype="bfloat16",
            freeze=("text",),
            ema=0.999,
        ),
        steps=10_000,
        batch_size=32,
        caption_dropout=0.2,
        accumulate=4 if small else 1,
        remat=small or paper,
        parallelism="fsdp" if paper else "pmap",
        save_every=500,
        log_every=20,
        sample_every=1000,
        sample_prompts=("a photo of a cat", "a drawing of a house"),
        sample_steps=50,
    )
