"""emoji64: 26,477 captioned pictures in eleven styles, 64x64, from permissively licensed art.

    python -m glide_jax.data.emoji.npz fetch --to sources            # the pinned source packages
    python -m glide_jax.data.emoji.npz rasterise --sources sources --out emoji64.npz
    python -m glide_jax.data.emoji.npz prepare --npz emoji64.npz --data-dir data   # array_record

`load_npz` reads the .npz file straight into memory and is all that training needs;
`prepare` writes the same pictures as a tensorflow-datasets data set (array_record: neither
writing nor reading it needs TensorFlow). Beside `train` there are four held-out splits:

    test_style     (concept, style family) cells: the concept is drawn in other styles in train
    test_tone      (concept, skin tone) cells, held out in every style
    test_concept   32 concepts that train never shows
    test_iid       pictures drawn at random

The art belongs to its authors; ATTRIBUTION.md beside this file names them and their licences.
"""

from __future__ import annotations

import difflib
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from glide_jax.errors import GlideError, UsageError

SPLITS = ("train", "test_style", "test_tone", "test_concept", "test_iid")
# One value a picture, in the order in which they are written; `image` comes before them all.
FIELDS = (
    "caption", "style", "vendor", "license", "concept", "keywords", "group", "subgroup",
    "tone", "codepoint", "name", "family", "split", "caption_styled",
)  # fmt: skip
_CHUNK = 4 << 20  # bytes of pictures inflated at a time
_HOW = "`python -m glide_jax.data.emoji.npz rasterise --help` says how to make it"


@dataclass(frozen=True, eq=False, repr=False)
class NpzSource:
    """Images and captions in memory, with `len()` and `[i]`: what grain takes as a source.

    images: (N, H, W, 3) uint8, read-only; captions, styles, concepts: (N,) str;
    indices: (N,) int64, the record's number in the file, the same whatever was selected.
    """

    images: np.ndarray
    captions: np.ndarray
    styles: np.ndarray
    concepts: np.ndarray
    indices: np.ndarray
    label: str

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        """{'image': (H, W, 3) uint8, 'caption': str, 'style': str, 'concept': str, 'index': int}.

        Raises IndexError out of range.
        """
        return {
            "image": self.images[i],
            "caption": str(self.captions[i]),
            "style": str(self.styles[i]),
            "concept": str(self.concepts[i]),
            "index": int(self.indices[i]),
        }

    def __repr__(self) -> str:
        # grain's DataLoader keeps repr(source) in its state and refuses to resume on another. So:
        # no path (files move), but a checksum of which records were chosen.
        checksum = zlib.crc32(self.indices.tobytes())
        return f"NpzSource({self.label}, {len(self)} pictures, records {checksum:08x})"


def load_npz(
    path: str | os.PathLike,
    split: str | Sequence[str] | None = None,
    concepts: Iterable[str] | None = None,
    styles: Iterable[str] | None = None,
    *,
    caption: str = "caption",
) -> NpzSource:
    """The pictures of an emoji64 .npz file that meet every condition given.

    path: a file as `rasterise` writes it. split: one of SPLITS, several of them, or None for all.
    concepts, styles: keep these only, e.g. ["banana", "red heart"] and ["Google Noto style"].
    caption: the field that becomes the caption, "caption" ("red heart") or "caption_styled"
    ("red heart, Google Noto style").

    Only the chosen pictures are held in memory (12 kB each at 64x64), but the whole file is
    read, so that its checksums are verified: about a second for the full set.

    Raises GlideError for a file that is missing, truncated or no emoji64 file, and UsageError
    for a split, style, concept or caption field that does not occur, or if nothing is left.
    """
    fields = read_fields(path, ("split", "style", "concept", caption), keys_of="caption")
    keep = np.ones(len(fields["split"]), bool)
    for field, wanted in (("split", split), ("style", styles), ("concept", concepts)):
        if wanted is not None:
            wanted = [wanted] if isinstance(wanted, str) else list(wanted)
            _known(field, wanted, fields[field], path)
            keep &= np.isin(fields[field], wanted)
    if not keep.any():
        raise UsageError(f"{path}: no picture meets all of split, concepts and styles together")
    label = os.path.basename(os.fspath(path)) + ("" if split is None else f", split={split!r}")
    return NpzSource(
        images=_read_images(path, keep),
        captions=fields[caption][keep],
        styles=fields["style"][keep],
        concepts=fields["concept"][keep],
        indices=np.flatnonzero(keep),
        label=label,
    )


def read_fields(
    path: str | os.PathLike, names: Iterable[str] = FIELDS, keys_of: str = "field"
) -> dict[str, np.ndarray]:
    """Fields of an emoji64 .npz file other than `image`, each (N,): {name: array}.

    Raises GlideError for a missing or broken file, UsageError for a field it does not have.
    """
    with _opened(path) as file:
        have = [n.removesuffix(".npy") for n in file.namelist()]
        if "image" not in have or "caption" not in have:
            raise GlideError(f"{path}: not an emoji64 file (it has no image or no caption); {_HOW}")
        out = {}
        for name in names:
            _known(keys_of, [name], have, path)
            with file.open(name + ".npy") as member:
                out[name] = np.lib.format.read_array(member, allow_pickle=False)
    if len({len(a) for a in out.values()}) != 1:
        raise GlideError(f"{path}: its fields differ in length; {_HOW}")
    return out


def iter_images(path: str | os.PathLike) -> Iterable[np.ndarray]:
    """The pictures of the file in order, in blocks (n, H, W, 3) uint8 of a few MB.

    numpy would inflate all of them at once (325 MB at 64x64, 5.2 GB at 256x256).
    Raises GlideError for a missing or broken file.
    """
    with _opened(path) as file, file.open("image.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise GlideError(f"{path}: array format version {version} is not known; {_HOW}")
        shape, fortran, dtype = read_header(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise GlideError(f"{path}: image is {dtype} {shape}, not uint8 (N, H, W, 3); {_HOW}")
        size = int(np.prod(shape[1:]))
        rows = max(1, _CHUNK // size)
        for start in range(0, shape[0], rows):
            n = min(rows, shape[0] - start)
            data = member.read(n * size)
            if len(data) != n * size:
                raise GlideError(f"{path}: ends in the middle of the pictures; {_HOW}")
            yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])
        member.read()  # reaching the end of the member verifies its checksum


def _read_images(path: str | os.PathLike, keep: np.ndarray) -> np.ndarray:
    """The pictures where `keep` (N,) bool is set: (n, H, W, 3) uint8, read-only."""
    images, start, filled = None, 0, 0
    for block in iter_images(path):
        if images is None:
            images = np.empty((int(keep.sum()), *block.shape[1:]), np.uint8)
        chosen = block[keep[start : start + len(block)]]
        images[filled : filled + len(chosen)] = chosen
        start, filled = start + len(block), filled + len(chosen)
    if start != len(keep):
        raise GlideError(f"{path}: {start} pictures but {len(keep)} captions; {_HOW}")
    images.flags.writeable = False  # records are views; a slip must not repaint the data set
    return images


class _opened:
    """A zip file for reading whose every way of being broken becomes one GlideError."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)

    def __enter__(self) -> zipfile.ZipFile:
        if not os.path.exists(self.path):
            raise GlideError(f"{self.path}: no such file; {_HOW}")
        if os.path.isdir(self.path):
            raise GlideError(f"{self.path}: is a folder, not an emoji64 .npz file")
        try:
            self.file = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise self.broken(error) from error
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        self.file.close()
        broken = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError)
        if isinstance(error, broken):
            raise self.broken(error) from error

    def broken(self, error: BaseException) -> GlideError:
        return GlideError(f"{self.path}: truncated, or not an .npz file ({error}); {_HOW}")


def _known(what: str, wanted: Iterable[str], have: Iterable[str], path: str | os.PathLike) -> None:
    """Raises UsageError naming the nearest if one of `wanted` does not occur in `have`."""
    have = sorted(set(map(str, have)))
    for name in wanted:
        if name not in have:
            lower = {h.lower(): h for h in have}
            word = str(name).lower()
            near = (
                difflib.get_close_matches(word, lower, n=1, cutoff=0.6)
                or [h for h in lower if word in h.split()]
                or difflib.get_close_matches(word, lower, n=1, cutoff=0.0)
            )
            hint = f"; the nearest is {lower[near[0]]!r}" if near else ""
            raise UsageError(f"{path}: no {what} {name!r}{hint}")


def fingerprint(path: str | os.PathLike) -> str:
    """Identifies the content of an .npz file by the checksums in its directory, without reading it.

    Raises GlideError for a missing or broken file.
    """
    with _opened(path) as file:
        members = sorted((m.filename, m.CRC) for m in file.infolist())
    return f"{zlib.crc32(repr(members).encode()):08x}"
