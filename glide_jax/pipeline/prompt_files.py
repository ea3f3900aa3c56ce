"""Prompts of a file: a text file with one prompt a line, or a table or JSON with captions."""

import codecs
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glide_jax.data import storage
from glide_jax.data.records import CAPTION_FIELDS, captions_of, decode_text, fields_of, lookup
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.tables import Row, rows_of
from glide_jax.errors import UsageError
from glide_jax.folders import expand_home
from glide_jax.pipeline.prompts import clean

# The suffixes of files with fields. Any other file has a prompt a line.
JSON = (".json", ".jsonl", ".ndjson")
TABLES = (*JSON, ".csv", ".tsv", ".parquet")
OPTION = "--prompts-field"
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_prompt_file(path: Path, field: str | None = None) -> tuple[str, ...]:
    """Return the prompts of a file, in its order; empty ones are left out.

    Tables (`.csv`, `.tsv`, `.parquet`) and JSON (`.jsonl`, `.json`, COCO's file of captions) are
    read as the metadata of training data are: a list of captions gives a prompt each. Every other
    file has one prompt per line. White space inside a caption of a table becomes single spaces.

    Args:
        path: the file.
        field: name of the column or field; None: the usual names of captions. A `.txt` file is
            read as a table if it is named.

    Raises:
        GlideError: the file cannot be read.
        UsageError: a row cannot be read, or has no such field.
    """
    suffix = path.suffix.lower()
    if field is None and suffix not in TABLES:
        return read_text_prompts(path)
    name = str(expand_home(path))
    plain = _plain_texts(name) if field is None and suffix in JSON else None
    texts = _captions(name, field) if plain is None else iter(plain)
    return tuple(prompt for text in texts if (prompt := " ".join(clean(text).split())))


def read_text_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line, without empty lines.

    The file is in UTF-8, with or without a byte-order mark. A file in UTF-16 or UTF-32 is read too,
    and one line on stderr says so.

    Raises:
        UsageError: the file cannot be read, or has another encoding.
    """
    try:
        data = path.expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the prompts in {path}: {reason}; check the path") from None
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read the prompts in {path}: it is not {encoding.upper()} (byte "
            f"{error.start}); save it as UTF-8"
        ) from None
    if encoding != "utf-8":
        print(f"note: {path} is {encoding.upper()[:6]}: read as such", file=sys.stderr)
    return tuple(line for line in map(clean, re.split(r"\r\n?|\n", text)) if line)


def _encoding(data: bytes) -> str:
    """Return the encoding of a text file, from its byte-order mark or its zero bytes."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name.lower()
    # Half of the bytes of Latin text in UTF-16 are zero; no text in UTF-8 has one.
    if data[1::2].count(0) > len(data) // 8 and not len(data) % 2:
        return "utf-16-le"
    return "utf-16-be" if data[::2].count(0) > len(data) // 8 and not len(data) % 2 else "utf-8"


def _plain_texts(path: str) -> list[str] | None:
    """Return the prompts of a JSON list of texts, or of lines that are texts; else None."""
    try:
        content = decode_text(storage.read(path))
    except UnicodeError:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        try:
            value = [json.loads(line) for line in content.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    return None


def _captions(path: str, field: str | None) -> Iterator[str]:
    for place, row in rows_of(path, (field,) if field else ()):
        try:
            captions = _row_captions(row, field)
        except BrokenRecord as error:
            raise UsageError(f"{path}, {place}: {error}") from None
        yield from (captions,) if isinstance(captions, str) else captions


def _row_captions(row: Row, field: str | None) -> str | tuple[str, ...]:
    if isinstance(row, str):
        raise BrokenRecord(row)
    values = _values(row, field)
    if not values:
        wanted = field or " or ".join(CAPTION_FIELDS[:3])
        raise BrokenRecord(
            f"has {', '.join(row) or 'no fields'}, not {wanted}: name the field with {OPTION}"
        )
    names = list(values)
    full = {name: value for name, value in values.items() if value not in (None, "", [])}
    if any(value != next(iter(full.values())) for value in full.values()):
        raise BrokenRecord(f"has captions in {' and '.join(full)}: choose one with {OPTION}")
    name = next(iter(full), names[0])
    value = values[name]
    return "" if value in (None, "", []) else captions_of(value, f"its {name}")


def _values(row: dict[str, Any], field: str | None) -> dict[str, Any]:
    """Return the fields of a row that may be its caption."""
    if field is None:
        return {name: lookup(row, name) for name in fields_of(row, CAPTION_FIELDS)}
    try:
        return {field: lookup(row, field)}
    except KeyError:
        return {}
