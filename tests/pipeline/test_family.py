"""The family of small models: what is shipped, which weights belong together, the cascade."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
import sample
from glide_jax.errors import UsageError
from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.models.unet import GLIDE
from glide_jax.pipeline import editing, options
from glide_jax.pipeline.options import read_options
from glide_jax.training.flops import flops_per_image
from glide_jax.training.objectives import make_objective
from glide_jax.training.recipes import load_recipe
from glide_jax.training.state import abstract_state
from glide_jax.weights import clip_registry, registry
from glide_jax.weights.clip_registry import CLIPModel, save_clip
from glide_jax.weights.registry import ASSETS, EMBEDDED, EMBEDDED_CLIPS, companion, load_model
from glide_jax.weights.released import misfits
from glide_jax.weights.store import CONFIG, MODEL, flatten
from tests.support.commands import TINY, first_weights, make_weights

RECIPES = {
    "emoji64": "configs/emoji64.py",
    "emoji_upsample256": "configs/emoji_upsample256.py",
    "emoji_clip64": "configs/emoji_clip64.py",
    "emoji_scorer64": "configs/emoji_clip64.py:scorer",
}
# What a forward pass of an image may cost, for those without a GPU.
GFLOP = {"emoji64": 7, "emoji_upsample256": 7}


# --- what is shipped


@pytest.mark.parametrize("name", [*EMBEDDED, *EMBEDDED_CLIPS])
def test_embedded_weights_are_what_their_recipe_trains(name):
    config = load_recipe(RECIPES[name])
    if name in EMBEDDED_CLIPS:
        clip = glide.load_clip(name)
        assert clip.config == config.model
        params = clip.params
    else:
        model = load_model(name)
        assert model.config == config.model
        assert (model.prediction_type, model.noise_schedule) == (
            config.prediction_type,
            config.noise_schedule,
        )
        params = model.params
        # Loading does not compare the shapes of embedded weights.
        assert not misfits(flatten(params), config.model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_all_of_them_are_at_most_45_megabytes():
    folders = (ASSETS / name for name in (*EMBEDDED, *EMBEDDED_CLIPS))
    assert sum((folder / MODEL).stat().st_size for folder in folders) < 45e6


@pytest.mark.parametrize("name", GFLOP)
def test_a_forward_pass_is_cheap_enough_for_a_cpu(name):
    config = load_recipe(RECIPES[name])
    model, size = GLIDE(config.model), config.model.image_size
    params = abstract_state(config, make_objective(config)).params

    def forward(params, x, t, tokens, mask, low_res):
        text = model.apply({"params": params}, tokens, mask, method=GLIDE.encode_text)
        inputs = {"low_res": low_res} if config.model.upsamples else {}
        return model.apply({"params": params}, x, t, text, **inputs)

    context = config.model.text_ctx
    lowered = jax.jit(forward).lower(
        params,
        jnp.zeros((1, size, size, 3)),
        jnp.zeros(1),
        jnp.zeros((1, context), int),
        jnp.ones((1, context), bool),
        jnp.zeros((1, size // 4, size // 4, 3)),
    )
    assert lowered.cost_analysis()["flops"] < GFLOP[name] * 1e9


# --- companions


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Tiny random weights under the names of the shipped ones: 16x16, 64x64."""
    assets = tmp_path_factory.mktemp("assets")
    upsampler = replace(TINY, variant="superres", image_size=64, attention_ds=())
    make_weights(assets / "emoji64", replace(TINY, variant="inpaint"))
    make_weights(assets / "emoji_upsample256", upsampler)
    config = replace(
        glide.CLIP_PRESETS["emoji_clip64"](), image_size=16, image_width=32, image_layers=1,
        text_width=32, text_layers=1, embed_width=16,
    )  # fmt: skip
    params = first_weights(init_params, NoisedCLIP(config))
    save_clip(CLIPModel("tiny", config, params), assets / "emoji_clip64")
    return assets


@pytest.fixture
def family(assets, monkeypatch):
    """The tiny weights in the place of the shipped ones."""
    changed = {
        "ASSETS": assets,
        "EMBEDDED": ("emoji64", "emoji_upsample256"),
        "EMBEDDED_CLIPS": ("emoji_clip64",),
    }
    for module in (registry, clip_registry, options):
        for name in set(changed) & set(vars(module)):
            monkeypatch.setattr(module, name, changed[name])


def test_weights_bring_their_companions_unless_others_are_named(family):
    assert companion("emoji64", "upsampler", None) == "emoji_upsample256"
    assert companion("emoji64", "clip", None) == "emoji_clip64"
    assert companion("emoji64", "upsampler", "none") is None
    assert companion("emoji64", "upsampler", "mine") == "mine"
    assert companion("somewhere/weights", "upsampler", None) is None
    assert companion("openai/base", "clip", None) is None


def test_weights_that_are_not_shipped_are_no_companions(family, monkeypatch):
    monkeypatch.setattr(registry, "EMBEDDED", ("emoji64",))
    monkeypatch.setattr(registry, "EMBEDDED_CLIPS", ())
    assert companion("emoji64", "upsampler", None) is None
    assert companion("emoji64", "clip", None) is None


def test_a_pipeline_has_its_family(family):
    pipe = glide.load("emoji64")
    assert pipe.upsampler.model.name == "emoji_upsample256" and pipe.clip.name == "emoji_clip64"
    assert pipe("red", steps=2, upsampler={"steps": 1}, progress=False).images.shape[1] == 64
    assert pipe("red", steps=2, upsampler="none", progress=False).images.shape[1] == 16
    with pytest.raises(UsageError, match=r'^upsampler takes settings, .* or "none", not \'mine\':'):
        next(pipe.stream("red", upsampler="mine"))
    with pytest.raises(UsageError, match="^the upsampler: there is no setting 'stepz'"):
        next(pipe.stream("red", upsampler={"stepz": 1}))
    alone = glide.load("emoji64", upsampler="none", clip_model="none")
    assert alone.upsampler is None and alone.clip is None
    with pytest.raises(UsageError, match="names are emoji64, emoji_upsample256"):
        glide.load("no-such-weights-at-all")
    with pytest.raises(UsageError, match=r"name openai/clip, emoji_clip64 or a folder"):
        glide.load_clip("no-such-weights-at-all")


def test_weights_bring_the_scale_of_their_clip_which_acts_only_with_a_clip(
    family, assets, monkeypatch
):
    description = assets / "emoji64" / CONFIG
    before = description.read_text()
    described = json.loads(before)
    described["defaults"]["clip_guidance_scale"] = 300.0
    description.write_text(json.dumps(described))
    try:
        pipe = glide.load("emoji64", upsampler="none")
        alone = glide.load("emoji64", upsampler="none", clip_model="none")
        named = glide.load(assets / "emoji64", clip_model=assets / "emoji_clip64")
    finally:
        description.write_text(before)
    assert pipe.settings.clip_guidance_scale == named.settings.clip_guidance_scale == 300
    assert alone.settings.clip_guidance_scale == 0
    # It does not act beside guidance functions, nor in inversion.
    own = [glide.classifier_free(scale=pipe.settings.guidance_scale), glide.clamp_x_0()]
    with pytest.warns(UserWarning, match="clip_guidance_scale=300"):
        assert pipe.settings.changed(guidance=own).clip_guidance_scale == 0
    seen = []
    monkeypatch.setattr(editing, "run", lambda *call, **_: seen.append(call[5]) or ())
    pipe.invert(np.zeros((1, 16, 16, 3), np.uint8), "red")
    assert seen[0].clip_guidance_scale == 0 and seen[0].guidance_scale == 1
    call = {"sampler": "ddim", "steps": 2, "progress": False}
    guided, both = pipe("red", **call), pipe("red", guidance=own, clip_guidance_scale=300, **call)
    assert guided.metadata(0)["clip_guidance_scale"] == 300
    np.testing.assert_array_equal(both.images, guided.images)
    assert not np.array_equal(guided.images, pipe("red", clip_guidance_scale=-300, **call).images)


def test_the_cascade_inpaints_and_keeps_known_pixels_to_the_byte(family, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 24:48] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    files = ["--image", tmp_path / "x.png", "--mask", tmp_path / "m.png"]
    numbers = ["--steps", 2, "--upsampler-steps", 1, "--out", tmp_path / "out"]
    sample.generate(read_options("", ["a party hat", *map(str, [*files, *numbers])]))
    (path,) = (tmp_path / "out").glob("*.png")
    saved = Image.open(path)
    filled = np.asarray(saved)
    np.testing.assert_array_equal(filled[mask == 0], image[mask == 0])
    assert not np.array_equal(filled[mask > 0], image[mask > 0])
    made = saved.text["glide_jax"]
    assert '"emoji64"' in made and '"emoji_upsample256"' in made


# --- training at another size


def test_a_recipe_may_train_at_another_size_than_it_samples():
    config = load_recipe("configs/emoji_upsample256.py")
    assert (config.side, config.model.image_size) == (128, 256)
    assert load_recipe("configs/emoji64.py").side == 64
    assert load_recipe("configs/emoji_clip64.py").side == 64
    parts = [flops_per_image(replace(config, train_image_size=size)) for size in (16, 32)]
    assert parts[1] / parts[0] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("size", [-8, 3, 20])
def test_a_size_that_the_network_cannot_halve_is_refused(size):
    with pytest.raises(UsageError, match="train_image_size is a multiple of 16"):
        replace(load_recipe("configs/emoji_upsample256.py"), train_image_size=size)
