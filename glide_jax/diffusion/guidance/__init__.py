"""Guidance: functions from a noise prediction to a noise prediction.

A guidance is a pure function `Predict -> Predict` inside a small host-side record, `Guidance`,
that says which branches the network must evaluate, which parameters it takes, and at which noise
levels it acts. Guidances are applied left to right, innermost first: `[a, b]` is `b(a(predict))`.
List them in this order:

1. linear guidance, by differences of branches (`linear.py`): `autoguidance`, and one of
   `classifier_free`, `combine_prompts`, `cfg_plus_plus` and `apg`; they add up, in any order;
2. maps of `x_0` (`x_0_maps.py`), each on the result of the one before: `guidance_rescale`,
   `dynamic_threshold`, `known_pixels`, `clamp_x_0`;
3. gradients (`gradients.py`): `classifier_guidance` reads `x_t`; `image_loss` reads the `x_0` that
   results from the guidances listed before it. The sampler adds their gradient after clipping.

CLIP guidance is `classifier_guidance` with the noised CLIP of `glide_jax.pipeline.clip_guide`:
`mu + s Sigma grad(k f(x_t) . g(c))` with ancestral samplers, where k is the CLIP's logit scale.
Other samplers add `s sigma^2 / alpha` times the gradient to `x_0`.

Every number may be a scalar or have one value per image, `(B,)`.
"""

from glide_jax.diffusion.guidance.gradients import classifier_guidance, image_loss
from glide_jax.diffusion.guidance.interface import (
    Guidance,
    apply_guidances,
    branches_of,
    compose,
    guidance,
    per_image,
)
from glide_jax.diffusion.guidance.linear import (
    apg,
    autoguidance,
    cfg_plus_plus,
    classifier_free,
    combine_prompts,
)
from glide_jax.diffusion.guidance.predictor import (
    CAPTION,
    NULL,
    WEAK,
    Branch,
    Network,
    Number,
    Point,
    Predict,
    Prediction,
    is_network,
    noise_predictor,
)
from glide_jax.diffusion.guidance.x_0_maps import (
    clamp_x_0,
    dynamic_threshold,
    guidance_rescale,
    known_pixels,
)

__all__ = [
    "CAPTION",
    "NULL",
    "WEAK",
    "Branch",
    "Guidance",
    "Network",
    "Number",
    "Point",
    "Predict",
    "Prediction",
    "apg",
    "apply_guidances",
    "autoguidance",
    "branches_of",
    "cfg_plus_plus",
    "clamp_x_0",
    "classifier_free",
    "classifier_guidance",
    "combine_prompts",
    "compose",
    "dynamic_threshold",
    "guidance",
    "guidance_rescale",
    "image_loss",
    "is_network",
    "known_pixels",
    "noise_predictor",
    "per_image",
]
