"""Inputs of sampling other than captions: image, mask, small image, noise.

An image to edit, the pixels of it that stay, a small image to enlarge, a noise to start from. A
user's mask is white where the image is regenerated. `known` and `inpaint_known` are 1 where the
pixel is kept.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.data.decoding import from_uint8
from glide_jax.diffusion.guidance import Guidance, known_pixels
from glide_jax.diffusion.sampling import Plan
from glide_jax.errors import UsageError, check_finite
from glide_jax.models.presets import ModelConfig
from glide_jax.pipeline.image_files import Fit, ImageLike, SourceImages, open_images
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.mask_files import MaskLike, SourceMasks, open_masks
from glide_jax.pipeline.settings import Settings
from glide_jax.weights.registry import Model


@dataclass(frozen=True, eq=False)
class SamplingInputs:
    """What a run of images is made from, on the host, one entry per image. An absent input is None.

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

    def select(self, index: np.ndarray) -> "SamplingInputs":
        """Return the entries of some images."""
        return SamplingInputs(*(None if a is None else a[index] for a in vars(self).values()))

    def known_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, grey where it is unknown, `(N, H, W, 3)` in [-1, 1], and `known`."""
        assert self.image is not None and self.known is not None
        return from_uint8(self.image) * self.known, self.known

    def inputs(self, config: ModelConfig) -> dict[str, np.ndarray]:
        """Return the inputs of the network besides text and noise."""
        inputs = {}
        if self.low_res is not None:
            inputs["low_res"] = from_uint8(self.low_res)
        if self.known is not None and config.inpaints:
            inputs["inpaint_image"], inputs["inpaint_known"] = self.known_image()
        return inputs

    def known_pixel_guidance(self) -> tuple[Guidance, ...]:
        """Return the guidance that sets the known pixels in each estimate of the image."""
        if self.known is None:
            return ()
        image, known = self.known_image()
        return (known_pixels(image=image, known=known),)

    def initial_x(self, plan: Plan, settings: Settings, noise: jax.Array) -> jax.Array:
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

        In the samples these pixels differ by rounding, by what gradients move, and by the noise
        that PLMS leaves.
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


class ReadingOptions(TypedDict, total=False):
    """How images and masks are read.

    Attributes:
        fit: "crop" or "pad": how images become squares.
        invert_mask: regenerate what the mask keeps, and keep the rest.
        allow_uniform_mask: accept a mask that keeps, or regenerates, everything.
    """

    fit: Fit
    invert_mask: bool
    allow_uniform_mask: bool


@dataclass(frozen=True, eq=False)
class InputImages:
    """What a run of images is made from, read but of any size; see `SamplingInputs`.

    The stages of a cascade share these images, and each stage resizes them for itself.
    """

    image: SourceImages | None = None
    mask: SourceMasks | None = None
    low_res: SourceImages | None = None
    noise: np.ndarray | None = None
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata: the file of each input, or "array", and how it was read."""
        sources = {"image": self.image, "mask": self.mask}
        names = {key: s.name or "array" for key, s in sources.items() if s is not None}
        names |= {} if self.noise is None else {"noise": "array"}
        default_values = ("crop", False)
        return names | {
            key: value for key, value in self.reading.items() if value not in default_values
        }


def read_input_images(
    image: ImageLike | None,
    mask: MaskLike | None,
    low_res: ImageLike | None,
    side: int,
    **reading: Unpack[ReadingOptions],
) -> InputImages:
    """Read images and masks, and print one note on stderr: what was changed in them.

    Inputs that are already decoded are not mentioned again.

    Args:
        side: side of the result, in a cascade that of the last stage.
        **reading: see `ReadingOptions`.

    Raises:
        UsageError: the mask does not belong to the image, or is uniform.
        GlideError: a file cannot be read.
    """
    notes, fit = [], reading.get("fit", "crop")
    images = None if image is None else open_images(image, side, fit=fit)
    if images is not None and images is not image:
        notes += _change_notes(images, side, "")
    masks = (
        None if mask is None else open_masks(mask, images, invert=reading.get("invert_mask", False))
    )
    if masks is not None and masks is not mask:
        if not reading.get("allow_uniform_mask", False):
            masks.check(side)
        notes.append(masks.note(side))
    small = None if low_res is None else open_images(low_res, side, fit=fit)
    if small is not None and small is not low_res and not isinstance(low_res, Images):
        notes += _change_notes(small, small_side(small, side), "low_res: ")
    if notes:
        print(f"note: {'; '.join(notes)}", file=sys.stderr)
    return InputImages(images, masks, small, reading=reading)


def _change_notes(images: SourceImages, side: int | None, prefix: str) -> list[str]:
    changes = images.changes(side)
    listed = " and ".join([", ".join(changes[:-1]), changes[-1]] if changes[1:] else changes)
    return [f"{prefix}{images.label} was {listed}"] if changes else []


def small_side(images: SourceImages, side: int) -> int | None:
    """Return the side that small images are reduced to, or None if they stay as they are."""
    choose = min if images.fit == "crop" else max
    return side if any(choose(image.size) > side for image in images.images) else None


def read_sampling_inputs(
    model: Model,
    settings: Settings,
    count: int,
    *,
    side: int,
    image: ImageLike | None = None,
    mask: MaskLike | None = None,
    low_res: ImageLike | None = None,
    noise: np.ndarray | None = None,
    **reading: Unpack[ReadingOptions],
) -> tuple[SamplingInputs, InputImages]:
    """Read and check what `count` images of a model are made from; see `Pipeline.stream`.

    Args:
        side: see `read_input_images`.
        **reading: see `ReadingOptions`.

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
    input_images = read_input_images(image, mask, low_res, side, **reading)
    images, masks, small = input_images.image, input_images.mask, input_images.low_res
    sampling_inputs = SamplingInputs(
        image=None if images is None else images.squares(size, count),
        known=None if masks is None else masks.known(size, count),
        low_res=None if small is None else small.squares(small_side(small, size), count),
        noise=noise,
    )
    return sampling_inputs, replace(input_images, noise=noise)
