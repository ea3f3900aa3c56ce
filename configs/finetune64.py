"""finetune64: the released 64x64 model on captioned pictures of your own, on one graphics card.

The text transformer stays as it was released ("text" is frozen), which a few thousand pictures
leave alone best and which saves memory; `--optimiser.freeze` with nothing after it trains it too.
Sizes by what fits, as computed in docs/training.md (no such card was at hand), both with batches of
32 pictures: "16gb" (T4, RTX 4060 Ti, V100), 8 at a time and activations computed again; "24gb" (RTX
3090 and 4090, A10, L4), all at a time. "released" is "24gb"; "paper" goes on from a cfg64:paper of
your own.

20% of the captions are emptied, so that guidance keeps working. Learning rate, steps and the
average's rate are ours, for some thousand pictures: the paper has no such stage. The min-SNR
weighting is for fine-tuning too: `--weighting min-snr`.

Result:   not trained here: the released weights were not at hand.
Hardware: one card of 16 or 24 GB: see above.
Time:     not measured here.
Data:     a folder, the caption of cat.png in cat.txt; pictures are cropped to their middle square.
Command:  python train.py --config configs/finetune64.py:16gb --data.source FOLDER
          python sample.py "a caption like yours" --weights runs/finetune64
"""

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "16gb", "24gb", "paper")


def get_config(size: str = "released") -> TrainConfig:
    paper, small = size == "paper", size == "16gb"
    return TrainConfig(
        name="finetune64-paper" if paper else "finetune64",
        model=presets.base64_paper() if paper else presets.base64(),
        init_from="runs/cfg64-paper" if paper else "openai/base",
        data=DataConfig(workers=4),
        optimiser=OptimiserConfig(
            learning_rate=1e-5, warmup=200, moments="bfloat16", freeze=("text",), ema=0.999
        ),
        steps=10_000,
        batch_size=32,
        caption_dropout=0.2,
        accumulate=4 if small else 1,
        remat=small or paper,
        spread="fsdp" if paper else "pmap",
        save_every=500,
        log_every=20,
        sample_every=1000,
        sample_prompts=("a photo of a cat", "a drawing of a house"),
        sample_steps=50,
    )
