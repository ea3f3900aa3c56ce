"""Which columns of a parquet or arrow file have the image, the captions and other texts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from glide_jax.data.data_config import DataConfig
from glide_jax.data.records import CAPTION_FIELDS, fields_of
from glide_jax.data.tables import IMAGE_FIELDS
from glide_jax.errors import UsageError, did_you_mean

_USUAL_IMAGES = (
    *("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    *("image_bytes", "img_bytes", "image_data", "bytes", "content", "data"),
)
_USUAL_CAPTIONS = (*CAPTION_FIELDS, "txt", "json/caption", "json/text")


class Columns(NamedTuple):
    """The columns to read.

    Attributes:
        image: path of the field of the image, with `/` between levels.
        caption: path of the field of the caption.
        captions: all usual fields of captions, if the user chose none.
        texts: other columns of text or of class names.
        classes: the class names of columns of class numbers.
        image_column: the column of the file that has the image.
        text_columns: the columns of the file that have the rest.
        score: path of the field of the score; empty for none.
    """

    image: str
    caption: str
    captions: tuple[str, ...]
    texts: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    image_column: str
    text_columns: tuple[str, ...]
    score: str = ""

    @property
    def every(self) -> tuple[str, ...]:
        """The columns of the file that are read."""
        return tuple(dict.fromkeys((self.image_column, *self.text_columns)))


def image_paths(schema: Any) -> list[str]:
    """Return the fields of a schema that have bytes of images."""
    kinds = dict(_leaves(schema))
    structs = [path for path, kind in kinds.items() if _is_struct(kind)]
    if structs:
        return structs
    binary = [path for path, kind in kinds.items() if _is_bytes(kind)]
    usual_images = fields_of(dict.fromkeys(binary), _USUAL_IMAGES)
    names = [p for p, kind in kinds.items() if _is_text(kind) and fields_of({p: 0}, IMAGE_FIELDS)]
    # Bytes of an unusual name beside names of files are checksums.
    return usual_images or ([] if names else binary)


def names_files(schema: Any) -> bool:
    """Whether a schema has names of image files, and no bytes of images."""
    kinds = dict(_leaves(schema))
    texts = [path for path, kind in kinds.items() if _is_text(kind)]
    images = image_paths(schema) or any(map(_is_images, kinds.values()))
    return not images and bool(fields_of(dict.fromkeys(texts), IMAGE_FIELDS))


def find_columns(schema: Any, config: DataConfig, where: str) -> Columns:
    """Return the columns that settings ask for, or the usual ones.

    Args:
        schema: of the file, from pyarrow.
        config: names the fields.
        where: the file, for messages.

    Raises:
        UsageError: there is no such column, or it has something else, or several are possible.
    """
    kinds = dict(_leaves(schema))
    features = _features(schema)
    classes = {
        name: tuple(map(str, feature["names"]))
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("names") and name in kinds
    }
    image = _image(schema, kinds, config.image_field, where)
    texts = [path for path, kind in kinds.items() if _is_text(kind) or _is_texts(kind)]
    texts = [path for path in [*texts, *classes] if path != image]
    captions = [path for path in fields_of(_tree(schema), _USUAL_CAPTIONS) if path in texts]
    if config.caption_field:
        captions = [config.caption_field]
    if not captions or captions[0] not in texts:
        what = f"no text {captions[0]!r}" if captions else "no caption"
        hint = did_you_mean(captions[0], texts) if captions else ""
        choices = (
            f"choose with --data.caption-field from {', '.join(texts)}"
            if texts
            else (f"its columns are {', '.join(schema.names)}")
        )
        raise UsageError(f"{where} has {what}{hint}: {choices}")
    others = [p for p, kind in kinds.items() if p in schema.names and _is_text(kind)]
    others = tuple(dict.fromkeys([*others, *classes]))
    # The name of a column may have `/` itself.
    owners = {path: path if path in schema.names else path.split("/")[0] for path in kinds}
    score = config.score_field
    if score and score not in kinds:
        hint = did_you_mean(score, list(kinds))
        raise UsageError(f"{where} has no column {score!r}{hint}: choose with --data.score-field")
    paths = (*captions, *others, *((score,) if score else ()))
    columns = tuple(dict.fromkeys(owners[path] for path in paths))
    return Columns(
        image, captions[0], tuple(captions), others, classes, owners[image], columns, score
    )


def _image(schema: Any, kinds: dict[str, Any], wanted: str, where: str) -> str:
    images = image_paths(schema)
    if wanted:
        kind = kinds.get(wanted)
        if kind is not None and (_is_struct(kind) or _is_bytes(kind)):
            return wanted
        if kind is None:
            choices = ", ".join(images) or ", ".join(schema.names)
            raise UsageError(
                f"{where} has no column {wanted!r}{did_you_mean(wanted, list(kinds))}: "
                f"choose with --data.image-field from {choices}"
            )
        lists = {wanted: kind}
    else:
        lists = kinds
    if not images or wanted:
        for path, kind in lists.items():
            if _is_images(kind):
                raise UsageError(
                    f"{where} has a list of images in each row of {path}, which is not read: "
                    "write a row for each image"
                )
        what = f"{kinds[wanted]} in {wanted}" if wanted else ", ".join(schema.names)
        raise UsageError(f"{where} has {what}, and no bytes of images there")
    usual_images = fields_of(dict.fromkeys(images), _USUAL_IMAGES)
    if len(images) > 1 and len(usual_images) != 1:
        raise UsageError(
            f"{where} has images in {' and '.join(usual_images or images)}: choose one with "
            "--data.image-field"
        )
    return usual_images[0] if usual_images else images[0]


def _features(schema: Any) -> dict[str, Any]:
    """Return the description of the columns that the library `datasets` writes."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return dict(told["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def _leaves(fields: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the type of each field; an image is one field."""
    import pyarrow as pa

    for field in fields:
        path = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type) and not _is_struct(field.type):
            kind = field.type
            yield from _leaves([kind.field(i) for i in range(kind.num_fields)], f"{path}/")
        else:
            yield path, field.type


def _tree(fields: Any) -> dict[str, Any]:
    """Return the names of the fields as nested dictionaries, for `fields_of`."""
    import pyarrow as pa

    return {
        field.name: _tree([field.type.field(i) for i in range(field.type.num_fields)])
        if pa.types.is_struct(field.type)
        else None
        for field in fields
    }


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_struct(kind: Any) -> bool:
    """Whether a type is an image as `datasets` stores it: its bytes, and the path of its file."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    types = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return set(types) == {"bytes", "path"} and _is_bytes(types["bytes"])


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_images(kind: Any) -> bool:
    return _is_list(kind) and (_is_struct(kind.value_type) or _is_bytes(kind.value_type))


def _is_texts(kind: Any) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


def check_same(schemas: Sequence[Any], paths: Sequence[str], columns: Columns) -> None:
    """Raise `UsageError` if a file lacks a column that the first one has."""
    tests = (_is_struct, _is_bytes, _is_text, _is_texts)

    def kind(schema: Any, name: str) -> list[bool]:
        return [test(schema.field(name).type) for test in tests]

    for schema, path in zip(schemas, paths, strict=True):
        for name in columns.every:
            if name not in schema.names:
                raise UsageError(f"{path} has no column {name!r}, and {paths[0]} has one")
            if (
                kind(schema, name) != kind(schemas[0], name)
                and str(schema.field(name).type) != "null"
            ):
                types = [each.field(name).type for each in (schema, schemas[0])]
                raise UsageError(f"{path} has {types[0]} in {name}, and {paths[0]} has {types[1]}")
