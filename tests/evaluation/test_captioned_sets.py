"""Captions of a folder, and the CLIP score."""

import numpy as np
import pytest
from PIL import Image

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.captioned_sets import clip_score, read_captions
from glide_jax.evaluation.features import open_scorer
from glide_jax.evaluation.image_sets import open_images
from glide_jax.pipeline.images import Images
from tests.support.extractor_weights import random_images

IMAGES = random_images(3, 8, 8, seed=0)


@pytest.fixture
def folder(tmp_path):
    for i, image in zip((10, 2, 1), IMAGES, strict=True):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path


def test_lines_belong_to_images_in_the_order_of_numbers(folder):
    (folder / "c.txt").write_text("one\n two \nten\n\n", "utf-8-sig")
    images = open_images(folder)
    assert images.names == ("1.png", "2.png", "10.png")
    assert read_captions(str(folder / "c.txt"), images) == ["one", "two", "ten"]


def test_captions_beside_are_text_files_or_prompts(folder, tmp_path_factory):
    for name in ("1", "2", "10"):
        (folder / f"{name}.txt").write_text(f"\nnumber {name}\nanother\n")
    found = read_captions("beside", open_images(folder))
    assert found == ["number 1", "number 2", "number 10"]
    own = tmp_path_factory.mktemp("samples")
    Images(IMAGES, ("b", "a", "c"), 0, (0, 1, 2), "none", {}).save(own)
    assert read_captions("beside", open_images(own)) == ["b", "a", "c"]


def test_captions_that_do_not_fit_are_refused(folder):
    images = open_images(folder)
    for text, message in (
        ("a\nb\n", "has 2 captions, .* has 3 images: one line is the caption of one image"),
        ("a\n\nb\n", "line 2 is empty, so image 2 has no caption"),
    ):
        (folder / "c.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_captions(str(folder / "c.txt"), images)
    with pytest.raises(GlideError, match=r"1\.png has no caption: write it into 1\.txt, or give"):
        read_captions("beside", images)
    with pytest.raises(GlideError, match=r"cannot read absent \(No such file.*\): give a text"):
        read_captions("absent", images)
    (folder / "c.txt").write_bytes("ä\nb\nc".encode("latin-1"))
    with pytest.raises(GlideError, match="is not UTF-8"):
        read_captions(str(folder / "c.txt"), images)
    np.savez(folder / "a.npz", IMAGES)
    with pytest.raises(UsageError, match="is an .npz, which has no captions"):
        read_captions("beside", open_images(folder / "a.npz"))


def test_the_clip_score_is_the_mean_of_scaled_cosines():
    scorer = open_scorer("emoji_scorer64", views=1)
    captions = ["a red apple", "a cat", "a red apple"]
    images = scorer(random_images(3, 64, 64, seed=1))
    found = clip_score(scorer, images, captions)
    texts = scorer.texts(captions)
    expected = np.mean([a @ b for a, b in zip(images, texts, strict=True)])
    assert found["cosine"] == pytest.approx(expected, rel=1e-5)
    assert found["clip_score"] == pytest.approx(scorer.scale * expected, rel=1e-5)
    # An image whose features are those of its caption has the largest score.
    assert clip_score(scorer, texts, captions)["cosine"] == pytest.approx(1, rel=1e-5)
