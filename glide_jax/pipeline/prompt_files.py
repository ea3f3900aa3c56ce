"""Prompts of a file: a text file with one prompt a line, or a table or JSON with captions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glide_jax.data import storage
from glide_jax.data.records import CAPTION_FIELDS, captions_of, decode, fields_of, lookup
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.tables import Row, rows_of
from glide_jax.errors import UsageError
from glide_jax.folders import expand_home
from glide_jax.pipeline.prompts import clean, read_text_prompts

# The suffixes of files with fields. Any other file has a prompt a line.
JSON = (".json", ".jsonl", ".ndjson")
TABLES = (*JSON, ".csv", ".tsv", ".parquet")
OPTION = "--prompts-field"


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


def _plain_texts(path: str) -> list[str] | None:
    """Return the prompts of a JSON list of texts, or of lines that are texts; else None."""
    try:
        content = decode(storage.read(path))
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
