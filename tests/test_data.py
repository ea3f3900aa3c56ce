"""Sources and batches: what is read, what is refused, and that iteration can be resumed."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from glide_jax.data.pipeline import make_batches, square, to_batch, with_article
from glide_jax.data.sources import decode_picture, open_source
from glide_jax.errors import GlideError, UsageError
from glide_jax.tokenizers import GPT2Tokenizer
from glide_jax.training.config import DataConfig
from tests.commands import ROOT, make_pictures

MINI = str(ROOT / "tests" / "fixtures" / "emoji_mini.npz")


def batches(config, size=64, **kwargs):
    arguments = {"batch_size": 4, "context": 16, "size": size, "seed": 0} | kwargs
    return make_batches(open_source(config), config, **arguments)


def test_a_folder_of_pictures_with_captions(tmp_path):
    folder = make_pictures(tmp_path / "a" / "b")
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "captionless.png")
    source = open_source(DataConfig(source=str(tmp_path / "a")))
    assert len(source) == 12
    record = source[4]
    assert record["caption"] == "green"
    assert np.array_equal(record["image"], np.asarray(Image.open(folder / "04.png")))


def test_transparency_lies_on_white(tmp_path):
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[0, 0] = (255, 0, 0, 255)
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    decoded = decode_picture(path.read_bytes(), "a.png")
    assert decoded[0, 0].tolist() == [255, 0, 0] and decoded[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"x" * 99])
def test_an_unreadable_picture_names_itself(data):
    with pytest.raises(GlideError, match="cannot read the picture a/b.png"):
        decode_picture(data, "a/b.png")


def test_concepts_and_styles_select_records():
    config = DataConfig(source=MINI, concepts=("rocket", "penguin"), styles=("Google Noto style",))
    source = open_source(config)
    assert {source[i]["caption"] for i in range(len(source))} == {"rocket", "penguin"}
    with pytest.raises(UsageError, match="rocket"):
        open_source(replace(config, concepts=("rockett",)))


@pytest.mark.parametrize(
    "config, says",
    [
        (DataConfig(), "--data.source"),
        (DataConfig(source="emoji64", data_dir="nowhere"), "glide_jax.data.emoji64"),
        (DataConfig(source="coco_captions", data_dir="nowhere"), "--data.source"),
    ],
)
def test_missing_data_say_how_to_get_or_name_them(config, says):
    with pytest.raises(UsageError, match=says):
        open_source(config)


def test_a_folder_without_captions_is_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="1 pictures and none with a caption"):
        open_source(DataConfig(source=str(tmp_path)))


def test_captions_are_drawn_from_the_templates():
    config = DataConfig(
        source=MINI,
        concepts=("octopus",),
        styles=("Google Noto style",),
        captions=("{caption}", "{a_caption}, {style}"),
    )
    seen = set()
    for arrays in itertools.islice(batches(config), 8):
        for ids, mask in zip(arrays["tokens"], arrays["mask"], strict=True):
            seen.add(GPT2Tokenizer(16).decode(ids[mask]))
    assert seen == {"octopus", "an octopus, google noto style"}
    with pytest.raises(UsageError, match="colour"):
        next(batches(replace(config, captions=("{colour}",))))


def test_articles():
    assert with_article("apple") == "an apple" and with_article("rocket") == "a rocket"


def test_every_record_once_a_pass_and_another_order_each_time():
    config = DataConfig(source=MINI, styles=("Google Noto style",))
    n = len(open_source(config))
    arrays = batches(config, batch_size=n)
    first, second = next(arrays)["image"], next(arrays)["image"]
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first.sum((1, 2, 3))), np.sort(second.sum((1, 2, 3))))


def test_iteration_resumes_where_it_was_saved():
    config = DataConfig(source=MINI, captions=("{caption}", "{a_caption}", "{style}"))
    one, two = batches(config), batches(config)
    for _ in range(3):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    ahead = [next(one) for _ in range(3)]
    two.set_state(state)
    for expected in ahead:
        got = next(two)
        assert all(np.array_equal(expected[k], got[k]) for k in expected)


def test_a_batch_knows_each_records_place():
    batch = to_batch(next(batches(DataConfig(source=MINI))))
    assert batch.image.shape == (4, 64, 64, 3) and batch.image.dtype == np.uint8
    assert batch.position.tolist() == [0, 1, 2, 3]


def test_pictures_are_cropped_to_their_middle_and_scaled():
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 2:10] = 100
    image[::2, 2:10] = 200
    assert (square(image, 4) == 150).all()
    assert (square(image, 8) == image[:, 2:10]).all()
    assert square(image, 16).shape == (16, 16, 3)
    with pytest.raises(GlideError, match="uint8"):
        square(image.astype(np.float32), 4)


def test_batches_have_the_size_of_the_model():
    assert next(batches(DataConfig(source=MINI), size=32))["image"].shape == (4, 32, 32, 3)
