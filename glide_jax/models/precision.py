"""Weights in the dtype of the trunk: half the memory of float32, and no cast in each step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The layers that compute in the dtype of the trunk, by name. Any other layer keeps its float32
# weights: norms, heads, embeddings of time, and tables of tokens and positions.
ATTENTION = ("qkv", "text_kv", "query", "key", "value", "proj")
TRUNK = frozenset(("conv_1", "conv_2", "skip", *ATTENTION, "fc_1", "fc_2", "pooled"))


def cast_trunk(params: Any, dtype: Any) -> Any:
    """Return parameters with the weights of the trunk in its dtype.

    A network with this trunk casts them itself whenever it is called, so its outputs are the same.

    Args:
        params: float32 arrays of a `GLIDE` or a `NoisedCLIP`, of numpy or jax.
        dtype: dtype of the trunk; float32 returns `params` itself.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return params

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf.astype(dtype) if _is_trunk([key.key for key in path]) else leaf

    # numpy rounds as XLA does; a weight outside the range of float16 becomes infinite in both.
    with np.errstate(over="ignore"):
        return jax.tree_util.tree_map_with_path(cast, params)


def _is_trunk(path: list[str]) -> bool:
    """Return whether a parameter belongs to a layer of the trunk."""
    if path[-1] not in ("kernel", "bias"):
        return False
    # The stem and the convolutions that resample are named by their place: `down_0`, `up_3_conv`.
    return path[-2] in TRUNK or path[-2].startswith(("down_", "up_"))
