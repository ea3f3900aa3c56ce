"""A pipeline without a network, whose pictures are known: each caption is a colour, its pictures
are of that colour with independent normal pixels, and of these the best denoiser is exact."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.batches import Place
from glide_jax.diffusion.guidance import Network
from glide_jax.pipeline import Pipeline
from glide_jax.settings import Settings
from glide_jax.weights.registry import Model
from tests.commands import TINY

SPREAD = 0.1  # standard deviation of a pixel
COLOURS = {
    "": (0.0, 0.0, 0.0),
    "red": (0.3, -0.2, -0.1),
    "green": (-0.1, 0.3, -0.2),
    "blue": (-0.2, -0.1, 0.25),
}
# Images that each network was given, by its name; counted as they run.
EVALUATED: dict[str, int] = {}


def colour(caption: str) -> np.ndarray:
    """`(3,)`, in [-1, 1]."""
    return np.array(COLOURS[caption], np.float32)


@dataclass(frozen=True)
class Oracle:
    """`E[eps | x_t]` of the pictures of a caption; params: the schedule's log-SNR.

    Where a small picture is given, that one enlarged takes the place of the colour.
    """

    name: str
    shift: float = 0.0
    count: bool = False

    def __call__(self, params, x, t, cond):
        if self.count:
            jax.debug.callback(self.counted, x.shape[0])
        log_snr = jnp.interp(t, jnp.arange(len(params)), params)[:, None, None, None]
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(2 * log_snr)), jnp.sqrt(jax.nn.sigmoid(-2 * log_snr))
        mean = cond["text"][:, None, None, :] + self.shift
        if "low_res" in cond:
            mean = jax.image.resize(cond["low_res"], x.shape, "nearest")
        return sigma * (x - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)

    def counted(self, images):
        EVALUATED[self.name] = EVALUATED.get(self.name, 0) + int(images)


@dataclass(frozen=True)
class Painter(Pipeline):
    """The pipeline of an oracle."""

    oracle: Oracle = field(default_factory=lambda: Oracle("main"))

    @cached_property
    def network(self) -> Network:
        levels = jnp.float32(self.schedule.log_snr(np.arange(len(self.schedule))))
        return Network(self.oracle, Place(self.devices).everywhere(levels))

    def text_features(self, captions):
        return jnp.stack([colour(caption) for caption in captions])


def painter(variant: str = "base", size: int = 8, oracle: Oracle | None = None, **given) -> Painter:
    """A pipeline of 10 steps without guidance, unless `settings` says more."""
    settings = Settings().changed(
        **{"steps": 10, "guidance_scale": 1.0} | given.pop("settings", {})
    )
    model = Model(f"{variant} painter", replace(TINY, variant=variant, image_size=size), {})
    return Painter(model, "float32", settings, oracle=oracle or Oracle("main"), **given)


def pixels(image: np.ndarray) -> np.ndarray:
    """`0..255 -> [-1, 1]`."""
    return np.asarray(image, np.float64) / 127.5 - 1
