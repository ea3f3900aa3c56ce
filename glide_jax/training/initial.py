"""The state that a run begins with: drawn, or from other weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import GlideError
from glide_jax.models.presets import VARIANTS, ModelConfig
from glide_jax.devices.parallel import Parallel, quickly
from glide_jax.training.config import CLIPTrainConfig, RunConfig
from glide_jax.training.objectives import Objective
from glide_jax.training.runs import open_clip, open_model
from glide_jax.training.state import TrainState, init_state, make_optimiser
from glide_jax.weights.released import differences
from glide_jax.weights.store import flatten, unflatten

STEM = "unet/down_0/kernel"
# What a network may have more than the weights it begins from; it starts without effect.
ADDED = ("unet/level_1/", "unet/level_2/")


def new_state(config: RunConfig, objective: Objective, params: Any) -> TrainState:
    """The state before the first step of a recipe."""
    optimiser = make_optimiser(config.optimiser, config.steps)
    float16 = objective.model.dtype == jnp.float16
    return init_state(params, optimiser, config.optimiser, float16=float16)


def abstract_state(config: RunConfig, objective: Objective) -> TrainState:
    """The shapes of a recipe's state: no memory is used."""
    return jax.eval_shape(
        lambda key: new_state(config, objective, objective.init(key)), jax.random.key(0)
    )


def begin_state(config: RunConfig, objective: Objective, parallel: Parallel) -> TrainState:
    """The state before the first step, on all devices: drawn, or from `config.init_from`.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    key = jax.random.key(config.seed)
    if not config.init_from:
        return parallel.make(lambda key: new_state(config, objective, objective.init(key)), key)
    params = params_from(config, objective, key)
    return parallel.make(partial(new_state, config, objective), params)


def params_from(config: RunConfig, objective: Objective, key: jax.Array) -> Any:
    """Parameters from the weights `config.init_from`: nested dictionaries of float32 arrays.

    An inpainting model may begin from the weights of a model that was not: its new input
    channels begin at zero (GLIDE, sec. 4.3). The picture size may differ: the network is
    convolutional.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    wanted = flatten(jax.eval_shape(objective.init, key))
    if isinstance(config, CLIPTrainConfig):
        given = flatten(open_clip(config.init_from).params)
    else:
        model = open_model(config.init_from)
        given = flatten(model.params)
        if STEM in given:
            given[STEM] = extend_stem(given[STEM], model.config, config.model)
        if added := [p for p in wanted if p.startswith(ADDED) and p not in given]:
            drawn = flatten(jax.jit(objective.init, compiler_options=quickly())(key))
            given |= {path: drawn[path] for path in added}
    if wrong := differences(given, unflatten(wanted)):
        raise GlideError(
            f"{config.init_from} cannot begin this model: {len(wrong)} parameters are missing, "
            f"unexpected or of another shape ({', '.join(wrong[:3])})"
        )
    return unflatten({path: np.asarray(array, np.float32) for path, array in given.items()})


def extend_stem(kernel: np.ndarray, before: ModelConfig, after: ModelConfig) -> np.ndarray:
    """The first convolution `(3, 3, C_in, C)` of a model that becomes an inpainting one.

    The known picture and its mask, four channels, come after the noised picture, and before
    the small picture of an upsampler.
    """
    grows = after.inpaints and not before.inpaints and before.upsamples == after.upsamples
    if not grows or kernel.shape[2] != VARIANTS[before.variant]:
        return kernel
    zeros = np.zeros((*kernel.shape[:2], 4, kernel.shape[3]), np.float32)
    return np.concatenate([kernel[:, :, :3], zeros, kernel[:, :, 3:]], axis=2)
