"""Sets of images to score: a folder, tar shards, or an `.npz` such as ADM's samples."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from glide_jax.data import storage
from glide_jax.data.data_config import DataConfig
from glide_jax.data.decoding import Encoded, load_image, square
from glide_jax.data.sidecars import is_image
from glide_jax.data.storage import BrokenRecord
from glide_jax.data.tree import find
from glide_jax.data.webdataset import is_tar_name, open_webdataset
from glide_jax.errors import GlideError, UsageError
from glide_jax.pipeline.shard_files import missing_shards

ARRAY = "arr_0"  # the name that numpy.savez gives to an array without one
WHAT = (
    f"give a folder of images, or an .npz with images under {ARRAY} or with mu and sigma, or tar "
    "shards"
)
# Files of `glide-jax sample`: an image, and what shows several of them.
_SAMPLE = re.compile(r"\d{5,}_.*\.png")
_GRID = re.compile(r"\d{5,}-\d{5,}_grid\.png")
_PREVIEW = "preview.png"
# Images that are decoded in threads at a time.
AHEAD = 32
# What the archive's reader raises on damaged bytes.
_DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, in a fixed order.

    Attributes:
        path: of the folder or file, for messages.
        names: the files of a folder, numbers in their names in numerical order; empty for an
            `.npz`.
        count: number of images.
        fingerprint: changes if a file does: names, sizes and times.
        start_at: yields the images from an index on, with the name of each.
        captions: reads the captions that the images bring in their tar shards; None for others.
    """

    path: str
    names: tuple[str, ...]
    count: int
    fingerprint: str
    start_at: Callable[[int], Iterator[tuple[str, np.ndarray]]]
    captions: Callable[[], list[str]] | None = None

    def __len__(self) -> int:
        return self.count

    def images(self, start: int = 0, shape: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield images `(H, W, 3)` uint8 from an index on.

        Args:
            start: index of the first image.
            shape: height and width that they must have; None: those of the first one.

        Raises:
            UsageError: an image has another size.
            GlideError: an image cannot be read.
        """
        for name, image in self.start_at(start):
            shape = shape or (image.shape[0], image.shape[1])
            if image.shape[:2] != shape:
                raise UsageError(
                    f"{name} has {image.shape[1]} x {image.shape[0]} pixels, images before it "
                    f"{shape[1]} x {shape[0]}: --size 256 scales the central square of each to one "
                    "size"
                )
            yield image


def open_images(path: str | Path, size: int | None = None) -> ImageSet:
    """Open a folder of images, with those in its subfolders, tar shards, or an `.npz` of images.

    Grids and previews beside the images of `glide-jax sample` are left out. A folder with tar
    shards and no images is the shards, in the order of their names; so is one tar file.

    Args:
        path: the folder or file.
        size: side to which the central square of each image is scaled; None: images stay as they
            are.

    Raises:
        GlideError: the path does not exist, cannot be read, or holds no images; or shards of
            `glide-jax sample` are missing.
    """
    text = storage.expand(str(path))
    if size is not None and size < 1:
        raise UsageError(f"--size must be at least 1, not {size}")
    if Path(text).is_dir():
        return _folder(text, size)
    if not Path(text).exists():
        raise GlideError(f"{text} does not exist: {WHAT}")
    if is_tar_name(text):
        return _tars(text, [text], size)
    return _array(text, size)


def has_images(path: str | Path) -> bool:
    """Whether a path is not an `.npz` of statistics alone: a folder, or a file with images."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (OSError, zipfile.BadZipFile):
        return True
    return f"{ARRAY}.npy" in names or "mu.npy" not in names


# --- folders


def _folder(folder: str, size: int | None) -> ImageSet:
    all_names = find(folder).names
    tars = sorted((n for n in all_names if is_tar_name(n)), key=_numerical)
    if tars and not any(map(is_image, all_names)):
        if shards := missing_shards(Path(folder)):
            raise GlideError(
                f"{folder} has {shards} shards: the command that generated them continues"
            )
        return _tars(folder, [storage.join(folder, n) for n in tars], size)
    names = tuple(sorted(_without_grids([n for n in all_names if is_image(n)]), key=_numerical))
    if not names:
        others = f"{len(all_names)} files, none with" if all_names else "no files, so none with"
        raise GlideError(f"{folder} has no images: {others} the suffix of an image (.png, .jpg)")
    stamps = [f"{name} {storage.stamp(storage.join(folder, name))}" for name in names]
    start_at = partial(_decoded, folder, names, size)
    return ImageSet(folder, names, len(names), _digest(*stamps, f"{size}"), start_at)


def _without_grids(names: list[str]) -> list[str]:
    """Leave out the grids and previews that `glide-jax sample` writes beside its images."""
    parts = [name.rpartition("/") for name in names]
    samples = {folder for folder, _, name in parts if _SAMPLE.fullmatch(name)}
    return [
        f"{folder}{slash}{name}"
        for folder, slash, name in parts
        if folder not in samples or not (_GRID.fullmatch(name) or name == _PREVIEW)
    ]


def _numerical(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts]


def _decoded(
    folder: str, names: tuple[str, ...], size: int | None, start: int
) -> Iterator[tuple[str, np.ndarray]]:
    def read(name: str) -> tuple[str, np.ndarray]:
        path = storage.join(folder, name)
        image = load_image(Encoded(storage.read(path), path), size)
        return path, np.asarray(image) if size is None else square(image, size)

    with ThreadPoolExecutor() as threads:
        for first in range(start, len(names), AHEAD):
            yield from threads.map(read, names[first : first + AHEAD])


# --- tar shards


def _tars(path: str, shards: list[str], size: int | None) -> ImageSet:
    source = open_webdataset(shards, DataConfig())
    if source.faults.broken or source.left_out:
        # The scores of a part would look like those of the whole.
        raise GlideError(f"{path} has damaged shards or records without image or caption")
    records = source.records

    def record(index: int) -> dict[str, Any]:
        try:
            return dict(records[index])
        except BrokenRecord as error:
            raise GlideError(str(error)) from None

    def read(index: int) -> tuple[str, np.ndarray]:
        encoded = record(index)["image"]
        image = load_image(encoded, size)
        return encoded.name, np.asarray(image) if size is None else square(image, size)

    def start_at(start: int) -> Iterator[tuple[str, np.ndarray]]:
        with ThreadPoolExecutor() as threads:
            for first in range(start, len(records), AHEAD):
                yield from threads.map(read, range(first, min(first + AHEAD, len(records))))

    def captions() -> list[str]:
        captions_per_record = (record(index)["caption"] for index in range(len(records)))
        return [
            caption if isinstance(caption, str) else caption[0] for caption in captions_per_record
        ]

    stamps = [f"{shard} {storage.stamp(shard)}" for shard in shards]
    return ImageSet(path, (), len(records), _digest(*stamps, f"{size}"), start_at, captions)


# --- arrays


def _array(path: str, size: int | None) -> ImageSet:
    with _opened(path) as file:
        shape = _header(path, file)
    start_at = partial(_rows, path, shape, size)
    return ImageSet(path, (), shape[0], _digest(storage.stamp(path), f"{size}"), start_at)


def _opened(path: str) -> IO[bytes]:
    """Open the array of an `.npz`; it is read piece by piece, never as a whole."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            if f"{ARRAY}.npy" in names:
                # The member stays readable after its archive is closed.
                return file.open(f"{ARRAY}.npy")
    except (OSError, zipfile.BadZipFile) as error:
        raise GlideError(f"{path} is no readable .npz file ({error}): {WHAT}") from None
    arrays = ", ".join(n.removesuffix(".npy") for n in names[:5]) or "nothing"
    raise GlideError(f"{path} holds {arrays}: {WHAT}")


def _header(path: str, file: IO[bytes]) -> tuple[int, ...]:
    """Return the shape of an array file, read to the beginning of its data."""
    try:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, columns, dtype = read(file)
    except (ValueError, KeyError, *_DAMAGE) as error:
        raise GlideError(f"{path}: {ARRAY} is no readable array ({error})") from None
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or columns or 0 in shape:
        order = ", in Fortran order" if columns else ""
        raise GlideError(
            f"{path}: {ARRAY} must be images (N, H, W, 3) uint8, not {shape} {dtype}{order}"
        )
    return shape


def _rows(
    path: str, shape: tuple[int, ...], size: int | None, start: int
) -> Iterator[tuple[str, np.ndarray]]:
    length = shape[1] * shape[2] * 3
    with _opened(path) as file:
        _header(path, file)
        file.seek(start * length, 1)
        for index in range(start, shape[0]):
            try:
                data = file.read(length)
            except _DAMAGE as error:
                raise GlideError(f"{path} is damaged at image {index} ({error})") from None
            if len(data) < length:
                raise GlideError(f"{path} ends before image {index} of {shape[0]}: copy it again")
            image = np.frombuffer(data, np.uint8).reshape(shape[1:])
            yield f"{path}, image {index},", image if size is None else square(image, size)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()
