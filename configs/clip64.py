"""clip64: the noised CLIP, for CLIP guidance  (GLIDE, 2112.10741, sec. 4.4 and B.1).

A vision transformer on noised 64x64 images, conditioned on the noise level, and a text transformer,
trained with the objective of CLIP (2103.00020) at every noise level of the base model. Each image
is compared with the captions of the whole batch, over all devices and processes.

Sizes: "released", ViT-B; "paper", ViT-L. Both have patches of 4x4, 390K steps of 32K pairs and
weight decay 0.0125. The paper states these for ViT-L; its last 30K steps, on broader data, are left
out. The paper does not state the rest. These values are those of CLIP (tables 18 and 20): learning
rate, Adam's betas, warm-up, cosine decay, and a learned scale that starts at 1 / 0.07 and stays
below 100.

To start from the released weights, whose scale is the constant 100: `--init-from openai/clip
--model.no-learn-logit-scale --model.logit-scale 100`, and a lower learning rate.

Result:   not trained here at these sizes.
Hardware: the batch is compared as a whole, so gradient accumulation is not possible and memory
          limits it. With a smaller `--batch-size` an image has fewer wrong captions, and the
          model learns less.
Time:     not measured here.
Command:  glide-jax train --config clip64 --data.source FOLDER --batch-size 1024
          glide-jax sample "a red cube" --weights runs/text64 --clip-model runs/clip64 \\
              --clip-guidance-scale 3 --guidance-scale 1 --sampler ddpm --steps 100
"""

from dataclasses import replace

from glide_jax.data.data_config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import CLIPTrainConfig, OptimiserConfig

SIZES = ("released", "paper")


def get_config(size: str = "released") -> CLIPTrainConfig:
    """Return the recipe of a size, one of `SIZES`."""
    paper = size == "paper"
    model = presets.clip64_paper() if paper else presets.clip64()
    return CLIPTrainConfig(
        name="clip64-paper" if paper else "clip64",
        model=replace(model, learn_logit_scale=True, logit_scale=1 / 0.07),
        data=DataConfig(source="coco_captions", workers=8),
        optimiser=OptimiserConfig(
            learning_rate=4e-4 if paper else 5e-4,
            lr_decay="cosine",
            warmup=2000,
            beta_2=0.98,
            epsilon=1e-6,
            weight_decay=0.0125,
        ),
        steps=390_000,
        batch_size=32_768,
        parallelism="fsdp" if paper else "pmap",
        remat=True,
        save_every=5000,
        log_every=100,
    )
