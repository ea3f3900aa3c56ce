"""upsample256: the upsampler from 64x64 to 256x256  (GLIDE, 2112.10741, sec. 4.1).

It is given the caption and the small picture, which training makes by averaging 4x4 pixels and
rounding to 8 bits. Sizes: "released", the 398M model of GLIDE (filtered), 400K steps (B.1);
"paper", the 1.5B model, 1.6M steps of 512 pictures (4.1).

Not in the paper, and from elsewhere: the filtered model's batch (here the large one's), the linear
schedule and dropout 0.1 (the released code's), averaging and learning rate (2105.05233 trained
its upsampler of this shape at 1e-4, with batches of 256), warm-up and clipping (ours).

The paper's upsampler sees perfect small pictures only, and enlarges the faults of generated ones.
Noise-conditioning augmentation (CDM, 2106.15282, sec. 4.2) adds noise of a level that the network
is told: configs/improved256.py, or here

    --model.low-res-level --low-res-noise 0.5

Result:   not trained here. For GLIDE's see text64.
Hardware: a TPU or GPU host, bfloat16; what fits where: docs/training.md and `--dry-run`.
Time:     not measured here.
Command:  python train.py --config configs/upsample256.py --data.source FOLDER
          python sample.py "a red cube" --weights runs/cfg64 --upsampler runs/upsample256
"""

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    paper = size == "paper"
    return TrainConfig(
        name="upsample256-paper" if paper else "upsample256",
        model=presets.upsample256_paper() if paper else presets.upsample256(),
        schedule="linear",
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup=1000),
        steps=1_600_000 if paper else 400_000,
        batch_size=512,
        spread="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small pictures to enlarge.
        sample_every=0,
        sample_steps=27,
        # It never saw the empty caption: the release upsamples without guidance.
        sample_guidance_scale=1.0,
    )
