"""Reading images to edit, and masks, from files, PIL images and arrays."""

from pathlib import Path

import numpy as np
from PIL import Image

from glide_jax.errors import GlideError, UsageError
from glide_jax.pipeline.images import Images

# What an image can be given as; arrays are uint8, `(H, W, 3)` or `(N, H, W, 3)`.
ImageLike = str | Path | Image.Image | np.ndarray | Images
# Arrays are `(H, W)` or `(N, H, W)`; not zero (white) is regenerated.
MaskLike = str | Path | Image.Image | np.ndarray


def open_image(source: str | Path | Image.Image, what: str = "image") -> Image.Image:
    """Open an image and read its pixels.

    Raises:
        GlideError: the file is missing, is not an image, or is broken or far too large.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        image = Image.open(Path(source).expanduser())
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise GlideError(f"cannot read the {what} {source}: {error}") from None
    return image


def read_images(source: ImageLike, size: int | None, batch: int | None) -> np.ndarray:
    """Read images for a batch: `(batch, H, W, 3)` uint8.

    Args:
        source: `Images`, a file, a `PIL.Image`, or a uint8 array `(H, W, 3)` or `(N, H, W, 3)`.
        size: side to scale them to (bicubic, as in OpenAI's notebooks); None: not scaled.
        batch: the number of images needed, unless there is one for all; None: any number.

    Raises:
        GlideError: the file is not an image.
        UsageError: an array of another kind, or neither one image nor one for each of the batch.
    """
    if isinstance(source, Images):
        source = source.images
    if not isinstance(source, np.ndarray):
        source = np.asarray(open_image(source, "image").convert("RGB"))
    images = source[None] if source.ndim == 3 else source
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UsageError(f"an image is (H, W, 3) uint8, not {source.shape} {source.dtype}")
    batch = len(images) if batch is None else batch
    if len(images) not in (1, batch):
        raise UsageError(f"{len(images)} images for {batch} prompts: give one, or one each")
    if size is not None and images.shape[1:3] != (size, size):
        scale = [Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC) for i in images]
        images = np.stack([np.asarray(i) for i in scale])
    return np.broadcast_to(images, (batch, *images.shape[1:]))


def read_known(mask: MaskLike, size: int, batch: int) -> np.ndarray:
    """Read a mask for a batch: `(batch, size, size, 1)` float32, 1 where the pixel is kept.

    Args:
        mask: a file, a `PIL.Image`, or an array `(H, W)` or `(N, H, W)`; white (not zero) is
            regenerated, black is kept.

    Raises:
        GlideError: the file is not an image.
        UsageError: an array of another shape.
    """
    if not isinstance(mask, np.ndarray):
        mask = np.asarray(open_image(mask, "mask").convert("L")) > 127
    masks = (mask[None] if mask.ndim == 2 else mask) != 0
    if masks.ndim != 3 or len(masks) not in (1, batch):
        raise UsageError(f"a mask is (H, W), or one for each of {batch} prompts, not {mask.shape}")
    # Nearest neighbour, as OpenAI's code enlarges masks: a mask has no grey.
    rows, columns = (np.arange(size) * n // size for n in masks.shape[1:])
    known = 1 - masks[:, rows][:, :, columns].astype(np.float32)[..., None]
    return np.broadcast_to(known, (batch, *known.shape[1:]))
