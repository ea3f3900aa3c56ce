"""The images and captions that a metadata file lists, matched with the files of its folder."""

import os
import posixpath
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.faults import Fault
from glide_jax.data.pairing import is_image_folder
from glide_jax.data.records import (
    CAPTION_FIELDS,
    captions_of,
    digest,
    field_of,
    fields_of,
    lookup,
    other_texts,
    text,
)
from glide_jax.data.sidecars import is_image
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.tables import IMAGE_FIELDS, rows_of
from glide_jax.errors import UsageError


class Listing(NamedTuple):
    """What a metadata file lists.

    Attributes:
        entries: path of each image, and its caption and other texts.
        bad: rows that cannot be used.
    """

    entries: list[tuple[str, dict[str, Any]]]
    bad: list[Fault]


class _Names:
    """The files of a folder, found by the names that tables have for them."""

    def __init__(self, folder: str, table: str, names: Sequence[str]) -> None:
        self._folder, self._names = folder, set(names)
        # Tables name images from the folder, from their own place, or within `images/`.
        self._own = table.rpartition("/")[0]
        inside = sorted({n.split("/")[0] for n in names if is_image_folder(n.split("/")[0])})
        self._bases = list(dict.fromkeys(("", self._own, *inside)))
        self._alike: dict[str, set[str]] = {}
        for name in names:
            if is_image(name):
                stem = str(PurePosixPath(name).with_suffix(""))
                for key in {_folded(name), _folded(stem)}:
                    self._alike.setdefault(key, set()).add(name)

    def __call__(self, name: str) -> str | None:
        """Return the path of a file, relative to the folder if it is in it; None: no such file."""
        if "\0" in name:
            return None
        if storage.is_remote(name):
            return name
        if os.path.isabs(name) and not storage.is_remote(self._folder):
            inside = os.path.relpath(name, self._folder)
            if inside in self._names:
                return inside
        wanted = name.replace("\\", "/") if name not in self._names else name
        for base in self._bases:
            path = posixpath.normpath(posixpath.join(base, wanted.lstrip("/")))
            if path in self._names:
                return path
            # Another form of letters or case, or no suffix: only if one file alone fits.
            alike = self._alike.get(_folded(path), set())
            if len(same := {n for n in alike if _composed(n) == _composed(path)} or alike) == 1:
                return next(iter(same))
        if storage.is_remote(self._folder):
            return None
        for path in (name, posixpath.join(self._own, name)):
            if os.path.isfile(full := storage.join(self._folder, storage.expand(path))):
                return full if os.path.isabs(storage.expand(path)) else path
        return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def read_listing(folder: str, table: str, names: Sequence[str], config: DataConfig) -> Listing:
    """Return what a metadata file lists.

    Args:
        folder: path or address of the images.
        table: the metadata file, relative to the folder or absolute.
        names: files below the folder.
        config: names the fields.

    Raises:
        UsageError: several fields may have the image or the caption.
        GlideError: the file cannot be read.
    """
    path = storage.join(folder, table)
    find, short = _Names(folder, table, names), PurePosixPath(path).name
    listing = Listing([], [])
    first: dict[str, str] = {}
    for place, row in rows_of(path, [f for f in (config.image_field, config.caption_field) if f]):
        try:
            entry = _entry(row, config, find, f"{path}, {place}")
        except BrokenRecord as error:
            listing.bad.append(Fault(f"{short}, {place}: {error}", "bad row"))
            continue
        same = first.setdefault(digest([entry[0], repr(entry[1])]), place)
        if same != place:
            listing.bad.append(Fault(f"{short}, {place}", f"the same as {same}"))
        else:
            listing.entries.append(entry)
    return listing


def _entry(
    row: dict[str, Any] | str, config: DataConfig, find: _Names, where: str
) -> tuple[str, dict[str, Any]]:
    """Return the path of the image of a row, and its caption and other texts."""
    if isinstance(row, str):
        raise BrokenRecord(row)
    image_field, image = _image(row, config.image_field, find, where)
    if image is None:
        value = lookup(row, image_field)
        name = _name(value) or text(value, f"its {image_field}")
        raise BrokenRecord(f"there is no file {name}" if name else f"its {image_field} is empty")
    caption_field = _caption_field(row, config.caption_field, where)
    caption = captions_of(lookup(row, caption_field), f"its {caption_field}")
    return image, {"caption": caption, **other_texts(row, config.score_field)}


def _image(row: Mapping[str, Any], wanted: str, find: _Names, where: str) -> tuple[str, str | None]:
    """Return the field of the image, and the file that it names, if there is one."""
    usual = field_of(row, wanted, IMAGE_FIELDS, "image-field")
    files: dict[str, str] = {}
    for field in (usual,) if wanted else fields_of(row, IMAGE_FIELDS):
        name = _name(lookup(row, field))
        if name and (file := find(name)):
            files.setdefault(file, field)
    if len(files) > 1:
        several = " and ".join(files.values())
        raise UsageError(f"{where} names images in {several}: choose one with --data.image-field")
    return next(((field, file) for file, field in files.items()), (usual, None))


def _name(value: Any) -> str:
    """Return the value of a field as the name of a file; empty if it cannot be one."""
    if isinstance(value, int):
        return str(value)
    return text(value, "the image") if isinstance(value, str) else ""


def _caption_field(row: Mapping[str, Any], wanted: str, where: str) -> str:
    """Return the field of the caption."""
    usual = field_of(row, wanted, CAPTION_FIELDS, "caption-field")
    if wanted:
        return usual
    fields = [f for f in fields_of(row, CAPTION_FIELDS) if lookup(row, f) not in (None, "", [])]
    values = [lookup(row, field) for field in fields]
    if any(value != values[0] for value in values):
        raise UsageError(
            f"{where} has captions in {' and '.join(fields)}: choose one with --data.caption-field"
        )
    return fields[0] if fields else usual
