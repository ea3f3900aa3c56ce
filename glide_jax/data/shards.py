"""Records inside large files, read in any order. Their positions are found once and cached."""

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
from glide_jax.data.records import digest
from glide_jax.data.storage import BrokenRecord
from glide_jax.folders import cache_folder

# A larger record is not an image with its caption, and would be read into memory as a whole.
_LARGEST = 1 << 28

# A function from a file to the bounds of its records, `(N + 1,)` int64, and the reason why reading
# ended early, or "". Record i is bytes [bounds[i], bounds[i + 1]).
Scan = Callable[[IO[bytes]], tuple[np.ndarray, str]]


@dataclass(frozen=True, eq=False)
class Shards:
    """Random access to the bytes of records in several files.

    Attributes:
        paths: the files.
        bounds: for each file `(N + 1,)` int64: record i is bytes [bounds[i], bounds[i + 1]).
        counts: `(len(paths),)`, the number of records up to and including each file.
        damaged: number of files that could not be read to their end.
    """

    paths: tuple[str, ...]
    bounds: tuple[np.ndarray, ...]
    counts: np.ndarray
    damaged: int

    def __len__(self) -> int:
        return int(self.counts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file of a record, and the record's number in that file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.counts, index, side="right"))
        return file, int(index - (self.counts[file - 1] if file else 0))

    def name(self, index: int) -> str:
        """Return the name of a record in messages."""
        file, i = self.locate(index)
        return f"{self.paths[file]}, record {i}"

    def __getitem__(self, index: int) -> bytes:
        file, i = self.locate(index)
        start, end = (int(n) for n in self.bounds[file][i : i + 2])
        if end - start > _LARGEST:
            raise BrokenRecord(f"{self.name(index)} has {end - start:,} bytes")
        data = storage.read(self.paths[file], start, end)
        if len(data) != end - start:
            raise BrokenRecord(f"{self.name(index)} ends early: the file has become shorter")
        return data

    @property
    def identity(self) -> str:
        """Checksum of the names of the files and the bounds of their records."""
        names = [PurePosixPath(path).name for path in self.paths]
        return digest([*names, *(bounds.tobytes() for bounds in self.bounds)])


def index_shards(paths: Sequence[str], scan: Scan) -> Shards:
    """Find the records of some files, or read their positions from the user's cache.

    A damaged file is read up to the damage, and named on stderr.

    Raises:
        GlideError: a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        scanned = pool.map(lambda path: _bounds(path, scan), paths)
        found = list(tqdm(scanned, "finding records", len(paths), unit="file", delay=2))
    for path, (bounds, damage) in zip(paths, found, strict=True):
        if damage:
            print(f"{path} is damaged after {len(bounds) - 1} records: {damage}", file=sys.stderr)
    bounds = tuple(b for b, _ in found)
    counts = np.cumsum([len(b) - 1 for b in bounds])
    return Shards(tuple(paths), bounds, counts, sum(bool(damage) for _, damage in found))


def _bounds(path: str, scan: Scan) -> tuple[np.ndarray, str]:
    stamp = storage.stamp(path)
    cached = cache_folder() / "shards" / f"{digest([scan.__name__, path, stamp])}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["bounds"], str(arrays["damage"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not cached, or the cache is damaged: scan the file
    bounds, damage = storage.with_opened(path, scan)
    _save(cached, bounds, damage)
    return bounds, damage


def _save(path: Path, bounds: np.ndarray, damage: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, bounds=bounds, damage=np.array(damage))
        partial.replace(path)
    except OSError:
        # A read-only or full home folder costs time at the next start, not results.
        partial.unlink(missing_ok=True)
