"""Order of convergence of the solvers, and the cases that they solve exactly, without noise."""

from functools import partial

import numpy as np
import pytest

from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.diffusion.solvers.multistep import (
    exponential_integrator,
    noise_multistep,
    sa_solver,
    sde_dpm_solver_2m,
)
from glide_jax.diffusion.solvers.table import HISTORY, Table
from glide_jax.diffusion.timesteps import make_timesteps
from tests.support.oracles import (
    SCHEDULE,
    alpha_sigma,
    denoise_gaussian,
    denoise_mixture,
    gaussian_flow,
    interpret,
    mixture_at,
    order,
    rms,
    table_of,
    without_last_step,
)

FLOW = SOLVERS | {
    "dpm++2m-sde": partial(sde_dpm_solver_2m, eta=0.0),
    "sa": partial(sa_solver, eta=0.0),
    "sa-22": partial(sa_solver, eta=0.0, predictor=2, corrector=2),
}


def even(low, high):
    return lambda steps: np.linspace(low, high, steps + 1)


def short_and_long_in_turn(steps):
    """Every second step is twice as long as the one before, to expose a wrong ratio of steps."""
    along = np.cumsum(np.append(0, np.tile([1, 2], steps // 2)))
    return -2.5 + 4.5 * along / along[-1]


def even_in_noise(steps):
    """Even steps in sigma / alpha, for which constant weights are exact."""
    return -np.log(np.linspace(1.5, 0.25, steps + 1))


def exact_history(table: Table, half_log_snr: np.ndarray, known: int) -> np.ndarray:
    """Return the history before row `known` that the exact flow leaves."""
    history = np.zeros((HISTORY, len(mixture_at(0.0))))
    for back in range(known):
        row = table.rows(known - 1 - back)
        x = mixture_at(half_log_snr[known - 1 - back])
        history[back] = row.u * x + row.v * denoise_mixture(x, row)
    return history


@pytest.mark.parametrize(
    ("name", "steps", "spread"),
    [("heun", 4, 5.18), ("heun", 8, 1.40), ("heun", 16, 1.07), ("dpm++2s", 4, 0.69)],
)
def test_the_spread_after_few_steps_is_that_of_the_guide(name, steps, spread):
    """Heun's mean of two slopes leaves noise where a step leads from much noise to little."""
    table = table_of(SOLVERS[name], make_timesteps(SCHEDULE, steps, "logsnr"))
    start = np.hypot(0.5 * table.alpha[0], table.sigma[0])
    end = interpret(table, denoise_gaussian(0.0, 0.5), start).x[-1]
    assert end / 0.5 == pytest.approx(spread, abs=0.005)


# A third-order solver starts with a step of first order, which limits it to second order. Here such
# solvers start from the exact history instead.
@pytest.mark.parametrize(
    ("name", "expected", "levels", "known", "coarse"),
    [
        ("ddim", 1, short_and_long_in_turn, 0, 64),
        ("dpm++2m", 2, short_and_long_in_turn, 0, 64),
        ("dpm++2m", 2, even(-2.5, 2.0), 0, 64),
        ("dpm++2m-sde", 2, short_and_long_in_turn, 0, 64),
        ("dpm++2s", 2, short_and_long_in_turn, 0, 64),
        ("heun", 2, short_and_long_in_turn, 0, 64),
        ("dpm++3m", 3, short_and_long_in_turn, 2, 128),
        ("dpm++3m", 2, even(-2.5, 2.0), 0, 512),
        ("unipc2", 3, short_and_long_in_turn, 0, 64),
        ("unipc3", 4, even(-2.0, 1.0), 0, 64),
        ("sa-22", 2, even(-2.0, 1.0), 0, 256),
        ("sa", 4, even(-2.0, 1.0), 0, 64),
        ("lms", 4, short_and_long_in_turn, 3, 128),
        ("deis", 3, even(-2.5, 2.0), 2, 128),
        ("ipndm", 2, even(-2.5, 2.0), 0, 64),
        ("ipndm", 4, even_in_noise, 3, 128),
        ("plms", 2, even(-2.5, 2.0), 0, 64),
        ("prk", 2, even(-2.5, 2.0), 0, 64),
    ],
)
def test_order_of_convergence(name, expected, levels, known, coarse):
    """The flow of a mixture keeps quantiles: `F_t(x_t) = F_s(x_s)`."""

    def error(steps):
        half_log_snr = levels(steps)
        table = table_of(FLOW[name], SCHEDULE.t_at_half_log_snr(half_log_snr))
        # PLMS and PRK start at the second level and end before the clean image.
        table = table if name in ("plms", "prk") else without_last_step(table)
        start = mixture_at(half_log_snr[table.step[0] + known])
        history = exact_history(table, half_log_snr, known)
        found = interpret(table, denoise_mixture, start, history=history, first=known)
        return rms(found.x[-1] - mixture_at(half_log_snr[-1]))

    assert order(error, coarse) == pytest.approx(expected, abs=0.15)


def test_the_published_third_order_formula_is_of_second_order():
    """Half of the second difference (the code of 2211.01095) costs an order."""

    def published(schedule, timesteps, breaks):
        table = SOLVERS["dpm++3m"](schedule, timesteps, breaks)
        line = exponential_integrator(schedule, timesteps, breaks, predictor=2)
        # The parabola adds nothing but the second difference to the line.
        half = line.E[:, :3] + (table.E[:, :3] - line.E[:, :3]) / 2
        return table._replace(E=np.pad(half, ((0, 0), (0, 1))))

    def error(steps):
        half_log_snr = short_and_long_in_turn(steps)
        table = without_last_step(table_of(published, SCHEDULE.t_at_half_log_snr(half_log_snr)))
        history = exact_history(table, half_log_snr, 2)
        found = interpret(
            table, denoise_mixture, mixture_at(half_log_snr[2]), history=history, first=2
        )
        return rms(found.x[-1] - mixture_at(2.0))

    assert order(error, 128) == pytest.approx(2, abs=0.15)


# --- predictions that are polynomials

UNEVEN = np.array([-2.5, -2.1, -1.2, -0.9, 0.3, 0.5, 1.4])
POLYNOMIAL = np.polynomial.Polynomial([0.3, -0.8, 0.5, 0.2, -0.1])


def of_degree(degree: int) -> np.polynomial.Polynomial:
    return POLYNOMIAL.cutdeg(degree)


def predicted_polynomial(p):
    return lambda x, row: p(np.log(row.alpha / row.sigma)) + 0 * x


def exact_data(p, x, start, end):
    """`x' / sigma' = x / sigma + int e^lambda p(lambda) dlambda`, by parts."""

    def integral(half_log_snr):
        return np.exp(half_log_snr) * sum(
            (-1) ** k * p.deriv(k)(half_log_snr) for k in range(p.degree() + 1)
        )

    (_, s), (_, t) = alpha_sigma(start), alpha_sigma(end)
    return t * (x / s + integral(end) - integral(start))


def after_one_step(solver, denoise, entry, x, at):
    """Return x after step `at` of uneven timesteps and y of the next row, from an exact history."""
    table = table_of(solver, SCHEDULE.t_at_half_log_snr(UNEVEN))
    history = np.zeros((HISTORY, 1))
    for back in range(HISTORY):
        history[back] = entry(table.rows(at - 1 - back))
    B = table.B.copy()
    B[at] = 0  # x is exact: nothing to correct.
    found = interpret(
        table._replace(B=B).rows(slice(0, at + 2)), denoise, [x], history=history, first=at
    )
    return found.x[1, 0], found.y[2, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_predictions_integrate_polynomials_of_lower_degree(count, degree):
    """`p` predictions are exact up to degree `p - 1`, and no further."""
    p, x, at = of_degree(degree), 0.7, 4
    denoise = predicted_polynomial(p)
    solver = partial(exponential_integrator, predictor=count)
    found, _ = after_one_step(solver, denoise, lambda row: denoise(0.0, row), x, at)
    error = abs(found - exact_data(p, x, *UNEVEN[at : at + 2]))
    assert error < 1e-13 if degree < count else error > 1e-6


@pytest.mark.parametrize(
    ("name", "exact", "corrected"),
    [
        ("dpm++2m", 0, None),
        ("dpm++3m", 2, None),
        ("unipc2", 0, 2),
        ("unipc3", 2, 3),
        ("sa", 2, 3),
        ("sa-22", 1, 1),
    ],
)
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_polynomials_that_each_solver_integrates(name, exact, corrected, degree):
    p, x, at = of_degree(degree), 0.7, 4
    denoise = predicted_polynomial(p)
    step, again = after_one_step(FLOW[name], denoise, lambda row: denoise(0.0, row), x, at)
    wanted = exact_data(p, x, *UNEVEN[at : at + 2])
    for found, most in ((step, exact), (again, corrected)):
        if most is not None:
            error = abs(found - wanted)
            assert error < 1e-13 if degree <= most else error > 1e-6


@pytest.mark.parametrize(("variable", "order"), [("rho", 4), ("t", 3), ("step", 4)])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_polynomials_of_the_noise(variable, order, degree):
    """In sigma / alpha (LMS), in time (DEIS), in the step's number (iPNDM)."""
    p, at = of_degree(degree), 4
    table = table_of(SOLVERS["ddim"], SCHEDULE.t_at_half_log_snr(UNEVEN))
    rho = table.sigma / table.alpha
    place = {"rho": rho, "t": table.t / 1000, "step": np.arange(len(rho)) / 4}[variable]

    def eps(row):
        return p(place[row.step])

    def denoise(x, row):
        return (x - row.sigma * eps(row)) / row.alpha

    solver = partial(noise_multistep, order=order, variable=variable)
    found, _ = after_one_step(solver, denoise, eps, 0.7, at)
    # Between the levels: linear in rho where the variable is the step.
    fine = np.linspace(rho[at], rho[at + 1], 200001)
    along = {
        "rho": fine,
        "t": SCHEDULE.t_at_half_log_snr(-np.log(fine)) / 1000,
        "step": (at + (fine - rho[at]) / (rho[at + 1] - rho[at])) / 4,
    }[variable]
    wanted = table.alpha[at + 1] * (0.7 / table.alpha[at] + np.trapezoid(p(along), fine))
    # The time of a noise level has a kink at every whole timestep.
    exact = 1e-6 if variable == "t" else 1e-10
    assert abs(found - wanted) < exact if degree < order else abs(found - wanted) > 1e-5


def test_ipndm_has_the_weights_of_adams_and_bashforth():
    table = table_of(SOLVERS["ipndm"], SCHEDULE.t_at_half_log_snr(UNEVEN))
    a, b = table.alpha[4:6]
    change = b * (table.sigma[5] / b - table.sigma[4] / a)
    np.testing.assert_allclose(table.E[4], change * np.array([55, -59, 37, -9]) / 24, rtol=1e-12)
    assert table.Qx[4] == pytest.approx(b / a, rel=1e-15)


# --- guidance

STD = 0.5


def test_classifier_free_guidance_of_equal_gaussians_flows_as_one():
    """Its mean is `null + scale (cond - null)`; UniPC-3 gives nine digits in 400 steps."""
    cond, null, scale, x = 0.4, -0.3, 3.0, np.linspace(-2, 2, 9)

    def denoise(x, row):
        with_caption, without = (denoise_gaussian(mean, STD)(x, row) for mean in (cond, null))
        return without + scale * (with_caption - without)

    table = table_of(SOLVERS["unipc3"], SCHEDULE.t_at_half_log_snr(np.linspace(-2.5, 2.0, 401)))
    found = interpret(without_last_step(table), denoise, x).x[-1]
    wanted = gaussian_flow(x, null + scale * (cond - null), STD, -2.5, 2.0)
    np.testing.assert_allclose(found, wanted, atol=2e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim", 1), ("dpm++2m", 2), ("dpm++3m", 2), ("dpm++2s", 2), ("heun", 2), ("unipc2", 3),
        ("unipc3", 3), ("sa-22", 2), ("deis", 2), ("lms", 2), ("ipndm", 2),
    ],
)  # fmt: skip
def test_an_interval_of_guidance_keeps_the_order(name, expected):
    """The history is reset at both ends; a history across them would be of first order.

    Each reset starts with a step of first order, which limits the order to two, or to three where
    that step is corrected.
    """
    error = interval_error(FLOW[name], reset=True)
    assert order(error, 256) == pytest.approx(expected, abs=0.25 if expected == 3 else 0.15)
    if name not in ("ddim", "dpm++2s", "heun"):
        carried_over = interval_error(FLOW[name], reset=False)
        assert order(carried_over, 256) < 1.4
        assert carried_over(512) > 4 * error(512)


def interval_error(solver, reset):
    """Return the error after `steps` (a multiple of 8), guided in the middle half of the levels."""
    low, high, x = -2.5, 2.0, np.linspace(-2, 2, 9)
    cond, guided = 0.4, 1.8
    enter, leave = np.linspace(low, high, 9)[[2, 6]]
    wanted = x
    for mean, start, end in ((cond, low, enter), (guided, enter, leave), (cond, leave, high)):
        wanted = gaussian_flow(wanted, mean, STD, start, end)

    def error(steps):
        switches = np.array([steps * 2 // 8, steps * 6 // 8])
        timesteps = SCHEDULE.t_at_half_log_snr(np.linspace(low, high, steps + 1))
        table = without_last_step(table_of(solver, timesteps, switches if reset else ()))

        def denoise(x, row):
            # Guidance belongs to the step, that is to both of its evaluations.
            mean = guided if switches[0] <= row.step < switches[1] else cond
            return denoise_gaussian(mean, STD)(x, row)

        return rms(interpret(table, denoise, x).x[-1] - wanted)

    return error
