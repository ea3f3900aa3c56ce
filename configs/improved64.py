"""improved64: the 64x64 model, with methods published after the paper.

The networks of text64 and cfg64, trained once instead of twice, from random weights:
- v-prediction (2202.00512): the loss also trains the noisiest levels, where noise prediction
  contains almost no information about the image;
- min-SNR weighting with gamma 5 (2303.09556), which reports 3.4 times faster convergence;
- 10% empty captions from the start, instead of a second training;
- post-hoc EMA (EDM2, 2312.02696): two power-function EMAs of the weights. After training,
  `glide-jax weights ema` computes an EMA of any width between them; compare samples to choose one.

To start from weights that predict noise (openai/base), set `--prediction-type eps` and a
learning rate of 1e-4 or less. Batch, steps and the rest as in text64.

Result:   not trained here at these sizes; the embedded model (configs/emoji64.py) needed
          v-prediction to learn large shapes in few steps.
Hardware: as text64, and two more copies of the weights: docs/guide/training.md.
Time:     not measured here.
Command:  glide-jax train --config improved64 --data.source FOLDER
          glide-jax weights ema runs/improved64 --width 0.07 --out weights
"""

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    return TrainConfig(
        name="improved64-paper" if paper else "improved64",
        model=presets.base64_paper() if paper else presets.base64(),
        prediction_type="v",
        weighting="min-snr",
        caption_dropout=0.1,
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(
            learning_rate=1e-4 if paper else 3e-4,
            warmup=5000,
            # The widths that EDM2 keeps; a snapshot every ten million images.
            ema_widths=(0.05, 0.10),
            ema_snapshot_every=5000,
        ),
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
            "a boat in the canals of venice",
        ),
        sample_steps=50,
    )
