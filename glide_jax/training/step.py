"""One step of training, as a pure function; `glide_jax.parallel` maps it over devices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glide_jax.diffusion.losses import Tables, hybrid_loss, q_sample
from glide_jax.models.unet import GLIDE
from glide_jax.training.state import Params, TrainState


class Batch(NamedTuple):
    """Pictures and captions of one step.

    Attributes:
        image: `(B, H, W, 3)` uint8.
        tokens, mask: `(B, L)` int32 and bool.
        position: `(B,)` int32, place in the whole batch of the step. Noise, timestep and caption
            dropout are drawn from it, so that the number of devices changes nothing.
    """

    image: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    position: jax.Array | np.ndarray


def draw(key: jax.Array, batch: Batch, steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is random about each record: `t (B,)`, `eps (B, H, W, 3)`, and `u (B,)` in [0, 1)."""

    def one(position):
        t_key, eps_key, drop_key = jax.random.split(jax.random.fold_in(key, position), 3)
        return (
            jax.random.randint(t_key, (), 0, steps),
            jax.random.normal(eps_key, batch.image.shape[1:]),
            jax.random.uniform(drop_key),
        )

    return jax.vmap(one)(batch.position)


def loss_fn(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: GLIDE,
    tables: Tables,
    caption_dropout: float,
    prediction: str = "eps",
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean hybrid loss of a batch, and its parts  (GLIDE, sec. 2.1 and 4.2).

    An emptied caption is one whose mask is False throughout.
    """
    t, eps, u = draw(key, batch, len(tables.alpha))
    x_0 = batch.image.astype(jnp.float32) / 127.5 - 1
    x_t = q_sample(tables, x_0, t, eps)
    mask = batch.mask & (u >= caption_dropout)[:, None]

    text = model.apply({"params": params}, batch.tokens, mask, method=GLIDE.encode_text)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    train = dropout_key is not None
    output = model.apply({"params": params}, x_t, t, text, train=train, rngs=rngs)
    terms = hybrid_loss(tables, x_0, x_t, t, eps, output, prediction=prediction)
    metrics = {"loss": terms.loss, "mse": terms.mse, "vlb": terms.vlb}
    return terms.loss.mean(), jax.tree.map(jnp.mean, metrics)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: GLIDE,
    optimiser: optax.GradientTransformation,
    tables: Tables,
    caption_dropout: float = 0.0,
    prediction: str = "eps",
    ema: float = 0.9999,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of parameters and of their moving average.

    Args:
        key: of the run; the step and each record's place are folded in here.
        axis: name of the mapped axis over which losses and gradients are averaged, if any.

    Returns:
        The new state, and scalars: loss, mse, vlb, grad_norm.
    """
    key = jax.random.fold_in(key, state.step)
    record_key, dropout_key = jax.random.split(key)
    if axis is not None:
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
    loss = partial(
        loss_fn,
        model=model,
        tables=tables,
        caption_dropout=caption_dropout,
        prediction=prediction,
        dropout_key=dropout_key if model.config.dropout else None,
    )
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, record_key)
    if axis is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)

    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    rate = jnp.minimum(ema, (1 + step) / (10 + step))
    averaged = jax.tree.map(lambda a, p: a + (1 - rate) * (p - a), state.ema, params)
    metrics["grad_norm"] = optax.global_norm(grads)
    return TrainState(step, params, averaged, opt_state), metrics
