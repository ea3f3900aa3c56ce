"""Prompts: what AND, NOT and weights mean, and what is left alone."""

import numpy as np
import pytest

import glide_jax as glide
from glide_jax.prompts import Part, encode_parts, mixed, read_prompt, read_prompts
from tests.painter import SPREAD, colour, painter, pixels


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red apple AND a leaf :0.5", [("a red apple", 1), ("a leaf", 0.5)]),
        ("a cat NOT black", [("a cat", 1), ("black", -1)]),
        ("a :2 AND b :.25 NOT c :1.5", [("a", 2), ("b", 0.25), ("c", -1.5)]),
        ("a  AND\tb AND NOT c", [("a", 1), ("b", 1), ("c", -1)]),
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
        "  spaces  ",
    ],
)
def test_a_prompt_without_the_words_is_one_caption_to_the_letter(prompt):
    assert read_prompt(prompt).parts == (Part(prompt),)


@pytest.mark.parametrize("prompt", ["AND a cat", "NOT a cat", "a cat AND", "a AND :2 NOT b", "AND"])
def test_a_word_without_a_caption_on_each_side_is_said(prompt):
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


def test_an_upsampler_reads_what_is_wanted_as_one_caption():
    joined = read_prompt("a red apple AND a leaf :0.5 NOT a worm").joined()
    assert [part.ends for part in joined.parts] == [("a red apple and a leaf",) * 2]
    start, end = read_prompts(["a AND b", "c"])
    half = mixed(start, end, 0.5).joined()
    assert half.parts == (Part("a and b", 1.0, "c", 0.5),)


def test_texts_are_encoded_once_and_mixed_on_the_way():
    asked = []

    def encode(texts):
        asked.append(texts)
        return {"length": np.array([[len(text)] for text in texts], np.float32)}

    parts = [Part("ab"), Part("ab", 1.0, "abcd", 0.25), Part("abcd"), Part("", 1.0, "ab", 1.0)]
    assert encode_parts(encode, parts)["length"].ravel().tolist() == [2, 2.5, 4, 2]
    assert asked == [["ab", "abcd", ""]]


# Of pictures of equal spread, guidance moves the mean as it moves the noise, and nothing else.
@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("red", {"red": 2.0}),
        ("red AND blue :0.5", {"red": 2.0, "blue": 1.0}),
        ("red :0.5 AND green :0.5 NOT blue :0.25", {"red": 1.0, "green": 1.0, "blue": -0.5}),
    ],
)
def test_what_captions_with_weights_draw(prompt, wanted):
    pipe = painter(settings={"guidance_scale": 2.0, "steps": 30, "sampler": "unipc3"})
    found = pipe([prompt, "red"], num=16)
    mean = sum(weight * colour(caption) for caption, weight in wanted.items())
    drawn = pixels(found.images)
    for pictures, colours in ((drawn[:16], mean), (drawn[16:], 2.0 * colour("red"))):
        assert np.abs(pictures.mean(axis=(0, 1, 2)) - colours).max() < 5 * SPREAD / 32
        assert abs(pictures.std(axis=(0, 1, 2)).mean() / SPREAD - 1) < 0.05


def test_a_negative_prompt_is_led_away_from():
    pipe = painter(settings={"guidance_scale": 2.0, "steps": 30, "sampler": "unipc3"})
    found = pixels(pipe("red", num=16, negative_prompt="green").images)
    wanted = 2 * colour("red") - colour("green")
    assert np.abs(found.mean(axis=(0, 1, 2)) - wanted).max() < 5 * SPREAD / 32
    plain, empty = (pipe("red", negative_prompt=text).images for text in (None, ""))
    assert np.array_equal(plain, empty)


def test_the_upsampler_is_not_asked_for_each_caption():
    seen = []

    class Listening(type(painter())):
        def text_features(self, captions):
            seen.append(captions)
            return np.zeros((len(captions), 3), np.float32)

    up = painter("superres", size=16)
    up = Listening(**{name: getattr(up, name) for name in up.__dataclass_fields__})
    pipe = painter(upsampler=up, settings={"guidance_scale": 2.0})
    assert pipe("red AND blue NOT green").images.shape == (1, 16, 16, 3)
    assert seen == [["red and blue"]]
