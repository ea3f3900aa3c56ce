"""The losses that training minimises: `(params, batch, key) -> (loss, metrics)`.

The random numbers of a record, dropout included, come from the key and from its row in the whole
batch. So the number of devices, processes and microbatches changes the loss by at most rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.data.decoding import from_uint8
from glide_jax.devices.runtime import trunk_dtype
from glide_jax.diffusion.losses import LossTables, LossTerms, hybrid_loss, make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.models import clip, unet
from glide_jax.models.clip import NoisedCLIP, normalise
from glide_jax.models.tokenizers import CLIPTokenizer, GPT2Tokenizer
from glide_jax.models.unet import GLIDE
from glide_jax.training.config import CLIPTrainConfig, RunConfig, TrainConfig
from glide_jax.training.distillation import consistency_loss_at, distilled_length, teacher_model
from glide_jax.training.freezing import frozen_labels
from glide_jax.training.inputs import Inputs, bind_network, dropout_keys
from glide_jax.training.lora_training import add_pairs, init_base, init_pairs, lora_loss
from glide_jax.training.loss_aware import LossHistory, TimestepLosses, importance, probabilities
from glide_jax.training.masks import random_known
from glide_jax.training.quartiles import quartile_losses
from glide_jax.training.timestep_distribution import (
    TimestepDistribution,
    make_timestep_distribution,
)

Params = Any
Metrics = dict[str, jax.Array]
# Key under which the loss returns its `TimestepLosses`; the step removes them from the metrics.
TIMESTEP_LOSSES = "timestep_losses"


class Batch(NamedTuple):
    """Images and captions of one step, or of a part of it.

    Attributes:
        image: `(B, H, W, 3)` uint8.
        tokens: `(B, L)` int32.
        caption_mask: `(B, L)` bool, True where a token belongs to the caption.
        row: `(B,)` int32, row in the whole batch of the step.
    """

    image: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray
    caption_mask: jax.Array | np.ndarray
    row: jax.Array | np.ndarray


def to_batch(arrays: Mapping[str, Any]) -> Batch:
    """Return the arrays of a data batch that the training step takes."""
    return Batch(arrays["image"], arrays["tokens"], arrays["caption_mask"], arrays["row"])


class Noise(NamedTuple):
    """Random numbers of a batch, each record's from its own key.

    Attributes:
        t: `(B,)` int32 timesteps.
        eps: `(B, H, W, 3)` noise.
        key: `(B,)` keys for everything else.
    """

    t: jax.Array
    eps: jax.Array
    key: jax.Array


@dataclass(frozen=True)
class Objective:
    """A model and its loss.

    Attributes:
        model: the linen module.
        init: `key -> params`, random.
        loss: `(params, batch, key, *, train, axis) -> (loss, metrics)`, the mean over the batch;
            `train` is whether there is dropout, and `axis` is the name of the mapped axis over
            which the batch is split, if any; every loss takes both. With loss-aware timesteps it
            takes the `loss_history` of the state, and its metrics have the `TIMESTEP_LOSSES`.
        distils: whether the loss also takes `teacher_params` (frozen), `step` and `time_share`.
        init_reference_params: `key -> params`: random parameters of the teacher, or of the base of
            LoRA in its dtypes. Without a teacher or a base they are {}.
        lora_scale: factor of the low-rank pairs, if these are trained; the loss then also takes
            `base`, the frozen parameters. 0: the network's own parameters are trained.
    """

    model: GLIDE | NoisedCLIP
    init: Callable[[jax.Array], Params]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    distils: bool = False
    init_reference_params: Callable[[jax.Array], Params] = lambda key: {}
    lora_scale: float = 0.0

    def full_params(self, params: Params, reference_params: Params) -> Params:
        """Return the parameters of the network: the trained ones, with LoRA beside their base."""
        return add_pairs(params, reference_params, self.lora_scale) if self.lora_scale else params

    def loss_inputs(
        self, reference_params: Params, step: jax.Array | int, time_share: Any = None
    ) -> dict[str, Any]:
        """Return the loss's extra arguments: those of a distillation, or the base of LoRA."""
        if self.lora_scale:
            return {"base": reference_params}
        inputs = {"teacher_params": reference_params, "step": step, "time_share": time_share}
        return inputs if self.distils else {}


def make_objective(config: RunConfig) -> Objective:
    """Return the objective that a recipe trains."""
    dtype = trunk_dtype(config.dtype)
    tables = make_tables(make_schedule(config.noise_schedule, config.diffusion_steps))
    model: GLIDE | NoisedCLIP
    distils, init_reference_params, scale = False, Objective.init_reference_params, 0.0
    if isinstance(config, CLIPTrainConfig):
        model = NoisedCLIP(config.model, dtype, config.remat)
        limit = max(round(config.timestep_share * config.diffusion_steps), 1)
        loss = partial(contrastive_loss, model=model, tables=tables, timestep_limit=limit)
        init = partial(clip.init_params, model)
    else:
        assert isinstance(config, TrainConfig)
        model = GLIDE(config.model, dtype, config.remat)
        distils = config.objective == "consistency"
        if distils and config.distillation.teacher:
            init_reference_params = partial(unet.init_params, teacher_model(model))
        loss = partial(distillation_loss, model=model, tables=tables, config=config)
        if not distils:
            distribution = make_timestep_distribution(config)
            loss = partial(denoising_loss, distribution=distribution, **loss.keywords)
        init = partial(unet.init_params, model)
    if config.optimiser.freeze:
        loss = partial(_frozen_loss, loss, config.optimiser.freeze)
    if isinstance(config, TrainConfig) and (scale := config.lora.scale):
        loss = partial(lora_loss, loss, scale)
        init_reference_params = partial(init_base, init, dtype)
        init = partial(init_pairs, init_base_params=init, config=config.lora)
    return Objective(model, init, loss, distils, init_reference_params, scale)


def _frozen_loss(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    frozen: tuple[str, ...],
    params: Params,
    *arguments: Any,
    **options: Any,
) -> tuple[jax.Array, Metrics]:
    """Return the loss without a gradient of frozen parameters."""
    use = {"frozen": jax.lax.stop_gradient, "trained": lambda x: x}
    params = jax.tree.map(lambda x, label: use[label](x), params, frozen_labels(params, frozen))
    return loss(params, *arguments, **options)


def make_tokenizer(config: RunConfig) -> GPT2Tokenizer | CLIPTokenizer:
    """Return the tokenizer of a recipe's captions."""
    if isinstance(config, CLIPTrainConfig):
        return CLIPTokenizer(config.model.max_text_len)
    assert isinstance(config, TrainConfig)
    return GPT2Tokenizer(config.model.text_ctx)


def abstract_batch(config: RunConfig, rows: int) -> Batch:
    """Return the shapes and dtypes of a recipe's batch of so many rows."""
    size, context = config.side, make_tokenizer(config).context
    arrays: Any = [
        jax.ShapeDtypeStruct((rows, *shape), dtype)
        for shape, dtype in (
            ((size, size, 3), np.uint8),
            ((context,), np.int32),
            ((context,), np.bool_),
            ((), np.int32),
        )
    ]
    return Batch(*arrays)


def sample_noise(key: jax.Array, batch: Batch, distribution: TimestepDistribution | int) -> Noise:
    """Return timesteps, noise and keys, each record's from its row.

    Args:
        key: key of the step.
        batch: images and rows of the step.
        distribution: distribution of the timesteps; an integer T: uniform over 0..T-1.
    """
    given = TimestepDistribution(distribution) if isinstance(distribution, int) else distribution

    def record_noise(row: jax.Array | np.ndarray) -> Noise:
        t_key, eps_key, other_key = jax.random.split(jax.random.fold_in(key, row), 3)
        eps = jax.random.normal(eps_key, batch.image.shape[1:])
        return Noise(given.sample(t_key), eps, other_key)

    return jax.vmap(record_noise)(batch.row)


def shrink(image: jax.Array | np.ndarray, factor: int = 4) -> jax.Array:
    """Average blocks of `factor x factor` pixels of a uint8 image  (as `super_res_train` of ADM).

    Returns:
        `(B, H / factor, W / factor, C)` whole numbers in float32.
    """
    batch, height, width, channels = image.shape
    blocks = image.reshape(batch, height // factor, factor, width // factor, factor, channels)
    # Whole numbers, as in the small images that the upsampler enlarges later.
    return jnp.round(blocks.astype(jnp.float32).mean(axis=(2, 4)))


def denoising_loss(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: GLIDE,
    tables: LossTables,
    config: TrainConfig,
    distribution: TimestepDistribution | None = None,
    loss_history: LossHistory | None = None,
    train: bool = False,
    axis: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Return the mean hybrid loss of a batch and its terms  (GLIDE, sec. 2.1 and 4.1 to 4.3).

    The mask of an empty caption is False throughout. The conditioning of an upsampler is the image
    averaged over blocks; that of an inpainting model is the image with random regions masked.

    With a `loss_history` the timesteps are loss-aware. The means are weighted: their expectation
    is that of uniform timesteps.
    """
    distribution = distribution or TimestepDistribution(len(tables.alpha))
    if loss_history is not None:
        distribution = replace(distribution, probability=probabilities(loss_history))
    inputs = noise_batch(batch, key, distribution, tables, config)
    network = bind_network(model, params)
    text = network(inputs.tokens, inputs.caption_mask, method=GLIDE.encode_text)
    dropout = {"dropout_keys": dropout_keys(inputs)} if train and config.model.dropout else {}
    output = network(inputs.x_t, inputs.t, text, **inputs.conditioning, **dropout)
    terms = hybrid_loss(
        tables,
        inputs.x_0,
        inputs.x_t,
        inputs.t,
        inputs.eps,
        output,
        prediction_type=config.prediction_type,
        weighting=config.weighting,
        gamma=config.snr_gamma,
        huber_width=config.huber_width,
    )
    metrics: dict[str, Any] = {}
    weight = None
    if distribution.probability is not None:
        metrics[TIMESTEP_LOSSES] = TimestepLosses(jnp.asarray(batch.row), inputs.t, terms.loss)
        weight = importance(distribution.probability, inputs.t)
        terms = LossTerms(*(term * weight for term in terms))
    metrics |= {"loss": terms.loss.mean(), "mse": terms.mse.mean(), "vlb": terms.vlb.mean()}
    return metrics["loss"], metrics | quartile_losses(
        terms.loss, inputs.t, len(tables.alpha), weight
    )


def distillation_loss(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: GLIDE,
    tables: LossTables,
    config: TrainConfig,
    teacher_params: Params,
    step: jax.Array | int,
    time_share: jax.Array | np.ndarray | None = None,
    train: bool = False,
    axis: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Return the mean consistency loss of a batch (`glide_jax.training.distillation`).

    Args:
        teacher_params: weights of the teacher; {}: there is no teacher, and the images take its
            place.
        step: number of steps that the run has done.
        time_share: share of the time limit that is used up, if there is one. The number of teacher
            steps depends on it or on the share of the steps, whichever is larger.
    """
    inputs = noise_batch(batch, key, distilled_length(config, tables), tables, config)
    terms, teacher_steps = consistency_loss_at(
        params,
        inputs,
        model=model,
        tables=tables,
        config=config,
        teacher_params=teacher_params,
        # Whichever limit comes first.
        progress=jnp.maximum(step / config.steps, 0.0 if time_share is None else time_share),
        train=train,
    )
    metrics = {"loss": terms.loss.mean(), "mse": terms.mse.mean(), "teacher_steps": teacher_steps}
    return metrics["loss"], metrics | quartile_losses(terms.loss, inputs.t, len(tables.alpha))


def noise_batch(
    batch: Batch,
    key: jax.Array,
    distribution: TimestepDistribution | int,
    tables: LossTables,
    config: TrainConfig,
) -> Inputs:
    """Return a batch noised at sampled timesteps, with its conditioning."""
    noise = sample_noise(key, batch, distribution)
    keys = jax.vmap(partial(jax.random.split, num=3))(noise.key)
    x_0 = from_uint8(batch.image)
    x_t = q_sample(tables, x_0, noise.t, noise.eps)

    dropout_draw = jax.vmap(jax.random.uniform)(keys[:, 0])
    caption_mask = batch.caption_mask & (dropout_draw >= config.caption_dropout)[:, None]
    conditioning: dict[str, jax.Array] = {}
    if config.model.upsamples:
        low_res = conditioning["low_res"] = from_uint8(shrink(batch.image))
        if config.model.low_res_timestep:
            noised = noise_low_res(tables, low_res, keys[:, 1], config.low_res_timestep_share)
            conditioning["low_res"], conditioning["low_res_timestep"] = noised
    if config.model.inpaints:
        size = batch.image.shape[1]
        one_mask = partial(random_known, size=size, mask_all_share=config.mask_all_share)
        known = jax.vmap(one_mask)(keys[:, 2])
        conditioning |= {"inpaint_image": x_0 * known, "inpaint_known": known}
    # Keys of the loss: guidance scale and dropout. Not from the split above, so that denoising
    # keeps its random numbers.
    loss_keys = jax.vmap(lambda key: jax.random.fold_in(key, 3))(noise.key)
    return Inputs(x_0, x_t, noise.eps, noise.t, batch.tokens, caption_mask, conditioning, loss_keys)


def noise_low_res(
    tables: LossTables, low_res: jax.Array, keys: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """Return small images at random noise levels, and their timesteps  (CDM, sec. 4.2).

    Timesteps are uniform from 0 to `share` of the diffusion process.
    """
    limit = max(round(share * len(tables.alpha)), 1)

    def timestep_and_noise(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        t_key, eps_key = jax.random.split(key)
        t = jax.random.randint(t_key, (), 0, limit)
        return t, jax.random.normal(eps_key, low_res.shape[1:])

    t, eps = jax.vmap(timestep_and_noise)(keys)
    return q_sample(tables, low_res, t, eps), t


def contrastive_loss(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    model: NoisedCLIP,
    tables: LossTables,
    timestep_limit: int | None = None,
    train: bool = False,
    axis: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Return the symmetric cross entropy of noised images and captions  (CLIP, fig. 3).

    Each image is compared with the captions of the whole batch, on all devices  (GLIDE, sec. 4.4).

    Args:
        batch: `caption_mask` is True at the tokens of the caption, start and end token included.
        timestep_limit: the timesteps below this number are sampled; None: all timesteps.
    """
    noise = sample_noise(key, batch, timestep_limit or len(tables.alpha))
    x_t = q_sample(tables, from_uint8(batch.image), noise.t, noise.eps)
    lengths = batch.caption_mask.sum(axis=1)
    network = bind_network(model, params)
    image = normalise(network(x_t, noise.t, method=NoisedCLIP.image_features).raw)
    text = normalise(network(batch.tokens, lengths, method=NoisedCLIP.text_features).raw)
    scale = network(method=NoisedCLIP.scale)
    every_image, every_text, offset = image, text, 0
    if axis is not None:
        every_image, every_text = (jax.lax.all_gather(z, axis, tiled=True) for z in (image, text))
        offset = jax.lax.axis_index(axis) * len(image)
    own_columns = offset + jnp.arange(len(image))
    highest = jax.lax.Precision.HIGHEST
    by_image = scale * jnp.matmul(image, every_text.T, precision=highest)
    by_text = scale * jnp.matmul(text, every_image.T, precision=highest)

    def own_entry(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, own_columns[:, None], axis=1)[:, 0]

    loss = -(own_entry(jax.nn.log_softmax(by_image)) + own_entry(jax.nn.log_softmax(by_text))) / 2
    # Equal captions share the first place, so each of them is right.
    is_right = (own_entry(by_image) == by_image.max(axis=1)).astype(jnp.float32)
    metrics = {"loss": loss.mean(), "accuracy": is_right.mean(), "scale": scale}
    return metrics["loss"], metrics | quartile_losses(loss, noise.t, len(tables.alpha))
