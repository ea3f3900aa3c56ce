"""Records and sources: the common form of captioned images from all kinds of data."""

import codecs
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from glide_jax.data.decoding import Encoded, load_image
from glide_jax.data.faults import NO_FAULTS, Faults
from glide_jax.data.storage import BrokenRecord

CAPTION_FIELDS = (
    *("caption", "captions", "text", "captions/text", "texts", "prompt", "prompts"),
    *("description", "sentence", "sentences", "comment", "alt_text"),
)
# Longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Records(Protocol):
    """Random access to records as they are stored: `image`, `caption` and other text fields."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Part(NamedTuple):
    """One source of a mixture: the number of its records, and its weight as a whole number."""

    count: int
    weight: int


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Random access to captioned images.

    `source[i]` has `image` `(H, W, 3)` uint8, `caption`, a string or a tuple of alternatives, and
    the other text fields of the data set.

    Attributes:
        records: the records as they are stored, with `image` as `Encoded` or an array.
        label: description of the source. It has no path, because data are moved.
        identity: checksum of the records and their order, for `fingerprint`.
        left_out: number of records that were found unusable when the source was opened.
        faults: what the source does not use; worker processes do not get it.
        parts: the sources of a mixture, in the order of their records; empty for one source.
    """

    records: Records
    label: str = "records"
    identity: str = ""
    left_out: int = 0
    faults: Faults = NO_FAULTS
    parts: tuple[Part, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"faults": NO_FAULTS}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one record.

        Raises:
            BrokenRecord: the record is broken.
            IndexError: the index is out of range.
        """
        record = dict(self.records[index])
        if isinstance(record["image"], Encoded):
            record["image"] = np.asarray(load_image(record["image"]))
        return record

    def __repr__(self) -> str:
        return f"Source({self.label}, {len(self)} images)"

    @property
    def spans(self) -> list[range]:
        """The records of each part of a mixture; all records of one source."""
        counts = [part.count for part in self.parts] or [len(self)]
        ends = accumulate(counts)
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def fingerprint(self) -> str:
        """Text that is equal for equal data; a resumed run compares it with its checkpoint."""
        return f"{self.label}, {len(self)} images, {digest([self.identity])}"


def locate(counts: np.ndarray, index: int) -> tuple[int, int]:
    """Return the number of the file of a record, and the record's number in that file.

    Args:
        counts: records up to the end of each file, from the first file on.
        index: of the record, over all files.

    Raises:
        IndexError: there is no such record.
    """
    if not 0 <= index < counts[-1]:
        raise IndexError(index)
    file = int(np.searchsorted(counts, index, side="right"))
    return file, int(index - (counts[file - 1] if file else 0))


def digest(items: Iterable[str | bytes]) -> str:
    """Return a short checksum of texts in their order."""
    sha = hashlib.sha256()
    for item in items:
        data = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:12]


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Return bytes as text: UTF-8, or the Unicode encoding that a byte-order mark names.

    Raises:
        UnicodeError: the bytes are in another encoding.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    decoded = data.decode(encoding, errors)
    if "\0" in decoded:
        raise UnicodeError("it has bytes 0, like UTF-16 without a byte-order mark: save as UTF-8")
    return decoded


def text(value: Any, name: str) -> str:
    """Return a field as text, without white space around it.

    Args:
        value: the field.
        name: its name in messages.

    Raises:
        BrokenRecord: the field is not text, or cannot be written in UTF-8.
    """
    try:
        if isinstance(value, bytes):
            return decode_text(value).strip()
        if isinstance(value, str):
            value.encode("utf-8")
            return value.removeprefix("\ufeff").strip()
    except UnicodeError as error:
        raise BrokenRecord(f"the text of {name} is not valid UTF-8 ({error})") from None
    raise BrokenRecord(f"the text of {name} is {type(value).__name__}, not text")


def captions_of(value: Any, name: str) -> str | tuple[str, ...]:
    """Return a caption, or a tuple of alternatives if the field is a list.

    A caption may be empty, a list may not.

    Args:
        value: the field.
        name: its name in messages.

    Raises:
        BrokenRecord: there is no caption, or it is not text.
    """
    if not isinstance(value, (list, tuple, np.ndarray)):
        return text(value, name)
    if not len(value):
        raise BrokenRecord(f"{name} has no caption")
    return tuple(text(item, name) for item in value)


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """Return `record["a"]["b"]` for the path `a/b`; a field's own name may contain `/`.

    Raises:
        KeyError: there is no such field.
    """
    if path in record:
        return record[path]
    first, _, remainder = path.partition("/")
    if remainder and isinstance(record.get(first), Mapping):
        return lookup(record[first], remainder)
    raise KeyError(path)


def fields_of(record: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    """Return the paths of those usual fields that a record has.

    Case, spaces, `-` and `_` do not count: `File Name` is `file_name`.
    """
    plain = {_normalised(name): name for name in reversed(list(record))}
    paths: list[str] = []
    for path in usual:
        name = path if path in record or "/" in path else plain.get(_normalised(path), path)
        try:
            lookup(record, name)
        except KeyError:
            continue
        paths.append(name)
    # `TEXT` and `Text` beside each other are two fields.
    same = [name for name in record if _normalised(name) in map(_normalised, paths)]
    return list(dict.fromkeys([*paths, *same]))


def _normalised(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def field_of(record: Mapping[str, Any], wanted: str, usual: Sequence[str], option: str) -> str:
    """Return the path of a field for `lookup`: the wanted one, or the first usual one.

    Args:
        record: the record.
        wanted: path that the user chose; empty for the usual ones.
        usual: paths to try.
        option: option of the command line that chooses the path, for the message.

    Raises:
        BrokenRecord: the record has no such field.
    """
    if wanted:
        try:
            lookup(record, wanted)
            return wanted
        except KeyError:
            pass
    elif paths := fields_of(record, usual):
        return paths[0]
    raise BrokenRecord(
        f"has {', '.join(record) or 'no fields'}, not {wanted or ' or '.join(usual[:3])}: "
        f"name the field with --data.{option}"
    )


def other_texts(record: Mapping[str, Any], score: str = "") -> dict[str, Any]:
    """Return the other text fields of a record, for caption templates.

    Args:
        record: the record.
        score: path of a field that is returned too, whatever its type; empty for none.
    """
    texts = {k: v for k, v in record.items() if isinstance(v, str)}
    if score:
        with suppress(KeyError):  # such a record is left out
            texts[score] = lookup(record, score)
    return {k: v for k, v in texts.items() if k not in ("image", "caption")}
