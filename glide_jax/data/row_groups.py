"""Rows of parquet and arrow files, read in any order. A group of rows is read at a time.

A parquet file cannot give one row alone: its group is read and decoded, and the last groups are
kept in memory. An arrow file is memory-mapped, and gives any row at once.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from glide_jax.data import storage
from glide_jax.data.records import digest, locate
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError

# Bytes of groups that each process keeps.
ROOM = 256 << 20
_OPEN = 128  # files that are open at the same time


def is_table_name(name: str) -> bool:
    """Whether a name is that of a parquet or arrow file."""
    return name.lower().endswith((".parquet", ".arrow"))


def check_pyarrow(path: str) -> None:
    """Raise `UsageError` if pyarrow, which reads a file, is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UsageError(f"{path} needs pyarrow: pip install 'glide-jax[parquet]'") from None


class _File:
    """An open file: its schema, the number of rows of each group, and its groups."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.lock = threading.Lock()
        self._parquet: pq.ParquetFile | None = None
        if path.lower().endswith(".parquet"):
            # Local files are mapped; of those at addresses only the needed parts are requested.
            where = storage.open_file(path) if storage.is_remote(path) else path
            self._parquet = parquet = pq.ParquetFile(
                where,
                metadata=_footers.get(path),
                memory_map=not storage.is_remote(path),
                pre_buffer=storage.is_remote(path),
            )
            footer = _footers.setdefault(path, parquet.metadata)
            self.schema = parquet.schema_arrow
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            self.rows = [group.num_rows for group in groups]
            self.bytes = [group.total_byte_size for group in groups]
            return
        if storage.is_remote(path):
            raise GlideError(
                f"{path} is an arrow file, which is read on this machine only: copy it, or save "
                "the data set with to_parquet"
            )
        mapped = pa.memory_map(path)
        try:
            table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            table = pa.ipc.open_file(mapped).read_all()
        self.schema, self._batches = table.schema, table.to_batches()
        self.rows = [batch.num_rows for batch in self._batches]
        self.bytes = [0] * len(self.rows)  # they stay in the file

    def group(self, number: int, columns: Sequence[str]) -> Any:
        """Return the columns of a group, as a table or a batch of pyarrow."""
        if self._parquet is None:
            return self._batches[number].select(list(columns))
        return self._parquet.read_row_group(number, columns=list(columns), use_threads=False)


_footers: dict[str, Any] = {}  # parsed once in each process, also if the file is closed


@lru_cache(_OPEN)
def _opened(path: str) -> _File:
    return _File(path)


def _reading(path: str, read: Callable[[], Any]) -> Any:
    """Return `read()`; whatever pyarrow or a file system raises becomes one line."""
    try:
        return read()
    except GlideError:
        raise
    except Exception as error:  # decoders and file systems raise errors of any kind
        if isinstance(error, FileNotFoundError):
            raise GlideError(f"there is no file {path}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GlideError(f"cannot read {path}: {reason:.200}") from None


class _Kept:
    """The groups that were used last, up to a number of bytes, and at least one."""

    def __init__(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0
        self._groups: OrderedDict[tuple, Any] = OrderedDict()

    def get(self, path: str, number: int, columns: tuple[str, ...]) -> Any:
        """Return the columns of a group."""
        key = (path, number, columns)
        if (group := self._find(key)) is not None:
            return group
        file = _opened(path)
        with file.lock:
            # Another thread may have read it in the meantime.
            if (group := self._find(key)) is not None:
                return group
            group = file.group(number, columns)
            with self._lock:
                self._groups[key] = group
                self._bytes += group.nbytes if file.bytes[number] else 0
                while self._bytes > ROOM and len(self._groups) > 1:
                    (old, index, _), dropped = self._groups.popitem(last=False)
                    self._bytes -= dropped.nbytes if _opened(old).bytes[index] else 0
        return group

    def _find(self, key: tuple) -> Any:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)


_kept = _Kept()


def text_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file without columns of bytes.

    Raises:
        GlideError: the file cannot be read.
    """
    check_pyarrow(path)
    file: _File = _reading(path, lambda: _opened(path))
    columns = [field.name for field in file.schema if "binary" not in str(field.type)]
    for number in range(len(file.rows)):
        with file.lock:
            yield from _reading(path, lambda i=number: file.group(i, columns).to_pylist())


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Random access to the rows of several files.

    Attributes:
        paths: the files.
        ends: for each file, the number of rows up to and including each group.
        counts: `(len(paths),)`, the number of rows up to and including each file.
        largest: bytes of the largest group, decoded.
        bytes: of all groups, decoded; 0 for arrow files.
    """

    paths: tuple[str, ...]
    ends: tuple[np.ndarray, ...]
    counts: np.ndarray
    largest: int = 0
    bytes: int = 0

    def __len__(self) -> int:
        return int(self.counts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file of a row, and the row's number in that file."""
        return locate(self.counts, index)

    def name(self, index: int) -> str:
        """Return the name of a row in messages; rows count from 0."""
        file, row = self.locate(index)
        return f"{self.paths[file]}, row {row}"

    def read(self, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """Return some columns of a row.

        Raises:
            BrokenRecord: the group of the row cannot be read.
        """
        file, row = self.locate(index)
        path, ends = self.paths[file], self.ends[file]
        number = int(np.searchsorted(ends, row, side="right"))
        first = int(ends[number - 1]) if number else 0
        try:
            group = _reading(path, lambda: _kept.get(path, number, columns))
            return _reading(path, lambda: group.slice(row - first, 1).to_pylist())[0]
        except GlideError as error:
            raise BrokenRecord(f"{error} (row {row})") from None

    @property
    def identity(self) -> str:
        """Checksum of the names of the files and their numbers of rows."""
        names = [PurePosixPath(path).name for path in self.paths]
        return digest([*names, *(end.tobytes() for end in self.ends)])


def open_row_groups(paths: Sequence[str]) -> tuple[RowGroups, list[Any]]:
    """Return the rows of some files, and the schema of each file. Only footers are read.

    Raises:
        UsageError: pyarrow is not installed.
        GlideError: a file is missing or broken.
    """
    check_pyarrow(paths[0])

    def look(path: str) -> tuple[list[int], list[int], Any]:
        file: _File = _reading(path, lambda: _opened(path))
        return file.rows, file.bytes, file.schema

    with ThreadPoolExecutor(8) as pool:
        footers = pool.map(look, paths)
        scanned = list(tqdm(footers, "reading footers", len(paths), unit="file", delay=2))
    sizes = [size for _, file, _ in scanned for size in file]
    groups = RowGroups(
        tuple(paths),
        tuple(np.cumsum(rows, dtype=np.int64) for rows, _, _ in scanned),
        np.cumsum([sum(rows) for rows, _, _ in scanned], dtype=np.int64),
        max(sizes, default=0),
        sum(sizes),
    )
    return groups, [schema for _, _, schema in scanned]
