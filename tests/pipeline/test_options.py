"""Options and the defaults of the weights: what is turned off, and what needs a scale."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
import sample
from glide_jax.pipeline.options import check_options, read_options
from glide_jax.weights.store import CONFIG


def with_defaults(weights, folder, defaults):
    shutil.copytree(weights, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["defaults"] |= defaults
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_a_default_of_the_weights_can_be_turned_off(weights, pipe, tmp_path):
    """The same weights with defaults that change the image: turned off, it is the image without."""
    on = {
        "sampler": "ddim", "eta": 1.0, "guidance_interval": [0.3, 5.0], "dynamic_threshold": 0.9,
        "restart": [0.3, 3.0, 2],
    }  # fmt: skip
    off = {name: "none" for name in on if name != "sampler"}
    changed = with_defaults(weights, tmp_path / "changed", on)
    other = glide.load(changed)
    wanted = pipe("red", sampler="ddim", progress=False)
    assert not np.array_equal(other("red", progress=False).images, wanted.images)
    found = other("red", **off, progress=False)
    assert np.array_equal(found.images, wanted.images)
    assert found.settings == wanted.settings

    words = [word for name in off for word in (f"--{name.replace('_', '-')}", "none")]
    words += ["--weights", str(changed), "--out", str(tmp_path / "out")]
    sample.generate(read_options("", ["red", *words]))
    image = Image.open(tmp_path / "out" / "00000_red.png")
    assert np.array_equal(np.asarray(image), wanted.images[0])
    assert json.loads(image.text["glide_jax"])["eta"] == "none"


def test_a_strength_and_repaint_of_the_weights_can_be_turned_off(weights, pipe, tmp_path):
    for name, value in (("strength", 0.5), ("repaint", [2, 2])):
        other = glide.load(with_defaults(weights, tmp_path / name, {name: value}))
        with pytest.raises(glide.UsageError, match=name):
            other("red", progress=False)
        found, wanted = (p("red", **{name: "none"}, progress=False) for p in (other, pipe))
        assert np.array_equal(found.images, wanted.images)


def test_variations_have_no_strength_repaint_or_restart_of_the_weights(weights, pipe, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    defaults = {"strength": 0.5, "restart": [0.3, 3.0, 2]}
    other = glide.load(with_defaults(weights, tmp_path / "own", defaults))
    for settings in ({}, {"strength": "none", "repaint": "none", "guidance_scale": None}):
        found, wanted = (
            p.variations(photo, "red", progress=False, **settings) for p in (other, pipe)
        )
        assert np.array_equal(found.images, wanted.images)
        assert found.settings == wanted.settings and found.settings["guidance_scale"] == 1
    for name, value in (("strength", 0.5), ("repaint", (2, 2))):
        with pytest.raises(glide.UsageError, match="variations take no strength or repaint"):
            pipe.variations(photo, "red", **{name: value})


@pytest.mark.parametrize(
    ("named", "scale"),
    [("--clip-model", "--clip-guidance-scale"), ("--weak-model", "--autoguidance-scale")],
)
def test_a_model_that_guides_needs_a_scale(named, scale, weights, tmp_path):
    setting = scale.removeprefix("--").replace("-", "_")

    def check(*words):
        check_options(read_options("", [*map(str, words), "red"]))

    with pytest.raises(glide.UsageError, match=f"^{named} has no effect without a scale: give "):
        check("--weights", weights, named, "some/weights")
    # A scale that is off is a choice, for example in a loop over scales.
    check("--weights", weights, named, "some/weights", scale, 1)
    check("--weights", weights, named, "none")
    own = with_defaults(weights, tmp_path / "own", {setting: 2.0})
    check("--weights", own, named, "some/weights")
