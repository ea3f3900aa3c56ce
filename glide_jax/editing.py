"""Changing pictures by the noise that draws them: its way back, variations, and ways between."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.drawing import picture_keys, run, start_noise
from glide_jax.errors import UsageError
from glide_jax.given import Given, name_of
from glide_jax.pictures import Pictures, read_pictures
from glide_jax.prompts import Prompt, mixed, read_prompts

if TYPE_CHECKING:
    from glide_jax.pipeline import Pipeline

# Guidance has no way back: a picture's noise is that of the prompt alone.
UNGUIDED = {"guidance_scale": 1.0, "clip_scale": 0.0}


def _unguided(given: dict[str, Any]) -> dict[str, Any]:
    """What is given, without the guidance of the model's own settings."""
    return given if given.get("guidance") is not None else UNGUIDED | given


def noise_of(
    pipe: Pipeline,
    image: Any,
    prompt: str | Prompt = "",
    *,
    batch_size: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> np.ndarray:
    """The noise that draws a picture, `(N, H, W, 3)` float32: reverse DDIM  (2010.02502, sec. 4.3).

    `pipe(prompt, noise=..., guidance_scale=1, clip_scale=0)` draws the picture again, with a
    sampler that adds no noise; dpm++2m comes closer than ddim does.

    Args:
        image: one or several; see `stream`.
        prompt: what they show.
        **settings: fields of `Settings`; more steps come closer. There is no guidance unless it
            is given, and the sampler is reverse DDIM.

    Raises:
        UsageError, GlideError: see `stream`.
    """
    side = pipe.model.config.image_size
    settings = pipe.settings.changed(**_unguided(settings))
    if pipe.model.config.upsamples:
        raise UsageError(f"{pipe.model.name} is an upsampler: noise_of takes a base model")
    for name in ("restart", "strength", "repaint"):
        if getattr(settings, name) is not None:
            raise UsageError(f"the way from a picture to its noise knows no {name}")
    images = read_pictures(image, side, None)
    prompts = read_prompts(prompt, len(images))
    given = Given(image=images)
    noise = np.empty((len(images), side, side, 3), np.float32)
    keys = picture_keys(0, np.arange(len(images)))
    for index, state, _ in run(
        pipe, prompts, keys, given, settings, batch_size=batch_size, progress=progress, reverse=True
    ):
        noise[index] = state.x
    return noise


def variations(
    pipe: Pipeline,
    image: Any,
    prompt: str = "",
    *,
    amount: float = 0.3,
    caption: str | None = None,
    num: int = 1,
    seed: int = 0,
    first: int = 0,
    **call: Any,
) -> Pictures:
    """Pictures near one: its noise (`noise_of`), turned by `amount` towards fresh noise.

    Args:
        image: a picture; see `stream`.
        prompt: what to draw.
        amount: from 0, the picture itself as the prompt has it, to 1, another picture.
        caption: what the image shows; None: the same as the prompt.
        **call: as in a call; the sampler is "dpm++2m", without guidance, unless they are given.

    Raises:
        UsageError, GlideError: see `stream`.
    """
    if not 0 <= amount <= 1:
        raise UsageError(f"a variation is of an amount from 0 to 1, not {amount}")
    call = {name: value for name, value in call.items() if value is not None}
    shared = {"progress": True}
    shared |= {n: call[n] for n in ("steps", "spacing", "batch_size", "progress") if n in call}
    side = pipe.model.config.image_size
    old = noise_of(
        pipe, read_pictures(image, side, 1), prompt if caption is None else caption, **shared
    )
    new = start_noise(picture_keys(seed, first + np.arange(num))[:, 0], side)
    call = {"sampler": "dpm++2m"} | _unguided(call)
    noise = slerp(old, new, amount)
    pictures = pipe(prompt, num=num, seed=seed, first=first, noise=noise, **call)
    made = {"variation": amount, "image": name_of(image), "caption": caption}
    return replace(pictures, settings=pictures.settings | made)


def between(
    pipe: Pipeline,
    start: str | Prompt,
    end: str | Prompt | None = None,
    *,
    num: int = 8,
    seed: int = 0,
    to_seed: int | None = None,
    first: int = 0,
    **call: Any,
) -> Pictures:
    """`num` pictures on the way from one prompt, and seed, to another, both ends included.

    Text features are mixed linearly, noises along the arc between them (`slerp`); the noise of
    the steps, in samplers that have some, is the same for all.

    Args:
        end: None: `start`. to_seed: None: `seed`.
        first: number of the picture, at both ends.
        **call: as in a call.

    Raises:
        UsageError, GlideError: see `stream`.
    """
    if num < 2:
        raise UsageError(f"between two pictures there are at least 2, not {num}")
    to_seed = seed if to_seed is None else to_seed
    start, end = read_prompts([start, start if end is None else end])
    shares = np.linspace(0, 1, num)
    side = pipe.model.config.image_size
    ends = (start_noise(picture_keys(s, [first])[:, 0], side) for s in (seed, to_seed))
    pictures = pipe(
        [mixed(start, end, share) for share in shares],
        seed=seed,
        first=[first] * num,
        noise=slerp(*ends, shares),
        **call,
    )
    path = {"prompts": [start.text, end.text], "seeds": [seed, to_seed]}
    details = tuple({"between": path | {"share": share}} for share in shares.tolist())
    return replace(pictures, details=details)


def slerp(a: jax.Array, b: jax.Array, share: np.ndarray | float) -> jax.Array:
    """`(sin((1 - s) w) a + sin(s w) b) / sin w`, w the angle between them  (DDIM, 2010.02502,
    app. D.5).

    Between two noises, this stays as far from the origin as they are.

    Args:
        a, b: `(B, H, W, C)`; share: s, a number or one each, from 0 to 1.
    """
    share = jnp.reshape(jnp.asarray(share, jnp.float32), (-1, 1, 1, 1))

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=(1, 2, 3), keepdims=True)

    angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -1, 1))
    # Between equals, and between opposites, there is no arc.
    straight = jnp.sin(angle) < 1e-4
    arc = jnp.where(straight, 1.0, angle)
    first = jnp.where(straight, 1 - share, jnp.sin((1 - share) * arc) / jnp.sin(arc))
    second = jnp.where(straight, share, jnp.sin(share * arc) / jnp.sin(arc))
    return first * a + second * b
