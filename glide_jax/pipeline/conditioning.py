"""What images are made from besides their caption.

An image to edit, the pixels of it that stay, a small image to enlarge, a noise to start from. A
user's mask is white where the image is regenerated; inside the program there is one convention,
`known`: 1 where the pixel is kept.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import Guidance, known_pixels
from glide_jax.diffusion.sampling import Plan
from glide_jax.errors import UsageError, check_finite
from glide_jax.models.presets import ModelConfig
from glide_jax.pipeline.image_files import read_images, read_known
from glide_jax.pipeline.images import from_uint8
from glide_jax.pipeline.settings import Settings
from glide_jax.weights.registry import Model


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a run of images is made from, on the host, one entry per image; None: nothing.

    Attributes:
        image: `(N, H, W, 3)` uint8: the start of img2img (`strength`), or the image whose known
            pixels stay.
        known: `(N, H, W, 1)` float32, 1 where the image is kept.
        low_res: `(N, h, w, 3)` uint8, to enlarge.
        noise: `(N, H, W, 3)` float32, to start from.
    """

    image: np.ndarray | None = None
    known: np.ndarray | None = None
    low_res: np.ndarray | None = None
    noise: np.ndarray | None = None

    def select(self, index: np.ndarray) -> "Conditioning":
        """Return the entries of some images."""
        return Conditioning(*(None if a is None else a[index] for a in vars(self).values()))

    def known_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, grey where it is unknown, `(N, H, W, 3)` in [-1, 1], and `known`."""
        assert self.image is not None and self.known is not None
        return from_uint8(self.image) * self.known, self.known

    def inputs(self, config: ModelConfig) -> dict[str, np.ndarray]:
        """Return the inputs of the network besides text and noise."""
        found = {}
        if self.low_res is not None:
            found["low_res"] = from_uint8(self.low_res)
        if self.known is not None and config.inpaints:
            found["inpaint_image"], found["inpaint_mask"] = self.known_image()
        return found

    def known_pixel_guidance(self) -> tuple[Guidance, ...]:
        """Return the guidance that sets the known pixels in each estimate of the image."""
        if self.known is None:
            return ()
        image, known = self.known_image()
        return (known_pixels(image=image, known=known),)

    def start(self, plan: Plan, settings: Settings, noise: jax.Array) -> jax.Array:
        """Return `x_t` of the first row: noise, or `alpha image + sigma noise` with a strength.

        That is SDEdit (2108.01073); an upsampler starts from the small image, enlarged
        (2112.05146).
        """
        noise = noise if self.noise is None else jnp.asarray(self.noise)
        temperature = np.float32(settings.temperature)
        if settings.strength is None:
            return _noised(None, noise, temperature, None, None)
        image = self.image if self.low_res is None else self.low_res
        assert image is not None
        alpha, sigma = plan.table.alpha[0], plan.table.sigma[0]
        return _noised(from_uint8(image), noise, temperature, alpha, sigma)

    def restore_known(self, images: np.ndarray) -> np.ndarray:
        """Return 8-bit images with the exact bytes of the known pixels.

        The samples have them up to rounding, and up to what gradients move and PLMS leaves.
        """
        if self.known is None:
            return images
        assert self.image is not None
        return np.where(self.known > 0, self.image, images)


@jax.jit
def _noised(image: Any, noise: jax.Array, temperature: Any, alpha: Any, sigma: Any) -> jax.Array:
    noise = temperature * noise
    if image is None:
        return noise
    if image.shape != noise.shape:
        image = jax.image.resize(image, noise.shape, "bilinear", antialias=False)
    return alpha * image + sigma * noise


def read_conditioning(
    model: Model,
    settings: Settings,
    count: int,
    *,
    image: Any = None,
    mask: Any = None,
    low_res: Any = None,
    noise: Any = None,
) -> Conditioning:
    """Read and check what `count` images of a model are made from; see `Pipeline.stream`.

    Raises:
        UsageError: something is missing, is not what the model takes, or has no effect.
        GlideError: a file cannot be read.
    """
    config, size = model.config, model.config.image_size
    for wrong, message in (
        (low_res is not None and not config.upsamples, f"{model.name} takes no low_res"),
        (
            low_res is None and config.upsamples,
            f"{model.name} is an upsampler: give it small images as low_res",
        ),
        (mask is not None and image is None, "a mask belongs to an image: give one"),
        (
            settings.strength is not None and image is None and not config.upsamples,
            "strength is for editing an image: give one",
        ),
        (settings.repaint and mask is None, "repaint is for inpainting: give a mask"),
        (
            config.upsamples and image is not None and mask is None,
            f"{model.name} takes an image only with a mask of the region to fill",
        ),
        (
            image is not None and mask is None and settings.strength is None,
            "an image needs a mask of the region to fill, or a strength for img2img",
        ),
    ):
        if wrong:
            raise UsageError(message)
    if noise is not None:
        noise = np.asarray(noise, np.float32)
        noise = noise[None] if noise.ndim == 3 else noise
        if noise.shape not in ((1, size, size, 3), (count, size, size, 3)):
            raise UsageError(f"noise is ({size}, {size}, 3), or one for each of {count} images")
        check_finite({"noise": noise})
        noise = np.broadcast_to(noise, (count, size, size, 3))
    return Conditioning(
        image=None if image is None else read_images(image, size, count),
        known=None if mask is None else read_known(mask, size, count),
        low_res=None if low_res is None else read_images(low_res, None, count),
        noise=noise,
    )


def source_name(source: Any) -> str:
    """Return a file's name for the metadata; "array" for anything else."""
    return str(source) if isinstance(source, str | Path) else "array"
