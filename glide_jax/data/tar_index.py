"""Where the records of a tar file lie: which members belong together.

A record is the members of one key. The key is a member's path up to the first dot of its name, as
in webdataset; the rest is its extension: `a/b.seg.png` is `seg.png` of `a/b`. Members of a key need
not be adjacent. Three layouts differ from that, and are recognised:

- dots in keys: `22.00.jpg 22.00.txt 22.01.jpg 22.01.txt` are two records, since what ends in
  `.00` has an image and a text of its own;
- a key that is used again: `1.jpg 1.txt 2.jpg 2.txt 1.jpg 1.txt` are three records;
- folders as keys: `7/input.jpg 7/output.txt` is one record, if there is no more in the
  folder.
"""

import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from glide_jax.data.shards import Scan
from glide_jax.data.sidecars import TEXTS, image_suffixes

# Raised by tarfile on malformed headers. An OSError is not here: it comes from disk or network.
MALFORMED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, MemoryError)
_TEXTS = {*TEXTS, "json", "cls"}
_HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|$))")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in a tar file: its key and extension, and the bytes of header and content."""

    key: str
    extension: str
    start: int
    end: int


def split_name(name: str) -> tuple[str, str]:
    """Return the key and the extension of a member: `./a/b.Seg.PNG` -> `a/b`, `seg.png`."""
    # An archive may have a name in composed letters, and its caption's in decomposed ones.
    folder, slash, name = unicodedata.normalize("NFC", name.removeprefix("./")).rpartition("/")
    key, _, extension = name.partition(".")
    return folder + slash + key, extension.lower()


def fault_of(member: tarfile.TarInfo) -> str:
    """Return why a member is no file of a record, or ""."""
    if _HIDDEN.search(member.name):
        return "hidden"
    if member.issym() or member.islnk():
        return "link"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "not a plain file"
    return ""


def scan_tar(file: IO[bytes]) -> Scan:
    """Return where the records of a tar file lie."""
    members: list[Member] = []
    unused: dict[str, list[str]] = {}
    damage = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if fault := fault_of(info):
                    unused.setdefault(fault, []).append(info.name)
                elif not info.isdir():
                    blocks = -(-info.size // tarfile.BLOCKSIZE)
                    end = info.offset_data + blocks * tarfile.BLOCKSIZE
                    members.append(Member(*split_name(info.name), info.offset, end))
            file.seek(tar.offset)
            # For tarfile, a header that it cannot read is the end of the archive.
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                damage = "there is no member where one should start"
    except MALFORMED as error:
        damage = _damage(file, error)
        # The last record may be incomplete.
        last = members[-1].key if members else ""
        while members and members[-1].key == last:
            members.pop()
    records = sorted(_records(members), key=lambda record: record[0].start)
    spans, first, kinds = [], [0], []
    names: dict[str, int] = {}
    for record in records:
        spans.extend(_spans(record))
        first.append(len(spans))
        kind = " ".join(sorted(member.extension for member in record))
        kinds.append(names.setdefault(kind, len(names)))
    return Scan(
        np.array(spans, np.int64).reshape(-1, 2),
        np.array(first, np.int64),
        np.array(kinds, np.int32),
        tuple(names),
        damage,
        tuple((why, them[0], len(them)) for why, them in unused.items()),
    )


def _damage(file: IO[bytes], error: BaseException) -> str:
    file.seek(0)
    head = file.read(512)
    for mark, name in _COMPRESSED.items():
        if head.startswith(mark):
            return f"it is compressed with {name}: unpack it to a plain .tar file"
    return str(error) or type(error).__name__


def _spans(members: list[Member]) -> Iterator[tuple[int, int]]:
    """Yield the bytes of members; those that touch are one span."""
    start, end = members[0].start, members[0].end
    for member in members[1:]:
        if member.start != end:
            yield start, end
            start = member.start
        end = member.end
    yield start, end


def _records(members: list[Member]) -> list[list[Member]]:
    """Return the members of each record."""
    keys: dict[str, list[tuple[int, Member]]] = {}
    run, last = -1, None
    for member in members:
        run += member.key != last  # members of a run follow each other
        last = member.key
        keys.setdefault(member.key, []).append((run, member))
    records = []
    for numbered in keys.values():
        for part in _parts(numbered):
            records.extend(_repeated(part))
    return _folders(records)


def _parts(numbered: list[tuple[int, Member]]) -> Iterator[list[tuple[int, Member]]]:
    """Yield the records of keys with dots, which begin equally, and then all other members."""
    groups: dict[str, list[tuple[int, Member]]] = {}
    for run, member in numbered:
        groups.setdefault(member.extension.rpartition(".")[0], []).append((run, member))
    others = []
    for prefix, group in groups.items():
        kinds = {member.extension.rpartition(".")[2] for _, member in group}
        # With `1.jpg`, `1.seg.png` and `1.seg.json` describe that image.
        texts = _TEXTS if "" not in groups else _TEXTS - {"json", "cls"}
        if prefix and _has_image(kinds) and kinds & texts:
            yield group
        else:
            others.extend(group)
    if others:
        yield others


def _has_image(kinds: set[str]) -> bool:
    return any(f".{kind}" in image_suffixes() for kind in kinds)


def _repeated(numbered: list[tuple[int, Member]]) -> Iterator[list[Member]]:
    """Yield the records of a key: an extension that comes again later begins another one."""
    record: list[Member] = []
    runs: dict[str, int] = {}
    for run, member in numbered:
        # Within a run it is an error, which reading the record reports.
        if runs.get(member.extension, run) != run:
            yield record
            record, runs = [], {}
        record.append(member)
        runs[member.extension] = run
    yield record


def _folders(records: list[list[Member]]) -> list[list[Member]]:
    """Return the records, with an image and a text that are alone in their folder as one."""
    alone: dict[str, list[list[Member]]] = {}
    for record in records:
        alone.setdefault(record[0].key.rpartition("/")[0], []).append(record)
    joined = []
    for folder, those in alone.items():
        kinds = [{m.extension.rpartition(".")[2] for m in record} for record in those]
        images = sum(map(_has_image, kinds))
        texts = sum(bool(kind & _TEXTS) for kind in kinds)
        two = len(those) == 2 and images == texts == 1
        joined += [[*those[0], *those[1]]] if folder and two and _differ(those) else those
    return joined


def _differ(records: list[list[Member]]) -> bool:
    counts = Counter(member.extension for record in records for member in record)
    return max(counts.values()) == 1
