"""Consistency distillation with exact teachers: a Gaussian, and a mixture of two peaks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glide_jax.diffusion.losses import make_tables, q_sample
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.training.config import TrainConfig
from glide_jax.training.distillation import (
    consistency_loss,
    distilled_length,
    earlier_timestep,
    point_at,
    teacher_steps_at,
)
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.inputs import Inputs
from tests.support.commands import TINY

SCHEDULE = make_schedule("cosine")
TABLES = make_tables(SCHEDULE)
LENGTH = 996  # timesteps up to a half log-SNR of -5.1
# One Gaussian for the caption, one without it; guidance of scale w makes another mean of them.
MEAN, NULL_MEAN, STD = 0.3, -0.1, 0.2
ALPHA, SIGMA = (np.append(clean, table.astype(np.float64)) for clean, table in
                ((1.0, TABLES.alpha), (0.0, TABLES.sigma)))  # fmt: skip


def config_of(prediction_type="v", scale=1.0, **options):
    options = {
        "clamp_x_0": False,
        "guidance_scales": (scale, scale),
        "teacher": "gaussian",
    } | options
    return TrainConfig(
        name="x",
        model=TINY,
        prediction_type=prediction_type,
        objective="consistency",
        distillation=DistillationConfig(**options),
    )


def output(prediction_type, x_0, x, alpha, sigma):
    """The network's output that stands for a clean image."""
    eps = (x - alpha * x_0) / sigma
    return eps if prediction_type == "eps" else alpha * eps - sigma * x_0


def as_network(x_0_at, prediction_type):
    """Return a network of `(x, t, mean of its caption) -> x_0`; captions have one token."""

    def network(*inputs, method=None, **given):
        if method is not None:
            _, mask = inputs
            return jnp.where(mask[:, 0], MEAN, NULL_MEAN)[:, None, None, None]
        x, t = inputs
        alpha, sigma = (jnp.asarray(a)[t][:, None, None, None] for a in TABLES[:2])
        return output(prediction_type, x_0_at(x, t, given["text"]), x, alpha, sigma)

    return network


def gaussian(x, t, mean):
    """`E[x_0 | x_t]` of the Gaussian of a caption."""
    alpha, sigma = (jnp.asarray(a)[t][:, None, None, None] for a in TABLES[:2])
    return mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)


def path_map(gap, scale, student_steps=1, timestep_share=1.0):
    """Return (gain, offset) of the student at every timestep, exactly, by steps of the teacher.

    From each timestep t the teacher takes steps of DDIM to t - gap, t - 2 gap, ... and the end of
    its part. The student's x_0 is the one from which a single step leads to the same point.
    """
    length = distilled_length(config_of(timestep_share=timestep_share), TABLES)
    t = np.arange(length)
    r, end = (np.asarray(a) for a in earlier_timestep(jnp.asarray(t), gap, length, student_steps))
    mean = NULL_MEAN + scale * (MEAN - NULL_MEAN)
    gain, offset = np.zeros(length), np.zeros(length)
    for i in t:
        # x_0 = g x + o of the teacher; x_r = a x + b.
        slope = ALPHA[i + 1] * STD**2 / (ALPHA[i + 1] ** 2 * STD**2 + SIGMA[i + 1] ** 2)
        g, o = slope, mean * (1 - slope * ALPHA[i + 1])
        ratio = SIGMA[r[i] + 1] / SIGMA[i + 1]
        lead = ALPHA[r[i] + 1] - ratio * ALPHA[i + 1]
        a, b = ratio + lead * g, lead * o
        if r[i] > end[i]:
            j, e = r[i], end[i]
            ratio = SIGMA[e + 1] / SIGMA[j + 1]
            lead = ALPHA[e + 1] - ratio * ALPHA[j + 1]
            c, d = ratio + lead * gain[j], lead * offset[j]
            a, b = c * a, c * b + d
        ratio = SIGMA[end[i] + 1] / SIGMA[i + 1]
        lead = ALPHA[end[i] + 1] - ratio * ALPHA[i + 1]
        gain[i], offset[i] = (a - ratio) / lead, b / lead
    return jnp.float32(gain), jnp.float32(offset)


def inputs_at(t, seed=0):
    t = jnp.asarray(t)
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (len(t), 4, 4, 3)
    x_0 = MEAN + STD * jax.random.normal(keys[0], shape)
    eps = jax.random.normal(keys[1], shape)
    mask = jnp.ones((len(t), 1), bool)
    key = jax.random.split(jax.random.key(seed + 1), len(t))
    return Inputs(x_0, q_sample(TABLES, x_0, t, eps), eps, t, mask, mask, {}, key)


def loss_of(student, config, teacher_steps, t=range(LENGTH), teacher=gaussian):
    made = None if teacher is None else as_network(teacher, config.prediction_type)
    student = as_network(student, config.prediction_type)
    return consistency_loss(
        student,
        student,
        made,
        inputs_at(t),
        tables=TABLES,
        config=config,
        teacher_steps=teacher_steps,
    )


def linear(gain, offset):
    def denoise(x, t, mean):
        return gain[t][:, None, None, None] * x + offset[t][:, None, None, None]

    return denoise


# --- exact on a Gaussian


@pytest.mark.parametrize("prediction_type", ["eps", "v"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("teacher_steps", "student_steps"), [(1, 1), (8, 1), (64, 1), (16, 4)])
def test_the_loss_is_zero_at_the_map_of_the_teachers_steps(
    prediction_type, scale, teacher_steps, student_steps
):
    gain, offset = path_map(round(LENGTH / teacher_steps), scale, student_steps)
    config = config_of(prediction_type, scale, student_steps=student_steps)
    right = loss_of(linear(gain, offset), config, teacher_steps)
    assert np.sqrt(right.mse).max() < 2e-4 * (10 if prediction_type == "eps" else 1)
    # Neither the teacher itself nor the map of another scale is consistent.
    wrong = loss_of(gaussian, config, teacher_steps)
    other = loss_of(
        linear(*path_map(round(LENGTH / teacher_steps), scale + 1, student_steps)),
        config,
        teacher_steps,
    )
    for terms in (other, *([] if teacher_steps == scale == 1 else [wrong])):
        assert terms.loss.mean() > 50 * right.loss.mean()


def test_the_map_of_the_teachers_steps_approaches_the_flow():
    """The exact map is `mean + std / sqrt(alpha^2 std^2 + sigma^2) (x - alpha mean)`."""
    t = np.arange(0, LENGTH, 50)
    exact = STD / np.sqrt(ALPHA[t + 1] ** 2 * STD**2 + SIGMA[t + 1] ** 2)
    errors = [abs(np.asarray(path_map(gap, 1.0)[0])[t] - exact).max() for gap in (64, 16, 4)]
    assert errors[2] < 0.02 * exact.max() and errors[0] > 3 * errors[1] > 9 * errors[2]


def fit(params, loss, steps, rate=3e-3):
    """Minimise `loss(params, step, key)` with Adam in one compiled loop, rate falling to zero."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def update(carry, step):
        params, state = carry
        gradient = jax.grad(loss)(params, step, jax.random.fold_in(jax.random.key(5), step))
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimiser.init(params))
    return jax.jit(lambda start: jax.lax.scan(update, start, jnp.arange(steps))[0][0])(start)


def test_a_linear_student_learns_the_known_map_from_its_teacher():
    """Each timestep has a gain and an offset of its own; the first student is the teacher."""
    config = config_of(scale=2.0, student_steps=1)
    t = jnp.arange(LENGTH)
    zero, one = (gaussian(jnp.full((LENGTH, 1, 1, 1), v), t, MEAN).ravel() for v in (0.0, 1.0))
    wanted = path_map(LENGTH // 4, 2.0)

    def loss(params, step, key):
        student, frozen_student = (
            as_network(linear(*p), "v") for p in (params, jax.lax.stop_gradient(params))
        )
        inputs = inputs_at(t, step)
        return consistency_loss(
            student,
            frozen_student,
            as_network(gaussian, "v"),
            inputs,
            tables=TABLES,
            config=config,
            teacher_steps=4,
        ).loss.mean()

    def error(params):
        return float(jnp.sqrt(jnp.mean((params[0] - wanted[0])[LENGTH // 2 :] ** 2)))

    first = (one - zero, zero)
    found = fit(first, loss, 600, rate=1e-2)
    assert error(found) < 0.1 * error(first)
    assert float(jnp.abs(found[1] - wanted[1]).max()) < 0.05


# --- a mixture


def test_one_step_of_a_student_samples_a_mixture_where_its_teacher_returns_the_mean():
    """Two narrow peaks at -0.5 and 0.5: the flow takes noise to the peak of its sign."""
    peaks = jnp.array([-0.5, 0.5])

    def mixture(x, t, _):
        alpha, sigma = (jnp.asarray(a)[t][:, None, None, None] for a in TABLES[:2])
        variance = alpha**2 * 0.05**2 + sigma**2
        share = jax.nn.softmax(-((x[..., None] - alpha[..., None] * peaks) ** 2)
                               / (2 * variance[..., None]), axis=-1)  # fmt: skip
        gain = alpha * 0.05**2 / variance
        means = peaks + gain[..., None] * (x[..., None] - alpha[..., None] * peaks)
        return (share * means).sum(-1)

    def network(params, x, t):
        phase = (t / LENGTH)[:, None] * jnp.pi * jnp.arange(1, 9)
        h = jnp.concatenate([x[:, 0, 0], jnp.sin(phase), jnp.cos(phase)], axis=-1)
        for weight, bias in params[:-1]:
            h = jax.nn.gelu(h @ weight + bias)
        weight, bias = params[-1]
        return (h @ weight + bias)[:, None, None]

    def student(params):
        return lambda *inputs, method=None, **_: None if method else network(params, *inputs)

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(17, 64), (64, 64), (64, 1)]
    params = [
        (jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=True)
    ]
    config, steps = config_of(huber_width=0.2), 2000

    def inputs_of(key, count=256):
        a, b, c, d = jax.random.split(key, 4)
        x_0 = jax.random.choice(a, peaks, (count, 1, 1, 1))
        x_0 = x_0 + 0.05 * jax.random.normal(b, x_0.shape)
        eps, t = jax.random.normal(c, x_0.shape), jax.random.randint(d, (count,), 0, LENGTH)
        nothing = jnp.zeros((count, 1), bool)
        x_t = q_sample(TABLES, x_0, t, eps)
        return Inputs(x_0, x_t, eps, t, nothing, nothing, {}, jax.random.split(a, count))

    def loss(params, step, key):
        return consistency_loss(
            student(params),
            student(jax.lax.stop_gradient(params)),
            as_network(mixture, "v"),
            inputs_of(key),
            tables=TABLES,
            config=config,
            teacher_steps=teacher_steps_at(step / steps, (4, 32)),
        ).loss.mean()

    found = fit(params, loss, steps)
    noise = jax.random.normal(jax.random.key(9), (512, 1, 1, 1))
    t = jnp.full(512, LENGTH - 1)
    point = point_at(TABLES, t, t - LENGTH)
    x_0 = point.alpha * noise - point.sigma * network(found, noise, t)
    clear = np.abs(np.asarray(noise)).ravel() > 0.3
    error = np.abs(np.asarray(x_0 - 0.5 * jnp.sign(noise))).ravel()[clear]
    assert np.quantile(error, 0.9) < 0.1
    assert float(jnp.abs(mixture(noise, t, None)).max()) < 0.05
