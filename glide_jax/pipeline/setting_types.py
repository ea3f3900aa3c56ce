"""The types of settings: another type is refused by the setting's name; values as JSON."""

from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np

from glide_jax.diffusion.guidance import is_network
from glide_jax.errors import UsageError, one_line

TYPE_NAMES = {int: "whole number", float: "number", str: "text"}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def checked_values(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of a class's fields against its type hints, and return them.

    A number may also be an array of numpy or jax without axes, a tuple also a list or an array:
    these become plain numbers and lists, for JSON. A whole number may be a float such as 3.0.

    Raises:
        UsageError: a value has another type or length.
    """
    for name, hint in _hints(kind).items():
        if not _suits(values[name], hint):
            shown = one_line(repr(values[name]))
            raise UsageError(f"{name} takes {_in_words(hint)}, not {shown:.60}")
    return {name: _plain(values[name], hint) for name, hint in _hints(kind).items()}


def _plain(value: Any, hint: Any) -> Any:
    """Turn an array without axes into a number; for a tuple setting, do so for each item.

    A tuple may also be given as an array. Sequences of any length stay as they are.
    """
    if isinstance(value, (list, tuple)) and tuple in _origins(hint):
        return type(value)(_plain(item, float) for item in value)
    if hasattr(value, "dtype") and (np.ndim(value) == 0 or Sequence not in _origins(hint)):
        return np.asarray(value).tolist()
    return value


def _origins(hint: Any) -> set[Any]:
    return {get_origin(option) for option in get_args(hint)}


def _suits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_suits(value, option) for option in arguments)
    if origin is tuple:
        return (
            _is_list(value) and len(value) == len(arguments) and all(map(_suits, value, arguments))
        )
    if origin is Sequence:
        return _is_list(value) and all(_suits(item, arguments[0]) for item in value)
    if hint is float:
        return _is_number(value)
    if hint is int:
        return _is_number(value) and float(value).is_integer()
    return isinstance(value, hint)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, Real) or (
        hasattr(value, "dtype") and np.ndim(value) == 0 and np.issubdtype(value.dtype, np.number)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (hasattr(value, "dtype") and np.ndim(value) == 1)


def _in_words(hint: Any) -> str:
    """Return what a hint allows, as messages say it; None is left out."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(option) for option in arguments if option is not NoneType)
    if origin is tuple:
        return f"{len(arguments)} values ({', '.join(TYPE_NAMES[part] for part in arguments)})"
    if origin is Sequence:
        (part,) = arguments
        return f"a list of {TYPE_NAMES[part] if part in TYPE_NAMES else part.__name__.lower()}s"
    return "text" if hint is str else f"a {TYPE_NAMES[hint]}"


def json_value(value: Any) -> Any:
    """Return numbers as JSON writes them, and of anything larger the type and shape."""

    def json_leaf(leaf: Any) -> Any:
        if is_network(leaf):
            return str(leaf.fn)
        if not np.issubdtype(np.result_type(leaf), np.number) or np.ndim(leaf) > 1:
            return f"{type(leaf).__name__} {np.shape(leaf)}"
        # JSON has no infinity.
        return np.asarray(leaf, float).tolist() if np.isfinite(leaf).all() else str(leaf)

    return jax.tree.map(json_leaf, value, is_leaf=is_network)
