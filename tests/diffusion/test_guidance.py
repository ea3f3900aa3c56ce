"""Guidance and the two drivers on a toy network: what runs, what compiles, what is equal."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.guidance import (
    Branch,
    Network,
    apg,
    clamp_x_0,
    classifier_free,
    compose,
    guidance,
)
from glide_jax.diffusion.sampling import (
    make_plan,
    noise_at,
    run_plan,
    run_rows,
    start_state,
    stream_plan,
)
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers.first_order import ddim, ddpm
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import UsageError
from tests.support.golden import assert_close, rows

SCHEDULE = make_schedule("cosine")
SHAPE = (4, 2, 3, 1)
X = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
CONDS = {
    "caption": np.linspace(-1, 1, 4, dtype=np.float32),
    "null": np.zeros(4, np.float32),
}
EACH_SOLVER = pytest.mark.parametrize(
    "solver", [ddpm, partial(ddim, eta=0.7), dpm_solver_2m], ids=["ddpm", "ddim", "2m"]
)
INTERVAL = (0.3, 5.0)


def toy(params, x, t, cond):
    """Predict noise and variance, from every argument."""
    cond, t = (column[:, None, None, None] for column in (cond, t))
    return jnp.concatenate([jnp.tanh(params * x + cond + t / 1000), jnp.cos(x)], axis=-1)


TOY = {"main": Network(toy, np.float32(0.9))}


def keys(seed=0, some=slice(None)):
    """One key per image."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(4)[some])


def run_of(solver=ddim, guidances=(), steps=6, spacing="logsnr"):
    return make_plan(SCHEDULE, make_timesteps(SCHEDULE, steps, spacing), solver, guidances)


# --- the drivers


@EACH_SOLVER
@pytest.mark.parametrize("at_a_time", [1, 4])
def test_streaming_and_compiled_driver_agree(solver, at_a_time):
    run = run_of(solver, [classifier_free(3.0).within(*INTERVAL), clamp_x_0()])
    whole = run_plan(TOY, CONDS, run, X, keys())
    done = list(stream_plan(TOY, CONDS, run, X, keys(), rows=at_a_time))
    assert [n for n, _ in done] == ([1, 2, 3, 4, 5, 6] if at_a_time == 1 else [4, 6])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(done[-1][1]), strict=True):
        assert_close(b, a, 2e-6)


@pytest.mark.parametrize(
    "noise",
    [
        jax.random.split(jax.random.PRNGKey(0), 4),
        jax.random.key(0),
        keys(some=slice(3)),
        np.zeros((5, *SHAPE), np.float32),
        np.zeros(SHAPE, np.float32),
    ],
    ids=["old-style keys", "one key", "a key too few", "a row too few", "one row"],
)
def test_noise_of_a_wrong_shape_is_refused(noise):
    run, message = run_of(ddpm), r"noise is \(6, 4, 2, 3, 1\).* or 4 keys .*\(not PRNGKey\)"
    for call in (run_plan, lambda *inputs: next(stream_plan(*inputs))):
        with pytest.raises(UsageError, match=message) as caught:
            call(TOY, CONDS, run, X, noise)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("at_a_time", [0, -1])
def test_a_call_runs_at_least_one_row(at_a_time):
    with pytest.raises(UsageError, match=f"at least one row per call, not {at_a_time}"):
        list(stream_plan(TOY, CONDS, run_of(), X, keys(), rows=at_a_time))


@EACH_SOLVER
def test_a_tape_of_noise_equals_the_noise_of_the_keys(solver):
    run = run_of(solver)
    tape = np.stack([noise_at(keys(), i, SHAPE) for i in range(len(run))])
    assert len(np.unique(tape)) == tape.size == 6 * np.prod(SHAPE)
    assert abs(tape.mean()) < 0.3 and abs(tape.std() - 1) < 0.2
    from_keys = run_plan(TOY, CONDS, run, X, keys())
    assert_close(run_plan(TOY, CONDS, run, X, tape).x, from_keys.x, 1e-6)
    stochastic = solver is not dpm_solver_2m
    assert stochastic == bool((run_plan(TOY, CONDS, run, X, keys(1)).x != from_keys.x).any())


@EACH_SOLVER
def test_one_image_of_a_batch_can_be_generated_alone(solver):
    run = run_of(solver, [classifier_free(3.0).within(*INTERVAL), clamp_x_0()])
    batch = run_plan(TOY, CONDS, run, X, keys()).x
    for i in range(4):
        one = slice(i, i + 1)
        conds = {name: cond[one] for name, cond in CONDS.items()}
        alone = run_plan(TOY, conds, run, X[one], keys(some=one))
        np.testing.assert_array_equal(alone.x[0], batch[i])


# --- classifier-free guidance


@EACH_SOLVER
def test_scale_one_changes_no_bit(solver):
    plain = run_plan(TOY, CONDS, run_of(solver), X, keys()).x
    guided = run_plan(TOY, CONDS, run_of(solver, [classifier_free(1.0)]), X, keys()).x
    np.testing.assert_array_equal(plain, guided)


def test_scale_zero_is_the_empty_caption():
    """A learned variance stays that of the caption, as in OpenAI's code."""
    empty = run_plan(TOY, {"caption": CONDS["null"]}, run_of(guidances=[clamp_x_0()]), X, keys()).x
    run = run_of(guidances=[classifier_free(0.0), clamp_x_0()])
    assert_close(run_plan(TOY, CONDS, run, X, keys()).x, empty, 1e-5)


def test_a_scale_for_each_image():
    scales = [0.0, 1.0, 2.5, 7.0]
    run = run_of(ddpm, [classifier_free(scales), clamp_x_0()])
    together = run_plan(TOY, CONDS, run, X, keys()).x
    for i, scale in enumerate(scales):
        run = run_of(ddpm, [classifier_free(scale), clamp_x_0()])
        assert_close(together[i], run_plan(TOY, CONDS, run, X, keys()).x[i], 1e-5)


def test_a_network_that_predicts_v():
    """`eps = alpha v + sigma x_t`, for every branch  (2202.00512)."""

    def echo(params, x, t, cond):
        return cond

    run = rows(run_of(guidances=[classifier_free(3.0)]), slice(2, 3))
    eps = {name: jnp.sin(X + i) for i, name in enumerate(CONDS)}
    v = jax.tree.map(lambda e: (e - run.table.sigma[0] * X) / run.table.alpha[0], eps)
    wanted = run_plan({"main": Network(echo, None)}, eps, run, X, keys())
    found = run_plan({"main": Network(echo, None, "v")}, v, run, X, keys())
    assert_close(found.x, wanted.x, 1e-5)
    assert_close(found.x_0, wanted.x_0, 1e-5)


def test_clipping_changes_x_0_and_its_noise():
    """The noise agrees with the clipped x_0, in the step and in every later guidance."""

    @guidance()
    def eps_seen(predict, x, point):
        p = predict(x, point)
        return p._replace(x_0=p.eps)

    low, high = -0.25, np.float32([0.1, 0.2, 0.3, 0.4])
    _, plain = next(stream_plan(TOY, CONDS, run_of(), X, keys()))
    clipping = clamp_x_0(low, high)
    run = run_of(guidances=[clipping])
    _, clipped = next(stream_plan(TOY, CONDS, run, X, keys()))
    wanted = np.clip(plain.x_0, low, high[:, None, None, None])
    assert_close(clipped.x_0, wanted, 1e-7)
    row = run.table
    eps = (X - row.alpha[0] * wanted) / row.sigma[0]
    assert_close(clipped.x, row.next_alpha[0] * wanted + row.next_sigma[0] * eps, 1e-6)
    _, seen = next(stream_plan(TOY, CONDS, run_of(guidances=[clipping, eps_seen()]), X, keys()))
    assert_close(seen.x_0, eps, 1e-6)


# --- what runs


def test_an_unguided_row_does_not_evaluate_the_null_branch():
    batches = []

    def counting(params, x, t, cond):
        jax.debug.callback(lambda t: batches.append((t[0].item(), len(t))), t)
        return toy(params, x, t, cond)

    networks = {"main": Network(counting, np.float32(0.9))}
    run = run_of(guidances=[classifier_free(3.0).within(*INTERVAL)], steps=8)
    assert run.guidance_sets == ((), (0,))
    jax.block_until_ready(run_plan(networks, CONDS, run, X, keys()))
    jax.effects_barrier()
    noise_level = np.exp(-SCHEDULE.half_log_snr(run.table.t))
    wanted = np.where((noise_level > INTERVAL[0]) & (noise_level <= INTERVAL[1]), 8, 4)
    assert {4, 8} == set(wanted.tolist())
    assert sorted(batches, reverse=True) == list(zip(run.table.t.tolist(), wanted, strict=True))


@pytest.mark.parametrize(("interval", "conditionals"), [(INTERVAL, 1), ((0, np.inf), 0)])
def test_one_conditional_in_the_program(interval, conditionals):
    run = run_of(guidances=[classifier_free(3.0).within(*interval), clamp_x_0()])
    compiled = run_rows.lower(TOY, CONDS, run, start_state(run, X), keys()).compile()
    # One more decides whether the row adds noise.
    assert compiled.as_text().count(" conditional(") == conditionals + 1


def test_a_change_of_guidance_resets_the_solver():
    """At both ends of the interval; the memory of guidance is reset there too."""
    run = run_of(dpm_solver_2m, [classifier_free(3.0).within(*INTERVAL)], steps=12)
    chosen = run.table.guidance_set
    switched = np.append(False, chosen[1:] != chosen[:-1])
    assert switched.sum() == 2
    looks_back = run.table.E[:, 1] != 0
    last = np.arange(12) == 11
    np.testing.assert_array_equal(looks_back, ~(switched | last | (np.arange(12) == 0)))
    np.testing.assert_array_equal(run.table.keep, 1 - switched)


@guidance(remembers=("rows",))
def counts(predict, x, point):
    """Remember how often it has acted since the last reset."""
    p = predict(x, point)
    return p._replace(memory={**p.memory, "rows": p.memory["rows"] + 1})


def test_the_memory_of_guidance():
    run = run_of(guidances=[classifier_free(3.0).within(*INTERVAL), counts()], steps=12)
    found = [
        state.memory["rows"].max().item() for _, state in stream_plan(TOY, CONDS, run, X, keys())
    ]
    wanted, since = [], 0
    for i, chosen in enumerate(run.table.guidance_set):
        since = 1 if i and chosen != run.table.guidance_set[i - 1] else since + 1
        wanted.append(since)
    assert found == wanted and wanted.count(1) == 3


def test_guidance_adds_up_in_any_order():
    """Here with a branch that another network evaluates."""

    @guidance(Branch("weak", network="weak"))
    def away_from_weak(predict, x, point, *, scale):
        p = predict(x, point)
        difference = p.branches["caption"] - p.branches["weak"]
        return p.with_eps(p.eps + scale * difference, x, point)

    def both(params, x, t, cond):
        return (
            toy(0.9, x, t, cond) * 3.5 - toy(0.9, x, t, 0 * cond) * 2 - toy(0.5, x, t, cond) * 0.5
        )

    plain = run_of(guidances=[clamp_x_0()])
    wanted = run_plan({"main": Network(both, None)}, CONDS, plain, X, keys()).x
    networks = TOY | {"weak": Network(toy, np.float32(0.5))}
    conds = CONDS | {"weak": CONDS["caption"]}
    guidances = [classifier_free(3.0), away_from_weak(0.5)]
    for order in (guidances, guidances[::-1]):
        run = run_of(guidances=[*order, clamp_x_0()])
        assert_close(run_plan(networks, conds, run, X, keys()).x, wanted, 1e-5)


# --- what compiles


def test_numbers_and_tables_do_not_compile_again():
    """They are arguments of the compiled function, and so is the set of guided rows."""

    def run(
        solver=ddim,
        scale=3.0,
        interval=INTERVAL,
        spacing="logsnr",
        conds=CONDS,
        seed=0,
        clipped=1.0,
    ):
        guidances = [classifier_free(scale).within(*interval), clamp_x_0(high=clipped)]
        made = run_of(solver, guidances, steps=12, spacing=spacing)
        assert made.guidance_sets == ((0, 1), (1,))
        run_plan(TOY, conds, made, X, keys(seed))
        return run_rows._cache_size()

    first = run()
    changes = (
        {"scale": 7},
        {"scale": np.float64(2.5)},
        {"clipped": 2.0},
        {"seed": 5},
        {"conds": {name: cond + 1 for name, cond in CONDS.items()}},
        {"interval": (0.1, 2.0)},
        {"interval": (0.0, 1.0)},
        {"spacing": "uniform"},
        {"solver": partial(ddim, eta=0.3)},
        {"solver": partial(ddim, float32_alpha_bar=True)},
        {"solver": dpm_solver_2m},
        {"solver": ddpm},
        {"solver": partial(ddpm, variance="large")},
    )
    assert [run(**change) for change in changes] == [first] * len(changes)


def test_streaming_compiles_one_program_for_every_number_of_steps():
    list(stream_plan(TOY, CONDS, run_of(steps=3), X, keys()))
    first = run_rows._cache_size()
    for steps in (1, 5, 9):
        list(stream_plan(TOY, CONDS, run_of(steps=steps), X, keys()))
    assert run_rows._cache_size() == first
    # Proves that the cache size counts programs.
    list(stream_plan(TOY, CONDS, run_of(steps=4), X, keys(), rows=2))
    assert run_rows._cache_size() == first + 1


# --- a negative prompt


@pytest.mark.parametrize("other", [apg(2.0), apg(2.0).with_negative_prompt("blurred")])
def test_one_run_has_one_negative_prompt(other):
    guidances = [classifier_free(3.0).with_negative_prompt("ugly"), other]
    with pytest.raises(UsageError, match="two different branches are both called 'null'"):
        run_of(guidances=guidances)
    with pytest.raises(UsageError, match="two different branches are both called 'null'"):
        compose(*guidances)


# --- refusals


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "at least one"),
        ([[5.0, 4.0]], r"a list of numbers, not of shape \(1, 2\)"),
        ([1000, 5], "between 0 and 999"),
        ([10, -1], "between 0 and 999"),
        ([10, 10, 5], "fall strictly"),
        ([5, 10], "fall strictly"),
        ([10, np.nan], "between 0 and 999"),
    ],
)
def test_timesteps_that_cannot_be_sampled(timesteps, message):
    with pytest.raises(UsageError, match=message):
        make_plan(SCHEDULE, timesteps, ddim)


@pytest.mark.parametrize("interval", [(3.0, 1.0), (2.0, 2.0), (-1.0, 2.0), (np.nan, 1.0)])
def test_invalid_intervals(interval):
    with pytest.raises(UsageError, match="an interval needs"):
        classifier_free(3.0).within(*interval)


def test_an_interval_contains_its_upper_end():
    guided = classifier_free(3.0).within(1.0, 2.0)
    assert [guided.acts_at(level) for level in (1.0, 1.5, 2.0, 2.5)] == [False, True, True, False]
    assert classifier_free(3.0).acts_at(1e6)


def test_one_name_cannot_mean_two_branches():
    @guidance(Branch("null", prompt="ugly"))
    def negative(predict, x, point):
        return predict(x, point)

    with pytest.raises(UsageError, match="both called 'null'"):
        run_of(guidances=[classifier_free(3.0), negative()])


def test_a_plan_has_no_intervals_and_no_prompts():
    """They would be part of what is compiled."""
    run = run_of(guidances=[classifier_free(3.0).within(*INTERVAL)])
    assert run.guidances[0].interval == (0.0, np.inf)
    assert run.guidances[0].needs == (Branch("null"),)
    assert replace(run.guidances[0], interval=INTERVAL).acts_at(1.0)
