"""Floating-point operations of a training step, as XLA counts them."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from glide_jax.models.platform import compile_for
from glide_jax.training.config import RunConfig
from glide_jax.training.freezing import drop_frozen
from glide_jax.training.objectives import abstract_batch, make_objective
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.state import TrainState
from glide_jax.training.step import apply_gradient

# Images in the counted batch: enough for a good mean per image, few enough to trace quickly.
IMAGES = 2


def flops_per_image(config: RunConfig) -> float:
    """Return the model FLOPs of loss and gradient per image.

    Recomputed activations do not count (model FLOP utilisation: PaLM, 2204.02311, app. B).
    """
    config = replace(config, remat=False, accumulate=1)
    objective = make_objective(config)
    key = jax.random.key(0)
    params, batch = jax.eval_shape(objective.init, key), abstract_batch(config, IMAGES)
    reference_params = jax.eval_shape(objective.init_reference_params, key)

    def loss(params: Any, batch: Any, key: jax.Array, reference_params: Any) -> Any:
        return objective.loss(params, batch, key, **objective.loss_inputs(reference_params, 0))

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return count_flops(gradient, params, batch, key, reference_params) / IMAGES


def count_flops(function: Any, *arguments: Any) -> float:
    """Return the multiplications and additions of a jitted function, before XLA optimises it.

    They are counted for a CPU on any device, since GPU compilers do not report them, but in the
    form that is the same on all devices: of a loop over blocks, XLA would count one iteration.

    Returns:
        The count; nan if jax has no CPU backend (`JAX_PLATFORMS=cuda`).
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return math.nan
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(host), compile_for("any"):
        return function.lower(*shapes).cost_analysis()["flops"]


def cost_of_update(
    config: RunConfig, state: TrainState, options: dict[str, Any] | None
) -> dict[str, float]:
    """Return the compiler's costs of what a step does once: the update of the state.

    Args:
        config: the recipe.
        state: abstract, on the devices compiled for.
        options: of the compiler.
    """
    update = partial(
        apply_gradient,
        optimiser=make_optimiser(config.optimiser, config.steps, bool(config.minutes)),
        config=config.optimiser,
    )
    grads = drop_frozen(state.params, config.optimiser.freeze)
    program = jax.jit(update, donate_argnums=0)
    compiled = program.lower(state, grads, {"loss": state.loss_mean}).compile(
        compiler_options=options
    )
    cost = compiled.cost_analysis()
    assert cost is not None
    return cost
