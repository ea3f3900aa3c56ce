"""Files of this machine and, by the same functions, those at gs:// and other addresses."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, TypeVar

import fsspec

from glide_jax.errors import GlideError, UsageError

T = TypeVar("T")


class BrokenRecord(GlideError):
    """A record that cannot be used: training takes another one, counts it and goes on."""


def is_remote(path: str) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in path


def expand(path: str) -> str:
    """A path with `~` replaced; an address stays as it is."""
    return path if is_remote(path) else os.path.expanduser(path)


@cache
def _system(protocol: str) -> fsspec.AbstractFileSystem:
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(protocol, "its package")
        raise GlideError(
            f"{protocol}:// needs {package}: pip install {package} ({error})"
        ) from None
    except ValueError:
        raise UsageError(f"unknown kind of address {protocol}://: use gs:// or a folder") from None


def _of(path: str) -> fsspec.AbstractFileSystem:
    return _system(path.split("://")[0] if is_remote(path) else "file")


def _asked(path: str, question: Callable[[fsspec.AbstractFileSystem], T]) -> T:
    """What a file system answers; a network's many ways of failing become one line."""
    try:
        return question(_of(path))
    except GlideError:
        raise
    except Exception as error:  # each kind of address raises errors of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GlideError(f"cannot read {path} ({reason:.200})") from None


def read(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file.

    Raises:
        BrokenRecord: it cannot be read.
    """
    try:
        return _of(path).cat_file(path, start=start, end=end)
    except OSError as error:
        raise BrokenRecord(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # as above
        if isinstance(error, GlideError) or not is_remote(path):
            raise
        raise BrokenRecord(f"cannot read {path}: {error!r:.200}") from None


def with_opened(path: str, use: Callable[[IO[bytes]], T]) -> T:
    """What a function makes of a file, opened at its beginning. Raises GlideError on failing."""

    def opened(fs: fsspec.AbstractFileSystem) -> T:
        with fs.open(path, "rb") as file:
            return use(file)

    return _asked(path, opened)


def is_file(path: str) -> bool:
    """Whether there is such a file."""
    return _asked(path, lambda fs: fs.isfile(path))


def is_folder(path: str) -> bool:
    """Whether there is such a folder."""
    return _asked(path, lambda fs: fs.isdir(path))


def stamp(path: str) -> str:
    """What changes when a file does: its size, and when or as what it was written."""
    info = _asked(path, lambda fs: fs.info(path))
    written = next((info[k] for k in ("mtime", "etag", "updated", "ETag") if k in info), "")
    return f"{info['size']} {written}"


def join(folder: str, name: str) -> str:
    """`name` in `folder`, unless it is a whole path or address itself."""
    if is_remote(name) or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}"


def find(folder: str) -> list[str]:
    """The files below a folder, relative to it and sorted; hidden ones (`._a.png`) left out."""
    paths = _asked(folder, lambda fs: fs.find(folder))
    root = fsspec.core.strip_protocol(folder).rstrip("/")
    names = (path.removeprefix(root).lstrip("/") for path in paths)
    return sorted(name for name in names if not re.search(r"(^|/)\.", name))


def matching(pattern: str) -> list[str]:
    """The files that a pattern names, sorted: `{000..099}` counts, `*` and `?` match any.

    Counted names are taken as they are, so that one that is missing is noticed later.
    """
    if counted := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = counted.groups()
        names = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        parts = (pattern[: counted.start()] + n + pattern[counted.end() :] for n in names)
        return sorted({path for part in parts for path in matching(part)})
    if not re.search(r"[*?]", pattern):
        return [pattern]
    scheme = pattern.split("://")[0] + "://" if is_remote(pattern) else ""
    found: Sequence[str] = _asked(pattern, lambda fs: fs.glob(pattern))
    return sorted(scheme + path.lstrip("/") if scheme else path for path in found)
