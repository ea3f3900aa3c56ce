"""Rows of metadata files: JSON, JSON lines, and tables with any usual delimiter."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from glide_jax.data import storage
from glide_jax.data.records import CAPTION_FIELDS, decode_text, fields_of
from glide_jax.data.row_groups import is_table_name, text_rows
from glide_jax.data.sidecars import is_image
from glide_jax.errors import UsageError

IMAGE_FIELDS = (
    *("file_name", "image", "file", "path", "image_path", "file_path", "image_name"),
    *("image_file", "img", "img_path", "image/path", "image_id", "name", "id", "key"),
)
# Names of metadata files that are found by themselves.
_METADATA = (
    *("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.ndjson"),
    "metadata.parquet",
)


def is_metadata(name: str) -> bool:
    """Whether a path has the name of a metadata file that is found by itself."""
    return name.rpartition("/")[2].casefold() in _METADATA


_DELIMITERS = ",;\t|"

# The fields of a row, or what is wrong with it.
Row = dict[str, Any] | str


def rows_of(path: str, fields: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yield the place (`line 3`) and the fields of each row, or what is wrong with the row.

    Args:
        path: the metadata file.
        fields: names that the user chose, which show the delimiter of a table.

    Raises:
        UsageError: the file is no metadata file, or is in an encoding that is not Unicode.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if is_table_name(path):
        yield from ((f"row {i}", row) for i, row in enumerate(text_rows(path)))
        return
    if suffix not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"):
        raise UsageError(
            f"{path} must be .jsonl, .csv, .tsv or .parquet (or .json, or .txt with a table)"
        )
    try:
        # A byte that is not UTF-8 spoils its own line only: it is found when the text is checked.
        content = decode_text(storage.read(path), "surrogateescape")
    except UnicodeError as error:
        raise UsageError(f"cannot read the text of {path}: {error}") from None
    if suffix in (".csv", ".tsv", ".txt"):
        yield from _table(content, "\t" if suffix == ".tsv" else ",", path, fields)
        return
    # A list in a file of lines, and lines in a .json file, are understood too.
    if suffix == ".json" or content.lstrip().startswith("["):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            if suffix == ".json" and "\n{" not in content:
                raise UsageError(f"{path} is not JSON ({error})") from None
        else:
            yield from _json(value, path)
            return
    yield from _json_lines(content if "\n" in content else content.replace("\r", "\n"))


def _json_lines(content: str) -> Iterator[tuple[str, Row]]:
    # Not splitlines(): it also splits at characters that JSON text may contain.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", f"is not JSON ({error})"
        else:
            yield f"line {number}", row if isinstance(row, dict) else "is not a JSON object"


def _json(value: Any, path: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a list, of `{"a.png": "a cat"}`, or of a file of captions as COCO has."""
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        value = _coco(value, path)
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if fields_of(value, IMAGE_FIELDS):
            value = [value]
        elif len(lists) == 1:
            value = lists[0]
        else:
            value = [_named(name, about) for name, about in value.items()]
    if not isinstance(value, list):
        raise UsageError(f"{path} has neither a list nor an object")
    for number, row in enumerate(value, 1):
        is_object = isinstance(row, dict)
        yield f"entry {number}", row if is_object else "is not a JSON object"


def _named(name: str, about: Any) -> Row:
    if isinstance(about, dict):
        return {"file_name": name, **about}
    if isinstance(about, (str, list)):
        return {"file_name": name, "caption": about}
    return "has neither a text nor an object"


def _coco(value: dict[str, Any], path: str) -> list[Row]:
    try:
        captions: dict[Any, list[Any]] = {}
        for annotation in value["annotations"]:
            if "caption" in annotation:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        if not captions:
            raise UsageError(f"{path} has annotations without captions")
        return [
            {"file_name": image["file_name"], "caption": captions.get(image["id"], [])}
            for image in value["images"]
        ]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} has annotations, but not as COCO has them: {error!r}") from None


def _table(
    content: str, delimiter: str, path: str, fields: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    skipped = 0
    # Spreadsheets name the delimiter in a line of its own.
    if named := re.match(r"\"?sep=(.)\"?\r?\n", content):
        content, skipped, delimiter = content[named.end() :], 1, named.group(1)
    else:
        delimiter = _delimiter(content, delimiter, fields)
    header: list[str] | None = None
    for number, values in _cells(content, delimiter):
        place = f"line {number + skipped}"
        if isinstance(values, str):
            yield place, values
        elif header is None:
            header = _header(values, path)
            if header is not None:
                continue
            header = ["file_name", "caption"] if is_image(values[0]) else ["caption", "file_name"]
            yield place, dict(zip(header, values, strict=True))
        elif len(values) != len(header):
            yield place, f"has {len(values)} columns, the first line has {len(header)}"
        else:
            yield place, dict(zip(header, values, strict=True))


def _header(values: list[str], path: str) -> list[str] | None:
    """Return the names of the columns; None if the first line is a record of image and caption."""
    names = [value.strip() for value in values]
    if len(names) == 2 and sum(map(is_image, names)) == 1:
        return None
    if repeated := {name for name in names if name and names.count(name) > 1}:
        raise UsageError(f"the first line of {path} names {sorted(repeated)[0]!r} twice")
    return names


def _delimiter(content: str, usual: str, wanted: Sequence[str]) -> str:
    """Return the delimiter with which the first line has the most known names, or columns."""

    def fit(delimiter: str) -> tuple[bool, int, bool]:
        values = next((v for _, v in _cells(content, delimiter) if isinstance(v, list)), [])
        fields = dict.fromkeys(value.strip() for value in values)
        usual_ones = (*wanted, *IMAGE_FIELDS), (*wanted, *CAPTION_FIELDS)
        known = sum(bool(fields_of(fields, names)) for names in usual_ones)
        bare = len(values) == 2 and any(map(is_image, values))
        return known == 2 or bare, len(values), delimiter == usual

    return max(_DELIMITERS, key=fit)


def _cells(content: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number of the last line and the cells of each row, or what is wrong with it."""
    reader = csv.reader(
        io.StringIO(content, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, str(error)
            continue
        if any(value.strip() for value in values):
            yield reader.line_num, values
