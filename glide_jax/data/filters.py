"""Filters: records that are left out by the size of their image, or by a score."""

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded, size_of
from glide_jax.data.faults import Fault, Faults, group_by_reason
from glide_jax.data.records import Records, Source, digest
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError

_SOME = 64  # records that a thread looks at in one go


@dataclass(frozen=True, eq=False)
class Selected:
    """Some of the records of a source.

    Attributes:
        records: all records.
        indices: `(N,)` int64, the records in use.
    """

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.records[int(self.indices[index])]


def filtered(source: Source, config: DataConfig) -> Source:
    """Return a source without the records that the filters leave out; one line counts them.

    The source itself is returned if nothing is left out. A record that cannot be read is kept:
    another one takes its place in training.

    Raises:
        UsageError: no record is left.
    """
    rules: list[tuple[str, Callable[[Records, int, DataConfig], str]]] = []
    if config.min_score is not None:
        rules.append(("reading scores", _score))
    if config.min_side or config.max_aspect:
        rules.append(("reading sizes of images", _size))
    kept, faults = np.arange(len(source)), []
    for progress, rule in rules:
        reasons = _reasons(partial(rule, source.records), kept, config, progress)
        faults += [
            Fault(_name(source.records, int(i)), why)
            for i, why in zip(kept, reasons, strict=True)
            if why
        ]
        kept = kept[[not why for why in reasons]]
    if not faults:
        return source
    if not len(kept):
        raise UsageError(f"no image of {config.source} is left: {group_by_reason(faults)}")
    print(Faults(tuple(faults)).line(config.source, len(kept)), file=sys.stderr)
    return replace(
        source,
        records=Selected(source.records, kept),
        identity=digest([source.identity, kept.tobytes()]),
        left_out=source.left_out + len(faults),
        faults=source.faults._replace(left_out=(*source.faults.left_out, *faults)),
    )


def _reasons(
    rule: Callable[[int, DataConfig], str], kept: np.ndarray, config: DataConfig, progress: str
) -> list[str]:
    """Return why a rule leaves each record out, or ""."""

    def reasons_from(first: int) -> list[str]:
        return [rule(int(i), config) for i in kept[first : first + _SOME]]

    with (
        ThreadPoolExecutor(8) as pool,
        tqdm(desc=progress, total=len(kept), unit="record", delay=2) as bar,
    ):
        reasons: list[str] = []
        for batch_reasons in pool.map(reasons_from, range(0, len(kept), _SOME)):
            reasons += batch_reasons
            bar.update(len(batch_reasons))
    return reasons


def _name(records: Any, index: int) -> str:
    return records.name(index) if hasattr(records, "name") else f"record {index}"


def _score(records: Any, index: int, config: DataConfig) -> str:
    """Return why the score of a record leaves it out, or ""."""
    read = getattr(records, "texts", records.__getitem__)
    field, low = config.score_field, config.min_score
    try:
        value = read(index).get(field)
    except BrokenRecord:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or value == "":
        return f"filtered: no {field}"
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        return f"filtered: {field} is no number"
    return f"filtered: {field} < {low:g}" if low is not None and score < low else ""


def _size(records: Any, index: int, config: DataConfig) -> str:
    """Return why the size of an image leaves its record out, or ""."""
    try:
        if hasattr(records, "image_size"):
            sides = records.image_size(index)
        else:
            image = records[index]["image"]
            sides = size_of(image) if isinstance(image, Encoded) else image.shape[:2]
    except BrokenRecord:
        return ""
    low, high = sorted(sides)
    if low < config.min_side:
        return f"filtered: shortest side < {config.min_side}"
    if config.max_aspect and high > config.max_aspect * low:
        return f"filtered: aspect > {config.max_aspect:g}"
    return ""
