"""Malformed folders, tar files, tables and .npz files of captioned images, at random."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Formats of the images of the base set.
FORMATS = ("png", "jpg", "bmp", "webp", "gif", "tif")
# No fault of a few bytes makes one of them another.
CAPTIONS = ("a red apple", "two cats on a roof", "snow in the mountains", "the old harbour")
ODD_NAMES = (
    "new\nline", "tab\there", "a b ", "-rf", "100%", "a[1]", "{0..9}", "back\\slash", "quo'te\"",
    "e\u0301te\u0301", "\u202eright", "\U0001f34e", "bad\udcff", "x" * 200, "a.b.c", "NUL", "~",
)  # fmt: skip
ODD_TEXTS = (
    b"", b"\xff\xfe\x00", b"caf\xe9", b"a\0b", b"\xef\xbb\xbfa cat", "a cat".encode("utf-16"),
    b"\xed\xa0\x80", b"x" * 100_000, b"\r\n\r\n", b"{}", b"\x1b[31m", "a cat".encode("utf-32"),
)  # fmt: skip
ODD_VALUES = (
    "null", "3", "-1e999", "NaN", "[]", "{}", '""', '["a", 3]', '"\\ud800"', "[[[]]]", "true",
    '{"a": {"b": 1}}', "9" * 5000, '"a\\u0000b"', '"../../etc/passwd"', '"/"', '"."',
)  # fmt: skip
# Declared widths and heights, far from those of the data.
SIDES = (0, 1, 17, 2**14, 65_500, 2**31 - 1, 2**32 - 1)


class Item(NamedTuple):
    """One captioned image: the names and contents of its files."""

    key: str
    kind: str
    image: bytes
    caption: str


class Case(NamedTuple):
    """A malformed data set.

    Attributes:
        what: a description.
        touched: keys of items that may be lost or altered.
    """

    what: str
    touched: set[str]


Files = dict[str, bytes]


def base_items(count: int = 4, size: int = 16) -> list[Item]:
    """Return small images of several formats, with captions that differ."""
    rng, items = np.random.default_rng(0), []
    for i in range(count):
        kind, data = FORMATS[i % len(FORMATS)], io.BytesIO()
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(data, Image.registered_extensions()[f".{kind}"])
        items.append(Item(f"{i:04}", kind, data.getvalue(), CAPTIONS[i]))
    return items


def mangled(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return bytes with a random fault, and its description."""
    kind, place = rng.randrange(8), rng.randrange(max(1, len(data)))
    if kind == 0 or not data:
        return b"", "emptied"
    if kind == 1:
        return data[:place], f"cut to {place}"
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 600)), "extended"
    if kind == 3:
        size = rng.randrange(1, 64)
        return data[:place] + data[place + size :], f"{size} bytes lost at {place}"
    if kind == 4:
        size = rng.randrange(1, 64)
        return data[:place] + rng.randbytes(size) + data[place + size :], f"noise at {place}"
    if kind == 5:
        return rng.randbytes(len(data)), "noise"
    # Most faults are one byte, with the beginning of a file more often.
    place = rng.randrange(min(64, len(data))) if rng.random() < 0.5 else place
    changed = data[place] ^ (1 << rng.randrange(8))
    return data[:place] + bytes([changed]) + data[place + 1 :], f"bit at {place}"


def declared(item: Item, rng: random.Random) -> bytes:
    """Return a PNG, BMP or GIF with other dimensions in its header."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    data = bytearray(item.image)
    if item.kind == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif item.kind == "bmp":
        data[18:26] = struct.pack("<II", width, height)
    elif item.kind == "gif":
        data[6:10] = struct.pack("<HH", width % 65536, height % 65536)
    else:
        return mangled(item.image, rng)[0]
    return bytes(data)


def mangled_image(item: Item, rng: random.Random) -> bytes:
    """Return a broken image."""
    return declared(item, rng) if rng.random() < 0.2 else mangled(item.image, rng)[0]


def mangled_caption(item: Item, rng: random.Random) -> bytes:
    """Return a broken or unusual caption."""
    if rng.random() < 0.5:
        return rng.choice(ODD_TEXTS)
    return mangled(item.caption.encode(), rng)[0]


# --- folders


def folder_files(items: list[Item], rng: random.Random) -> tuple[Files, Case]:
    """Return the files of a malformed folder of images with captions."""
    files: Files = {}
    for item in items:
        files[f"{item.key}.{item.kind}"] = item.image
        files[f"{item.key}.txt"] = item.caption.encode()
    item = rng.choice(items)
    image, text = f"{item.key}.{item.kind}", f"{item.key}.txt"
    touched = {item.key}
    match rng.randrange(8):
        case 0 | 1 | 2:
            files[image], what = mangled_image(item, rng), "image"
        case 3:
            files[text], what = mangled_caption(item, rng), "caption"
        case 4:
            odd, what = rng.choice(ODD_NAMES), "odd name"
            files[f"{odd}.{item.kind}"], files[f"{odd}.txt"] = files.pop(image), files.pop(text)
            touched = set()
        case 5:
            suffix, what = (
                rng.choice(("jpeg", "PNG", "gif", "heic", "bin", "webp", "tar")),
                "suffix",
            )
            files[f"{item.key}.{suffix}"] = files.pop(image)
        case 6:
            what = "stray file"
            name = rng.choice((".hidden.png", "x.png", "x.txt", "x.json", "notes.md", "sub/y.jpg"))
            files[name] = mangled(rng.choice(items).image, rng)[0]
            touched = set()
        case _:
            what = "JSON caption"
            files[f"{item.key}.json"] = f'{{"caption": {rng.choice(ODD_VALUES)}}}'.encode()
            del files[text]
    return files, Case(f"folder, {what} of {item.key}", touched)


# --- tar files


def _header(name: bytes, size: bytes, kind: bytes, rest: bytes = b"") -> bytes:
    """Return a header of 512 bytes with a right checksum."""
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = size[:12].ljust(12, b"\0")
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[265 : 265 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _odd_size(size: int, rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"%011o\0" % max(0, size + rng.randrange(-20, 2000)),
            b"77777777777\0",
            b"\x80" + bytes(3) + b"\x7f" + bytes(7),  # 2^59 bytes
            b"\xff" * 11 + bytes([rng.randrange(256)]),  # a negative number
            b"\xff" * 10 + b"\xfc\x00",
            b"not a size\0\0",
            b"\0" * 12,
        )
    )


def _chain(rng: random.Random) -> bytes:
    """Return headers that describe the next header, which describes the next one, ..."""
    kind = rng.choice((b"x", b"L", b"g"))
    text = {b"L": b"a.png\0"}.get(kind, b"11 path=a.b\n")
    one = _header(b"chain", b"%011o\0" % len(text), kind) + _padded(text)
    return one * rng.choice((1, 3, 600))


def _pax(rng: random.Random) -> bytes:
    lines = (
        b"size=-5", b"size=99999999999999", b"path=\xff\xfe", b"path=a/../b.png", b"size=x",
        b"GNU.sparse.map=1,2,3", b"GNU.sparse.size=x", b"hdrcharset=BINARY", b"no equals sign",
        b"GNU.sparse.major=1", b"GNU.sparse.realsize=-1", b"path=" + b"a" * 3000,
    )  # fmt: skip
    line = rng.choice(lines)
    length = len(line) + 2 + len(str(len(line) + 4))
    record = b"%d %s\n" % (length + rng.choice((0, 0, 1, -3)), line)
    return _header(b"pax", b"%011o\0" % len(record), b"x") + _padded(record)


def tar_file(items: list[Item], rng: random.Random) -> tuple[bytes, Case]:
    """Return a malformed tar file."""
    at = rng.randrange(len(items))
    item, kind = items[at], rng.randrange(10)
    parts: list[bytes] = []
    # What comes before and after members, on whose place the rest depends.
    touched = {item.key}
    for i, one in enumerate(items):
        image, caption = one.image, one.caption.encode()
        names = [f"{one.key}.{one.kind}".encode(), f"{one.key}.txt".encode()]
        sizes = [b"%011o\0" % len(image), b"%011o\0" % len(caption)]
        types, before, after = [b"0", b"0"], b"", b""
        if i == at:
            match kind:
                case 0:
                    image = mangled_image(one, rng)
                    sizes[0] = b"%011o\0" % len(image)
                case 1:
                    caption = mangled_caption(one, rng)
                    sizes[1] = b"%011o\0" % len(caption)
                case 2:
                    sizes[rng.randrange(2)] = _odd_size(len(image), rng)
                case 3:
                    names[rng.randrange(2)] = rng.choice(
                        (b"", b"/", b"../x.png", b".hidden.png", b"\xff\xfe.png", b"a" * 100,
                         b"0000.png", b"0001.txt", b"dir/", b"no_dot", b"..", b"a\n.png")
                    )  # fmt: skip
                    touched = {item.key, "0000", "0001"}
                case 4:
                    types[rng.randrange(2)] = bytes([rng.choice(b"12345673456789xgLKSDMNVA\xff\0")])
                case 5:
                    before = _pax(rng) if rng.random() < 0.6 else _chain(rng)
                case 6:
                    data = mangled(one.image, rng)[0]
                    name = rng.choice(names)
                    after = _header(name, b"%011o\0" % len(data), b"0") + _padded(data)
        files = zip(names, sizes, types, (image, caption), strict=True)
        members = [_header(n, size, t) + _padded(data) for n, size, t, data in files]
        parts += [before, *members, after]
    whole, what = b"".join(parts) + bytes(1024), f"member fault {kind}"
    if kind == 7:
        whole, what = mangled(whole, rng)
        touched = {one.key for one in items}
    elif kind == 8:
        # A header whose checksum does not fit.
        starts = [sum(map(len, parts[:i])) for i in range(len(parts)) if parts[i]]
        place = rng.choice(starts) + rng.randrange(512)
        whole = whole[:place] + bytes([whole[place] ^ 32]) + whole[place + 1 :]
        what = f"header byte {place}"
        touched = {one.key for one in items}
    elif kind == 9:
        head = rng.choice(
            (b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
        )
        whole, what = head + whole[len(head) :], "the beginning of a compressed file"
    return whole, Case(f"tar, {what} at {item.key}", touched)


# --- tables


def table_files(items: list[Item], rng: random.Random) -> tuple[Files, Case]:
    """Return the files of a folder with a malformed metadata file."""
    files = {f"{item.key}.{item.kind}": item.image for item in items}
    rows = [{"file_name": f"{i.key}.{i.kind}", "caption": i.caption} for i in items]
    at, kind = rng.randrange(len(items)), rng.choice(("csv", "tsv", "jsonl", "json"))
    delimiter = "\t" if kind == "tsv" else ","
    if kind in ("csv", "tsv"):
        lines = [delimiter.join(row.values()) for row in rows]
        if rng.random() < 0.4:
            odd = (
                '"',
                "a,b,c,d",
                "",
                "x" * 200_000,
                '"a',
                ",,,,",
                "\x0b",
                "sep=;",
                rows[0]["caption"],
            )
            lines[at] = rng.choice(odd) + delimiter + rng.choice(odd)
        data = "\n".join([delimiter.join(rows[0]), *lines, ""]).encode()
    else:
        lines = [json.dumps(row) for row in rows]
        if rng.random() < 0.4:
            field, value = (
                rng.choice(("file_name", "caption", "image", "text")),
                rng.choice(ODD_VALUES),
            )
            lines[at] = lines[at][:-1] + f', "{field}": {value}}}'
        elif rng.random() < 0.1:
            lines[at] = rng.choice(("[" * 100_000, "{}", "[]", "3", "nul", '{"a":' * 2000))
        data = ("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]").encode()
    what = "row"
    if rng.random() < 0.6:
        data, what = mangled(data, rng)
    files[f"metadata.{kind}"] = data
    # A fault in a table may make a valid caption, or take one image for another: nothing holds.
    return files, Case(f"{kind}, {what} {at}", {item.key for item in items})


# --- .npz files


def _pixels(item: Item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(item.image)).convert("RGB"))


def npz_file(items: list[Item], rng: random.Random) -> tuple[bytes, Case]:
    """Return a malformed .npz file, as that of emoji64."""
    count = len(items)
    arrays: dict[str, Any] = {
        "image": np.stack([_pixels(item) for item in items]),
        "caption": np.array([item.caption for item in items]),
        "split": np.array(["train"] * count),
        "style": np.array(["Plain"] * count),
        "concept": np.array([item.key for item in items]),
    }  # fmt: skip
    what, fields = "bytes", sorted(arrays)
    structured = rng.random() < 0.4
    if structured:
        name = rng.choice(fields)
        odd: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
            lambda a: a[:-1], lambda a: np.array(3), lambda a: a[None], lambda a: a[:0],
            lambda a: np.arange(count), lambda a: np.asfortranarray(a), lambda a: a.astype("S8"),
            lambda a: np.zeros((count, 0, 0, 3), np.uint8), lambda a: a.astype(object),
            lambda a: np.zeros(count, [("a", "i4")]),
            lambda a: np.zeros((count, 4, 4, 4), np.uint8),
        )  # fmt: skip
        index = rng.randrange(len(odd))
        arrays[name] = odd[index](arrays[name]) if index != 6 or name != "image" else np.array(3)
        what = f"{name} {index}"
    file = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **arrays)
    data = file.getvalue()
    if not structured:
        data, what = mangled(data, rng)
    return data, Case(f"npz, {what}", {item.key for item in items} if structured else set())


def write_files(folder: Path, files: Files) -> Path:
    """Write files below a new folder, and return it. Names that no disk takes are left out."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
