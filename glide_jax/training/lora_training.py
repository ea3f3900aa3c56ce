"""LoRA in training: low-rank pairs beside a frozen network  (2106.09685).

The trained parameters are the pairs alone, with their optimiser state and EMA. The network's own
weights, the base, take no gradient and no moments, and are held in the dtype of the trunk.

The first step. `A (in, r)` begins with orthonormal columns (rows if r > in), `B (r, out)` at zero,
so the network begins as its base. A layer computes `x W + s (x A) B`; let `G = dL/dW`. Then
`dL/dB = s A^T G` and `dL/dA = s G B^T = 0`: whether A is trained or not, a first step of gradient
descent changes the kernel by

    s A dB = -lr s^2 A A^T G.

With s = 1 (alpha = rank) this is fine-tuning's step `-lr G`, projected on the columns of A. At full
rank, r = in, `A A^T = I` and both are equal. (Later steps differ, and so does the first of Adam,
which rescales each entry.)
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.models.layers import LORA_PAIR
from glide_jax.models.precision import cast_trunk
from glide_jax.training.lora_config import LoRAConfig
from glide_jax.weights.lora import KERNEL, adapted_layers
from glide_jax.weights.store import flatten, unflatten


def init_pairs(
    key: jax.Array, *, init_base_params: Callable[[jax.Array], Any], config: LoRAConfig
) -> dict[str, Any]:
    """Return the first pairs: `A` semi-orthogonal, `B` zero, float32.

    Args:
        key: of the run; each layer's is folded in by its path.
        init_base_params: `key -> params` of the network, for its shapes.
        config: rank and layers.

    Raises:
        UsageError: the network has no such layers.
    """
    shapes = jax.eval_shape(init_base_params, key)
    flat, pairs = flatten(shapes), {}
    for layer in adapted_layers(shapes, config.layers):
        inputs, outputs = flat[layer + KERNEL].shape
        layer_key = jax.random.fold_in(key, np.uint32(zlib.crc32(layer.encode())))
        first = nn.initializers.orthogonal()(layer_key, (inputs, config.rank))
        pairs[f"{layer}/{LORA_PAIR[0]}"] = first
        pairs[f"{layer}/{LORA_PAIR[1]}"] = jnp.zeros((config.rank, outputs))
    return unflatten(pairs)


def add_pairs(pairs: Mapping[str, Any], base: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return the parameters of the network with the pairs beside its kernels.

    Args:
        pairs: of `init_pairs`.
        base: parameters of the network.
        scale: `alpha / rank`, which `B` is multiplied by.
    """
    scaled = {
        path: array * scale if path.endswith(LORA_PAIR[1]) else array
        for path, array in flatten(pairs).items()
    }
    return unflatten(flatten(base) | scaled)


def init_base(init: Callable[[jax.Array], Any], dtype: Any, key: jax.Array) -> Any:
    """Return the random base of a network in the dtypes of training."""
    return cast_trunk(init(key), dtype)


def lora_loss(
    loss: Callable[..., Any],
    scale: float,
    params: Any,
    *arguments: Any,
    base: Any = None,
    **options: Any,
) -> Any:
    """Return the loss of a base with pairs; without `base`, `params` are those of the network."""
    return loss(params if base is None else add_pairs(params, base, scale), *arguments, **options)
