"""The solvers where the answer is known exactly: no network, no reference, float64.

Of a data distribution that is a mixture of Gaussians, the best possible denoiser is known in closed
form, and so is the flow of the probability-flow ODE; of a single Gaussian also what stochastic
samplers must end with.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from glide_jax.diffusion import sampling
from glide_jax.diffusion.grids import make_grid, respaced
from glide_jax.diffusion.guidance import Network, classifier_free
from glide_jax.diffusion.sampling import plan, sample, stream
from glide_jax.diffusion.schedule import make_schedule, posterior
from glide_jax.diffusion.solvers import ddim, ddpm, dpm_solver_2m, levels, step_betas
from tests.golden import rows

SCHEDULE = make_schedule("cosine")
LOG_SNR = SCHEDULE.log_snr(np.arange(len(SCHEDULE)))


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """The shipped sampler in float64: tables are no longer rounded on their way to the device."""
    monkeypatch.setattr(sampling, "_to_device_dtype", lambda column: column)
    with jax.enable_x64(True):
        yield


def alpha_sigma(log_snr):
    return (1 + jnp.exp(-2 * log_snr)) ** -0.5, (1 + jnp.exp(2 * log_snr)) ** -0.5


@cache
def as_network(denoise) -> dict:
    """`denoise(x, alpha, sigma, cond) -> x_0` as a network that predicts noise at `t`."""

    def eps(log_snr, x, t, cond):
        shape = (-1, 1, 1, 1)
        alpha, sigma = alpha_sigma(jnp.interp(t, jnp.arange(len(log_snr)), log_snr).reshape(shape))
        return (x - alpha * denoise(x, alpha, sigma, cond)) / sigma

    return {"main": Network(eps, LOG_SNR)}


def log_snr_grid(low, high, steps) -> np.ndarray:
    return SCHEDULE.at_log_snr(np.linspace(low, high, steps + 1))


def solve(networks, grid, solver, x, guidance=(), conds=None) -> np.ndarray:
    """`x (B,)` from the first level of a grid to its last; not on to the clean picture, whither
    every solver takes one step of first order."""
    run = rows(plan(SCHEDULE, grid, solver, guidance), slice(0, -1))
    x = jnp.asarray(x, jnp.float64)[:, None, None, None]
    tape = jnp.zeros((len(run), *x.shape))
    conds = {"cond": jnp.zeros_like(x)} if conds is None else conds
    return np.asarray(sample(networks, conds, run, x, tape).x).ravel()


def order(error, coarse=64) -> float:
    """How fast `error(steps)` falls when steps are doubled."""
    return float(np.log2(error(coarse) / error(2 * coarse)))


# --- deterministic: the flow of a mixture

MEANS, STDS, WEIGHTS = (
    np.array([-1.0, 0.1, 0.8]),
    np.array([0.2, 0.1, 0.3]),
    np.array([0.3, 0.3, 0.4]),
)


def denoise_mixture(x, alpha, sigma, cond):
    """`E[x_0 | x_t]`, each mode's posterior mean weighted by its posterior probability."""
    x = x[..., None]
    alpha, sigma = alpha[..., None], sigma[..., None]
    variance = alpha**2 * STDS**2 + sigma**2
    logit = jnp.log(WEIGHTS) - 0.5 * jnp.log(variance) - (x - alpha * MEANS) ** 2 / (2 * variance)
    mean = MEANS + alpha * STDS**2 / variance * (x - alpha * MEANS)
    return (jax.nn.softmax(logit) * mean).sum(-1)


def mixture_quantiles(log_snr, u) -> np.ndarray:
    """Where the mixture, noised to this level, has cumulative probability `u`; by bisection."""
    alpha, sigma = map(np.asarray, alpha_sigma(log_snr))
    std = np.sqrt(alpha**2 * STDS**2 + sigma**2)
    low, high = np.full_like(u, -20.0), np.full_like(u, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = (WEIGHTS * ndtr((middle[:, None] - alpha * MEANS) / std)).sum(-1) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


@pytest.mark.parametrize(("solver", "expected"), [(ddim, 1), (dpm_solver_2m, 2)])
def test_order_of_convergence(solver, expected):
    """The flow keeps quantiles: `F_t(x_t) = F_s(x_s)`; on steps that are in turn short and long."""
    u, low, high = np.linspace(0.02, 0.98, 33), -2.5, 2.0
    start, wanted = mixture_quantiles(low, u), mixture_quantiles(high, u)

    def error(steps):
        along = np.cumsum(np.append(0, np.tile([1, 2], steps // 2)))
        grid = SCHEDULE.at_log_snr(low + (high - low) * along / along[-1])
        found = solve(as_network(denoise_mixture), grid, solver, start)
        return np.sqrt(((found - wanted) ** 2).mean())

    assert order(error) == pytest.approx(expected, abs=0.15)


def test_2m_is_the_published_midpoint_form():
    """`D = (1 + 1/2r) D_i - 1/2r D_{i-1}`, `r = h_{i-1} / h_i` (2211.01095, algorithm 2): with r
    upside down its errors would cancel from step to step, and the order stay 2."""
    log_snr = np.array([-3.0, -2.0, -1.8, 0.5, 1.0, 3.0])
    grid = SCHEDULE.at_log_snr(log_snr)
    table = dpm_solver_2m(SCHEDULE, grid, np.zeros(6, bool))
    alpha, sigma = map(np.asarray, alpha_sigma(log_snr))
    for i in range(1, 5):
        h, before = log_snr[i + 1] - log_snr[i], log_snr[i] - log_snr[i - 1]
        half = 1 / (2 * before / h)
        weight = alpha[i + 1] * (1 - np.exp(-h))
        wanted = [weight * (1 + half), -weight * half, 0, 0]
        np.testing.assert_allclose(table.E[i], wanted, rtol=1e-9)
        assert table.Qx[i] == pytest.approx(sigma[i + 1] / sigma[i], rel=1e-9)


# --- deterministic: guidance within a span

SPREAD = 0.5


def denoise_gaussian(x, alpha, sigma, cond):
    """`E[x_0 | x_t]` of `N(cond, SPREAD^2)`."""
    return cond + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * cond)


def gaussian_flow(x, mean, start, end):
    (a, s), (b, t) = (map(np.asarray, alpha_sigma(log_snr)) for log_snr in (start, end))
    growth = np.sqrt((b**2 * SPREAD**2 + t**2) / (a**2 * SPREAD**2 + s**2))
    return b * mean + (x - a * mean) * growth


def never_anew(schedule, grid, breaks):
    return dpm_solver_2m(schedule, grid, np.zeros_like(breaks))


@pytest.mark.parametrize(
    ("solver", "lowest", "highest"), [(dpm_solver_2m, 1.85, 2.15), (never_anew, 0.8, 1.3)]
)
def test_a_span_of_guidance_keeps_second_order(solver, lowest, highest):
    """Guided, equal Gaussians flow as one at `null + scale (cond - null)`; the flow has a kink at
    either end of the span, and a solver that looks back over it falls to first order."""
    low, high, enter, leave, scale = -2.5, 2.0, -1.375, 0.875, 3.0
    cond, null, x = 0.4, -0.3, np.linspace(-2, 2, 9)
    wanted = x
    for mean, start, end in (
        (cond, low, enter),
        (null + scale * (cond - null), enter, leave),
        (cond, leave, high),
    ):
        wanted = gaussian_flow(wanted, mean, start, end)
    # A hair more than the levels themselves, which interpolation rounds.
    guided = classifier_free(scale=scale).within(*np.exp([-leave + 1e-9, -enter + 1e-9]))
    conds = {name: jnp.full((9, 1, 1, 1), m) for name, m in (("cond", cond), ("null", null))}

    def error(steps):
        grid = log_snr_grid(low, high, steps)
        found = solve(as_network(denoise_gaussian), grid, solver, x, [guided], conds)
        return np.sqrt(((found - wanted) ** 2).mean())

    assert lowest < order(error) < highest


# --- every solver: a point, and the last step

POINT = 0.3


def denoise_point(x, alpha, sigma, cond):
    return jnp.full_like(x, POINT)


@pytest.mark.parametrize("solver", [ddim, dpm_solver_2m])
def test_a_single_point_is_reached_along_a_straight_line(solver):
    """`x_t = alpha_t c + sigma_t / sigma_s (x_s - alpha_s c)`, exactly, in however few steps."""
    grid, x = make_grid(SCHEDULE, 7), 1.7
    networks = as_network(denoise_point)
    alpha, sigma, _ = levels(SCHEDULE, grid)
    states = stream(
        networks,
        {"cond": jnp.zeros(1)},
        plan(SCHEDULE, grid, solver),
        jnp.full((1, 1, 1, 1), x),
        jnp.zeros((7, 1, 1, 1, 1)),
    )
    found = [state.x.item() for _, state in states]
    wanted = alpha[1:] * POINT + sigma[1:] / sigma[0] * (x - alpha[0] * POINT)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(
    "solver",
    [ddim, partial(ddim, eta=1.0), partial(ddim, eta=0.5), dpm_solver_2m, ddpm,
     partial(ddpm, variance="small"), partial(ddpm, variance="large")],
)  # fmt: skip
def test_the_last_step_returns_the_prediction(solver, steps):
    """Without noise, whatever was drawn."""
    networks = as_network(denoise_point)
    run = plan(SCHEDULE, make_grid(SCHEDULE, steps), solver)
    noise = jax.random.normal(jax.random.key(0), (steps, 1, 1, 1, 1))
    state = sample(networks, {"cond": jnp.zeros(1)}, run, jnp.ones((1, 1, 1, 1)), noise)
    assert state.x.item() == pytest.approx(POINT, abs=1e-12)


# --- stochastic: what a Gaussian must end with


def spread(networks, grid, solver) -> tuple[float, float, float]:
    """Weight of the start, constant, and variance of the noise in what a linear sampler returns.

    Picture 0 has neither start nor noise, picture 1 a start of one, each further one the noise of
    one row: by linearity these are all there is to know.
    """
    run = rows(plan(SCHEDULE, grid, solver), slice(0, -1))
    n = len(run)
    x = jnp.zeros((n + 2, 1, 1, 1)).at[1].set(1.0)
    tape = jnp.zeros((n, n + 2, 1, 1, 1)).at[jnp.arange(n), 2 + jnp.arange(n)].set(1.0)
    end = np.asarray(sample(networks, {"cond": jnp.zeros(n + 2)}, run, x, tape).x).ravel()
    return end[1] - end[0], end[0], ((end[2:] - end[0]) ** 2).sum()


def with_best_variance(grid, mean, std):
    """A network that also predicts `log(beta_tilde + c^2 Var[x_0 | x_t])`, as a fraction."""
    q = posterior(step_betas(SCHEDULE, grid))
    alpha, sigma, _ = levels(SCHEDULE, grid)
    a, s = alpha[-2::-1], sigma[-2::-1]
    best = q.beta_tilde + q.mean_x_0**2 * std**2 * s**2 / (a**2 * std**2 + s**2)
    best[0] = q.beta_tilde[1]  # Of the step into the clean picture, which has no noise.
    frac = (np.log(best) - q.log_beta_tilde) / (q.log_beta - q.log_beta_tilde)

    def fn(params, x, t, cond):
        rising, v, log_snr = params
        a, s = alpha_sigma(jnp.interp(t, jnp.arange(len(log_snr)), log_snr)[:, None, None, None])
        x_0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        v = jnp.interp(t, rising, v)[:, None, None, None]
        return jnp.concatenate([(x - a * x_0) / s, jnp.broadcast_to(v, x.shape)], axis=-1)

    return {"main": Network(fn, (grid[::-1], 2 * frac - 1, LOG_SNR))}


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("variance", "mean", "std"), [("learned", 0.4, 0.3), ("small", 0.4, 0.0), ("large", 0.0, 1.0)]
)
def test_ancestral_sampling_of_a_gaussian_is_exact_in_any_number_of_steps(
    variance, mean, std, steps
):
    """With the best variance; "small" is the best of a point, "large" of a unit Gaussian
    (DDPM, sec. 3.2)."""
    grid = log_snr_grid(-4.0, 1.5, steps)
    networks = with_best_variance(grid, mean, std)
    of_start, constant, of_noise = spread(networks, grid, partial(ddpm, variance=variance))
    alpha, sigma, _ = levels(SCHEDULE, grid)
    (a, b), (s, t) = alpha[[0, -2]], sigma[[0, -2]]
    assert of_start * a * mean + constant == pytest.approx(b * mean, abs=1e-12)
    found = of_start**2 * (a**2 * std**2 + s**2) + of_noise
    assert found == pytest.approx(b**2 * std**2 + t**2, rel=1e-11)


@pytest.mark.parametrize("spacing", ["1", "6", "8", "27", "100", "ddim50"])
def test_ddim_at_eta_one_is_ancestral_sampling_with_the_small_variance(spacing):
    """(2010.02502, sec. 4.1); and no rounding makes it NaN, as the original's does."""
    grid = respaced(SCHEDULE, spacing)
    breaks = np.zeros(len(grid), bool)
    one = ddim(SCHEDULE, grid, breaks, eta=1.0)
    other = ddpm(SCHEDULE, grid, breaks, variance="small")
    for name in ("Qx", "E", "s"):
        found, wanted = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7, err_msg=name)
    rounded = ddim(SCHEDULE, grid, breaks, eta=1.0, released=True)
    assert all(np.isfinite(column).all() for column in rounded)
