"""Sources of captioned pictures: objects with `len()` and `[i]`, for grain.

A record is a dictionary with `image` (`(H, W, 3)` uint8) and `caption` (str), and whatever other
text fields its data set has.
"""

import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from glide_jax.data.emoji64 import load_npz
from glide_jax.errors import GlideError, UsageError
from glide_jax.training.config import DataConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """`(H, W, 3)` uint8 of an encoded picture, transparency on white.

    Raises:
        GlideError: the bytes are no picture, or a truncated one.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        if picture.mode in ("RGBA", "LA", "P"):
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise GlideError(f"cannot read the picture {name}: {error}; remove or mend it") from None


@dataclass(frozen=True, eq=False, repr=False)
class FolderSource:
    """Pictures in a folder (and the folders in it), the caption of `cat.png` in `cat.txt`."""

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.folder / self.names[index]
        try:
            data, caption = path.read_bytes(), path.with_suffix(".txt").read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise GlideError(f"cannot read {path}: {error}") from None
        return {"image": decode_picture(data, str(path)), "caption": caption}

    def __repr__(self) -> str:
        return f"FolderSource({len(self)} pictures)"


@dataclass(frozen=True, eq=False, repr=False)
class TfdsSource:
    """A prepared tensorflow-datasets folder in array_record format, read without TensorFlow."""

    records: Any
    rows: np.ndarray | None
    label: str

    def __len__(self) -> int:
        return len(self.records) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[int(index if self.rows is None else self.rows[index])]
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}

    def __repr__(self) -> str:
        return f"TfdsSource({self.label}, {len(self)} pictures)"


def open_folder(folder: Path) -> FolderSource:
    """Every picture below `folder` that has a caption beside it.

    Raises:
        UsageError: there is none.
    """
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    captioned = [p for p in pictures if p.with_suffix(".txt").is_file()]
    if not captioned:
        raise UsageError(
            f"{folder} holds {len(pictures)} pictures and none with a caption: "
            "put the caption of cat.png into cat.txt"
        )
    return FolderSource(folder, tuple(str(p.relative_to(folder)) for p in captioned))


def open_tfds(folder: Path, config: DataConfig) -> TfdsSource:
    """A prepared data set, reduced to the concepts and styles asked for.

    Raises:
        UsageError: it lacks the split, or the fields or values selected by.
        GlideError: it cannot be read without TensorFlow.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    for split in config.split.split("+"):
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise UsageError(f"{folder} has no split {split!r}: it has {splits}")
    try:
        records = builder.as_data_source(config.split)
        rows = _select(builder, config, folder)
    except (NotImplementedError, ModuleNotFoundError) as error:
        raise GlideError(
            f"{folder} cannot be read without TensorFlow ({error}): prepare it with "
            "file_format='array_record'"
        ) from None
    return TfdsSource(records, rows, f"{builder.info.full_name}, {config.split}")


def _select(builder: Any, config: DataConfig, folder: Path) -> np.ndarray | None:
    import tensorflow_datasets as tfds

    wanted = {"concept": config.concepts, "style": config.styles}
    wanted = {field: set(values) for field, values in wanted.items() if values}
    if not wanted:
        return None
    if missing := [field for field in wanted if field not in builder.info.features]:
        raise UsageError(f"{folder} has no field {missing[0]!r} to select by")
    raw = builder.as_data_source(config.split, decoders={"image": tfds.decode.SkipDecoding()})
    fields = {field: np.array([r[field].decode() for r in raw]) for field in wanted}
    for field, values in wanted.items():
        if unknown := sorted(values - set(fields[field])):
            near = difflib.get_close_matches(unknown[0], set(fields[field]), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{folder} has no {field} {unknown[0]!r}{hint}")
    keep = [np.isin(fields[field], list(values)) for field, values in wanted.items()]
    return np.flatnonzero(np.logical_and.reduce(keep))


def _versions(folder: Path) -> Sequence[Path]:
    return sorted(p.parent for p in folder.rglob("dataset_info.json"))


def open_source(config: DataConfig) -> Source:
    """What `config.source` names: an .npz file, a folder, or a prepared data set.

    Raises:
        UsageError: nothing is named, or nothing is there; the message says how to get one.
        GlideError: what is there is broken.
    """
    if not config.source:
        raise UsageError(
            "this recipe names no data: add --data.source FOLDER (pictures, each with its caption "
            "in a .txt file beside it), an .npz file, or a prepared tensorflow-datasets folder"
        )
    path = Path(config.source).expanduser()
    if path.suffix == ".npz":
        return load_npz(
            path, config.split.split("+"), config.concepts or None, config.styles or None
        )
    named = Path(config.data_dir).expanduser() / config.source
    for folder in (path, named):
        if not folder.is_dir():
            continue
        if versions := _versions(folder):
            return open_tfds(versions[-1], config)
        if config.concepts or config.styles:
            raise UsageError(f"{folder} has no concepts or styles to select by")
        return open_folder(folder)
    raise UsageError(_missing(config.source, named))


def _missing(name: str, named: Path) -> str:
    if name == "emoji64":
        how = "`python -m glide_jax.data.emoji64 --help` says how to make it"
    else:
        how = (
            "prepare it with tensorflow-datasets (file_format='array_record'), or name other data"
            " with --data.source: a folder of pictures, each with its caption in a .txt file"
        )
    return f"there is no data set {name} (nor {named}): {how}"
