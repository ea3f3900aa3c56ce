"""Which text files belong to which image of a folder."""

import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from glide_jax.data.faults import Fault
from glide_jax.data.sidecars import TEXTS, is_image

_CAPTION_FOLDERS = {
    *("text", "texts", "txt", "txts", "caption", "captions", "label", "labels"),
    *("prompt", "prompts", "tags", "annotation", "annotations"),
}
_IMAGE_FOLDERS = {
    *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
    *("jpg", "jpgs", "jpeg", "jpegs", "jpegimages", "png", "pngs"),
}
_EXTENSIONS: tuple[str, ...] = (*TEXTS, "json")


class Pairs(NamedTuple):
    """Images with the files of their texts.

    Attributes:
        images: sorted names.
        sidecars: for each image its text files, the preferred one first.
        bare: images without any.
        unused: all other files.
    """

    images: list[str]
    sidecars: list[tuple[str, ...]]
    bare: list[Fault]
    unused: list[Fault]


def pair(names: Sequence[str], preferred: str = "") -> Pairs:
    """Return the images of a folder with their text files.

    The caption of `a/cat.png` is in `a/cat.png.txt` or `a/cat.txt` (also `.caption` and so on, in
    any case), or in a parallel folder: `texts/a/cat.txt` for `images/a/cat.png` or `a/cat.png`.

    Args:
        names: files of the folder, sorted.
        preferred: extension of the captions where an image has several text files.
    """
    order = sorted(_EXTENSIONS, key=lambda suffix: suffix != preferred.lower())
    own = {key for name in names if is_image(name) for key in (_composed(name), _stem(name))}
    beside: dict[str, list[str]] = {}
    parallel: dict[str, list[str]] = {}
    folders = _folders(names)
    texts = [name for name in names if extension(name) in _EXTENSIONS]
    for name in sorted(texts, key=lambda name: (order.index(extension(name)), name)):
        beside.setdefault(_stem(name), []).append(name)
        for key in [] if _stem(name) in own else _without(name, _CAPTION_FOLDERS, last=True):
            parallel.setdefault(key, []).append(name)
    pairs = Pairs([], [], [], [])
    used: set[str] = set()
    others = []
    for name in names:
        if is_image(name):
            sidecars = _texts(name, beside, parallel, folders)
            used.update(sidecars)
            if sidecars:
                pairs.images.append(name)
                pairs.sidecars.append(sidecars)
            else:
                pairs.bare.append(Fault(name, "no caption"))
        else:
            others.append(name)
    for name in others:
        if name in used:
            continue
        suffix = posixpath.splitext(name)[1]
        if extension(name) in _EXTENSIONS:
            second = _stem(name) in own
            why = "image has another text" if second else "text without an image"
            pairs.unused.append(Fault(name, why))
        else:
            why = f"suffix {suffix}" if suffix else "no suffix"
            captioned = _texts(name, beside, parallel, folders)
            used.update(captioned)
            # A caption shows that this is meant to be an image.
            where = pairs.bare if captioned else pairs.unused
            where.append(Fault(name, f"{why} is not read" if captioned else why))
    pairs.unused[:] = [fault for fault in pairs.unused if fault.name not in used]
    return pairs


def is_caption_folder(name: str) -> bool:
    """Whether a folder has the name of one with captions for the images of another."""
    return name.casefold() in _CAPTION_FOLDERS


def is_image_folder(name: str) -> bool:
    """Whether a folder has the name of one with images, their captions in another."""
    return name.casefold() in _IMAGE_FOLDERS


def extension(name: str) -> str:
    """Return the extension of a file, in lower case and without the dot."""
    return posixpath.splitext(name)[1].lower()[1:]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    """Return a path without its suffix, in composed letters: file systems differ in that."""
    return unicodedata.normalize("NFC", posixpath.splitext(name)[0])


def _texts(
    image: str,
    beside: dict[str, list[str]],
    parallel: dict[str, list[str]],
    folders: dict[str, set[str]],
) -> tuple[str, ...]:
    """Return the text files of an image: those for its full name, beside it, in other folders."""
    composed = _composed(image)
    texts: list[str] = [*beside.get(composed, []), *beside.get(_stem(image), [])]
    if parallel:
        keys = [composed, *_without(image, _IMAGE_FOLDERS, folders, keep_suffix=True)]
        for key in (*keys, _stem(image), *_without(image, _IMAGE_FOLDERS, folders)):
            texts += parallel.get(key, [])
    captions = [name for name in texts if extension(name) != "json" and name != image]
    described = [name for name in texts if extension(name) == "json" and name != image]
    return (*captions[:1], *described[:1])


def _without(
    name: str,
    known: set[str],
    folders: dict[str, set[str]] | None = None,
    *,
    last: bool = False,
    keep_suffix: bool = False,
) -> list[str]:
    """Return a path without each of its folders that has a known name, or stands alone.

    Args:
        name: path of a file.
        known: names of folders.
        folders: the folders in each folder, apart from those of captions.
        last: only the last such folder.
        keep_suffix: whether the suffix stays.
    """
    stem = _composed(name) if keep_suffix else _stem(name)
    parts = stem.split("/")
    shorter = []
    for i, part in enumerate(parts[:-1]):
        alone = folders is not None and len(folders.get("/".join(parts[:i]), ())) == 1
        if part.casefold() in known or alone:
            shorter.append("/".join([*parts[:i], *parts[i + 1 :]]))
    return shorter[-1:] if last else shorter


def _folders(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the folders in each folder, apart from those of captions."""
    inside: dict[str, set[str]] = {}
    for name in names:
        parts = _composed(name).split("/")
        for i, part in enumerate(parts[:-1]):
            if not is_caption_folder(part):
                inside.setdefault("/".join(parts[:i]), set()).add(part)
    return inside
