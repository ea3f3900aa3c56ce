"""Parameters that training leaves as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from glide_jax.errors import UsageError
from glide_jax.weights.store import flatten, unflatten


def frozen_labels(params: Any, frozen: Sequence[str]) -> Any:
    """Return "frozen" or "trained" for each parameter, by the start of its path.

    Raises:
        UsageError: no path begins with one of `frozen`.
    """
    flat = flatten(params)
    for start in frozen:
        if not any(path.startswith(start) for path in flat):
            parts = sorted({path.split("/")[0] for path in flat})
            raise UsageError(
                f"nothing to freeze begins with {start!r}: parts are {', '.join(parts)}"
            )
    return unflatten({k: "frozen" if k.startswith(tuple(frozen)) else "trained" for k in flat})


def drop_frozen(params: Any, frozen: Sequence[str]) -> Any:
    """Return the same tree with None in place of frozen parameters, so that they are no leaves."""
    if not frozen:
        return params
    labels = frozen_labels(params, frozen)
    return jax.tree.map(lambda x, label: x if label == "trained" else None, params, labels)


def merge_frozen(trained: Any, params: Any, fill: Callable[[Any], Any] = lambda x: x) -> Any:
    """Return the tree of `drop_frozen` filled up: frozen parameters become `fill(parameter)`."""
    return jax.tree.map(
        lambda x, p: fill(p) if x is None else x, trained, params, is_leaf=lambda x: x is None
    )
