"""Write a PyTorch `.pt` file without PyTorch, for the original code to load.

The file is a zip archive, as PyTorch 1.6 and later write it. A pickle describes each tensor as a
view of a storage; the numbers of each storage are one record of the archive. The pickle is composed
of single opcodes: the module `pickle` would have to import the functions of PyTorch that it names.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glide_jax.errors import UsageError
from glide_jax.folders import expand_home
from glide_jax.weights.store import atomic_files
from glide_jax.weights.torch_pickle import STORAGES

_STORAGE_OF = {dtype: storage for storage, dtype in reversed(STORAGES.items())}
_FOLDER = "archive"  # Any name is allowed.
# As in torch.save: in the file each tensor starts at a multiple of this, for memory-mapping.
_ALIGNMENT = 64  # In bytes.
_LOCAL_HEADER = 30  # The bytes of a zip record before its name.


def write_torch_file(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a file like `torch.save(state_dict, path)`; `torch.load(weights_only=True)` reads it.

    Equal tensors give equal files. The file gets its name when it is complete. Arrays that are not
    contiguous are copied one at a time.

    Args:
        path: the file, replaced if it exists.
        state_dict: name -> array of a float (bfloat16 too), integer or bool dtype.

    Raises:
        UsageError: an array of another dtype.
        GlideError: the disk is full or the file cannot be written.
    """
    with (
        atomic_files(expand_home(path)) as (temporary,),
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        _write(file, archive, "data.pkl", _description(state_dict))
        _write(file, archive, "byteorder", b"little")
        for key, array in enumerate(state_dict.values()):
            little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            _write(file, archive, f"data/{key}", little.reshape(-1).view(np.uint8).data)
        _write(file, archive, "version", b"3\n")


def _write(file: BinaryIO, archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"{_FOLDER}/{name}")  # Its date is 1980, for the same bytes each time.
    start = file.tell() + _LOCAL_HEADER + len(record.filename) + 4
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    archive.writestr(record, data)


def _description(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle of the dictionary `{name: _rebuild_tensor_v2(storage, ...), ...}`."""
    entries = (
        _plain(name) + _tensor(str(key), name, array)
        for key, (name, array) in enumerate(state_dict.items())
    )
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def _plain(value: Any) -> bytes:
    """Return the opcodes of text, a number or a tuple of these, without frame and end."""
    return pickle.dumps(value, 2)[2:-1]


def _tensor(key: str, name: str, array: np.ndarray) -> bytes:
    if array.dtype.name not in _STORAGE_OF:
        raise UsageError(f"{name} is of dtype {array.dtype}: convert it to a float, int or bool")
    kind = f"ctorch\n{_STORAGE_OF[array.dtype.name]}\n".encode()
    storage = b"(" + _plain("storage") + kind + _plain(key) + _plain("cpu") + _plain(array.size)
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    view = _plain(0) + _plain(array.shape) + _plain(strides)
    # requires_grad=False, and no hooks.
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + view + hooks + b"tR"
