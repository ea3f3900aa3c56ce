"""A pipeline with an exact denoiser in place of a network.

Each caption is a colour; its images have that colour with independent normal pixels. The best
denoiser of such images is known exactly, and so is what every sampler should generate.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.devices.placement import Placement
from glide_jax.diffusion.guidance import Network
from glide_jax.pipeline.pipeline import Pipeline
from glide_jax.pipeline.settings import Settings
from glide_jax.weights.registry import Model
from tests.support.commands import TINY

SPREAD = 0.1  # standard deviation of a pixel
COLOURS = {
    "": (0.0, 0.0, 0.0),
    "red": (0.3, -0.2, -0.1),
    "green": (-0.1, 0.3, -0.2),
    "blue": (-0.2, -0.1, 0.25),
}
# Images that each network evaluated, by its name.
EVALUATED: dict[str, int] = {}


def colour(caption: str) -> np.ndarray:
    """`(3,)`, in [-1, 1]."""
    return np.array(COLOURS[caption], np.float32)


@dataclass(frozen=True)
class Oracle:
    """`E[eps | x_t]` of the images of a caption, and the variance `beta_tilde`.

    params: the schedule's half log-SNR.

    With a small image, the mean is that image enlarged, rather than the colour.
    """

    name: str
    shift: float = 0.0
    count: bool = False

    def __call__(self, params, x, t, cond):
        if self.count:
            jax.debug.callback(self.counted, x.shape[0])
        half_log_snr = jnp.interp(t, jnp.arange(len(params)), params)[:, None, None, None]
        alpha, sigma = (
            jnp.sqrt(jax.nn.sigmoid(2 * half_log_snr)),
            jnp.sqrt(jax.nn.sigmoid(-2 * half_log_snr)),
        )
        mean = cond["text"][:, None, None, :] + self.shift
        if "low_res" in cond:
            mean = jax.image.resize(cond["low_res"], x.shape, "nearest")
        eps = sigma * (x - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)
        return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)

    def counted(self, images):
        EVALUATED[self.name] = EVALUATED.get(self.name, 0) + int(images)


@dataclass(frozen=True, eq=False)
class ExactPipeline(Pipeline):
    """The pipeline of an oracle."""

    oracle: Oracle = field(default_factory=lambda: Oracle("main"))

    @cached_property
    def network(self) -> Network:
        levels = jnp.float32(self.schedule.half_log_snr(np.arange(len(self.schedule))))
        return Network(self.oracle, Placement(self.devices).replicate(levels))

    def encode_captions(self, captions):
        return jnp.stack([colour(caption) for caption in captions])


def exact_pipeline(
    variant: str = "base", size: int = 8, oracle: Oracle | None = None, **options
) -> ExactPipeline:
    """Return a pipeline of 10 steps without guidance, unless `settings` has others."""
    settings = Settings().changed(
        **{"steps": 10, "guidance_scale": 1.0} | options.pop("settings", {})
    )
    model = Model(f"exact {variant}", replace(TINY, variant=variant, image_size=size), {})
    return ExactPipeline(
        model, "float32", settings=settings, oracle=oracle or Oracle("main"), **options
    )


def pixels(image: np.ndarray) -> np.ndarray:
    """`0..255 -> [-1, 1]`."""
    return np.asarray(image, np.float64) / 127.5 - 1
