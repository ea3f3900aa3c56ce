"""What the page asks for, and that its Python and its command line make the same images."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
import sample
from glide_jax.demo.actions import (
    Call,
    Controls,
    caption_of,
    edit,
    generate,
    interpolation,
    loading_arguments,
    read_steps,
)
from glide_jax.pipeline.options import SampleModelOptions, read_options
from tests.support.commands import TINY, make_weights

CONTROLS = Controls(
    prompt="a red apple", num=1, seed=3, steps=4, sampler="dpm++2m", guidance_scale=3.0,
    negative_prompt="", clip_guidance_scale=0.0, autoguidance_scale=1.0,
)  # fmt: skip
DEFAULTS = glide.Settings(steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights that generate, inpaint and enlarge; an image and a mask."""
    root = tmp_path_factory.mktemp("actions")
    make_weights(root / "base", replace(TINY, variant="inpaint"))
    make_weights(root / "larger", replace(TINY, variant="superres", image_size=32))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:10, 2:8] = 255
    Image.fromarray(mask).save(root / "mask.png")
    return root


CALLS = {
    "create": lambda: generate(replace(CONTROLS, num=2), DEFAULTS, batch_size=1),
    "enlarge": lambda: generate(
        replace(CONTROLS, prompt=" ", steps=6, sampler="ddpm", guidance_scale=2.5),
        DEFAULTS,
        upsampler={"steps": "2", "sampler": "ddim"},
    ),
    "guide": lambda: generate(
        replace(CONTROLS, prompt='-5 "apples"', negative_prompt="-blue, it's", high=2), DEFAULTS
    ),
    "fill": lambda: edit(CONTROLS, DEFAULTS, "Fill", "image.png", "mask.png", 0.6),
    "img2img": lambda: edit(CONTROLS, DEFAULTS, "Img2img", "image.png", None, 0.6),
    "vary": lambda: edit(
        replace(CONTROLS, num=2), DEFAULTS, "Vary", "image.png", "mask.png", 0.3, batch_size=1
    ),
    "interpolation": lambda: interpolation(
        replace(CONTROLS, num=3), DEFAULTS, "a rocket", batch_size=1
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_python_and_command_line_make_the_same_bytes(kind, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    loading = {"weights": "base"} | ({"upsampler": "larger"} if kind == "enlarge" else {})
    call, seen = CALLS[kind](), []
    images = call.run(glide.load(**loading), seen.append)
    assert len(seen) >= images.settings["evaluations"]

    found: dict = {}
    exec(call.python(loading, tmp_path / "python"), found)
    words = shlex.split(call.command(loading, tmp_path / "command"))
    assert words[:2] == ["glide-jax", "sample"]
    sample.generate(read_options("", words[2:]))
    for name in ("python", "command"):
        files = sorted(f for f in (tmp_path / name).glob("*.png") if "grid" not in f.name)
        assert len(files) == len(images)
        for file, pixels in zip(files, images.images, strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), pixels), file
    if kind == "fill":
        known = np.asarray(Image.open("mask.png")) == 0
        assert np.array_equal(images.images[0][known], np.asarray(Image.open("image.png"))[known])


def test_only_what_differs_is_written_down():
    call = generate(CONTROLS, DEFAULTS)
    assert call.command({}, Path("samples")) == (
        "glide-jax sample --num 1 --seed 3 -- 'a red apple'"
    )
    assert call.python({}, Path("samples")) == (
        "import glide_jax as glide\n\npipe = glide.load('emoji64')\n"
        "images = pipe('a red apple', num=1, seed=3)\nimages.save('samples')\n"
    )
    changed = replace(CONTROLS, steps="20", guidance_scale=2.3000000000000003, low=0.5, high=None)
    assert generate(changed, DEFAULTS).arguments == {
        "num": 1, "seed": 3, "steps": 20, "guidance_scale": 2.3,
        "guidance_interval": (0.5, 100_000.0),
    }  # fmt: skip
    model = SampleModelOptions(weights="runs/a", weak_model="runs/b", devices="all")
    assert loading_arguments(model) == {
        "weights": "runs/a", "weak_model": "runs/b", "devices": "all",
    }  # fmt: skip


def test_no_limits_turn_off_the_interval_of_the_weights():
    defaults = replace(DEFAULTS, guidance_interval=(0.3, 5.0))
    call = generate(CONTROLS, defaults)
    assert call.arguments["guidance_interval"] == "none"
    assert "--guidance-interval none" in call.command({}, Path("samples"))
    kept = generate(replace(CONTROLS, low=0.3, high=5.0), defaults)
    assert "guidance_interval" not in kept.arguments


def test_the_command_names_a_model_that_guides_only_with_its_scale():
    loading = {"weights": "w", "weak_model": "weaker", "clip_model": "clip"}
    plain = generate(CONTROLS, DEFAULTS)
    assert plain.command(loading, Path("samples")) == (
        "glide-jax sample --weights w --num 1 --seed 3 -- 'a red apple'"
    )
    assert "load('w')" in plain.python(loading, Path("samples"))
    # Also a scale that is the default of the weights.
    guided = generate(
        replace(CONTROLS, autoguidance_scale=2.0), replace(DEFAULTS, autoguidance_scale=2.0)
    ).command(loading, Path("samples"))
    assert "--weak-model weaker" in guided and "--autoguidance-scale 2.0" in guided
    assert "--clip-model" not in guided


def test_pairs_are_named_one_by_one_on_the_command_line():
    loading = loading_arguments(SampleModelOptions(lora=("runs/a", "b.safetensors:0.5")))
    assert loading == {"lora": ("runs/a", "b.safetensors:0.5")}
    words = generate(CONTROLS, DEFAULTS).command(loading, Path("samples")).split()
    assert words[2:6] == ["--lora", "runs/a", "--lora", "b.safetensors:0.5"]
    assert read_options("", words[2:]).model.lora == loading["lora"]


def test_what_is_missing_is_named():
    for values, message in (
        (("Fill", None, None, 0.6), "there is no image to edit: load one, or use a result"),
        (("Fill", "image.png", None, 0.6), "no region is painted: paint over what is to be"),
    ):
        with pytest.raises(glide.UsageError, match=message):
            edit(CONTROLS, DEFAULTS, *values)


def test_variations_leave_guidance_off():
    call = edit(replace(CONTROLS, guidance_scale=7), DEFAULTS, "Vary", "a.png", None, 0.3)
    assert call == Call(
        "variations", ("a red apple",), {"image": "a.png", "variation": 0.3, "num": 1, "seed": 3}
    )


@pytest.mark.parametrize(
    ("text", "steps"),
    [(20, 20), (20.0, 20), ("20", 20), (" fast27 ", "fast27"), ("10,10,3,2,2", "10,10,3,2,2"),
     ("", 4)],
)  # fmt: skip
def test_steps_are_a_number_or_a_respacing(text, steps):
    assert read_steps(text, DEFAULTS) == steps


def test_an_image_of_an_interpolation_has_the_caption_of_the_nearer_end():
    ends = {"prompts": ["a", "b"]}
    assert caption_of({"prompt": "x"}) == "x"
    assert caption_of({"prompt": "a -> b", "interpolation": ends | {"share": 0.4}}) == "a"
    assert caption_of({"prompt": "a -> b", "interpolation": ends | {"share": 0.6}}) == "b"
