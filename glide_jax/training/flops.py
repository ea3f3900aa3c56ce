"""What a step costs: floating-point operations, as XLA counts them."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from glide_jax.training.config import RunConfig
from glide_jax.training.objectives import Batch, make_objective, make_tokenizer

# Enough for a batch's share of the text side and of the update to be right, few enough to be quick.
IMAGES = 2


def flops_per_image(config: RunConfig) -> float:
    """Model FLOPs of loss and gradient, a picture: what the mathematics needs.

    Recomputed activations do not count (model FLOP utilisation, PaLM, 2204.02311, app. B).
    """
    config = replace(config, remat=False, accumulate=1)
    objective = make_objective(config)
    key = jax.random.key(0)
    size, context = config.side, make_tokenizer(config).context
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        image=shape((IMAGES, size, size, 3), jnp.uint8),
        tokens=shape((IMAGES, context), jnp.int32),
        mask=shape((IMAGES, context), jnp.bool_),
        row=shape((IMAGES,), jnp.int32),
    )
    gradient = jax.jit(jax.grad(objective.loss, has_aux=True))
    return count_flops(gradient, jax.eval_shape(objective.init, key), batch, key) / IMAGES


def count_flops(function: Any, *arguments: Any) -> float:
    """Multiplications and additions of a jitted function, before anything is optimised.

    Counted as for a CPU, whatever the device: the compilers of GPUs do not say.

    Returns:
        nan where jax was told to know no CPU (`JAX_PLATFORMS=cuda`).
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return math.nan
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(host):
        return function.lower(*shapes).cost_analysis()["flops"]
