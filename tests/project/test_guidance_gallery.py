"""The gallery of guidance: the law of each example, its cost, and the page that shows it."""

import ast
import re
from dataclasses import replace
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from glide_jax.diffusion.guidance import (
    Network,
    Point,
    apply_guidances,
    branches_of,
    classifier_free,
)
from glide_jax.diffusion.guidance import noise_predictor as predictor
from glide_jax.diffusion.sampling import run_plan
from glide_jax.models.blocks import AttentionBlock
from glide_jax.models.layers import GroupNorm
from glide_jax.models.unet import GLIDE, init_params
from tests.support.commands import ROOT, TINY
from tests.support.exact_model import exact_pipeline
from tests.support.golden import assert_close
from tests.support.guidances import (
    ALPHA,
    CONDS,
    NETWORKS,
    SIGMA,
    X,
    keys,
    predicted,
    run_of,
    toy,
)

FOLDER = ROOT / "examples" / "guidance"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "show")
PAGE = ROOT / "docs" / "guide" / "gallery.md"
OTHERS = CONDS | {"other": CONDS["negative"], "first": CONDS["negative"]}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def make(name, *args, function=None, **named):
    """Return a guidance of an example."""
    return getattr(import_module(name), function or name)(*args, **named)


def prediction(*guidances, x=X, t=500.0, networks=NETWORKS, conds=OTHERS):
    """Return the guided prediction for some noised images at a timestep."""
    point = Point(*map(jnp.float32, (t, ALPHA, SIGMA, 0.8, 0.6)), {})
    return apply_guidances(predictor(networks, conds, branches_of(guidances)), guidances)(x, point)


def assert_equal(found, wanted):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


# --- laws


def test_a_constant_schedule_is_classifier_free():
    assert_equal(
        predicted(make("scheduled_scale", 3.0, 0.0)).eps, predicted(classifier_free(3)).eps
    )


def test_a_rising_schedule_goes_from_no_guidance_to_twice_the_guidance():
    rising = make("scheduled_scale", 3.0, 1.0)
    for t, scale in ((999.0, 1.0), (499.5, 3.0), (0.0, 5.0)):
        assert_close(prediction(rising, t=t).eps, prediction(classifier_free(scale), t=t).eps, 1e-5)


def test_equal_scales_of_both_frequencies_are_classifier_free():
    found = predicted(make("frequency_scales", 3.0, 3.0)).eps
    assert_close(found, predicted(classifier_free(3.0)).eps, 1e-6)


def test_a_difference_of_one_colour_is_of_low_frequency():
    def plain(params, x, t, cond):
        return 0 * x + cond[:, None, None, None]

    networks = {"main": Network(plain, None)}
    found = prediction(make("frequency_scales", 3.0, 9.0), networks=networks).eps
    assert_close(found, prediction(classifier_free(3.0), networks=networks).eps, 1e-5)


def layer(module, *inputs):
    """Return a network of one layer with random weights, and its noised images."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 32)), jnp.float32)
    params = module.init(jax.random.key(0), x, *inputs)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape)), params)

    def fn(params, x, t, cond):
        return module.apply({"params": params}, x, *inputs)

    return {"main": Network(fn, params)}, x


def test_with_perturbed_attention_each_pixel_sees_itself_alone():
    networks, x = layer(AttentionBlock(2, jnp.float32), None)
    guided = partial(prediction, x=x, networks=networks, conds={"caption": np.zeros(2)})
    params = networks["main"].params
    h = GroupNorm().apply({"params": params["norm"]}, x)
    # Of each head the packed channels are those of query, key and value.
    packed = h @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    value = packed.reshape(2, 3, 3, 2, 3, 16)[..., 2, :].reshape(2, 3, 3, 32)
    weak = x + value @ params["proj"]["kernel"] + params["proj"]["bias"]
    plain = guided().eps
    assert np.abs(plain - weak).max() > 1
    assert_close(guided(make("perturbed_attention", 0.0)).eps, weak, 1e-4)
    assert_close(guided(make("perturbed_attention", 3.0)).eps, weak + 3 * (plain - weak), 1e-4)
    assert_equal(guided(make("perturbed_attention", 1.0)).eps, plain)


class _Dropped(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return GroupNorm(name="norm_2")(x.astype(self.dtype)).astype(x.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_situ_guidance_leads_away_from_dropout(dtype):
    networks, x = layer(_Dropped(dtype))
    guided = partial(prediction, x=x, networks=networks, conds={"caption": np.zeros(2)})
    plain = np.asarray(guided().eps)
    assert_equal(guided(make("in_situ", 5.0, rate=0.0)).eps, plain)
    weak = np.asarray(guided(make("in_situ", 0.0, rate=0.5)).eps)
    dropped = weak == 0
    assert 0.4 < dropped.mean() < 0.6
    assert_close(weak, np.where(dropped, 0, 2 * plain), 1e-5)
    assert_close(guided(make("in_situ", 3.0, rate=0.5)).eps, weak + 3 * (plain - weak), 1e-5)
    assert_equal(guided(make("in_situ", 0.0, rate=0.5)).eps, weak)
    assert (np.asarray(guided(make("in_situ", 0.0, rate=0.5), t=501.0).eps) != weak).any()


def test_the_object_gets_the_mean_colour():
    x = jnp.concatenate([X, -X, X / 2], axis=-1)
    goal = np.float32([[0.5, -0.5, 0.0]])
    before, after = (np.float64(prediction(*g, x=x).x_0) for g in ([], [make("colour", goal)]))
    ink = 1 - before.clip(-1, 1).min(-1, keepdims=True)

    def mean(x_0):
        return (ink * x_0).sum((1, 2)) / ink.sum((1, 2))

    assert_close(mean(after), np.broadcast_to(goal, (3, 3)), 1e-3)
    # The smallest change that does it is the same for all pixels, but for their ink.
    share = (ink * ink.sum((1, 2), keepdims=True)) / (ink**2).sum((1, 2), keepdims=True)
    assert_close(after - before, share * (goal - mean(before))[:, None, None], 1e-3)
    half = prediction(make("colour", goal, 0.5), x=x).x_0
    assert_close(half, (before + after) / 2, 1e-4)
    assert_equal(prediction(make("colour", goal, 0.0), x=x).x_0, prediction(x=x).x_0)


def test_the_layout_is_white_outside_its_box_alone():
    box = np.float32([[0.25, 0.0, 0.75, 0.5]])
    plain, found, half = (
        np.asarray(prediction(*g).x_0)
        for g in ([], [make("layout", box)], [make("layout", box, 0.5)])
    )
    inside = np.zeros((3, 4, 4, 1), bool)
    inside[:, :2, 1:3] = True
    assert_equal(found[inside], plain[inside])
    np.testing.assert_allclose(found[~inside], 1.0, atol=1e-6)
    assert_close(half[~inside], (1 + plain[~inside]) / 2, 1e-6)


def test_a_kaleidoscope_has_every_symmetry_of_the_square():
    fold = make("symmetry", function="kaleidoscope")
    x = np.asarray(run_plan(NETWORKS, CONDS, run_of([classifier_free(3.0), fold]), X, keys()).x)
    for turned in (x[:, ::-1], x[:, :, ::-1], x.swapaxes(1, 2), np.rot90(x, axes=(1, 2))):
        assert_equal(turned, x)
    assert x.std() > 0.01
    assert_close(predicted(fold, fold).x_0, predicted(fold).x_0, 1e-6)


def test_tiles_shift_with_their_noise():
    tiles, half = make("tiling"), partial(jnp.roll, shift=(2, 2), axis=(1, 2))
    place = jnp.arange(16.0).reshape(4, 4, 1)
    placed = {"main": Network(lambda params, x, t, cond: jnp.tanh(x * place), None)}
    x_0 = [prediction(tiles, x=x, networks=placed).x_0 for x in (X, half(X))]
    assert_close(x_0[1], half(x_0[0]), 1e-6)
    plain = [prediction(x=x, networks=placed).x_0 for x in (X, half(X))]
    assert np.abs(plain[1] - half(plain[0])).max() > 0.1
    # The windows sum to 1: where every pixel is predicted alone, tiles change nothing.
    alone = {"main": Network(lambda params, x, t, cond: jnp.tanh(x), None)}
    assert_close(prediction(tiles, networks=alone).x_0, prediction(networks=alone).x_0, 1e-6)


def test_an_anagram_upside_down_is_the_anagram_of_the_swapped_prompts():
    swapped = OTHERS | {"caption": OTHERS["other"], "other": OTHERS["caption"]}
    words = make("anagram", "b", 3.0)
    found = prediction(words, x=X[:, ::-1], conds=swapped).eps
    assert_close(found[:, ::-1], prediction(words).eps, 1e-6)
    plain = prediction(make("anagram", "b", 1.0)).eps
    up = toy(0.9, X, jnp.full(3, 500.0), OTHERS["caption"])[..., :1]
    down = toy(0.9, X[:, ::-1], jnp.full(3, 500.0), OTHERS["other"])[:, ::-1, :, :1]
    assert_close(plain, (up + down) / 2, 1e-5)


@pytest.mark.parametrize(("level", "prompt"), [(0.0, "first"), (1e6, "caption")])
def test_a_prompt_schedule_of_one_part_is_that_prompt(level, prompt):
    run = run_of([make("prompt_schedule", "b", level, function="first")])
    found = run_plan(NETWORKS, OTHERS, run, X, keys()).x
    alone = run_plan(NETWORKS, OTHERS | {"caption": OTHERS[prompt]}, run_of(), X, keys()).x
    assert_close(found, alone, 1e-6 * np.abs(alone).max())


def test_every_pixel_has_a_colour_of_the_palette():
    colours = jnp.array([[[-0.8], [-0.1], [0.7]]])
    run = run_of([make("palette", colours)])
    x = np.asarray(run_plan(NETWORKS, CONDS, run, X, keys()).x)
    assert set(np.unique(x.round(3)).tolist()) <= {
        np.float32(c).round(3) for c in (-0.8, -0.1, 0.7)
    }
    assert len(np.unique(x.round(3))) > 1


# --- costs


def evaluations(*guidances):
    """Return the network evaluations of a step, in images per image."""
    seen = []

    def counting(params, x, t, cond):
        seen.append(len(x) // len(X))
        return toy(params, x, t, cond)

    prediction(*guidances, networks={"main": Network(counting, np.float32(0.9))})
    return sum(seen)


COSTS = {
    "scheduled_scale": (lambda: make("scheduled_scale", 3.0), 2),
    "frequency_scales": (lambda: make("frequency_scales", 1.0, 3.0), 2),
    "perturbed_attention": (lambda: make("perturbed_attention", 3.0), 2),
    "in_situ": (lambda: make("in_situ", 3.0), 2),
    "colour": (lambda: make("colour", jnp.zeros((1, 1))), 1),
    "layout": (lambda: make("layout", jnp.ones((1, 4))), 1),
    "symmetry": (lambda: make("symmetry", function="kaleidoscope"), 1),
    "tiling": (lambda: make("tiling"), 4),
    "anagram": (lambda: make("anagram", "b"), 4),
    "prompt_schedule": (lambda: make("prompt_schedule", "b", function="first"), 2),
    "palette": (lambda: make("palette", jnp.zeros((1, 2, 1))), 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_what_the_example_and_the_page_say(name):
    guidance, cost = COSTS[name]
    assert evaluations(guidance()) == cost
    text = import_module(name).__doc__
    assert re.search(rf"Cost: {cost}\b" if cost > 1 else r"Cost: (1|no)\b", text.replace("\n", " "))
    assert f"python examples/guidance/{name}.py" in text
    page = PAGE.read_text()
    (shown,) = re.findall(rf"## ([^\n]+)\n\n!\[[^\n]*/{name}\.png", page)
    said = rf"{cost} predictions" if cost > 1 else "no prediction of its own"
    assert re.search(rf"\| \[{shown}\].* \| {said}", page)


# --- programs and page


@pytest.mark.parametrize("name", NAMES)
def test_each_program_saves_an_image_of_its_guidance(name, monkeypatch):
    """The guidance that it shows runs on a real network of 64x64; nothing is compiled."""
    found = {}

    def show(shown, prompts, before, after, **options):
        found[shown] = (prompts, before, after)

    module = import_module(name)
    monkeypatch.setattr(module, "show", show)
    module.main()
    ((prompts, before, after),) = found.values()
    assert list(found) == [name] and prompts
    size = replace(TINY, image_size=64, channel_mult=(1, 1, 1, 1), attention_ds=(8,))
    network = GLIDE(size)
    x = jnp.zeros((len(prompts), 64, 64, 3))
    tokens = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)
    params = jax.eval_shape(partial(init_params, network), jax.random.key(0))
    text = jax.eval_shape(
        lambda p: network.apply({"params": p}, *tokens, method=GLIDE.encode_text), params
    )

    def predict(params, text, x):
        text = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(prompts), 0), text)

        def fn(params, x, t, cond):
            return network.apply({"params": params}, x, t, **cond)

        networks = {"main": Network(fn, params)}
        conds = {branch.name: {"text": text} for branch in branches_of([*before, *after])}
        return prediction(*after, x=x, networks=networks, conds=conds).eps

    assert jax.eval_shape(predict, params, text, x).shape == x.shape


def test_show_saves_both_halves(tmp_path, capsys, monkeypatch):
    show = import_module("show")
    monkeypatch.setattr(show.glide, "load", lambda weights, **options: exact_pipeline())
    after = [make("symmetry", function="kaleidoscope")]
    before, after = show.show("both", ["red", "blue"], [], after, out=tmp_path, progress=False)
    assert before.shape == after.shape == (2, 8, 8, 3)
    assert_equal(after, after[:, ::-1])
    assert (before != before[:, ::-1]).any()
    sheet = np.asarray(Image.open(tmp_path / "both.png"))[::2, ::2]
    assert sheet.shape == (8, 4 * 8 + 16, 3)
    assert_equal(sheet[:, :8], before[0])
    assert_equal(sheet[:, -8:], after[1])
    assert "both.png" in capsys.readouterr().out


def test_the_page_shows_every_example_and_nothing_else():
    text = PAGE.read_text()
    assert sorted(re.findall(r"\]\(\.\./\.\./examples/guidance/(\w+)\.py\)", text)) == NAMES
    assert sorted(re.findall(r"\]\(images/gallery/(\w+)\.png\)", text)) == NAMES
    files = {path.stem: path.stat().st_size for path in PAGE.parent.glob("images/gallery/*")}
    assert sorted(files) == NAMES and max(files.values()) <= 60 * 1024
    sources = re.findall(r"arxiv\.org/abs/(\d+\.\d+)", text)
    assert len(sources) == len(NAMES) == len(COSTS)
    for name in NAMES:
        assert set(sources) & set(re.findall(r"\d{4}\.\d{5}", import_module(name).__doc__)), name


@pytest.mark.parametrize("name", NAMES)
def test_each_guidance_is_at_most_15_lines(name):
    """Its functions without docstrings and blank lines; `twice` arranges images."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    count = 0
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name not in ("main", "twice"):
            del function.body[0]
            count += sum(bool(line.strip()) for line in ast.unparse(function).splitlines())
    assert 1 < count <= 15
