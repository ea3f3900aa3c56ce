"""From records to batches, through grain: shuffled, resumable, the same on every machine."""

from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from PIL import Image

from glide_jax.data.sources import Source
from glide_jax.errors import GlideError, UsageError
from glide_jax.tokenizers import GPT2Tokenizer
from glide_jax.training.config import DataConfig
from glide_jax.training.step import Batch


def with_article(caption: str) -> str:
    """`"an apple"` of `"apple"`."""
    return f"{'an' if caption[:1].lower() in 'aeiou' else 'a'} {caption}"


@dataclass(frozen=True)
class Prepare(grain.transforms.RandomMap):
    """A record -> picture `(size, size, 3)` uint8, tokens and mask `(L,)` of a caption."""

    captions: tuple[str, ...]
    context: int
    size: int

    def random_map(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        template = self.captions[rng.integers(len(self.captions))]
        fields = record | {"a_caption": with_article(record["caption"])}
        try:
            caption = template.format_map(fields)
        except KeyError as error:
            known = ", ".join(k for k, v in fields.items() if isinstance(v, str))
            raise UsageError(
                f"the caption template {template!r} asks for {error}, records have {known}"
            ) from None
        tokens = GPT2Tokenizer(self.context)(caption)
        image = square(np.asarray(record["image"]), self.size)
        return {"image": image, "tokens": tokens.ids[0], "mask": tokens.mask[0]}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of a picture, scaled to `(size, size, 3)` uint8.

    Shrinks by averaging areas (no aliasing), as the data of ADM and GLIDE were made.

    Raises:
        GlideError: it is no `(H, W, 3)` uint8 picture.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise GlideError(f"a picture must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    filter_ = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((size, size), filter_))


def make_batches(
    source: Source, config: DataConfig, *, batch_size: int, context: int, size: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of batches; its position can be saved and restored.

    Each pass over the source has an order of its own, drawn from `seed`.

    Returns:
        An iterator of dictionaries: image `(B, size, size, 3)` uint8, tokens `(B, context)` int32,
        mask `(B, context)` bool.
    """
    records = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .random_map(Prepare(config.captions, context, size))
        .batch(batch_size)
    )
    # One thread: pictures of this size decode faster than threads hand them over.
    batches = records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if config.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    return iter(batches)


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """The batch of the training step, each record with its place."""
    position = np.arange(len(arrays["image"]), dtype=np.int32)
    return Batch(arrays["image"], arrays["tokens"], arrays["mask"], position)
