"""lora64: LoRA of the released 64x64 model, on your own captioned images  (2106.09685).

The released weights stay as they are. Low-rank pairs beside the kernels of all attention layers and
of the text transformer are trained, of rank 16: a file of some megabytes. At sampling they are
merged into the weights, and several can be, each with a weight.

Sizes: "released", the 385M model; "paper", the 3.5B model, from your own run of cfg64:paper.
The batch of 32 is computed in microbatches of 8, the activations checkpointed.

Not in the paper of LoRA, which adapts language models: rank, alpha = rank (the first step is
then that of fine-tuning, projected: glide_jax/training/lora_training.py), learning rate, steps and
EMA rate. They are ours, for a few hundred to a few thousand images. 20% of the captions are
replaced by the empty one, so that classifier-free guidance keeps working.

Result:   not trained here: we had no access to the released weights.
Hardware: one GPU; the state is a fifth of that of fine-tuning: docs/guide/fine-tuning.md.
Time:     not measured here.
Data:     a folder, the caption of cat.png in cat.txt; images are cropped to their central square.
Command:  glide-jax train --config lora64 --data.source FOLDER
          glide-jax sample "a caption like yours" --weights openai/base --lora runs/lora64:0.8
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.lora_config import LoRAConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="lora64-paper" if paper else "lora64",
        model=presets.base64_paper() if paper else presets.base64(),
        init_from="runs/cfg64-paper" if paper else "openai/base",
        lora=LoRAConfig(rank=16, alpha=16.0),
        data=DataConfig(workers=4),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=100, ema=0.999),
        steps=5_000,
        batch_size=32,
        caption_dropout=0.2,
        accumulate=4,
        remat=True,
        parallelism="fsdp" if paper else "pmap",
        save_every=500,
        log_every=20,
        sample_every=1000,
        sample_prompts=("a photo of a cat", "a drawing of a house"),
        sample_steps=50,
    )
