"""Linear layers of many blocks with the same input, joined into one layer for sampling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.models.layers import LORA_PAIR

# The layer in each block, and the name of the joined one: from the embedding of time to all
# residual blocks, and from the text to the keys and values of all attention blocks.
JOINED = {"emb": "time_projections", "text_kv": "text_projections"}


def join_projections(params: dict[str, Any], layers: tuple[str, ...]) -> dict[str, Any]:
    """Return parameters of a network in which these layers of all blocks are one layer each.

    XLA on a GPU joins them too, but copies all their kernels in each network evaluation. Layers
    with a stored low-rank pair (LoRA) stay as they are.

    Args:
        params: of `GLIDE`.
        layers: names in `JOINED`.
    """
    unet = dict(params["unet"])
    for layer in layers:
        block_names = sorted((name for name in unet if layer in unet[name]), key=_evaluation_order)
        stored = [unet[name][layer] for name in block_names]
        if not stored or any(LORA_PAIR[0] in entry for entry in stored):
            continue
        unet |= {name: {k: v for k, v in unet[name].items() if k != layer} for name in block_names}
        leaves = {name: [entry[name] for entry in stored] for name in ("kernel", "bias")}
        unet[JOINED[layer]] = {name: _concatenate(arrays) for name, arrays in leaves.items()}
    return params | {"unet": unet}


def _evaluation_order(block: str) -> tuple[int, list[int], str]:
    """Where a block stands in the order of evaluation: encoder, middle, decoder."""
    kind, *words = block.split("_")
    return ("down", "mid", "up").index(kind), [int(n) for n in words if n.isdigit()], block


def _concatenate(arrays: list[Any]) -> Any:
    on_host = all(isinstance(array, np.ndarray) for array in arrays)
    return (np if on_host else jnp).concatenate(arrays, axis=-1)


class JoinedOutputs:
    """The result of a joined layer: on its last axis, the outputs of the blocks in their order."""

    def __init__(self, array: jax.Array):
        self.array, self.start = array, 0

    def take(self, width: int) -> jax.Array:
        """Return the output of the next block, `(..., width)`."""
        self.start += width
        return self.array[..., self.start - width : self.start]
