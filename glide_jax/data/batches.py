"""From records to batches, through grain: shuffled, resumable, the same on every machine.

A run's *order* is an endless list of record numbers, one shuffled pass after the other (with
`group_by`, the groups are shuffled, and the records within each). The record
at position k of it is drawn with a random generator of its own, made of the run's seed and k: which
caption, which crop, and, where the record is broken, which other record instead. So position k holds
the same picture and tokens whatever the number of processes, workers and threads is, and whether
or not the run was interrupted. A batch is B consecutive places; process p of n makes the rows
[p B / n, (p + 1) B / n) of it.
"""

import re
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from glide_jax.data.data_config import DataConfig
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.decoding import Encoded, load_picture, random_square, square
from glide_jax.data.records import Source
from glide_jax.errors import GlideError, UsageError

# So many records in a row that are all broken: one position in 10^10 where half of a source is broken,
# three of a hundred where nine tenths are, every position where everything is.
_TRIES = 32
# grain's shuffle needs no memory, but milliseconds a record where there are few of them.
_PERMUTED = 1 << 15
# Words of captions that a mirrored picture would make untrue.
_SIDES = re.compile(r"\b(left|right|(counter|anti)?clockwise)(ward|wards)?\b", re.IGNORECASE)
_NAMED = 5  # broken records that are named on stderr; the others are only counted


def with_article(caption: str) -> str:
    """`"an apple"` of `"apple"`."""
    return f"{'an' if caption[:1].lower() in 'aeiou' else 'a'} {caption}"


def shuffled(position: int, count: int, seed: int) -> int:
    """The record at a position of the run's order: each once a pass, every pass in another order."""
    number, i = divmod(position, count)
    if count < _PERMUTED:
        return int(_permutation(count, seed, number)[i])
    (pass_seed,) = np.random.SeedSequence((seed % 2**32, number)).generate_state(1)
    return index_shuffle(i, max_index=count - 1, seed=int(pass_seed), rounds=4)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed % 2**32, number, 0)).permutation(count)


def shuffled_groups(position: int, groups: bytes, seed: int) -> int:
    """The same where the records of a group stay together; `groups` as `groups_of` makes them."""
    number, i = divmod(position, len(groups) // 4)
    return int(_group_permutation(groups, seed, number)[i])


@lru_cache(maxsize=4)
def _group_permutation(groups: bytes, seed: int, number: int) -> np.ndarray:
    ids = np.frombuffer(groups, np.int32)
    rng = np.random.default_rng((seed % 2**32, number, 2))
    # By the random number of the group, then by one of the record.
    return np.lexsort((rng.random(len(ids)), rng.permutation(ids.max() + 1)[ids]))


def groups_of(source: Source, field: str) -> bytes:
    """The number of each record's group, those whose field is alike: N int32, as bytes, which a
    cache can know by their hash.

    Raises:
        UsageError: a record has no such field.
    """
    values = []
    for number in range(len(source)):
        try:
            value = source.records[number].get(field)
        except BrokenRecord:
            value = ""  # replaced when its turn comes
        if not isinstance(value, str):
            raise UsageError(f"group_by: record {number} of {source} has no text field {field!r}")
        values.append(value)
    return np.unique(values, return_inverse=True)[1].astype(np.int32).tobytes()


class Tokenizer(Protocol):
    """What turns a caption into the input of a text encoder of context L."""

    def ids_and_mask(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `(L,)` int32 ids and `(L,)` bool, True where an id belongs to the caption.

        Raises:
            UsageError: the text cannot be encoded.
        """
        ...


@dataclass(frozen=True)
class Prepare:
    """Makes a record ready: `prepare(k)` is what stands at position k of the run's order.

    Attributes:
        tokenizer: captions -> ids and mask.
        size: of the picture's side.
        groups: of `groups_of`; empty: no groups.
    """

    source: Source
    config: DataConfig
    tokenizer: Tokenizer
    size: int
    seed: int
    groups: bytes = b""

    def __call__(self, position: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """image `(size, size, 3)` uint8, tokens `(L,)` int32 and mask `(L,)` bool; and what was
        wrong with the records that were drawn in vain.

        Raises:
            GlideError: too many records in a row are broken.
        """
        rng = np.random.default_rng((self.seed % 2**32, position, 1))
        if self.groups:
            number = shuffled_groups(position, self.groups, self.seed)
        else:
            number = shuffled(position, len(self.source), self.seed)
        broken: list[str] = []
        while len(broken) < _TRIES:
            try:
                return self._record(number, rng), broken
            except BrokenRecord as error:
                broken.append(str(error))
            number = int(rng.integers(len(self.source)))
        examples = "; ".join(list(dict.fromkeys(broken))[:3])
        raise GlideError(f"{_TRIES} records in a row are broken: mend the data ({examples})")

    def _record(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.source.records[number]
        caption = _caption(record, self.config.captions, rng)
        tokens = self._tokens(caption)
        image = self._picture(record["image"], rng)
        if self.config.flip and rng.random() < 0.5 and not _SIDES.search(caption):
            image = image[:, ::-1]
        return {"image": image, **tokens}

    def _picture(self, image: Encoded | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        least = self.config.min_crop if self.config.crop == "random" else 1.0
        if isinstance(image, Encoded):
            # The smallest crop still has pixels enough.
            image = load_picture(image, int(np.ceil(self.size / least)))
        if self.config.crop == "random":
            return random_square(image, self.size, rng, least=least)
        return square(image, self.size)

    def _tokens(self, caption: str) -> dict[str, np.ndarray]:
        try:
            ids, mask = self.tokenizer.ids_and_mask(caption)
        except UsageError as error:
            raise BrokenRecord(f"{error} ({caption!r:.60})") from None
        return {"tokens": ids, "mask": mask}


def _caption(
    record: Mapping[str, Any], templates: tuple[str, ...], rng: np.random.Generator
) -> str:
    caption = record["caption"]
    if not isinstance(caption, str):
        caption = caption[rng.integers(len(caption))]
    template = templates[rng.integers(len(templates))]
    fields = {**record, "caption": caption, "a_caption": with_article(caption)}
    try:
        return template.format_map(fields)
    except KeyError as error:
        known = ", ".join(k for k, v in fields.items() if isinstance(v, str))
        why = f"asks for {error}, a record has {known}"
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        why = f"cannot be filled: {error}"
    raise BrokenRecord(f"the caption template {template!r} {why}")


def _check_templates(source: Source, templates: tuple[str, ...]) -> None:
    """Raises `UsageError` for a template that none of the first records can fill."""
    waiting = dict.fromkeys(templates, "")
    for number in range(min(_TRIES, len(source))):
        try:
            record = source.records[number]
        except BrokenRecord:
            continue  # counted when its turn comes
        for template in list(waiting):
            try:
                _caption(record, (template,), np.random.default_rng(0))
                del waiting[template]
            except BrokenRecord as error:
                waiting[template] = str(error)
        if not waiting:
            return
    if wrong := [reason for reason in waiting.values() if reason]:
        raise UsageError(wrong[0])


@dataclass(frozen=True)
class Steps:
    """Random access to one process's rows of batches: `steps[i]` begins at position `first` + i B.

    Attributes:
        batch_size: B, over all processes.
        process: index and count of the processes.
    """

    prepare: Prepare
    first: int
    batch_size: int
    process: tuple[int, int]

    def __len__(self) -> int:
        return 1 << 40  # no end, for grain

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, count = self.process
        rows = self.batch_size // count
        row = np.arange(index * rows, (index + 1) * rows, dtype=np.int32)
        start = self.first + i * self.batch_size
        made, broken = zip(*(self.prepare(start + int(p)) for p in row), strict=True)
        return {
            **{key: np.stack([record[key] for record in made]) for key in made[0]},
            "row": row,
            "broken": list(chain.from_iterable(broken)),
        }


class Batches(grain.DatasetIterator):
    """An endless iterator of batches; its state is one number, the position in the run's order.

    The state does not depend on the number of processes, workers or threads, nor on the batch
    size: restored with others of these, it goes on at the same record.

    Attributes:
        skipped: broken records met by this process since the iterator was made.
    """

    def __init__(
        self, prepare: Prepare, config: DataConfig, batch_size: int, process: tuple[int, int]
    ):
        super().__init__()
        self._prepare, self._config = prepare, config
        self._batch_size, self._process = batch_size, process
        self._position = 0
        self._running: list[grain.DatasetIterator] = []  # one, once batches are being made
        # Workers that are still at it when Python ends would fill the screen with tracebacks.
        weakref.finalize(self, _end, self._running)
        self._named: set[str] = set()
        self.skipped = 0

    def __next__(self) -> dict[str, Any]:
        self.start_prefetch()
        arrays = next(self._running[0])
        if self._config.workers:
            # Out of the memory shared with the worker, which lasts no longer than grain's arrays.
            arrays = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        self._position += self._batch_size
        broken = arrays.pop("broken")
        self.skipped += len(broken)
        for what in broken:
            if what not in self._named and len(self._named) < _NAMED:
                self._named.add(what)
                last = "; further ones are only counted" if len(self._named) == _NAMED else ""
                print(f"skipped a record: {what}{last}", file=sys.stderr)
        return arrays | {"skipped": len(broken)}

    def start_prefetch(self) -> None:
        """Begins to make batches in the background."""
        self._assert_not_closed()
        if self._running:
            return
        config = self._config
        steps = Steps(self._prepare, self._position, self._batch_size, self._process)
        ready = max(config.prefetch, config.threads)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ready)
        batches = grain.MapDataset.source(steps).to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its own, and refuses before that
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
        self._running.append(iter(batches))
        self._running[0].start_prefetch()

    def get_state(self) -> dict[str, int]:
        """The position at which the next batch begins."""
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a state that `get_state` returned."""
        _end(self._running)
        self._position = int(state["position"])

    def close(self) -> None:
        """Ends the worker processes; the iterator cannot be used afterwards."""
        _end(self._running)
        super().close()


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
    """An endless iterator of batches; its position can be saved and restored.

    Each pass over the source has an order of its own, drawn from `seed`. A broken record is
    replaced by another one; close the iterator when workers are not needed any more.

    Args:
        batch_size: B, over all processes.
        tokenizer: `GPT2Tokenizer(context)` or `CLIPTokenizer(context)`.
        size: of the picture's side.
        process: index p and count n of the processes that share each batch.

    Returns:
        An iterator of dictionaries of this process's b = B / n rows: image `(b, size, size, 3)`
        uint8, tokens `(b, L)` int32, mask `(b, L)` bool, row `(b,)` int32, the row in the
        whole batch; and `skipped`, how many broken records were met on the way.

    Raises:
        UsageError: the batch cannot be shared out, a caption template cannot be filled, or there is
            no field to group by.
    """
    if not len(source):
        raise UsageError(f"there is nothing in {source}")
    index, count = process
    if not 0 <= index < count or batch_size < 1 or batch_size % count:
        raise UsageError(f"process {index} of {count} has no even share of a batch of {batch_size}")
    _check_templates(source, config.captions)
    groups = groups_of(source, config.group_by) if config.group_by else b""
    prepare = Prepare(source, config, tokenizer, size, seed, groups)
    return Batches(prepare, config, batch_size, process)
