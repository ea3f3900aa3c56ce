"""Text files and their images: beside each other, or in parallel folders."""

import unicodedata

import pytest

from glide_jax.data.pairing import pair

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "image, text",
    [
        ("a.png", "a.txt"),
        ("a.JPG", "a.TXT"),
        ("a.png", "a.caption"),
        ("a.png", "a.png.txt"),
        ("a.v1.png", "a.v1.txt"),
        ("x/a b.avif", "x/a b.txt"),
        ("a.png", "a.json"),
        (f"{NFD}.png", f"{NFC}.txt"),
        (f"{NFC}/a.png", f"{NFD}/a.txt"),
        ("images/a.png", "texts/a.txt"),
        ("images/x/a.png", "captions/x/a.caption"),
        ("x/images/a.png", "x/labels/a.TXT"),
        ("Images/a.png", "Texts/a.txt"),
        ("images/a.png", "texts/a.png.txt"),
        ("x/a.png", "texts/x/a.txt"),
        ("a.png", "texts/a.txt"),
        ("holiday/a.png", "captions/a.txt"),
    ],
)
def test_the_text_of_an_image_is_found(image, text):
    pairs = pair(sorted([image, text]))
    assert pairs.images == [image] and pairs.sidecars == [(text,)]
    assert pairs.bare == pairs.unused == []


def test_another_name_is_another_image():
    pairs = pair(["a.png", "ab.txt", "x/a.txt"])
    assert not pairs.images and pairs.bare == [("a.png", "no caption")]
    assert pairs.unused == [
        ("ab.txt", "text without an image"),
        ("x/a.txt", "text without an image"),
    ]


def test_classes_do_not_share_the_captions_of_one_folder():
    names = ["cat/0.png", "dog/0.png", "texts/0.txt"]
    assert [fault.name for fault in pair(names).bare] == ["cat/0.png", "dog/0.png"]


def test_a_class_that_is_called_text_keeps_its_captions():
    names = ["images/0.png", "text/0.png", "text/0.txt"]
    pairs = pair(names)
    assert pairs.images == ["text/0.png"] and pairs.bare == [("images/0.png", "no caption")]


def test_the_nearest_text_is_taken_and_others_are_named():
    names = ["a.caption", "a.json", "a.png", "a.png.txt", "a.txt", "texts/a.txt"]
    pairs = pair(names)
    assert pairs.sidecars == [("a.png.txt", "a.json")]
    assert [fault.name for fault in pairs.unused] == ["a.caption", "a.txt", "texts/a.txt"]
    assert pair(names[:3], "caption").sidecars == [("a.caption", "a.json")]


def test_two_images_may_share_a_text():
    assert pair(["a.jpg", "a.png", "a.txt"]).sidecars == [("a.txt",), ("a.txt",)]
