"""Small pictures and tar shards of them."""

import io
import tarfile

from PIL import Image


def encode(picture, kind="JPEG", **options):
    """The bytes of a picture file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, kind, **options)
    return data.getvalue()


def png(value=0, size=8):
    """A grey picture."""
    data = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def write_tar(path, members, **options):
    """A tar file of (name, data) pairs; data may be a `TarInfo` to be written as it is."""
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
    """Members of a tar file: pictures as grey as their number, and captions."""
    for i in range(start, start + count):
        yield f"{i:04}.png", png(i)
        yield f"{i:04}.txt", f"number {i}".encode()


def read(source):
    """Captions and the grey value of each picture."""
    records = [source[i] for i in range(len(source))]
    return [(r["caption"], int(r["image"][0, 0, 0])) for r in records]
