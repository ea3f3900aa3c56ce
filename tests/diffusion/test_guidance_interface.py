"""Guidance as a value: its constructor, its parameters, and a negative prompt."""

import inspect
from functools import partial

import jax
import pytest

from glide_jax.diffusion.guidance import (
    NULL,
    Branch,
    Network,
    apg,
    autoguidance,
    cfg_plus_plus,
    clamp_x_0,
    classifier_free,
    classifier_guidance,
    compose,
    dynamic_threshold,
    guidance,
    guidance_rescale,
)
from glide_jax.errors import UsageError

INTERVAL = (0.3, 5.0)


# --- constructors


@guidance(NULL, weight=(0, 2))
def weighted(predict, x, point, *, amount, weight=1.0, offset=0.0):
    """A guidance with several parameters."""
    return predict(x, point)


@guidance()
def unchanged(predict, x, point):
    """A guidance without parameters."""
    return predict(x, point)


SUM = Network(lambda params, x, t, cond: x.sum(axis=(1, 2, 3)), None)
limited = partial(classifier_guidance, SUM, None, 1.0)


@pytest.mark.parametrize(
    ("by_position", "by_name"),
    [
        (lambda: classifier_free(3.0), lambda: classifier_free(scale=3.0)),
        (lambda: clamp_x_0(-0.5, 0.5), lambda: clamp_x_0(low=-0.5, high=0.5)),
        (lambda: apg(4.0, 0.3, 0.5), lambda: apg(scale=4.0, eta=0.3, momentum=0.5)),
        (lambda: apg(4.0, radius=1.5), lambda: apg(radius=1.5, scale=4.0)),
        (lambda: weighted(0.5, 2.0, 1.0), lambda: weighted(offset=1.0, weight=2.0, amount=0.5)),
    ],
)
def test_parameters_by_position_and_by_name_are_equal(by_position, by_name):
    one, other = by_position(), by_name()
    assert one.args == other.args and list(one.args) == list(other.args)
    assert (one.fn, one.needs, one.remembers) == (other.fn, other.needs, other.remembers)


def test_editors_see_the_parameters():
    assert list(inspect.signature(apg).parameters) == ["scale", "eta", "momentum", "radius"]
    assert inspect.signature(apg).parameters["radius"].default == 2.5
    assert apg.__doc__ is not None and "Adaptive projected guidance" in apg.__doc__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier_free(), "classifier_free needs a value for scale"),
        (lambda: classifier_free(strength=3.0), "classifier_free takes scale, not strength"),
        (lambda: classifier_free(3.0, 2.0), "too many values: classifier_free takes scale"),
        (lambda: classifier_free(3.0, scale=2.0), "got scale twice: by position and by name"),
        (lambda: apg(3.0, 0.1, eta=0.2), "apg got eta twice: by position and by name"),
        (lambda: weighted(1.0, 3.0), "weighted needs 0 <= weight <= 2, not 3.0"),
        (lambda: weighted(weight=1.0), "weighted needs a value for amount"),
        (lambda: unchanged(1.0), "too many values: unchanged takes no parameters"),
        (lambda: unchanged(rows=1), "unchanged takes no parameters, not rows"),
        (lambda: cfg_plus_plus(5.0), "cfg_plus_plus needs 0 <= scale <= 1, not 5.0"),
        (lambda: cfg_plus_plus([0.5, -0.1]), "cfg_plus_plus needs 0 <= scale <= 1, not"),
        (lambda: clamp_x_0(1.0, -1.0), "clamp_x_0 needs low <= high, not 1.0"),
        (lambda: clamp_x_0(high="b"), "high of clamp_x_0 is a number, or one per image, not 'b'"),
        (lambda: limited(-1.0), "classifier_guidance needs 0 <= limit <= inf, not -1.0"),
        (
            lambda: guidance_rescale(None),
            "amount of guidance_rescale is a number, .*, not None",
        ),
        (lambda: dynamic_threshold("a"), "quantile of dynamic_threshold is a number"),
    ],
)
def test_parameters_that_a_guidance_refuses(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert str(caught.value).isprintable()


def test_parameters_within_their_ranges_pass_and_so_do_traced_ones():
    assert limited(None).args["limit"] is None and limited([0.0, 0.2]).args["limit"] == [0.0, 0.2]
    assert clamp_x_0([-1.0, 0.0], [1.0, 0.0]).args["low"] == [-1.0, 0.0]
    made = jax.jit(lambda number: (cfg_plus_plus(number), clamp_x_0(-number), limited(number)))(0.5)
    assert [guided.name for guided in made] == ["cfg_plus_plus", "clamp_x_0", "classifier_guidance"]


def test_a_range_without_its_parameter_is_refused_at_once():
    with pytest.raises(UsageError, match="shifted has no parameter scal for a range"):

        @guidance(scal=(0, 1))
        def shifted(predict, x, point, *, scale):
            return predict(x, point)


# --- a negative prompt


def test_a_negative_prompt_is_the_caption_of_the_null_branch():
    guided = classifier_free(3.0).within(*INTERVAL).with_negative_prompt("ugly")
    assert guided.needs == (Branch("null", prompt="ugly"),)
    assert guided.interval == INTERVAL and guided.args == {"scale": 3.0}


def test_a_composition_is_against_a_prompt_in_all_its_members():
    free, weak = classifier_free(3.0), autoguidance(2.0)
    nested = compose(compose(free.within(*INTERVAL), clamp_x_0()), weak).with_negative_prompt(
        "ugly"
    )
    flat = [free.within(*INTERVAL).with_negative_prompt("ugly"), clamp_x_0(), weak]
    assert [member.needs for member in nested.members()] == [member.needs for member in flat]
    assert [member.interval for member in nested.members()] == [member.interval for member in flat]
    assert Branch("null", prompt="ugly") in nested.needs and NULL not in nested.needs


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        (autoguidance(2.0), "autoguidance has no empty prompt that 'ugly' could replace"),
        (clamp_x_0(), "clamp_x_0 has no empty prompt"),
        (classifier_free(3.0).with_negative_prompt("bad"), "classifier_free has no empty prompt"),
        (compose(clamp_x_0()), "compose has no empty prompt"),
    ],
)
def test_guidance_without_the_empty_prompt_takes_no_negative_one(guided, message):
    with pytest.raises(UsageError, match=message) as caught:
        guided.with_negative_prompt("ugly")
    assert str(caught.value).isprintable()


def test_two_intervals_hold_together():
    free = classifier_free(3.0)
    assert free.within(0.1, 5.0).within(0.3, 9.0).interval == (0.3, 5.0)
    composed = compose(free.within(0.1, 5.0)).within(0.3, 9.0)
    assert [member.interval for member in composed.members()] == [(0.3, 5.0)]


@pytest.mark.parametrize(
    "guided",
    [
        lambda: classifier_free(2.0).within(0.3, 1.0),
        lambda: compose(clamp_x_0(), classifier_free(2.0).within(0.3, 1.0)),
    ],
)
def test_intervals_without_a_common_level_are_refused(guided):
    assert guided().within(0.5, 3.0).members()[-1].interval == (0.5, 1.0)
    message = (
        r"^classifier_free would act nowhere within \(1\.0, 3\.0\): "
        r"an earlier interval has no level in common with it$"
    )
    with pytest.raises(UsageError, match=message):
        guided().within(1.0, 3.0)
