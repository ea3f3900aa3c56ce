"""Small images, and tar shards of them."""

import io
import tarfile

from PIL import Image


def encode(image, kind="JPEG", **options):
    """Return the bytes of an image file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


def png(value=0, size=8):
    """Return a grey image as PNG."""
    data = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def write_tar(path, members, **options):
    """Write a tar file of (name, data) pairs; data may be a `TarInfo`, added as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is data:
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(count, start=0):
    """Yield members of a tar file: images, whose grey value is their number, and captions."""
    for i in range(start, start + count):
        yield f"{i:04}.png", png(i)
        yield f"{i:04}.txt", f"number {i}".encode()


def read(source):
    """Return the caption and the grey value of each record."""
    records = [source[i] for i in range(len(source))]
    return [(r["caption"], int(r["image"][0, 0, 0])) for r in records]
