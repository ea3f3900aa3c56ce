"""From drawings to the .npz file: what `python -m glide_jax.data.emoji.npz rasterise` does.

`draw` renders one; `rasterise` drops blank pictures and repetitions, assigns the splits and
writes the file. Given the same archives and the same resvg the file is the same.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from glide_jax.data.emoji.npz import FIELDS
from glide_jax.data.emoji.art import VENDORS, Record, UnicodeNames, records
from glide_jax.data.emoji.packages import check_sources
from glide_jax.errors import GlideError, UsageError

SPLIT_CELLS = Path(__file__).with_name("emoji64_splits.txt.gz")


def draw(record: Record, size: int) -> bytes | None:
    """One drawing on white: (size, size, 3) uint8 as bytes; None if it cannot be read.

    A drawing that is not square is centred. Raises GlideError if resvg-py is not installed.
    """
    from PIL import Image

    if isinstance(record.art, bytes):
        picture = Image.open(io.BytesIO(record.art))
    else:
        png = _render(record.art, width=size)
        if png is None:
            return None
        picture = Image.open(io.BytesIO(png))
        # Icons that are a little too tall are shrunk below, like the pictures; clip art may be
        # ten times as tall as wide and is rendered again.
        if picture.height > size and record.vendor in ("openclipart", "tango"):
            picture = Image.open(io.BytesIO(_render(record.art, height=size)))
    picture = picture.convert("RGBA")
    scale = size / max(picture.size)
    if scale != 1:
        fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(fitted, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return canvas.convert("RGB").tobytes()


def _render(svg: str, **extent: int) -> bytes | None:
    """The SVG as a PNG of that width or height; None if it is not valid."""
    try:
        import resvg_py
    except ImportError:
        raise GlideError("resvg-py is not installed: pip install 'glide-jax[data]'") from None
    try:
        # dpi: at resvg-py's default of 0, lengths in mm or pt become 0 and the file is refused.
        # Fonts: text would differ from machine to machine.
        return resvg_py.svg_to_bytes(svg_string=svg, dpi=96, skip_system_fonts=True, **extent)
    except ValueError:
        return None


class SplitCells:
    """Which pictures are held out: concepts, (concept, tone), (concept, family), and some singly.

    The cells are kept in a file and not drawn anew, so that a picture added by a later version
    of a package falls on the same side as its cell.
    """

    def __init__(self) -> None:
        lines = gzip.decompress(SPLIT_CELLS.read_bytes()).decode().splitlines()
        self.split_of = {tuple(key): split for split, *key in (x.split("\t") for x in lines)}

    def __call__(self, record: Record) -> str:
        """'train' or the held-out split; the first that claims the picture has it."""
        concept = record.what.concept
        cells = (
            ("test_concept", (concept,)),
            ("test_tone", (concept, str(record.what.tone))),
            ("test_style", (concept, VENDORS[record.vendor].family)),
            ("test_iid", (record.vendor, record.name)),
        )
        return next((split for split, key in cells if self.split_of.get(key) == split), "train")


def rasterise(
    sources: str | os.PathLike,
    out: str | os.PathLike,
    size: int = 64,
    workers: int = 2,
    vendors: Iterable[str] | None = None,
    progress: bool = True,
) -> int:
    """Renders every drawing in the archives and writes the .npz file: the number of pictures.

    Left out are drawings that cannot be read, blank ones (standard deviation below 4/255) and
    exact repetitions within a vendor. What is left out is decided at 64x64 whatever the size, so
    that record i shows the same drawing in files of every size. `workers` processes; `vendors`:
    only these (a smaller file, with other record numbers).

    Raises GlideError if an archive is missing or broken or a worker dies, UsageError for an
    unknown vendor, and OSError if the file cannot be written; then no file `out` is left behind.
    """
    sources, out = Path(sources), Path(out)
    vendors = None if vendors is None else list(vendors)
    if out.suffix != ".npz":
        raise UsageError(f"{out}: the file's name must end in .npz")
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    check_sources(sources, vendors)
    names = UnicodeNames(sources)
    found = [
        r for v in VENDORS if vendors is None or v in vendors for r in records(sources, v, names)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with _pool(workers) as apply:
        kept, pictures, seen = [], [], set()
        for record, pixels in _drawn(apply, found, 64, progress, "64x64"):
            if pixels is None or np.frombuffer(pixels, np.uint8).std() < 4:
                continue
            digest = (record.vendor, hashlib.blake2b(pixels, digest_size=16).digest())
            if digest not in seen:
                seen.add(digest)
                kept.append(record)
                if size == 64:
                    pictures.append(pixels)
        if size != 64:
            drawn = _drawn(apply, kept, size, progress, f"{size}x{size}")
            pictures = (pixels for _, pixels in drawn)
        write_npz(out, size, pictures, _fields(kept))
    return len(kept)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator:
    """A function `apply(function, *iterables)` like map, in order, over worker processes."""
    if workers == 1:
        yield map
        return
    # spawn: a fork of a process in which JAX has started its threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        try:
            yield lambda function, *items: executor.map(function, *items, chunksize=16)
        except BrokenProcessPool:
            raise GlideError("a worker process died (out of memory?); try --workers 1") from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _drawn(apply, found: list[Record], size: int, progress: bool, label: str) -> Iterator:
    """(record, its pixels or None), in order."""
    from tqdm import tqdm

    pixels = apply(draw, found, [size] * len(found))
    bar = tqdm(pixels, label, len(found), unit=" drawings", disable=not progress)
    return zip(found, bar, strict=True)


def _fields(kept: list[Record]) -> dict[str, np.ndarray]:
    """The fields of the file other than `image`, each (N,)."""
    split_of = SplitCells()
    rows = []
    for record in kept:
        vendor, what = VENDORS[record.vendor], record.what
        rows.append(
            {
                "caption": what.caption,
                "style": vendor.style,
                "vendor": record.vendor,
                "license": vendor.license,
                "concept": what.concept,
                "keywords": what.keywords,
                "group": what.group,
                "subgroup": what.subgroup,
                "tone": what.tone,
                "codepoint": what.codepoint,
                "name": record.name,
                "family": vendor.family,
                "split": split_of(record),
                "caption_styled": f"{what.caption}, {vendor.style}",
            }
        )
    out = {field: np.array([row[field] for row in rows]) for field in FIELDS}
    return out | {"tone": out["tone"].astype(np.uint8)}


def write_npz(
    path: Path, size: int, pictures: Iterable[bytes], fields: dict[str, np.ndarray]
) -> None:
    """Writes `image` (N, size, size, 3) uint8 and the fields, one picture in memory at a time.

    numpy.savez would need all of them at once (5.2 GB at 256x256). The file appears under its
    name only when it is whole, and holds no date: the same pictures make the same file.
    """
    partial = path.with_name(path.name + ".partial")
    shape = (len(fields["caption"]), size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with zipfile.ZipFile(partial, "w") as file:
            with _member(file, "image") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for pixels in pictures:
                    member.write(pixels)
            for name, values in fields.items():
                with _member(file, name) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _member(file: zipfile.ZipFile, name: str):
    info = zipfile.ZipInfo(name + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    return file.open(info, "w", force_zip64=True)
