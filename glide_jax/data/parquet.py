"""Parquet and arrow files with columns of images and captions, as `datasets` writes them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from glide_jax.data import storage
from glide_jax.data.columns import Columns, check_same, find_columns, names_files
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded
from glide_jax.data.faults import Fault, Faults, group_by_reason
from glide_jax.data.inspection import MOST, unreadable
from glide_jax.data.records import Source, captions_of, digest, lookup, other_texts
from glide_jax.data.row_groups import ROOM, RowGroups, open_row_groups
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import UsageError

# Larger data are not read as a whole at the start.
_MOST_BYTES = 2 << 30
_COMPARED = 100  # rows whose fields of captions are compared


@dataclass(frozen=True, eq=False)
class TableRecords:
    """Records of parquet or arrow files, one a row.

    Attributes:
        rows: the rows of the files.
        columns: which columns have image, caption and texts.
        folder: paths of images are relative to it, or to the folder of their file.
    """

    rows: RowGroups
    columns: Columns
    folder: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.rows.name(index)
        row = self.rows.read(index, self.columns.every)
        return {"image": self._image(row, index, name), **self._texts(row, name)}

    def name(self, index: int) -> str:
        """Return the name of a row in messages."""
        return self.rows.name(index)

    def texts(self, index: int) -> dict[str, Any]:
        """Return the caption and the other texts of a record.

        Raises:
            BrokenRecord: they cannot be read.
        """
        row = self.rows.read(index, self.columns.text_columns)
        return self._texts(row, self.rows.name(index))

    def _image(self, row: dict[str, Any], index: int, name: str) -> Encoded:
        field = self.columns.image
        value = _found(row, field)
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if value is not None:
            return Encoded(value, name)
        if not path:
            raise BrokenRecord(f"{name} has no image: its {field} is null")
        file = self.rows.paths[self.rows.locate(index)[0]]
        path_beside = storage.join(file.rpartition("/")[0] or ".", path)
        path_in_folder = storage.join(self.folder, path)
        if (
            path_beside != path_in_folder
            and not storage.is_remote(path)
            and not storage.exists(path_beside)
        ):
            path_beside = path_in_folder
        try:
            return Encoded(storage.read(path_beside), f"{name} ({path})")
        except BrokenRecord as error:
            raise BrokenRecord(f"{name} has no image: {error}") from None

    def _texts(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        for field, names in self.columns.classes.items():
            number = row[field]
            # Test splits without classes have -1.
            known = isinstance(number, int) and 0 <= number < len(names)
            row[field] = names[number] if known else None if number is None else ""
        field = self.columns.caption
        if (caption := _found(row, field)) is None:
            raise BrokenRecord(f"{name} has no caption: its {field} is null")
        if isinstance(caption, list):
            caption = [text for text in caption if text is not None]
        captions = captions_of(caption, f"{field} in {name}")
        return {"caption": captions, **other_texts(row, self.columns.score)}


def _found(row: dict[str, Any], path: str) -> Any:
    """Return a field of a row; None where a level of its path is null."""
    try:
        return lookup(row, path)
    except KeyError:
        return None


def is_listing(path: str) -> bool:
    """Whether a parquet or arrow file has names of image files, and no bytes of images."""
    _, (schema,) = open_row_groups([path])
    return names_files(schema)


def open_tables(
    where: str, paths: Sequence[str], config: DataConfig, unused: Sequence[Fault] = ()
) -> Source:
    """Open the records of parquet or arrow files.

    One line on stderr names the rows that cannot be used, by reason.

    Args:
        where: folder, file or pattern, for messages.
        paths: the files.
        config: names the fields.
        unused: files beside them.

    Raises:
        UsageError: pyarrow is not installed; there are no rows, or no columns of images and
            captions.
        GlideError: a file is missing or broken.
    """
    if config.concepts or config.styles:
        raise UsageError(f"{where} has no concepts or styles to select by")
    rows, schemas = open_row_groups(paths)
    if not len(rows):
        raise UsageError(f"there are no rows in {where}")
    columns = find_columns(schemas[0], config, paths[0])
    check_same(schemas, paths, columns)
    folder = where if storage.is_folder(where) else paths[0].rpartition("/")[0] or "."
    records = TableRecords(rows, columns, folder)
    _check_captions(records)
    faults = _faults(records)._replace(unused=tuple(unused))
    if len(faults.broken) == len(records):
        raise UsageError(f"{where} has no row that can be used: {group_by_reason(faults.broken)}")
    faults.say(where, len(records))
    if rows.bytes > ROOM and rows.largest > ROOM / 4:
        print(
            f"note: {where} has row groups of {rows.largest / 1e6:,.0f} MB, and each image that is "
            "read in random order reads one: write the files again with row_group_size=100",
            file=sys.stderr,
        )
    kind = PurePosixPath(paths[0]).suffix.lower().lstrip(".")
    identity = digest([rows.identity, columns.image, columns.caption])
    return Source(records, f"{len(paths)} {kind} files", identity, 0, faults)


def _check_captions(records: TableRecords) -> None:
    """Raise `UsageError` if the first rows have different captions in two usual fields."""
    fields = records.columns.captions
    for index in range(min(_COMPARED, len(records)) if len(fields) > 1 else 0):
        row = records.rows.read(index, records.columns.text_columns)
        values = {
            field: value for field in fields if (value := _found(row, field)) not in ("", None)
        }
        if any(value != next(iter(values.values())) for value in values.values()):
            raise UsageError(
                f"{records.rows.name(index)} has captions in {' and '.join(values)}: choose one "
                "with --data.caption-field"
            )


def _faults(records: TableRecords) -> Faults:
    """Return the rows that are broken, and those with an empty caption, unless there are many."""
    rows = records.rows
    if len(records) > MOST or rows.bytes > _MOST_BYTES or any(map(storage.is_remote, rows.paths)):
        return Faults()
    broken, empty = [], []
    for i in tqdm(range(len(records)), "checking images", unit="image", delay=2):
        path, row = rows.locate(i)
        name = f"{PurePosixPath(rows.paths[path]).name}, row {row}"
        try:
            record = records[i]
        except BrokenRecord as error:
            broken.append(Fault(name, _short(str(error))))
            continue
        if why := unreadable(record["image"]):
            broken.append(Fault(name, why))
        elif record["caption"] == "":
            empty.append(Fault(name, "empty caption"))
    return Faults(broken=tuple(broken), empty=tuple(empty))


def _short(message: str) -> str:
    """Return the kind of a fault, without the name of the row."""
    kinds = (
        ("has no image: its", "no image"),
        ("has no image:", "no file of its image"),
        ("no caption", "no caption"),
        ("cannot read", "cannot be read"),
    )
    return next((kind for sign, kind in kinds if sign in message), message)
