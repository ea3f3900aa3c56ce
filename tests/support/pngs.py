"""PNG files of kinds that Pillow does not write: few bits, 16-bit RGB, transparent colours."""

import struct
import zlib


def chunked_png(width, height, depth, colour_type, rows, chunks=()):
    """Return a PNG file of packed rows of bytes, with further chunks (name, data)."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def shorts(*values):
    """Return 16-bit numbers as bytes."""
    return struct.pack(f">{len(values)}H", *values)
