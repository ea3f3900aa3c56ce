"""Records inside large files, read in any order. Their positions are found once and cached."""

import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

from glide_jax.data import storage
from glide_jax.data.records import digest, locate
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import one_line
from glide_jax.folders import cache_folder

# A larger record is not an image with its caption, and would be read into memory as a whole.
_LARGEST = 1 << 28


@dataclass(frozen=True, eq=False)
class Scan:
    """Where the records of a file lie.

    Attributes:
        spans: `(M, 2)` int64, first and last + 1 byte of parts of the file.
        first: `(N + 1,)` int64: record i consists of the spans first[i] up to first[i + 1].
        kinds: `(N,)` int32, for each record an index into `names`.
        names: sorted extensions of a record, separated by spaces; "" where records have none.
        damage: the reason why reading ended early, or "".
        unused: members that belong to no record: reason, name of the first, and count.
    """

    spans: np.ndarray
    first: np.ndarray
    kinds: np.ndarray
    names: tuple[str, ...] = ("",)
    damage: str = ""
    unused: tuple[tuple[str, str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.kinds)


def contiguous_scan(bounds: Sequence[int], damage: str = "") -> Scan:
    """Return the scan of records without gaps: record i is bytes [bounds[i], bounds[i + 1])."""
    edges = np.array(bounds, np.int64)
    count = len(edges) - 1
    spans = np.stack([edges[:-1], edges[1:]], 1)
    return Scan(spans, np.arange(count + 1), np.zeros(count, np.int32), damage=damage)


# A function from a file to the places of its records.
Scanner = Callable[[IO[bytes]], Scan]


@dataclass(frozen=True, eq=False)
class Shards:
    """Random access to the bytes of records in several files.

    Attributes:
        paths: the files.
        scans: where the records of each file lie.
        counts: `(len(paths),)`, the number of records up to and including each file.
    """

    paths: tuple[str, ...]
    scans: tuple[Scan, ...]
    counts: np.ndarray

    def __len__(self) -> int:
        return int(self.counts[-1])

    @property
    def damaged(self) -> int:
        """Number of files that could not be read to their end."""
        return sum(bool(scan.damage) for scan in self.scans)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file of a record, and the record's number in that file."""
        return locate(self.counts, index)

    def name(self, index: int) -> str:
        """Return the name of a record in messages."""
        file, i = self.locate(index)
        return f"{self.paths[file]}, record {i}"

    def __getitem__(self, index: int) -> bytes:
        file, i = self.locate(index)
        scan = self.scans[file]
        spans = scan.spans[scan.first[i] : scan.first[i + 1]]
        size = int((spans[:, 1] - spans[:, 0]).sum())
        if size > _LARGEST:
            raise BrokenRecord(f"{self.name(index)} has {size:,} bytes")
        parts = [storage.read(self.paths[file], int(start), int(end)) for start, end in spans]
        data = b"".join(parts)
        if len(data) != size:
            raise BrokenRecord(f"{self.name(index)} ends early: the file has become shorter")
        return data

    @property
    def identity(self) -> str:
        """Checksum of the names of the files and the places of their records."""
        names = [PurePosixPath(path).name for path in self.paths]
        places = (a.tobytes() for scan in self.scans for a in (scan.spans, scan.first))
        return digest([*names, *places])


def index_shards(paths: Sequence[str], scan: Scanner) -> Shards:
    """Find the records of some files, or read their positions from the user's cache.

    A damaged file is read up to the damage, and named on stderr.

    Raises:
        GlideError: a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        scanned = pool.map(lambda path: _scanned(path, scan), paths)
        scans = list(tqdm(scanned, "finding records", len(paths), unit="file", delay=2))
    for path, file_scan in zip(paths, scans, strict=True):
        if file_scan.damage:
            about = f"{path} is damaged after {len(file_scan)} records: {file_scan.damage}"
            print(one_line(about), file=sys.stderr)
    return Shards(tuple(paths), tuple(scans), np.cumsum(list(map(len, scans))))


def _scanned(path: str, scan: Scanner) -> Scan:
    stamp = storage.stamp(path)
    cached = cache_folder() / "shards" / f"{digest([scan.__name__, path, stamp])}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            names, damage, unused = json.loads(str(arrays["texts"]))
            places = (arrays["spans"], arrays["first"], arrays["kinds"])
            return Scan(*places, tuple(names), damage, tuple(map(tuple, unused)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not cached, or the cache is damaged: scan the file
    file_scan = storage.read_with(path, scan)
    _save(cached, file_scan)
    return file_scan


def _save(path: Path, scan: Scan) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            texts = np.array(json.dumps([scan.names, scan.damage, scan.unused]))
            np.savez(file, spans=scan.spans, first=scan.first, kinds=scan.kinds, texts=texts)
        partial.replace(path)
    except OSError:
        # A read-only or full home folder costs time at the next start, not results.
        partial.unlink(missing_ok=True)
