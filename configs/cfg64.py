"""cfg64: classifier-free fine-tuning of the 64x64 model  (GLIDE, 2112.10741, sec. 4.2).

The paper's second stage: the same procedure as the base training, with 20% of the captions
replaced by the empty one, so that the model can be sampled with classifier-free guidance.
Batch size and number of steps are those of the released model's base training (B.1: 1.1M steps and
500K of fine-tuning; the batch is the paper's). Learning rate, Adam's and the average's rates
are not in the paper: they are the defaults of ADM's code (2105.05233 itself trained ImageNet 64x64
at 3e-4).

Result:   not trained here: it is the recipe of a 385M model on a text-image data set of your own.
Hardware: all devices of one host, bfloat16 on TPUs and recent GPUs; memory and speed not measured.
Command:  python train.py --config configs/cfg64.py --data.source FOLDER --init-from base
"""

from glide_jax.models import presets
from glide_jax.training.config import DataConfig, OptimiserConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="cfg64",
        model=presets.base64(),
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000, ema=0.9999),
        steps=500_000,
        batch_size=2048,
        caption_dropout=0.2,
        save_every=5000,
        log_every=100,
        sample_every=10_000,
        sample_prompts=(
            "an oil painting of a corgi",
            "a red cube on top of a blue cube",
            "a boat in the canals of venice",
            "a hedgehog using a calculator",
        ),
        sample_steps=50,
    )
