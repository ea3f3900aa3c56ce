"""Spacings, and the timesteps optimised on exact statistics of images."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from glide_jax.diffusion.optimised_timesteps import (
    SHIPPED_STEPS,
    Spectrum,
    _optimised,
    image_error,
    load_optimised_timesteps,
    natural_spectrum,
    optimise_timesteps,
    standard_deviations,
)
from glide_jax.diffusion.schedule import Schedule, make_schedule
from glide_jax.diffusion.solvers import SOLVERS, restart
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m, sa_solver
from glide_jax.diffusion.spacings import end_half_log_snrs, respaced, trailing
from glide_jax.diffusion.timesteps import SPACINGS, make_timesteps
from glide_jax.errors import UsageError
from tests.support.commands import environment
from tests.support.oracles import SCHEDULE, denoise_gaussian, mean_and_variance, table_of

each_schedule = pytest.mark.parametrize("name", ["cosine", "linear"])
each_spacing = pytest.mark.parametrize("spacing", [*SPACINGS, "optimised"])

# --- spacings


@each_schedule
@each_spacing
def test_every_spacing_falls_strictly_within_the_process(name, spacing):
    # Timesteps that are not shipped take a while to optimise.
    numbers = (1, *SHIPPED_STEPS) if spacing == "optimised" else (1, 2, 3, 8, 27, 250, 999, 1000)
    for steps in numbers:
        timesteps = make_timesteps(make_schedule(name), steps, spacing)
        assert timesteps.shape == (steps,) and timesteps.dtype == np.float64
        assert (np.diff(timesteps) < 0).all()
        assert timesteps.max() <= 999 and timesteps.min() >= 0


@each_schedule
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 50, 333])
def test_short_processes_are_spaced_too(name, length):
    schedule = make_schedule(name, length)
    for spacing in SPACINGS:
        for steps in range(1, length + 1):
            timesteps = make_timesteps(schedule, steps, spacing)
            assert len(timesteps) == steps and (np.diff(timesteps) < 0).all()
            assert timesteps.min() >= 0 and timesteps.max() <= length - 1


@each_schedule
def test_spacing_karras(name):
    """`(sigma / alpha)^(1/7)` in even steps, from end to end of spacing logsnr (EDM, eq. 5)."""
    schedule = make_schedule(name)
    half_log_snr = schedule.half_log_snr(make_timesteps(schedule, 12, "karras"))
    roots = np.exp(-half_log_snr / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-8)
    assert (half_log_snr[0], half_log_snr[-1]) == pytest.approx(
        end_half_log_snrs(schedule), abs=1e-9
    )


def test_spacing_trailing():
    """Starts at the last timestep (2305.08891); rounding never makes two levels equal."""
    np.testing.assert_array_equal(trailing(SCHEDULE, 5), [999, 799, 599, 399, 199])
    np.testing.assert_array_equal(trailing(SCHEDULE, 3), [999, 666, 332])
    np.testing.assert_array_equal(trailing(make_schedule("cosine", 6), 4), [5, 4, 2, 1])
    np.testing.assert_array_equal(trailing(SCHEDULE, 1000), np.arange(1000)[::-1])


@each_schedule
@pytest.mark.parametrize("spacing", [*SPACINGS, "optimised"])
def test_a_single_step_starts_in_noise(name, spacing):
    schedule = make_schedule(name)
    (level,) = make_timesteps(schedule, 1, spacing)
    assert schedule.half_log_snr(level) < (-2 if spacing == "optimised" else -5)


@each_schedule
def test_few_steps_are_even_in_time_from_the_noisiest_usable_level(name):
    schedule = make_schedule(name)
    for steps in (1, 2, 4, 8):
        timesteps = make_timesteps(schedule, steps, "trailing-capped")
        np.testing.assert_allclose(np.diff(np.append(timesteps, -1)), -(timesteps[0] + 1) / steps)
        assert schedule.half_log_snr(timesteps[0]) == pytest.approx(end_half_log_snrs(schedule)[0])
    # The linear schedule is usable to its last timestep.
    if name == "linear":
        np.testing.assert_array_equal(
            make_timesteps(schedule, 4, "trailing-capped"), trailing(schedule, 4)
        )


def test_more_capped_steps_than_usable_timesteps_are_even():
    schedule = make_schedule("linear", 5)
    timesteps = make_timesteps(schedule, 5, "trailing-capped")
    noisiest = schedule.t_at_half_log_snr(end_half_log_snrs(schedule)[0])
    np.testing.assert_allclose(timesteps, noisiest * np.array([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize("steps", [" 25", "25 ", "\t25\n", "+25", 25.0, np.int64(25)])
def test_a_number_in_any_writing_keeps_the_spacing(steps):
    np.testing.assert_array_equal(make_timesteps(SCHEDULE, steps), make_timesteps(SCHEDULE, 25))


def test_white_space_around_a_respacing_string_changes_nothing():
    np.testing.assert_array_equal(
        make_timesteps(SCHEDULE, " ddim25 "), respaced(SCHEDULE, "ddim25")
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("", "steps is empty: give a number (25), 10,10,3,2,2, ddim50 or fast27"),
        (" \n", "steps is empty: give a number (25), 10,10,3,2,2, ddim50 or fast27"),
        (2.5, "steps is a whole number, not 2.5"),
        (float("nan"), "steps is a whole number, not nan"),
        (float("inf"), "steps is a whole number, not inf"),
        ("-5", "sampling needs at least one step, not -5"),
        ("1001", "cannot take 1001 steps: the process has 1000 timesteps"),
        *(
            (
                f"ddim{count}",
                f"ddim{count} does not exist for 1000 timesteps (no integer stride gives it): "
                f"{instead}",
            )
            for count, instead in [
                (0, "take between 1 and 1000"),
                (-3, "take between 1 and 1000"),
                (1001, "take between 1 and 1000"),
                (999, "write 999"),
            ]
        ),
    ],
)
def test_refused_writings_of_steps(steps, message):
    with pytest.raises(UsageError) as caught:
        make_timesteps(SCHEDULE, steps)
    assert str(caught.value) == message


@each_spacing
@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, "at least one step"), (-1, "at least one step"), (41, "41 steps: the process has 40")],
)
def test_refused_numbers_of_steps(spacing, steps, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_timesteps(make_schedule("cosine", 40), steps, spacing)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "nearest"), [("trailling", "trailing"), ("optimized", "optimised")]
)
def test_an_unknown_spacing_names_the_nearest(name, nearest):
    with pytest.raises(UsageError, match=f"unknown spacing {name!r}, did you mean {nearest!r}"):
        make_timesteps(SCHEDULE, 10, name)
    with pytest.raises(UsageError, match=f"unknown spacing {name!r}, did you mean {nearest!r}"):
        make_timesteps(SCHEDULE, "fast27", name)


# --- exact statistics of images

NATURAL = natural_spectrum(64)


def test_natural_images_have_a_standard_deviation_of_one_half():
    assert NATURAL.share.sum() == pytest.approx(1)
    assert NATURAL.share @ NATURAL.variance == pytest.approx(0.25)
    # Twice the frequency, a quarter of the power; the mean counts as the lowest frequency.
    assert NATURAL.variance[0] == NATURAL.variance[1] == pytest.approx(4 * NATURAL.variance[3])
    # The frequencies that an upsampler adds, at four times the size.
    residual = natural_spectrum(256, known=32)
    assert residual.variance.max() == pytest.approx(natural_spectrum(256).variance[0] / 32**2)


@pytest.mark.parametrize(
    ("steps", "spacing", "errors"),
    [
        (10, "uniform", {"ddim": 121, "ddpm-small": 136, "dpm++2m": 126, "unipc2": 111, "ipndm": 63,
                         "dpm++2m-sde": 212}),
        (10, "logsnr", {"ddim": 123, "ddpm-small": 185, "dpm++2m": 19, "unipc2": 27, "ipndm": 23,
                        "dpm++2m-sde": 19}),
        (15, "logsnr", {"ddim": 83, "ddpm-small": 137, "dpm++2m": 12.8, "unipc2": 11.6,
                        "ipndm": 11.8, "dpm++2m-sde": 25}),
        (25, "logsnr", {"ddim": 50, "ddpm-small": 89, "dpm++2m": 5.1, "unipc2": 2.7, "ipndm": 4.0,
                        "dpm++2m-sde": 13}),
        (100, "uniform", {"ddpm-small": 19.4, "ddpm-large": 10.8, "ddpm": 11.2}),
    ],
)  # fmt: skip
def test_errors_on_natural_images(steps, spacing, errors):
    """In 1/1000; the values are from a separate implementation with other formulas."""
    timesteps = make_timesteps(SCHEDULE, steps, spacing)
    for name, wanted in errors.items():
        found = 1000 * image_error(SCHEDULE, timesteps, SOLVERS[name])
        assert found == pytest.approx(wanted, rel=0.03), name


@pytest.mark.parametrize("name", ["unipc2", "sa", "ddpm-small", "heun", "restart"])
def test_standard_deviations_equal_those_of_the_oracle(name):
    solver = restart(SOLVERS["ddim"], [(0.2, 3.0, 2)]) if name == "restart" else SOLVERS[name]
    table = table_of(solver, make_timesteps(SCHEDULE, 8))
    found = standard_deviations(table, NATURAL)
    for i in (0, 3, 100, -1):
        std = np.sqrt(NATURAL.variance[i])
        _, variance = mean_and_variance(table, denoise_gaussian(0.0, std), 0.0, 1.0)
        assert found[i] == pytest.approx(np.sqrt(variance[-1]), rel=1e-9)


def test_the_best_learned_variance_beats_both_ends_for_one_frequency():
    """On one Gaussian the learned variance is exact: only the starting level adds an error."""
    one = Spectrum(np.array([0.25]), np.array([1.0]))
    timesteps = make_timesteps(SCHEDULE, 10)
    errors = {
        name: image_error(SCHEDULE, timesteps, SOLVERS[name], one)
        for name in ("ddpm", "ddpm-small", "ddpm-large")
    }
    # The last step returns the prediction, without noise.
    assert errors["ddpm"] < 1e-4 < min(errors["ddpm-small"], errors["ddpm-large"])


# --- optimised timesteps


@each_schedule
@pytest.mark.parametrize("steps", SHIPPED_STEPS)
def test_shipped_timesteps_have_small_errors(name, steps):
    """With 8 steps or more, less than a tenth of a level of an 8-bit image, 1/255."""
    schedule = make_schedule(name)
    error = image_error(schedule, make_timesteps(schedule, steps, "optimised"), dpm_solver_2m)
    even = image_error(schedule, make_timesteps(schedule, steps), dpm_solver_2m)
    assert error < even / 4
    if steps >= 8:
        assert error < 0.1 / 255
    if (name, steps) == ("cosine", 10):
        assert error < 0.85e-3


@pytest.mark.parametrize(("name", "steps"), [("cosine", 5), ("linear", 6)])
def test_the_optimiser_reproduces_the_shipped_timesteps(name, steps):
    schedule = make_schedule(name)
    made, shipped = optimise_timesteps(schedule, steps), load_optimised_timesteps(schedule, steps)
    # The minimum is flat: with other rounding (jax 0.11) the optimiser ends elsewhere in it.
    np.testing.assert_allclose(
        schedule.half_log_snr(made), schedule.half_log_snr(shipped), atol=0.3
    )
    errors = [image_error(schedule, timesteps, dpm_solver_2m) for timesteps in (made, shipped)]
    assert errors[0] < 1.1 * errors[1]


def test_other_solvers_and_schedules_are_optimised_on_the_fly():
    for schedule, solver in (
        (SCHEDULE, SOLVERS["unipc2"]),
        (SCHEDULE, partial(sa_solver, eta=0.5)),
        (make_schedule("cosine", 200), SOLVERS["dpm++2m"]),
    ):
        timesteps = make_timesteps(schedule, 6, "optimised", solver=solver)
        assert (np.diff(timesteps) < 0).all() and timesteps.max() <= len(schedule) - 1
        even = image_error(schedule, make_timesteps(schedule, 6), solver)
        assert image_error(schedule, timesteps, solver) < even / 2


def test_timesteps_are_optimised_once():
    """Also where its solver is a new object, as settings make one."""
    first = make_timesteps(SCHEDULE, 4, "optimised", solver=partial(sa_solver, eta=0.25))
    before = _optimised.cache_info().misses
    again = make_timesteps(SCHEDULE, 4, "optimised", solver=partial(sa_solver, eta=0.25))
    np.testing.assert_array_equal(first, again)
    assert _optimised.cache_info().misses == before


def test_many_steps_are_not_optimised():
    with pytest.raises(UsageError, match="1 to 50 steps, not 51: choose spacing logsnr"):
        make_timesteps(SCHEDULE, 51, "optimised")


def test_scipy_is_not_imported_for_shipped_timesteps():
    code = (
        "import sys, glide_jax as g; from glide_jax.diffusion.timesteps import make_timesteps\n"
        "make_timesteps(g.make_schedule('cosine'), 10, 'optimised')\n"
        "assert 'scipy.optimize' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# --- short processes


@pytest.mark.parametrize("steps", [1, 5, 19, 20, 21])
def test_short_linear_schedules_are_capped(steps):
    """With 20 steps the last beta would be 1, with fewer even more."""
    schedule = make_schedule("linear", steps)
    assert schedule.betas.max() <= 0.999 and schedule.alpha_bar.min() > 0
    timesteps = make_timesteps(schedule, steps)
    for name in ("dpm++2m", "ddpm", "ipndm"):
        table = SOLVERS[name](schedule, timesteps, np.zeros(steps, bool))
        assert all(np.isfinite(column).all() for column in table)


def test_longer_linear_schedules_are_not_capped():
    for steps in (21, 1000, 4000):
        scale = 1000 / steps
        wanted = np.linspace(scale * 1e-4, scale * 0.02, steps)
        np.testing.assert_array_equal(make_schedule("linear", steps).betas, wanted)


def test_a_beta_of_one_is_refused():
    with pytest.raises(UsageError, match="betas must be"):
        Schedule([0.1, 1.0])


def test_respacing_strings_ignore_the_spacing():
    for spacing in (*SPACINGS, "optimised"):
        np.testing.assert_array_equal(
            make_timesteps(SCHEDULE, "fast27", spacing), respaced(SCHEDULE, "fast27")
        )
