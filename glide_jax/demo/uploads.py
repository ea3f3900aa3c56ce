"""The image to edit and the painted mask, as files that the command line can use too."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from glide_jax.errors import GlideError
from glide_jax.folders import write_atomically
from glide_jax.pipeline.image_files import read_images

# Paint counts where it covers this much of 255: a brush has soft edges.
PAINTED = 64


def read_upload(path: str | Path, side: int) -> np.ndarray:
    """Return an uploaded image as `(side, side, 3)` uint8: upright, the middle square, scaled.

    An image that has the size already is returned to the byte.

    Raises:
        GlideError: it cannot be read; the message names the file as the user knows it.
    """
    path = Path(path)
    try:
        return read_images(path, side, 1)[0]
    except GlideError as error:
        raise GlideError(str(error).replace(str(path), path.name)) from None


def painted_mask(layers: Sequence[np.ndarray | None], side: int) -> np.ndarray | None:
    """Return what is painted as `(side, side)` uint8, 255 where it is to be filled; None: nothing.

    Args:
        layers: `(H, W, 4)` uint8 each, RGBA.
    """
    mask = np.zeros((side, side), bool)
    for layer in layers:
        if layer is not None:
            rows, columns = (np.arange(side) * n // side for n in layer.shape[:2])
            mask |= layer[rows][:, columns, 3] >= PAINTED
    return np.where(mask, 255, 0).astype(np.uint8) if mask.any() else None


def keep(pixels: np.ndarray, folder: Path, name: str) -> str:
    """Write an image as a PNG file named after its content, and return the path.

    Raises:
        GlideError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise GlideError(f"cannot write {path}: {error.strerror}") from None
    return str(path)
