"""What a step minimises: `(params, batch, key) -> (loss, metrics)`, for each kind of model.

All that is random about a record is drawn from the key and from its place in the whole batch, so
that the number of devices, of hosts and of accumulated parts changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.losses import Tables, hybrid_loss, make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.models import clip, unet
from glide_jax.models.clip import NoisedCLIP, normalise
from glide_jax.models.unet import GLIDE
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.models.tokenizers import CLIPTokenizer, GPT2Tokenizer
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.masks import random_mask
from glide_jax.training.state import labels

Params = Any
Metrics = dict[str, jax.Array]
QUARTILES = 4


class Batch(NamedTuple):
    """Images and captions of one step.

    Attributes:
        image: `(B, H, W, 3)` uint8.
        tokens, mask: `(B, L)` int32 and bool.
        row: `(B,)` int32, row in the whole batch of the step.
    """

    image: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    row: jax.Array | np.ndarray


def to_batch(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Return what the training step takes of a batch of the data."""
    return Batch(arrays["image"], arrays["tokens"], arrays["mask"], arrays["row"])


class Draw(NamedTuple):
    """What is random about records: `t (B,)`, `eps (B, H, W, 3)`, and keys `(B,)` for the rest."""

    t: jax.Array
    eps: jax.Array
    key: jax.Array


@dataclass(frozen=True)
class Objective:
    """A model and its loss.

    Attributes:
        model: the linen module.
        init: `key -> params`, freshly drawn.
        loss: `(params, batch, key, *, dropout_key, axis) -> (loss, metrics)`, the mean over the
            batch; `axis` names the mapped axis over which a batch is spread, if any.
    """

    model: Any
    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, Metrics]]


def make_objective(config: RunConfig) -> Objective:
    """The objective that a recipe trains."""
    dtype = trunk_dtype(config.dtype)
    tables = make_tables(make_schedule(config.schedule, config.diffusion_steps))
    if isinstance(config, CLIPTrainConfig):
        model = NoisedCLIP(config.model, dtype, config.remat)
        levels = max(round(config.noise * config.diffusion_steps), 1)
        loss = partial(contrastive_loss, model=model, tables=tables, levels=levels)
        init = partial(clip.init_params, model)
    else:
        model = GLIDE(config.model, dtype, config.remat)
        loss = partial(denoising_loss, model=model, tables=tables, config=config)
        init = partial(unet.init_params, model)
    if frozen := config.optimiser.freeze:
        loss = partial(_without_gradient, loss, frozen)
    return Objective(model, init, loss)


def _without_gradient(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    frozen: tuple[str, ...],
    params: Params,
    *batch: Any,
    **options: Any,
) -> tuple[jax.Array, Metrics]:
    """A loss that knows no gradient of what is frozen: it costs nothing and is in no norm."""
    held = {"frozen": jax.lax.stop_gradient, "trained": lambda x: x}
    params = jax.tree.map(lambda x, label: held[label](x), params, labels(params, frozen))
    return loss(params, *batch, **options)


def make_tokenizer(config: RunConfig) -> GPT2Tokenizer | CLIPTokenizer:
    """The tokenizer of a recipe's captions."""
    if isinstance(config, CLIPTrainConfig):
        return CLIPTokenizer(config.model.max_text_len)
    return GPT2Tokenizer(config.model.text_ctx)


def draw(key: jax.Array, batch: Batch, steps: int) -> Draw:
    """The random draws of a step, each record's from its place."""

    def one(row: jax.Array) -> Draw:
        t_key, eps_key, rest = jax.random.split(jax.random.fold_in(key, row), 3)
        eps = jax.random.normal(eps_key, batch.image.shape[1:])
        return Draw(jax.random.randint(t_key, (), 0, steps), eps, rest)

    return jax.vmap(one)(batch.row)


def to_range(image: jax.Array) -> jax.Array:
    """`0..255 -> [-1, 1]` float32."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def shrink(image: jax.Array, factor: int = 4) -> jax.Array:
    """Means of `factor x factor` blocks of a uint8 picture, as whole numbers in float32  (ADM's
    `super_res_train`: area interpolation, nothing else)."""
    batch, height, width, channels = image.shape
    blocks = image.reshape(batch, height // factor, factor, width // factor, factor, channels)
    # Whole numbers, since that is what the upsampler is given when it draws.
    return jnp.round(blocks.astype(jnp.float32).mean(axis=(2, 4)))


def denoising_loss(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: GLIDE,
    tables: Tables,
    config: TrainConfig,
    dropout_key: jax.Array | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Mean hybrid loss of a batch, and its parts  (GLIDE, sec. 2.1 and 4.1 to 4.3).

    An emptied caption is one whose mask is False throughout. Upsamplers are given the picture
    reduced by averaging, inpainting models what a random mask leaves of it.
    """
    drawn = draw(key, batch, len(tables.alpha))
    keys = jax.vmap(partial(jax.random.split, num=3))(drawn.key)
    x_0 = to_range(batch.image)
    x_t = q_sample(tables, x_0, drawn.t, drawn.eps)

    u = jax.vmap(jax.random.uniform)(keys[:, 0])
    mask = batch.mask & (u >= config.caption_dropout)[:, None]
    text = model.apply({"params": params}, batch.tokens, mask, method=GLIDE.encode_text)
    given: dict[str, jax.Array] = {}
    if config.model.upsamples:
        given["low_res"] = to_range(shrink(batch.image))
        if config.model.low_res_level:
            noised = noise_low_res(tables, given["low_res"], keys[:, 1], config.low_res_noise)
            given["low_res"], given["low_res_level"] = noised
    if config.model.inpaints:
        size = batch.image.shape[1]
        known = jax.vmap(partial(random_mask, size=size, share_all=config.mask_all))(keys[:, 2])
        given |= {"inpaint_image": x_0 * known, "inpaint_mask": known}

    train = dropout_key is not None and config.model.dropout > 0
    rngs = {"dropout": dropout_key} if train else None
    output = model.apply({"params": params}, x_t, drawn.t, text, **given, train=train, rngs=rngs)
    terms = hybrid_loss(
        tables,
        x_0,
        x_t,
        drawn.t,
        drawn.eps,
        output,
        prediction=config.prediction,
        weighting=config.weighting,
    )
    metrics = {"loss": terms.loss.mean(), "mse": terms.mse.mean(), "vlb": terms.vlb.mean()}
    return metrics["loss"], metrics | by_quartile(terms.loss, drawn.t, len(tables.alpha))


def noise_low_res(
    tables: Tables, low_res: jax.Array, keys: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """Small pictures with noise of a random level, and that level as a timestep  (CDM, sec. 4.2).

    Levels are even between 0 and `share` of the chain.
    """
    highest = max(round(share * len(tables.alpha)), 1)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        t_key, eps_key = jax.random.split(key)
        t = jax.random.randint(t_key, (), 0, highest)
        return t, jax.random.normal(eps_key, low_res.shape[1:])

    t, eps = jax.vmap(one)(keys)
    return q_sample(tables, low_res, t, eps), t


def by_quartile(loss: jax.Array, t: jax.Array, steps: int) -> Metrics:
    """Sums of a loss `(B,)` over quarters of the chain, and how many records fell into each.

    Shares of the whole batch, so that they add up over devices; `finish` divides them.
    """
    quarter = t * QUARTILES // steps
    there = (quarter[:, None] == jnp.arange(QUARTILES)).astype(jnp.float32)
    return {"quartile_sum": (there * loss[:, None]).mean(0), "quartile_share": there.mean(0)}


def finish(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics averaged over steps and devices, as named numbers; an empty quartile has none."""
    values = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    if "quartile_sum" in metrics:
        for i, (total, share) in enumerate(
            zip(metrics["quartile_sum"], metrics["quartile_share"], strict=True)
        ):
            if share:
                values[f"loss_quartile_{i}"] = float(total / share)
    return values


def contrastive_loss(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: NoisedCLIP,
    tables: Tables,
    levels: int | None = None,
    dropout_key: jax.Array | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Symmetric cross entropy of noised pictures against captions  (CLIP, fig. 3; GLIDE, sec. 4.4).

    Each picture is compared with the captions of the whole batch, over all devices.

    Args:
        batch: `mask` is True where `tokens` are the caption, start and end token included.
        levels: timesteps are drawn below it; None: from the whole chain.
    """
    drawn = draw(key, batch, levels or len(tables.alpha))
    x_t = q_sample(tables, to_range(batch.image), drawn.t, drawn.eps)
    lengths = batch.mask.sum(axis=1)
    variables = {"params": params}
    image = normalise(model.apply(variables, x_t, drawn.t, method=NoisedCLIP.image_features).raw)
    text = normalise(
        model.apply(variables, batch.tokens, lengths, method=NoisedCLIP.text_features).raw
    )
    scale = model.apply(variables, method=NoisedCLIP.scale)
    every_image, every_text, first = image, text, 0
    if axis is not None:
        every_image, every_text = (jax.lax.all_gather(z, axis, tiled=True) for z in (image, text))
        first = jax.lax.axis_index(axis) * len(image)
    own = first + jnp.arange(len(image))
    highest = jax.lax.Precision.HIGHEST
    by_image = scale * jnp.matmul(image, every_text.T, precision=highest)
    by_text = scale * jnp.matmul(text, every_image.T, precision=highest)

    def of_own(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, own[:, None], axis=1)[:, 0]

    loss = -(of_own(jax.nn.log_softmax(by_image)) + of_own(jax.nn.log_softmax(by_text))) / 2
    # Equal captions share the first place: whichever of them is a picture's own is right.
    right = (of_own(by_image) == by_image.max(axis=1)).astype(jnp.float32)
    metrics = {"loss": loss.mean(), "accuracy": right.mean(), "scale": scale}
    return metrics["loss"], metrics | by_quartile(loss, drawn.t, len(tables.alpha))
