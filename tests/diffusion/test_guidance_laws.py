"""The equation of each guidance, and the laws that it obeys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.diffusion.guidance import (
    Network,
    Point,
    apg,
    autoguidance,
    branches_of,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    combine_prompts,
    compose,
    dynamic_threshold,
    guidance_rescale,
    image_loss,
    known_pixels,
)
from glide_jax.diffusion.guidance.gradients import limit_gradient
from glide_jax.diffusion.sampling import run_plan, stream_plan
from glide_jax.diffusion.solvers.first_order import ddpm
from glide_jax.errors import UsageError
from tests.support.golden import assert_close, rows
from tests.support.guidances import (
    AGAINST,
    ALPHA,
    BOWL,
    CONDS,
    EACH,
    GOAL,
    INTERVAL,
    MEMORY,
    NETWORKS,
    SHAPE,
    SIGMA,
    X,
    bowl,
    eps_of,
    keys,
    made,
    predicted,
    run_of,
    toy,
    x_0_of,
)

each_guidance = pytest.mark.parametrize("name", EACH)

# --- equations


@pytest.mark.parametrize(
    ("alpha", "sigma"), [(0.0061, 1.0), (0.6, 0.8), (0.9999, 0.0064)], ids=["high", "middle", "low"]
)
def test_a_limited_score_changes_x_0_by_at_most_what_x_t_leaves_open(alpha, sigma):
    point = Point(*map(np.float32, (0, alpha, sigma, 0, 0)), memory={})
    # Gaussian pixels of standard deviation 0.5, seen in noise: the posterior's.
    posterior_std = np.sqrt(0.25 * sigma**2 / (alpha**2 * 0.25 + sigma**2))
    to_x_0 = sigma**2 / alpha
    direction = np.asarray(X) / np.sqrt((X**2).mean(axis=(1, 2, 3), keepdims=True))
    # One image below the limit, one at ten times, one with an own limit of its size.
    sizes = np.array([0.1, 10, 1])[:, None, None, None]
    gradient = jnp.asarray(direction * sizes * posterior_std / to_x_0, jnp.float32)
    limits = np.float32([0.2, 0.2, 3])
    found = np.asarray(limit_gradient(gradient, point, limits))
    np.testing.assert_array_equal(found[[0, 2]], np.asarray(gradient)[[0, 2]])
    np.testing.assert_allclose(found[1], np.asarray(gradient)[1] * 0.02, rtol=1e-4)
    change = to_x_0 * np.sqrt((found**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(change, np.array([0.1, 0.2, 1]) * posterior_std, rtol=1e-4)
    np.testing.assert_array_equal(limit_gradient(gradient, point, np.inf), gradient)
    np.testing.assert_array_equal(limit_gradient(0 * gradient, point, 0.2), 0 * gradient)


def test_gradient_guidance_limits_its_own_score_alone():
    network, cond = Network(bowl, {}), np.float32([0.1, -2, 30])
    free, bounded = (
        predicted(classifier_guidance(network, cond, 5.0, limit)) for limit in (None, 0.5)
    )
    point = Point(*map(np.float32, (0, ALPHA, SIGMA, 0, 0)), memory={})
    assert_close(
        bounded.guidance_gradient, limit_gradient(free.guidance_gradient, point, 0.5), 1e-6
    )
    assert (np.abs(bounded.guidance_gradient) < np.abs(free.guidance_gradient)).any()
    np.testing.assert_array_equal(bounded.x_0, free.x_0)


def test_a_negative_prompt_replaces_the_empty_one():
    wanted = eps_of("negative") + 3 * (eps_of("caption") - eps_of("negative"))
    assert_close(predicted(made("negative"), conds=AGAINST).eps, wanted, 1e-5)


def test_weighted_prompts():
    """The image's caption AND another, NOT a third."""
    null = eps_of("null")
    differences = [eps_of(name) - null for name in ("caption", "prompt 0", "prompt 1")]
    wanted = null + 2 * differences[0] + 1.5 * differences[1] - 0.5 * differences[2]
    assert_close(predicted(made("combine_prompts")).eps, wanted, 1e-5)
    without = combine_prompts(["a", "b"], [1.5, -0.5])
    assert_close(predicted(without).eps, null + 1.5 * differences[1] - 0.5 * differences[2], 1e-5)


def test_autoguidance_leads_away_from_the_weak_model():
    wanted = eps_of("weak") + 2 * (eps_of("caption") - eps_of("weak"))
    assert_close(predicted(autoguidance(2.0)).eps, wanted, 1e-5)


def adaptive(memory, scale, eta, momentum, radius):
    """Adaptive projected guidance, image by image: `(x_0, memory)`."""
    cond, null = (np.float64(x_0_of(eps_of(name))).reshape(3, -1) for name in ("caption", "null"))
    memory = cond - null + momentum * memory.reshape(3, -1)
    found = []
    for c, difference in zip(cond, memory, strict=True):
        difference = difference * min(1, radius / np.linalg.norm(difference))
        along = c / np.linalg.norm(c)
        parallel = (difference @ along) * along
        found.append(c + (scale - 1) * (difference - parallel + eta * parallel))
    return np.reshape(found, SHAPE), memory.reshape(SHAPE)


@pytest.mark.parametrize("radius", [0.7, 1e3])
def test_adaptive_projected_guidance(radius):
    numbers = {"scale": 4.0, "eta": 0.3, "momentum": -0.5, "radius": radius}
    p = predicted(apg(**numbers))
    x_0, memory = adaptive(np.float64(MEMORY["apg"]), **numbers)
    assert_close(p.x_0, x_0, 1e-5)
    assert_close(p.memory["apg"], memory, 1e-5)
    assert_close(p.memory["other"], X, 0)


def test_neutral_adaptive_projected_guidance_is_classifier_free():
    plain = apg(3.0, eta=1.0, momentum=0.0, radius=np.inf)
    assert_close(predicted(plain).x_0, predicted(classifier_free(3.0)).x_0, 1e-5)


def test_adaptive_projected_guidance_without_a_difference():
    """No NaN where both captions are the same, or where the radius is 0."""
    conds, none = CONDS | {"null": CONDS["caption"]}, {"apg": 0 * X}
    for found in (
        predicted(apg(4.0), conds=conds, memory=none),
        predicted(apg(4.0, radius=0.0), conds=conds, memory=none),
        predicted(apg(4.0, radius=0.0)),
    ):
        assert_close(found.x_0, x_0_of(eps_of("caption")), 1e-5)


def test_rescaling():
    free = classifier_free(5.0)
    guided, cond = predicted(free).x_0, x_0_of(eps_of("caption"))
    std = partial(np.std, axis=(1, 2, 3), keepdims=True)
    wanted = 0.7 * guided * std(cond) / std(guided) + 0.3 * guided
    assert_close(predicted(free, guidance_rescale()).x_0, wanted, 1e-5)
    assert_close(std(predicted(free, guidance_rescale(1.0)).x_0), std(cond), 1e-5)


def test_dynamic_thresholding():
    quantiles = np.float32([0.0, 0.71, 1.0])
    x_0 = np.float64(predicted().x_0)
    found = predicted(dynamic_threshold(quantiles)).x_0
    bounds = [max(1, np.quantile(abs(a), q)) for a, q in zip(x_0, quantiles, strict=True)]
    assert bounds[0] == 1 < bounds[1] < bounds[2]
    for a, wanted, bound in zip(found, x_0, bounds, strict=True):
        assert_close(a, np.clip(wanted, -bound, bound) / bound, 1e-5)


def test_cfg_plus_plus_is_the_update_of_its_paper():
    """`x' = alpha' x_0(s) + sigma' eps(null)`, x_0 from `eps(null) + s (eps(c) - eps(null))`."""
    scales = np.array([0.1, 0.6, 1.0])
    run = run_of([cfg_plus_plus(scales)])
    x, column = np.float64(X), scales[:, None, None, None]
    for i, (_, state) in enumerate(stream_plan(NETWORKS, CONDS, run, X, keys())):
        t, alpha, sigma, next_alpha, next_sigma = (c[i] for c in run.table[:5])
        cond, null = (
            toy(0.9, x, np.full(3, t), CONDS[name])[..., :1] for name in ("caption", "null")
        )
        x_0 = (x - sigma * (null + column * (cond - null))) / alpha
        x = next_alpha * x_0 + next_sigma * np.float64(null)
        assert_close(state.x, x, 1e-6 * max(1, np.abs(x).max(), np.abs(x_0).max()))
    assert i == 5


def test_a_gradient_changes_the_score_alone():
    """Two of them add up."""
    once, plain = made("classifier_guidance"), predicted()
    wanted = 0.3 * (GOAL[:, None, None, None] - X)
    assert_close(predicted(once).guidance_gradient, wanted, 1e-6)
    assert_close(predicted(once, once).guidance_gradient, 2 * wanted, 1e-6)
    assert_close(predicted(once).x_0, plain.x_0, 0)


@pytest.mark.parametrize("through", [True, False])
def test_a_loss_on_the_clean_image(through):
    """The loss sees the guided x_0; with and without the Jacobian of the network."""
    free = classifier_free(3.0)
    y = GOAL[:, None, None, None]

    def x_0(x):
        at = jnp.full(3, 500.0)
        cond, null = (toy(0.9, x, at, CONDS[name])[..., :1] for name in ("caption", "null"))
        return (x - SIGMA * (null + 3 * (cond - null))) / ALPHA

    clean, pull = jax.vjp(x_0, X)
    (slope,) = pull(clean - y) if through else ((clean - y) / ALPHA,)
    # The bowl is a loss with the sign reversed.
    guided = image_loss(BOWL, GOAL, -2.0, through_network=through)
    p = predicted(free, guided)
    assert_close(p.guidance_gradient, -2 * slope, 1e-4)
    assert_close(p.x_0, clean, 1e-5)
    # Two add up.
    assert_close(predicted(free, guided, guided).guidance_gradient, -4 * slope, 2e-4)


def test_no_gradient_where_the_clean_image_is_clipped():
    loss = image_loss(BOWL, GOAL, 1.0)
    assert loss.name == "image_loss"
    low = clamp_x_0(-0.5, 0.5)
    pixelwise = {"main": Network(lambda params, x, t, cond: jnp.tanh(x), None)}
    clipped = np.abs(predicted(networks=pixelwise).x_0) > 0.5
    found = predicted(low, loss, networks=pixelwise).guidance_gradient
    assert not found[clipped].any() and found[~clipped].all()
    assert predicted(loss, low, networks=pixelwise).guidance_gradient[clipped].all()


# --- laws


NEUTRAL = {
    "classifier_free": {"scale": 1},
    "negative": {"scale": 1},
    "combine_prompts": {"own": 1, "a": 0, "b": 0},
    "autoguidance": {"scale": 1},
    "apg": {"scale": 1},
    "clamp_x_0": {"low": -1e9, "high": 1e9},
    "classifier_guidance": {"scale": 0},
    "image_loss": {"scale": 0},
    "image_loss beside": {"scale": 0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_number_changes_nothing(name):
    p, plain = predicted(made(name, **NEUTRAL[name])), predicted()
    np.testing.assert_array_equal(p.guidance_gradient, plain.guidance_gradient)
    # Bit for bit, where nothing is differentiated.
    assert_close(p.x_0, plain.x_0, 1e-6 if name == "image_loss" else 0)
    assert_close(p.eps, plain.eps, 1e-6)


def test_rescaling_by_zero_and_thresholds_without_outliers_change_nothing():
    free = classifier_free(3.0)
    np.testing.assert_array_equal(predicted(free, guidance_rescale(0)).x_0, predicted(free).x_0)
    once = [free, clamp_x_0()]
    np.testing.assert_array_equal(predicted(*once, dynamic_threshold()).x_0, predicted(*once).x_0)


@pytest.mark.parametrize("scale", [3.3, np.array([0.0, 1.1, 7.7])], ids=["one", "each"])
def test_combine_prompts_of_one_prompt_is_classifier_free(scale):
    wanted = predicted(classifier_free(np.float32(scale))).eps
    for prompts, weights in (([None], [scale]), ([None, ""], [scale, 5.0])):
        found = predicted(combine_prompts(prompts, weights)).eps
        np.testing.assert_array_equal(found, wanted)


def test_the_weights_of_a_repeated_prompt_add_up():
    twice = combine_prompts(["a", None, "b", "a"], [1.0, 2.0, -0.5, 0.5])
    assert twice.needs == made("combine_prompts").needs
    assert_close(predicted(twice).eps, predicted(made("combine_prompts")).eps, 1e-6)


def test_the_empty_negative_prompt_changes_nothing():
    plain, against = classifier_free(3.3), classifier_free(3.3).with_negative_prompt("")
    assert against.needs == plain.needs
    np.testing.assert_array_equal(predicted(against).eps, predicted(plain).eps)


def test_a_negative_prompt_is_a_weighted_sum():
    conds = CONDS | {"prompt 0": CONDS["negative"]}
    weighted = combine_prompts([None, "ugly"], [3.0, 1 - 3.0])
    found = predicted(classifier_free(3.0).with_negative_prompt("ugly"), conds=AGAINST).eps
    assert_close(predicted(weighted, conds=conds).eps, found, 1e-5)


def assert_same_plan(found, wanted):
    """To the last bit, with the same compiled program."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@each_guidance
def test_an_interval_over_everything_restricts_nothing(name):
    assert_same_plan(run_of([made(name).within(0, np.inf)]), run_of([made(name)]))


def test_guidance_acts_within_its_interval_alone():
    """Every kind of guidance; below the interval the run continues unguided."""
    every = compose(*(made(name) for name in EACH if name not in ("negative", "cfg_plus_plus")))
    run = run_of([every.within(0.3, np.inf)], ddpm, steps=8)
    guided = int((run.table.sigma / run.table.alpha > 0.3).sum())
    assert 0 < guided < 8 and (run.table.guidance_set[:guided] != run.table.guidance_set[-1]).all()
    states = [state.x for _, state in stream_plan(NETWORKS, CONDS, run, X, keys())]
    whole = run_of([every], ddpm, steps=8)
    wanted = [state.x for _, state in stream_plan(NETWORKS, CONDS, whole, X, keys())]
    assert_close(states[guided - 1], wanted[guided - 1], 1e-4)
    assert np.abs(states[guided] - wanted[guided]).max() > 0.1
    rest = rows(run_of([], ddpm, steps=8), slice(guided, None))
    assert_close(states[-1], run_plan(NETWORKS, CONDS, rest, states[guided - 1], keys()).x, 1e-5)


@each_guidance
def test_numbers_for_each_image(name):
    """A batch equals its images one by one, and every number has an effect."""
    for number, value in EACH[name][1].items():
        values = value * np.array([0.5, 1.0, 1.2])
        together = predicted(made(name, **{number: values}))
        for i, one in enumerate(values):
            alone = made(name, **{number: one}, **only(name, i))
            p = predicted(alone, some=slice(i, i + 1))
            assert_close(together.x_0[i], p.x_0[0], 1e-5)
            assert_close(together.guidance_gradient[i], p.guidance_gradient[0], 1e-5)
        middle = predicted(made(name))
        moved = np.abs(together.x_0 - middle.x_0) + np.abs(
            together.guidance_gradient - middle.guidance_gradient
        )
        assert moved[0].max() > 1e-3 and moved[2].max() > 1e-3 and moved[1].max() < 1e-5


def only(name, i):
    """Return the conditioning of one image, for guidances that carry their own."""
    own = name.startswith(("classifier_guidance", "image_loss"))
    return {"cond": GOAL[i : i + 1]} if own else {}


def test_the_order_is_left_to_right_innermost_first():
    low = clamp_x_0(-0.25, 0.25)
    free = classifier_free(3.0)
    clipped, difference = np.clip(predicted().x_0, -0.25, 0.25), eps_of("caption") - eps_of("null")
    wanted = clipped - 2 * SIGMA / ALPHA * difference
    assert_close(predicted(low, free).x_0, wanted, 1e-5)
    assert_close(predicted(free, low).x_0, np.clip(predicted(free).x_0, -0.25, 0.25), 1e-6)
    assert (np.abs(wanted) > 0.5).any()


def test_known_pixels_are_kept_whatever_came_before():
    rng = np.random.default_rng(1)
    image, known = np.float32(rng.uniform(-1, 1, SHAPE)), np.float32(rng.integers(0, 2, SHAPE))
    guidances = [classifier_free(9.0), dynamic_threshold(), guidance_rescale()]
    run = run_of([*guidances, known_pixels(image=image, known=known), clamp_x_0()])
    found = np.asarray(run_plan(NETWORKS, CONDS, run, X, keys()).x)
    assert_close(found * known, image * known, 1e-6)
    assert np.abs((found - image) * (1 - known)).max() > 0.1


def test_composition_is_a_guidance():
    """Compositions nest, and have an interval of their own beside those of their members."""
    free, loud, last = classifier_free(3.0), made("classifier_guidance"), clamp_x_0()
    flat = [free.within(0.3, 5.0), loud, last]
    nested = compose(compose(free.within(0.3, 5.0), loud), last)
    for made_of in ([nested], [compose(*flat[:2]), last], [compose(), *flat]):
        assert_same_plan(run_of(made_of), run_of(flat))
    intervals = [member.interval for member in nested.within(1.0, 9.0).members()]
    assert intervals == [(1.0, 5.0), (1.0, 9.0), (1.0, 9.0)]
    assert nested.within(0.1, 9.0).members()[0].interval == (0.3, 5.0)
    with pytest.raises(UsageError, match=r"classifier_free would act nowhere within \(6.0, 9.0\)"):
        nested.within(6.0, 9.0)
    assert branches_of([nested]) == branches_of(flat)
    # Intervals aside, it is a function like any other.
    assert_close(predicted(compose(free, last)).x_0, predicted(free, last).x_0, 0)


def test_momentum_is_reset_where_guidance_changes():
    """Each row adds the difference of the row before, unless another guidance set acted there."""
    free = classifier_free(1.0).within(*INTERVAL)
    run = run_of([apg(1.0, momentum=-0.5), free, clamp_x_0()], steps=12)
    table = run.table
    x, memory = X, np.zeros(SHAPE)
    for i, (_, state) in enumerate(stream_plan(NETWORKS, CONDS, run, X, keys())):
        cond, null = (
            toy(0.9, x, jnp.full(3, table.t[i]), CONDS[name])[..., :1]
            for name in ("caption", "null")
        )
        difference = table.sigma[i] / table.alpha[i] * (null - cond)
        reset = i > 0 and table.guidance_set[i] != table.guidance_set[i - 1]
        memory = difference - 0.5 * memory * (not reset)
        assert_close(state.memory["apg"], memory, 1e-5 * max(1, np.abs(memory).max()))
        x = state.x
    assert (np.diff(table.guidance_set) != 0).sum() == 2
