"""Folders of images, with captions in text files or in metadata files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded, size_of_file
from glide_jax.data.faults import Fault, Faults, group_by_reason
from glide_jax.data.inspection import inspect
from glide_jax.data.listing import Listing, read_listing
from glide_jax.data.pairing import Pairs, extension, is_caption_folder, pair
from glide_jax.data.records import Source, digest
from glide_jax.data.sidecars import is_image, texts_of
from glide_jax.data.tables import is_metadata
from glide_jax.errors import UsageError

_HOW = (
    "put the caption of cat.png into cat.txt, or list images and captions in metadata.jsonl, "
    'lines such as {"file_name": "cat.png", "caption": "a cat"}, or in metadata.csv'
)


@dataclass(frozen=True, eq=False)
class SidecarRecords:
    """Images with captions in files of their own, such as `cat.txt` for `cat.png`.

    Attributes:
        folder: path or address.
        names: the images.
        sidecars: text files of each image.
        caption: extension or JSON field of the captions; empty for the usual ones.
        join: the lines of a text file are one caption.
        score: JSON field of the score; empty for none.
    """

    folder: str
    names: tuple[str, ...]
    sidecars: tuple[tuple[str, ...], ...]
    caption: str = ""
    join: bool = False
    score: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = storage.join(self.folder, self.names[index])
        return {"image": Encoded(storage.read(path), path), **self.texts(index)}

    def name(self, index: int) -> str:
        """Return the name of the image."""
        return self.names[index]

    def image_size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image; only its header is read."""
        return size_of_file(storage.join(self.folder, self.names[index]))

    def texts(self, index: int) -> dict[str, Any]:
        """Return the caption and the other texts of a record.

        Raises:
            BrokenRecord: they cannot be read.
        """
        paths = [storage.join(self.folder, name) for name in self.sidecars[index]]
        members = {extension(path): storage.read(path) for path in paths}
        chosen = self.caption if "json" in members or self.caption in members else ""
        return texts_of(members, paths[0], chosen, self.join, self.score)


@dataclass(frozen=True, eq=False)
class ListedRecords:
    """Images and captions that a metadata file lists.

    Attributes:
        entries: path of each image, and its caption and other texts.
    """

    folder: str
    entries: tuple[tuple[str, dict[str, Any]], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, fields = self.entries[index]
        path = storage.join(self.folder, name)
        return {"image": Encoded(storage.read(path), path), **fields}

    def name(self, index: int) -> str:
        """Return the name of the image."""
        return self.entries[index][0]

    def image_size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image; only its header is read."""
        return size_of_file(storage.join(self.folder, self.name(index)))

    def texts(self, index: int) -> dict[str, Any]:
        """Return the caption and the other texts of a record."""
        return self.entries[index][1]


def open_folder(
    folder: str,
    names: Sequence[str],
    config: DataConfig,
    unused: Sequence[Fault] = (),
    *,
    within: str = "",
) -> Source:
    """Open the captioned images of a folder, or those that its metadata files list.

    One line on stderr names the files that are not used, by reason.

    Args:
        folder: path or address.
        names: files below the folder.
        config: names the metadata file and its fields.
        unused: links, hidden files and others that are not among the names.
        within: beginning of the paths to use, of those that a metadata file lists.

    Raises:
        UsageError: there are no captioned images.
        GlideError: the folder or the metadata file cannot be read.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{folder} has no concepts or styles to select by")
    if config.metadata:
        table = storage.expand(config.metadata)
        if not storage.is_remote(folder) and not os.path.exists(storage.join(folder, table)):
            table = os.path.abspath(table) if os.path.isfile(table) else table
        return _listed(folder, [table], names, config, unused, within)
    tables = [name for name in names if is_metadata(name)]
    chosen = [name for name in tables if "/" not in name] or tables
    places = [name.rpartition("/")[0] for name in chosen]
    for place in places:
        if places.count(place) > 1:
            several = " and ".join(n for n in chosen if n.rpartition("/")[0] == place)
            raise UsageError(f"{folder} has {several}: choose one with --data.metadata")
    if chosen:
        return _listed(folder, chosen, names, config, unused)
    return _captioned(folder, names, config, unused)


def _captioned(
    folder: str, names: Sequence[str], config: DataConfig, unused: Sequence[Fault]
) -> Source:
    pairs = pair(names, config.caption_field)
    if not pairs.images:
        raise UsageError(_no_captions(folder, pairs, unused))
    records = SidecarRecords(
        folder,
        tuple(pairs.images),
        tuple(pairs.sidecars),
        config.caption_field,
        config.caption_lines == "join",
        config.score_field,
    )
    broken, empty = inspect(folder, records.names, lambda i: records.texts(i)["caption"])
    faults = Faults(tuple(pairs.bare), broken, (*pairs.unused, *unused), empty)
    if len(broken) == len(records):
        raise UsageError(f"{folder} has no image that can be used: {group_by_reason(broken)}")
    faults.say(folder, len(records))
    caption_files = (name for sidecars in records.sidecars for name in sidecars)
    identity = digest([*records.names, *caption_files, config.caption_lines, config.caption_field])
    return Source(records, "a folder", identity, len(pairs.bare), faults)


def _no_captions(folder: str, pairs: Pairs, unused: Sequence[Fault]) -> str:
    images = sum(is_image(fault.name) for fault in pairs.bare)
    tables = [
        f.name
        for f in pairs.unused
        if extension(f.name) in ("csv", "tsv", "jsonl", "json", "parquet")
    ]
    if tables and images:
        return (
            f"{folder} has {images} images and none with a caption: if {tables[0]} lists them, "
            f"add --data.metadata {tables[0]}"
        )
    if images and (texts := _texts_beside(folder)):
        return f"{folder} has {images} images and no caption: {texts}"
    others = group_by_reason(
        (*pairs.unused, *unused, *(f for f in pairs.bare if not is_image(f.name)))
    )
    also = f" (there is also {others})" if others else ""
    return f"{folder} has {images} images and none with a caption{also}: {_HOW}"


def _texts_beside(folder: str) -> str:
    """Return what to do if captions lie in a folder beside this one; empty if there is none."""
    parent = PurePosixPath(os.path.abspath(folder)).parent
    if storage.is_remote(folder) or not os.access(parent, os.R_OK):
        return ""
    caption_folders = [name for name in storage.children(str(parent))[0] if is_caption_folder(name)]
    if not caption_folders:
        return ""
    advice = f"name the folder of both, --data.source {parent}"
    return f"if the captions are those of {parent / caption_folders[0]}, {advice}"


def _listed(
    folder: str,
    tables: Sequence[str],
    names: Sequence[str],
    config: DataConfig,
    unused: Sequence[Fault],
    within: str = "",
) -> Source:
    listing = Listing([], [])
    for table in tables:
        part = read_listing(folder, table, names, config)
        listing.entries.extend(e for e in part.entries if e[0].startswith(within))
        listing.bad.extend(part.bad)
    path = storage.join(folder, tables[0])
    if not listing.entries:
        examples = f": {group_by_reason(listing.bad)}" if listing.bad else ""
        raise UsageError(f"{path} lists no image with a caption{examples}")
    records = ListedRecords(folder, tuple(listing.entries))
    images = [image for image, _ in listing.entries]
    broken, empty = inspect(folder, images, lambda i: records.entries[i][1]["caption"])
    if len(broken) == len(records):
        raise UsageError(f"{path} lists no image that can be used: {group_by_reason(broken)}")
    known = {*images, *tables}
    table = PurePosixPath(path).name
    unlisted = [Fault(n, _unlisted(n, table)) for n in names if n not in known]
    faults = Faults(tuple(listing.bad), broken, (*unlisted, *unused), empty)
    faults.say(path, len(records))
    identity = digest(f"{image}\n{fields['caption']}" for image, fields in records.entries)
    return Source(records, table, identity, len(listing.bad), faults)


def _unlisted(name: str, table: str) -> str:
    suffix = PurePosixPath(name).suffix
    return f"not in {table}" if is_image(name) else f"suffix {suffix}" if suffix else "no suffix"
