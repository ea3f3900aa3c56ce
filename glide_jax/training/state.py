"""What a training run carries from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glide_jax.errors import UsageError
from glide_jax.training.config import OptimiserConfig
from glide_jax.weights.store import flatten, unflatten

Params = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "powers", "opt_state", "loss_mean", "loss_scale"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All float32 but `step`, and what the optimiser keeps in bfloat16.

    Attributes:
        step: int32 scalar, the number of steps done.
        ema: moving average of the parameters, which is sampled from.
        powers: power-function averages, one for each of `OptimiserConfig.ema_power`.
        loss_mean: running mean of the loss.
        loss_scale: power of two by which a float16 loss is multiplied; 0 for other dtypes.
    """

    step: jax.Array
    params: Params
    ema: Params
    powers: tuple[Params, ...]
    opt_state: optax.OptState
    loss_mean: jax.Array
    loss_scale: jax.Array


# ADM's code begins there: the gradients of float16 activations would vanish without.
FIRST_LOSS_SCALE = 20.0


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine to zero at `steps`."""
    peak = config.learning_rate
    if config.decay == "cosine":
        # optax wants the warm-up to end before the run does.
        warmup = min(config.warmup, max(steps - 1, 0))
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    return optax.linear_schedule(0.0 if config.warmup else peak, peak, max(config.warmup, 1))


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping and AdamW; nothing for what is frozen."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta_1,
        b2=config.beta_2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moments),
    )
    trained = optax.chain(clip, adamw)
    if not config.freeze:
        return trained
    return optax.partition(
        {"trained": trained, "frozen": optax.set_to_zero()}, partial(labels, frozen=config.freeze)
    )


def labels(params: Params, frozen: Sequence[str]) -> Params:
    """ "frozen" or "trained" for each parameter, by the start of its path.

    Raises:
        UsageError: a start that no path has.
    """
    flat = flatten(params)
    for start in frozen:
        if not any(path.startswith(start) for path in flat):
            parts = sorted({path.split("/")[0] for path in flat})
            raise UsageError(
                f"nothing to freeze begins with {start!r}: parts are {', '.join(parts)}"
            )
    return unflatten({k: "frozen" if k.startswith(tuple(frozen)) else "trained" for k in flat})


def init_state(
    params: Params,
    optimiser: optax.GradientTransformation,
    averages: OptimiserConfig,
    *,
    float16: bool = False,
) -> TrainState:
    """The state before the first step; the averages begin as copies of `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        powers=tuple(jax.tree.map(jnp.copy, params) for _ in averages.ema_power),
        opt_state=optimiser.init(params),
        loss_mean=jnp.zeros(()),
        loss_scale=jnp.float32(FIRST_LOSS_SCALE if float16 else 0.0),
    )
