"""Features in files: nothing is computed twice, and an interrupted run continues."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation import feature_files
from glide_jax.evaluation.feature_files import features_of
from glide_jax.evaluation.features import open_scorer
from glide_jax.evaluation.image_sets import open_images
from tests.support.extractor_weights import random_images

IMAGES = random_images(11, 8, 8, seed=0)
MAP = np.random.default_rng(0).standard_normal((8 * 8 * 3, 5)).astype(np.float32)


@dataclass(eq=False)
class Linear:
    """A linear map of the pixels in place of a network; it counts its images."""

    name: str = "linear"
    checksum: str = "00000000"
    stop_after: int = 1000
    seen: list[int] = field(default_factory=list)

    def __call__(self, images):
        if sum(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(len(images))
        return images.reshape(len(images), -1).astype(np.float32) @ MAP


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_files, "PART", 4)
    monkeypatch.setattr(feature_files, "BATCH", 3)


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    return open_images(tmp_path / "a.npz")


EXPECTED = IMAGES.reshape(11, -1).astype(np.float32) @ MAP


def test_a_second_call_computes_nothing(images, tmp_path):
    space = Linear()
    for _ in range(2):
        found, shape = features_of(images, space, tmp_path / "f")
        np.testing.assert_allclose(found, EXPECTED, rtol=1e-6, atol=1e-3)
        assert found.dtype == np.float32 and shape == (8, 8)
        assert space.seen == [3, 1, 3, 1, 3]


def test_an_interrupted_run_continues_at_its_part(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        features_of(images, Linear(stop_after=8), tmp_path)
    space = Linear()
    np.testing.assert_allclose(features_of(images, space, tmp_path)[0], EXPECTED, atol=1e-3)
    assert space.seen == [3]


def test_a_broken_file_is_computed_again(images, tmp_path):
    features_of(images, Linear(), tmp_path / "f")
    (part,) = (tmp_path / "f").rglob("00000004.npz")
    part.write_bytes(part.read_bytes()[:50])
    space = Linear()
    np.testing.assert_allclose(features_of(images, space, tmp_path / "f")[0], EXPECTED, atol=1e-3)
    assert sum(space.seen) == 7


def test_other_images_and_networks_have_other_files(images, tmp_path):
    features_of(images, Linear(), tmp_path / "f")
    for space in (Linear(name="other"), Linear(checksum="1")):
        features_of(images, space, tmp_path / "f")
        assert sum(space.seen) == 11
    np.savez(tmp_path / "a.npz", IMAGES[:10])
    space = Linear()
    found, _ = features_of(open_images(tmp_path / "a.npz"), space, tmp_path / "f")
    assert len(found) == 10 and sum(space.seen) == 10


def test_features_that_are_not_finite_are_refused(images, tmp_path):
    class Broken(Linear):
        def __call__(self, images):
            return np.full((len(images), 2), np.nan)

    with pytest.raises(GlideError, match=r"features of .*a\.npz are not finite"):
        features_of(images, Broken(), tmp_path)


def test_the_scorer_needs_squares(tmp_path):
    np.savez(tmp_path / "wide.npz", random_images(2, 8, 12, seed=0))
    scorer = open_scorer("emoji_scorer64", views=1)
    with pytest.raises(UsageError, match=r"images of 12 x 8 pixels; .* --size 256"):
        features_of(open_images(tmp_path / "wide.npz"), scorer, tmp_path)
    found, shape = features_of(open_images(tmp_path / "wide.npz", 8), scorer, tmp_path)
    assert shape == (8, 8)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
