"""Every solver in the compiled sampler, and the contents of the tables.

Accuracy and order of the solvers: see test_solver_orders.py and test_solver_stochastic.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion import sampling
from glide_jax.diffusion.guidance import Network, classifier_free
from glide_jax.diffusion.sampling import make_plan, run_rows, stream_plan
from glide_jax.diffusion.solvers import SOLVERS, repaint, restart
from glide_jax.diffusion.solvers.first_order import ddim, ddpm
from glide_jax.diffusion.solvers.multistep import unipc
from glide_jax.diffusion.solvers.table import HISTORY, Table
from glide_jax.diffusion.spacings import respaced
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import UsageError
from tests.support.oracles import SCHEDULE, alpha_sigma, interpret, table_of

EVERY = SOLVERS | {
    "restart": restart(SOLVERS["unipc3"], [(0.05, 20.0, 2)]),
    "repaint": repaint(SOLVERS["ddpm"], jump=3, resamplings=2),
    "released": partial(ddim, eta=1.0, float32_alpha_bar=True),
}

# --- the compiled sampler

PUSH = {"caption": 0.3, "null": -0.2}
SCALE, INTERVAL = 3.0, (0.3, 4.0)


def output(xp, x, t, push):
    """Return noise and variance output in [-1, 1] of a toy network; `xp` is numpy or jax.numpy."""
    return xp.tanh(0.8 * x + t / 2000 + push), xp.sin(2 * x)


def toy(params, x, t, cond):
    return jnp.concatenate(output(jnp, x, t[:, None, None, None], cond), axis=-1)


TOY = {"main": Network(toy, None)}
X = np.linspace(-2, 2, 5)[:, None, None, None]


def conds():
    return {name: jnp.full((5, 1, 1, 1), push) for name, push in PUSH.items()}


@pytest.fixture
def double(monkeypatch):
    """Run the sampler in float64: tables are not rounded on their way to the device."""
    monkeypatch.setattr(sampling, "_to_device_dtype", lambda column: column)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", EVERY)
def test_the_compiled_sampler_runs_the_recursion_of_the_table(name, double):
    """With guidance in an interval (of whole steps), a learned variance, and noise."""
    timesteps = make_timesteps(SCHEDULE, 8)
    run = make_plan(SCHEDULE, timesteps, EVERY[name], [classifier_free(SCALE).within(*INTERVAL)])
    noise = np.random.default_rng(0).normal(size=(len(run), *X.shape))
    level = np.exp(-SCHEDULE.half_log_snr(timesteps))

    def denoise(x, row):
        eps = {name: output(np, x, row.t, push)[0] for name, push in PUSH.items()}
        acts = INTERVAL[0] < level[row.step] <= INTERVAL[1]
        guided = eps["null"] + (SCALE if acts else 1) * (eps["caption"] - eps["null"])
        return (x - row.sigma * guided) / row.alpha

    def fraction(x, row):
        return (output(np, x, row.t, PUSH["caption"])[1] + 1) / 2

    # The table of the plan: there the solver is reset at both ends of the interval.
    wanted = interpret(run.table, denoise, X, noise, variance_fraction=fraction)
    states = [
        state for _, state in stream_plan(TOY, conds(), run, jnp.asarray(X), jnp.asarray(noise))
    ]
    for field in ("x", "y", "history"):
        found = np.stack([getattr(state, field) for state in states])
        np.testing.assert_allclose(found, getattr(wanted, field)[1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_consistency_table(steps):
    """`x' = alpha' x_0 + sigma' z`: no memory of x, and no noise in the last row."""
    table = table_of(SOLVERS["consistency"], make_timesteps(SCHEDULE, steps, "trailing-capped"))
    assert len(table.t) == steps
    assert not any(c.any() for c in (table.Qx, table.Qy, table.Py, table.Px, table.s_learned))
    np.testing.assert_array_equal(table.E[:, 0], np.append(table.alpha[1:], 1))
    np.testing.assert_array_equal(table.s, np.append(table.sigma[1:], 0))
    assert not table.E[:, 1:].any()


def test_samplers_share_a_compiled_program():
    """All tables have the same columns: one program serves all with the same number of rows."""
    x, keys = jnp.asarray(X, jnp.float32), jax.random.split(jax.random.key(0), 5)

    def generate(name):
        run = make_plan(
            SCHEDULE, make_timesteps(SCHEDULE, 8), EVERY[name], [classifier_free(SCALE)]
        )
        return list(stream_plan(TOY, conds(), run, x, keys))[-1][1].x

    generate("dpm++2m")
    compiled = run_rows._cache_size()
    for name in EVERY:
        assert np.isfinite(generate(name)).all()
    assert run_rows._cache_size() == compiled


# --- tables


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [3, 4, 25])
def test_tables_are_finite_and_have_the_same_columns(name, steps):
    if name == "repaint":
        steps += 1
    table = table_of(EVERY[name], make_timesteps(SCHEDULE, steps))
    assert isinstance(table, Table)
    n = len(table.t)
    for field, column in table._asdict().items():
        shape = {"S": (HISTORY, HISTORY + 1), "B": (HISTORY,), "E": (HISTORY,)}.get(field, ())
        assert column.shape == (n, *shape) and np.isfinite(column).all(), field
        integer = field in ("index", "step", "guidance_set")
        assert column.dtype == (int if integer else np.float64), field
    np.testing.assert_array_equal(table.index, np.arange(n))
    # A gradient moves x_0 at the row's own level, or the mean of ancestral sampling.
    ancestral = name.startswith("ddpm") or name == "repaint"
    wanted = 0 * table.t if ancestral else table.sigma**2 / table.alpha
    np.testing.assert_allclose(table.x_0_per_gradient, wanted, rtol=1e-12)
    assert (table.mean_per_gradient > 0).all() if ancestral else not table.mean_per_gradient.any()


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("dpm++2m", 9), ("unipc3", 9), ("sa", 9), ("heun", 17), ("dpm++2s", 17), ("plms", 16),
     ("prk", 28), ("restart", 17), ("repaint", 15)],
)  # fmt: skip
def test_evaluations_of_nine_levels(name, evaluations):
    assert len(table_of(EVERY[name], make_timesteps(SCHEDULE, 9)).t) == evaluations


def test_all_evaluations_of_a_step_have_its_next_level():
    for name in ("heun", "dpm++2s", "prk"):
        table = table_of(SOLVERS[name], make_timesteps(SCHEDULE, 5))
        for step in set(table.step):
            assert len(set(table.next_alpha[table.step == step])) == 1


def test_2m_is_the_published_midpoint_form():
    """`D = (1 + 1/2r) D_i - 1/2r D_{i-1}`, `r = h_{i-1} / h_i`  (2211.01095, algorithm 2).

    The order of convergence cannot show it: with r inverted the errors would cancel from step to
    step, and the order would still be 2.
    """
    half_log_snr = np.array([-3.0, -2.0, -1.8, 0.5, 1.0, 3.0])
    table = table_of(SOLVERS["dpm++2m"], SCHEDULE.t_at_half_log_snr(half_log_snr))
    alpha, sigma = alpha_sigma(half_log_snr)
    for i in range(1, 5):
        h, before = half_log_snr[i + 1] - half_log_snr[i], half_log_snr[i] - half_log_snr[i - 1]
        half = 1 / (2 * before / h)
        weight = alpha[i + 1] * (1 - np.exp(-h))
        wanted = [weight * (1 + half), -weight * half, 0, 0]
        np.testing.assert_allclose(table.E[i], wanted, rtol=1e-9)
        assert table.Qx[i] == pytest.approx(sigma[i + 1] / sigma[i], rel=1e-9)


@pytest.mark.parametrize("p", [2, 3])
def test_unipc_is_the_published_form(p):
    """bh2 of 2302.04867: `x - alpha B(h) sum_m rho_m (D_m - D_0) / r_m`.

    The rho solve the paper's linear system in phi functions; a single rho, that of the predictor of
    order 2 and of the first corrector, is 1/2.
    """
    half_log_snr = np.array([-3.0, -2.0, -1.6, 0.2, 0.9, 2.0])
    table = table_of(partial(unipc, order=p), SCHEDULE.t_at_half_log_snr(half_log_snr))
    alpha, _ = alpha_sigma(half_log_snr)

    def rho(r, h):
        """For data prediction, where h has the opposite sign."""
        phi, factorial, b = np.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(r) + 1):
            b.append(phi * factorial / np.expm1(-h))
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        return np.linalg.solve(np.vander(r, increasing=True).T, b) if len(r) > 1 else [0.5]

    def weights(r, h, to):
        """Return the weights on D_0 and on each D_m in `x' - (sigma' / sigma) x`."""
        B = np.expm1(-h)
        each = -alpha[to] * B * np.array(rho(r, h)) / r
        return np.append(-alpha[to] * B - each.sum(), each)

    for i in range(p - 1, 4):
        h = half_log_snr[i + 1] - half_log_snr[i]
        r = (half_log_snr[i - np.arange(1, p)] - half_log_snr[i]) / h
        step = weights(r, h, i + 1)
        np.testing.assert_allclose(table.E[i, :p], step, rtol=1e-8)
        again = np.roll(weights(np.append(r, 1.0), h, i + 1), 1)  # D' first.
        found = table.B[i + 1] + np.append(0, table.E[i, :3])
        np.testing.assert_allclose(found[: p + 1], again, rtol=1e-8)


def test_3m_is_the_parabola_through_three_predictions():
    """In phi functions, with the factor 2 that the published formula lacks."""
    half_log_snr = np.array([-3.0, -2.0, -1.6, 0.2, 1.0])
    table = table_of(SOLVERS["dpm++3m"], SCHEDULE.t_at_half_log_snr(half_log_snr))
    alpha, _ = alpha_sigma(half_log_snr)
    h0, h1, h = np.diff(half_log_snr)[:3]
    fall = 1 - np.exp(-h)
    phi = 1 - fall / h
    r0, r1 = h1 / h, h0 / h
    for i, D in enumerate(np.eye(3)):
        a1, a2 = (D[0] - D[1]) / r0, (D[1] - D[2]) / r1
        c2 = (a1 - a2) / (r0 + r1)
        wanted = alpha[3] * (fall * D[0] + phi * (a1 + r0 * c2) + (1 - 2 * phi / h) * c2)
        assert table.E[2, i] == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("spacing", ["1", "6", "8", "27", "100", "ddim50"])
def test_ddim_at_eta_one_is_ancestral_sampling_with_the_small_variance(spacing):
    """(2010.02502, sec. 4.1); rounding makes no NaN, as it does in the original code."""
    timesteps = respaced(SCHEDULE, spacing)
    one = table_of(partial(ddim, eta=1.0), timesteps)
    other = table_of(SOLVERS["ddpm-small"], timesteps)
    for name in ("Qx", "E", "s"):
        found, wanted = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7, err_msg=name)
    rounded = table_of(partial(ddim, eta=1.0, float32_alpha_bar=True), timesteps)
    assert all(np.isfinite(column).all() for column in rounded)


def test_the_variance_fraction_has_no_effect_on_a_single_ancestral_step():
    table = table_of(ddpm, [995.0])
    np.testing.assert_array_equal(table.log_beta, table.log_beta_tilde)
    assert not table.s_learned.any()


# --- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table_of(partial(ddpm, variance="smal"), [5.0]), "did you mean 'small'"),
        (lambda: table_of(SOLVERS["plms"], [5.0, 1.0]), "^plms needs at least three levels, not 2"),
        (lambda: table_of(SOLVERS["prk"], [5.0, 1.0]), "^prk needs at least three levels, not 2"),
        (
            lambda: table_of(partial(unipc, order=4), [5.0, 1.0]),
            "uses 1 to 3 predictions .* 4 and 5",
        ),
        (lambda: table_of(partial(SOLVERS["sa"], predictor=0), [5.0]), "not 0 and 4"),
        (
            lambda: table_of(partial(SOLVERS["lms"], order=5), [5.0]),
            "1 to 4 noise predictions, not 5",
        ),
        (lambda: restart(ddim, [(2.0, 1.0, 1)]), "0 < low < high"),
        (lambda: restart(ddim, [(0.0, 1.0, 1)]), "0 < low < high"),
        (lambda: restart(ddim, [(1.0, 2.0, 0)]), "repeats of at least 1"),
        (
            lambda: table_of(restart(ddim, [(1.0, 1.1, 1)]), [900.0, 500, 9]),
            "no step lies between them",
        ),
        (lambda: repaint(ddim, jump=0), "jump and resamplings of at least 1"),
        (lambda: repaint(ddim, resamplings=0), "jump and resamplings of at least 1"),
        (lambda: table_of(repaint(ddim, jump=3), [900.0, 500, 9]), "take more steps than 3"),
        (
            lambda: table_of(repaint(SOLVERS["plms"], 1, 2), [900.0, 800, 500, 9]),
            "no step between the two levels of a jump",
        ),
        (lambda: make_plan(SCHEDULE, [9, 9, 1], ddim), "two of them are equal"),
    ],
)
def test_refused_samplers(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert str(caught.value).isprintable()
