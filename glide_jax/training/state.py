"""What a training run carries from step to step."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glide_jax.errors import GlideError
from glide_jax.models.presets import ModelConfig
from glide_jax.training.config import OptimiserConfig
from glide_jax.weights.registry import load_model
from glide_jax.weights.released import misfits
from glide_jax.weights.store import flatten

Params = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "opt_state"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All float32 but `step`, an int32 scalar: the number of updates made."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine to zero at `steps`."""
    peak = config.learning_rate
    if config.decay == "cosine":
        # optax wants the warm-up to end before the run does.
        warmup = min(config.warmup, max(steps - 1, 0))
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    if config.decay == "constant":
        return optax.linear_schedule(0.0 if config.warmup else peak, peak, max(config.warmup, 1))
    raise ValueError(f"decay must be constant or cosine, not {config.decay!r}")


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping and AdamW."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta_1,
        b2=config.beta_2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    return optax.chain(clip, adamw)


def init_state(params: Params, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step; `ema` begins as a copy of `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimiser.init(params),
    )


def params_from(weights: str, config: ModelConfig) -> Params:
    """The parameters of other weights, to begin with: a name, a folder, a `.pt` file, or a run.

    The picture size may differ: the network is convolutional.

    Raises:
        GlideError: the weights cannot be read, or are of another model.
    """
    model = load_model(weights)
    if wrong := misfits(flatten(model.params), config):
        raise GlideError(
            f"{weights} cannot begin this model: {len(wrong)} parameters are missing, unexpected "
            f"or of another shape ({', '.join(wrong[:3])})"
        )
    return model.params
