"""Files on this machine and at gs://, hf:// and other addresses, through the same functions."""

import glob
import os
import re
from collections.abc import Callable
from functools import cache
from typing import IO, Any, TypeVar, cast

import fsspec

from glide_jax.errors import GlideError, UsageError, one_line

T = TypeVar("T")


class BrokenRecord(GlideError):
    """A record that cannot be used. Training counts it and takes another one.

    Its message is one line, also where a name in it has line breaks.
    """

    def __init__(self, message: object):
        super().__init__(one_line(message))


def is_remote(path: str) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in path


def expand(path: str) -> str:
    """Return a path with `~` replaced; an address is not changed."""
    return path if is_remote(path) else os.path.expanduser(path)


@cache
def _system(protocol: str) -> fsspec.AbstractFileSystem:
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        packages = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}
        package = packages.get(protocol, "its package")
        raise GlideError(
            f"{protocol}:// needs {package}: pip install {package} ({error})"
        ) from None
    except ValueError:
        raise UsageError(f"unknown kind of address {protocol}://: use gs:// or a folder") from None


def _system_of(path: str) -> fsspec.AbstractFileSystem:
    return _system(path.split("://")[0] if is_remote(path) else "file")


def _ask(path: str, question: Callable[[fsspec.AbstractFileSystem], T]) -> T:
    """Return the answer of a path's file system; any failure of it becomes one line."""
    try:
        return question(_system_of(path))
    except GlideError:
        raise
    except Exception as error:  # each kind of address raises errors of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GlideError(f"cannot read {path} ({reason:.200})") from None


def read(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes [start, end) of a file.

    Raises:
        BrokenRecord: the file cannot be read.
    """
    try:
        return cast(bytes, _system_of(path).cat_file(path, start=start, end=end))
    except OSError as error:
        raise BrokenRecord(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # each kind of address raises errors of its own
        if isinstance(error, GlideError) or not is_remote(path):
            raise
        raise BrokenRecord(f"cannot read {path}: {error!r:.200}") from None


def read_with(path: str, use: Callable[[IO[bytes]], T]) -> T:
    """Return `use(file)` of a file opened at its beginning.

    Raises:
        GlideError: the file cannot be read.
    """

    def opened(system: fsspec.AbstractFileSystem) -> T:
        with system.open(path, "rb") as file:
            return use(cast(IO[bytes], file))

    return _ask(path, opened)


def open_file(path: str) -> IO[bytes]:
    """Return a file opened at its beginning, in which any part can be read."""
    return cast(IO[bytes], _system_of(path).open(path, "rb"))


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    return _ask(path, lambda system: system.exists(path))


def is_folder(path: str) -> bool:
    """Whether there is such a folder."""
    return _ask(path, lambda system: system.isdir(path))


def stamp(path: str) -> str:
    """Return a text that changes if the file does: its size, and its time or version."""
    info: dict[str, Any] = _ask(path, lambda system: system.info(path))
    written = next((info[k] for k in ("mtime", "etag", "updated", "ETag") if k in info), "")
    return f"{info['size']} {written}"


def join(folder: str, name: str) -> str:
    """Return the path of `name` in `folder`; an absolute path or an address is not changed."""
    if is_remote(name) or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}"


def find(folder: str) -> list[str]:
    """Return the files below an address, relative to it."""
    paths = _ask(folder, lambda system: system.find(folder))
    system: Any = _system_of(folder)
    if hasattr(system, "resolve_path"):  # hf:// may write a revision in another way
        root = _ask(folder, lambda _: str(system.resolve_path(folder).unresolve()))
    else:
        root = str(fsspec.core.strip_protocol(folder)).rstrip("/")
    return [str(path).removeprefix(root).lstrip("/") for path in paths]


def children(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, sorted, without hidden ones."""
    if not is_remote(folder):
        return _local_children(folder)
    entries = _ask(folder, lambda system: system.ls(folder, detail=True))
    folders, files = [], []
    for entry in entries:
        path = str(entry["name"]).rstrip("/")
        name = path.rpartition("/")[2]
        if name and not name.startswith("."):
            (folders if entry["type"] == "directory" else files).append(name)
    return sorted(folders), sorted(files)


def _local_children(folder: str) -> tuple[list[str], list[str]]:
    try:
        with os.scandir(folder) as entries:
            names_and_kinds = sorted((entry.name, os.path.isdir(entry.path)) for entry in entries)
    except OSError as error:
        raise GlideError(f"cannot read {folder} ({error.strerror})") from None
    shown = [(name, is_dir) for name, is_dir in names_and_kinds if not name.startswith(".")]
    return [n for n, is_dir in shown if is_dir], [n for n, is_dir in shown if not is_dir]


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards or braces."""
    return bool(re.search(r"[*?\[]|\{[^{}]*(,|\.\.)[^{}]*\}", path))


def matching(pattern: str) -> list[str]:
    """Return the files of a pattern, sorted.

    `{000..099}` counts, `{a,b}` lists, `*`, `?` and `[abc]` match text, and `::` joins patterns. A
    file of that very name comes first. Names in braces need not exist: a missing one is noticed
    when it is opened.

    Raises:
        UsageError: the braces are not closed, or count what is no number.
    """
    if "::" in pattern:
        return sorted({file for part in pattern.split("::") for file in matching(part)})
    if not is_pattern(pattern):
        if re.search(r"[{}]", pattern) and not exists(pattern):
            raise UsageError(
                f"cannot read the braces of {pattern}: write {{000..099}} to count, {{a,b}} to list"
            )
        return [pattern]
    if exists(pattern):
        return [pattern]
    if braces := re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern):
        names = _alternatives(braces.group(1), pattern)
        paths = (pattern[: braces.start()] + n + pattern[braces.end() :] for n in names)
        return sorted({file for path in paths for file in matching(path)})
    folder, slash, last = pattern.rpartition("/")
    if re.search(r"[*?\[]", folder) and exists(folder):
        pattern = glob.escape(folder) + slash + last  # the name of a folder may have brackets
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    scheme = pattern.split("://")[0] + "://"
    paths = cast(list[str], _ask(pattern, lambda system: system.glob(pattern)))
    return sorted(scheme + path.lstrip("/") for path in paths)


def _alternatives(text: str, pattern: str) -> list[str]:
    """Return the names that braces stand for: `08..10` -> 08, 09, 10."""
    if "," in text:
        return text.split(",")
    counted = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", text)
    if not counted or (counted.group(3) and not int(counted.group(3))):
        raise UsageError(f"cannot count {{{text}}} of {pattern}: write {{000..099}}")
    first, last, step = counted.groups(default="1")
    low, high = sorted((int(first), int(last)))
    # As a shell does it: the width is that of the longer number with leading zeros.
    width = max((len(n) for n in (first, last) if n.startswith("0")), default=0)
    return [str(i).zfill(width) for i in range(low, high + 1, int(step))]
