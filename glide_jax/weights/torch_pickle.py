"""An interpreter for the pickles in PyTorch files: it describes tensors and runs no other code.

A pickle is a small program. The disassembler of the standard library decodes it, and `unpickle`
executes it on a stack of its own. It can make dictionaries, lists, numbers, strings and
descriptions of tensors. Names of functions and classes are looked up in `_ALLOWED` only, nothing is
imported and no attribute is set, so a file cannot reach other code.

`pickle.Unpickler` with a strict `find_class` would be shorter. But with it a file can allocate
memory (memo indices), overflow the C stack (the hash of deeply nested tuples), and set attributes
of the objects in `_ALLOWED`.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glide_jax.errors import GlideError

_MAX_DIMS = 32  # The limit of numpy 1.
_LIMIT = 2**62  # For a count, a size or a stride; safe from overflow in 64 bits.


class DamagedError(ValueError):
    """A contradiction within the file; the text names it and contains nothing from the file."""


def require(condition: bool, what: str) -> None:
    """Raise DamagedError(what) unless the condition holds; -O would remove an `assert`."""
    if not condition:
        raise DamagedError(what)


def printable(text: str) -> str:
    """Return text of a file for a message: one short line without control characters."""
    return ascii(text[:80])[1:-1]


@dataclass(frozen=True)
class Storage:
    """A sequence of numbers that tensors are views of.

    Attributes:
        key: its name in the file.
        dtype: dtype of its elements.
        total: number of elements in the file.
        start, count: the part that is used, in elements. Only legacy files use less than all.
    """

    key: str
    dtype: np.dtype
    total: int
    start: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage. Offset and strides are in elements of `dtype`, and not yet checked."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Opaque:
    """Stands for an object that no weights need; nothing is known of it."""


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Function:
    call: Callable[..., Any]


# ---------------------------------------------------------------- what a pickle may make


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise DamagedError("an impossible size")
    return value


def _size(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMS:
        raise DamagedError("an impossible shape")
    return tuple(map(_count, values))


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    require(isinstance(storage, Storage), "a tensor without storage")
    require(not metadata, "a negated or conjugated tensor")
    shape, strides = _size(size), _size(stride)
    require(len(shape) == len(strides), "a shape that does not fit its strides")
    return Tensor(storage, storage.dtype, _count(offset), shape, strides)


def _typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    """Make a tensor of a newer dtype: its storage holds bytes, and the dtype is an argument."""
    tensor = _tensor(storage, offset, size, stride, requires_grad, hooks, metadata)
    require(isinstance(dtype, np.dtype), "a tensor without dtype")
    return Tensor(storage, dtype, tensor.offset, tensor.shape, tensor.strides)


def _parameter(data, requires_grad, hooks, state=None):
    require(isinstance(data, Tensor), "a parameter without tensor")
    return data


def _dictionary(pairs=()):
    """Make a dictionary, empty or from a list of pairs, as Python 2 wrote it.

    The list is emptied; otherwise a short pickle could make a million copies of it.
    """
    require(isinstance(pairs, list) or pairs == (), "an impossible dictionary")
    result: dict = {}
    for key, value in pairs:
        _set_items(result, [key, value])
    if pairs:
        pairs.clear()
    return result


def _list(items=()):
    """Make a list in place of a set: its elements then need no hash."""
    require(isinstance(items, list), "an impossible set")
    return items


def _opaque(*_):
    return _Opaque()


def _typed(call, kind, arguments, state):
    """Make a tensor that had attributes of its own, without them."""
    require(isinstance(call, _Function) and isinstance(arguments, tuple), "an unexpected call")
    return call.call(*arguments)


def _set_items(target: object, flat: list) -> None:
    """Set items with plain keys; the hash of a deeply nested tuple would overflow the C stack."""
    if isinstance(target, _Opaque):
        return
    if not isinstance(target, dict) or len(flat) % 2:
        raise DamagedError("an impossible dictionary")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        plain = isinstance(key, str | float | None) or (isinstance(key, int) and abs(key) < _LIMIT)
        require(plain, "a dictionary key that is neither text nor number")
        target[key] = value


def _extend(target: object, items: list) -> None:
    if not isinstance(target, _Opaque):
        require(isinstance(target, list), "an impossible list")
        assert isinstance(target, list)
        target.extend(items)


_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "bool": np.bool_,
    **{f"float{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",
}
_ALLOWED: dict[str, np.dtype | _StorageType | _Function] = {
    "collections.OrderedDict": _Function(_dictionary),
    "builtins.set": _Function(_list),
    "__builtin__.set": _Function(_list),
    "torch.Size": _Function(_size),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_typed_tensor),
    "torch._tensor._rebuild_from_type_v2": _Function(_typed),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_parameter),
    **{f"torch.{name}": np.dtype(dtype) for name, dtype in _DTYPES.items()},
    **{
        f"{module}.{name}": _StorageType(np.dtype(_DTYPES[dtype]))
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in STORAGES.items()
    },
}


# Trainers write such objects beside the weights: their settings, scalars and random states. They
# become `_Opaque`; they are not imported either.
_BESIDE = re.compile(
    r"torch\.(device|Tensor|nn\.parameter\.Parameter|random\..*|strided|Generator)"
    r"|(argparse|pathlib|collections|datetime|uuid|decimal|omegaconf|easydict|ml_collections|yacs)\..+"
    r"|typing\.[A-Za-z]+|numpy\..+|_codecs\.encode|copyreg\._reconstructor|builtins\.(object|complex)"
    r"|(lightning|pytorch_lightning|lightning_fabric|lightning_utilities)\..+"
)


def _look_up(path: Path, name: str) -> np.dtype | _StorageType | _Function:
    if name not in _ALLOWED and _BESIDE.fullmatch(name):
        return _Function(_opaque)
    if name not in _ALLOWED:
        raise GlideError(
            f"refusing to load {printable(name)} from {path}: weights need nothing but tensors in "
            "dictionaries; get the file from a source you trust, or save model.state_dict() alone"
        )
    return _ALLOWED[name]


def _find_storage(path: Path, reference: object) -> Storage:
    """Read the description of a storage: ("storage", type, key, device, count[, part])."""
    if not isinstance(reference, tuple) or len(reference) == 0:
        raise DamagedError("a storage without name")
    if reference[0] == "module":
        raise GlideError(f"{path} holds a whole model, code and all: save model.state_dict() alone")
    _, kind, key, _device, total, *part = reference
    require(isinstance(kind, _StorageType) and isinstance(key, str), "a storage without name")
    start, count = 0, _count(total)
    if part and part[0] is not None:
        _key, start, count = part[0]
        require(_count(start) + _count(count) <= total, "a storage outside its own")
    return Storage(key, kind.dtype, total, start, count)


# ---------------------------------------------------------------- execution

_CONSTANTS = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
    | {"BINSTRING", "SHORT_BINSTRING", "STRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)


def unpickle(path: Path, file: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """Execute the pickle at the position of `file`, and leave the position after its end.

    Args:
        path: the name of the file, for messages.
        storages: key -> storage; the storages of the pickle are added to it.

    Returns:
        Dictionaries with plain keys, lists, tuples, numbers, strings, bytes, `Tensor`, `Storage`.

    Raises:
        GlideError: the pickle uses something that is not allowed.
        ValueError, IndexError, KeyError, TypeError: the pickle is damaged or hostile.
    """
    stack: list = []
    outer: list[list] = []  # The stack below each open mark.
    memo: dict[object, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case name if name in _CONSTANTS:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL" | "INST":  # INST also calls it: its name is checked first.
                assert isinstance(argument, str)
                value = _look_up(path, argument.replace(" ", ".", 1))
                require(opcode.name == "GLOBAL", "an unexpected call")
                stack.append(value)
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                named = isinstance(module, str) and isinstance(attribute, str)
                require(named, "a function without name")
                stack.append(_look_up(path, f"{module}.{attribute}"))
            case "BINPERSID":
                storage = _find_storage(path, stack.pop())
                if storages is not None:
                    first = storages.setdefault(storage.key, storage)
                    same = (storage.dtype, storage.total) == (first.dtype, first.total)
                    require(same, "a storage with two descriptions")
                stack.append(storage)
            case "REDUCE":
                arguments = stack.pop()
                valid = isinstance(stack[-1], _Function) and isinstance(arguments, tuple)
                require(valid, "a call of something that is not a function")
                stack[-1] = stack[-1].call(*arguments)
            case "NEWOBJ" if isinstance(stack[-2], _Function) and stack[-2].call is _opaque:
                stack[-2:] = [_Opaque()]
            case "BUILD":  # Attributes: a state dict has the versions of its modules in one.
                stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "FROZENSET":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                require(len(stack) >= size, "a tuple that lacks elements")
                stack[-size:] = [tuple(stack[-size:])]
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, outer.pop()
                _set_items(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, outer.pop()
                _extend(stack[-1], items)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE" as name:
                stack.append(name == "NEWTRUE")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name:
                raise GlideError(f"refusing to load {path}: weights need no pickle opcode {name}")
    return stack.pop()
