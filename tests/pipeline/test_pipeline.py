"""The pipelines of the other variants: upsampling, inpainting, the two together."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.pipeline import loading
from glide_jax.pipeline.clip_guide import CLIP, MAX_X_0_CHANGE
from glide_jax.pipeline.image_files import read_images
from glide_jax.pipeline.mask_files import read_known
from glide_jax.pipeline.runner import image_keys, start_noise
from glide_jax.weights.clip_registry import CLIPModel, save_clip
from tests.support.commands import TINY, first_weights, make_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights of each variant, 16x16 and 32x32."""
    root = tmp_path_factory.mktemp("variants")
    sizes = {"base": 16, "inpaint": 16, "superres": 32, "superres_inpaint": 32}
    return {
        variant: make_weights(root / variant, replace(TINY, variant=variant, image_size=size))
        for variant, size in sizes.items()
    }


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    region = np.zeros((16, 16), bool)
    region[4:12, 6:10] = True
    return region


def test_an_upsampler_enlarges_the_images_of_the_base(folders):
    pipe = glide.load(folders["base"], upsampler=folders["superres"])
    images = pipe(["red", "blue"], seed=1, progress=False)
    assert images.images.shape == (2, 32, 32, 3)
    made = images.metadata(1)
    assert made["prompt"] == "blue" and made["upsampler"]["weights"] == str(folders["superres"])


def test_no_number_of_images_captions_or_steps_compiles_again(folders):
    compiled = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    pipe = glide.load(folders["base"], upsampler=folders["superres"])
    call = {"guidance_scale": 3.0, "progress": False, "upsampler": {"steps": 2}}
    pipe("red", **call)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        pipe("red", **call)
        pipe("red", num=2, seed=3, **call)
        pipe(["red", "blue", "a green one"], first_index=7, **call)
        pipe("blue", **call | {"guidance_scale": 2, "negative_prompt": "red"})
        pipe("blue", **call | {"steps": 7, "sampler": "ddim", "upsampler": {"steps": 5}})
        list(pipe.stream("blue", preview_every=2, **call))
        assert compiled == []
        # Four images at a time are another program; eight distinct captions are not.
        pipe("red", num=4, **call)
        once = len(compiled)
        assert once > 0
        pipe([f"red {i}" for i in range(8)], **call)
        pipe([f"blue {i}" for i in range(5)], **call)
        assert len(compiled) == once
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_the_upsampler_has_noise_of_its_own():
    base, larger = (image_keys(5, [0, 3], upsampler=upsampler) for upsampler in (False, True))
    keys = [np.asarray(jax.random.key_data(k)).tolist() for k in (*base, *larger)]
    found = [tuple(key) for stage in keys for key in stage]
    assert len(set(found)) == 8
    one, other = (np.asarray(start_noise(k.start, 64)).ravel() for k in (base, larger))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_an_upsampler_reads_the_small_image(folders, photo):
    up = glide.load(folders["superres"])
    one, other = (up("red", low_res=p, progress=False).images for p in (photo, 255 - photo))
    assert one.shape == (1, 32, 32, 3) and not np.array_equal(one, other)


def test_inpainting_keeps_the_known_pixels_exactly(folders, photo, mask):
    pipe = glide.load(folders["inpaint"])
    images = pipe("red", num=2, image=photo, mask=mask, progress=False).images
    for image in images:
        assert np.array_equal(image[~mask], photo[~mask])
        assert not np.array_equal(image[mask], photo[mask])
    # The pixels under the mask have no effect.
    changed = np.where(mask[..., None], 255 - photo, photo)
    again = pipe("red", num=2, image=changed, mask=mask, progress=False)
    assert np.array_equal(again.images, images)


def test_inpainting_works_through_the_upsampler(folders, photo, mask):
    pipe = glide.load(folders["inpaint"], upsampler=folders["superres_inpaint"])
    large = photo.repeat(2, axis=0).repeat(2, axis=1)
    big_mask = mask.repeat(2, axis=0).repeat(2, axis=1)
    images = pipe("red", image=large, mask=big_mask, progress=False).images
    assert np.array_equal(images[0][~big_mask], large[~big_mask])


def test_inputs_that_a_variant_does_not_take_or_lacks_are_named(folders, photo, mask):
    base, up = glide.load(folders["base"]), glide.load(folders["superres"])
    inpaint = glide.load(folders["inpaint"])
    for call, message in (
        (lambda: base("red", low_res=photo), "takes no low_res"),
        (lambda: up("red"), "give it small images as low_res"),
        (lambda: inpaint("red", image=photo), "needs a mask of the region"),
        (lambda: inpaint("red", image=photo[..., [0] * 5], mask=mask), "uint8"),
        (lambda: inpaint(["red"] * 3, image=np.stack([photo] * 2), mask=mask), "2 images for 3"),
        (lambda: glide.load(folders["base"], upsampler=folders["inpaint"]), "not an upsampler"),
        (lambda: glide.load(folders["base"], weak_model=folders["inpaint"]), "cannot be the weak"),
        (lambda: glide.load(folders["base"], devices=99), "cannot use 99 devices"),
    ):
        with pytest.raises(glide.UsageError, match=message):
            call()


def test_images_and_masks_are_read_from_files(tmp_path, photo, mask):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    assert np.array_equal(read_images(tmp_path / "photo.png", 16, 2)[1], photo)
    known = read_known(tmp_path / "mask.png", 32, 1)
    assert known.shape == (1, 32, 32, 1) and known.dtype == np.float32
    assert np.array_equal(known[0, :, :, 0], 1 - mask.repeat(2, axis=0).repeat(2, axis=1))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(glide.GlideError, match=r"broken\.png"):
        read_images(tmp_path / "broken.png", 16, 1)
    with pytest.raises(glide.GlideError, match=r"missing\.png"):
        read_known(tmp_path / "missing.png", 16, 1)


def test_guidance_can_be_a_list_of_functions(folders):
    pipe = glide.load(folders["base"])
    scale = glide.classifier_free(scale=3.0)
    default = pipe("red", guidance_scale=3.0, progress=False)
    listed = pipe("red", guidance=[scale, glide.clamp_x_0()], progress=False)
    assert np.array_equal(default.images, listed.images)
    everywhere = pipe("red", guidance=[scale.within(0, 1e9), glide.clamp_x_0()], progress=False)
    assert np.array_equal(default.images, everywhere.images)
    nowhere = pipe("red", guidance=[scale.within(1e8, 1e9), glide.clamp_x_0()], progress=False)
    unguided = pipe("red", guidance_scale=1, progress=False)
    assert np.array_equal(nowhere.images, unguided.images)
    assert not np.array_equal(default.images, unguided.images)
    assert listed.metadata(0)["guidance"][0]["name"] == "classifier_free"


def test_ddpm_is_refused_for_weights_without_learned_variance(folders, tmp_path):
    pipe = glide.load(make_weights(tmp_path / "plain", replace(TINY, out_channels=3)))
    message = (
        "^sampler ddpm needs a network with learned variance, and this one predicts none: "
        "choose ddpm-small or ddpm-large$"
    )
    with pytest.raises(glide.UsageError, match=message):
        pipe("red", sampler="ddpm", steps=2, progress=False)
    # Of an upsampler, before the base samples.
    both = glide.load(folders["base"], upsampler=folders["superres"])
    model = both.upsampler.model
    model = replace(model, config=replace(model.config, out_channels=3))
    both = replace(both, upsampler=replace(both.upsampler, model=model))
    with pytest.raises(glide.UsageError, match=message.replace("^", "^the upsampler: ")):
        next(both.stream("red", upsampler={"sampler": "ddpm"}))
    for wrong, message in (
        ({"steps": 2000}, "cannot take 2000 steps: the process has 1000 timesteps"),
        ({"strength": 2}, "strength must be above 0 and at most 1, not 2"),
        ({"repaint": 5}, "repaint takes 2 values (whole number, whole number), not 5"),
        ({"guidance_method": "cgf"}, "unknown guidance_method 'cgf': choose cfg, cfg++, apg"),
        (
            {"guidance_method": "cfg++", "guidance_scale": 3},
            "cfg++ takes a guidance_scale from 0 to 1, not 3",
        ),
        (
            {"clip_guidance_scale": 2},
            "clip_guidance_scale needs a noised CLIP: load one as clip_model (--clip-model)",
        ),
    ):
        with pytest.raises(glide.UsageError) as caught:
            next(both.stream("red", upsampler=wrong))
        assert str(caught.value) == f"the upsampler: {message}"
    # One step needs no variance: its end is the clean image.
    call = {"steps": 1, "progress": False}
    pipe("red", sampler="ddpm", **call)
    both("red", upsampler={"sampler": "ddpm", "steps": 1}, **call)


def test_clip_guidance_pulls_towards_the_prompt(folders, tmp_path, monkeypatch):
    config = glide.CLIP_PRESETS["clip64"]()
    small = replace(
        config, image_size=16, image_width=32, image_layers=1, text_width=32, text_layers=1,
        head_size=16, embed_width=16, n_vocab=49408,
    )  # fmt: skip
    params = first_weights(init_params, NoisedCLIP(small))
    save_clip(CLIPModel("tiny", small, params), tmp_path / "clip")
    pipe = glide.load(folders["base"], clip_model=tmp_path / "clip")
    settings = {"sampler": "ddpm", "steps": 3, "progress": False}
    unguided = pipe("red", **settings)
    guided = pipe("red", clip_guidance_scale=500.0, **settings)
    assert guided.metadata(0)["clip_guidance_scale"] == 500.0

    def likeness(images):
        x = jnp.asarray(images.images, jnp.float32) / 127.5 - 1
        clip = pipe.clip
        return float(clip.network(x, jnp.zeros(1), clip.encode_captions(["red"]))[0])

    assert likeness(guided) > likeness(unguided)
    # Ancestral samplers follow the paper; the others limit the change of x_0.
    given = []

    def record(clip, prompts, scale, limit):
        given.append(limit)
        return guidance(clip, prompts, scale, limit)

    guidance = CLIP.guidance
    monkeypatch.setattr(CLIP, "guidance", record)
    pipe("red", clip_guidance_scale=500.0, **settings | {"sampler": "ddpm-small"})
    pipe("red", clip_guidance_scale=500.0, **settings | {"sampler": "ddim"})
    assert given == [None, MAX_X_0_CHANGE]
    monkeypatch.undo()
    # The empty caption guides nowhere.
    nothing, something = pipe.clip.guidance(["", "red"], 1.0).args["cond"]
    assert not nothing.any() and jnp.linalg.norm(something) == pytest.approx(1, abs=1e-3)
    for changed, message in (
        ({"image_size": 32}, "sees images of 32 pixels, .* generates 16"),
        ({"n_timestep": 500}, "knows 500 timesteps, .* has 1000"),
    ):
        other = replace(pipe, clip=replace(pipe.clip, config=replace(small, **changed)))
        with pytest.raises(glide.UsageError, match=message):
            other("red", clip_guidance_scale=3.0)
    with pytest.raises(glide.UsageError, match="needs a noised CLIP"):
        glide.load(folders["base"])("red", clip_guidance_scale=3.0)
    with pytest.raises(glide.UsageError, match="no noised CLIP"):
        glide.load_clip(tmp_path / "nowhere")
    with pytest.raises(glide.GlideError, match="does not hold a noised CLIP"):
        glide.load_clip(folders["base"])


def test_a_weak_model_is_loaded_alone(folders, monkeypatch):
    asked = []

    def companion(weights, role, wanted):
        asked.append((str(weights), role, wanted))

    monkeypatch.setattr(loading, "companion", companion)
    glide.load(folders["base"], weak_model=folders["base"])
    name = str(folders["base"])
    own = [(name, "upsampler", None), (name, "clip", None)]
    assert asked == [*own, (name, "upsampler", "none"), (name, "clip", "none")]
