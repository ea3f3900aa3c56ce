"""From an encoded picture to the square that a network reads."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from glide_jax.data.storage import BrokenRecord

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# JPEG is decoded at 1/2, 1/4 or 1/8 as long as this many of its pixels, along a side, make one of
# ours: at 2 the result differs from averaging the full picture by 3 of 255 (root mean square).
_MARGIN = 2


class Encoded(NamedTuple):
    """A picture file's bytes, and what to call it."""

    data: bytes
    name: str


def load_picture(picture: Encoded, side: int | None = None) -> Image.Image:
    """An RGB picture, upright as its EXIF says, transparency on white.

    Args:
        side: the length that the shorter side will be reduced to; a JPEG is then decoded at a
            fraction of its size where that leaves enough.

    Raises:
        BrokenRecord: the bytes are no picture, a truncated one, or one too large to be honest.
    """
    try:
        image = Image.open(io.BytesIO(picture.data))
        if side is not None:
            scale = min(image.size) // (_MARGIN * side)
            if fraction := next((n for n in (8, 4, 2) if n <= scale), None):
                image.draft(None, (image.width // fraction, image.height // fraction))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except Exception as error:  # the decoders raise anything on bytes made to look right
        # Pillow's own words name a place in memory: another one each time.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known kind" if unknown else str(error) or type(error).__name__
        raise BrokenRecord(
            f"cannot read the picture {picture.name}: {reason:.200}; remove or mend it"
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        # convert() would cut these values off at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def square(
    image: Image.Image | np.ndarray,
    size: int,
    *,
    share: float = 1.0,
    place: tuple[float, float] | None = None,
) -> np.ndarray:
    """A square of an RGB picture, scaled to `(size, size, 3)` uint8.

    Shrinks by averaging areas (no aliasing), as the data of ADM and GLIDE were made; enlarges
    bicubically.

    Args:
        image: loaded, or `(H, W, 3)` uint8.
        share: its side, as a share of the picture's shorter side, in (0, 1].
        place: where it lies, from (0, 0), top left, to (1, 1), bottom right; None: in the middle.

    Raises:
        BrokenRecord: it is an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise BrokenRecord(
                f"a picture must be (H, W, 3) uint8, not {image.shape} {image.dtype}"
            )
        if image.shape[:2] == (size, size) and share == 1:
            return image
        image = Image.fromarray(image)
    side = share * min(image.size)
    if place is None:
        # Whole pixels: a picture of the right height stays as it is.
        left, top = (int((n - side) / 2) for n in image.size)
    else:
        left, top = ((n - side) * at for n, at in zip(image.size, reversed(place), strict=True))
    filter_ = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), filter_, box=box))


def random_square(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, *, least: float
) -> np.ndarray:
    """`square` of random scale and place, as ADM's random crop (2105.05233, code).

    1 / share is uniform between 1 and 1 / `least`, the place uniform over all that fit.
    """
    share = 1 / rng.uniform(1, 1 / least)
    return square(image, size, share=share, place=(rng.random(), rng.random()))
