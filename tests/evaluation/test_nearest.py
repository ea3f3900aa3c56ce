"""The nearest training images of generated ones."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from glide_jax.errors import UsageError
from glide_jax.evaluation.nearest import distances, report
from tests.support.ranked import SIZE, Painted, make_npz, recipe


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return recipe(make_npz(tmp_path_factory.mktemp("pairs")))


@dataclass(frozen=True, eq=False)
class Enlarged(Painted):
    """Paints images of twice the side, without noise, and records the batch size."""

    def __call__(self, prompts, *, seed, batch_size=None):
        painted = super().__call__(prompts, seed=seed, guidance_scale=100)
        self.calls[-1]["batch_size"] = batch_size
        return replace(painted, images=painted.images.repeat(2, axis=1).repeat(2, axis=2))


def test_distances_by_hand():
    dark, light = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 10, np.uint8)
    half = np.stack([dark[0], light[0]])
    found = distances(np.stack([dark, half]), np.stack([dark, light]))
    assert np.allclose(found, [[0, 10], [50**0.5, 50**0.5]])


def test_training_images_are_found_exactly_and_held_out_ones_are_not(config, tmp_path):
    pipe = Enlarged()
    found = report(pipe, config, tmp_path, seed=3, batch_size=7)
    trained_on, held_out = found["training_captions"], found["held_out_pairs"]
    assert (trained_on["right"], trained_on["of"], held_out["of"]) == (10, 10, 5)
    assert all(i["distance"] == 0 and i["nearest"] == i["prompt"] for i in trained_on["images"])
    assert all(i["distance"] > 0 for i in held_out["images"])
    assert [call["batch_size"] for call in pipe.calls] == [7, 7]
    assert json.loads((tmp_path / "nearest.json").read_text()) == found
    sheet = Image.open(tmp_path / "training_captions.png")
    assert sheet.size == (5 * (4 * SIZE + 12), 2 * (6 * SIZE + 44))


def test_more_captions_than_there_are_are_refused(config, tmp_path):
    with pytest.raises(UsageError, match="there are 90 records to choose from: cannot take 91"):
        report(Enlarged(), config, tmp_path, captions=91)
