"""The state that a training run carries from step to step."""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glide_jax.training.config import RunConfig, TrainConfig
from glide_jax.training.loss_aware import LossHistory, empty_history
from glide_jax.training.objectives import Objective, Params
from glide_jax.training.optimiser import make_optimiser
from glide_jax.training.optimiser_config import OptimiserConfig


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "step",
        "params",
        "ema",
        "power_emas",
        "opt_state",
        "loss_mean",
        "log2_loss_scale",
        "reference_params",
        "loss_history",
    ],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class TrainState:
    """Parameters, EMAs and optimiser state.

    All is float32, except counters, bfloat16 moments, and a base of LoRA in `reference_params`.

    Attributes:
        step: int32 scalar, the number of steps done.
        params: the parameters.
        ema: EMA of the parameters; samples are made with it.
        power_emas: power-function EMAs, one for each of `OptimiserConfig.ema_widths`.
        opt_state: state of the optimiser.
        loss_mean: running mean of the loss.
        log2_loss_scale: log2 of the factor of a float16 loss; 0 for other dtypes.
        reference_params: parameters that the loss takes too: of the teacher that is distilled, or
            of the base of LoRA, in the dtype of the trunk; {} for other objectives.
        loss_history: the last losses at each timestep, for loss-aware timesteps; None for others.
    """

    step: jax.Array
    params: Params
    ema: Params
    power_emas: tuple[Params, ...]
    opt_state: optax.OptState
    loss_mean: jax.Array
    log2_loss_scale: jax.Array
    reference_params: Params = field(default_factory=dict)
    loss_history: LossHistory | None = None


# The first scale of ADM's code: without one, gradients of float16 activations would underflow.
INITIAL_LOG2_LOSS_SCALE = 20.0


def new_state(
    params: Params,
    optimiser: optax.GradientTransformation,
    config: OptimiserConfig,
    *,
    float16: bool = False,
    reference_params: Params | None = None,
    loss_history: LossHistory | None = None,
) -> TrainState:
    """Return the state before the first step; every EMA starts as a copy of `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        power_emas=tuple(jax.tree.map(jnp.copy, params) for _ in config.ema_widths),
        opt_state=optimiser.init(params),
        loss_mean=jnp.zeros(()),
        log2_loss_scale=jnp.float32(INITIAL_LOG2_LOSS_SCALE if float16 else 0.0),
        reference_params=reference_params or {},
        loss_history=loss_history,
    )


def recipe_state(
    config: RunConfig, objective: Objective, params: Params, reference_params: Params | None = None
) -> TrainState:
    """Return the state of a recipe before the first step."""
    optimiser = make_optimiser(config.optimiser, config.steps, bool(config.minutes))
    aware = isinstance(config, TrainConfig) and config.timestep_distribution == "loss-aware"
    return new_state(
        params,
        optimiser,
        config.optimiser,
        float16=_uses_float16(objective),
        reference_params=reference_params,
        loss_history=empty_history(config.diffusion_steps) if aware else None,
    )


def _uses_float16(objective: Objective) -> bool:
    return objective.model.dtype == jnp.float16


def fit_loss_scale(state: TrainState, objective: Objective) -> TrainState:
    """Return a restored state with the loss scale of an objective's dtype.

    "auto" is another dtype on another device: float16 needs a scale, which a run that began in
    bfloat16 or float32 does not have; the others need none.
    """
    scaled = float(state.log2_loss_scale) > 0
    if scaled == _uses_float16(objective):
        return state
    return replace(state, log2_loss_scale=np.float32(0.0 if scaled else INITIAL_LOG2_LOSS_SCALE))


def saved_part(state: TrainState, objective: Objective) -> TrainState:
    """Return what a checkpoint holds of a state: all but the base of LoRA, which never changes."""
    return replace(state, reference_params={}) if objective.lora_scale else state


def abstract_state(config: RunConfig, objective: Objective) -> TrainState:
    """Return the shapes and dtypes of a recipe's state, without memory."""
    return jax.eval_shape(
        lambda key: recipe_state(
            config, objective, objective.init(key), objective.init_reference_params(key)
        ),
        jax.random.key(0),
    )
