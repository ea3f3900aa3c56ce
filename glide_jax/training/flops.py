"""What a step costs: floating-point operations, as XLA counts them."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from glide_jax.training.config import RunConfig
from glide_jax.training.objectives import Batch, make_objective, make_tokenizer

# Enough for a batch's share of the text side and of the update to be right, few enough to be quick.
PICTURES = 2


def flops_per_picture(config: RunConfig) -> float:
    """Model FLOPs of loss and gradient, a picture: what the mathematics needs.

    Recomputed activations do not count (model FLOP utilisation, PaLM, 2204.02311, app. B).
    """
    config = replace(config, remat=False, accumulate=1)
    objective = make_objective(config)
    key = jax.random.key(0)
    size, context = config.side, make_tokenizer(config).context
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        image=shape((PICTURES, size, size, 3), jnp.uint8),
        tokens=shape((PICTURES, context), jnp.int32),
        mask=shape((PICTURES, context), jnp.bool_),
        position=shape((PICTURES,), jnp.int32),
    )
    gradient = jax.jit(jax.grad(objective.loss, has_aux=True))
    lowered = gradient.lower(jax.eval_shape(objective.init, key), batch, key)
    return lowered.cost_analysis()["flops"] / PICTURES
