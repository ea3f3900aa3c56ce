"""Tar shards as webdataset and img2dataset write them: `0001.jpg 0001.txt 0001.json 0002.jpg ...`

Nothing is unpacked: members are read by their position in the file, so their names never become
paths. Links, folders, devices, sparse files and hidden files are not read.
"""

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded
from glide_jax.data.faults import Fault, Faults
from glide_jax.data.records import Source
from glide_jax.data.shards import Shards, index_shards
from glide_jax.data.sidecars import TEXTS, choose, choose_image, texts_of
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.tar_index import MALFORMED, fault_of, scan_tar, split_name
from glide_jax.errors import UsageError

# Describes the shards that `glide-jax sample` writes.
MANIFEST = "shards.json"
_KEYS = 100  # broken records that are named by a member; further ones have their number
_PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst|zip|7z|rar|gz|bz2|xz|zst)$", re.IGNORECASE)


def is_tar_name(name: str) -> bool:
    """Whether a name is that of a tar file, compressed or not."""
    return bool(re.search(r"\.(tar|tar\.\w+|tgz|tbz2?|txz|tzst)$", name, re.IGNORECASE))


def is_packed_name(name: str) -> bool:
    """Whether a name is that of a compressed file, which is not read."""
    return bool(_PACKED.search(name))


@dataclass(frozen=True, eq=False)
class TarRecords:
    """Records of tar shards.

    Attributes:
        shards: the files.
        image: extension of the images; empty for the usual ones.
        caption: extension or JSON field of the captions; empty for the usual ones.
        join: the lines of a text file are one caption.
        score: JSON field of the score; empty for none.
    """

    shards: Shards
    image: str
    caption: str
    join: bool = False
    score: str = ""

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = name = self.shards.name(index)
        members: dict[str, bytes] = {}
        try:
            # Whole members are a tar file themselves.
            with tarfile.open(fileobj=io.BytesIO(self.shards[index]), mode="r:") as tar:
                for member in tar:
                    if fault_of(member) or member.isdir():
                        continue
                    key, extension = split_name(member.name)
                    name = f"{where} ({key})"
                    if extension in members:
                        raise BrokenRecord(f"{name} has its {extension} twice")
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular file
                    members[extension] = file.read()
        except MALFORMED as error:
            raise BrokenRecord(f"cannot read {name}: {error}") from None
        try:
            image = choose_image(members, self.image)
        except BrokenRecord as error:
            raise BrokenRecord(f"{name} has {error}") from None
        if image is None:
            raise BrokenRecord(f"{name} has {', '.join(members)}, and no {self.image or 'image'}")
        texts = texts_of(members, name, self.caption, self.join, self.score)
        return {"image": Encoded(members[image], name), **texts}

    def name(self, index: int) -> str:
        """Return the name of a record in messages."""
        return self.shards.name(index)

    def key(self, index: int) -> str:
        """Return the name of the first member of a record, or the record's number."""
        try:
            with tarfile.open(fileobj=io.BytesIO(self.shards[index]), mode="r:") as tar:
                return next(iter(tar)).name
        except (BrokenRecord, StopIteration, *MALFORMED):
            return f"record {index}"

    def fault(self, extensions: str) -> str:
        """Return what a record with these extensions lacks, or ""."""
        present = extensions.split(" ")
        if twice := next((e for e in present if present.count(e) > 1), None):
            return f"{twice} twice"
        try:
            if choose_image(present, self.image) is None:
                return f"no {self.image or 'image'}"
            if choose(present, self.caption, TEXTS, "caption") or choose(
                present, "", ("json",), "JSON"
            ):
                return ""
            return "no caption"
        except BrokenRecord as error:
            return str(error).partition(":")[0]


def open_webdataset(
    paths: Sequence[str], config: DataConfig, unused: Sequence[Fault] = ()
) -> Source:
    """Open the records of tar files.

    Args:
        paths: the files.
        config: names the extensions of image and caption.
        unused: files beside them.

    Raises:
        UsageError: the files have no records, or are compressed.
        GlideError: a file is missing or cannot be read.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{paths[0]} has no concepts or styles to select by")
    if packed := [path for path in paths if is_packed_name(path)]:
        raise UsageError(f"{packed[0]} is compressed or not a .tar: unpack it to a plain .tar file")
    shards = index_shards(paths, scan_tar)
    if not len(shards):
        why = next((f": {scan.damage}" for scan in shards.scans if scan.damage), "")
        raise UsageError(f"there are no records in {len(paths)} tar files, {paths[0]} ...{why}")
    joined = config.caption_lines == "join"
    records = TarRecords(
        shards, config.image_field.lower(), config.caption_field, joined, config.score_field
    )
    faults = _faults(records)
    faults = faults._replace(unused=(*faults.unused, *unused))
    if len(faults.broken) == len(records):
        raise UsageError(f"no record of {paths[0]} can be used: {_reason(records, faults)}")
    faults.say(paths[0] if len(paths) == 1 else f"{len(paths)} tar files", len(records))
    damaged = (Fault(p, s.damage) for p, s in zip(paths, shards.scans, strict=True) if s.damage)
    faults = faults._replace(left_out=tuple(damaged))
    identity = f"{shards.identity}{config.caption_lines}"
    return Source(records, f"{len(paths)} tar files", identity, shards.damaged, faults)


def _reason(records: TarRecords, faults: Faults) -> str:
    """Return why no record can be used."""
    if {"no image", "no caption"} <= {fault.reason for fault in faults.broken}:
        return (
            "its images and texts have different names: the members of a record must be equal up "
            "to the first dot, 1.jpg and 1.txt, or 1.input.jpg and 1.output.txt; there are "
            f"{', '.join(fault.name for fault in faults.broken[:2])}"
        )
    try:
        return str(records[0] and "")
    except BrokenRecord as error:
        return str(error)


def _faults(records: TarRecords) -> Faults:
    broken: list[Fault] = []
    unused: list[Fault] = []
    start = 0
    for path, scan in zip(records.shards.paths, records.shards.scans, strict=True):
        for kind, names in enumerate(scan.names):
            if len(scan) and (why := records.fault(names)):
                at = np.flatnonzero(scan.kinds == kind)
                for i in at.tolist():
                    named = records.key(start + i) if len(broken) < _KEYS else f"record {i}"
                    broken.append(Fault(f"{named} in {path}", why))
        for why, name, count in scan.unused:
            unused += [Fault(f"{name} in {path}", why)] * count
        if not len(scan) and not scan.damage:
            unused.append(Fault(path, "no records"))
        start += len(scan)
    return Faults(broken=tuple(broken), unused=tuple(unused))
