"""One settings object: what it makes of samplers, grids and guidance, and what it refuses."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest

import glide_jax as glide
from glide_jax.diffusion.grids import SPACINGS
from glide_jax.diffusion.guidance import branches_of
from glide_jax.options import Sampling
from glide_jax.prompts import read_prompts
from glide_jax.settings import METHODS, WITH_ETA, Settings, describe

SCHEDULE = glide.make_schedule("cosine")
PLAIN = read_prompts("red")
SEVERAL = read_prompts(["red AND blue :0.5 NOT green", "red"])


def names(settings, prompts=PLAIN, *maps):
    return [part.name for g in settings.guidances(prompts, *maps) for part in g.parts()]


def prompts_of(settings, prompts=PLAIN):
    return {b.name: b.prompt for b in branches_of(settings.guidances(prompts))}


# --- samplers and grids


@pytest.mark.parametrize("sampler", glide.SOLVERS)
def test_every_sampler_by_its_name(sampler):
    settings = Settings(steps=12, sampler=sampler)
    assert len(settings.plan(SCHEDULE, settings.guidances(PLAIN))) >= 10
    if sampler in WITH_ETA:
        noisy, still = (
            settings.changed(eta=eta).plan(SCHEDULE, ()).table.s.max() for eta in (1.0, 0.0)
        )
        assert noisy > 0 == still
    else:
        says = f"eta belongs to .*, not to {re.escape(sampler)}"
        with pytest.raises(glide.UsageError, match=says):
            settings.changed(eta=0.5).solver()


def test_the_samplers_with_noise_of_their_own():
    assert set(WITH_ETA) == {"ddim", "dpm++2m-sde", "sa"}


@pytest.mark.parametrize("spacing", ["logsnr", "uniform", "rho", "trailing", "optimised"])
def test_strength_leaves_the_last_levels_of_any_grid(spacing):
    settings = Settings(steps=10, spacing=spacing)
    whole = settings.grid(SCHEDULE)
    for strength, left in ((1.0, 10), (0.5, 5), (0.26, 3), (0.01, 1)):
        assert np.array_equal(settings.changed(strength=strength).grid(SCHEDULE), whole[-left:])


def test_samplers_that_go_back():
    settings = Settings(steps=10)
    rows = len(settings.plan(SCHEDULE, ()))
    again = settings.changed(repaint=(3, 4)).plan(SCHEDULE, ())
    # Three jumps fit into nine steps, each done three times more.
    assert rows == 10 and len(again) == 10 + 3 * 3 * 3
    assert 10 < len(settings.changed(restart=(0.3, 3.0, 2)).plan(SCHEDULE, ())) < 40


# --- guidance


def test_what_acts_and_in_which_order():
    assert names(Settings()) == ["classifier_free", "clip"]
    assert names(Settings(guidance_scale=1.0)) == ["clip"]
    known = glide.known_pixels(image=np.zeros((1, 8, 8, 3)), mask=np.zeros((1, 8, 8, 1)))
    full = Settings(autoguidance_scale=2.0, guidance_rescale=0.7, guidance_method="apg")
    assert names(full, PLAIN, known) == ["apg", "autoguidance", "rescale", "known_pixels", "clip"]
    assert names(full.changed(threshold=0.99), PLAIN, known)[3:] == [
        "dynamic_threshold",
        "known_pixels",
    ]
    assert names(Settings(), SEVERAL) == ["all_of", "clip"]
    assert names(Settings(guidance_scale=1.0), SEVERAL) == ["all_of", "clip"]
    assert names(Settings(guidance=[glide.clip()]), PLAIN, known) == ["clip", "known_pixels"]


def test_a_span_is_of_guidance_alone():
    settings = Settings(guidance_span=(0.3, 5.0), guidance_rescale=0.5)
    spans = [part.span for g in settings.guidances(PLAIN) for part in g.parts()]
    assert spans == [(0.3, 5.0), (0.3, 5.0), (0.0, float("inf"))]
    assert names(settings.changed(guidance_scale=1.0)) == ["rescale", "clip"]


@pytest.mark.parametrize("method", METHODS)
def test_a_negative_prompt_takes_the_place_of_the_empty_one(method):
    settings = Settings(guidance_method=method, guidance_scale=0.5, negative_prompt="green")
    assert prompts_of(settings) == {"cond": None, "null": "green"}
    assert prompts_of(settings.changed(negative_prompt=""))["null"] == ""


def test_captions_joined_by_and_and_not_are_weighed_for_each_picture():
    settings = Settings(guidance_scale=4.0, negative_prompt="dark")
    found = settings.guidances(SEVERAL)[0]
    weights = [np.asarray(w).tolist() for w in found.args["weights"].values()]
    # The picture's own caption is in the prediction already, once.
    assert weights == [[3.0, 3.0], [2.0, 0.0], [-4.0, 0.0]]
    branches = prompts_of(settings, SEVERAL)
    assert branches.pop("cond") is None and branches.pop("null") == "dark"
    assert [[part.text for part in column] for column in branches.values()] == [
        ["blue", ""],
        ["green", ""],
    ]


# --- as plain values


def test_metadata_are_json_and_make_the_settings_again():
    settings = Settings(
        steps="fast27", eta=0.5, sampler="ddim", restart=(0.3, 3.0, 2), guidance_span=(0.3, 5.0)
    )
    made = json.loads(json.dumps(describe(settings), allow_nan=False))
    again = Settings().changed(**made)
    assert describe(again) == describe(settings) | {
        "restart": [0.3, 3.0, 2],
        "guidance_span": [0.3, 5.0],
    }
    wanted, found = (s.plan(SCHEDULE, s.guidances(PLAIN)).table for s in (settings, again))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_guidances_are_described_by_their_numbers():
    def bowl(params, x, t, cond):
        return x.sum(axis=(1, 2, 3))

    guidance = [
        glide.compose(glide.classifier_free(scale=[1.0, 2.0]), glide.clip()).within(0.3, 5.0),
        glide.image_loss(loss=glide.Network(bowl, np.ones(9)), cond=np.ones((2, 3)), scale=0.1),
    ]
    made = json.loads(json.dumps(describe(Settings(guidance=guidance)), allow_nan=False))
    scale, clip, loss = made["guidance"]
    assert scale == {"name": "classifier_free", "span": [0.3, 5.0], "scale": [1.0, 2.0]}
    assert clip["span"] == [0.3, 5.0] and "bowl" in loss["loss"]
    assert loss["cond"] == "ndarray (2, 3)" and loss["span"] == [0.0, "inf"]
    assert "guidance_scale" not in made


def test_the_command_line_has_every_setting():
    given = {f.name for f in fields(Sampling)}
    assert given == {f.name for f in fields(Settings)} - {"guidance"}
    assert all(f.default is None for f in fields(Sampling))
    # Its help is the settings' docstring.
    named = {
        name
        for name in (*glide.SOLVERS, *SPACINGS)
        if re.search(rf"\W{re.escape(name)}\b", Sampling.__doc__)
    }
    assert named == {*glide.SOLVERS, *SPACINGS}


# --- what cannot be


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"guidance_method": "cfgg"}, "choose cfg, cfg\\+\\+, apg"),
        ({"guidance_method": "cfg++"}, "guidance_scale from 0 to 1, not 3"),
        ({"guidance_scale": 1.0, "negative_prompt": "green"}, "needs a guidance_scale"),
        ({"guidance_span": (5.0, 0.3)}, "a span needs"),
        ({"guidance_rescale": 1.5}, "amount"),
        ({"threshold": 2.0}, "quantile"),
        ({"sampler": "ddim", "eta": 1.5}, "between 0 and 1"),
        ({"strength": -0.5}, "strength lies above 0"),
        ({"restart": (0.3, 3.0, 1), "repaint": (2, 2)}, "choose one"),
        ({"restart": (3.0, 0.3, 1)}, "a restart needs"),
        ({"repaint": (50, 2)}, "take more than 25"),
        ({"guidance_method": "cfg++", "guidance_scale": 0.5, "sampler": "heun"}, "cfg_plus_plus"),
    ],
)
def test_settings_that_cannot_be_carried_out_are_said(settings, says):
    settings = Settings(**settings)
    with pytest.raises(glide.UsageError, match=says):
        settings.plan(SCHEDULE, settings.guidances(PLAIN))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guidance_scal": 3.0}, "did you mean 'guidance_scale'"),
        ({"guidance": [], "threshold": 0.9}, "takes the place of threshold"),
    ],
)
def test_changes_that_cannot_be_made_are_said(changes, says):
    with pytest.raises(glide.UsageError, match=says):
        Settings().changed(**changes)


def test_methods_and_lists_without_and_and_not():
    for settings, says in (
        (Settings(guidance_method="apg"), "need the guidance_method cfg, not apg"),
        (Settings(guidance=[glide.clip()]), "give all_of there"),
    ):
        with pytest.raises(glide.UsageError, match=says):
            settings.guidances(SEVERAL)


def test_none_leaves_a_setting_as_it_is():
    settings = Settings(steps=7, eta=0.5)
    assert settings.changed(steps=None, eta=None, sampler="ddim") == Settings(7, "ddim", eta=0.5)
