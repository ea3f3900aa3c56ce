"""The files below a folder: links to folders are followed, and every other entry is accounted for.

A folder is read once, however many links lead to it. Folders that lie in the tree itself come
first, then links in the order of their names, so the result does not depend on the disk.
"""

import os
import re
from collections import deque
from typing import NamedTuple

from glide_jax.data import storage
from glide_jax.data.faults import HIDDEN, Fault
from glide_jax.errors import GlideError

# Files that systems write by themselves; they are no news to anyone.
_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", ".gitignore"}


class Tree(NamedTuple):
    """The files below a folder.

    Attributes:
        names: paths relative to the folder, sorted, without hidden ones (`._a`).
        unused: hidden files and folders, and links and folders that cannot be followed.
    """

    names: list[str]
    unused: list[Fault]


def find(folder: str) -> Tree:
    """Return the files below a folder or an address.

    Raises:
        GlideError: the folder cannot be read.
    """
    if storage.is_remote(folder):
        names = storage.find(folder)
        hidden = [name for name in names if re.search(r"(^|/)\.", name)]
        tree = Tree(sorted({*names}.difference(hidden)), [Fault(n, HIDDEN) for n in hidden])
    else:
        tree = _Walk(folder).tree
    unused = [f for f in tree.unused if f.name.rpartition("/")[2] not in _OF_SYSTEMS]
    names = [n for n in tree.names if n.rpartition("/")[2] not in _OF_SYSTEMS]
    return Tree(names, sorted(unused))


class _Walk:
    """One pass over a folder of this machine."""

    def __init__(self, folder: str) -> None:
        self.tree = Tree([], [])
        self._root = os.path.realpath(folder)
        self._seen: set[tuple[int, int]] = set()
        self._links: deque[tuple[str, str]] = deque()
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise GlideError(f"cannot read {folder} ({error.strerror})") from None
        self._read("", folder)
        while self._links:
            self._follow(*self._links.popleft())
        self.tree.names.sort()

    def _unused(self, name: str, reason: str) -> None:
        self.tree.unused.append(Fault(name, reason))

    def _follow(self, name: str, path: str) -> None:
        target = os.path.realpath(path)
        inside = (self._root, os.path.realpath(os.path.dirname(path)))
        if any(f"{place}/".startswith(f"{target.rstrip('/')}/") for place in inside):
            self._unused(name, "link to a folder around it")
        elif self._key(path) in self._seen:
            self._unused(name, "link to a folder that is read already")
        else:
            self._read(name, path)

    @staticmethod
    def _key(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    def _read(self, first: str, path: str) -> None:
        """Read a folder and those in it; links to folders are left for later."""
        waiting, links = [(first, path)], []
        while waiting:
            prefix, folder = waiting.pop()
            try:
                key = self._key(folder)
                if key in self._seen:
                    continue
                self._seen.add(key)
                with os.scandir(folder) as entries:
                    children = list(entries)
            except OSError as error:
                self._unused(f"{prefix}/", f"folder that cannot be read, {error.strerror}")
                continue
            for entry in children:
                name = f"{prefix}/{entry.name}" if prefix else entry.name
                kind = _kind(entry)
                if entry.name.startswith("."):
                    self._unused(name, HIDDEN)
                elif kind == "file":
                    self.tree.names.append(name)
                elif kind == "folder" and entry.is_symlink():
                    links.append((name, entry.path))
                elif kind == "folder":
                    waiting.append((name, entry.path))
                else:
                    self._unused(name, kind)
        self._links.extend(sorted(links))


def _kind(entry: "os.DirEntry[str]") -> str:
    """Return "file", "folder", or what is wrong with an entry."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError as error:  # a link to itself
        return f"broken link, {error.strerror}"
    return "broken link" if entry.is_symlink() else "not a file"
