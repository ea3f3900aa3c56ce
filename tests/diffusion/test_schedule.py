"""Noise schedules and timesteps against the original tables, in float64."""

import numpy as np
import pytest

from glide_jax.diffusion.guidance import CAPTION, Network, Point, noise_predictor
from glide_jax.diffusion.schedule import (
    PREDICTION_TYPES,
    Schedule,
    make_schedule,
    posterior,
    target_of,
    to_eps,
    to_x_0,
)
from glide_jax.diffusion.solvers.table import levels, one_row_per_step, step_betas
from glide_jax.diffusion.spacings import respaced, respaced_timesteps
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import UsageError
from tests.support.golden import SCHEDULES, load

SPACINGS = ["none", "100", "27", "fast27", "ddim50", "ddim25", "250", "10,10,3,2,2", "150"]
each_schedule = pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
each_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def tables(*key) -> dict:
    prefix = "|".join(map(str, key)) + "|"
    return {k.removeprefix(prefix): v for k, v in load("tables").items() if k.startswith(prefix)}


def same(found, wanted, atol=0.0):
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=atol)


def string(spacing: str) -> str:
    return "" if spacing == "none" else spacing


# --- tables


@each_schedule
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_betas(name, steps):
    same(make_schedule(SCHEDULES[name], steps).betas, tables(name, steps, "none")["betas"])


def test_the_cosine_schedule_is_that_of_improved_ddpm():
    same(make_schedule("cosine").betas[::10], load("tables")["guided_cosine|1000"])


@each_spacing
@each_schedule
def test_respaced_process(name, spacing):
    wanted, schedule = tables(name, 1000, spacing), make_schedule(SCHEDULES[name])
    timesteps = respaced(schedule, string(spacing))
    np.testing.assert_array_equal(timesteps[::-1], wanted["timestep_map"])
    # The original multiplies the betas of the respaced process again, and rounds again.
    same(schedule.alpha_bar_at(timesteps[::-1]), wanted["alphas_cumprod"], atol=1e-17)
    betas = step_betas(schedule, timesteps)
    same(betas, wanted["betas"])
    same(posterior(betas).log_beta_tilde, wanted["posterior_log_variance_clipped"])


@pytest.mark.parametrize("spacing", ["none", "fast27"])
@each_schedule
def test_the_levels_that_solvers_read(name, spacing):
    wanted, schedule = tables(name, 1000, spacing), make_schedule(SCHEDULES[name])
    timesteps = respaced(schedule, string(spacing))
    alpha, sigma, half_log_snr = (column[-2::-1] for column in levels(schedule, timesteps))
    same(alpha, wanted["sqrt_alphas_cumprod"])
    same(sigma, wanted["sqrt_one_minus_alphas_cumprod"])
    same(2 * np.log(sigma), wanted["log_one_minus_alphas_cumprod"], atol=1e-15)
    same(1 / alpha, wanted["sqrt_recip_alphas_cumprod"])
    same(sigma / alpha, wanted["sqrt_recipm1_alphas_cumprod"])
    np.testing.assert_allclose(
        np.exp(-half_log_snr), wanted["sqrt_recipm1_alphas_cumprod"], rtol=1e-10
    )
    q = posterior(step_betas(schedule, timesteps))
    same(q.log_beta, np.log(wanted["betas"]))
    same(q.beta_tilde, wanted["posterior_variance"])
    same(q.mean_weight_x_0, wanted["posterior_mean_coef1"])
    same(q.mean_weight_x_t, wanted["posterior_mean_coef2"])

    table = one_row_per_step(schedule, timesteps)
    same(table.t[::-1], timesteps[::-1])
    same(table.log_beta_tilde[::-1], wanted["posterior_log_variance_clipped"])
    if spacing != "none":
        same(table.next_alpha[::-1] ** 2, wanted["alphas_cumprod_prev"])
        # The original's table of noisier levels ends in pure noise.
        same(table.alpha[-2::-1] ** 2, wanted["alphas_cumprod_next"][:-1])


def test_released_levels_are_rounded_to_float32():
    schedule = make_schedule("cosine")
    timesteps = respaced(schedule, "27")
    alpha, sigma, _ = levels(schedule, timesteps, float32_alpha_bar=True)
    rounded = np.float32(schedule.alpha_bar_at(timesteps)).astype(np.float64)
    np.testing.assert_array_equal(alpha, np.sqrt(np.append(rounded, 1)))
    np.testing.assert_array_equal(sigma, np.sqrt(1 - np.append(rounded, 1)))


def test_posterior_of_a_single_step():
    """The original raises an IndexError here."""
    q = posterior(np.array([0.7]))
    assert q.log_beta_tilde == q.log_beta == np.log(0.7)
    assert (q.mean_weight_x_0, q.mean_weight_x_t, q.beta_tilde) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [("sigmoid", 1000, "unknown noise schedule 'sigmoid'"), ("cosine", 0, "at least one step")],
)
def test_refused_schedules(name, steps, message):
    with pytest.raises(UsageError, match=message):
        make_schedule(name, steps)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.1], [[0.1]], [0.1, np.nan]])
def test_refused_betas(betas):
    with pytest.raises(UsageError, match="betas must be"):
        Schedule(np.array(betas))


# --- log-SNR


@each_schedule
def test_log_snr_and_its_inverse(name):
    schedule = make_schedule(SCHEDULES[name])
    t = np.append(np.random.default_rng(0).uniform(0, 999, 200), [0, 1, 500, 998, 999])
    np.testing.assert_allclose(
        schedule.t_at_half_log_snr(schedule.half_log_snr(t)), t, rtol=1e-9, atol=1e-9
    )
    alpha_bar = schedule.alpha_bar_at(t)
    half_log_snr = 0.5 * np.log(alpha_bar / (1 - alpha_bar))
    np.testing.assert_allclose(schedule.half_log_snr(t), half_log_snr, rtol=1e-9, atol=1e-9)
    same(schedule.alpha_bar_at(np.arange(1000)), schedule.alpha_bar)


# --- timesteps


@pytest.mark.parametrize("key", [k for k in load("tables") if k.startswith("space|")])
def test_timesteps_that_the_original_keeps(key):
    _, length, spec = key.split("|")
    np.testing.assert_array_equal(respaced_timesteps(int(length), spec), load("tables")[key])


def test_halves_are_rounded_to_even_steps():
    np.testing.assert_array_equal(respaced_timesteps(6, "3"), [0, 2, 5])


@each_schedule
@pytest.mark.parametrize("spacing", ["logsnr", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 27, 250, 999, 1000])
def test_timesteps_fall_strictly_and_stay_in_the_process(name, spacing, steps):
    timesteps = make_timesteps(make_schedule(SCHEDULES[name]), steps, spacing)
    assert timesteps.shape == (steps,) and timesteps.dtype == np.float64
    assert (np.diff(timesteps) < 0).all()
    assert timesteps.max() <= 999 and timesteps.min() >= 0


@each_schedule
def test_spacing_logsnr(name):
    """Even steps in log-SNR; float32 sets the noisiest level (cosine has -5.77 at t = 997)."""
    schedule = make_schedule(SCHEDULES[name])
    half_log_snr = schedule.half_log_snr(make_timesteps(schedule, 12))
    np.testing.assert_allclose(np.diff(half_log_snr), np.diff(half_log_snr)[0], rtol=1e-9)
    assert half_log_snr[0] == pytest.approx(max(-5.1, schedule.half_log_snr(999)), abs=1e-9)
    assert half_log_snr[-1] == pytest.approx(min(5.05, schedule.half_log_snr(0)), abs=1e-9)


def test_a_number_in_a_string_is_a_number():
    schedule = make_schedule("cosine")
    np.testing.assert_array_equal(make_timesteps(schedule, "25"), make_timesteps(schedule, 25))
    np.testing.assert_array_equal(
        make_timesteps(schedule, "100", "uniform"), respaced_timesteps(1000, "100")[::-1]
    )
    # A respacing string ignores the spacing.
    np.testing.assert_array_equal(make_timesteps(schedule, "fast27"), respaced(schedule, "fast27"))


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "logsnr", "at least one step, not 0"),
        (-3, "uniform", "at least one step, not -3"),
        ("0", "uniform", "at least one step"),
        (1001, "logsnr", "the process has 1000 timesteps"),
        (1001, "uniform", "cannot take 1001 steps"),
        (10, "cosine", "unknown spacing 'cosine'"),
        ("quick", "logsnr", "cannot read steps 'quick'"),
        ("10,", "logsnr", "cannot read steps '10,'"),
        ("10;10", "logsnr", "cannot read steps '10;10'"),
        ("²", "logsnr", "cannot read steps '²'"),
        ("10,0", "logsnr", "0 of 500 timesteps"),
        ("10,-1", "logsnr", "-1 of 500 timesteps"),
        ("600,10", "logsnr", "600 of 500 timesteps"),
        ("ddim", "logsnr", "cannot read steps 'ddim'"),
        ("ddim0", "logsnr", "ddim0 does not exist for 1000 timesteps"),
        ("ddim400", "logsnr", "ddim400 does not exist for 1000 timesteps"),
    ],
)
def test_refused_timesteps(steps, spacing, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_timesteps(make_schedule("cosine"), steps, spacing)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_the_noise(prediction_type):
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 5))
    alpha, sigma = 0.8, 0.6
    target = target_of(prediction_type, x_0, eps, alpha, sigma)
    np.testing.assert_allclose(
        to_eps(prediction_type, target, alpha * x_0 + sigma * eps, alpha, sigma), eps
    )
    np.testing.assert_allclose(
        to_x_0(prediction_type, target, alpha * x_0 + sigma * eps, alpha, sigma), x_0
    )


@pytest.mark.parametrize(("prediction_type", "most"), [("v", 3e-7), ("x_0", 0.0)])
def test_the_clean_image_of_noise_is_exact_without_a_way_through_eps(prediction_type, most):
    """At sigma / alpha = 164, where a rounding error of eps is 164 times as large in x_0."""
    rng = np.random.default_rng(0)
    alpha = np.float32(1 / np.hypot(1, 164))
    sigma = np.float32(np.sqrt(1 - np.float64(alpha) ** 2))
    x_0, eps = rng.uniform(-1, 1, (2, 9999))
    x = np.float32(alpha * x_0 + sigma * eps)
    output = np.float32(target_of(prediction_type, x_0, eps, np.float64(alpha), np.float64(sigma)))
    found = to_x_0(prediction_type, output, x, alpha, sigma)
    through = (x - sigma * to_eps(prediction_type, output, x, alpha, sigma)) / alpha
    assert found.dtype == np.float32
    assert np.abs(found - np.float32(x_0)).max() <= most
    assert np.abs(through - x_0).max() > 4e-6
    network = Network(lambda _, x, t, cond: output[None], {}, prediction_type)
    point = Point(np.float32(1), alpha, sigma, alpha, sigma, {})
    predict = noise_predictor({"main": network}, {"caption": {}}, (CAPTION,))
    np.testing.assert_array_equal(np.asarray(predict(x[None], point).x_0)[0], found)
