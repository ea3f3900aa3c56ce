"""The cost of guidance: the evaluations that run, what compiles again, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.guidance import (
    Network,
    apg,
    autoguidance,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    combine_prompts,
    compose,
    dynamic_threshold,
    guidance,
    guidance_rescale,
    image_loss,
)
from glide_jax.diffusion.sampling import run_plan, run_rows, start_state, stream_plan
from glide_jax.diffusion.solvers import SOLVERS, ddim_reverse, restart
from glide_jax.diffusion.solvers.first_order import ddim, ddpm
from glide_jax.diffusion.solvers.multistep import dpm_solver_2m
from glide_jax.errors import UsageError
from tests.support.golden import assert_close
from tests.support.guidances import (
    BOWL,
    CONDS,
    INTERVAL,
    NETWORKS,
    SHAPE,
    X,
    bowl,
    keys,
    made,
    predicted,
    run_of,
    toy,
)

# --- what runs


def evaluations(guidances, solver=ddim):
    """List `(network, images in units of the batch)` for each evaluation of each guidance set."""
    seen = []

    def counting(name, fn):
        def count(params, x, t, cond):
            seen.append((name, len(x) // len(X)))
            assert len(x) == len(t) == len(jax.tree.leaves(cond)[0])
            return fn(params, x, t, cond)

        return Network(count, np.float32(0.9))

    networks = {name: counting(name, toy) for name in NETWORKS}
    guidances = guidances(counting("other", bowl)) if callable(guidances) else guidances
    run = run_of(guidances, solver)
    run_rows.lower(networks, CONDS, run, start_state(run, X), keys())
    return seen


FREE = classifier_free(3.0)
COSTS = {
    "no guidance": ([], [("main", 1)]),
    "maps of x_0": ([guidance_rescale(), dynamic_threshold(), clamp_x_0()], [("main", 1)]),
    "classifier_free": ([FREE], [("main", 2)]),
    "negative": ([FREE.with_negative_prompt("ugly")], [("main", 2)]),
    "combine_prompts one prompt": ([combine_prompts([None], [3.0])], [("main", 2)]),
    "combine_prompts": ([made("combine_prompts")], [("main", 4)]),
    "combine_prompts without the caption": ([combine_prompts(["a"], [3.0])], [("main", 3)]),
    "shared empty prompt": ([FREE, made("combine_prompts"), apg(2.0)], [("main", 4)]),
    "shared negative prompt": (
        [FREE.with_negative_prompt("a"), apg(2.0).with_negative_prompt("a")],
        [("main", 2)],
    ),
    "cfg_plus_plus": ([made("cfg_plus_plus")], [("main", 2)]),
    "apg": ([apg(3.0)], [("main", 2)]),
    "autoguidance": ([autoguidance(2.0)], [("main", 1), ("weak", 1)]),
    "both": ([FREE, autoguidance(2.0)], [("main", 2), ("weak", 1)]),
    "classifier_guidance": (
        lambda other: [FREE, classifier_guidance(other, CONDS["caption"], 1.0)],
        [("main", 2), ("other", 1)],
    ),
    "image_loss": (
        lambda other: [FREE, image_loss(other, CONDS["caption"], 1.0)],
        [("main", 2), ("other", 1)],
    ),
    "image_loss beside": (
        lambda other: [image_loss(other, CONDS["caption"], 1.0, through_network=False)],
        [("main", 1), ("other", 1)],
    ),
    "an interval": ([FREE.within(*INTERVAL)], [("main", 1), ("main", 2)]),
    "two intervals": (
        [FREE.within(*INTERVAL), autoguidance(2.0).within(1.0, np.inf)],
        [("main", 1), ("weak", 1), ("main", 1), ("main", 2), ("main", 2), ("weak", 1)],
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_evaluations_of_each_program(name):
    """One batched pass per network and set, with the branches that it needs and no others."""
    guidances, wanted = COSTS[name]
    assert sorted(evaluations(guidances)) == sorted(wanted)


def dense(params, x, t, cond):
    return (x.reshape(len(x), -1) @ params).reshape(x.shape)


@pytest.mark.parametrize(
    ("guidances", "wanted"),
    [
        ([], [1]),
        ([FREE], [2]),
        ([FREE.within(*INTERVAL)], [1, 2]),
        ([FREE.within(*INTERVAL), clamp_x_0()], [1, 2]),
        ([made("combine_prompts").within(*INTERVAL)], [1, 4]),
    ],
    ids=["none", "everywhere", "interval", "interval and clip", "prompts"],
)
def test_matrix_products_of_the_compiled_program(guidances, wanted):
    """The products of the network, by their number of images in units of the batch."""
    size = int(np.prod(SHAPE[1:]))
    networks = {"main": Network(dense, np.eye(size, dtype=np.float32))}
    run = run_of(guidances)
    compiled = run_rows.lower(networks, CONDS, run, start_state(run, X), keys()).compile().as_text()
    products = re.findall(rf"f32\[(\d+),{size}\]\S* dot\(", compiled)
    assert sorted(int(rows) // 3 for rows in products) == wanted
    # One for the guidances, and one that decides whether the row adds noise.
    assert compiled.count(" conditional(") == (len(wanted) == 2) + 1


# --- what compiles


def test_no_number_and_no_prompt_compiles_again():
    def run(seed=0, spacing="logsnr", solver=ddim, interval=INTERVAL, words=("a", "b"), **numbers):
        n = {
            "weights": (2.0, -1.0),
            "scale": 3.0,
            "eta": 0.0,
            "momentum": -0.5,
            "radius": 2.5,
            "amount": 0.7,
            "quantile": 0.995,
            "high": 1.0,
            "slope": 1.0,
        } | numbers
        linear = [
            combine_prompts([None, words[0]], n["weights"]).within(*interval),
            classifier_free(n["scale"]).within(*interval),
            apg(n["scale"], n["eta"], n["momentum"], n["radius"]),
        ]
        guidances = [
            autoguidance(n["scale"]),
            *(g.with_negative_prompt(words[1]) for g in linear),
            guidance_rescale(n["amount"]),
            dynamic_threshold(n["quantile"]),
            clamp_x_0(high=n["high"]),
            classifier_guidance(BOWL, CONDS["caption"], n["slope"]),
            image_loss(BOWL, CONDS["caption"], n["slope"]),
        ]
        made = run_of(guidances, solver, steps=8, spacing=spacing)
        run_plan(NETWORKS, CONDS, made, X, keys(seed))
        return run_rows._cache_size()

    first = run()
    changes = (
        {"words": ("c", "d")},
        {"words": ("c", "")},
        {"weights": (1, 2.5)},
        {"weights": np.float64([1, 2.5])},
        {"scale": 7},
        {"eta": 1.0, "momentum": 0.0, "radius": np.inf},
        {"amount": 0},
        {"quantile": 0.9},
        {"high": np.float64(2.0)},
        {"slope": 0.0},
        {"interval": (0.1, 2.0)},
        {"spacing": "uniform"},
        {"solver": ddpm},
        {"seed": 3},
    )
    assert [run(**change) for change in changes] == [first] * len(changes)


def test_networks_of_guidance_keep_their_weights():
    weights = {"half": jnp.ones(3, jnp.bfloat16), "count": np.arange(3)}
    run = run_of([classifier_guidance(Network(bowl, weights), CONDS["caption"], 1)])
    kept = run.guidances[0].args["log_prob"].params
    assert kept is weights
    assert run.guidances[0].args["scale"].dtype == jnp.float32


# --- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dynamic_threshold(99.5), "needs 0 <= quantile <= 1, not 99.5"),
        (lambda: dynamic_threshold(quantile=[0.5, 1.5]), "needs 0 <= quantile <= 1"),
        (lambda: dynamic_threshold(quantile=[0.5, np.nan]), "quantile .* must be finite"),
        (lambda: guidance_rescale(amount=-0.1), "guidance_rescale needs 0 <= amount <= 1"),
        (lambda: apg(3.0, radius=-1.0), "apg needs 0 <= radius"),
        (lambda: apg(3.0, momentum=2.0), "apg needs -1 <= momentum <= 1"),
        (lambda: apg(), "apg needs a value for scale"),
        (lambda: combine_prompts(["a", "b"], [1.0]), "2 prompts but 1 weights"),
        (lambda: combine_prompts([None], [np.nan]), "weights of combine_prompts must be finite"),
        (lambda: image_loss(None, 0.0, np.nan), "scale of image_loss must be finite"),
        (
            lambda: compose(FREE.with_negative_prompt("a"), FREE.with_negative_prompt("b")),
            "two different branches are both called 'null'",
        ),
    ],
)
def test_guidances_that_cannot_be_built(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("guidances", "message"),
    [
        (
            [FREE.with_negative_prompt("a"), FREE.with_negative_prompt("b")],
            "two different branches are both called 'null'",
        ),
        (
            [combine_prompts(["a"], [1]).within(0, 1), combine_prompts(["b"], [1]).within(1, 2)],
            "both called 'prompt 0'",
        ),
        ([apg(2.0), apg(3.0)], "two guidances remember 'apg'"),
    ],
)
def test_guidances_that_contradict_each_other(guidances, message):
    with pytest.raises(UsageError, match=message):
        run_of(guidances)


def test_the_same_guidance_at_two_noise_levels():
    """Two prompts with two names; and two momenta with one name, which never act together."""
    early = combine_prompts(["a"], [3.0], name="early").within(1.0, np.inf)
    late = combine_prompts(["b"], [3.0], name="late").within(0.0, 1.0)
    assert [g.needs[1].name for g in run_of([early, late]).guidances] == ["early 0", "late 0"]
    run_of([apg(2.0).within(1.0, np.inf), apg(3.0).within(0.0, 1.0)])


def test_a_learned_variance_needs_a_network_that_predicts_one():
    traced = []

    def silent(params, x, t, cond):
        traced.append(x.shape)
        return toy(params, x, t, cond)[..., :1]

    networks = {"main": Network(silent, np.float32(0.9))}
    message = (
        "^sampler ddpm needs a network with learned variance, and this one predicts none: "
        "choose ddpm-small or ddpm-large$"
    )
    for solver in (ddpm, restart(ddpm, [(0.5, 1.2, 2)])):
        run = run_of([classifier_free(2.0)], solver)
        for call in (run_plan, lambda *inputs: next(stream_plan(*inputs))):
            with pytest.raises(UsageError, match=message):
                call(networks, CONDS, run, X, keys())
    # It is seen before anything is compiled, and is traced once.
    assert traced == [X.shape]
    small = run_plan(networks, CONDS, run_of([], SOLVERS["ddpm-small"]), X, keys()).x
    assert len(traced) == 2
    assert np.isfinite(small).all()
    assert np.isfinite(run_plan(NETWORKS, CONDS, run_of([], ddpm), X, keys()).x).all()


@pytest.mark.parametrize(
    ("name", "firsts", "lasts"), [("plms", 1, 1), ("prk", 1, 1), ("heun", 0, 0), ("dpm++2m", 0, 0)]
)
def test_what_acts_only_at_levels_without_a_row_is_not_compiled(name, firsts, lasts):
    """Samplers of PNDM leave out the first and the last level of the timesteps."""
    levels = run_of([], ddim, steps=8).table
    noise_level = levels.sigma / levels.alpha
    early, late = np.mean(noise_level[:2]), np.mean(noise_level[-2:])
    at_first, at_last = apg(2.0).within(early, np.inf), apg(2.0).within(0.0, late)
    for alone, left_out in ((at_first, firsts), (at_last, lasts)):
        found = run_of([alone], SOLVERS[name], steps=8).guidance_sets
        assert found == (((),) if left_out else ((), (0,)))
    # Two momenta of one name, which meet at the first level alone.
    twice = [apg(3.0), at_first]
    if firsts:
        assert run_of(twice, SOLVERS[name], steps=8).guidance_sets == ((0,),)
    else:
        with pytest.raises(UsageError, match="two guidances remember 'apg'"):
            run_of(twice, SOLVERS[name], steps=8)


@pytest.mark.parametrize(
    "solver",
    [*(SOLVERS[name] for name in ("heun", "dpm++2s", "prk", "plms")), ddim_reverse],
)
def test_samplers_that_cfg_plus_plus_cannot_use(solver):
    message = "cfg_plus_plus needs a sampler with one evaluation per step, each to a cleaner level"
    with pytest.raises(UsageError, match=message):
        run_of([cfg_plus_plus(0.6)], solver, steps=8)


@pytest.mark.parametrize(
    "solver", [dpm_solver_2m, ddpm, restart(ddim, [(0.5, 1.2, 2), (0.2, 5.0, 1)])]
)
def test_samplers_that_cfg_plus_plus_can_use(solver):
    """A step that is repeated has still one evaluation each time."""
    run = run_of([cfg_plus_plus(0.6), clamp_x_0()], solver, steps=12)
    assert np.isfinite(run_plan(NETWORKS, CONDS, run, X, keys()).x).all()


@pytest.mark.parametrize(
    ("networks", "conds", "message"),
    [
        ({"main": NETWORKS["main"]}, CONDS, "branch 'weak' needs a network 'weak'"),
        (NETWORKS, {"caption": CONDS["caption"]}, "branch 'weak' has no conditioning"),
    ],
)
def test_a_branch_that_cannot_be_evaluated(networks, conds, message):
    with pytest.raises(UsageError, match=message):
        run_plan(networks, conds, run_of([autoguidance(2.0)]), X, keys())


def test_a_new_guidance_with_a_range():
    @guidance(strength=(0, 2))
    def shrink(predict, x, point, *, strength=1.0):
        p = predict(x, point)
        return p.with_x_0(p.x_0 / (1 + strength), x, point)

    assert_close(predicted(shrink()).x_0, predicted().x_0 / 2, 1e-6)
    with pytest.raises(UsageError, match="shrink needs 0 <= strength <= 2, not 3"):
        shrink(strength=3)
