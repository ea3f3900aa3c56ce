"""Weights as a folder with `config.json` and `model.safetensors`.

The name of an array is its path in the parameter tree, "a/b/kernel". Any program that reads
safetensors can read `model.safetensors`; `config.json` describes the network.

The metadata of `model.safetensors` have `glide_jax.crc32`: the checksum of the arrays with their
names, and that of the network in `config.json`. `load_weights` verifies both. Files of other
programs have no checksum, so nothing is verified.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import expand_home

CONFIG = "config.json"
MODEL = "model.safetensors"

# Where the checksums are in the metadata. Embedded weights have them in `config.json`.
_CRC = "glide_jax.crc32"
_NO_CRC = "0" * 8 + " " + "0" * 8
# Entries of `config.json` that have a checksum. The others, such as `defaults`, may be edited.
_NETWORK = ("format", "model", "clip", "noise_schedule", "diffusion_steps", "prediction_type")
_HEADER_METADATA = "__metadata__"  # The format reserves this name.
_MAX_HEADER = 100_000_000  # In bytes; the limit of the format.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_DTYPE_NAMES = {dtype.name: name for name, dtype in _DTYPES.items()}


# ---------------------------------------------------------------- trees and flat names


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turn nested dictionaries into one with joined names: `{"a": {"b": x}}` -> `{"a/b": x}`.

    A value that is not a mapping is a leaf and stays as it is. Empty dictionaries are left out.

    Raises:
        UsageError: a key is not text, is empty or contains "/".
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise UsageError(f"{key!r} cannot be a key of a parameter tree: use text without '/'")
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: `{"a/b": x}` -> `{"a": {"b": x}}`.

    Raises:
        UsageError: a name is not text, has an empty part, or is both a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        parts = name.split("/") if isinstance(name, str) else [""]
        if "" in parts:
            raise UsageError(f"{name!r} cannot name a parameter: use the form 'a/b/kernel'")
        for branch in accumulate(parts[:-1], "{}/{}".format):
            if branch in flat:
                raise UsageError(f"{branch!r} cannot be a parameter beside {name!r}: rename one")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return tree


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_files(*targets: Path) -> Iterator[list[Path]]:
    """Provide temporary paths to write to, and rename them to `targets` at the end.

    The folder of the targets is created if needed. The files are flushed to the disk before they
    are renamed, in the order of `targets`: after an error or a power cut the old files are
    unchanged. A power cut between two renames leaves new files beside old ones, each complete.

    Raises:
        GlideError: the disk is full or the files cannot be written.
    """
    token = secrets.token_hex(4)
    temporaries = [target.with_name(f".{target.name}.{token}.tmp") for target in targets]
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets:
            if target.is_dir():
                raise GlideError(f"{target} is a folder: remove it or save elsewhere")
        yield temporaries
        for temporary in temporaries:
            _flush(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            temporary.replace(target)
        if os.name == "posix":  # Other systems cannot open a folder.
            _flush(folder)
    except OSError as error:
        raise GlideError(
            f"cannot save to {folder} ({error.strerror or error}): check its space and permissions"
        ) from error
    finally:
        for temporary in temporaries:
            # If this fails, the error that is being raised already says why.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Write a file to the disk now; otherwise a rename may reach the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(
    folder: str | Path,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` into a folder; see `atomic_files`.

    Args:
        folder: the target; other files in it stay unchanged.
        config: values that JSON can hold (tuples are read back as lists).
        params: flat, name "a/b/kernel" -> array of any shape, numpy or JAX, with a float (also
            bfloat16), integer or bool dtype. Arrays that `load_weights` mapped from this same
            folder are allowed and stay valid. Arrays that are not contiguous are copied one at a
            time.
        metadata: text -> text, for the header of `model.safetensors`.

    Raises:
        UsageError: config, params or metadata cannot be stored.
        GlideError: the disk is full or the folder cannot be written.
    """
    folder = expand_home(folder)
    text = _to_json(config)
    unflatten(params)  # It raises for names that could not be read back.
    header = _header(params, metadata or {})
    # The arrays first: their rename can fail (on Windows, while they are in use), and then neither
    # file has changed.
    with atomic_files(folder / MODEL, folder / CONFIG) as (model, config_file):
        config_file.write_text(text, encoding="utf-8")
        _write_file(model, header, params, _network_crc(json.loads(text)))


def save_arrays(
    path: Path, params: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a single safetensors file, which `map_arrays` reads; see `save_weights`.

    Raises:
        UsageError: params or metadata cannot be stored.
        GlideError: the disk is full or the file cannot be written.
    """
    header = _header(params, metadata or {})
    with atomic_files(path) as (temporary,):
        _write_file(temporary, header, params)


def _write_file(
    path: Path, header: dict[str, Any], params: Mapping[str, Any], network: str = "0" * 8
) -> None:
    """Write header and arrays, and their checksum into the header, beside that of the network."""
    with path.open("wb") as file:
        start = _write_header(file, header)
        arrays = _write_arrays(file, header, params)
        header[_HEADER_METADATA][_CRC] = f"{arrays} {network}"
        file.seek(0)
        assert _write_header(file, header) == start


def _to_json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"this config cannot be written as JSON: {error}") from error


def _header(params: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header of `model.safetensors`, in the order in which arrays are written."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"metadata must be text, not {key!r}: {value!r}")
    if _CRC in metadata:
        raise UsageError(f"{_CRC!r} cannot be a key of the metadata: it is the checksum's")
    header: dict[str, Any] = {_HEADER_METADATA: {**metadata, _CRC: _NO_CRC}}
    end = 0
    # The widest dtypes first: this aligns each array without gaps, which the format forbids.
    for name in sorted(params, key=lambda name: -params[name].dtype.itemsize):
        array = params[name]
        if name == _HEADER_METADATA:
            raise UsageError(f"{name!r} cannot name a parameter: safetensors uses it")
        if array.dtype.name not in _DTYPE_NAMES:
            raise UsageError(
                f"{name} is of dtype {array.dtype}: convert it to a float, int or bool"
            )
        start, end = end, end + array.nbytes
        kind = _DTYPE_NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (start, end)}
    return header


def _write_header(file: BinaryIO, header: dict[str, Any]) -> int:
    """Write the header, and return its size in bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return file.write(len(text).to_bytes(8, "little") + text)


def _write_arrays(file: BinaryIO, header: dict[str, Any], params: Mapping[str, Any]) -> str:
    """Write the arrays, one in memory at a time, and return their checksum.

    The safetensors package needs all arrays contiguous in memory at once.
    """
    crc = _header_crc(header)
    for name, entry in header.items():
        if name != _HEADER_METADATA:
            array = np.asarray(params[name], _DTYPES[entry["dtype"]], order="C")
            data = array.reshape(-1).view(np.uint8).data
            crc = zlib.crc32(data, crc)
            file.write(data)
    return f"{crc:08x}"


def _header_crc(header: Mapping[str, Any]) -> int:
    """Return the checksum of the names, dtypes and shapes of arrays, and of the metadata."""
    metadata = {k: v for k, v in header.get(_HEADER_METADATA, {}).items() if k != _CRC}
    header_without_crc = {**header, _HEADER_METADATA: metadata}
    return zlib.crc32(json.dumps(header_without_crc, sort_keys=True).encode())


def _network_crc(config: Mapping[str, Any]) -> str:
    network = {key: config[key] for key in _NETWORK if key in config}
    return f"{zlib.crc32(json.dumps(network, sort_keys=True).encode()):08x}"


# ---------------------------------------------------------------- reading


def load_weights(
    folder: str | Path,
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Read a folder that `save_weights` wrote.

    Returns:
        (config, params, metadata). Params are flat, name "a/b/kernel" -> array, in the order of the
        file. The arrays are read-only views of the memory-mapped file and use no memory until they
        are read. They stay valid when `save_weights` replaces the file.

    Raises:
        GlideError: the folder or a file in it is missing, incomplete or damaged.
    """
    folder = expand_home(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise GlideError(f"{folder} {what}: give a folder with {CONFIG} and {MODEL}")
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise GlideError(f"{folder / name} is missing: copy it there, or save the model again")
    config = read_config_json(folder / CONFIG)
    own_crc = str(config.pop(_CRC, ""))
    params, metadata, stated = _mapped(folder / MODEL, own_crc)
    if stated and stated.split(" ")[1:] != [_network_crc(config)]:
        raise GlideError(
            f"{folder / CONFIG} describes another network than when {MODEL} was saved: copy both "
            "again, or save the model again"
        )
    return config, params, metadata


def read_config_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        GlideError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GlideError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: {error.msg}"
        raise GlideError(f"{path} is not valid JSON ({where}): fix it, or copy it again") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise GlideError(f"{path} is not a JSON file: copy it again") from error
    if not isinstance(config, dict):
        raise GlideError(f"{path} must hold a JSON object, {{...}}: copy it again")
    return config


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays of a safetensors file as views of the mapped file, and its metadata.

    The safetensors package would copy every array into memory. The format: 8 bytes little-endian
    with the size of the header; the header, JSON of name -> dtype, shape, first and last byte; the
    bytes.

    Raises:
        GlideError: the file cannot be read, is damaged, or has an array of an unknown dtype.
    """
    arrays, metadata, _ = _mapped(path)
    return arrays, metadata


def _mapped(path: Path, stated: str = "") -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """Return the arrays and the metadata of a file, and its checksums, which are verified.

    Args:
        path: the file.
        stated: its checksums; empty: those in its metadata, if there are any.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError("a header of more than 100 MB")
            header = json.loads(file.read(size))
            data = np.memmap(file, np.uint8, "r")[8 + size :]
        crc = _header_crc(header)
        metadata = header.pop(_HEADER_METADATA, {})
        stated = stated or metadata.pop(_CRC, "")
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is not text")
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                kind = str(entry["dtype"])[:20]
                raise GlideError(f"{path} has {name[:80]!a} as {kind!a}: convert it to float32")
        arrays = {name: _view(data, **entry) for name, entry in header.items()}
        if stated and stated.split(" ")[0] != f"{zlib.crc32(data.data, crc):08x}":
            raise ValueError("other bytes than those that were written")
        return arrays, metadata, stated
    except OSError as error:
        raise GlideError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GlideError(
            f"{path} is incomplete or damaged: download it or save the model again"
        ) from error


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    kind = _DTYPES[dtype]
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("an impossible array")
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * kind.itemsize:
        raise ValueError("an array beyond the end")
    return np.ndarray(shape, kind, data[first:last])
