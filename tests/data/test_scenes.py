"""Procedural scenes and their scorer: it accepts true images and refuses wrong ones."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from glide_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    ScenesSource,
    render,
)
from glide_jax.evaluation.scene_score import look, mistaken, rates, score

SOURCE = ScenesSource(1000)
NUMBERS = range(40)


def test_a_true_image_is_right_in_every_field():
    found = rates([score(SOURCE[i]["image"], SOURCE.scene(i)) for i in NUMBERS])
    assert set(found.values()) == {1.0}


def test_noise_and_paler_colours_do_not_change_the_score():
    rng = np.random.default_rng(0)
    for i in NUMBERS[:15]:
        image = SOURCE[i]["image"].astype(float)
        noisy = np.clip(image + rng.normal(0, 15, image.shape), 0, 255)
        pale = image * 0.9 + 12
        for worse in (noisy, pale):
            assert score(worse.astype(np.uint8), SOURCE.scene(i)).all


def test_one_wrong_word_is_refused():
    rng = np.random.default_rng(1)
    for i in NUMBERS:
        assert not score(SOURCE[i]["image"], mistaken(SOURCE.scene(i), rng)).all


def test_a_reversed_relation_is_refused():
    pairs = [i for i in range(60) if SOURCE.scene(i).relation][:10]
    for i in pairs:
        scene = SOURCE.scene(i)
        found = score(SOURCE[i]["image"], replace(scene, objects=scene.objects[::-1]))
        assert found.objects and not found.relation


def test_objects_with_swapped_colours_are_refused():
    i = next(i for i in range(60) if SOURCE.scene(i).relation)
    scene = SOURCE.scene(i)
    a, b = scene.objects
    swapped = replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    found = score(SOURCE[i]["image"], swapped)
    assert found.colours and found.shapes and not found.objects and not found.all


def test_every_look_is_distinguished_from_every_other():
    for shape, colour, size in product(SHAPES, list(COLOURS)[::3], SIZES):
        scene = Scene("white", (SceneObject(shape, colour, size),))
        seen = look(render(scene))
        assert [(o.shape, o.colour, o.size) for o in seen.objects] == [(shape, colour, size)]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_image_has_no_objects(background):
    seen = look(np.full((64, 64, 3), BACKGROUNDS[background], np.uint8))
    assert seen == Scene(background, ())


def test_noise_alone_is_no_scene():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not any(score(image, SOURCE.scene(i)).all for i in range(5))


def test_scenes_are_reproducible_and_the_splits_are_disjoint():
    other = ScenesSource(1000)
    assert np.array_equal(SOURCE[7]["image"], other[7]["image"])
    train = {SOURCE.scene(i).caption for i in range(400)}
    test = {ScenesSource(400, split="test").scene(i).caption for i in range(100)}
    assert not train & test


def test_each_kind_is_a_third_and_the_larger_image_is_the_same_scene():
    kinds = Counter(len({o.shape for o in SOURCE.scene(i).objects}) > 1 for i in range(300))
    assert 60 < kinds[True] < 140
    large = ScenesSource(10, size=256)
    small = large[3]["image"].reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(small - SOURCE[3]["image"].astype(float)).mean() < 2


def test_an_array_that_is_not_an_image_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        look(np.zeros((64, 64, 3)))
