"""Open malformed data thousands of times: python -m tests.tools.fuzz_data

Folders of captioned images, tar shards, metadata files and .npz files with a fault each: bytes
flipped, cut, lost or added, wrong headers, names, sizes, checksums, captions. Each is opened by
`open_source`, and all of its records are read. Outcomes are records and counted faults, or an error
of one line: never another exception, never a hang. A record without a fault must be that of the
whole set. Prints JSON, and the sentence for docs/results/faults.md.
"""

import contextlib
import io
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from glide_jax.data.data_config import DataConfig
from glide_jax.data.sources import open_source
from glide_jax.data.storage import BrokenRecord
from tests.support.damage import Tally, report
from tests.support.mutations import (
    Case,
    Item,
    base_items,
    folder_files,
    npz_file,
    table_files,
    tar_file,
    write_files,
)

KINDS = ("folder", "tar", "table", "npz")
# Shares of the kinds, in that order.
SHARES = (0.35, 0.35, 0.2, 0.1)
LIMIT = 20  # seconds of a case


def make_case(kind: str, items: list[Item], rng: random.Random, place: Path) -> tuple[Path, Case]:
    """Write a malformed data set, and return what to open, and a description."""
    if kind in ("folder", "table"):
        files, case = (folder_files if kind == "folder" else table_files)(items, rng)
        return write_files(place, files), case
    data, case = (tar_file if kind == "tar" else npz_file)(items, rng)
    path = place.with_suffix(f".{kind}")
    path.write_bytes(data)
    return path, case


def read_all(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records that can be read, and the number of those that cannot."""
    source = open_source(DataConfig(source=str(path)))
    found, broken = [], 0
    for i in range(len(source)):
        try:
            found.append(source[i])
        except BrokenRecord as error:
            assert "\n" not in str(error), f"several lines: {error}"
            broken += 1
    return found, broken


def matches(record: dict[str, Any], truth: dict[str, np.ndarray]) -> bool:
    """Whether a record of a known caption has its image; others have no truth."""
    pixels = truth.get(record["caption"]) if isinstance(record["caption"], str) else None
    return pixels is None or np.array_equal(record["image"], pixels)


def read_case(path: Path, items: list[Item], case: Case, truth: dict[str, np.ndarray]) -> str:
    """Return "whole", "faults" or "accepted" (a record is not what it was)."""
    records, broken = read_all(path)
    whole = {item.caption: truth[item.caption] for item in items if item.key not in case.touched}
    if not all(matches(record, whole) for record in records):
        return "accepted"
    # In a folder, a fault of one record leaves the others; in a tar it may hide those after it.
    captions = {r["caption"] for r in records if isinstance(r["caption"], str)}
    if path.is_dir() and not set(whole) <= captions:
        return "accepted"
    return "faults" if broken or len(records) != len(items) else "whole"


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(folder: Path, count: int, seed: int) -> dict[str, Tally]:
    """Open so many malformed data sets, and return the outcomes by kind."""
    rng, items = random.Random(seed), base_items()
    os.environ["GLIDE_JAX_CACHE"] = str(folder / "cache")
    whole = write_files(folder / "whole", folder_of(items))
    truth = {r["caption"]: r["image"] for r in read_all(whole)[0]}
    assert set(truth) == {item.caption for item in items}
    found = {kind: Tally() for kind in KINDS}
    said = io.StringIO()
    for number in tqdm(range(count), "malformed data sets", disable=None):
        kind = rng.choices(KINDS, SHARES)[0]
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path, case = make_case(kind, items, rng, Path(place) / str(number))

            def read(path: Path = path, case: Case = case) -> str:
                with within(LIMIT), contextlib.redirect_stderr(said):
                    return read_case(path, items, case, truth)

            found[kind].add(f"{number}: {case.what}", read, LIMIT)
    assert "Traceback" not in said.getvalue()
    return found


def folder_of(items: list[Item]) -> dict[str, bytes]:
    """Return the files of a whole folder."""
    files = {f"{item.key}.{item.kind}": item.image for item in items}
    return files | {f"{item.key}.txt": item.caption.encode() for item in items}


def sentence(found: dict[str, Tally]) -> str:
    """Return the sentence of docs/results/faults.md."""
    parts = [
        f"{kind}: {t.counts.total()} cases, {t.counts['whole']} with all records, "
        f"{t.counts['faults']} with counted faults, {t.counts['refused']} refused with one line"
        for kind, t in found.items()
    ]
    bad = {k: sum(t.counts[k] for t in found.values()) for k in ("accepted", "traceback", "slow")}
    slowest = max(t.slowest for t in found.values())
    return (
        f"{'; '.join(parts)}; {bad['accepted']} records that are not what they were, "
        f"{bad['traceback']} tracebacks, {bad['slow']} hangs (slowest case {slowest:.1f} s)"
    )


def main(mutations: int = 10_000, seed: int = 0) -> None:
    """Open malformed data sets.

    Args:
        mutations: Number of data sets, each with one fault.
        seed: Seed of the faults.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), mutations, seed)
    report(found, sentence(found))


if __name__ == "__main__":
    tyro.cli(main)
