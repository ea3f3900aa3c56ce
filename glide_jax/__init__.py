"""glide-jax: text-guided diffusion for generating and editing images  (GLIDE, arXiv 2112.10741).

import glide_jax as glide
pipe = glide.load("emoji64")
pipe("a red apple", num=4).save("samples")
"""

from glide_jax import weights
from glide_jax.diffusion.guidance import (
    Branch,
    Guidance,
    Network,
    Point,
    Prediction,
    apg,
    autoguidance,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    combine_prompts,
    compose,
    dynamic_threshold,
    guidance,
    guidance_rescale,
    image_loss,
    known_pixels,
    per_image,
)
from glide_jax.diffusion.sampling import make_plan, run_plan, stream_plan
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers import SOLVERS, repaint, restart
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.presets import CLIP_PRESETS, PRESETS, CLIPConfig, ModelConfig
from glide_jax.models.unet import GLIDE
from glide_jax.pipeline.clip_guide import CLIP, load_clip
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.loading import load
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.pipeline.stage import GLIDEFunction

__all__ = [
    "CLIP",
    "CLIP_PRESETS",
    "GLIDE",
    "PRESETS",
    "SOLVERS",
    "Branch",
    "CLIPConfig",
    "GLIDEFunction",
    "GlideError",
    "Guidance",
    "Images",
    "ModelConfig",
    "Network",
    "Pipeline",
    "Point",
    "Prediction",
    "Settings",
    "UsageError",
    "apg",
    "autoguidance",
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
    "known_pixels",
    "load",
    "load_clip",
    "make_plan",
    "make_schedule",
    "make_timesteps",
    "per_image",
    "repaint",
    "restart",
    "run_plan",
    "stream_plan",
    "weights",
]
