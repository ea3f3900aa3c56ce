"""From artwork to the .npz file: what `glide-jax data rasterise` does.

`render` renders one artwork. `rasterise` drops blank images and repetitions, assigns the splits
and writes the file. The same archives and the same resvg give the same file.
"""

import contextlib
import gzip
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np

from glide_jax.data.emoji.art import VENDORS, Record, UnicodeNames, records
from glide_jax.data.emoji.npz import FIELDS
from glide_jax.data.emoji.packages import check_sources
from glide_jax.errors import GlideError, UsageError

SPLIT_FILE = Path(__file__).with_name("splits.txt.gz")
# `map` in this process, or its counterpart of a pool.
Map = Callable[..., Iterable[Any]]


def render(record: Record, size: int) -> bytes | None:
    """Return an artwork, centred on a white square, as bytes of `(size, size, 3)` uint8.

    Returns None if it cannot be read.

    Raises:
        GlideError: resvg-py is not installed.
    """
    from PIL import Image

    if isinstance(record.art, bytes):
        image = Image.open(io.BytesIO(record.art))
    else:
        png = _render_svg(record.art, width=size)
        if png is None:
            return None
        image = Image.open(io.BytesIO(png))
        # Icons are at most a little too tall, and are shrunk below like image files. Clip art may
        # be ten times as tall as wide and is rendered again.
        if image.height > size and record.vendor in ("openclipart", "tango"):
            png = _render_svg(record.art, height=size)
            assert png is not None  # it was valid above
            image = Image.open(io.BytesIO(png))
    image = image.convert("RGBA")
    scale = size / max(image.size)
    if scale != 1:
        fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(fitted, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas.convert("RGB").tobytes()


def _render_svg(svg: str, **extent: int) -> bytes | None:
    """Return the SVG as a PNG of that width or height; None if it is not valid."""
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise GlideError("resvg-py is not installed: pip install '.[data]'") from None
    try:
        # dpi: at resvg-py's default of 0, lengths in mm or pt become 0 and the file is rejected.
        # Fonts: text would depend on the machine.
        return resvg_py.svg_to_bytes(svg_string=svg, dpi=96, skip_system_fonts=True, **extent)
    except ValueError:
        return None


class HeldOut:
    """The held-out records: concepts, (concept, tone) and (concept, family) pairs, single images.

    They are listed in a file and not chosen again, so that an image in a later version of a package
    is in the same split as its concept or pair.
    """

    def __init__(self) -> None:
        lines = gzip.decompress(SPLIT_FILE.read_bytes()).decode().splitlines()
        self.split_of = {tuple(key): split for split, *key in (x.split("\t") for x in lines)}

    def __call__(self, record: Record) -> str:
        """Return the first held-out split that has the record, or 'train'."""
        concept = record.description.concept
        keys = (
            ("test_concept", (concept,)),
            ("test_tone", (concept, str(record.description.tone))),
            ("test_style", (concept, VENDORS[record.vendor].family)),
            ("test_iid", (record.vendor, record.name)),
        )
        return next((split for split, key in keys if self.split_of.get(key) == split), "train")


def rasterise(
    sources: str | os.PathLike,
    out: str | os.PathLike,
    size: int = 64,
    workers: int = 2,
    vendors: Iterable[str] | None = None,
    progress: bool = True,
) -> int:
    """Render every artwork in the archives and write the .npz file.

    Artwork that cannot be read, blank images (standard deviation below 4/255) and exact repetitions
    within a vendor are left out. That is decided at 64x64 for every size, so record i is the same
    artwork in files of every size.

    Args:
        sources: folder of the archives.
        out: file to write.
        size: height and width of the images.
        workers: processes that render.
        vendors: only these sets (a smaller file, with other record numbers); None for all.
        progress: show a progress bar.

    Returns:
        The number of images.

    Raises:
        GlideError: an archive is missing or broken, or a worker dies.
        UsageError: there is no such vendor, or `out` or `workers` is not valid.
        OSError: the file cannot be written; then there is no file `out`.
    """
    sources, out = Path(sources), Path(out)
    vendors = None if vendors is None else list(vendors)
    if out.suffix != ".npz":
        raise UsageError(f"{out}: the file's name must end in .npz")
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    check_sources(sources, vendors)
    names = UnicodeNames(sources)
    candidates = [
        r for v in VENDORS if vendors is None or v in vendors for r in records(sources, v, names)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with _pool(workers) as apply:
        kept: list[Record] = []
        images: list[bytes] = []
        seen = set()
        for record, pixels in _rendered(apply, candidates, 64, progress, "64x64"):
            if pixels is None or np.frombuffer(pixels, np.uint8).std() < 4:
                continue
            digest = (record.vendor, hashlib.blake2b(pixels, digest_size=16).digest())
            if digest not in seen:
                seen.add(digest)
                kept.append(record)
                if size == 64:
                    images.append(pixels)
        if size == 64:
            write_npz(out, size, images, _fields(kept))
        else:
            rendered = _rendered(apply, kept, size, progress, f"{size}x{size}")
            write_npz(out, size, (pixels for _, pixels in rendered), _fields(kept))
    return len(kept)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Map]:
    """Return a context that gives a function like `map`, in order, over worker processes."""
    if workers == 1:
        yield map
        return
    # spawn: a fork of a process with JAX's threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        try:
            yield lambda function, *items: executor.map(function, *items, chunksize=16)
        except BrokenProcessPool:
            raise GlideError("a worker process died (out of memory?); try --workers 1") from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _rendered(
    apply: Map, candidates: list[Record], size: int, progress: bool, label: str
) -> Iterator[tuple[Record, Any]]:
    """Yield each record in order, with its pixels or None."""
    from tqdm import tqdm

    pixels = apply(render, candidates, [size] * len(candidates))
    bar = tqdm(pixels, label, len(candidates), unit=" images", disable=not progress)
    return zip(candidates, bar, strict=True)


def _fields(kept: list[Record]) -> dict[str, np.ndarray]:
    """Return the fields of the file other than `image`, each `(N,)`."""
    split_of = HeldOut()
    rows = []
    for record in kept:
        vendor, description = VENDORS[record.vendor], record.description
        rows.append(
            {
                "caption": description.caption,
                "style": vendor.style,
                "vendor": record.vendor,
                "license": vendor.license,
                "concept": description.concept,
                "keywords": description.keywords,
                "group": description.group,
                "subgroup": description.subgroup,
                "tone": description.tone,
                "codepoint": description.codepoint,
                "name": record.name,
                "family": vendor.family,
                "split": split_of(record),
                "caption_styled": f"{description.caption}, {vendor.style}",
            }
        )
    out = {field: np.array([row[field] for row in rows]) for field in FIELDS}
    return out | {"tone": out["tone"].astype(np.uint8)}


def write_npz(
    path: Path, size: int, images: Iterable[bytes], fields: dict[str, np.ndarray]
) -> None:
    """Write `image` `(N, size, size, 3)` uint8 and the fields, one image in memory at a time.

    numpy.savez would need all of them at once (5.2 GB at 256x256). The file gets its name only
    when it is complete, and has no date: the same images make the same file.
    """
    partial = path.with_name(path.name + ".partial")
    shape = (len(fields["caption"]), size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with zipfile.ZipFile(partial, "w") as file:
            with _member(file, "image") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for pixels in images:
                    member.write(pixels)
            for name, values in fields.items():
                with _member(file, name) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _member(file: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(name + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    return file.open(info, "w", force_zip64=True)
