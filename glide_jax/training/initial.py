"""The first state of a run: random weights, or the weights of `init_from`."""

from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.devices.parallel import Parallel, fast_compile_options
from glide_jax.errors import GlideError
from glide_jax.models.presets import VARIANTS, ModelConfig
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.objectives import Objective
from glide_jax.training.runs import open_clip, open_model
from glide_jax.training.state import TrainState, new_state
from glide_jax.weights.released import differences
from glide_jax.weights.store import flatten, unflatten

STEM = "unet/down_0/kernel"
# Layers that a network may have in addition to the weights it starts from; they start without
# effect.
ADDED = ("unet/level_1/", "unet/level_2/")


def begin_state(config: RunConfig, objective: Objective, parallel: Parallel) -> TrainState:
    """Return the state before the first step, on all devices: random, or from `init_from`.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    key = jax.random.key(config.seed)
    if not config.init_from:
        return parallel.initialise(
            lambda key: new_state(config, objective, objective.init(key)), key
        )
    params = params_from(config, objective, key)
    return parallel.initialise(partial(new_state, config, objective), params)


def params_from(config: RunConfig, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Return the parameters of `config.init_from`: nested dictionaries of float32 arrays.

    An inpainting model may start from a model without mask: its new input channels start at zero
    (GLIDE, sec. 4.3). The image size may differ: the network is convolutional.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    wanted = flatten(jax.eval_shape(objective.init, key))
    if isinstance(config, CLIPTrainConfig):
        found = flatten(open_clip(config.init_from).params)
    else:
        assert isinstance(config, TrainConfig)
        model = open_model(config.init_from)
        found = flatten(model.params)
        if STEM in found:
            found[STEM] = extend_stem(found[STEM], model.config, config.model)
        if added := [p for p in wanted if p.startswith(ADDED) and p not in found]:
            random = flatten(jax.jit(objective.init, compiler_options=fast_compile_options())(key))
            found |= {path: random[path] for path in added}
    if wrong := differences(found, unflatten(wanted)):
        raise GlideError(
            f"{config.init_from} cannot start this model: {len(wrong)} parameters are missing, "
            f"unexpected or of another shape ({', '.join(wrong[:3])})"
        )
    return unflatten({path: np.asarray(array, np.float32) for path, array in found.items()})


def extend_stem(kernel: np.ndarray, before: ModelConfig, after: ModelConfig) -> np.ndarray:
    """Return the first convolution `(3, 3, C_in, C)` with the input channels of inpainting, zero.

    The four channels, known pixels and mask, come after the noised image and before the small image
    of an upsampler. The kernel of any other change of model is returned as it is.
    """
    grows = after.inpaints and not before.inpaints and before.upsamples == after.upsamples
    if not grows or kernel.shape[2] != VARIANTS[before.variant]:
        return kernel
    zeros = np.zeros((*kernel.shape[:2], 4, kernel.shape[3]), np.float32)
    return np.concatenate([kernel[:, :, :3], zeros, kernel[:, :, 3:]], axis=2)
