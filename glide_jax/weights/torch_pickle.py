"""The pickle inside a PyTorch file, carried out without the power to run anything.

A pickle is a small program. The standard library's disassembler decodes it, and `unpickle` carries
it out on a stack of its own, where it can make dictionaries, lists, numbers, strings and
descriptions of tensors. Names of functions and classes are looked up in `_ALLOWED` and nowhere
else, nothing is imported, no attribute is set, so there is no way from a file to other code.
`pickle.Unpickler` with a strict `find_class` would be shorter, but lets a file claim memory (memo
indices), hash tuples nested until the C stack overflows, and set attributes on what it was given.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glide_jax.errors import GlideError

_MAX_DIMS = 32  # the limit of numpy 1
_LIMIT = 2**62  # for a count, a size or a stride: far from overflow in 64 bits


class DamagedError(ValueError):
    """The file contradicts itself; the text says in what, in a few words of our own."""


def require(condition: bool, what: str) -> None:
    """Raises DamagedError(what) unless the condition holds (`assert` would vanish under -O)."""
    if not condition:
        raise DamagedError(what)


def printable(text: str) -> str:
    """Text from a file for a message: one line, no control characters, not too long."""
    return ascii(text[:80])[1:-1]


@dataclass(frozen=True)
class Storage:
    """A run of numbers that tensors are views of; the counts are elements of `dtype`."""

    key: str
    dtype: np.dtype
    total: int  # in the file
    start: int  # legacy files may use a part of what they hold; else 0 and `total`
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements of `dtype`, and are unchecked."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Function:
    call: Callable[..., Any]


# ---------------------------------------------------------------- what a pickle may make


def _count(value: object) -> int:
    require(type(value) is int and 0 <= value < _LIMIT, "a size that cannot be")
    return value


def _size(values: object) -> tuple[int, ...]:
    require(isinstance(values, tuple | list) and len(values) <= _MAX_DIMS, "a shape that cannot be")
    return tuple(map(_count, values))


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    require(isinstance(storage, Storage), "a tensor without storage")
    require(not metadata, "a negated or conjugated tensor")
    shape, strides = _size(size), _size(stride)
    require(len(shape) == len(strides), "a shape that does not fit its strides")
    return Tensor(storage, storage.dtype, _count(offset), shape, strides)


def _typed_tensor(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    """The newer dtypes have no storage class of their own: bytes, and the dtype beside them."""
    tensor = _tensor(storage, offset, size, stride, requires_grad, hooks, metadata)
    require(isinstance(dtype, np.dtype), "a tensor without dtype")
    return Tensor(storage, dtype, tensor.offset, tensor.shape, tensor.strides)


def _parameter(data, requires_grad, hooks, state=None):
    require(isinstance(data, Tensor), "a parameter without tensor")
    return data


def _dictionary(pairs=()):
    """Python 2 gave a list of pairs. It is used up, so that a million calls stay cheap."""
    require(isinstance(pairs, list) or pairs == (), "a dictionary that cannot be")
    result: dict = {}
    for key, value in pairs:
        _set_items(result, [key, value])
    if pairs:
        pairs.clear()
    return result


def _list(items=()):
    """A set becomes the list it was made from: its elements then need no hash."""
    require(isinstance(items, list), "a set that cannot be")
    return items


def _set_items(target: object, flat: list) -> None:
    """Plain keys only: to hash a tuple nested a million deep overflows the C stack."""
    require(isinstance(target, dict) and len(flat) % 2 == 0, "a dictionary that cannot be")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        plain = isinstance(key, str | float | None) or (isinstance(key, int) and abs(key) < _LIMIT)
        require(plain, "a dictionary key that is neither text nor number")
        target[key] = value


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
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_parameter),
    **{f"torch.{name}": np.dtype(dtype) for name, dtype in _DTYPES.items()},
    **{
        f"{module}.{name}": _StorageType(np.dtype(_DTYPES[dtype]))
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in STORAGES.items()
    },
}


def _look_up(path: Path, name: str) -> np.dtype | _StorageType | _Function:
    if name not in _ALLOWED:
        raise GlideError(
            f"refusing to load {printable(name)} from {path}: weights need nothing but tensors in "
            "dictionaries; get the file from a source you trust, or save model.state_dict() alone"
        )
    return _ALLOWED[name]


def _find_storage(path: Path, reference: object) -> Storage:
    """The pickle names its storages: ("storage", type, key, device, count[, part of another])."""
    require(isinstance(reference, tuple) and len(reference) > 0, "a storage without name")
    if reference[0] == "module":
        raise GlideError(f"{path} holds a whole model, code and all: save model.state_dict() alone")
    _, kind, key, _device, total, *part = reference
    require(isinstance(kind, _StorageType) and isinstance(key, str), "a storage without name")
    start, count = 0, _count(total)
    if part and part[0] is not None:
        _key, start, count = part[0]
        require(_count(start) + _count(count) <= total, "a storage outside its own")
    return Storage(key, kind.dtype, total, start, count)


# ---------------------------------------------------------------- carrying it out

_PUSHED_AS_THEY_ARE = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
    | {"BINSTRING", "SHORT_BINSTRING", "STRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)


def unpickle(path: Path, file: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """Carries out the pickle that begins here in `file`, and leaves `file` behind its end.

    Args:
        path: for messages only.
        storages: key -> storage; filled with those that the pickle names.

    Returns:
        dictionaries with plain keys, lists, tuples, numbers, strings, bytes, `Tensor`, `Storage`.

    Raises:
        GlideError: the pickle asks for something that is not allowed.
        ValueError, IndexError, KeyError, TypeError: it is damaged, or made to break its reader.
    """
    stack: list = []
    outer: list[list] = []  # the stacks below each open mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case name if name in _PUSHED_AS_THEY_ARE:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL" | "INST":  # INST would call it at once: the name decides before that
                value = _look_up(path, argument.replace(" ", ".", 1))
                require(opcode.name == "GLOBAL", "a call where there should be none")
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
                sound = isinstance(stack[-1], _Function) and isinstance(arguments, tuple)
                require(sound, "a call of something that is no function")
                stack[-1] = stack[-1].call(*arguments)
            case "BUILD":  # attributes: state dicts carry the version numbers of modules in one
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
                require(isinstance(stack[-1], list), "a list that cannot be")
                stack[-1].append(item)
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, outer.pop()
                require(isinstance(stack[-1], list), "a list that cannot be")
                stack[-1].extend(items)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE" as name:
                stack.append(name == "NEWTRUE")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name:
                raise GlideError(f"refusing to load {path}: weights need no pickle opcode {name}")
    return stack.pop()
