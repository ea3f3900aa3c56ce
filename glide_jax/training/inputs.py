"""What the loss of a diffusion model is computed from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

# Folded into a record's key to derive its dropout key.
DROPOUT = 1


class Inputs(NamedTuple):
    """Noised images of a batch and their conditioning.

    Attributes:
        x_0, x_t, eps: `(B, H, W, 3)`: clean images, noised images, noise.
        t: `(B,)` int32 timesteps.
        tokens: `(B, L)` int32 captions.
        caption_mask: `(B, L)` bool, True where a token belongs to the caption; some captions are
            emptied.
        conditioning: the other inputs of the network, by name.
        key: `(B,)` keys of the guidance scale and of dropout.
    """

    x_0: jax.Array
    x_t: jax.Array
    eps: jax.Array
    t: jax.Array
    tokens: jax.Array | np.ndarray
    caption_mask: jax.Array | np.ndarray
    conditioning: dict[str, jax.Array]
    key: jax.Array


def bind_network(model: nn.Module, params: Any) -> Callable[..., Any]:
    """Return the network as a function of its inputs."""
    return partial(model.apply, {"params": params})


def dropout_keys(inputs: Inputs) -> jax.Array:
    """Return `(B,)` keys for dropout, one for each record."""
    return jax.vmap(lambda key: jax.random.fold_in(key, DROPOUT))(inputs.key)
