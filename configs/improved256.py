"""improved256: the upsampler from 64x64 to 256x256, with methods published after the paper.

The network of upsample256, and
- noise-conditioning augmentation (CDM, 2106.15282, sec. 4.2): the small image is noised at a random
  level in the first half of the diffusion process, and the network is conditioned on this level, so
  that it learns to tolerate artefacts of generated images; in sampling the level is "no noise";
- v-prediction (2202.00512) and min-SNR weighting (2303.09556);
- post-hoc EMA (EDM2, 2312.02696): see improved64.

To start from weights that were trained without these (openai/upsample), set `--prediction-type
eps`: the layers of the noise level are initialised to zero effect. Batch, steps and the rest are as
in upsample256.

Result:   not trained here at these sizes.
Hardware: as upsample256, and two more copies of the weights: docs/guide/training.md.
Time:     not measured here.
Command:  glide-jax train --config improved256 --data.source FOLDER
"""

from dataclasses import replace

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> TrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    model = presets.upsample256_paper() if paper else presets.upsample256()
    return TrainConfig(
        name="improved256-paper" if paper else "improved256",
        model=replace(model, low_res_timestep=True),
        noise_schedule="linear",
        prediction_type="v",
        weighting="min-snr",
        low_res_timestep_share=0.5,
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(
            learning_rate=1e-4, warmup=1000, ema_widths=(0.05, 0.10), ema_snapshot_every=5000
        ),
        steps=1_600_000 if paper else 400_000,
        batch_size=512,
        parallelism="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
        # A grid would need small images to enlarge.
        sample_every=0,
        sample_steps=27,
        sample_guidance_scale=1.0,
    )
