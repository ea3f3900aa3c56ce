"""Batches of records, through grain: shuffled, resumable and the same on every machine.

A run has an endless *order* of records: one shuffled pass over the source after another. With
`group_by`, a pass shuffles the groups, and the records within each group. Every position k of the
order has its own random generator, made from the seed of the run and k. It chooses the caption, the
crop, and the replacement if the record is broken. So position k gives the same image and tokens
for any number of processes, workers and threads, and after a run was resumed. A batch is B
consecutive positions; process p of n makes its rows [p B / n, (p + 1) B / n).
"""

import re
import sys
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from glide_jax.data.articles import with_article
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded, load_image, random_square, random_window, square
from glide_jax.data.order import (
    ROUNDS,
    UNRECORDED_ROUNDS,
    groups_of,
    mixed,
    shuffled,
    shuffled_groups,
)
from glide_jax.data.records import Source
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.workers import keep_working, shielded
from glide_jax.errors import GlideError, UsageError

# This many broken records in a row stop a run. If half of the records are broken, that happens at
# one position in 2^32; if nine tenths are, at three positions in a hundred.
_TRIES = 32
# Words in a caption that become wrong if the image is mirrored.
_SIDES = re.compile(r"\b(left|right|(counter|anti)?clockwise)(ward|wards)?\b", re.IGNORECASE)
_NAMED = 5  # broken records that stderr names; further ones are only counted


class Tokenizer(Protocol):
    """A tokenizer of captions, for a text encoder of context L."""

    def ids_and_mask(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `(L,)` int32 ids and `(L,)` bool, True where an id belongs to the caption.

        Raises:
            UsageError: the text cannot be encoded.
        """
        ...


@dataclass(frozen=True, eq=False)
class Prepare:
    """A function from positions to images and tokens: `prepare(k)` is position k of the order.

    Attributes:
        tokenizer: captions -> ids and mask.
        size: height and width of the images.
        groups: from `groups_of`; empty for no groups.
        rounds: see `shuffled`; a resumed run keeps those that it began with.
    """

    source: Source
    config: DataConfig
    tokenizer: Tokenizer
    size: int
    seed: int
    groups: bytes = b""
    rounds: int = ROUNDS

    def __call__(self, position: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return one prepared record, and one message per broken record that it replaces.

        Returns:
            image `(size, size, 3)` uint8, tokens `(L,)` int32, caption_mask `(L,)` bool; and the
            messages.

        Raises:
            GlideError: too many records in a row are broken.
        """
        number, rng = self.start(position)
        broken: list[str] = []
        while len(broken) < _TRIES:
            try:
                return self._record(number, rng), broken
            except BrokenRecord as error:
                broken.append(str(error))
            # Of a mixture, a record of the same source.
            span = next(span for span in self.source.spans if number in span)
            number = span.start + int(rng.integers(len(span)))
        examples = "; ".join(list(dict.fromkeys(broken))[:3])
        raise GlideError(f"{_TRIES} records in a row are broken: repair the data ({examples})")

    def start(self, position: int) -> tuple[int, np.random.Generator]:
        """Return the record at a position, and the generator of its choices."""
        rng = np.random.default_rng((self.seed % 2**32, position, 1))
        if self.source.parts:
            return mixed(position, self.source.parts, self.seed, self.rounds), rng
        if self.groups:
            return shuffled_groups(position, self.groups, self.seed), rng
        return shuffled(position, len(self.source), self.seed, self.rounds), rng

    def state(self, position: int) -> dict[str, int]:
        """Return the state of an iterator at a position of this order."""
        return {"position": position, "rounds": self.rounds}

    def resumed(self, state: Mapping[str, int]) -> "Prepare":
        """Return the order that an iterator of this state had."""
        return replace(self, rounds=int(state.get("rounds", UNRECORDED_ROUNDS)))

    def _record(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.source.records[number]
        caption = _caption(record, self.config.caption_templates, rng)
        tokens = self.tokens(caption)
        image = self._image(record["image"], rng)
        if self.config.flip and rng.random() < 0.5 and not names_side(caption):
            image = image[:, ::-1]
        return {"image": image, **tokens}

    def _image(self, image: Encoded | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.config.crop == "window":
            decoded = load_image(image) if isinstance(image, Encoded) else image
            return random_window(decoded, self.size, rng)
        random = self.config.crop == "random"
        min_share = self.config.min_crop if random else 1.0
        # Large enough for the smallest crop.
        side = int(np.ceil(self.size / min_share))
        decoded = load_image(image, side) if isinstance(image, Encoded) else image
        if random:
            return random_square(decoded, self.size, rng, min_share=min_share)
        return square(decoded, self.size)

    def tokens(self, caption: str) -> dict[str, np.ndarray]:
        """Return ids and mask of a caption.

        Raises:
            BrokenRecord: it cannot be encoded.
        """
        try:
            ids, caption_mask = self.tokenizer.ids_and_mask(caption)
        except UsageError as error:
            raise BrokenRecord(f"{error} ({caption!r:.60})") from None
        return {"tokens": ids, "caption_mask": caption_mask}


def _caption(
    record: Mapping[str, Any], templates: tuple[str, ...], rng: np.random.Generator
) -> str:
    caption = record["caption"]
    if not isinstance(caption, str):
        caption = caption[rng.integers(len(caption))]
    return fill(templates[rng.integers(len(templates))], record, caption)


def names_side(caption: str) -> bool:
    """Whether a caption becomes wrong if its image is mirrored."""
    return bool(_SIDES.search(caption))


def fill(template: str, record: Mapping[str, Any], caption: str) -> str:
    """Return a template of captions, filled with a caption and the other text of its record.

    Raises:
        BrokenRecord: it cannot be filled.
    """
    fields = {**record, "caption": caption, "a_caption": with_article(caption)}
    try:
        return template.format_map(fields)
    except KeyError as error:
        known = ", ".join(k for k, v in fields.items() if isinstance(v, str))
        why = f"asks for {error}, but a record has {known}"
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        why = f"cannot be filled: {error}"
    raise BrokenRecord(f"the caption template {template!r} {why}")


def _check_templates(source: Source, templates: tuple[str, ...]) -> None:
    """Raise `UsageError` for a template that none of the first records of a source can fill."""
    for span in source.spans:
        _check_first(source, templates, span)


def _check_first(source: Source, templates: tuple[str, ...], span: range) -> None:
    unfilled = dict.fromkeys(templates, "")
    for number in span[:_TRIES]:
        try:
            record = source.records[number]
        except BrokenRecord:
            continue  # counted at its position
        for template in list(unfilled):
            try:
                _caption(record, (template,), np.random.default_rng(0))
                del unfilled[template]
            except BrokenRecord as error:
                unfilled[template] = str(error)
        if not unfilled:
            return
    if reasons := [reason for reason in unfilled.values() if reason]:
        raise UsageError(reasons[0])


@dataclass(frozen=True, eq=False)
class IndexedBatches:
    """Random access to one process's rows of batches: `[i]` starts at position `first` + i B.

    Attributes:
        first: position at which batch 0 starts.
        batch_size: B, over all processes.
        process: index and number of the processes.
    """

    prepare: Prepare
    first: int
    batch_size: int
    process: tuple[int, int]

    def __len__(self) -> int:
        return 1 << 40  # grain asks for a length; the order is endless

    def __getitem__(self, index: int) -> dict[str, Any]:
        process, count = self.process
        rows = self.batch_size // count
        row = np.arange(process * rows, (process + 1) * rows, dtype=np.int32)
        start = self.first + index * self.batch_size
        made, broken = zip(*(self.prepare(start + int(p)) for p in row), strict=True)
        return {
            **{key: np.stack([record[key] for record in made]) for key in made[0]},
            "row": row,
            "broken": list(chain.from_iterable(broken)),
        }


class Batches(grain.DatasetIterator):
    """An endless iterator of batches. Its state is the position in the run's order, and its rounds.

    The state does not depend on the batch size, nor on the number of processes, workers or
    threads: an iterator that differs in these resumes at the same record.

    Attributes:
        skipped: number of broken records that this process has met since the iterator was made.
    """

    def __init__(
        self, prepare: Prepare, config: DataConfig, batch_size: int, process: tuple[int, int]
    ):
        super().__init__()
        self._prepare, self._config = prepare, config
        self._batch_size, self._process = batch_size, process
        self._position, self._taken = 0, 0
        self._running: list[grain.DatasetIterator] = []  # one, once batches are being made
        # Workers that still run when Python ends would print tracebacks.
        weakref.finalize(self, self._end, self._running)
        self._named: set[str] = set()
        self.skipped = 0

    def __next__(self) -> dict[str, Any]:
        # The workers start at the latest when their first batches are awaited.
        starting = self._taken < self._config.workers
        self._taken += 1
        try:
            with shielded() if starting else nullcontext():
                self.start_prefetch()
                arrays = next(self._running[0])
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            why = str(error).partition(". ")[0]
            raise GlideError(f"{why}: if memory was short, use fewer --data.workers") from None
        if self._config.workers:
            # Copied: the memory shared with the worker lasts only as long as grain's arrays.
            arrays = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        self._position += self._batch_size
        broken = arrays.pop("broken")
        self.skipped += len(broken)
        for reason in broken:
            if reason not in self._named and len(self._named) < _NAMED:
                self._named.add(reason)
                last = "; further ones are only counted" if len(self._named) == _NAMED else ""
                print(f"skipped a record: {reason}{last}", file=sys.stderr)
        return arrays | {"skipped": len(broken)}

    def start_prefetch(self) -> None:
        """Start to make batches in the background."""
        self._assert_not_closed()
        if self._running:
            return
        config = self._config
        indexed = IndexedBatches(self._prepare, self._position, self._batch_size, self._process)
        ready = max(config.prefetch, config.threads)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ready)
        batches = grain.MapDataset.source(indexed).to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its own flags and fails before that
            options = grain.MultiprocessingOptions(num_workers=config.workers)
            batches = batches.mp_prefetch(options, worker_init_fn=keep_working)
        self._taken = 0
        self._running.append(iter(batches))
        self._running[0].start_prefetch()

    def get_state(self) -> dict[str, int]:
        """Return the position at which the next batch starts, and the rounds of the shuffle."""
        return self._prepare.state(self._position)

    def set_state(self, state: dict[str, int]) -> None:
        """Resume from a state that `get_state` returned."""
        self._end(self._running)
        self._prepare = self._prepare.resumed(state)
        self._position = int(state["position"])

    def close(self) -> None:
        """End the worker processes. The iterator cannot be used afterwards."""
        self._end(self._running)
        super().close()

    # A method, because grain may close an iterator after the module's functions are gone.
    @staticmethod
    def _end(running: list[grain.DatasetIterator]) -> None:
        while running:
            running.pop().close()


def make_batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    tokenizer: Tokenizer,
    size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """Return an endless iterator of batches, whose position can be saved and restored.

    Every pass over the source has its own random order, fixed by `seed`. A broken record is
    replaced by another one. Close the iterator when the workers are no longer needed.

    Args:
        source: from `open_source`.
        config: captions, crop, flip, and how many workers and threads.
        batch_size: B, over all processes.
        tokenizer: `GPT2Tokenizer(context)` or `CLIPTokenizer(context)`.
        size: height and width of the images.
        seed: seed of the run.
        process: index p and number n of the processes that share each batch.

    Returns:
        An iterator of dictionaries with this process's b = B / n rows: image `(b, size, size, 3)`
        uint8, tokens `(b, L)` int32, caption_mask `(b, L)` bool, row `(b,)` int32, the row in the
        whole batch; and `skipped`, the number of broken records that were replaced.

    Raises:
        UsageError: the source is empty, the batch cannot be split evenly, a caption template cannot
            be filled, or there is no field to group by.
    """
    prepare = make_prepare(source, config, batch_size, tokenizer, size, seed, process)
    return Batches(prepare, config, batch_size, process)


def make_prepare(
    source: Source,
    config: DataConfig,
    batch_size: int,
    tokenizer: Tokenizer,
    size: int,
    seed: int,
    process: tuple[int, int],
) -> Prepare:
    """Return the `Prepare` of a run; arguments and errors as in `make_batches`."""
    if not len(source):
        raise UsageError(f"there are no records in {source}")
    index, count = process
    if not 0 <= index < count or batch_size < 1 or batch_size % count:
        raise UsageError(
            f"a batch of {batch_size} has no even share for process {index} of {count}: "
            "choose a multiple of the number of processes"
        )
    if source.parts and config.group_by:
        raise UsageError("a mixture is not grouped: leave --data.group-by or --data.mixture out")
    _check_templates(source, config.caption_templates)
    groups = groups_of(source, config.group_by) if config.group_by else b""
    return Prepare(source, config, tokenizer, size, seed, groups)
