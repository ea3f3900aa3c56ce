"""PyTorch files composed of single opcodes, with contents that torch never writes."""

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.weights.torch_file import read_torch_file

FOUR = np.arange(4, dtype=np.float32)


def refusal(path: Path) -> str:
    """Return the message of the error of a file: one printable line that names the file."""
    with pytest.raises(GlideError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600 and str(path) in message
    assert caught.value.exit_code == 1
    return message


def body(value: object) -> bytes:
    """Return the pickle of a plain value without its frame, for use between other opcodes."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", count=4, kind="torch\nFloatStorage", tail=b"") -> bytes:
    """Return the opcodes of a storage."""
    kind_code = b"c" + kind.encode() + b"\n"
    return b"(" + body("storage") + kind_code + body(key) + body("cpu") + body(count) + tail + b"tQ"


def tensor(offset=0, shape=(4,), strides=(1,), metadata=None, **storage_options) -> bytes:
    """Return the opcodes of a tensor."""
    view = storage(**storage_options) + body(offset) + body(shape) + body(strides)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + hooks + body(metadata) + b"tR"


def state(tensors: dict[str, bytes]) -> bytes:
    """Return the pickle of a dictionary of tensors."""
    return b"\x80\x02}(" + b"".join(body(name) + t for name, t in tensors.items()) + b"u."


def write_zip(path: Path, pickled: bytes, records=None, method=zipfile.ZIP_STORED) -> Path:
    """Write a file in the zip format."""
    records = {"data/0": FOUR.tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)
    return path


def write_legacy(path: Path, pickled: bytes, keys=b"\x80\x02](X\x01\x00\x00\x000e.", data=None):
    """Write a file in the legacy format."""
    data = struct.pack("<q", 4) + FOUR.tobytes() if data is None else data
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + keys + data)
    return path


in_both_formats = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])
