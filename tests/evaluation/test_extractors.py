"""Feature extractors equal the PyTorch networks with the same weights and images."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.extractors import open_extractor
from glide_jax.evaluation.extractors.extractor import resized
from glide_jax.evaluation.extractors.recognise import LETTERS, recognise
from glide_jax.evaluation.extractors.vit_names import scaled_positions
from glide_jax.weights import write_torch_file
from tests.support.commands import ROOT
from tests.support.extractor_weights import CASES, random_images, tensors_of

EXPECTED = np.load(ROOT / "tests" / "fixtures" / "extractors" / "outputs.npz")
SHAPES = json.loads(EXPECTED["shapes"].tobytes())
NAMES = {
    "inception": "Inception v3 (FID)",
    "clip": "CLIP ViT-128/16, 64 pixels",
    "transformers": "CLIP ViT-128/32, 96 pixels",
    "dinov2": "DINOv2 ViT-128/14",
    "dinov2_registers": "DINOv2 ViT-128/14, 4 registers",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@cache
def random_tensors(case):
    return tensors_of(SHAPES[case], CASES[case][0])


def tensors(case):
    return dict(random_tensors(case))


def extractor_of(folder, case):
    path = folder / f"{case}.pth"
    write_torch_file(path, tensors(case))
    return open_extractor(path)


def refused(case, change):
    found = tensors(case)
    change(found)
    with pytest.raises(GlideError) as error:
        recognise(Path("there.pth"), found)
    return str(error.value)


@pytest.mark.parametrize("case", [case for case in CASES if case != "inception"])
def test_vision_transformers_equal_the_originals(folder, case):
    extractor = extractor_of(folder, case)
    found, expected = extractor(CASES[case][1]), EXPECTED[f"{case}.features"]
    assert extractor.name == NAMES[case] and extractor.dimensions == expected.shape[1]
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    # The features of two images differ by far more than that.
    assert np.abs(expected[0] - expected[1]).max() > 0.02 * np.abs(expected).max()
    assert extractor.probabilities(CASES[case][1]) is None


def test_inception_equals_the_original(folder):
    extractor, images = extractor_of(folder, "inception"), CASES["inception"][1]
    features, probabilities = extractor.both(images)
    for name, found in (("features", features), ("probabilities", probabilities)):
        expected = EXPECTED[f"inception.{name}"]
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())
        assert np.abs(expected[0] - expected[1]).max() > 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (extractor.name, extractor.dimensions) == (NAMES["inception"], 2048)


def test_batches_change_nothing(folder):
    extractor, images = extractor_of(folder, "clip"), random_images(5, 64, 64, seed=0)
    whole = extractor(images)
    np.testing.assert_allclose(replace(extractor, batch_size=2)(images), whole, atol=1e-5)
    assert extractor(images[:0]).shape == (0, 48)


def test_half_precision_and_safetensors_and_folders_are_read(folder):
    halves = {name: array.astype(np.float16) for name, array in tensors("transformers").items()}
    # Files of older transformers contain it.
    halves["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    there = folder / "clip-tiny"
    there.mkdir()
    save_file(halves, there / "model.safetensors")
    images, expected = CASES["transformers"][1], EXPECTED["transformers.features"]
    found = open_extractor(there)(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def test_published_sizes_are_named_by_their_letters():
    # Widths of the papers' S, B, L: 2304.07193, table 17; 2103.00020, table 20.
    assert LETTERS == {384: "S", 768: "B", 1024: "L"}


# --- wrong input


def test_images_must_be_uint8(folder):
    extractor = extractor_of(folder, "dinov2")
    for wrong in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(UsageError, match="uint8, not"):
            extractor(wrong)


def test_an_unknown_network_names_what_was_expected(folder):
    path = folder / "other.pt"
    write_torch_file(path, {"layer.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(GlideError, match=r"layer.weight.*Inception.*CLIP.*DINOv2"):
        open_extractor(path)


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.safetensors"])
def test_a_file_that_does_not_exist(folder, name):
    with pytest.raises(GlideError, match="does not exist"):
        open_extractor(folder / name)


def test_a_folder_without_weights(folder):
    with pytest.raises(GlideError, match=r"none of model.safetensors"):
        open_extractor(ROOT / "docs")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("clip", "visual.ln_post.bias"),
        ("transformers", "vision_model.encoder.layers.1.mlp.fc2.weight"),
        ("dinov2", "blocks.1.ls2.gamma"),
        ("inception", "Mixed_6a.branch3x3.bn.running_var"),
    ],
)
def test_a_missing_tensor_is_named(case, name):
    assert f"there.pth lacks {name}" in refused(case, lambda found: found.pop(name))


def test_a_missing_convolution_is_named():
    def change(found):
        for name in [name for name in found if name.startswith("Mixed_7b.branch1x1.")]:
            del found[name]

    assert "Mixed_7b/branch1x1/conv/bias" in refused("inception", change)


def test_a_tensor_of_another_shape_is_named():
    def change(found):
        found["norm.weight"] = np.ones(64, np.float32)

    assert "norm/scale" in refused("dinov2", change)


def test_another_inception_is_refused():
    def change(found):
        found["fc.weight"] = np.zeros((1000, 2048), np.float32)

    assert "1000 classes; FID's has 1008" in refused("inception", change)


def test_a_gated_transformer_is_refused():
    def change(found):
        found["blocks.0.mlp.w12.weight"] = found.pop("blocks.0.mlp.fc1.weight")

    assert "lacks blocks.0.mlp.fc1.weight" in refused("dinov2", change)


# --- resizing


def test_an_image_is_cropped_to_its_centre():
    image = np.zeros((1, 10, 30, 3), np.uint8)
    image[:, :, 10:20] = 255
    assert (resized(image, side=10) == 255).all()
    assert resized(image, side=20).shape == (1, 20, 20, 3)
    square = random_images(1, 12, 12, seed=0)
    assert resized(square, side=12) is square


@pytest.mark.parametrize("filtered", [False, True])
def test_equal_positions_stay_equal(filtered):
    position = np.concatenate([np.full((1, 2), 9.0), np.full((37**2, 2), 3.0)]).astype(np.float32)
    found = scaled_positions(position, 16, filtered)
    assert found.shape == (257, 2) and found.dtype == np.float32
    assert (found[0] == 9).all()
    np.testing.assert_allclose(found[1:], 3, rtol=1e-6)
    assert scaled_positions(position, 37, filtered) is position
