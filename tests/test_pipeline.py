"""The pipelines of the other variants: enlarging, inpainting, the two together."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.models.clip import NoisedCLIP, init_params
from glide_jax.noised_clip import save_clip
from glide_jax.pictures import read_hole, read_pictures
from tests.commands import TINY, first_weights, make_weights


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
def hole():
    mask = np.zeros((16, 16), bool)
    mask[4:12, 6:10] = True
    return mask


def test_an_upsampler_enlarges_what_the_base_drew(folders):
    pipe = glide.load(folders["base"], upsampler=folders["superres"])
    pictures = pipe(["red", "blue"], seed=1, progress=False)
    assert pictures.images.shape == (2, 32, 32, 3)
    made = pictures.metadata(1)
    assert made["prompt"] == "blue" and made["upsampler"]["weights"] == str(folders["superres"])


def test_an_upsampler_reads_the_small_picture(folders, photo):
    up = glide.load(folders["superres"])
    one, other = (up("red", low_res=p, progress=False).images for p in (photo, 255 - photo))
    assert one.shape == (1, 32, 32, 3) and not np.array_equal(one, other)


def test_inpainting_keeps_the_known_pixels_exactly(folders, photo, hole):
    pipe = glide.load(folders["inpaint"])
    pictures = pipe("red", num=2, image=photo, mask=hole, progress=False)
    for image in pictures.images:
        assert np.array_equal(image[~hole], photo[~hole])
        assert not np.array_equal(image[hole], photo[hole])
    # What was in the hole is not looked at.
    changed = np.where(hole[..., None], 255 - photo, photo)
    again = pipe("red", num=2, image=changed, mask=hole, progress=False)
    assert np.array_equal(again.images, pictures.images)


def test_inpainting_works_through_the_upsampler(folders, photo, hole):
    pipe = glide.load(folders["inpaint"], upsampler=folders["superres_inpaint"])
    large = photo.repeat(2, axis=0).repeat(2, axis=1)
    big_hole = hole.repeat(2, axis=0).repeat(2, axis=1)
    pictures = pipe("red", image=large, mask=big_hole, progress=False)
    assert np.array_equal(pictures.images[0][~big_hole], large[~big_hole])


def test_what_a_variant_does_not_take_or_lacks_is_said(folders, photo, hole):
    base, up = glide.load(folders["base"]), glide.load(folders["superres"])
    inpaint = glide.load(folders["inpaint"])
    for call, says in (
        (lambda: base("red", low_res=photo), "takes no low_res"),
        (lambda: up("red"), "give it some as low_res"),
        (lambda: inpaint("red", image=photo), "needs a mask of the hole"),
        (lambda: inpaint("red", image=photo[:, :, 0], mask=hole), "uint8"),
        (lambda: inpaint(["red"] * 3, image=np.stack([photo] * 2), mask=hole), "2 pictures for 3"),
        (lambda: glide.load(folders["base"], upsampler=folders["inpaint"]), "no upsampler"),
        (lambda: glide.load(folders["base"], guide=folders["inpaint"]), "cannot guide"),
        (lambda: glide.load(folders["base"], devices=99), "cannot use 99 devices"),
    ):
        with pytest.raises(glide.UsageError, match=says):
            call()


def test_pictures_and_masks_are_read_from_files(tmp_path, photo, hole):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray((hole * 255).astype(np.uint8)).save(tmp_path / "hole.png")
    assert np.array_equal(read_pictures(tmp_path / "photo.png", 16, 2)[1], photo)
    masks = read_hole(tmp_path / "hole.png", 32, 1)
    assert masks.shape == (1, 32, 32, 1)
    assert np.array_equal(masks[0, :, :, 0], hole.repeat(2, axis=0).repeat(2, axis=1))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(glide.GlideError, match=r"broken\.png"):
        read_pictures(tmp_path / "broken.png", 16, 1)
    with pytest.raises(glide.GlideError, match=r"missing\.png"):
        read_hole(tmp_path / "missing.png", 16, 1)


def test_guidance_can_be_given_as_functions(folders):
    pipe = glide.load(folders["base"])
    scale = glide.classifier_free(scale=3.0)
    default = pipe("red", guidance_scale=3.0, progress=False)
    given = pipe("red", guidance=[scale, glide.clip()], progress=False)
    assert np.array_equal(default.images, given.images)
    everywhere = pipe("red", guidance=[scale.within(0, 1e9), glide.clip()], progress=False)
    assert np.array_equal(default.images, everywhere.images)
    nowhere = pipe("red", guidance=[scale.within(1e8, 1e9), glide.clip()], progress=False)
    unguided = pipe("red", guidance_scale=1, progress=False)
    assert np.array_equal(nowhere.images, unguided.images)
    assert not np.array_equal(default.images, unguided.images)
    assert given.metadata(0)["guidance"][0]["name"] == "classifier_free"


def test_clip_guidance_pulls_towards_the_prompt(folders, tmp_path):
    config = glide.CLIP_PRESETS["clip64"]()
    small = replace(
        config, image_size=16, image_width=32, image_layers=1, text_width=32, text_layers=1,
        head_size=16, embed_width=16, n_vocab=49408,
    )  # fmt: skip
    params = first_weights(init_params, NoisedCLIP(small))
    save_clip(glide.CLIP("tiny", small, params), tmp_path / "clip")
    pipe = glide.load(folders["base"], clip=tmp_path / "clip")
    settings = {"sampler": "ddpm", "steps": 3, "progress": False}
    unguided = pipe("red", **settings)
    guided = pipe("red", clip_scale=500.0, **settings)
    assert guided.metadata(0)["clip_scale"] == 500.0

    def likeness(pictures):
        x = jnp.asarray(pictures.images, jnp.float32) / 127.5 - 1
        clip = pipe.clip
        return float(clip.network(x, jnp.zeros(1), clip.encode_text(["red"]))[0])

    assert likeness(guided) > likeness(unguided)
    # The empty caption asks for nothing.
    nothing, something = pipe.clip.guidance(["", "red"], 1.0).args["cond"]
    assert not nothing.any() and jnp.linalg.norm(something) == pytest.approx(1, abs=1e-3)
    for changed, says in (
        ({"image_size": 32}, "sees pictures of 32 pixels, .* draws 16"),
        ({"n_timestep": 500}, "knows 500 noise levels, .* has 1000"),
    ):
        other = replace(pipe, clip=replace(pipe.clip, config=replace(small, **changed)))
        with pytest.raises(glide.UsageError, match=says):
            other("red", clip_scale=3.0)
    with pytest.raises(glide.UsageError, match="needs a noised CLIP"):
        glide.load(folders["base"])("red", clip_scale=3.0)
    with pytest.raises(glide.UsageError, match="no noised CLIP"):
        glide.load_clip(tmp_path / "nowhere")
    with pytest.raises(glide.GlideError, match="does not hold a noised CLIP"):
        glide.load_clip(folders["base"])
