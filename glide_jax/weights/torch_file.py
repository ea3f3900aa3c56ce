"""Read the weights in a PyTorch `.pt` file without PyTorch.

A `.pt` file contains raw numbers and a pickle, which is a small program and could do harm.
`torch_pickle.unpickle` executes the pickle without running any code. The numbers are memory-mapped.
The bytes of a storage in the file must suffice for a tensor before it becomes an array.

There are two layouts: the zip archive (PyTorch 1.6 and later) and the older sequence of pickles.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glide_jax.errors import GlideError
from glide_jax.folders import expand_home
from glide_jax.weights.torch_pickle import (
    DamagedError,
    Storage,
    Tensor,
    printable,
    require,
    unpickle,
)

# The pickle of GLIDE's base model (about 700 tensors) has about 0.1 MB.
_MAX_PICKLE = 16 * 2**20  # In bytes.
# A pickle of a few kB can contain lists nested to 2**1000 entries.
_MAX_ENTRIES = 10**6
_MAX_DEPTH = 16
_MAX_NAME = 1000  # In characters.
# Stride 0 makes an array of any size from one number; a copy of it could fill the memory.
_MAX_REPEATED = 2**24  # In elements.

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_torch_file(path: str | Path, *, unwrap: bool = True) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict saved by `torch.save`; run no code of the file.

    Args:
        path: a `.pt`, `.pth` or `.ckpt` file, in the zip or in the legacy format.
        unwrap: read one dictionary of several; see below.

    Returns:
        Name -> array, in the order of the file. Shapes and dtypes are those of the tensors
        (bfloat16 and float8 as in `ml_dtypes`). The arrays are read-only views of the
        memory-mapped file and are copied nowhere; the file must not change while they are in use.
        The checksums of a zip file are verified; a legacy file has none. Tied tensors share their
        memory. In legacy files the views may be unaligned.

        If `unwrap`, and the top level has a dictionary under "state_dict", "model_state_dict" or
        "model", the first of these is read and the rest, such as an optimizer, is left out. Nested
        dictionaries and lists are flattened, with names joined by dots: `{"a": {"b": [x]}}` gives
        "a.b.0". Values that are not tensors are left out.

    Raises:
        GlideError: the file is missing, incomplete, damaged, compressed, big-endian, without
            tensors, not from PyTorch, or uses a name that is not on the list of allowed names.
    """
    path = expand_home(path)
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise GlideError(f"{path} {what}: give the path of a .pt file")
        with path.open("rb") as file:
            return _read(path, file, unwrap)
    except OSError as error:
        raise GlideError(f"cannot read {path}: {error.strerror or error}") from error
    # Any fault of a hostile or broken pickle raises one of these.
    except (ValueError, IndexError, KeyError, TypeError) as error:
        what = f" ({error})" if isinstance(error, DamagedError) else ""
        raise GlideError(f"{path} is incomplete or damaged{what}: download it again") from error


def _read(path: Path, file: BinaryIO, unwrap: bool) -> dict[str, np.ndarray]:
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        tree, locate, verify = _read_zip(path, file)
    elif head.startswith(b"\x80"):
        tree, locate = _read_legacy(path, file)
        verify = None
    elif head[257:262] == b"ustar":
        raise GlideError(f"{path} was written by PyTorch 0.1: load and save it with a newer one")
    else:
        raise _not_torch(path, head)
    tensors = _name_tensors(path, tree, unwrap)
    data = np.memmap(file, dtype=np.uint8, mode="r")
    arrays = {
        name: _as_array(path, name, tensor, data[locate(tensor.storage)])
        for name, tensor in tensors.items()
    }
    if verify:
        verify({tensor.storage.key for tensor in tensors.values()})
    return arrays


def _not_torch(path: Path, head: bytes) -> GlideError:
    if not head:
        return GlideError(f"{path} is empty: download it again")
    line = head.lstrip().split(b"\n")[0][:24].strip()
    readable = line and all(32 <= byte < 127 for byte in line)
    start = f'"{line.decode()}"' if readable else f"bytes {head[:8].hex(' ')}"
    return GlideError(f"{path} is not a PyTorch file (starts with {start}): download it again")


# ---------------------------------------------------------------- the two layouts

_Locate = Callable[[Storage], slice]  # From a storage to the range of its bytes in the file.
_Verify = Callable[[Iterable[str]], None]  # From keys of storages; it raises DamagedError.
_CHUNK = 1 << 20  # In bytes, at a time for a checksum.


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Read without mapping: access to a mapped page would also map its neighbours."""
    require(start >= 0, "a record before its start")
    file.seek(start)
    data = file.read(size)
    require(len(data) == size, "a record beyond its end")
    return data


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, _Locate, _Verify]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError) as error:
        raise DamagedError("no zip directory at its end") from error
    records = {member.filename: member for member in members}
    require(len(records) == len(members), "two records of one name")
    end = file.seek(0, io.SEEK_END)

    def locate(name: str) -> slice:
        if name not in records:
            raise GlideError(f"{path} lacks its record {printable(name)}: download it again")
        member = records[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise GlideError(
                f"{path} was compressed after PyTorch wrote it: unpack it and pack it again "
                "with `zip -0 -r`, or download it again"
            )
        local = struct.unpack("<4s22x2H", _read_at(file, member.header_offset, 30))
        start = member.header_offset + 30 + local[1] + local[2]
        complete = local[0] == b"PK\x03\x04" and start + member.file_size <= end
        require(complete, "a record beyond its end")
        return slice(start, start + member.file_size)

    def content(name: str) -> bytes:
        where = locate(name)
        require(where.stop - where.start <= _MAX_PICKLE, "a pickle of more than 16 MiB")
        check(name, where)
        return _read_at(file, where.start, where.stop - where.start)

    def check(name: str, where: slice) -> None:
        crc = 0
        for start in range(where.start, where.stop, _CHUNK):
            crc = zlib.crc32(_read_at(file, start, min(_CHUNK, where.stop - start)), crc)
        # PyTorch can be set to write no checksums.
        known = records[name].CRC in (0, crc)
        require(known, f"the checksum of its record {printable(name)} differs")

    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise GlideError(f"{path} is a zip archive, but not from PyTorch: it has no data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")
    if f"{folder}/constants.pkl" in records:
        raise GlideError(f"{path} is a TorchScript program: save its state_dict() instead")
    if f"{folder}/byteorder" in records and content(f"{folder}/byteorder") != b"little":
        raise _big_endian(path)
    tree = unpickle(path, io.BytesIO(content(pickles[0])))

    def verify(keys: Iterable[str]) -> None:
        for name in (f"{folder}/data/{key}" for key in keys):
            check(name, locate(name))

    return tree, lambda storage: locate(f"{folder}/data/{storage.key}"), verify


def _big_endian(path: Path) -> GlideError:
    return GlideError(f"{path} is big-endian: load and save it again on a little-endian machine")


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Locate]:
    """Read pickles of a magic number, version, machine, object and storage keys, then the data."""
    file.seek(0)
    pickles = io.BytesIO(file.read(_MAX_PICKLE))
    if unpickle(path, pickles) != _LEGACY_MAGIC or unpickle(path, pickles) != _LEGACY_PROTOCOL:
        raise GlideError(f"{path} is a pickle, but not from PyTorch: give a file of torch.save")
    machine = unpickle(path, pickles)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _big_endian(path)
    storages: dict[str, Storage] = {}
    tree = unpickle(path, pickles, storages)
    keys = unpickle(path, pickles)
    starts: dict[str, int] = {}
    position, end = pickles.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        # Not `storages.get`: the hash of a deeply nested tuple would overflow the C stack.
        require(isinstance(key, str) and key in storages, "a storage that no tensor uses")
        storage = storages[key]
        (total,) = struct.unpack("<q", _read_at(file, position, 8))
        require(total == storage.total and key not in starts, "a storage of another size")
        starts[key] = position + 8
        position += 8 + total * storage.dtype.itemsize
        require(position <= end, "a storage beyond its end")

    def locate(storage: Storage) -> slice:
        start = starts[storage.key] + storage.start * storage.dtype.itemsize
        return slice(start, start + storage.count * storage.dtype.itemsize)

    return tree, locate


# ---------------------------------------------------------------- names and arrays


def _name_tensors(path: Path, tree: Any, unwrap: bool) -> dict[str, Tensor]:
    """Flatten the tree. Lists may contain each other many times, so the entries are counted."""
    if unwrap and isinstance(tree, dict):
        inner = [tree[key] for key in _WRAPPERS if isinstance(tree.get(key), dict)]
        tree = inner[0] if inner else tree
    tensors: dict[str, Tensor] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    entries = 0
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            require(sum(map(len, name)) <= _MAX_NAME, "a name of more than 1000 characters")
            joined = ".".join(name)
            if not name or joined in tensors:
                what = f"two tensors named {printable(joined)}" if name else "a tensor without name"
                raise GlideError(f"{path} holds {what}: save model.state_dict() instead")
            tensors[joined] = value
        elif isinstance(value, dict | list | tuple):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            entries += len(value)
            if entries > _MAX_ENTRIES or len(name) >= _MAX_DEPTH:
                raise GlideError(f"{path} is nested too deeply: save model.state_dict() alone")
            waiting += reversed([((*name, str(key)), part) for key, part in parts])
    if not tensors:
        raise GlideError(f"{path} holds no tensors: give the file of a state_dict")
    return tensors


def _as_array(path: Path, name: str, tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Return the view of `data`, the bytes of the storage, that the tensor describes."""
    storage, dtype, size = tensor.storage, tensor.dtype, tensor.dtype.itemsize
    stored = storage.count * storage.dtype.itemsize  # In bytes, according to the pickle.
    wanted = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    empty = 0 in tensor.shape
    if stored > len(data) or not (empty or (last + 1) * size <= stored):
        raise GlideError(
            f"{path} has less data than its tensor {printable(name)} needs: download it again"
        )
    if empty:
        array = np.empty(tensor.shape, dtype)
        array.flags.writeable = False
        return array
    if wanted > _MAX_REPEATED and wanted * size > stored:
        raise GlideError(
            f"{path}: tensor {printable(name)} repeats its data to more than 2**24 elements: "
            "save it with .contiguous()"
        )
    # Along an axis of length 1 PyTorch may write any stride, also one too large for numpy.
    strides = [
        stride * size if length > 1 else size
        for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    # numpy checks the bounds of `data` once more.
    return np.ndarray(tensor.shape, dtype, data, tensor.offset * size, strides)
