"""Decoding and cropping: from an encoded image to the square that a network reads.

Training and editing read images by the same function, `decode`.
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from glide_jax.data import storage
from glide_jax.data.modes import settle_transparent_colour, to_rgb
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError

# A JPEG is decoded at 1/2, 1/4 or 1/8 if at least this many of its pixels, along a side, make one
# output pixel. With 2 the result differs from averaging the full image by 3 of 255 (root mean
# square).
_MARGIN = 2
# The largest number of pixels that is decoded; without it twice `PIL.Image.MAX_IMAGE_PIXELS`.
MAX_PIXELS = "GLIDE_JAX_MAX_PIXELS"
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_pillow = threading.Lock()


class Encoded(NamedTuple):
    """The bytes of an image file, and its name in messages."""

    data: bytes
    name: str


class Upright(NamedTuple):
    """A loaded image, upright, in the mode of its file.

    Attributes:
        image: may be smaller than `size`: a JPEG decoded at a fraction.
        size: width and height of the upright image in the file.
        orientation: EXIF orientation in the file, from 1 to 8; 1 is upright.
        changes: what was changed, such as "turned upright".
    """

    image: Image.Image
    size: tuple[int, int]
    orientation: int
    changes: tuple[str, ...]


def load_image(encoded: Encoded, side: int | None = None) -> Image.Image:
    """Return the RGB image, upright according to its EXIF, composed on white; see `decode`."""
    return decode(encoded, side).image


def decode(source: Encoded | Image.Image, side: int | None = None) -> Upright:
    """Return an image as RGB: upright according to its EXIF, composed on white, 8 bits.

    Args:
        source: the image file, or an image of any mode; of several frames the first is taken.
        side: length to which the shorter side will be reduced. A JPEG is then decoded at a
            fraction of its size if that leaves enough pixels.

    Raises:
        BrokenRecord: the bytes are no image, a truncated one, or suspiciously large; or the values
            of its pixels cannot be understood.
    """
    decoded = load_upright(source, side)
    with _named(source):
        image, changes = to_rgb(decoded.image)
    return decoded._replace(image=image, changes=(*decoded.changes, *changes))


def load_upright(source: Encoded | Image.Image, side: int | None = None) -> Upright:
    """Return an image in its own mode, upright; for arguments and errors see `decode`."""
    with _named(source):
        changes: list[str] = []
        if isinstance(source, Encoded):
            image, size = _open_small(source.data, side)
            # MPO files hold several photos of one shot, PSD files their layers.
            if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
                count = getattr(image, "n_frames", "several")
                changes.append(f"reduced to the first of {count} frames")
        else:
            image, size = source, source.size
        # Before anything that loads the pixels.
        layouts = [tile[3] for tile in getattr(image, "tile", ())]
        orientation = exif_orientation(image)
        image.load()
        if image.format == "PNG" and "transparency" in image.info:
            low = None
            if isinstance(source, Encoded) and "RGB;16B" in layouts:
                low = _low_bytes(source.data)
            image = settle_transparent_colour(image, layouts, low)
        if image.format == "TIFF":  # Pillow has turned it
            size = image.size
        elif orientation != 1:
            image = turned(image, orientation)
            size = (size[1], size[0]) if orientation > 4 else size
        if orientation != 1:
            changes.append("turned upright")
    return Upright(image, size, orientation, tuple(changes))


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image that was stored with an EXIF orientation, upright."""
    if orientation == 1:
        return image
    result = image.transpose(_TURNS[orientation])
    result.format = image.format
    return result


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, from 1 to 8; 1 if it has none or a broken one."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed EXIF raises errors of any kind; the pixels are whole
        return 1
    return orientation if orientation in _TURNS else 1


def size_of(encoded: Encoded) -> tuple[int, int]:
    """Return width and height of an image as it is stored; it is not decoded.

    Raises:
        BrokenRecord: the bytes are no image.
    """
    with _named(encoded):
        return _open(encoded.data).size


def size_of_file(path: str) -> tuple[int, int]:
    """Return width and height of an image in a file, of which only the beginning is read.

    Raises:
        BrokenRecord: the file is no image, or cannot be read.
    """
    try:
        return storage.read_with(path, lambda file: _open(file).size)
    except GlideError as error:
        raise BrokenRecord(str(error)) from None


def _open(data: bytes | IO[bytes]) -> Image.Image:
    """Open an image without Pillow's limit of pixels: see `_check_pixels`."""
    # The lock is held while a header is read, no longer.
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open_small(data: bytes, side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image to load, a JPEG at a fraction for `side`, and its full size."""
    image = _open(data)
    size = image.size
    if side is not None:
        scale = min(size) // (_MARGIN * side)
        if fraction := next((n for n in (8, 4, 2) if n <= scale), None):
            image.draft(None, (image.width // fraction, image.height // fraction))
    _check_pixels(image.size)
    return image, size


def _check_pixels(size: tuple[int, int]) -> None:
    with _pillow:
        own = Image.MAX_IMAGE_PIXELS
    text = os.environ.get(MAX_PIXELS, "").replace("_", "")
    if text and not text.isdecimal():
        raise UsageError(f"{MAX_PIXELS} is a number of pixels, not {text!r:.40}")
    limit = int(text) if text else None if own is None else 2 * own
    if limit is not None and size[0] * size[1] > limit:
        raise ValueError(
            f"it has {size[0]} x {size[1]} pixels, more than the limit of {limit:,} (a "
            f"decompression bomb?): if it is genuine, set {MAX_PIXELS}={size[0] * size[1]}"
        )


def _low_bytes(data: bytes) -> np.ndarray:
    """Return the lower bytes of 16-bit RGB: the file is read as if they came first."""
    image = cast(ImageFile.ImageFile, _open(data))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


@contextmanager
def _named(source: Encoded | Image.Image) -> Iterator[None]:
    """Make one line, with the name of the image, of whatever a decoder raises."""
    try:
        yield
    except GlideError:
        raise
    except Exception as error:  # decoders raise errors of any kind on malformed bytes
        # Pillow's message names an address in memory, another one each time.
        unknown = isinstance(error, UnidentifiedImageError) or "decoder object" in str(error)
        if unknown and isinstance(source, Encoded):
            reason = _unidentified(source.data)
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        advice = "" if ": " in reason else "; remove or repair it"
        raise BrokenRecord(
            f"cannot read the image {name_of(source)}: {reason:.240}{advice}"
        ) from None


def name_of(source: Encoded | Image.Image) -> str:
    """Return the name of an image for messages."""
    if isinstance(source, Encoded):
        return source.name
    return str(getattr(source, "filename", "") or "in memory")


_HEADS = (
    (b"\x89PNG", "it is a broken or truncated PNG file"),
    (b"\xff\xd8\xff", "it is a broken or truncated JPEG file"),
    (b"GIF8", "it is a broken or truncated GIF file"),
    (b"RIFF", "it is a broken or truncated WebP file"),
    (b"BM", "it is a broken or truncated BMP file"),
    (b"II*\0", "it is a broken TIFF file, or a camera's raw file: export it as PNG or JPEG"),
    (b"MM\0*", "it is a broken TIFF file, or a camera's raw file: export it as PNG or JPEG"),
    (b"%PDF", "it is a PDF document: export the page as PNG"),
    (b"PK\3\4", "it is a zip archive: unpack it"),
    (b"\xff\x0a", "JPEG XL is not supported: convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL is not supported: convert it to PNG or JPEG"),
    (b"version https://git-lfs", "it is a Git LFS pointer: run `git lfs pull`"),
    (b"<svg", "it is an SVG drawing: export it as PNG"),
    (b"<?xml", "it is an SVG drawing or another XML file: export it as PNG"),
    (b"<!doctype html", "it is a web page: download the image itself"),
    (b"<html", "it is a web page: download the image itself"),
)


def _unidentified(data: bytes) -> str:
    """Return why bytes are not an image, as far as their beginning tells."""
    if not data:
        return "it is empty (0 bytes)"
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
            return "HEIC is not supported: convert it to JPEG or PNG"
        if data[8:12] in (b"avif", b"avis"):
            return "it is a broken AVIF file, or this Pillow reads none: convert it to PNG or JPEG"
        return "it is a video: export a frame as PNG"
    start = data[:64].lstrip().lower()
    reasons = (why for head, why in _HEADS if data.startswith(head) or start.startswith(head))
    return next(reasons, "its format is unknown")


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


def from_uint8(images: Any) -> Any:
    """Map pixels of 0 to 255 to [-1, 1] float32, the range of a network; numpy stays numpy."""
    return images.astype(np.float32) / np.float32(127.5) - 1
