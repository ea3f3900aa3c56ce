"""The optimiser of a recipe, and its learning rate over time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from glide_jax.models.layers import LORA_PAIR
from glide_jax.training.checksums import name_of
from glide_jax.training.freezing import frozen_labels
from glide_jax.training.optimiser_config import OptimiserConfig

# Kernels outside of Muon: the first and the last layer of a network, as its authors advise.
_ENDS = ("unet/down_0", "unet/head")


def learning_rate(
    config: OptimiserConfig, steps: int, follows_clock: bool = False
) -> optax.Schedule:
    """Return the learning rate as a function of the updates made.

    It warms up, and is then constant or falls to 0. In a warm-up of W updates,
    update i (from 1) has the rate i / W times the peak.

    Args:
        config: the settings.
        steps: number of steps of the whole run.
        follows_clock: whether the decay follows the clock: the schedule here is then constant after
            the warm-up, and `Clock.lr_factor` multiplies the updates.
    """
    # A cosine's warm-up ends before the run does.
    warmup = config.warmup if config.lr_decay != "cosine" else min(config.warmup, steps - 1)

    def rise(step: Any) -> Any:
        return config.learning_rate * jnp.clip((step + 1) / max(warmup, 1), 0, 1)

    if config.lr_decay == "cosine":
        fall = optax.cosine_decay_schedule(1.0, steps - warmup)
        return lambda step: rise(step) * fall(jnp.maximum(step - warmup, 0))
    if config.lr_decay == "constant" or follows_clock:
        return rise
    return lambda step: rise(step) * decay_factor(step / steps, config.lr_decay_share)


def updates_made(opt_state: optax.OptState) -> Any:
    """Return the number of updates that an optimiser of `make_optimiser` has made, int32."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return next(leaf for path, leaf in leaves if name_of(path).endswith("count"))


def decay_factor(done: Any, share: float) -> Any:
    """Return 1, falling linearly to 0 over the last `share` of a run of which `done` is done."""
    return jnp.clip((1 - done) / share, 0, 1)


def make_optimiser(
    config: OptimiserConfig, steps: int, follows_clock: bool = False
) -> optax.GradientTransformation:
    """Return gradient clipping and the optimiser; frozen parameters get no update."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    rate = learning_rate(config, steps, follows_clock)
    trained = optax.chain(clip, {"adamw": _adamw, "muon": _muon}[config.kind](config, rate))
    if not config.freeze:
        return trained
    return optax.partition(
        {"trained": trained, "frozen": optax.set_to_zero()},
        partial(frozen_labels, frozen=config.freeze),
    )


def _adamw(config: OptimiserConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=config.beta_1,
        b2=config.beta_2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=kernels,
        mu_dtype=jnp.dtype(config.first_moment_dtype),
    )


def _muon(config: OptimiserConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon for kernels as matrices, AdamW for the rest  (2502.16982).

    Its updates have the root mean square 0.2, as those of AdamW, so one learning rate serves both.
    """
    return muon(
        lambda step: rate(step) * config.muon_lr_ratio,
        weight_decay=config.weight_decay,
        weight_decay_mask=kernels,
        mu_dtype=jnp.dtype(config.first_moment_dtype),
        adam_b1=config.beta_1,
        adam_b2=config.beta_2,
        adam_learning_rate=rate,
        eps=config.epsilon,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def kernels(params: Any) -> Any:
    """Return whether each parameter is the kernel of a layer, or of its low-rank pair.

    Weight decay acts on these; that of a pair pulls the kernel towards its base.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: name_of(path).endswith(("kernel", *LORA_PAIR)), params
    )


def matrices(params: Any) -> Any:
    """Return the axes of each kernel as a matrix for Muon, or None for AdamW.

    A convolution `(height, width, in, out)` is a matrix from the first three to the last.
    """

    def axes(path: tuple[Any, ...], x: Any) -> MuonDimensionNumbers | None:
        name = name_of(path)
        if not name.endswith("kernel") or name.startswith(_ENDS) or x.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
