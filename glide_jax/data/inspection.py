"""A look at the files of a folder before training: images that cannot be read, empty captions."""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from PIL import Image
from tqdm import tqdm

from glide_jax.data import storage
from glide_jax.data.decoding import Encoded, load_image
from glide_jax.data.faults import Fault
from glide_jax.data.storage import BrokenRecord

# In a larger folder broken records are found in their turn.
MOST = 10_000
# The end of a whole file, searched in its last bytes: some programs add bytes of their own.
_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
_TAIL = 4096


def inspect(
    folder: str, names: Sequence[str], captions: Callable[[int], object]
) -> tuple[tuple[Fault, ...], tuple[Fault, ...]]:
    """Return the records that are broken, and those with an empty caption.

    Beginning and end of each image are read, and only a suspicious one is decoded. Nothing is read
    at an address, or in a folder of more than 10,000 images.

    Args:
        folder: path or address.
        names: the images.
        captions: number of a record -> its caption.
    """
    if storage.is_remote(folder) or len(names) > MOST:
        return (), ()
    broken, empty = [], []
    with ThreadPoolExecutor(8) as pool:
        paths = [storage.join(folder, name) for name in names]
        checked = tqdm(
            pool.map(_unreadable, paths), "checking images", len(names), unit="image", delay=2
        )
        for i, (name, why) in enumerate(zip(names, checked, strict=True)):
            try:
                caption = captions(i)
            except BrokenRecord as error:
                broken.append(Fault(name, why or _short(str(error))))
                continue
            if why:
                broken.append(Fault(name, why))
            elif caption == "":
                empty.append(Fault(name, "empty caption"))
    return tuple(broken), tuple(empty)


def _short(message: str) -> str:
    """Return the kind of a fault of a caption, without the name of the file."""
    for sign, kind in (
        ("valid UTF-8", "caption is not UTF-8"),
        ("cannot read", "caption cannot be read"),
        ("JSON", "no caption in its JSON"),
    ):
        if sign in message:
            return kind
    return message


def _unreadable(path: str) -> str:
    """Return "unreadable" or a closer reason, or "" for an image that seems whole."""
    if storage.is_remote(path):
        return ""
    try:
        if not os.path.getsize(path):
            return "empty file"
        with open(path, "rb") as file:
            if _seems_complete(file):
                return ""
        load_image(Encoded(storage.read(path), path))
    except (OSError, BrokenRecord):
        return "unreadable"
    return ""


def unreadable(image: Encoded) -> str:
    """Return "unreadable" or "no bytes", or "" for an image that seems whole."""
    if not image.data:
        return "no bytes"
    if _seems_complete(io.BytesIO(image.data)):
        return ""
    try:
        load_image(image)
    except BrokenRecord:
        return "unreadable"
    return ""


def _seems_complete(file: IO[bytes]) -> bool:
    try:
        with Image.open(file) as image:
            kind = image.format or ""
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return kind in _ENDS and _ENDS[kind] in file.read()
    except Exception:  # decoders raise errors of any kind on malformed bytes
        return False
