"""Captions and other texts in the files that belong to one image."""

import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from PIL import Image, ImageFile

from glide_jax.data.records import (
    CAPTION_FIELDS,
    captions_of,
    field_of,
    lookup,
    other_texts,
    text,
)
from glide_jax.data.storage import BrokenRecord

# Extensions of text files, the preferred one first.
TEXTS = ("txt", "caption", "captions", "text")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that Pillow reads here, in lower case: `.jpg`, `.avif`."""
    Image.init()
    # Pillow names these, but leaves the reading to other programs.
    stubs = {c.format for c in ImageFile.StubImageFile.__subclasses__()} | {"MPEG", "IPTC"}
    known = Image.registered_extensions().items()
    return frozenset(s for s, kind in known if kind in Image.OPEN and kind not in stubs)


def is_image(name: str) -> bool:
    """Whether the suffix of a file is that of an image format that Pillow reads."""
    return posixpath.splitext(name)[1].lower() in image_suffixes()


def choose(extensions: Iterable[str], wanted: str, usual: Iterable[str], what: str) -> str | None:
    """Return the extension to use; None if there is none.

    `jpg` is the wanted or usual extension itself; otherwise the one that ends with it, such as
    `input.jpg`.

    Args:
        extensions: those of one record, in lower case.
        wanted: the one that the user chose; empty for the usual ones.
        usual: last parts of usual ones; an earlier one is preferred where `what` is "caption".
        what: "image" or "caption".

    Raises:
        BrokenRecord: several fit equally.
    """
    present, kinds = list(extensions), (wanted,) if wanted else tuple(usual)
    exact = [e for e in present if e in kinds]
    candidates = exact or [e for e in present if e.rpartition(".")[2] in kinds]
    if what == "caption" and candidates:
        first = min(kinds.index(e if exact else e.rpartition(".")[2]) for e in candidates)
        candidates = [e for e in candidates if e.endswith(kinds[first])]
    if len(candidates) > 1:
        names = ", ".join(candidates)
        raise BrokenRecord(f"several {what}s, {names}: choose with --data.{what}-field")
    return candidates[0] if candidates else None


def choose_image(extensions: Iterable[str], wanted: str) -> str | None:
    """Return the extension of the image of a record; see `choose`."""
    return choose(extensions, wanted, sorted(s[1:] for s in image_suffixes()), "image")


def captions_in(data: bytes, name: str, join: bool) -> str | tuple[str, ...]:
    """Return the caption of a text file, or a tuple: each line that is not blank is one.

    Args:
        data: the file.
        name: its name in messages.
        join: the lines are one caption.

    Raises:
        BrokenRecord: it is not text.
    """
    lines = [s for line in re.split(r"\r\n|\r|\n", text(data, name)) if (s := line.strip())]
    return " ".join(lines) if join or len(lines) < 2 else tuple(lines)


def texts_of(
    members: Mapping[str, bytes], name: str, caption: str, join: bool = False, score: str = ""
) -> dict[str, Any]:
    """Return the caption of a record, and the other texts of its JSON.

    Args:
        members: extension -> content of the files of one record.
        name: name of the record in messages.
        caption: extension or JSON field of the caption; empty for the usual ones.
        join: the lines of a text file are one caption.
        score: JSON field of the score; empty for none.

    Raises:
        BrokenRecord: there is no caption, or it is not text.
    """
    try:
        described = choose(members, "", ("json",), "caption")
        extension = choose(members, caption, TEXTS, "caption")
    except BrokenRecord as error:
        raise BrokenRecord(f"{name} has {error}") from None
    fields = {} if described is None else _json(members[described], name)
    if extension is not None and extension != described:
        return {
            "caption": captions_in(members[extension], name, join),
            **other_texts(fields, score),
        }
    if described is None:
        raise BrokenRecord(
            f"{name} has no text file or JSON{f' or {caption}' if caption else ''}, only "
            f"{', '.join(members)}: --data.caption-field names the extension of the captions"
        )
    try:
        field = field_of(fields, caption, CAPTION_FIELDS, "caption-field")
    except BrokenRecord as error:
        raise BrokenRecord(f"{name} has no text file, and its JSON {error}") from None
    return {"caption": captions_of(lookup(fields, field), name), **other_texts(fields, score)}


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(text(data, name))
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"the JSON of {name} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise BrokenRecord(f"the JSON of {name} is not an object")
    return fields
