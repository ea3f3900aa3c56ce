"""Records inside large files, read in any order: where each begins is found once and kept."""

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
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.records import digest
from glide_jax.folders import cache_folder

# A larger record is no picture with its caption, and would be read into memory whole.
_LARGEST = 1 << 28

# A file from its beginning -> where its records begin and the last one ends (N + 1,) int64, and
# what ended the reading early, or "".
Scan = Callable[[IO[bytes]], tuple[np.ndarray, str]]


@dataclass(frozen=True, eq=False)
class Shards:
    """Random access to the bytes of records in several files.

    Attributes:
        paths: of the files.
        bounds: of each, `(N + 1,)` int64: record i is bytes [bounds[i], bounds[i + 1]).
        counts: records up to and including each file, `(len(paths),)`.
        damaged: how many of the files could not be read to their end.
    """

    paths: tuple[str, ...]
    bounds: tuple[np.ndarray, ...]
    counts: np.ndarray
    damaged: int

    def __len__(self) -> int:
        return int(self.counts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Number of the file, and of the record in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.counts, index, side="right"))
        return file, int(index - (self.counts[file - 1] if file else 0))

    def name(self, index: int) -> str:
        """What to call a record in a message."""
        file, i = self.place(index)
        return f"{self.paths[file]}, record {i}"

    def __getitem__(self, index: int) -> bytes:
        file, i = self.place(index)
        start, end = (int(n) for n in self.bounds[file][i : i + 2])
        if end - start > _LARGEST:
            raise BrokenRecord(f"{self.name(index)} has {end - start:,} bytes")
        data = storage.read(self.paths[file], start, end)
        if len(data) != end - start:
            raise BrokenRecord(f"{self.name(index)} ends early: the file has become shorter")
        return data

    @property
    def identity(self) -> str:
        """A checksum of the files' names and of where their records begin."""
        names = [PurePosixPath(path).name for path in self.paths]
        return digest([*names, *(bounds.tobytes() for bounds in self.bounds)])


def index_shards(paths: Sequence[str], scan: Scan) -> Shards:
    """Finds the records of some files; what was found before is read from the user's cache.

    A damaged file is read as far as it goes; each is named on stderr.

    Raises:
        GlideError: a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        looked = pool.map(lambda path: _bounds(path, scan), paths)
        found = list(tqdm(looked, "finding records", len(paths), unit="file", delay=2))
    for path, (bounds, damage) in zip(paths, found, strict=True):
        if damage:
            print(f"{path} is damaged after {len(bounds) - 1} records: {damage}", file=sys.stderr)
    bounds = tuple(b for b, _ in found)
    counts = np.cumsum([len(b) - 1 for b in bounds])
    return Shards(tuple(paths), bounds, counts, sum(bool(damage) for _, damage in found))


def _bounds(path: str, scan: Scan) -> tuple[np.ndarray, str]:
    stamp = storage.stamp(path)
    kept = cache_folder() / "shards" / f"{digest([scan.__name__, path, stamp])}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return arrays["bounds"], str(arrays["damage"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # never looked at, or the cache was harmed: look
    bounds, damage = storage.with_opened(path, scan)
    _keep(kept, bounds, damage)
    return bounds, damage


def _keep(path: Path, bounds: np.ndarray, damage: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, bounds=bounds, damage=np.array(damage))
        partial.replace(path)
    except OSError:
        # A read-only or full home costs time at the next start, not results.
        partial.unlink(missing_ok=True)
