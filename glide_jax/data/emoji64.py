"""emoji64: 26,477 captioned pictures in eleven styles, 64x64, from permissively licensed art.

    python -m glide_jax.data.emoji64 fetch --to sources            # the pinned source packages
    python -m glide_jax.data.emoji64 rasterise --sources sources --out emoji64.npz
    python -m glide_jax.data.emoji64 prepare --npz emoji64.npz --data-dir data   # array_record

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
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glide_jax.errors import GlideError, UsageError, one_line_errors

SPLITS = ("train", "test_style", "test_tone", "test_concept", "test_iid")
# One value a picture, in the order in which they are written; `image` comes before them all.
FIELDS = (
    "caption", "style", "vendor", "license", "concept", "keywords", "group", "subgroup",
    "tone", "codepoint", "name", "family", "split", "caption_styled",
)  # fmt: skip
_CHUNK = 4 << 20  # bytes of pictures inflated at a time
_HOW = "`python -m glide_jax.data.emoji64 rasterise --help` says how to make it"


@dataclass(frozen=True, eq=False, repr=False)
class NpzSource:
    """Pictures and captions in memory, with `len()` and `[i]`: what grain takes as a source.

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


def prepare(npz: str | os.PathLike, data_dir: str | os.PathLike) -> Path:
    """Writes the pictures as a tensorflow-datasets data set in array_record format: its folder.

    64x64 pictures become `data_dir`/emoji64/1.0.0, 256x256 ones `data_dir`/emoji256/1.0.0. The
    folder is made under another name and moved there when it is whole, so that an interrupted
    run never leaves a data set that looks complete; if it is there already, nothing is done.

    Raises GlideError if the .npz file is broken or the folder holds other pictures, UsageError
    if the pictures have another size.
    """
    from glide_jax.data.emoji64_builder import BUILDERS

    size = next(iter(iter_images(npz))).shape[1]
    if size not in BUILDERS:
        raise UsageError(f"{npz}: {size}x{size} pictures; a data set is made of 64x64 or 256x256")
    builder = BUILDERS[size]
    place = Path(data_dir) / builder.name / str(builder.VERSION)
    if place.exists():
        _is_of(place, npz)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside the data set, not in it: what a killed run leaves there must not be found as one.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".partial-") as temporary:
        made = builder(npz=npz, data_dir=temporary, file_format="array_record")
        made.download_and_prepare()
        os.replace(made.data_dir, place)
    return place


def _is_of(place: Path, npz: str | os.PathLike) -> None:
    """Raises GlideError unless the data set in `place` was made of the pictures in `npz`."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(place).info
    except (OSError, ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise GlideError(
            f"{place}: not a data set ({error}); delete it and run this again"
        ) from error
    if (info.metadata or {}).get("npz") != fingerprint(npz):
        raise GlideError(
            f"{place}: holds a data set of other pictures; delete it or choose another"
        )


def __getattr__(name: str):
    # The builders need tensorflow-datasets when they are defined, which load_npz does not.
    if name in ("Emoji64", "Emoji256"):
        from glide_jax.data import emoji64_builder

        return getattr(emoji64_builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The command line; exits with 1 or 2 and one line where something is wrong."""
    import tyro

    def fetch(to: Path, vendors: tuple[str, ...] = ()) -> None:
        """Download the source packages (58 MB), each at its pinned version, and verify them.

        npm and apt-get do the downloading. Where one of them is missing, put the archive into
        the folder by hand: whatever is there is verified and not downloaded again.

        Args:
            to: Folder for the archives; made if need be.
            vendors: Only these sets of drawings, such as noto; all eleven where none is named.
        """
        from glide_jax.data.emoji_sources import fetch_sources

        fetch_sources(to, vendors or None)
        print(f"the sources are in {to}")

    def rasterise(
        sources: Path,
        out: Path,
        size: Literal[64, 256] = 64,
        workers: int = 2,
        vendors: tuple[str, ...] = (),
    ) -> None:
        """Render the drawings (pip install 'glide-jax[data]') and write the .npz file.

        Args:
            sources: The folder that `fetch` filled.
            out: The file to write.
            size: Height and width of the pictures. Record i is the same drawing at both sizes.
            workers: Processes that render.
            vendors: Only these sets of drawings, such as noto; all eleven where none is named.
        """
        from glide_jax.data.emoji_raster import rasterise

        print(f"{rasterise(sources, out, size, workers, vendors or None)} pictures in {out}")

    def prepare_(npz: Path, data_dir: Path) -> None:
        """Write the pictures as a tensorflow-datasets data set (array_record, no TensorFlow).

        Args:
            npz: The file that `rasterise` wrote.
            data_dir: Folder of data sets; the pictures go to emoji64/1.0.0 in it.
        """
        print(f"the data set is in {prepare(npz, data_dir)}")

    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"fetch": fetch, "rasterise": rasterise, "prepare": prepare_},
            prog="python -m glide_jax.data.emoji64",
            description=__doc__,
        )


if __name__ == "__main__":
    main()
