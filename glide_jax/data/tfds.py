"""Prepared data sets of tensorflow-datasets: array_record and tfrecord, without TensorFlow."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded
from glide_jax.data.records import (
    CAPTION_FIELDS,
    Source,
    captions_of,
    digest,
    lookup,
    other_texts,
    text,
)
from glide_jax.data.shards import Scan, Shards, contiguous_scan, index_shards
from glide_jax.data.storage import BrokenRecord
from glide_jax.errors import GlideError, UsageError, did_you_mean


class RawRecords(Protocol):
    """Random access to records as tensorflow-datasets returns them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class TfdsRecords:
    """Records of a prepared data set, with encoded images.

    Attributes:
        raw: records as tensorflow-datasets reads them, images not decoded.
        selected: `(N,)` indices of the records to use.
        image: path of the field of the image.
        caption: path of the field of the caption.
        texts: other fields that hold text.
        classes: the class names of each field that holds a class number.
        label: name of the data set in messages.
        score: path of the field of the score; empty for none.
    """

    raw: RawRecords
    selected: np.ndarray
    image: str
    caption: str
    texts: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    label: str
    score: str = ""

    def __len__(self) -> int:
        return len(self.selected)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.selected[index])
        name = f"record {number} of {self.label}"
        try:
            record = dict(self.raw[number])
        except BrokenRecord:
            raise
        except Exception as error:  # parsers raise errors of any kind on malformed bytes
            raise BrokenRecord(f"cannot read {name}: {error!r:.200}") from None
        for field, names in self.classes.items():
            # Test splits without classes have -1.
            record[field] = names[record[field]] if 0 <= record[field] < len(names) else ""
        for field in self.texts:
            record[field] = text(record[field], f"{field} in {name}")
        return {
            "image": Encoded(bytes(lookup(record, self.image)), name),
            "caption": captions_of(lookup(record, self.caption), name),
            **other_texts(record, self.score),
        }


@dataclass(frozen=True, eq=False)
class TfRecords:
    """Random access to tfrecord files; tensorflow-datasets only streams them, with TensorFlow.

    Attributes:
        shards: the files.
        selected: `(N,)` indices of the records of the split.
        parse: bytes of a record -> its fields.
    """

    shards: Shards
    selected: np.ndarray
    parse: Callable[[bytes], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.selected)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Length (8 bytes), its checksum (4), data, its checksum (4).
        return self.parse(self.shards[int(self.selected[index])][12:-4])


def scan_tfrecord(file: IO[bytes]) -> Scan:
    """Return where the records of a tfrecord file lie."""
    size = file.seek(0, 2)
    bounds = [0]
    while bounds[-1] < size:
        file.seek(bounds[-1])
        end = bounds[-1] + 16 + int.from_bytes(file.read(8), "little")
        if end > size:
            return contiguous_scan(bounds, "it ends within a record")
        bounds.append(end)
    return contiguous_scan(bounds)


def newest_version(folder: str, names: Sequence[str]) -> str | None:
    """Return the folder of the newest prepared data set below a folder; None if there is none.

    Args:
        folder: path or address.
        names: files below the folder.

    Raises:
        UsageError: the folder holds several data sets, or several configurations of one.
    """
    paths = [PurePosixPath(name) for name in names]
    data_sets = [path.parent for path in paths if path.name == "dataset_info.json"]
    if len({path.parent for path in data_sets}) > 1:
        several = ", ".join(map(str, data_sets))
        raise UsageError(f"{folder} holds several data sets: name one of {several}")
    newest = max(data_sets, key=_version, default=None)
    return None if newest is None else storage.join(folder, str(newest)).removesuffix("/.")


def _version(path: PurePosixPath) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.name))


def open_tfds(folder: str, config: DataConfig) -> Source:
    """Open a prepared data set, reduced to the concepts and styles of the settings.

    Raises:
        UsageError: it has no such split, field, concept or style.
        GlideError: it cannot be read without TensorFlow; the message has a command to convert it.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        # A dictionary in every data set of records; the library's own type is wider.
        features: Any = builder.info.features
    except Exception as error:  # a description can be malformed in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GlideError(f"cannot read {folder}: {reason:.200}") from None
    label = f"{builder.info.full_name}, {config.split}"
    splits = list(builder.info.splits)
    for split in re.split(r"\+", config.split):
        if (name := split.split("[")[0]) not in splits:
            hint = did_you_mean(name, splits)
            raise UsageError(f"{folder} has no split {name!r}{hint}: it has {', '.join(splits)}")
    image, caption = _fields(folder, features, config)
    raw = _raw(builder, folder, config.split, image)
    of_kind = {
        kind: [p for p, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Text, tfds.features.ClassLabel)
    }
    classes = {
        path: tuple(features[path].int2str(i) for i in range(features[path].num_classes))
        for path in of_kind[tfds.features.ClassLabel]
    }
    texts = tuple(of_kind[tfds.features.Text])
    everything = TfdsRecords(
        raw, np.arange(len(raw)), image, caption, texts, classes, label, config.score_field
    )
    selected = _select(everything, config, folder)
    records = replace(everything, selected=selected)
    return Source(records, label, digest([selected.tobytes()]))


def _fields(folder: str, features: Any, config: DataConfig) -> tuple[str, str]:
    """Return the paths of the image and of the caption."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    images = [p for p, kind in _leaves(features, False) if isinstance(kind, kinds.Image)]
    texts = [p for p, kind in _leaves(features, True) if isinstance(kind, kinds.Text)]
    texts += [p for p, kind in features.items() if isinstance(kind, kinds.ClassLabel)]
    chosen = []
    for option, wanted, usual, known in (
        ("image-field", config.image_field, ("image",), images),
        ("caption-field", config.caption_field, CAPTION_FIELDS, texts),
    ):
        field = next((path for path in ((wanted,) if wanted else usual) if path in known), None)
        if field is None:
            what = f"no field {wanted!r}" if wanted else f"none of {', '.join(usual)}"
            choices = ", ".join(known) or "nothing"
            raise UsageError(f"{folder} has {what}: choose with --data.{option} from {choices}")
        chosen.append(field)
    return chosen[0], chosen[1]


def _leaves(features: Any, lists: bool, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the kind of each field; fields inside lists only if `lists`."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.FeaturesDict):
        for name, feature in features.items():
            yield from _leaves(feature, lists, f"{path}/{name}" if path else name)
    elif not isinstance(features, tfds.features.Sequence):
        yield path, features
    elif lists:
        yield from _leaves(features.feature, lists, path)


def _raw(builder: Any, folder: str, split: str, image: str) -> RawRecords:
    import tensorflow_datasets as tfds

    # The library would decode images with cv2 or at full size.
    decoders: Any = tfds.decode.SkipDecoding()
    for name in reversed(_names(builder.info.features, image)):
        decoders = {name: decoders}
    kind = builder.info.file_format.value
    if storage.is_remote(folder) and kind == "array_record":
        name = PurePosixPath(folder)
        raise GlideError(
            f"array_record files cannot be read in any order from {folder}: copy them "
            f"(gcloud storage cp -r {folder} data/{name.parent.name}/) or mount them with gcsfuse"
        )
    try:
        if kind == "tfrecord":
            return _tfrecords(builder.info, split, decoders)
        return builder.as_data_source(split, decoders=decoders)
    except (NotImplementedError, ImportError) as error:
        raise GlideError(
            f"{folder} is stored as {kind}, which is not read without TensorFlow "
            f"({str(error).splitlines()[0]:.80}): convert it where TensorFlow and apache-beam are "
            f"installed: tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record --out_dir=FOLDER"
        ) from None
    except ValueError as error:
        raise UsageError(f"split {split!r} of {folder}: {str(error).splitlines()[0]}") from None


def _names(features: Any, path: str) -> list[str]:
    """Split a path into names of fields: `a/b/c` -> a/b, c if `a/b` is one name."""
    if path in features:
        return [path]
    first, _, remainder = path.partition("/")
    return [first, *_names(features[first], remainder)]


def _tfrecords(info: Any, split: str, decoders: Any) -> TfRecords:
    from functools import partial

    instructions = info.splits[split].file_instructions
    paths = sorted({str(instruction.filename) for instruction in instructions})
    shards = index_shards(paths, scan_tfrecord)
    selected = []
    for instruction in instructions:
        file = paths.index(str(instruction.filename))
        count = len(shards.scans[file])
        if count != instruction.examples_in_shard:
            raise GlideError(
                f"{instruction.filename} has {count} records, not "
                f"{instruction.examples_in_shard}: copy it again"
            )
        first = int(shards.counts[file]) - count + instruction.skip
        selected.append(np.arange(first, first + instruction.take))
    parse = partial(info.features.deserialize_example_np, decoders=decoders)
    return TfRecords(shards, np.concatenate(selected), parse)


def _select(records: TfdsRecords, config: DataConfig, folder: str) -> np.ndarray:
    """Return the indices of the records that have the wanted concepts and styles."""
    keep = np.ones(len(records), bool)
    for field, wanted in (("concept", config.concepts), ("style", config.styles)):
        if not wanted:
            continue
        if field not in records.texts:
            raise UsageError(f"{folder} has no field {field!r} to select by")
        values = np.array([text(raw[field], field) for raw in records.raw])
        for value in wanted:
            if value not in values:
                hint = did_you_mean(value, set(values.tolist()))
                raise UsageError(f"{folder} has no {field} {value!r}{hint}")
        keep &= np.isin(values, wanted)
    if not keep.any():
        raise UsageError(f"{folder}: no image has the wanted split, concept and style together")
    return np.flatnonzero(keep)
