"""The first state of a run: random weights or given ones, and its frozen parameters."""

from functools import partial
from typing import Any

import jax
import numpy as np

from glide_jax.devices.parallel import Parallel
from glide_jax.devices.processes import on_first_process
from glide_jax.devices.runtime import fast_compile_options
from glide_jax.errors import GlideError, UsageError
from glide_jax.models.precision import cast_trunk
from glide_jax.models.presets import VARIANTS, ModelConfig
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.objectives import Objective
from glide_jax.training.runs import base_of, check_base, open_clip, open_model, write_base
from glide_jax.training.state import TrainState, recipe_state
from glide_jax.weights.released import differences
from glide_jax.weights.store import flatten, unflatten

STEM = "unet/down_0/kernel"
# Layers that a network may have in addition to the weights it starts from; they start without
# effect.
ADDED = tuple(f"unet/{name}_{i}/" for name in ("level", "guidance") for i in (1, 2))


def initial_state(config: RunConfig, objective: Objective, parallel: Parallel) -> TrainState:
    """Return the state before the first step, on all devices: random, or from given weights.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    key = jax.random.key(config.seed)
    if objective.lora_scale:
        base = frozen_base(config, objective, begins=True)
        return parallel.initialise(
            lambda key, base: recipe_state(config, objective, objective.init(key), base),
            key,
            base,
        )
    teacher = teacher_params(config, objective)
    if not config.starts_from:
        return parallel.initialise(
            lambda key: recipe_state(config, objective, objective.init(key)), key
        )
    params = params_from(config, objective, key)
    return parallel.initialise(partial(recipe_state, config, objective), params, teacher)


def frozen_base(config: RunConfig, objective: Objective, begins: bool = False) -> dict[str, Any]:
    """Return the base of LoRA in the dtypes of training; {} for a run without.

    Args:
        config: the recipe.
        objective: its loss.
        begins: whether the run has no checkpoint yet. If so, the checksum of the base is written;
            otherwise it is compared with the written one.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, are of another model, or have changed.
    """
    if not objective.lora_scale:
        return {}
    assert isinstance(config, TrainConfig)
    params = base_of(config)
    if begins:
        on_first_process(partial(write_base, config, params))
    else:
        check_base(config, config.folder, params)
    return cast_trunk(params, objective.model.dtype)


def teacher_params(config: RunConfig, objective: Objective) -> dict[str, Any]:
    """Return the parameters of the teacher, float32; {} for a run that has none.

    Raises:
        UsageError: there are no such weights, or none were named where guidance is distilled.
        GlideError: the weights cannot be read, or are not those of a teacher of this student.
    """
    if not isinstance(config, TrainConfig) or not objective.distils:
        return {}
    name = config.distillation.teacher
    if not name:
        if config.model.guidance_scale_input or config.distillation.guidance_scales != (1, 1):
            raise UsageError("guidance is distilled from a teacher: set distillation.teacher")
        return {}
    model = open_model(name)
    for what in ("noise_schedule", "diffusion_steps", "prediction_type"):
        if (own := getattr(model, what)) != (wanted := getattr(config, what)):
            raise GlideError(f"{name} cannot be the teacher: its {what} is {own}, not {wanted}")
    flat = flatten(model.params)
    wanted = jax.eval_shape(objective.init_reference_params, jax.random.key(0))
    if wrong := differences(flat, wanted):
        raise GlideError(f"{name} cannot be the teacher: {_mismatch(wrong)}")
    return unflatten({path: np.asarray(array, np.float32) for path, array in flat.items()})


def _mismatch(wrong: list[str]) -> str:
    return (
        f"{len(wrong)} parameters are missing, unexpected or of another shape "
        f"({', '.join(wrong[:3])})"
    )


def params_from(config: RunConfig, objective: Objective, key: jax.Array) -> dict[str, Any]:
    """Return the parameters of `config.starts_from`: nested dictionaries of float32 arrays.

    An inpainting model may start from a model without mask: its new input channels start at zero
    (GLIDE, sec. 4.3). The image size may differ: the network is convolutional.

    Raises:
        UsageError: there are no such weights.
        GlideError: the weights cannot be read, or are of another model.
    """
    wanted = flatten(jax.eval_shape(objective.init, key))
    if isinstance(config, CLIPTrainConfig):
        flat = flatten(open_clip(config.starts_from).params)
    else:
        assert isinstance(config, TrainConfig)
        model = open_model(config.starts_from)
        flat = flatten(model.params)
        if STEM in flat:
            flat[STEM] = extend_stem(flat[STEM], model.config, config.model)
        if added := [p for p in wanted if p.startswith(ADDED) and p not in flat]:
            random = flatten(jax.jit(objective.init, compiler_options=fast_compile_options())(key))
            flat |= {path: random[path] for path in added}
    if wrong := differences(flat, unflatten(wanted)):
        raise GlideError(f"{config.starts_from} cannot start this model: {_mismatch(wrong)}")
    return unflatten({path: np.asarray(array, np.float32) for path, array in flat.items()})


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
