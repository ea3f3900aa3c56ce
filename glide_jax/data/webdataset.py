"""Tar shards as webdataset and img2dataset write them: `0001.jpg 0001.txt 0001.json 0002.jpg ...`

Consecutive members whose names are equal up to the first dot are one record. Nothing is unpacked:
members are read by their position in the file, so their names never become paths. Links, folders,
devices, sparse files and hidden files are ignored.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import SUFFIXES, Encoded
from glide_jax.data.records import (
    CAPTION_FIELDS,
    Source,
    captions_of,
    field_of,
    lookup,
    other_texts,
)
from glide_jax.data.shards import Shards, index_shards
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError

_TEXT = ("txt", "caption")
# Raised by tarfile on malformed headers. An OSError is not here: it comes from disk or network.
_MALFORMED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, MemoryError)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield each file, its record's key and its extension: `a/b.Seg.PNG` -> `a/b`, `seg.png`."""
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse() and key:
            yield member, folder + slash + key, extension.lower()


def scan_tar(file: IO[bytes]) -> tuple[np.ndarray, str]:
    """Return the bounds of the records of a tar file, and its damage (see `shards.Scan`)."""
    bounds, damage, last, end = [], "", None, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member, key, _ in _members(tar):
                if key != last:
                    bounds.append(member.offset)
                    last = key
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            file.seek(tar.offset)
            # For tarfile, a header that it cannot read is the end of the archive.
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                damage = "there is no member where one should start"
    except _MALFORMED as error:
        # The last record may be incomplete.
        damage, end = str(error) or type(error).__name__, bounds.pop() if bounds else 0
    return np.array([*bounds, end], np.int64), damage


@dataclass(frozen=True, eq=False)
class TarRecords:
    """Records of tar shards.

    Attributes:
        shards: the files.
        image: extension of the images; empty for the usual ones.
        caption: extension or JSON field of the captions; empty for the usual ones.
    """

    shards: Shards
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = name = self.shards.name(index)
        members: dict[str, bytes] = {}
        try:
            # Consecutive whole members are a tar file themselves.
            with tarfile.open(fileobj=io.BytesIO(self.shards[index]), mode="r:") as tar:
                for member, key, extension in _members(tar):
                    name = f"{where} ({key})"
                    if extension in members:
                        raise BrokenRecord(f"{name} has its {extension} twice")
                    file = tar.extractfile(member)
                    assert file is not None  # `_members` yields regular files only
                    members[extension] = file.read()
        except _MALFORMED as error:
            raise BrokenRecord(f"cannot read {name}: {error}") from None
        image = self.image or next((e for e in members if f".{e}" in SUFFIXES), None)
        if image not in members:
            raise BrokenRecord(f"{name} has {', '.join(members)}, and no {image or 'image'}")
        return {"image": Encoded(members[image], name), **self._texts(members, name)}

    def _texts(self, members: dict[str, bytes], name: str) -> dict[str, Any]:
        fields = {}
        if "json" in members:
            try:
                fields = json.loads(members["json"])
            except (ValueError, RecursionError) as error:
                raise BrokenRecord(f"the JSON of {name} cannot be read: {error}") from None
            if not isinstance(fields, dict):
                raise BrokenRecord(f"the JSON of {name} is not an object")
        extensions = (self.caption,) if self.caption else _TEXT
        if extension := next((e for e in extensions if e in members), None):
            caption = members[extension]
        else:
            try:
                field = field_of(fields, self.caption, CAPTION_FIELDS, "caption-field")
            except BrokenRecord as error:
                raise BrokenRecord(f"{name} has no text file, and its JSON {error}") from None
            caption = lookup(fields, field)
        return {"caption": captions_of(caption, name), **other_texts(fields)}


def open_webdataset(paths: Sequence[str], config: DataConfig) -> Source:
    """Open the records of tar files.

    Raises:
        UsageError: the files have no records, or are compressed.
        GlideError: a file is missing or cannot be read.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{paths[0]} has no concepts or styles to select by")
    if packed := [path for path in paths if not path.endswith(".tar")]:
        raise UsageError(f"{packed[0]} is compressed or not a .tar: unpack it to a plain .tar file")
    shards = index_shards(paths, scan_tar)
    if not len(shards):
        raise UsageError(f"there are no records in {len(paths)} tar files, {paths[0]} ...")
    records = TarRecords(shards, config.image_field.lower(), config.caption_field)
    return Source(records, f"{len(paths)} tar files", shards.identity, shards.damaged)
