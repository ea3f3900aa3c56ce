"""Tar shards as webdataset and img2dataset write them: `0001.jpg 0001.txt 0001.json 0002.jpg ...`

Consecutive members whose names agree up to the first dot are one record. Nothing is unpacked:
members are read by their place in the file, so that their names never become paths. Links,
folders, devices, sparse and hidden files are ignored.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from glide_jax.data.data_config import DataConfig
from glide_jax.data.storage import BrokenRecord
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
from glide_jax.errors import UsageError

_TEXT = ("txt", "caption")
# What tarfile raises on headers that make no sense; not OSError, which is the disk or the network.
_HARMED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, MemoryError)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Each file with the key of its record and its extension: `a/b.Seg.PNG` -> `a/b`, `seg.png`."""
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse() and key:
            yield member, folder + slash + key, extension.lower()


def scan_tar(file: IO[bytes]) -> tuple[np.ndarray, str]:
    """Where the records of a tar file begin, and what is wrong with it (see `shards.Scan`)."""
    bounds, damage, last, end = [], "", None, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member, key, _ in _members(tar):
                if key != last:
                    bounds.append(member.offset)
                    last = key
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            file.seek(tar.offset)
            # tarfile takes a header that it cannot read for the end of the archive.
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                damage = "there is no member where one should begin"
    except _HARMED as error:
        # What was met last may not be whole.
        damage, end = str(error) or type(error).__name__, bounds.pop() if bounds else 0
    return np.array([*bounds, end], np.int64), damage


@dataclass(frozen=True, eq=False)
class TarRecords:
    """The records of tar shards."""

    shards: Shards
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = name = self.shards.name(index)
        parts: dict[str, bytes] = {}
        try:
            # A stretch of whole members is a tar file itself.
            with tarfile.open(fileobj=io.BytesIO(self.shards[index]), mode="r:") as tar:
                for member, key, extension in _members(tar):
                    name = f"{where} ({key})"
                    if extension in parts:
                        raise BrokenRecord(f"{name} has its {extension} twice")
                    parts[extension] = tar.extractfile(member).read()
        except _HARMED as error:
            raise BrokenRecord(f"cannot read {name}: {error}") from None
        image = self.image or next((e for e in parts if f".{e}" in SUFFIXES), None)
        if image not in parts:
            raise BrokenRecord(f"{name} has {', '.join(parts)}, and no {image or 'picture'}")
        return {"image": Encoded(parts[image], name), **self._texts(parts, name)}

    def _texts(self, parts: dict[str, bytes], name: str) -> dict[str, Any]:
        fields = {}
        if "json" in parts:
            try:
                fields = json.loads(parts["json"])
            except (ValueError, RecursionError) as error:
                raise BrokenRecord(f"the JSON of {name} cannot be read: {error}") from None
            if not isinstance(fields, dict):
                raise BrokenRecord(f"the JSON of {name} is no object")
        extensions = (self.caption,) if self.caption else _TEXT
        if extension := next((e for e in extensions if e in parts), None):
            caption = parts[extension]
        else:
            try:
                field = field_of(fields, self.caption, CAPTION_FIELDS, "caption-field")
            except BrokenRecord as error:
                raise BrokenRecord(f"{name} has no text file, and its JSON {error}") from None
            caption = lookup(fields, field)
        return {"caption": captions_of(caption, name), **other_texts(fields)}


def open_webdataset(paths: Sequence[str], config: DataConfig) -> Source:
    """The records of some tar files.

    Raises:
        UsageError: there are no records in them, or they are compressed.
        GlideError: a file is missing or cannot be read.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{paths[0]} has no concepts or styles to select by")
    if packed := [path for path in paths if not path.endswith(".tar")]:
        raise UsageError(f"{packed[0]} is compressed or no .tar: unpack it to a plain .tar file")
    shards = index_shards(paths, scan_tar)
    if not len(shards):
        raise UsageError(f"there are no records in {len(paths)} tar files, {paths[0]} ...")
    records = TarRecords(shards, config.image_field.lower(), config.caption_field)
    return Source(records, f"{len(paths)} tar files", shards.identity, shards.damaged)
