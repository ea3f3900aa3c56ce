"""Reading images to edit from files, PIL images and arrays, as training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from glide_jax.data import storage
from glide_jax.data.decoding import Encoded, Upright, decode, square
from glide_jax.data.modes import UnfitPixels, to_bytes
from glide_jax.errors import GlideError, UsageError
from glide_jax.pipeline.images import Images

Fit = Literal["crop", "pad"]
FITS = ("crop", "pad")


@dataclass(frozen=True, eq=False)
class SourceImages:
    """Images of any size, read and upright.

    Attributes:
        images: RGB images; their sizes and orientations in the file are in them.
        name: the file; empty if there is none.
        fit: how they become squares: "crop", the centre, or "pad", with white.
    """

    images: tuple[Upright, ...]
    name: str = ""
    fit: Fit = "crop"

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.name or "the image"

    def squares(self, size: int | None, count: int | None) -> np.ndarray:
        """Return the images as squares: `(count, size, size, 3)` uint8.

        Args:
            size: side of the squares; None: the shorter (longer, if padded) side of the image.
            count: the number of images needed, unless there is one for all; None: any number.

        Raises:
            UsageError: there is neither one image nor one for each.
        """
        count = len(self.images) if count is None else count
        if len(self.images) not in (1, count):
            raise UsageError(
                f"{len(self.images)} images for {count} prompts: give one, or one each"
            )
        if size is None:
            side = min if self.fit == "crop" else max
            sides = {side(upright.image.size) for upright in self.images}
            if len(sides) > 1:
                raise UsageError(f"{self.label} has several sizes: make them equal")
            size = sides.pop()
        squares = np.stack([to_square(upright.image, size, self.fit) for upright in self.images])
        return np.broadcast_to(squares, (count, *squares.shape[1:]))

    def changes(self, size: int | None) -> list[str]:
        """Return what is done to the images to make squares of them, such as "turned upright"."""
        changes = [c for image in self.images for c in image.changes]
        changes += [c for image in self.images for c in _fitting(image.size, size, self.fit)]
        return list(dict.fromkeys(changes))


# What an image can be given as: a file, a PIL image, an array `(H, W)`, `(H, W, C)` or
# `(N, H, W, C)`, or a list of these.
ImageLike = str | Path | Image.Image | np.ndarray | Images | SourceImages | Sequence[Any]


def _fitting(size: tuple[int, int], side: int | None, fit: Fit) -> list[str]:
    width, height = size
    changes, now = [], min(size) if fit == "crop" else max(size)
    if width != height:
        how = "cropped to its central" if fit == "crop" else "padded with white to"
        changes.append(f"{how} {now}x{now} of {width}x{height}")
    if side is not None and now != side:
        changes.append(
            f"{'reduced' if now > side else 'enlarged'} from {now}x{now} to {side}x{side}"
        )
    return changes


def to_square(image: Image.Image, size: int, fit: Fit) -> np.ndarray:
    """Return an RGB image as `(size, size, 3)` uint8: cropped at the centre, or padded."""
    if fit == "crop" or image.width == image.height:
        return square(image, size)
    canvas = Image.new("RGB", (size, size), "white")
    left, top, width, height = padded_box(image.size, size)
    kind = Image.Resampling.BOX if max(image.size) > size else Image.Resampling.BICUBIC
    canvas.paste(image.resize((width, height), kind), (left, top))
    return np.asarray(canvas)


def padded_box(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Return left, top, width and height of an image that is padded to a square."""
    width, height = (max(1, round(n * side / max(size))) for n in size)
    return (side - width) // 2, (side - height) // 2, width, height


def open_images(source: ImageLike, side: int | None = None, *, fit: Fit = "crop") -> SourceImages:
    """Read images; `SourceImages` are returned as they are.

    Args:
        source: see `ImageLike`. Arrays have 1 to 4 channels, or none, of uint8, bool, 16 bits, or
            floats from 0 to 1 or from -1 to 1.
        side: the side of the largest squares that will be made: a JPEG is decoded at a fraction.
        fit: see `SourceImages`.

    Raises:
        GlideError: a file cannot be read, or is not an image.
        UsageError: an array of another shape, or with values that are no image.
    """
    if fit not in FITS:
        raise UsageError(f"fit is crop or pad, not {fit!r}")
    if isinstance(source, SourceImages):
        return source
    if isinstance(source, Images):
        source = source.images
    if isinstance(source, str | Path):
        return SourceImages((decode(read_file(source, "image"), side),), str(source), fit)
    if isinstance(source, Image.Image):
        return SourceImages((decode(source, side),), file_of(source), fit)
    if isinstance(source, list | tuple) and any(_is_image(item) for item in source):
        opened = [open_images(item, side, fit=fit) for item in source]
        return SourceImages(
            tuple(upright for source_images in opened for upright in source_images.images), "", fit
        )
    images, change = _from_array(to_array(source, "an image"))
    mode_change = (change,) if change else ()
    decoded = (decode(image) for image in images)
    return SourceImages(
        tuple(upright._replace(changes=mode_change + upright.changes) for upright in decoded),
        "",
        fit,
    )


def read_images(
    source: ImageLike, size: int | None, batch: int | None, *, fit: Fit = "crop"
) -> np.ndarray:
    """Read images as squares: `(batch, size, size, 3)` uint8; see `open_images` and `squares`."""
    return open_images(source, size, fit=fit).squares(size, batch)


def read_file(source: str | Path, what: str) -> Encoded:
    """Return the bytes of a file; `~` and addresses are understood.

    Raises:
        GlideError: it cannot be read; `what` names it in the message.
    """
    path = storage.expand(str(source))
    try:
        return Encoded(storage.read(path), str(source))
    except GlideError as error:
        reason = str(error).removeprefix(f"cannot read {path}: ")
        raise GlideError(f"cannot read the {what} {source}: {reason}; check the path") from None


def file_of(image: Image.Image) -> str:
    """Return the file that a PIL image was opened from; empty if there is none."""
    return str(getattr(image, "filename", "") or "")


def _is_image(one: Any) -> bool:
    kinds = (str, Path, Image.Image, SourceImages, Images)
    return isinstance(one, kinds) or getattr(one, "ndim", 0) >= 2


def to_array(source: Any, what: str) -> np.ndarray:
    """Return arrays of any library, and nested lists of numbers, as a numpy array.

    Raises:
        UsageError: it is something else.
    """
    try:
        array = np.asarray(source)
    except Exception as error:  # libraries raise errors of any kind, for example for a GPU's array
        raise UsageError(f"{what} cannot be read as an array: {error!s:.200}") from None
    if array.dtype.kind not in "biuf" or not array.size:
        kind = f"{array.shape} {array.dtype}" if array.ndim else type(source).__name__
        raise UsageError(f"{what} is a file, a PIL.Image or an array of numbers, not {kind}")
    return array


def _from_array(array: np.ndarray) -> tuple[list[Image.Image], str | None]:
    """Return the images of an array, and what was done to its values."""
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] > 4:
        channels_first = array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4)
        hint = ": put the channels last" if channels_first else ""
        raise UsageError(f"an image is (H, W, 3) uint8, not {array.shape} {array.dtype}{hint}")
    try:
        values, change = to_bytes(batch)
    except UnfitPixels as error:
        raise UsageError(f"cannot read the array {array.shape} as an image: {error}") from None
    return [to_pil(image) for image in values], change


def to_pil(values: np.ndarray) -> Image.Image:
    """Return `(H, W, C)` uint8 with 1 to 4 channels as an image of mode L, LA, RGB or RGBA."""
    return cast(Image.Image, Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values))
