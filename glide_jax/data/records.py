"""What a source of captioned pictures is."""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glide_jax.data.storage import BrokenRecord
from glide_jax.data.decoding import Encoded, load_picture

CAPTION_FIELDS = ("caption", "captions", "text", "captions/text")


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Random access to captioned pictures.

    `source[i]` has `image` `(H, W, 3)` uint8, `caption`, a string or a tuple of alternatives, and
    whatever other text fields its data set has.

    Attributes:
        records: the same, `image` as it is stored: `Encoded`, or an array.
        label: what it is, without a path: data move.
        identity: of its records and their order, for `fingerprint`.
        left_out: what was found unusable while opening it.
    """

    records: Sequence[Mapping[str, Any]]
    label: str = "records"
    identity: str = ""
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record. Raises `BrokenRecord` if it is broken, IndexError out of range."""
        record = dict(self.records[index])
        if isinstance(record["image"], Encoded):
            record["image"] = np.asarray(load_picture(record["image"]))
        return record

    def __repr__(self) -> str:
        return f"Source({self.label}, {len(self)} pictures)"

    @property
    def fingerprint(self) -> str:
        """Tells whether a run is resumed on the data that it began with: equal where they are."""
        return f"{self.label}, {len(self)} pictures, {digest([self.identity])}"


def digest(parts: Iterable[str | bytes]) -> str:
    """A short checksum of texts, in order."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:12]


def text(value: Any, name: str) -> str:
    """A field as text without white space around it.

    Raises:
        BrokenRecord: it is none, or cannot be written in UTF-8.
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
    """A caption, or the alternatives of a list; empty ones are allowed, none at all is not.

    Raises:
        BrokenRecord: there is none, or it is no text.
    """
    if not isinstance(value, (list, tuple, np.ndarray)):
        return text(value, name)
    if not len(value):
        raise BrokenRecord(f"{name} has no caption")
    return tuple(text(one, name) for one in value)


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """`record["a"]["b"]` for `a/b`; a field may have a `/` in its own name. KeyError if none."""
    if path in record:
        return record[path]
    first, _, rest = path.partition("/")
    if rest and isinstance(record.get(first), Mapping):
        return lookup(record[first], rest)
    raise KeyError(path)


def field_of(record: Mapping[str, Any], wanted: str, usual: Sequence[str], flag: str) -> str:
    """The path by which `lookup` finds a field: the one wanted, or the first of the usual ones.

    Raises:
        BrokenRecord: the record has none; the message names the option `flag`.
    """
    for path in (wanted,) if wanted else usual:
        try:
            lookup(record, path)
        except KeyError:
            continue
        return path
    raise BrokenRecord(
        f"has {', '.join(record) or 'no fields'}, not {wanted or ' or '.join(usual)}: "
        f"name the field with --data.{flag}"
    )


def other_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a record that are text, for caption templates."""
    return {k: v for k, v in record.items() if isinstance(v, str) and k not in ("image", "caption")}


def report_left_out(where: str, reasons: Sequence[str], total: int) -> None:
    """Says on stderr what was found unusable while opening a source, with the first three."""
    if reasons:
        few = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        print(f"{where}: left out {len(reasons)} of {total:,}: {few}", file=sys.stderr)
