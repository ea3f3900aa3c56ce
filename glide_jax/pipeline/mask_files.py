"""Reading masks: which part of an image is regenerated.

A mask says it by black and white, by grey levels of any depth, by labels or colours on black, or by
its alpha. White, painted or labelled is regenerated; so is what was erased from a photo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glide_jax.data.decoding import Upright, load_upright, turned
from glide_jax.data.modes import is_deep, opaque, stored_values, to_rgb
from glide_jax.errors import UsageError
from glide_jax.pipeline.image_files import (
    Fit,
    SourceImages,
    file_of,
    padded_box,
    read_file,
    to_array,
    to_pil,
    to_square,
)

# Lossy files have no exactly black areas: levels closer than this are one level.
_NOISE = 32
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
# Grey levels below this are labels, if there are several; so are so few colours.
_LABELS = 32
_COLOURS = 64
# Channels that differ by more make a colour, not a grey.
_COLOURED = 40
# A drawing has at most so many colours of 4 bits a channel; a photo has more.
_FLAT = 4
# Mean difference, in levels of 255, up to which a mask's visible part is the image's own.
_SAME = 12
_HOW = "white is regenerated, black is kept"
_ALLOW = "or allow it with --allow-uniform-mask (allow_uniform_mask=True)"


@dataclass(frozen=True, eq=False)
class SourceMasks:
    """Masks of any size, read, and upright like their images.

    Attributes:
        regions: `(H, W)` bool, True where the image is regenerated.
        name: the file; empty if there is none.
        fit: how they become squares; see `SourceImages`.
        reading: which part is regenerated if it is not the white one: "its transparent part".
    """

    regions: tuple[np.ndarray, ...]
    name: str = ""
    fit: Fit = "crop"
    reading: str = ""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"the mask {self.name}" if self.name else "the mask"

    def squares(self, size: int) -> np.ndarray:
        """Return the masks as squares, `(N, size, size)` bool."""
        return np.stack([_square(region, size, self.fit) for region in self.regions])

    def known(self, size: int, count: int) -> np.ndarray:
        """Return `(count, size, size, 1)` float32, 1 where the pixel is kept.

        Raises:
            UsageError: there is neither one mask nor one for each.
        """
        if len(self.regions) not in (1, count):
            raise UsageError(
                f"a mask is (H, W), or one for each of {count} prompts, not {len(self.regions)}"
            )
        known = 1 - self.squares(size).astype(np.float32)[..., None]
        return np.broadcast_to(known, (count, *known.shape[1:]))

    def check(self, size: int) -> None:
        """Check that each mask keeps a part of the image, and regenerates another.

        Raises:
            UsageError: it does not.
        """
        for number, (region, square) in enumerate(
            zip(self.regions, self.squares(size), strict=True)
        ):
            if square.any() and not square.all():
                continue
            label = self.label + (f" number {number}" if len(self.regions) > 1 else "")
            what = (
                "masks the whole image: nothing is kept" if square.all() else "has no masked region"
            )
            how = _HOW
            if region.any() and not region.all():
                what, how = f"{what} at {size}x{size} pixels", "draw larger"
            raise UsageError(f"{label} {what} ({how}); change it, {_ALLOW}")

    def note(self, size: int) -> str:
        """Return the share of the image that is regenerated, in words."""
        part = f" ({self.reading})" if self.reading else ""
        return f"{self.label} regenerates {100 * self.squares(size).mean():.3g}% of the image{part}"


# What a mask can be given as: a file, a PIL image, an array `(H, W)`, `(N, H, W)` or `(H, W, C)`,
# or a list of these.
MaskLike = str | Path | Image.Image | np.ndarray | SourceMasks | Sequence[Any]


def open_masks(
    source: MaskLike, images: SourceImages | None = None, *, invert: bool = False
) -> SourceMasks:
    """Read masks; `SourceMasks` are returned as they are.

    A mask follows its image: it is turned and cropped like it. It has the image's proportions, or
    is square and lies on the square that is made of the image.

    Args:
        source: see `MaskLike`.
        images: the images that it belongs to.
        invert: regenerate what would be kept, and keep the rest.

    Raises:
        GlideError: a file cannot be read, or is not an image.
        UsageError: the mask cannot be understood, or has other proportions than its image.
    """
    if isinstance(source, SourceMasks):
        return source
    fit: Fit = "crop" if images is None else images.fit
    if isinstance(source, list | tuple) and not _is_number_list(source):
        opened = [open_masks(item, images, invert=invert) for item in source]
        return SourceMasks(tuple(region for masks in opened for region in masks.regions), "", fit)
    name, reading = "", ""
    if isinstance(source, str | Path):
        name, loaded = str(source), [load_upright(read_file(source, "mask"))]
    elif isinstance(source, Image.Image):
        name, loaded = file_of(source), [load_upright(source)]
    else:
        loaded = _from_array(to_array(source, "a mask"))
    label = f"the mask {name}" if name else "the mask"
    regions = []
    for i, mask in enumerate(loaded):
        image = None if images is None else images.images[i % len(images.images)]
        if isinstance(mask, Upright):
            mask = mask if image is None else _turned_like(mask, image)
            region, reading = _region(mask.image, label, image)
        else:
            region = _region_by_level(mask, label, lossy=False)
        if image is not None:
            _check_proportions(region, image, label)
        regions.append(region ^ invert)
    if invert:
        reading = f"inverted; else {reading}" if reading else "inverted"
    return SourceMasks(tuple(regions), name, fit, reading)


def read_known(mask: MaskLike, size: int, batch: int) -> np.ndarray:
    """Return a mask, `(batch, size, size, 1)` float32, 1 where it is kept; see `open_masks`."""
    return open_masks(mask).known(size, batch)


def _is_number_list(source: Sequence[Any]) -> bool:
    """Whether a list is one mask written as numbers, not a list of masks."""
    return not any(isinstance(item, str | Path | Image.Image | np.ndarray) for item in source)


def _from_array(array: np.ndarray) -> list[Upright | np.ndarray]:
    """Return the masks of an array: images where it has colours or alpha, else values."""
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] in (1, 2, 3, 4):
        if array.shape[-1] == 1:
            return [array[..., 0]]
        if array.dtype != np.uint8:
            raise UsageError(f"a mask with channels is uint8, not {array.shape} {array.dtype}")
        image = to_pil(array)
        return [Upright(image, image.size, 1, ())]
    if array.ndim not in (2, 3):
        raise UsageError(f"a mask is (H, W), or one for each of the prompts, not {array.shape}")
    return list(array[None] if array.ndim == 2 else array)


def _turned_like(mask: Upright, image: Upright) -> Upright:
    """Return a mask that was drawn on the image as it is stored, turned like the image."""
    (w, h), (wide, high) = mask.size, image.size
    sideways = image.orientation > 4 and mask.orientation == 1 and w != h
    if (
        sideways
        and _same_proportions((h, w), (wide, high))
        and not _same_proportions((w, h), (wide, high))
    ):
        return mask._replace(image=turned(mask.image, image.orientation), size=(h, w))
    return mask


def _same_proportions(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions, up to rounding."""
    off = abs(a[0] * b[1] - a[1] * b[0])
    return off <= max(a[0] * b[1], a[1] * b[0]) * max(0.02, 1 / min(a), 1 / min(b))


def _check_proportions(region: np.ndarray, image: Upright, label: str) -> None:
    size = (region.shape[1], region.shape[0])
    if size[0] != size[1] and not _same_proportions(size, image.size):
        raise UsageError(
            f"{label} is {size[0]}x{size[1]} and the image {image.size[0]}x{image.size[1]}: make "
            "it of the image's proportions, or square to lie on the square that is made of it"
        )


def _square(region: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """Return a mask as `(size, size)` bool; nothing is regenerated in what was padded."""
    height, width = region.shape
    if height != width and fit == "pad":
        left, top, w, h = padded_box((width, height), size)
        result = np.zeros((size, size), bool)
        result[top : top + h, left : left + w] = _scaled(region, (0, 0, width, height), (w, h))
        return result
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return _scaled(region, (left, top, left + side, top + side), (size, size))


def _scaled(
    region: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return a part of a mask at another size: a pixel that is at least half masked is masked."""
    image = Image.fromarray(region.astype(np.uint8) * 255)
    shrinks = box[2] - box[0] > size[0] or box[3] - box[1] > size[1]
    # A mask has no grey: it is enlarged without, as in OpenAI's code.
    kind = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    return np.asarray(image.resize(size, kind, box=box)) > 127


# --- what a mask means


def _region(image: Image.Image, label: str, edited: Upright | None) -> tuple[np.ndarray, str]:
    """Return where an image is regenerated by a mask, and which part of the mask that is."""
    lossy = image.format in _LOSSY
    colours, alpha = opaque(image)
    if alpha is not None:
        opacity = np.asarray(alpha)
        low, high = int(opacity.min()), int(opacity.max())
        if high == 0:
            raise UsageError(f"{label} is transparent everywhere: paint on it what is regenerated")
        # An alpha that hardly varies says nothing.
        if high - low >= _NOISE:
            visible = opacity.astype(int) * 2 > low + high
            return _region_by_alpha(to_rgb(colours)[0], visible, edited)
    if is_deep(colours):
        return _region_by_level(stored_values(colours), label, lossy=False), ""
    rgb = np.asarray(to_rgb(colours)[0])
    if int(np.ptp(rgb, axis=2).max()) <= _COLOURED:
        if image.mode == "P" and not np.ptp(rgb, axis=(0, 1)).any():
            # A palette that was not filled in: the labels themselves.
            return _region_by_level(np.asarray(image), label, lossy=False), ""
        return _region_by_level(np.asarray(to_rgb(colours)[0].convert("L")), label, lossy=lossy), ""
    return _region_by_colour(image, rgb, label)


def _region_by_level(values: np.ndarray, label: str, *, lossy: bool) -> np.ndarray:
    """Threshold levels at half of the range in use; of several labels, 0 alone is kept."""
    if values.dtype == bool:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"{label} has values that are not finite numbers: replace them")
    low, high = values.min(), values.max()
    if low == high:
        return np.full(values.shape, bool(high))
    levels = np.unique(values)
    if lossy and len(levels) > 2 and float(high) - float(low) < _NOISE:
        return np.full(values.shape, float(high) > 127)
    are_integers = values.dtype.kind in "iu"
    if are_integers and low == 0 and len(levels) > 2 and high < _LABELS:
        return values > 0
    return values > (float(low) + float(high)) / 2


def _region_by_colour(image: Image.Image, rgb: np.ndarray, label: str) -> tuple[np.ndarray, str]:
    """Return the coloured part of a drawing on black, or the labels above 0 of a palette."""
    brightness = rgb.max(axis=2)
    if brightness.min() <= _LABELS // 2:
        few = len(np.unique(rgb.reshape(-1, 3), axis=0)) <= _COLOURS
        return brightness > (_LABELS // 2 if few else 127), "its coloured part"
    if image.mode == "P":
        return np.asarray(image) > 0, "its labels above 0"
    raise UsageError(f"{label} has colours and no black: {_HOW}, or paint on a transparent layer")


def _region_by_alpha(
    colours: Image.Image, visible: np.ndarray, edited: Upright | None
) -> tuple[np.ndarray, str]:
    """Tell a brush on a transparent layer from a region erased from a photo.

    A photo has many colours, or is the image itself; a brush has few, and leaves the border free.
    """
    painted = visible, "its opaque part"
    erased = ~visible, "its transparent part"
    rgb = np.asarray(colours)
    seen = rgb[visible]
    flat = len(np.unique(seen >> 4, axis=0)) <= _FLAT
    brightness = seen.max(axis=1)
    grey = np.ptp(seen, axis=1).max() < _NOISE
    if flat and grey and brightness.max() >= 192 and brightness.min() < 64:
        # White and black on a transparent layer.
        region = np.zeros_like(visible)
        region[visible] = brightness > 127
        return region, "its white part"
    border = np.concatenate([visible[0], visible[-1], visible[:, 0], visible[:, -1]])
    if not flat:
        return erased
    if border.mean() <= 0.5:
        return painted
    same_pixels = False
    if edited is not None:
        image = edited.image
        if colours.width == colours.height:
            image = Image.fromarray(to_square(image, colours.width, "crop"))
        image = np.asarray(image.resize(colours.size, Image.Resampling.BOX))
        same_pixels = np.abs(image[visible].astype(int) - seen).mean() <= _SAME
    return painted if brightness.min() >= 192 and not same_pixels else erased
