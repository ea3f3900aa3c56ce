"""Editing through the noise that generates an image: inversion and interpolation."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from glide_jax.errors import UsageError
from glide_jax.pipeline.clip_guide import CLIP
from glide_jax.pipeline.prompts import Prompt
from glide_jax.pipeline.runner import run
from glide_jax.pipeline.sampling_inputs import SamplingInputs
from glide_jax.pipeline.settings import Settings, SettingsArguments
from glide_jax.pipeline.stage import Stage

# Guidance is off by default in inversion, which follows the unguided ODE.
UNGUIDED: SettingsArguments = {
    "guidance_scale": 1.0,
    "guidance_method": "cfg",
    "guidance_rescale": 0.0,
    "negative_prompt": "",
    "autoguidance_scale": 1.0,
    "clip_guidance_scale": 0.0,
}

# An inversion runs all steps, each of them once.
WHOLE: SettingsArguments = {"restart": "none", "strength": "none", "repaint": "none"}


def unguided(settings: SettingsArguments) -> SettingsArguments:
    """Return these settings with guidance off wherever they do not set it.

    Restart sampling, strength and RePaint are off too unless they are set.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    guidance = {} if "guidance" in given else UNGUIDED
    return cast(SettingsArguments, {**WHOLE, **guidance, **given})


def invert_images(
    stage: Stage,
    images: np.ndarray,
    prompts: list[Prompt],
    settings: Settings,
    *,
    clip: CLIP | None = None,
    weak_stage: Stage | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Return the noise that generates images, `(N, H, W, 3)` float32; see `Pipeline.invert`.

    Args:
        images: `(N, H, W, 3)` uint8 of the model's size.

    Raises:
        UsageError: the model is an upsampler, or a setting cannot be inverted.
    """
    if stage.model.config.upsamples:
        raise UsageError(f"{stage.model.name} is an upsampler: inversion needs a base model")
    for name in WHOLE:
        if getattr(settings, name) is not None:
            raise UsageError(f"inversion takes no {name}")
    noise = np.empty(images.shape, np.float32)
    for batch in run(
        stage,
        prompts,
        0,
        np.arange(len(images)),
        SamplingInputs(image=images),
        settings,
        clip=clip,
        weak_stage=weak_stage,
        batch_size=batch_size,
        progress=progress,
        reverse=True,
    ):
        noise[batch.index] = batch.state.x
    return noise


def slerp(a: ArrayLike, b: ArrayLike, share: ArrayLike) -> jax.Array:
    """Spherical interpolation: `(sin((1 - s) w) a + sin(s w) b) / sin w`  (DDIM, app. D.5).

    w is the angle between a and b. The interpolation between two noises is as far from the origin
    as the noises are.

    Args:
        a, b: `(B, H, W, C)`; share: s from 0 to 1, one number or one per image.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    s = jnp.reshape(jnp.asarray(share, jnp.float32), (-1, 1, 1, 1))

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=(1, 2, 3), keepdims=True)

    angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -1, 1))
    # Equal and opposite noises have no arc between them.
    straight = jnp.sin(angle) < 1e-4
    arc = jnp.where(straight, 1.0, angle)
    first_weight = jnp.where(straight, 1 - s, jnp.sin((1 - s) * arc) / jnp.sin(arc))
    second_weight = jnp.where(straight, s, jnp.sin(s * arc) / jnp.sin(arc))
    return first_weight * a + second_weight * b
