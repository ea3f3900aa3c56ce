"""What a picture is made from beside its caption: an image to change, a hole in it to fill, a small
picture to enlarge, a noise to begin with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import Guidance, known_pixels
from glide_jax.diffusion.sampling import Plan
from glide_jax.errors import UsageError
from glide_jax.models.presets import ModelConfig
from glide_jax.pictures import from_uint8, read_hole, read_pictures
from glide_jax.settings import Settings
from glide_jax.weights.registry import Model


@dataclass(frozen=True)
class Given:
    """What pictures are made from, on the host, one entry each; None: nothing.

    Attributes:
        image: `(N, H, W, 3)` uint8, to start from (`strength`, but for upsamplers) or to keep
            outside of the hole.
        hole: `(N, H, W, 1)` float32, 1 where it is drawn anew.
        low_res: `(N, h, w, 3)` uint8, to enlarge.
        noise: `(N, H, W, 3)` float32, to begin with.
    """

    image: np.ndarray | None = None
    hole: np.ndarray | None = None
    low_res: np.ndarray | None = None
    noise: np.ndarray | None = None

    def rows(self, index: np.ndarray) -> "Given":
        """Those of some pictures."""
        return Given(*(None if a is None else a[index] for a in vars(self).values()))

    def known(self) -> tuple[jax.Array, jax.Array]:
        """The image with a grey hole, `(N, H, W, 3)` in [-1, 1], and 1 where it is known."""
        mask = jnp.asarray(1 - self.hole)
        return from_uint8(self.image) * mask, mask

    def inputs(self, config: ModelConfig) -> dict[str, jax.Array]:
        """What the network is told, beside text and noise."""
        found = {}
        if self.low_res is not None:
            found["low_res"] = from_uint8(self.low_res)
        if self.hole is not None and config.inpaints:
            found["inpaint_image"], found["inpaint_mask"] = self.known()
        return found

    def maps(self) -> tuple[Guidance, ...]:
        """The known region, imposed on each estimate of the picture."""
        if self.hole is None:
            return ()
        image, mask = self.known()
        return (known_pixels(image=image, mask=mask),)

    def start(self, run: Plan, settings: Settings, noise: jax.Array) -> jax.Array:
        """`x_t` of the first row: noise; with a strength `alpha image + sigma noise`  (SDEdit,
        2108.01073), the image of an upsampler being the small one enlarged (2112.05146).
        """
        noise = settings.temperature * (noise if self.noise is None else jnp.asarray(self.noise))
        if settings.strength is None:
            return noise
        if self.low_res is None:
            image = from_uint8(self.image)
        else:
            image = from_uint8(self.low_res)
            image = jax.image.resize(image, noise.shape, "bilinear", antialias=False)
        return run.table.alpha[0] * image + run.table.sigma[0] * noise

    def kept(self, images: np.ndarray) -> np.ndarray:
        """Pictures of 8 bits with the bytes of the image outside of the hole.

        They are there already but for rounding, and for what gradients move and PLMS leaves.
        """
        return images if self.hole is None else np.where(self.hole > 0, images, self.image)


def read_given(
    model: Model,
    settings: Settings,
    count: int,
    *,
    image: Any = None,
    mask: Any = None,
    low_res: Any = None,
    noise: Any = None,
) -> Given:
    """Reads and checks what `count` pictures of a model are made from; see `Pipeline.stream`.

    Raises:
        UsageError: something lacks what it needs, is not what the model takes, or has no effect.
        GlideError: a file cannot be read.
    """
    config, size = model.config, model.config.image_size
    for wrong, says in (
        (low_res is not None and not config.upsamples, f"{model.name} takes no low_res"),
        (
            low_res is None and config.upsamples,
            f"{model.name} enlarges pictures: give it some as low_res",
        ),
        (mask is not None and image is None, "a mask is of an image: give one"),
        (
            settings.strength is not None and image is None and not config.upsamples,
            "strength is of an image: give one",
        ),
        (settings.repaint and mask is None, "repaint fills a hole: give a mask of it"),
        (
            config.upsamples and image is not None and mask is None,
            f"{model.name} takes an image with a mask of the hole to fill, or none",
        ),
        (
            image is not None and mask is None and settings.strength is None,
            "an image needs a mask of the hole to fill, or a strength to redraw it with",
        ),
    ):
        if wrong:
            raise UsageError(says)
    if noise is not None:
        noise = np.asarray(noise, np.float32)
        noise = noise[None] if noise.ndim == 3 else noise
        if noise.shape not in ((1, size, size, 3), (count, size, size, 3)):
            raise UsageError(f"noise is ({size}, {size}, 3), or one for each of {count} pictures")
        noise = np.broadcast_to(noise, (count, size, size, 3))
    return Given(
        image=None if image is None else read_pictures(image, size, count),
        hole=None if mask is None else read_hole(mask, size, count),
        low_res=None if low_res is None else read_pictures(low_res, None, count),
        noise=noise,
    )


def name_of(given: Any) -> str:
    """A file by its name; anything else is "given"."""
    return str(given) if isinstance(given, str | Path) else "given"
