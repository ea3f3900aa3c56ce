"""Folders of images, with captions in text files beside the images or in one metadata file."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import SUFFIXES, Encoded
from glide_jax.data.records import (
    CAPTION_FIELDS,
    Source,
    captions_of,
    digest,
    field_of,
    lookup,
    other_texts,
    report_left_out,
    text,
)
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError

METADATA = ("metadata.jsonl", "metadata.csv")
IMAGE_FIELDS = ("file_name", "image", "file", "filename", "path", "image_path")
_HOW = (
    "put the caption of cat.png into cat.txt, or list images and captions in metadata.jsonl, "
    'lines such as {"file_name": "cat.png", "caption": "a cat"}, or in metadata.csv'
)


@dataclass(frozen=True, eq=False)
class BesideRecords:
    """Images with captions beside them: the caption of `cat.png` is in `cat.txt`."""

    folder: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = storage.join(self.folder, self.names[index])
        beside = _beside(path)
        return {
            "image": Encoded(storage.read(path), path),
            "caption": captions_of(storage.read(beside), beside),
        }


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


def open_folder(folder: str, names: Sequence[str], config: DataConfig) -> Source:
    """Open the captioned images of a folder, or those that its metadata file lists.

    Args:
        folder: path or address.
        names: files below the folder.
        config: names the metadata file and its fields.

    Raises:
        UsageError: there are no captioned images.
        GlideError: the folder or the metadata file cannot be read.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{folder} has no concepts or styles to select by")
    if config.metadata:
        return _listed(folder, storage.join(folder, config.metadata), config)
    found = [name for name in METADATA if name in names]
    if len(found) > 1:
        raise UsageError(f"{folder} has {' and '.join(found)}: choose one with --data.metadata")
    if found:
        return _listed(folder, storage.join(folder, found[0]), config)
    return _captioned(folder, names)


def _beside(image: str) -> str:
    return image[: image.rindex(".")] + ".txt"


def _captioned(folder: str, names: Sequence[str]) -> Source:
    present = set(names)
    images = [n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES]
    captioned = tuple(n for n in images if _beside(n) in present)
    if not captioned:
        raise UsageError(f"{folder} has {len(images)} images and none with a caption: {_HOW}")
    bare = [f"{n} has no caption beside it" for n in images if _beside(n) not in present]
    report_left_out(folder, bare, len(images))
    records = BesideRecords(folder, captioned)
    return Source(records, "a folder", digest(captioned), len(bare))


def _listed(folder: str, path: str, config: DataConfig) -> Source:
    name = PurePosixPath(path).name
    entries, bad = [], []
    for number, row in _rows(path):
        try:
            entries.append(_entry(row, config))
        except BrokenRecord as error:
            bad.append(f"{name}, line {number}: {error}")
    if not entries:
        examples = f": {'; '.join(bad[:3])}" if bad else ""
        raise UsageError(f"{path} lists no image with a caption{examples}")
    report_left_out(path, bad, len(entries) + len(bad))
    identity = digest(f"{image}\n{fields['caption']}" for image, fields in entries)
    return Source(ListedRecords(folder, tuple(entries)), name, identity, len(bad))


def _entry(row: dict[str, Any] | str, config: DataConfig) -> tuple[str, dict[str, Any]]:
    """Return the path of the image of a row, and its caption and other texts."""
    if isinstance(row, str):
        raise BrokenRecord(row)
    image_field = field_of(row, config.image_field, IMAGE_FIELDS, "image-field")
    image = text(lookup(row, image_field), f"its {image_field}")
    if not image:
        raise BrokenRecord(f"its {image_field} is empty")
    caption_field = field_of(row, config.caption_field, CAPTION_FIELDS, "caption-field")
    caption = captions_of(lookup(row, caption_field), f"its {caption_field}")
    return image, {"caption": caption, **other_texts(row)}


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the line number and the fields of each row, or what is wrong with the row."""
    suffix = PurePosixPath(path).suffix.lower()
    # A byte that is not UTF-8 spoils its own line only: it is found when the text is checked.
    content = storage.read(path).decode("utf-8-sig", "surrogateescape")
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(content)
    elif suffix in (".csv", ".tsv"):
        yield from _table(content, "\t" if suffix == ".tsv" else ",")
    else:
        raise UsageError(f"{path} must be .jsonl, .csv or .tsv")


def _json_lines(content: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Not splitlines(): it also splits at characters that JSON text may contain.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON ({error})"
        else:
            yield number, row if isinstance(row, dict) else "is not a JSON object"


def _table(content: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, str(error)
            continue
        if not values:
            continue
        if header is None:
            header = values
        elif len(values) != len(header):
            yield reader.line_num, f"has {len(values)} columns, the first line has {len(header)}"
        else:
            yield reader.line_num, dict(zip(header, values, strict=True))
