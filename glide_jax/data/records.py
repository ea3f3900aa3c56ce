"""Records and sources: the common form of captioned images from all kinds of data."""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from glide_jax.data.decoding import Encoded, load_image
from glide_jax.data.storage import BrokenRecord

CAPTION_FIELDS = ("caption", "captions", "text", "captions/text")


class Records(Protocol):
    """Random access to records as they are stored: `image`, `caption` and other text fields."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


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
    """

    records: Records
    label: str = "records"
    identity: str = ""
    left_out: int = 0

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
    def fingerprint(self) -> str:
        """Text that is equal for equal data; a resumed run compares it with its checkpoint."""
        return f"{self.label}, {len(self)} images, {digest([self.identity])}"


def digest(items: Iterable[str | bytes]) -> str:
    """Return a short checksum of texts in their order."""
    sha = hashlib.sha256()
    for item in items:
        data = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:12]


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
            return value.decode("utf-8-sig").strip()
        if isinstance(value, str):
            value.encode("utf-8")
            return value.strip()
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
    return tuple(text(one, name) for one in value)


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """Return `record["a"]["b"]` for the path `a/b`; a field's own name may contain `/`.

    Raises:
        KeyError: there is no such field.
    """
    if path in record:
        return record[path]
    first, _, rest = path.partition("/")
    if rest and isinstance(record.get(first), Mapping):
        return lookup(record[first], rest)
    raise KeyError(path)


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
    for path in (wanted,) if wanted else usual:
        try:
            lookup(record, path)
        except KeyError:
            continue
        return path
    raise BrokenRecord(
        f"has {', '.join(record) or 'no fields'}, not {wanted or ' or '.join(usual)}: "
        f"name the field with --data.{option}"
    )


def other_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the other text fields of a record, for caption templates."""
    return {k: v for k, v in record.items() if isinstance(v, str) and k not in ("image", "caption")}


def report_left_out(where: str, reasons: Sequence[str], total: int) -> None:
    """Print on stderr how many records of a source are unusable, and the first three reasons."""
    if reasons:
        few = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        print(f"{where}: left out {len(reasons)} of {total:,}: {few}", file=sys.stderr)
