"""Parameters that training leaves as they are."""

from collections.abc import Sequence
from typing import Any

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
