"""Data that lie on the device: the host only chooses records, the device cuts them out.

`ResidentBatches` follows the same order as `Batches`, with the same random numbers: position k
gives the same image and tokens. So a run may change from one to the other when it is resumed.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.data.batches import Prepare, fill, make_prepare, names_side
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded, load_image, square, window_corner
from glide_jax.data.records import Source
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError


class Resident(NamedTuple):
    """All images and captions, on the device.

    Attributes:
        image: `(N, H, W, 3)` uint8.
        tokens: `(M, L)` int32, of all captions.
        caption_mask: `(M, L)` bool.
    """

    image: Any
    tokens: Any
    caption_mask: Any


class Picks(NamedTuple):
    """What a step takes from `Resident`; every array begins with the step and the row.

    Attributes:
        image: int32 index of the image.
        caption: int32 index of the caption.
        flip: bool, whether the image is mirrored.
        corner: `(..., 2)` int32, top and left of the window.
        row: int32, row in the whole batch.
    """

    image: Any
    caption: Any
    flip: Any
    corner: Any
    row: Any


def take(data: Resident, picks: Picks, size: int) -> dict[str, jax.Array]:
    """Return the image, tokens, caption_mask and row of a step: see `make_batches`."""

    def cut_image(number: jax.Array, corner: jax.Array, flip: jax.Array) -> jax.Array:
        start = (number, corner[0], corner[1], 0)
        image = jax.lax.dynamic_slice(data.image, start, (1, size, size, 3))[0]
        return jnp.where(flip, image[:, ::-1], image)

    return {
        "image": jax.vmap(cut_image)(picks.image, picks.corner, picks.flip),
        "tokens": data.tokens[picks.caption],
        "caption_mask": data.caption_mask[picks.caption],
        "row": picks.row,
    }


class ResidentBatches:
    """An endless iterator of `Picks` of several steps. Its state is the position in the order.

    Attributes:
        data: the images and captions, still on the host.
        steps_per_item: steps of an item.
        steps_of_next: steps of the next items; at first `steps_per_item`.
        skipped: 0, since all records are whole.
    """

    skipped = 0

    def __init__(
        self, prepare: Prepare, batch_size: int, process: tuple[int, int], steps_per_item: int
    ) -> None:
        """Read and encode every record.

        Args:
            prepare: the order and its choices.
            batch_size: over all processes.
            process: index and number of the processes.
            steps_per_item: steps in each item.

        Raises:
            BrokenRecord: a record is broken, or the images differ in size.
        """
        self._prepare, self._batch_size = prepare, batch_size
        self.steps_per_item = self.steps_of_next = steps_per_item
        index, count = process
        self._rows = np.arange(
            index * batch_size // count, (index + 1) * batch_size // count, dtype=np.int32
        )
        self._position = 0
        images, tokens, masks, first, variants, sides = [], [], [], [], [], []
        for number in range(len(prepare.source)):
            record = prepare.source.records[number]
            captions = record["caption"]
            alternatives = (captions,) if isinstance(captions, str) else tuple(captions)
            variants.append(0 if isinstance(captions, str) else len(alternatives))
            first.append(len(tokens))
            for caption in alternatives:
                for template in prepare.config.caption_templates:
                    text = fill(template, record, caption)
                    encoded = prepare.tokens(text)
                    tokens.append(encoded["tokens"])
                    masks.append(encoded["caption_mask"])
                    sides.append(names_side(text))
            images.append(_resident_pixels(record["image"], prepare))
            if images[-1].shape != images[0].shape:
                raise BrokenRecord(f"images of {images[0].shape} and of {images[-1].shape}")
        self.data = Resident(np.stack(images), np.stack(tokens), np.stack(masks))
        self._first, self._variants, self._sides = first, variants, sides

    def __iter__(self) -> "ResidentBatches":
        return self

    def __next__(self) -> Picks:
        starts = [self._position + i * self._batch_size for i in range(self.steps_of_next)]
        self._position += self.steps_of_next * self._batch_size
        chosen = [[self._choose(start + int(row)) for row in self._rows] for start in starts]
        image, caption, flip, top, left = np.array(chosen, np.int32).transpose(2, 0, 1)
        row = np.broadcast_to(self._rows, image.shape)
        return Picks(image, caption, flip.astype(bool), np.stack([top, left], -1), row)

    def close(self) -> None:
        """Do nothing: there are no worker processes to end."""

    def _choose(self, position: int) -> tuple[int, int, bool, int, int]:
        """Return the choices of a position, made as `Prepare` makes them."""
        number, rng = self._prepare.start(position)
        config = self._prepare.config
        variant = int(rng.integers(self._variants[number])) if self._variants[number] else 0
        template = int(rng.integers(len(config.caption_templates)))
        caption = self._first[number] + variant * len(config.caption_templates) + template
        top, left = 0, 0
        if config.crop == "window":
            top, left = window_corner(self.data.image.shape[1:3], self._prepare.size, rng)
        flip = config.flip and bool(rng.random() < 0.5) and not self._sides[caption]
        return number, caption, flip, top, left

    def get_state(self) -> dict[str, int]:
        """Return the state of `Batches` at the same position."""
        return self._prepare.state(self._position)

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resume from a state of this class or of `Batches`."""
        self._prepare = self._prepare.resumed(state)
        self._position = int(state["position"])


def _resident_pixels(image: Encoded | np.ndarray, prepare: Prepare) -> np.ndarray:
    """Return the pixels that lie on the device: a whole image for windows, else the square."""
    decoded = np.asarray(load_image(image)) if isinstance(image, Encoded) else image
    if prepare.config.crop == "window":
        if min(decoded.shape[:2]) < prepare.size:
            raise BrokenRecord(f"an image of {decoded.shape} has no window of {prepare.size}")
        return decoded
    return square(decoded, prepare.size)


def fits(source: Source, config: DataConfig, size: int) -> bool:
    """Whether the data are put on the device under `on_device="auto"`.

    They are if they are in memory already, and take at most a quarter of the accelerator's memory.
    """
    if jax.default_backend() == "cpu" or config.crop == "random" or not len(source):
        return False
    images = getattr(source.records, "images", None)
    if not isinstance(images, np.ndarray):
        return False  # the images are not in memory yet
    stats = jax.local_devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit", 8e9) / 4
    return max(images.nbytes, 3 * len(source) * size**2) < room


def make_resident(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    tokenizer: Any,
    size: int,
    seed: int,
    steps_per_item: int,
    process: tuple[int, int] = (0, 1),
) -> ResidentBatches | None:
    """Return the batches of data on the device, or None if a loader is to make them.

    Args:
        source, config, batch_size, tokenizer, size, seed, process: as in `make_batches`.
        steps_per_item: steps in each item.

    Raises:
        UsageError: `on_device` is "yes" and the data cannot be put there.
    """
    asked = config.on_device == "yes"
    if config.on_device == "no" or not (asked or fits(source, config, size)):
        return None
    if config.crop == "random":
        raise UsageError("data on the device are not scaled: choose --data.crop centre or window")
    prepare = make_prepare(source, config, batch_size, tokenizer, size, seed, process)
    try:
        return ResidentBatches(prepare, batch_size, process, steps_per_item)
    except BrokenRecord as error:
        if asked:
            raise UsageError(
                f"the data cannot be put on the device: {error}; choose --data.on-device no"
            ) from None
        print(f"note: a loader makes the batches: {error}", file=sys.stderr)
        return None
