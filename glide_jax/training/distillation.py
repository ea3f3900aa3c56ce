"""Consistency distillation: a student predicts one clean image from all points of a teacher's path.

Each record has a timestep t and an earlier one r < t. The teacher takes x_t to x_r by one step of
DDIM, with classifier-free guidance; the student's clean image at (x_t, t) learns to equal its own
at (x_r, r), without gradient. Where r is the clean image, the target is x_r itself
(2303.01469, algorithm 2; guidance inside: 2210.03142). Timestep -1 stands for the clean image.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.guidance import (
    CAPTION,
    NULL,
    Network,
    Point,
    Predict,
    apply_guidances,
    branches_of,
    clamp_x_0,
    classifier_free,
    noise_predictor,
)
from glide_jax.diffusion.losses import LossTables, mean_flat
from glide_jax.diffusion.schedule import to_x_0
from glide_jax.diffusion.spacings import NOISIEST_HALF_LOG_SNR
from glide_jax.models.unet import GLIDE
from glide_jax.training.config import TrainConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.inputs import Inputs, bind_network, dropout_keys

# The largest weight of an error of x_0 is 1 / MIN_SIGMA.
MIN_SIGMA = 0.05
# `(x, point) -> x_0`.
Denoise = Callable[[jax.Array, Point], jax.Array]


class ConsistencyTerms(NamedTuple):
    """The loss of each image, and its mean squared error, `(B,)` float32."""

    loss: jax.Array
    mse: jax.Array


# --- noise levels


def distilled_length(config: TrainConfig, tables: LossTables) -> int:
    """Return the number of timesteps, from the cleanest, that are distilled.

    Without `timestep_share`, the noisiest is where most spacings of the sampler begin. At noisier
    timesteps nothing is left of the image, and an error of eps is an error of x_0 more than 164
    times as large.
    """
    half_log_snr = np.log(tables.alpha.astype(np.float64) / tables.sigma)
    usable = int((half_log_snr >= NOISIEST_HALF_LOG_SNR).sum())
    return max(round(config.distillation.timestep_share * usable), 1)


def teacher_steps_at(progress: Any, teacher_steps: tuple[int, int]) -> jax.Array:
    """Return the number of teacher steps, which doubles at equal intervals  (2310.14189, sec. 3.4).

    Args:
        progress: share of the training that is done.
        teacher_steps: numbers of steps at the beginning and at the end.
    """
    first, last = teacher_steps
    stages = math.ceil(math.log2(last / first)) + 1
    # The epsilon keeps float32 rounding of `progress * stages` from falling below an integer.
    stage = jnp.floor(jnp.float32(progress) * stages + 1e-4)
    return jnp.minimum(first * 2.0**stage, last)


def earlier_timestep(
    t: jax.Array, gap: jax.Array | int, length: int, student_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Return the earlier timestep of each record, and the end of its interval; -1: the clean image.

    Args:
        t: `(B,)` timesteps below `length`.
        gap: timesteps from t to the earlier one, if the interval does not end before.
        length: number of timesteps that are distilled.
        student_steps: number of intervals, equally long up to rounding.
    """
    end = (t * student_steps // length) * length // student_steps - 1
    return jnp.maximum(t - gap, end), end


def point_at(tables: LossTables, t: jax.Array, r: jax.Array) -> Point:
    """Return the points of records at timesteps t `(B,)`, on their way to timesteps r `(B,)`."""

    def coefficient(table: np.ndarray, clean: float, i: jax.Array) -> jax.Array:
        return jnp.append(clean, jnp.asarray(table))[i + 1][:, None, None, None]

    return Point(
        # A network is never asked about the clean image, but its input is well defined.
        t=jnp.maximum(t, 0),
        alpha=coefficient(tables.alpha, 1.0, t),
        sigma=coefficient(tables.sigma, 0.0, t),
        next_alpha=coefficient(tables.alpha, 1.0, r),
        next_sigma=coefficient(tables.sigma, 0.0, r),
        memory={},
    )


# --- teacher and student


def teacher_predictor(
    network: Callable[..., Any],
    prediction_type: str,
    tokens: jax.Array | np.ndarray,
    caption_mask: jax.Array | np.ndarray,
    conditioning: dict[str, jax.Array],
    scale: jax.Array | None,
    clamps_x_0: bool,
) -> Predict:
    """Return the teacher's prediction, with classifier-free guidance in one batched pass.

    Args:
        network: the teacher as a function of its inputs.
        scale: `(B,)` guidance scales; None: no guidance, and no second branch.
    """
    caption_masks = {CAPTION.name: caption_mask}
    if scale is not None:
        caption_masks[NULL.name] = caption_mask & False
    conds = {
        name: {"text": network(tokens, branch_mask, method=GLIDE.encode_text)} | conditioning
        for name, branch_mask in caption_masks.items()
    }
    guidances = [] if scale is None else [classifier_free(scale)]
    if clamps_x_0:
        guidances.append(clamp_x_0())
    main = Network(lambda _, x, t, cond: network(x, t, **cond), {}, prediction_type)
    predict = noise_predictor({CAPTION.network: main}, conds, branches_of(guidances))
    return apply_guidances(predict, guidances)


def student_denoiser(
    network: Callable[..., Any],
    prediction_type: str,
    inputs: dict[str, Any],
    clamps_x_0: bool = False,
) -> Denoise:
    """Return the student's clean image as a function of a noised image and its noise level."""

    def denoise(x: jax.Array, point: Point) -> jax.Array:
        output = network(x, point.t, **inputs)[..., : x.shape[-1]]
        x_0 = to_x_0(prediction_type, output, x, point.alpha, point.sigma)
        return jnp.clip(x_0, -1, 1) if clamps_x_0 else x_0

    return denoise


# --- target and loss


def ddim_step(x: jax.Array, x_0: jax.Array, point: Point) -> jax.Array:
    """Return `x_r = alpha_r x_0 + sigma_r eps`  (2010.02502, eq. 12)."""
    eps = (x - point.alpha * x_0) / point.sigma
    return point.next_alpha * x_0 + point.next_sigma * eps


def consistency_target(
    tables: LossTables,
    frozen_denoise: Denoise,
    x_t: jax.Array,
    x_r: jax.Array,
    t: jax.Array,
    r: jax.Array,
    end: jax.Array,
) -> jax.Array:
    """Return the target at x_t, from the student's clean image at x_r  (2403.06807, alg. 1).

    One step of DDIM with the target leads from x_t to where the student's clean image leads from
    x_r: to the end of the interval. With one interval this end is the clean image, and the target
    is the student's clean image itself.

    Args:
        frozen_denoise: the student, without gradient.
        t, r, end: `(B,)` timesteps, see `earlier_timestep`.
    """
    at_t, at_r = point_at(tables, t, end), point_at(tables, r, end)
    arrived = (r == end)[:, None, None, None]
    # Avoid division by sigma = 0 where r is the clean image; the result is not used there.
    at_r = at_r._replace(sigma=jnp.where(arrived, 1.0, at_r.sigma))
    x_end = jnp.where(arrived, x_r, ddim_step(x_r, frozen_denoise(x_r, at_r), at_r))
    ratio = at_t.next_sigma / at_t.sigma
    return (x_end - ratio * x_t) / (at_t.next_alpha - ratio * at_t.alpha)


def consistency_error(
    x_0: jax.Array, target: jax.Array, sigma: jax.Array, huber_width: float
) -> ConsistencyTerms:
    """Pseudo-Huber loss of the error of v, `|x_0 - target| / sigma`  (2310.14189, eq. 7).

    An error of v has the same weight at every timestep, as in training with v-prediction. So the
    weight of an error of x_0 falls as the noise grows, as in consistency training (there it is `1 /
    gap`, the gap in units of noise).

    Args:
        sigma: `(B, 1, 1, 1)`; below `MIN_SIGMA` the weight grows no further, since a network that
            predicts x_0 or eps has errors there that do not fall with the noise.
        huber_width: the paper's constant c divided by the square root of the number of values.
    """
    mse = mean_flat((x_0 - target) ** 2)
    v_mse = mse / jnp.maximum(sigma[:, 0, 0, 0], MIN_SIGMA) ** 2
    return ConsistencyTerms(jnp.sqrt(v_mse + huber_width**2) - huber_width, mse)


def sample_scale(key: jax.Array, config: DistillationConfig) -> jax.Array:
    """Sample a guidance scale: 1 for the share `unguided_share`, otherwise uniform in the range."""
    low, high = config.guidance_scales
    if low == high:
        return jnp.float32(low)
    choice, position = jax.random.uniform(key, (2,))
    return jnp.where(choice < config.unguided_share, 1.0, low + (high - low) * position)


def consistency_loss(
    student: Callable[..., Any],
    frozen_student: Callable[..., Any],
    teacher: Callable[..., Any] | None,
    inputs: Inputs,
    *,
    tables: LossTables,
    config: TrainConfig,
    teacher_steps: jax.Array | int,
    **options: Any,
) -> ConsistencyTerms:
    """Return the consistency loss of a batch.

    Args:
        student: the student as a function of its inputs.
        frozen_student: the same function of weights without gradient.
        teacher: the teacher as a function of its inputs; None: the images take its place, and x_r
            is the image with the same noise  (2303.01469, algorithm 3).
        teacher_steps: number of teacher steps over the whole range of timesteps.
        options: options of the student, for dropout.
    """
    c, x_t, t = config.distillation, inputs.x_t, inputs.t
    length = distilled_length(config, tables)
    gap = jnp.maximum(jnp.round(length / teacher_steps), 1).astype(t.dtype)
    r, end = earlier_timestep(t, gap, length, c.student_steps)
    point = point_at(tables, t, r)
    scale = jax.vmap(lambda key: sample_scale(key, c))(inputs.key)
    if teacher is None:
        x_r = point.next_alpha * inputs.x_0 + point.next_sigma * inputs.eps
    else:
        predict = teacher_predictor(
            teacher,
            config.prediction_type,
            inputs.tokens,
            inputs.caption_mask,
            inputs.conditioning,
            None if c.guidance_scales == (1, 1) else scale,
            c.clamp_x_0,
        )
        x_r = ddim_step(x_t, predict(x_t, point).x_0, point)

    text = student(inputs.tokens, inputs.caption_mask, method=GLIDE.encode_text)
    arguments = inputs.conditioning | options
    if config.model.guidance_scale_input:
        arguments = arguments | {"guidance_scale": scale}
    frozen_arguments = arguments | {"text": jax.lax.stop_gradient(text)}
    frozen_denoise = student_denoiser(
        frozen_student, config.prediction_type, frozen_arguments, c.clamp_x_0
    )
    target = consistency_target(tables, frozen_denoise, x_t, x_r, t, r, end)
    x_0 = student_denoiser(student, config.prediction_type, arguments | {"text": text})(x_t, point)
    return consistency_error(x_0, jax.lax.stop_gradient(target), point.sigma, c.huber_width)


def teacher_model(student_model: GLIDE) -> GLIDE:
    """Return the teacher of a student: the same network without scale and dropout."""
    config = replace(student_model.config, guidance_scale_input=False, dropout=0.0)
    return GLIDE(config, student_model.dtype)


def consistency_loss_at(
    params: Any,
    inputs: Inputs,
    *,
    model: GLIDE,
    tables: LossTables,
    config: TrainConfig,
    teacher_params: Any,
    progress: Any,
    train: bool = False,
) -> tuple[ConsistencyTerms, jax.Array]:
    """Return the consistency loss of a batch at a share of the run, and the teacher's steps.

    Args:
        teacher_params: weights of the teacher; {}: there is no teacher.
    """
    teacher_steps = teacher_steps_at(progress, config.distillation.teacher_steps)
    # The same dropout masks at both noise levels.
    dropout = {"dropout_keys": dropout_keys(inputs)} if train and config.model.dropout else {}
    terms = consistency_loss(
        bind_network(model, params),
        bind_network(model, jax.lax.stop_gradient(params)),
        bind_network(teacher_model(model), teacher_params) if teacher_params else None,
        inputs,
        tables=tables,
        config=config,
        teacher_steps=teacher_steps,
        **dropout,
    )
    return terms, teacher_steps
