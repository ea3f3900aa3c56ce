"""Settings: samplers, timesteps and guidance by name, metadata, and what is refused."""

import inspect
import json
import re
import warnings
from dataclasses import fields, replace
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest

import glide_jax as glide
from glide_jax.diffusion.guidance import branches_of
from glide_jax.diffusion.solvers import traits_of
from glide_jax.diffusion.timesteps import SPACINGS
from glide_jax.pipeline.options import SamplingOptions, read_options
from glide_jax.pipeline.prompts import read_prompts
from glide_jax.pipeline.settings import (
    GUIDANCE_METHODS,
    Settings,
    SettingsArguments,
    describe,
    setting_texts,
)

SCHEDULE = glide.make_schedule("cosine")
PLAIN = read_prompts("red")
SEVERAL = read_prompts(["red AND blue :0.5 NOT green", "red"])


def names(settings, prompts=PLAIN, *maps):
    return [member.name for g in settings.guidances(prompts, *maps) for member in g.members()]


def prompts_of(settings, prompts=PLAIN):
    return {b.name: b.prompt for b in branches_of(settings.guidances(prompts))}


# --- samplers and timesteps


@pytest.mark.parametrize("sampler", glide.SOLVERS)
def test_every_sampler_by_its_name(sampler):
    settings = Settings(steps=12, sampler=sampler)
    assert len(settings.plan(SCHEDULE, settings.guidances(PLAIN))) >= 10
    if traits_of(sampler).takes_eta:
        noisy, still = (
            settings.changed(eta=eta).plan(SCHEDULE, ()).table.s.max() for eta in (1.0, 0.0)
        )
        assert noisy > 0 == still
    else:
        message = f"eta is for .*, not for {re.escape(sampler)}"
        with pytest.raises(glide.UsageError, match=message):
            settings.changed(eta=0.5).solver()


def test_what_is_known_of_each_sampler():
    ancestral = {"ddpm", "ddpm-small", "ddpm-large"}
    noisy = ancestral | {"dpm++2m-sde", "sa", "consistency"}
    for name in glide.SOLVERS:
        traits = traits_of(name)
        assert traits.guides_mean == (name in ancestral)
        assert traits.takes_eta == (name in {"ddim", "dpm++2m-sde", "sa"})
        assert traits.is_noisy == (name in noisy)
        table = Settings(steps=12, sampler=name).plan(SCHEDULE, ()).table
        assert table.mean_per_gradient.any() == traits.guides_mean != table.x_0_per_gradient.any()
    # The help text lists them by kind.
    deterministic, rest = setting_texts()["sampler"].split("Stochastic: ")
    with_noise, few_step = rest.split("For few-step students: ")
    named = [set(re.findall(r"[a-z0-9+-]+", text)) for text in (deterministic, with_noise)]
    assert named[0] >= set(glide.SOLVERS) - noisy and not named[0] & noisy
    assert named[1] >= noisy - {"consistency"} and few_step == "consistency."


@pytest.mark.parametrize("spacing", ["logsnr", "uniform", "karras", "trailing", "optimised"])
def test_strength_keeps_the_last_levels_of_any_spacing(spacing):
    settings = Settings(steps=10, spacing=spacing)
    whole = settings.timesteps(SCHEDULE)
    for strength, left in ((1.0, 10), (0.5, 5), (0.26, 3), (0.01, 1)):
        assert np.array_equal(
            settings.changed(strength=strength).timesteps(SCHEDULE), whole[-left:]
        )


def test_samplers_that_go_back():
    settings = Settings(steps=10)
    rows = len(settings.plan(SCHEDULE, ()))
    again = settings.changed(repaint=(3, 4)).plan(SCHEDULE, ())
    # Three jumps fit into nine steps, each repeated three times.
    assert rows == 10 and len(again) == 10 + 3 * 3 * 3
    assert 10 < len(settings.changed(restart=(0.3, 3.0, 2)).plan(SCHEDULE, ())) < 40


# --- guidance


def test_what_acts_and_in_which_order():
    assert names(Settings()) == ["classifier_free", "clamp_x_0"]
    assert names(Settings(guidance_scale=1.0)) == ["clamp_x_0"]
    known = glide.known_pixels(image=np.zeros((1, 8, 8, 3)), known=np.zeros((1, 8, 8, 1)))
    full = Settings(autoguidance_scale=2.0, guidance_rescale=0.7, guidance_method="apg")
    assert names(full, PLAIN, known) == [
        "apg",
        "autoguidance",
        "guidance_rescale",
        "known_pixels",
        "clamp_x_0",
    ]
    assert names(full.changed(dynamic_threshold=0.99), PLAIN, known)[3:] == [
        "dynamic_threshold",
        "known_pixels",
    ]
    assert names(Settings(), SEVERAL) == ["combine_prompts", "clamp_x_0"]
    assert names(Settings(guidance_scale=1.0), SEVERAL) == ["combine_prompts", "clamp_x_0"]
    assert names(Settings(guidance=[glide.clamp_x_0()]), PLAIN, known) == [
        "clamp_x_0",
        "known_pixels",
    ]


def test_an_interval_applies_to_linear_guidance_alone():
    settings = Settings(guidance_interval=(0.3, 5.0), guidance_rescale=0.5)
    intervals = [member.interval for g in settings.guidances(PLAIN) for member in g.members()]
    assert intervals == [(0.3, 5.0), (0.3, 5.0), (0.0, float("inf"))]
    assert names(settings.changed(guidance_scale=1.0)) == ["guidance_rescale", "clamp_x_0"]


@pytest.mark.parametrize("method", GUIDANCE_METHODS)
def test_a_negative_prompt_replaces_the_empty_one(method):
    settings = Settings(guidance_method=method, guidance_scale=0.5, negative_prompt="green")
    assert prompts_of(settings) == {"caption": None, "null": "green"}
    assert prompts_of(settings.changed(negative_prompt=""))["null"] == ""


def test_captions_joined_by_and_and_not_have_weights_per_image():
    settings = Settings(guidance_scale=4.0, negative_prompt="dark")
    found = settings.guidances(SEVERAL)[0]
    weights = [np.asarray(w).tolist() for w in found.args["weights"].values()]
    # The prediction contains the image's own caption once already.
    assert weights == [[3.0, 3.0], [2.0, 0.0], [-4.0, 0.0]]
    branches = prompts_of(settings, SEVERAL)
    assert branches.pop("caption") is None and branches.pop("null") == "dark"
    assert [[part.text for part in column] for column in branches.values()] == [
        ["blue", ""],
        ["green", ""],
    ]


# --- metadata


def test_metadata_are_json_and_reproduce_the_settings():
    settings = Settings(
        steps="fast27", eta=0.5, sampler="ddim", restart=(0.3, 3.0, 2), guidance_interval=(0.3, 5.0)
    )
    made = json.loads(json.dumps(describe(settings), allow_nan=False))
    again = Settings().changed(**made)
    assert describe(again) == describe(settings) | {
        "restart": [0.3, 3.0, 2],
        "guidance_interval": [0.3, 5.0],
    }
    wanted, found = (s.plan(SCHEDULE, s.guidances(PLAIN)).table for s in (settings, again))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_guidances_are_described_by_their_parameters():
    def bowl(params, x, t, cond):
        return x.sum(axis=(1, 2, 3))

    guidance = [
        glide.compose(glide.classifier_free(scale=[1.0, 2.0]), glide.clamp_x_0()).within(0.3, 5.0),
        glide.image_loss(loss=glide.Network(bowl, np.ones(9)), cond=np.ones((2, 3)), scale=0.1),
    ]
    made = json.loads(json.dumps(describe(Settings(guidance=guidance)), allow_nan=False))
    scale, clip, loss = made["guidance"]
    assert scale == {"name": "classifier_free", "interval": [0.3, 5.0], "scale": [1.0, 2.0]}
    assert clip["interval"] == [0.3, 5.0] and "bowl" in loss["loss"]
    assert loss["cond"] == "ndarray (2, 3)" and loss["interval"] == [0.0, "inf"]
    assert "guidance_scale" not in made


def test_the_command_line_has_every_setting_with_the_same_type_and_text(capsys):
    wanted = get_type_hints(SettingsArguments) | {"guidance_scale": float | None}
    del wanted["guidance"]
    assert get_type_hints(SamplingOptions) == wanted
    assert all(f.default is None for f in fields(SamplingOptions))
    texts = setting_texts()
    assert list(texts) == [f.name for f in fields(Settings)] and all(texts.values())
    with pytest.raises(SystemExit):
        read_options("", ["--help"])
    shown = re.sub(r"[\s│╭╮╰╯─]", "", capsys.readouterr().out)
    for name in wanted:
        text = texts[name][0].upper() + texts[name][1:]
        assert "".join(text.split()) in shown, name


def test_the_help_names_every_sampler_and_spacing_and_the_defaults_of_the_weights(capsys):
    for weights, scales in (("emoji64", ("2.5", "0.0")), ("openai/base", ("3.0", "0.0"))):
        with pytest.raises(SystemExit):
            read_options("", ["--weights", weights, "--help"])
        shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        named = [n for n in (*glide.SOLVERS, *SPACINGS) if re.search(rf"\W{re.escape(n)}\b", shown)]
        assert named == [*glide.SOLVERS, *SPACINGS]
        for option, scale in zip(("guidance", "clip-guidance"), scales, strict=True):
            text = shown.split(f" --{option}-scale FLOAT ")[1]
            assert text.split("(default: ")[1].startswith(f"{scale})")


def test_arguments_and_settings_have_the_same_names_and_types():
    wanted, found = get_type_hints(Settings), get_type_hints(SettingsArguments)
    assert list(found) == list(wanted)
    for name, kind in wanted.items():
        can_be_off = type(None) in get_args(kind) and name != "guidance"
        assert found[name] == (kind | Literal["none"] if can_be_off else kind) | None, name


@pytest.mark.parametrize("method", ["__call__", "stream", "invert", "variations", "interpolate"])
def test_the_signature_of_the_pipeline_lists_every_setting(method):
    parameters = inspect.signature(getattr(glide.Pipeline, method)).parameters
    assert {f.name for f in fields(Settings)} < set(parameters)
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def test_guidance_functions_replace_the_clip_guidance_of_the_weights_and_say_so():
    weights = Settings(clip_guidance_scale=4.0)
    with pytest.warns(UserWarning, match="give clip_guidance_scale=4 to keep it"):
        assert weights.changed(guidance=[glide.clamp_x_0()]).clip_guidance_scale == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            weights.changed(
                guidance=[glide.clamp_x_0()], clip_guidance_scale=2.0
            ).clip_guidance_scale
            == 2
        )
        assert Settings().changed(guidance=[glide.clamp_x_0()]).clip_guidance_scale == 0


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"guidance_method": "cfgg"}, "choose cfg, cfg\\+\\+, apg"),
        ({"guidance_method": "cfg++"}, "guidance_scale from 0 to 1, not 3"),
        ({"guidance_scale": 1.0, "negative_prompt": "green"}, "needs a guidance_scale"),
        ({"guidance_interval": (5.0, 0.3)}, "an interval needs"),
        ({"guidance_rescale": 1.5}, "amount"),
        ({"dynamic_threshold": 2.0}, "quantile"),
        ({"sampler": "ddim", "eta": 1.5}, "between 0 and 1"),
        ({"strength": -0.5}, "strength must be above 0"),
        ({"restart": (0.3, 3.0, 1), "repaint": (2, 2)}, "choose one"),
        ({"restart": (3.0, 0.3, 1)}, "a restart needs"),
        ({"repaint": (50, 2)}, "take more steps than 25"),
        ({"guidance_method": "cfg++", "guidance_scale": 0.5, "sampler": "heun"}, "cfg_plus_plus"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    settings = Settings(**settings)
    with pytest.raises(glide.UsageError, match=message):
        settings.plan(SCHEDULE, settings.guidances(PLAIN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scal": 3.0}, "did you mean 'guidance_scale'"),
        ({"guidance": [], "dynamic_threshold": 0.9}, "replaces dynamic_threshold"),
    ],
)
def test_impossible_changes_are_refused(changes, message):
    with pytest.raises(glide.UsageError, match=message):
        Settings().changed(**changes)


def test_and_and_not_need_plain_classifier_free_guidance():
    for settings, message in (
        (Settings(guidance_method="apg"), "need the guidance_method cfg, not apg"),
        (Settings(guidance=[glide.clamp_x_0()]), "give combine_prompts there"),
    ):
        with pytest.raises(glide.UsageError, match=message):
            settings.guidances(SEVERAL)


def test_none_keeps_a_setting():
    settings = Settings(steps=7, eta=0.5)
    assert settings.changed(steps=None, eta=None, sampler="ddim") == Settings(7, "ddim", eta=0.5)


ON = Settings(
    eta=0.5, restart=(0.3, 3.0, 2), guidance_interval=(0.3, 5.0), dynamic_threshold=0.9,
    strength=0.5, repaint=(2, 2),
)  # fmt: skip
OFF = ("eta", "restart", "guidance_interval", "dynamic_threshold", "strength", "repaint")


def test_the_word_none_turns_off_what_can_be_off():
    for name in OFF:
        assert ON.changed(**{name: "none"}) == replace(ON, **{name: None})
    assert ON.changed(**dict.fromkeys(OFF, "none")) == Settings()
    guided = Settings(guidance=[glide.clamp_x_0()])
    assert guided.changed(guidance="none", dynamic_threshold=0.9).guidance is None
    # It is text where a setting is text.
    assert Settings().changed(negative_prompt="none").negative_prompt == "none"


def test_the_word_none_on_the_command_line():
    words = [word for name in OFF for word in (f"--{name.replace('_', '-')}", "none")]
    options = read_options("", ["red", *words, "a blue one"])
    assert options.sampling.given_settings() == dict.fromkeys(OFF, "none")
    assert options.prompts == ("red", "a blue one")
    options = read_options("", ["--restart", "0.3", "2", "3", "none", "--repaint=none", "red"])
    assert options.sampling.given_settings() == {"restart": (0.3, 2.0, 3), "repaint": "none"}
    assert options.prompts == ("none", "red")


def test_metadata_reproduce_the_settings_whatever_the_defaults_of_the_weights():
    made = json.loads(json.dumps(describe(Settings(eta=0.5)), allow_nan=False))
    assert made["eta"] == 0.5 and made["guidance_interval"] == "none"
    assert ON.changed(**made) == Settings(eta=0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("clip_guidance_scale", "none"), ("guidance_scale", "3"), ("eta", "off")]
)
def test_text_for_a_number_is_refused_by_name(name, value):
    with pytest.raises(glide.UsageError, match=f"^{name} cannot be '{value}', which is text$"):
        Settings().changed(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    for name, given in (
        ("guidance_scale", value),
        ("guidance_scale", [1.0, value]),
        ("eta", value),
        ("temperature", np.float32(value)),
        ("restart", (0.3, value, 3)),
        ("guidance_rescale", value),
        ("autoguidance_scale", value),
        ("clip_guidance_scale", value),
        ("dynamic_threshold", value),
        ("strength", value),
    ):
        with pytest.raises(glide.UsageError, match=rf"^{name} must be finite, not "):
            Settings().changed(**{name: given})
    with pytest.raises(glide.UsageError, match="^scale of classifier_free must be finite, not "):
        glide.classifier_free(scale=value)


def test_an_interval_may_be_endless_but_not_nan():
    assert Settings().changed(guidance_interval=(0.3, float("inf"))).guidance_interval[1] > 1e300
    with pytest.raises(glide.UsageError, match="^guidance_interval must be a number, not "):
        Settings().changed(guidance_interval=(0.3, float("nan")))
    with pytest.raises(glide.UsageError, match="an interval needs 0 <= low < high"):
        glide.classifier_free(scale=3.0).within(float("nan"), 5.0)
