"""Prompts: what AND, NOT and weights mean, and what is left alone."""

import numpy as np
import pytest

import glide_jax as glide
from glide_jax.diffusion.guidance import Branch
from glide_jax.pipeline.prompts import (
    Part,
    encode_parts,
    interpolated,
    read_prompt,
    read_prompts,
)
from glide_jax.pipeline.runner import branch_captions
from glide_jax.pipeline.settings import Settings
from tests.support.exact_model import SPREAD, colour, exact_pipeline, pixels


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red apple AND a leaf :0.5", [("a red apple", 1), ("a leaf", 0.5)]),
        ("a cat NOT black", [("a cat", 1), ("black", -1)]),
        ("a :2 AND b :.25 NOT c :1.5", [("a", 2), ("b", 0.25), ("c", -1.5)]),
        ("a  AND\tb AND NOT c", [("a", 1), ("b", 1), ("c", -1)]),
        ("a :0 AND b :1.", [("a", 0), ("b", 1)]),
        ("a clock at 10:30 AND a map 1:500", [("a clock at 10:30", 1), ("a map 1:500", 1)]),
        ("a :-1 day AND a smile :-)", [("a :-1 day", 1), ("a smile :-)", 1)]),
    ],
)
def test_captions_with_weights(prompt, parts):
    found = read_prompt(prompt)
    assert [part[:2] for part in found.parts] == parts and found.text == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "salt and pepper, not blue",
        "a cat :3",
        "a clock at 10:30",
        "BRAND NEW, NOTHING ELSE",
    ],
)
def test_a_prompt_without_and_or_not_is_one_caption_unchanged(prompt):
    assert read_prompt(prompt).parts == (Part(prompt),)


@pytest.mark.parametrize(
    "caption",
    [
        "a dog :-1", "a dog :+1", "a dog :1e3", "a dog :1E-3", "a dog :-.5", "a dog :0,5",
        "a dog :50%", "a dog :inf", "a dog :nan", "a dog :1.2.3", "a dog : 0.5", "a dog : -1",
        "a dog:0.5", "a dog:-1", "a dog :\u22121", "a dog :-1 :2",
    ],
)  # fmt: skip
def test_a_weight_that_cannot_be_read_is_refused(caption):
    shown = caption.removesuffix(" :2")
    wanted = (
        f"cannot read the weight of {shown!r}: write a number after a space and a colon, such as "
        ":0.5, and NOT to guide away"
    )
    for prompt in (f"a cat AND {caption}", f"{caption} NOT a cat", f"A CAT AND {caption}"):
        with pytest.raises(glide.UsageError) as caught:
            read_prompt(prompt)
        assert str(caught.value) == wanted
    # Without AND and NOT it is text.
    assert read_prompt(caption).parts == (Part(caption),)


def test_an_endless_weight_and_one_of_capitals_are_refused():
    for prompt, caption in (("a AND b :" + "9" * 400, "b"), ("A AND B :-1", "B :-1")):
        with pytest.raises(glide.UsageError, match=f"^cannot read the weight of '{caption}': "):
            read_prompt(prompt)


@pytest.mark.parametrize(
    "around", ["  {}  ", "\ufeff{}", "{}\r\n", "\ufeff \u200b{}\t\u3000", "\u00a0{}\ufeff\n"]
)
def test_white_space_and_byte_order_marks_around_a_prompt_change_nothing(around):
    for prompt in ("a red apple", "a  cat AND a dog :0.5"):
        assert read_prompt(around.format(prompt)) == read_prompt(prompt)
    assert Settings().changed(negative_prompt=around.format("a dog")).negative_prompt == "a dog"
    branch = Branch("other", prompt=around.format("a dog"))
    assert branch_captions(branch, read_prompts("a cat")) == [Part("a dog")]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("DO NOT ENTER", True),
        ("A RED APPLE AND A TULIP", True),
        ("\u0416\u0423\u041a AND \u041a\u041e\u0422", True),
        ("A CAT :1 AND A DOG", False),
        ("a CAT AND A DOG", False),
        ("\u732b AND \u72ac", False),
        ("BRAND NEW", False),
    ],
)
def test_and_and_not_are_words_of_a_prompt_in_capitals_and_one_line_says_so(prompt, said, capsys):
    (found,) = read_prompts(prompt)
    assert (found.parts == (Part(prompt),)) == (said or prompt == "BRAND NEW")
    note = (
        f"note: AND and NOT are words in {prompt!r}, which is all capitals: write the captions in "
        "lower case to join them\n"
    )
    assert capsys.readouterr().err == (note if said else "")


@pytest.mark.parametrize("prompt", ["AND a cat", "NOT a cat", "a cat AND", "a AND :2 NOT b", "AND"])
def test_and_or_not_without_a_caption_on_each_side_is_refused(prompt):
    with pytest.raises(glide.UsageError, match="lacks one"):
        read_prompt(prompt)


def test_prompts_of_a_run_have_as_many_parts():
    found = read_prompts(["a AND b", "c"], num=2)
    assert [prompt.text for prompt in found] == ["a AND b", "a AND b", "c", "c"]
    assert found[2].parts == (Part("c"), Part("", 0.0))
    for wrong in ([], ["a", 3]):
        with pytest.raises(glide.UsageError):
            read_prompts(wrong)
    with pytest.raises(glide.UsageError, match="at least 1"):
        read_prompts("a", 0)


def test_an_upsampler_reads_the_wanted_captions_as_one():
    joined = read_prompt("a red apple AND a leaf :0.5 NOT a worm").joined()
    assert [part.ends for part in joined.parts] == [("a red apple and a leaf",) * 2]
    start, end = read_prompts(["a AND b", "c"])
    half = interpolated(start, end, 0.5).joined()
    assert half.parts == (Part("a and b", 1.0, "c", 0.5),)


def test_texts_are_encoded_once_and_interpolated():
    calls = []

    def encode(texts):
        calls.append(texts)
        return {"length": np.array([[len(text)] for text in texts], np.float32)}

    parts = [Part("ab"), Part("ab", 1.0, "abcd", 0.25), Part("abcd"), Part("", 1.0, "ab", 1.0)]
    assert encode_parts(encode, parts)["length"].ravel().tolist() == [2, 2.5, 4, 2]
    assert calls == [["ab", "abcd", ""]]


# For images of equal variance, guidance moves the mean as it moves the noise, and nothing else.
@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("red", {"red": 2.0}),
        ("red AND blue :0.5", {"red": 2.0, "blue": 1.0}),
        ("red :0.5 AND green :0.5 NOT blue :0.25", {"red": 1.0, "green": 1.0, "blue": -0.5}),
    ],
)
def test_captions_with_weights_move_the_mean(prompt, wanted):
    pipe = exact_pipeline(settings={"guidance_scale": 2.0, "steps": 30, "sampler": "unipc3"})
    found = pipe([prompt, "red"], num=16)
    mean = sum(weight * colour(caption) for caption, weight in wanted.items())
    generated = pixels(found.images)
    for images, wanted in ((generated[:16], mean), (generated[16:], 2.0 * colour("red"))):
        assert np.abs(images.mean(axis=(0, 1, 2)) - wanted).max() < 5 * SPREAD / 32
        assert abs(images.std(axis=(0, 1, 2)).mean() / SPREAD - 1) < 0.05


def test_guidance_leads_away_from_a_negative_prompt():
    pipe = exact_pipeline(settings={"guidance_scale": 2.0, "steps": 30, "sampler": "unipc3"})
    found = pixels(pipe("red", num=16, negative_prompt="green").images)
    wanted = 2 * colour("red") - colour("green")
    assert np.abs(found.mean(axis=(0, 1, 2)) - wanted).max() < 5 * SPREAD / 32
    plain, empty = (pipe("red", negative_prompt=text).images for text in (None, ""))
    assert np.array_equal(plain, empty)


def test_the_upsampler_reads_one_caption_alone():
    seen = []

    class Listening(type(exact_pipeline())):
        def encode_captions(self, captions):
            seen.append(captions)
            return np.zeros((len(captions), 3), np.float32)

    up = exact_pipeline("superres", size=16)
    up = Listening(**{name: getattr(up, name) for name in up.__dataclass_fields__})
    pipe = exact_pipeline(upsampler=up, settings={"guidance_scale": 2.0})
    assert pipe("red AND blue NOT green").images.shape == (1, 16, 16, 3)
    assert seen == [["red and blue"]]
