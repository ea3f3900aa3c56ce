"""Editing, on images that are known exactly: img2img, inpainting, inversion, interpolation.

With a progress bar, as by default, one compiled row serves every number of steps.
"""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.errors import UsageError
from glide_jax.pipeline.clip_guide import CLIP
from glide_jax.pipeline.editing import slerp
from glide_jax.pipeline.image_files import read_images
from glide_jax.pipeline.runner import image_keys, start_noise
from tests.support.exact_model import SPREAD, colour, exact_pipeline, pixels

LEVEL = 1 / 127.5  # a step of 8 bits


@pytest.fixture(scope="module")
def pipe():
    return exact_pipeline()


@pytest.fixture(scope="module")
def photo():
    """An image with the pixel statistics of a red one."""
    noise = np.random.default_rng(0).standard_normal((8, 8, 3))
    return np.uint8(np.clip(np.round((colour("red") + SPREAD * noise + 1) * 127.5), 0, 255))


@pytest.fixture
def mask():
    region = np.zeros((8, 8), bool)
    region[2:6, 3:7] = True
    return region


def noise_of_index(i, seed=0):
    return np.asarray(start_noise(image_keys(seed, [i]).start, 8))[0]


def flowed(x, alpha, sigma, mean):
    """The exact end of the probability flow from `x_t`, for images with this mean."""
    return mean + (x - alpha * mean) * SPREAD / np.sqrt(alpha**2 * SPREAD**2 + sigma**2)


# --- img2img


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_img2img_starts_from_the_noised_image(pipe, photo, strength):
    found = pipe("green", image=photo, strength=strength, steps=40, sampler="unipc3")
    timesteps = pipe.settings.changed(steps=40, strength=strength).timesteps(pipe.schedule)
    assert len(timesteps) == 40 * strength
    alpha = np.sqrt(pipe.schedule.alpha_bar_at(timesteps[0]))
    sigma = np.sqrt(1 - alpha**2)
    x = alpha * pixels(photo) + sigma * noise_of_index(0)
    assert (
        np.abs(pixels(found.images[0]) - flowed(x, alpha, sigma, colour("green"))).max() < 2 * LEVEL
    )


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_an_upsampler_with_a_strength_starts_from_the_small_image_enlarged(photo, strength):
    up = exact_pipeline("superres", size=32)
    settings = {"strength": strength, "steps": 40, "sampler": "unipc3"}
    found = up("green", low_res=photo, **settings)
    alpha = np.sqrt(
        up.schedule.alpha_bar_at(up.settings.changed(**settings).timesteps(up.schedule)[0])
    )
    sigma = np.sqrt(1 - alpha**2)
    smooth = jax.image.resize(pixels(photo), (32, 32, 3), "bilinear")
    x = (
        alpha * smooth
        + sigma * np.asarray(start_noise(image_keys(0, [0], upsampler=True).start, 32))[0]
    )
    mean = pixels(photo).repeat(4, 0).repeat(4, 1)
    exact = flowed(x, alpha, sigma, mean)
    assert np.abs(pixels(found.images[0]) - exact).max() < 2 * LEVEL


def test_more_strength_leaves_less_of_the_image(pipe, photo):
    def distance(strength):
        found = pipe("green", num=4, image=photo, strength=strength)
        return np.abs(pixels(found.images) - pixels(photo)).mean()

    distances = [distance(strength) for strength in (0.1, 0.5, 1.0)]
    assert distances[0] < 0.02 and distances == sorted(distances)
    # At strength 1 the image has no influence.
    found = pipe("green", num=4, image=photo, strength=1.0)
    assert np.abs(pixels(found.images).mean(axis=(0, 1, 2)) - colour("green")).max() < 0.03


def test_inpainting_with_a_strength_stays_near_the_image(photo, mask):
    """The known pixels stay, the masked region changes little."""
    pipe = exact_pipeline("inpaint")
    found = pipe("green", image=photo, mask=mask, strength=0.2).images[0]
    assert np.array_equal(found[~mask], photo[~mask])
    assert 0 < np.abs(pixels(found) - pixels(photo))[mask].mean() < 0.05


# --- inpainting


@pytest.mark.parametrize("variant", ["base", "inpaint"])
@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", "plms", "heun", "sa"])
def test_known_pixels_keep_their_bytes_with_every_sampler(variant, sampler, photo, mask):
    pipe = exact_pipeline(variant)
    found = pipe("green", num=2, image=photo, mask=mask, sampler=sampler)
    for image in found.images:
        assert np.array_equal(image[~mask], photo[~mask])
        filled = pixels(image[mask])
        assert np.abs(filled.mean(axis=0) - colour("green")).max() < 4 * SPREAD / 4
    assert not np.array_equal(*found.images)


def test_repaint_is_on_for_models_not_trained_to_inpaint(photo, mask):
    call = {"image": photo, "mask": mask, "steps": 11}
    assert exact_pipeline()("green", **call).settings["repaint"] == (5, 4)
    assert exact_pipeline()("green", **call | {"steps": 3}).settings["repaint"] == (2, 4)
    assert exact_pipeline()("green", **call | {"steps": 1}).settings["repaint"] == "none"
    assert exact_pipeline()("green", **call, repaint=(1, 1)).settings["repaint"] == (1, 1)
    without = exact_pipeline()("green", **call, repaint="none")
    assert without.settings["repaint"] == "none" and without.settings["evaluations"] == 11
    assert exact_pipeline()("green", **call, restart=(0.3, 3.0, 1)).settings["repaint"] == "none"
    assert exact_pipeline("inpaint")("green", **call).settings["repaint"] == "none"
    assert exact_pipeline("inpaint")("green", **call, repaint=(2, 2)).settings["repaint"] == (2, 2)


def test_both_stages_inpaint(photo, mask):
    """The upsampler gets image and mask too, at its size."""
    for variants in (("base", "superres"), ("inpaint", "superres_inpaint")):
        pipe = exact_pipeline(variants[0], upsampler=exact_pipeline(variants[1], size=16))
        large = photo.repeat(2, axis=0).repeat(2, axis=1)
        found = pipe("green", image=large, mask=mask).images[0]
        big = mask.repeat(2, axis=0).repeat(2, axis=1)
        assert np.array_equal(found[~big], large[~big])
        assert np.abs(pixels(found[big]).mean(axis=0) - colour("green")).max() < SPREAD


def test_both_stages_read_the_same_image_and_mask_and_one_line_says_how(photo, mask, capsys):
    pipe = exact_pipeline("inpaint", upsampler=exact_pipeline("superres_inpaint", size=16))
    wide = np.concatenate([photo, photo], axis=1).repeat(2, axis=0).repeat(2, axis=1)
    call = {"image": wide, "mask": mask, "fit": "pad", "invert_mask": True, "progress": False}
    result = pipe("green", **call)
    big = mask.repeat(2, axis=0).repeat(2, axis=1)
    kept = result.images[0][big]
    assert np.array_equal(kept, read_images(wide, 16, 1, fit="pad")[0][big])
    assert result.settings["fit"] == "pad" and result.settings["invert_mask"] is True
    share = 100 * (1 - mask.mean())
    assert capsys.readouterr().err == (
        "note: the image was padded with white to 32x32 of 32x16 and reduced from 32x32 to 16x16; "
        f"the mask regenerates {share:.3g}% of the image (inverted)\n"
    )


def test_a_mask_without_a_region_is_an_error_unless_it_is_allowed(photo, mask):
    pipe, nothing = exact_pipeline("inpaint"), np.zeros_like(mask)
    with pytest.raises(glide.UsageError, match="the mask has no masked region"):
        pipe("green", image=photo, mask=nothing)
    found = pipe("green", image=photo, mask=nothing, allow_uniform_mask=True)
    assert np.array_equal(found.images[0], photo)


# --- inversion


def test_ddim_inversion_finds_the_noise_of_an_image(pipe, photo):
    exact = (pixels(photo) - colour("red")) / SPREAD
    errors = [
        np.abs(pipe.invert(photo, "red", steps=n, progress=True)[0] - exact).mean()
        for n in (20, 80, 320)
    ]
    # First order; the cleanest level of the process keeps a little noise.
    assert errors[0] > 2.5 * errors[1] > 5 * errors[2] and errors[2] < 0.05
    noise = pipe.invert(photo, "red", steps=80, progress=True)
    again = pipe("red", noise=noise, steps=80)
    assert np.abs(pixels(again.images[0]) - pixels(photo)).max() < 4 * LEVEL


def test_several_images_are_inverted_in_batches(pipe, photo):
    images = np.stack([photo, 255 - photo, photo[::-1]])
    together = pipe.invert(images, "red", progress=True)
    assert together.shape == (3, 8, 8, 3) and together.dtype == np.float32
    one_by_one = pipe.invert(images, "red", batch_size=1, progress=True)
    assert np.abs(together - one_by_one).max() < 1e-5


def test_inversion_follows_the_unguided_process_whatever_the_weights_store(photo):
    wanted = exact_pipeline().invert(photo, "red", steps=20, progress=False)
    stored = {"negative_prompt": "blue", "guidance_scale": 3.0, "guidance_rescale": 0.5}
    found = exact_pipeline(settings=stored).invert(photo, "red", steps=20, progress=False)
    np.testing.assert_array_equal(found, wanted)


class BowlCLIP(CLIP):
    """A CLIP whose similarity is highest for black images; it lists the limits of its guidance."""

    def guidance(self, prompts, scale, limit=None):
        LIMITS.append(limit)
        cond = np.full((len(prompts), 3), -1, np.float32)
        log_prob = glide.Network(bowl, np.ones(1))
        return glide.classifier_guidance(log_prob=log_prob, cond=cond, scale=scale, limit=limit)


LIMITS = []


def bowl(params, x, t, cond):
    return -params * ((x - cond[:, None, None]) ** 2).sum(axis=(1, 2, 3))


@pytest.mark.parametrize("own", ["ddim", "ddpm", "ddpm-small"])
def test_clip_guidance_is_limited_in_inversion_whatever_the_sampler_of_the_weights(own, photo):
    clip = BowlCLIP("bowl", replace(glide.CLIP_PRESETS["clip64"](), image_size=8, n_timestep=0), {})
    pipe = exact_pipeline(clip=clip, settings={"sampler": own})
    LIMITS.clear()
    found = pipe.invert(photo, "red", clip_guidance_scale=3.0, steps=4)
    assert LIMITS == [0.25]
    other = exact_pipeline(clip=clip, settings={"sampler": "dpm++2m"})
    assert np.array_equal(found, other.invert(photo, "red", clip_guidance_scale=3.0, steps=4))
    pipe("red", clip_guidance_scale=3.0, steps=4)
    assert [0.25, 0.25, 0.25 if own == "ddim" else None] == LIMITS


def test_whole_numbers_are_not_cut(pipe):
    with pytest.raises(UsageError, match="^steps takes a whole number or text, not 20.7"):
        pipe("red", steps=20.7)
    for name in ("seed", "first_index"):
        with pytest.raises(UsageError, match=f"{name} is a whole number, not 1.5"):
            pipe("red", **{name: 1.5})


def test_sampling_starts_from_the_noise_of_the_caller(pipe):
    noise = noise_of_index(3, seed=5)
    same = pipe("red", noise=noise, seed=1)
    assert np.array_equal(same.images, pipe("red", seed=5, first_index=3).images)
    assert same.settings["noise"] == "array"
    # A lower temperature ends nearer to the mean.
    cool = pipe("red", noise=noise, temperature=0.5)
    left = [np.std(pixels(p.images[0]) - colour("red")) for p in (cool, same)]
    assert abs(left[0] / left[1] - 0.5) < 0.1


def test_variations_range_from_the_image_to_an_unrelated_one(pipe, photo):
    def distances(amount):
        found = pipe.variations(photo, "red", variation=amount, num=4, steps=50)
        return np.abs(pixels(found.images) - pixels(photo)).mean(axis=(1, 2, 3))

    far = [distances(amount) for amount in (0, 0.3, 0.7, 1)]
    assert far[0].max() < 3 * LEVEL
    assert all((a < b).all() for a, b in itertools.pairwise(far[:3]))
    fresh = pipe("red", num=4, seed=7, steps=50)
    same = pipe.variations(photo, "red", variation=1, num=4, seed=7, steps=50)
    assert np.array_equal(same.images, fresh.images)
    alone = pipe.variations(photo, "red", variation=0.3, seed=7, first_index=2)
    four = pipe.variations(photo, "red", variation=0.3, seed=7, num=4)
    assert np.array_equal(alone.images[0], four.images[2])
    assert four.metadata(2)["variation"] == 0.3 and four.metadata(2)["index"] == 2


def test_inversion_and_variations_take_a_list_of_guidances(pipe, photo):
    plain, strong = ([glide.classifier_free(scale=scale)] for scale in (1, 3))
    for how in (pipe.invert, pipe.variations):
        usual, same, other = (
            np.float32(getattr(found, "images", found))
            for found in (
                how(photo, "red", progress=True),
                how(photo, "red", guidance=plain, progress=True),
                how(photo, "red", guidance=strong, progress=True),
            )
        )
        assert np.allclose(usual, same, atol=1e-4) and np.abs(usual - other).max() > 0.1


def test_an_image_changes_to_another_caption(pipe, photo):
    """Same noise, another caption: the colour changes, the pattern stays."""
    found = pipe.variations(photo, "blue", image_caption="red", variation=0, steps=80)
    change = pixels(found.images[0]) - pixels(photo)
    assert np.abs(change - (colour("blue") - colour("red"))).max() < 4 * LEVEL


# --- interpolation


def test_the_arc_between_two_noises():
    rng = np.random.default_rng(0)
    a, b = (np.float32(rng.standard_normal((1, 8, 8, 3))) for _ in range(2))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    found = np.asarray(slerp(a, b, np.linspace(0, 1, 5)))
    assert np.array_equal(found[0], a[0]) and np.array_equal(found[-1], b[0])
    u, v = (x.ravel() / np.linalg.norm(x) for x in (a, b))
    angles = [np.arccos(np.clip(u @ x.ravel() / np.linalg.norm(x), -1, 1)) for x in found]
    assert np.allclose(np.diff(angles), np.arccos(u @ v) / 4, atol=1e-3)
    assert np.allclose(np.linalg.norm(found.reshape(5, -1), axis=1), np.linalg.norm(a), rtol=1e-4)
    assert np.allclose(slerp(a, a, 0.3), a, rtol=1e-6)
    assert np.isfinite(slerp(a, -a, 0.5)).all()


def test_between_seeds(pipe):
    found = pipe.interpolate("red", seed=1, to_seed=2, num=5)
    for i, seed in ((0, 1), (-1, 2)):
        assert np.array_equal(found.images[i], pipe("red", seed=seed).images[0])
    steps = np.abs(np.diff(pixels(found.images), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < 1.2 * steps.min()
    assert found.metadata(1)["interpolation"] == {
        "prompts": ["red", "red"],
        "seeds": [1, 2],
        "share": 0.25,
    }


def test_between_prompts(pipe):
    found = pipe.interpolate("red", "blue", num=5, seed=3)
    for i, prompt in ((0, "red"), (-1, "blue")):
        assert np.array_equal(found.images[i], pipe(prompt, seed=3).images[0])
    wanted = np.linspace(pixels(found.images[0]), pixels(found.images[-1]), 5)
    assert np.abs(pixels(found.images) - wanted).max() < 1.5 * LEVEL
    assert found.prompts[1] == "red -> blue" and found.indices == (0,) * 5


def test_between_prompts_of_several_parts(pipe):
    found = pipe.interpolate("red AND blue :0.5", "green", num=3, guidance_scale=1.0)
    ends = [pipe(p).images[0] for p in ("red AND blue :0.5", "green")]
    assert np.abs(pixels(found.images[0]) - pixels(ends[0])).max() < 1.5 * LEVEL
    assert np.abs(pixels(found.images[-1]) - pixels(ends[1])).max() < 1.5 * LEVEL


def test_the_noise_of_the_steps_is_the_same_along_an_interpolation(pipe):
    found = pipe.interpolate("red", num=3, sampler="ddpm")
    assert np.array_equal(found.images[0], found.images[1])
    alone = pipe("red", sampler="ddpm")
    assert np.array_equal(found.images[2], alone.images[0])


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, "strength is for editing an image"),
        ({"mask": np.ones((8, 8))}, "a mask belongs to an image"),
        ({"image": "photo"}, "needs a mask of the region"),
        ({"image": "photo", "strength": 0.0}, "strength must be above 0"),
        ({"image": "photo", "strength": 1.5}, "strength must be above 0"),
        ({"repaint": (5, 2)}, "repaint is for inpainting"),
        ({"image": "photo", "mask": "mask", "repaint": (0, 2)}, "at least 1"),
        ({"noise": np.zeros((4, 4, 3))}, r"noise is \(8, 8, 3\)"),
        ({"noise": np.zeros((2, 8, 8, 3))}, "one for each of 1"),
        ({"upsampler": {"steps": 3}}, "there is none"),
        ({"first_index": [1, 2]}, "2 values for 1"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(pipe, photo, mask, call, message):
    named = {"photo": photo, "mask": mask}
    call = {k: named[v] if isinstance(v, str) else v for k, v in call.items()}
    with pytest.raises(glide.UsageError, match=message):
        pipe("red", **call)


def test_what_interpolation_inversion_and_variations_refuse(pipe, photo):
    for call, message in (
        (lambda: pipe.variations(photo, "red", variation=1.1), "between 0 and 1"),
        (lambda: pipe.variations(np.stack([photo] * 2), "red"), "2 images for 1"),
        *(
            (
                lambda setting=setting: pipe.variations(photo, "red", **setting),
                "^variations take no strength or repaint: variation is their strength$",
            )
            for setting in ({"strength": 0.5}, {"repaint": (2, 2)})
        ),
        (lambda: pipe.interpolate("red", "blue", num=1), "at least 2"),
        (lambda: pipe.invert(photo, "red", strength=0.5), "takes no strength"),
        (lambda: exact_pipeline("superres").invert(photo, "red"), "an upsampler"),
    ):
        with pytest.raises(glide.UsageError, match=message):
            call()
