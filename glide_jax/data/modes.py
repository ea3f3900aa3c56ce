"""Pixels of any kind as 8-bit RGB: transparency, 16 bits, floats, palettes, CMYK."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Values this far outside of [0, 1] are clipped: resampling overshoots by about as much.
_OVERSHOOT = 0.05
# Factor from the stored values of grey PNG files to those of Pillow, which scales the pixels but
# not the transparent grey value.
_PNG_GREY = {"L;2": 85, "L;4": 17}
DEEP = ("I", "F")


class UnfitPixels(ValueError):
    """Pixels that cannot be understood as an image."""


def to_bytes(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Return values as uint8, and what was done, or None for nothing.

    bool is black and white; 16 bits lose the lower ones; floats are understood as [0, 1], [-1, 1]
    or [0, 255], whichever they fill.

    Raises:
        UnfitPixels: their range is none of these, or they are not numbers.
    """
    if values.dtype == np.uint8:
        return values, None
    if values.dtype == bool:
        return values.astype(np.uint8) * 255, None
    if values.dtype.kind not in "iuf":
        raise UnfitPixels(f"its pixels are {values.dtype}, not numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnfitPixels("some of its values are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.uint16 or (values.dtype.kind != "f" and 255 < high < 65536 and low >= 0):
        return (values >> 8).astype(np.uint8), "reduced from 16 bits to 8"
    are_integers = values.dtype.kind != "f" or bool((values == np.round(values)).all())
    if values.dtype.kind == "f" and high <= 1 + _OVERSHOOT:
        if low >= -_OVERSHOOT:
            return _rounded(values * 255.0), "scaled from values between 0 and 1"
        if low >= -1 - _OVERSHOOT:
            return _rounded((values + 1.0) * 127.5), "scaled from values between -1 and 1"
    if low >= 0 and high <= 255 and (are_integers or high >= 16):
        return _rounded(values), None if are_integers else "rounded to 8 bits"
    raise UnfitPixels(
        f"its values run from {low:g} to {high:g}: scale them to 0 to 1, or to 0 to 255"
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def stored_values(image: Image.Image) -> np.ndarray:
    """Return the pixels of a mode that has more than 8 bits, as they are stored."""
    values = np.asarray(image)
    # Pillow reads 16 bits of these formats as 32.
    return values.astype(np.uint16) if image.format in ("PPM", "PNG") else values


def is_deep(image: Image.Image) -> bool:
    """Whether the pixels have more than 8 bits."""
    return image.mode in DEEP or image.mode.startswith("I;16")


def opaque(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return an image without its transparency, and its alpha, of mode "L"; None: it has none.

    Deep images stay as they are; all others become RGB where they have transparency.
    """
    if not image.has_transparency_data:
        return image, None
    if is_deep(image):
        alpha = np.where(np.asarray(image) == image.info["transparency"], 0, 255)
        return image, Image.fromarray(alpha.astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    layered = image.convert("RGBA")
    return layered.convert("RGB"), layered.getchannel("A")


def to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return an image of any mode as RGB, composed on white, and what was changed.

    Raises:
        UnfitPixels: see `to_bytes`.
    """
    changes: list[str] = []
    image, alpha = opaque(image)
    if is_deep(image):
        values, change = to_bytes(stored_values(image))
        changes += [change] if change else []
        image = Image.fromarray(values)
    elif image.mode in ("CMYK", "LAB"):
        changes.append(f"converted from {image.mode}")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        changes.append("laid on white where it is transparent")
        image = image.convert("RGBA")
        image.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image, changes


def settle_transparent_colour(
    image: Image.Image, layouts: Sequence[Any], low_bytes: np.ndarray | None
) -> Image.Image:
    """Return a loaded PNG image whose transparent colour has the scale of its pixels.

    A PNG file names that colour in the bit depth of the file; Pillow scales only the pixels.

    Args:
        image: the image.
        layouts: the layouts of its pixels in the file, read before it was loaded.
        low_bytes: the lower bytes of 16-bit RGB, `(H, W, 3)`.
    """
    colour = image.info.get("transparency")
    if isinstance(colour, int):
        for layout in layouts:
            image.info["transparency"] = colour * _PNG_GREY.get(layout, 1)
    elif low_bytes is not None and isinstance(colour, tuple):
        pixels = np.asarray(image).astype(np.uint16) << 8 | low_bytes
        alpha = 255 * (pixels != np.array(colour)).any(axis=2)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image
