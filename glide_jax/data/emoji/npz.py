"""emoji64: 26,477 captioned images in eleven styles, 64x64, from permissively licensed art.

    glide-jax data fetch --to sources                               # the pinned source packages
    glide-jax data rasterise --sources sources --out emoji64.npz    # the .npz file
    glide-jax data prepare --npz emoji64.npz --data-dir data        # array_record

`load_npz` reads the .npz file into memory; training needs nothing else. `prepare` writes the same
images as a tensorflow-datasets data set (array_record: neither writing nor reading it needs
TensorFlow). Beside `train` there are four held-out splits:

    test_style     (concept, style family) pairs; the concept is in `train` in other styles
    test_tone      (concept, skin tone) pairs, held out in every style
    test_concept   32 concepts that `train` never shows
    test_iid       randomly chosen images

The art belongs to its authors; ATTRIBUTION.md beside this file names them and their licences.
"""

import difflib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from glide_jax.errors import GlideError, UsageError, one_line

SPLITS = ("train", "test_style", "test_tone", "test_concept", "test_iid")
# One value per image, in the order in which they are written; `image` comes before them all.
FIELDS = (
    "caption", "style", "vendor", "license", "concept", "keywords", "group", "subgroup",
    "tone", "codepoint", "name", "family", "split", "caption_styled",
)  # fmt: skip
_CHUNK = 4 << 20  # bytes of images inflated at a time
_HOW = "`glide-jax data rasterise --help` says how to make it"


@dataclass(frozen=True, eq=False, repr=False)
class NpzSource:
    """Random access to images and captions in memory.

    Attributes:
        images: `(N, H, W, 3)` uint8, read-only.
        captions: `(N,)` str.
        styles: `(N,)` str.
        concepts: `(N,)` str.
        indices: `(N,)` int64, each record's number in the file, also after a selection.
        label: name of the file and its split, without the path.
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
        """Return {'image': (H, W, 3) uint8, 'caption', 'style', 'concept': str, 'index': int}.

        Raises:
            IndexError: `i` is out of range.
        """
        return {
            "image": self.images[i],
            "caption": str(self.captions[i]),
            "style": str(self.styles[i]),
            "concept": str(self.concepts[i]),
            "index": int(self.indices[i]),
        }

    def __repr__(self) -> str:
        # grain's DataLoader keeps repr(source) in its state and refuses to resume with another one.
        # So it has no path, because files move, but a checksum of the selected records.
        checksum = zlib.crc32(self.indices.tobytes())
        return f"NpzSource({self.label}, {len(self)} images, records {checksum:08x})"


def load_npz(
    path: str | os.PathLike,
    split: str | Sequence[str] | None = None,
    concepts: Iterable[str] | None = None,
    styles: Iterable[str] | None = None,
    *,
    caption: str = "caption",
) -> NpzSource:
    """Load the images of an emoji64 .npz file that meet every condition.

    Only the selected images are kept in memory (12 kB each at 64x64). But the whole file is
    read, because that verifies its checksums: about a second for the full set.

    Args:
        path: file that `rasterise` wrote.
        split: one of SPLITS, several of them, or None for all.
        concepts: keep only these, e.g. ["banana", "red heart"]; None keeps all.
        styles: keep only these, e.g. ["Google Noto style"]; None keeps all.
        caption: field that becomes the caption, "caption" ("red heart") or "caption_styled"
            ("red heart, Google Noto style").

    Raises:
        GlideError: the file is missing, truncated or not an emoji64 file.
        UsageError: there is no such split, style, concept or caption field, or no image is left.
    """
    fields = read_fields(path, ("split", "style", "concept", caption), keys_of="caption")
    keep = np.ones(len(fields["split"]), bool)
    for field, wanted in (("split", split), ("style", styles), ("concept", concepts)):
        if wanted is not None:
            wanted = [wanted] if isinstance(wanted, str) else list(wanted)
            _check_known(field, wanted, fields[field], path)
            keep &= np.isin(fields[field], wanted)
    if not keep.any():
        raise UsageError(f"{path}: no image has the wanted split, concept and style together")
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
    """Return fields of an emoji64 .npz file other than `image`, each `(N,)`, by name.

    Args:
        path: the file.
        names: the fields.
        keys_of: what to call a field in a message.

    Raises:
        GlideError: the file is missing or broken.
        UsageError: the file has no such field.
    """
    with _Opened(path) as file:
        stored = [n.removesuffix(".npy") for n in file.namelist()]
        if "image" not in stored or "caption" not in stored:
            raise GlideError(f"{path}: not an emoji64 file (it has no image or no caption); {_HOW}")
        out = {}
        for name in names:
            _check_known(keys_of, [name], stored, path)
            with file.open(name + ".npy") as member:
                out[name] = np.lib.format.read_array(member, allow_pickle=False)
    for name, array in out.items():
        if array.ndim != 1:
            raise GlideError(f"{path}: {name} has shape {array.shape}, not (N,); {_HOW}")
    if len({len(a) for a in out.values()}) != 1:
        raise GlideError(f"{path}: its fields differ in length; {_HOW}")
    return out


def iter_images(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yield the images of the file in order, in blocks `(n, H, W, 3)` uint8 of a few MB.

    numpy would inflate all of them at once (325 MB at 64x64, 5.2 GB at 256x256).

    Raises:
        GlideError: the file is missing or broken.
    """
    with _Opened(path) as file, file.open("image.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise GlideError(f"{path}: array format version {version} is not known; {_HOW}")
        shape, fortran, dtype = read_header(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise GlideError(f"{path}: image is {dtype} {shape}, not uint8 (N, H, W, 3); {_HOW}")
        size = int(np.prod(shape[1:]))
        rows = max(1, _CHUNK // size)
        for start in range(0, shape[0], rows):
            n = min(rows, shape[0] - start)
            data = member.read(n * size)
            if len(data) != n * size:
                raise GlideError(f"{path}: ends in the middle of the images; {_HOW}")
            yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])
        member.read()  # reaching the end of the member verifies its checksum


def _read_images(path: str | os.PathLike, keep: np.ndarray) -> np.ndarray:
    """Return the images where `keep` `(N,)` bool is True: `(n, H, W, 3)` uint8, read-only."""
    images = np.empty((0, 0, 0, 3), np.uint8)
    start, filled = 0, 0
    for block in iter_images(path):
        if start == 0:
            images = np.empty((int(keep.sum()), *block.shape[1:]), np.uint8)
        chosen = block[keep[start : start + len(block)]]
        images[filled : filled + len(chosen)] = chosen
        start, filled = start + len(block), filled + len(chosen)
    if start != len(keep):
        raise GlideError(f"{path}: {start} images but {len(keep)} captions; {_HOW}")
    images.flags.writeable = False  # records are views; no mistake may change the data set
    return images


class _Opened:
    """A zip file opened for reading. Every kind of damage becomes a GlideError."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)

    def __enter__(self) -> zipfile.ZipFile:
        if not os.path.exists(self.path):
            raise GlideError(f"{self.path}: no such file; {_HOW}")
        if os.path.isdir(self.path):
            raise GlideError(f"{self.path}: is a folder, not an emoji64 .npz file")
        try:
            self.file = zipfile.ZipFile(self.path)
        except Exception as error:  # of any kind, see below
            raise self.broken(error) from error
        return self.file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        # zipfile, zlib and numpy raise errors of any kind on malformed bytes.
        if isinstance(error, Exception) and not isinstance(error, GlideError):
            raise self.broken(error) from error

    def broken(self, error: BaseException) -> GlideError:
        why = one_line(error) or type(error).__name__
        return GlideError(f"{self.path}: truncated, or not an .npz file ({why:.160}); {_HOW}")


def _check_known(
    kind: str, wanted: Iterable[str], known: Iterable[str], path: str | os.PathLike
) -> None:
    """Raise UsageError, with the nearest name, if one of `wanted` is not in `known`."""
    known = sorted(set(map(str, known)))
    for name in wanted:
        if name not in known:
            lower = {h.lower(): h for h in known}
            word = str(name).lower()
            near = (
                difflib.get_close_matches(word, lower, n=1, cutoff=0.6)
                or [h for h in lower if word in h.split()]
                or difflib.get_close_matches(word, lower, n=1, cutoff=0.0)
            )
            hint = f"; the nearest is {lower[near[0]]!r}" if near else ""
            raise UsageError(f"{path}: no {kind} {name!r}{hint}")


def fingerprint(path: str | os.PathLike) -> str:
    """Return a checksum of an .npz file, from the checksums in its directory.

    Raises:
        GlideError: the file is missing or broken.
    """
    with _Opened(path) as file:
        members = sorted((m.filename, m.CRC) for m in file.infolist())
    return f"{zlib.crc32(repr(members).encode()):08x}"
