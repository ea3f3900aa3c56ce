"""Solvers that add noise: exact mean and variance of a Gaussian, without sampling."""

from functools import partial

import numpy as np
import pytest

from glide_jax.diffusion.solvers import SOLVERS, repaint, restart
from glide_jax.diffusion.solvers.first_order import ddim, ddpm
from glide_jax.diffusion.solvers.multistep import sa_solver, sde_dpm_solver_2m
from glide_jax.diffusion.timesteps import make_timesteps
from tests.support.oracles import (
    SCHEDULE,
    alpha_sigma,
    best_fraction,
    denoise_gaussian,
    interpret,
    levels_after,
    log_snr_timesteps,
    mean_and_variance,
    order,
    table_of,
    without_last_step,
)

POINT = 0.3
INTERVAL = (0.2, 3.0, 2)
# A variance fixed at beta is right for a unit Gaussian, not for a point.
ON_A_POINT = {name: solver for name, solver in SOLVERS.items() if name != "ddpm-large"} | {
    "ddim-half": partial(ddim, eta=0.5),
    "ddim-one": partial(ddim, eta=1.0),
    "sde-half": partial(sde_dpm_solver_2m, eta=0.5),
    "sa-22": partial(sa_solver, predictor=2, corrector=2),
}


def assert_gaussian_at_each_row(table, mean, std, rtol=1e-11, **more):
    """x starts as `N(mean, std^2)` noised to the first level, and is that at every later level."""
    a, s = table.alpha[0], table.sigma[0]
    denoise = denoise_gaussian(mean, std)
    found = mean_and_variance(table, denoise, a * mean, a**2 * std**2 + s**2, **more)
    alpha, sigma = levels_after(table)
    np.testing.assert_allclose(found[0], alpha * mean, atol=1e-11)
    np.testing.assert_allclose(found[1], alpha**2 * std**2 + sigma**2, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("steps", [3, 7, 24])
@pytest.mark.parametrize("name", ON_A_POINT)
def test_a_point_is_exact_in_any_number_of_steps(name, steps):
    """`x_t = alpha_t c + sigma_t / sigma_s (x_s - alpha_s c)`, or as much fresh noise."""
    table = table_of(ON_A_POINT[name], make_timesteps(SCHEDULE, steps))
    assert_gaussian_at_each_row(table, POINT, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("plms", "prk")])
def test_the_last_step_returns_the_prediction(name, steps):
    """It adds no noise, also in a run of a single step."""
    table = table_of(SOLVERS[name], make_timesteps(SCHEDULE, steps))
    noise = np.random.default_rng(0).normal(size=len(table.t))
    predictions = []

    def denoise(x, row):
        predictions.append(np.tanh(x))
        return predictions[-1]

    found = interpret(table, denoise, 1.3, noise).x[-1]
    assert found == pytest.approx(predictions[-1], abs=1e-12)


def test_plms_leaves_the_noise_of_the_cleanest_level():
    table = table_of(SOLVERS["plms"], make_timesteps(SCHEDULE, 9))
    alpha, sigma = levels_after(table)
    assert (alpha[-1], sigma[-1]) == pytest.approx(tuple(alpha_sigma(5.047)), rel=1e-3)


# --- ancestral sampling


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("variance", "mean", "std"), [("learned", 0.4, 0.3), ("small", 0.4, 0.0), ("large", 0.0, 1.0)]
)
def test_ancestral_sampling_of_a_gaussian_is_exact_in_any_number_of_steps(
    variance, mean, std, steps
):
    """With the best variance: "small" for a point, "large" for a unit Gaussian (DDPM, sec. 3.2)."""
    table = table_of(partial(ddpm, variance=variance), log_snr_timesteps(-4.0, 1.5, steps))
    table = without_last_step(table)
    assert_gaussian_at_each_row(table, mean, std, variance_fraction=best_fraction(std))


def test_a_fixed_variance_scales_the_score_too():
    """The network's variance output has no effect."""
    timesteps = make_timesteps(SCHEDULE, 6)
    learned, small, large = (
        table_of(SOLVERS[name], timesteps) for name in ("ddpm", "ddpm-small", "ddpm-large")
    )
    for table, wanted in ((small, learned.log_beta_tilde), (large, learned.log_beta)):
        np.testing.assert_array_equal(table.log_beta, wanted)
        np.testing.assert_array_equal(table.log_beta_tilde, wanted)
        np.testing.assert_allclose(table.s[:-1], np.exp(wanted[:-1] / 2), rtol=1e-15)
        assert table.s[-1] == 0 and not table.s_learned.any()


# --- weak order: convergence of the variance


@pytest.mark.parametrize(
    ("solver", "expected", "coarse"),
    [
        (partial(ddim, eta=1.0), 1, 64),
        (partial(ddim, eta=0.5), 1, 64),
        (SOLVERS["ddpm-small"], 1, 64),
        (SOLVERS["ddpm-large"], 1, 64),
        (SOLVERS["dpm++2m-sde"], 2, 64),
        (partial(sde_dpm_solver_2m, eta=0.5), 2, 64),
        (SOLVERS["sa"], 2, 256),
        (partial(sa_solver, predictor=2, corrector=2), 2, 256),
    ],
)
def test_weak_order_of_stochastic_solvers(solver, expected, coarse):
    """The mean of a Gaussian is exact in any number of steps; the variance shows the order."""
    mean, std, low, high = 0.4, 0.5, -1.0, 1.0
    (a, s), (b, t) = alpha_sigma(low), alpha_sigma(high)

    def error(steps):
        table = without_last_step(table_of(solver, log_snr_timesteps(low, high, steps)))
        assert table.s.all()
        start = a**2 * std**2 + s**2
        means, variances = mean_and_variance(table, denoise_gaussian(mean, std), a * mean, start)
        assert means[-1] == pytest.approx(b * mean, abs=1e-12)
        return abs(variances[-1] - (b**2 * std**2 + t**2))

    assert order(error, coarse) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", ["dpm++2m-sde", "sa"])
def test_without_noise_they_solve_the_flow(name):
    timesteps = make_timesteps(SCHEDULE, 9)
    table = table_of(partial(SOLVERS[name], eta=0.0), timesteps)
    other = table_of(SOLVERS["dpm++2m"], timesteps)
    assert not table.s.any()
    if name == "dpm++2m-sde":
        for found, wanted in zip(table, other, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_sa_solver_adds_noise_in_the_middle_of_the_process():
    """Where 200 <= t <= 800; a larger eta adds more."""
    timesteps = np.array([900.0, 801, 800, 500, 200, 199, 20])
    table, half = (table_of(partial(sa_solver, eta=eta), timesteps) for eta in (1.0, 0.5))
    np.testing.assert_array_equal(table.s > 0, [False, False, True, True, True, False, False])
    assert (half.s[2:5] < table.s[2:5]).all() and (half.s[2:5] > 0).all()


# --- Restart and RePaint


def test_repaint_takes_each_jump_so_many_times():
    table = table_of(repaint(SOLVERS["ddim"], jump=2, resamplings=3), make_timesteps(SCHEDULE, 6))
    assert table.step.tolist() == [0, 1, 2, *[1, 2] * 2, 3, 4, *[3, 4] * 2, 5]
    np.testing.assert_array_equal(table.index, np.arange(14))
    assert np.flatnonzero(table.keep == 0).tolist() == [3, 5, 9, 11]


def test_restart_uses_the_nearest_timesteps():
    """In sigma / alpha; intervals come in any order, and all rows of a step are repeated."""
    timesteps = SCHEDULE.t_at_half_log_snr([-4.0, -2.0, -1.0, 0.0, 1.0, 3.0])
    intervals = [(np.exp(-1.1), np.exp(0.2), 1), (np.exp(1.1), np.exp(2.2), 2)]
    table = table_of(restart(SOLVERS["ddim"], intervals), timesteps)
    assert table.step.tolist() == [0, 1, 1, 1, 2, 3, 3, 4, 5]
    table = table_of(restart(SOLVERS["heun"], intervals[:1]), timesteps)
    assert table.step.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5]
    assert np.flatnonzero(table.keep == 0).tolist() == [8]


@pytest.mark.parametrize("name", ON_A_POINT)
@pytest.mark.parametrize(
    "wrap", [partial(restart, intervals=[INTERVAL]), partial(repaint, jump=3, resamplings=2)]
)
def test_jumps_end_at_the_right_noise_level(wrap, name):
    table = table_of(wrap(ON_A_POINT[name]), make_timesteps(SCHEDULE, 8))
    plain = table_of(ON_A_POINT[name], make_timesteps(SCHEDULE, 8))
    assert len(table.t) > len(plain.t) and (np.diff(table.alpha) < 0).any()
    assert_gaussian_at_each_row(table, POINT, 0.0)


def test_a_jump_resets_the_history():
    """The rows after a jump are those of a solver that starts there."""
    timesteps = make_timesteps(SCHEDULE, 8)
    table = table_of(restart(SOLVERS["unipc3"], [INTERVAL]), timesteps)
    jump = int(np.flatnonzero(np.diff(table.step) < 0)[-1]) + 1
    top = table.step[jump]
    alone = SOLVERS["unipc3"](SCHEDULE, timesteps[top:], np.zeros(8 - top, bool))
    for name in ("t", "B", "Px", "Py", "Qx", "Qy", "E", "S"):
        np.testing.assert_allclose(
            getattr(table, name)[jump:], getattr(alone, name), rtol=1e-12, atol=1e-13
        )


def test_breaks_stay_when_their_step_is_repeated():
    timesteps = make_timesteps(SCHEDULE, 8)
    again = repaint(SOLVERS["dpm++2m"], jump=4, resamplings=2)
    first_order = table_of(again, timesteps, breaks=[5])
    second = first_order.E[:, 1] != 0
    assert not second[first_order.step == 5].any() and second[first_order.step == 6].all()
    assert table_of(again, timesteps).E[first_order.step == 5, 1].all()


@pytest.mark.parametrize(
    ("std", "steps", "rtol"), [(0.0, 9, 1e-11), (1.0, 9, 1e-11), (0.3, 9, 2e-2), (0.3, 33, 6e-3)]
)
def test_a_learned_variance_and_the_noise_of_a_jump_add_up(std, steps, rtol):
    """Exact at both ends of the learned range; between them a logarithm is taken as linear."""
    table = table_of(
        repaint(SOLVERS["ddpm"], jump=2, resamplings=3), make_timesteps(SCHEDULE, steps)
    )
    table = without_last_step(table)
    assert_gaussian_at_each_row(table, 0.0, std, rtol, variance_fraction=best_fraction(std))


def test_a_jump_scales_the_score_by_the_learned_variance():
    """It is scaled like the mean; the fresh noise has no effect."""
    timesteps = make_timesteps(SCHEDULE, 9)
    plain = table_of(SOLVERS["ddpm"], timesteps)
    table = table_of(repaint(SOLVERS["ddpm"], jump=1, resamplings=2), timesteps)
    for i in np.flatnonzero(np.diff(table.step) == 0):
        row, other = table.rows(i), plain.rows(table.step[i])
        moved = row.mean_per_gradient * np.exp((row.log_beta + row.log_beta_tilde) / 2)
        pushed = np.exp((other.log_beta + other.log_beta_tilde) / 2)
        assert moved / pushed == pytest.approx(table.alpha[i + 1] / row.next_alpha, rel=1e-12)
