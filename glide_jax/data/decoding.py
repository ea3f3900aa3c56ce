"""Decoding and cropping: from an encoded image to the square that a network reads."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from glide_jax.data.storage import BrokenRecord

# A JPEG is decoded at 1/2, 1/4 or 1/8 if at least this many of its pixels, along a side, make one
# output pixel. With 2 the result differs from averaging the full image by 3 of 255 (root mean
# square).
_MARGIN = 2


class Encoded(NamedTuple):
    """The bytes of an image file, and its name in messages."""

    data: bytes
    name: str


def load_image(encoded: Encoded, side: int | None = None) -> Image.Image:
    """Return the RGB image, upright according to its EXIF, composed on white.

    Args:
        encoded: the image file.
        side: length to which the shorter side will be reduced. A JPEG is then decoded at a
            fraction of its size if that leaves enough pixels.

    Raises:
        BrokenRecord: the bytes are no image, a truncated one, or suspiciously large.
    """
    try:
        image = Image.open(io.BytesIO(encoded.data))
        if side is not None:
            scale = min(image.size) // (_MARGIN * side)
            if fraction := next((n for n in (8, 4, 2) if n <= scale), None):
                image.draft(None, (image.width // fraction, image.height // fraction))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except Exception as error:  # decoders raise errors of any kind on malformed bytes
        # Pillow's message names an address in memory, another one each time.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if unknown else str(error) or type(error).__name__
        raise BrokenRecord(
            f"cannot read the image {encoded.name}: {reason:.200}; remove or repair it"
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        # convert() would clip these values at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def square(
    image: Image.Image | np.ndarray,
    size: int,
    *,
    share: float = 1.0,
    position: tuple[float, float] | None = None,
) -> np.ndarray:
    """Return a square crop of an RGB image, scaled to `(size, size, 3)` uint8.

    It is shrunk by averaging areas (no aliasing), like the data of ADM and GLIDE, and enlarged
    bicubically.

    Args:
        image: a loaded image, or `(H, W, 3)` uint8.
        size: height and width of the result.
        share: side of the square, as a share of the shorter side of the image, in (0, 1].
        position: where the square lies, vertically and horizontally, from (0, 0), top left, to
            (1, 1), bottom right. None: the centre.

    Raises:
        BrokenRecord: the array has another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise BrokenRecord(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
        if image.shape[:2] == (size, size) and share == 1:
            return image
        image = Image.fromarray(image)
    side = share * min(image.size)
    if position is None:
        # Whole pixels: an image of the right height keeps its pixel values.
        left, top = (int((n - side) / 2) for n in image.size)
    else:
        left, top = ((n - side) * at for n, at in zip(image.size, reversed(position), strict=True))
    filter_ = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), filter_, box=box))


def random_square(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, *, min_share: float
) -> np.ndarray:
    """Return a `square` of random scale and position, as in the code of ADM (2105.05233).

    1 / share is uniform in [1, 1 / `min_share`]. The position is uniform over all squares of that
    side in the image.
    """
    share = 1 / rng.uniform(1, 1 / min_share)
    return square(image, size, share=share, position=(rng.random(), rng.random()))


def random_window(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return `(size, size, 3)` uint8, cut out of an image at a random place, its pixels unchanged.

    Raises:
        BrokenRecord: the image is smaller, or no `(H, W, 3)` uint8.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise BrokenRecord(f"an image must be (H, W, 3) uint8, not {pixels.shape} {pixels.dtype}")
    if min(pixels.shape[:2]) < size:
        raise BrokenRecord(f"an image of {pixels.shape[:2]} has no window of {size} pixels")
    top, left = window_corner(pixels.shape[:2], size, rng)
    return pixels[top : top + size, left : left + size]


def window_corner(shape: tuple[int, int], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a random window, uniform over all of an image `(H, W)`."""
    top, left = (int(rng.integers(side - size + 1)) for side in shape)
    return top, left
