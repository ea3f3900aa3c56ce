"""Editing, on pictures that are known exactly: redrawing, filling holes, noises and ways between.

With a progress bar, as by default, one compiled row serves every number of steps.
"""

import itertools

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.drawing import picture_keys, start_noise
from glide_jax.editing import slerp
from tests.painter import SPREAD, colour, painter, pixels

LEVEL = 1 / 127.5  # a step of 8 bits


@pytest.fixture(scope="module")
def pipe():
    return painter()


@pytest.fixture(scope="module")
def photo():
    """Pixels as likely as those of a red picture."""
    noise = np.random.default_rng(0).standard_normal((8, 8, 3))
    return np.uint8(np.clip(np.round((colour("red") + SPREAD * noise + 1) * 127.5), 0, 255))


@pytest.fixture
def hole():
    mask = np.zeros((8, 8), bool)
    mask[2:6, 3:7] = True
    return mask


def noise_of_number(i, seed=0):
    return np.asarray(start_noise(picture_keys(seed, [i])[:, 0], 8))[0]


def flowed(x, alpha, sigma, mean):
    """Where the flow takes `x_t` of a picture with these means: exact."""
    return mean + (x - alpha * mean) * SPREAD / np.sqrt(alpha**2 * SPREAD**2 + sigma**2)


# --- from an image, with a strength


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_redrawing_begins_with_the_noised_image(pipe, photo, strength):
    found = pipe("green", image=photo, strength=strength, steps=40, sampler="unipc3")
    grid = pipe.settings.changed(steps=40, strength=strength).grid(pipe.schedule)
    assert len(grid) == 40 * strength
    alpha = np.sqrt(pipe.schedule.alpha_bar_at(grid[0]))
    sigma = np.sqrt(1 - alpha**2)
    x = alpha * pixels(photo) + sigma * noise_of_number(0)
    assert (
        np.abs(pixels(found.images[0]) - flowed(x, alpha, sigma, colour("green"))).max() < 2 * LEVEL
    )


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_an_upsampler_begins_with_the_small_picture_enlarged(photo, strength):
    up = painter("superres", size=32)
    given = {"strength": strength, "steps": 40, "sampler": "unipc3"}
    found = up("green", low_res=photo, **given)
    alpha = np.sqrt(up.schedule.alpha_bar_at(up.settings.changed(**given).grid(up.schedule)[0]))
    sigma = np.sqrt(1 - alpha**2)
    smooth = jax.image.resize(pixels(photo), (32, 32, 3), "bilinear")
    x = alpha * smooth + sigma * np.asarray(start_noise(picture_keys(0, [0])[:, 0], 32))[0]
    mean = pixels(photo).repeat(4, 0).repeat(4, 1)
    exact = flowed(x, alpha, sigma, mean)
    assert np.abs(pixels(found.images[0]) - exact).max() < 2 * LEVEL


def test_more_strength_leaves_less_of_the_image(pipe, photo):
    def distance(strength):
        found = pipe("green", num=4, image=photo, strength=strength)
        return np.abs(pixels(found.images) - pixels(photo)).mean()

    distances = [distance(strength) for strength in (0.1, 0.5, 1.0)]
    assert distances[0] < 0.02 and distances == sorted(distances)
    # All of it: the prompt's picture, whatever the image was.
    found = pipe("green", num=4, image=photo, strength=1.0)
    assert np.abs(pixels(found.images).mean(axis=(0, 1, 2)) - colour("green")).max() < 0.03


def test_a_redrawn_hole_begins_with_what_is_in_it(photo, hole):
    """With both: the known pixels stay, the hole is near to what it was."""
    pipe = painter("inpaint")
    found = pipe("green", image=photo, mask=hole, strength=0.2).images[0]
    assert np.array_equal(found[~hole], photo[~hole])
    assert 0 < np.abs(pixels(found) - pixels(photo))[hole].mean() < 0.05


# --- holes


@pytest.mark.parametrize("variant", ["base", "inpaint"])
@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", "plms", "heun", "sa"])
def test_known_pixels_keep_their_bytes_whatever_the_sampler(variant, sampler, photo, hole):
    pipe = painter(variant)
    found = pipe("green", num=2, image=photo, mask=hole, sampler=sampler)
    for image in found.images:
        assert np.array_equal(image[~hole], photo[~hole])
        drawn = pixels(image[hole])
        assert np.abs(drawn.mean(axis=0) - colour("green")).max() < 4 * SPREAD / 4
    assert not np.array_equal(*found.images)


def test_a_network_that_has_not_learned_to_fill_holes_goes_back_and_forth(photo, hole):
    call = {"image": photo, "mask": hole, "steps": 11}
    assert painter()("green", **call).settings["repaint"] == (5, 4)
    assert painter()("green", **call | {"steps": 3}).settings["repaint"] == (2, 4)
    assert painter()("green", **call | {"steps": 1}).settings["repaint"] is None
    assert painter()("green", **call, repaint=(1, 1)).settings["repaint"] == (1, 1)
    assert painter()("green", **call, restart=(0.3, 3.0, 1)).settings["repaint"] is None
    assert painter("inpaint")("green", **call).settings["repaint"] is None
    assert painter("inpaint")("green", **call, repaint=(2, 2)).settings["repaint"] == (2, 2)


def test_the_hole_is_filled_at_both_sizes(photo, hole):
    """The upsampler is given image and hole too, at its size."""
    for variants in (("base", "superres"), ("inpaint", "superres_inpaint")):
        pipe = painter(variants[0], upsampler=painter(variants[1], size=16))
        large = photo.repeat(2, axis=0).repeat(2, axis=1)
        found = pipe("green", image=large, mask=hole).images[0]
        big = hole.repeat(2, axis=0).repeat(2, axis=1)
        assert np.array_equal(found[~big], large[~big])
        assert np.abs(pixels(found[big]).mean(axis=0) - colour("green")).max() < SPREAD


# --- noise


def test_reverse_ddim_finds_the_noise_of_a_picture(pipe, photo):
    exact = (pixels(photo) - colour("red")) / SPREAD
    errors = [
        np.abs(pipe.noise_of(photo, "red", steps=n, progress=True)[0] - exact).mean()
        for n in (20, 80, 320)
    ]
    # Of first order, and the first level of the chain is not quite clean.
    assert errors[0] > 2.5 * errors[1] > 5 * errors[2] and errors[2] < 0.05
    noise = pipe.noise_of(photo, "red", steps=80, progress=True)
    again = pipe("red", noise=noise, steps=80)
    assert np.abs(pixels(again.images[0]) - pixels(photo)).max() < 4 * LEVEL


def test_noises_of_several_pictures_in_batches(pipe, photo):
    images = np.stack([photo, 255 - photo, photo[::-1]])
    together = pipe.noise_of(images, "red", progress=True)
    assert together.shape == (3, 8, 8, 3) and together.dtype == np.float32
    one_by_one = pipe.noise_of(images, "red", batch_size=1, progress=True)
    assert np.abs(together - one_by_one).max() < 1e-5


def test_given_noise_is_what_a_picture_begins_with(pipe):
    noise = noise_of_number(3, seed=5)
    given = pipe("red", noise=noise, seed=1)
    assert np.array_equal(given.images, pipe("red", seed=5, first=3).images)
    assert given.settings["noise"] == "given"
    # Cooler noise, nearer to the mean.
    cool = pipe("red", noise=noise, temperature=0.5)
    left = [np.std(pixels(p.images[0]) - colour("red")) for p in (cool, given)]
    assert abs(left[0] / left[1] - 0.5) < 0.1


def test_variations_lead_from_the_picture_to_any_other(pipe, photo):
    def distances(amount):
        found = pipe.variations(photo, "red", amount=amount, num=4, steps=50)
        return np.abs(pixels(found.images) - pixels(photo)).mean(axis=(1, 2, 3))

    far = [distances(amount) for amount in (0, 0.3, 0.7, 1)]
    assert far[0].max() < 3 * LEVEL
    assert all((a < b).all() for a, b in itertools.pairwise(far[:3]))
    anew = pipe("red", num=4, seed=7, steps=50)
    same = pipe.variations(photo, "red", amount=1, num=4, seed=7, steps=50)
    assert np.array_equal(same.images, anew.images)
    alone = pipe.variations(photo, "red", amount=0.3, seed=7, first=2)
    four = pipe.variations(photo, "red", amount=0.3, seed=7, num=4)
    assert np.array_equal(alone.images[0], four.images[2])
    assert four.metadata(2)["variation"] == 0.3 and four.metadata(2)["first"] == 2


def test_a_list_of_guidances_is_taken_on_the_way_there_and_back(pipe, photo):
    plain, strong = ([glide.classifier_free(scale=scale)] for scale in (1, 3))
    for how in (pipe.noise_of, pipe.variations):
        usual, given, other = (
            np.float32(getattr(found, "images", found))
            for found in (
                how(photo, "red", progress=True),
                how(photo, "red", guidance=plain, progress=True),
                how(photo, "red", guidance=strong, progress=True),
            )
        )
        assert np.allclose(usual, given, atol=1e-4) and np.abs(usual - other).max() > 0.1


def test_a_picture_is_drawn_as_another_caption_has_it(pipe, photo):
    """Same noise, another caption: the colour changes, the pattern stays."""
    found = pipe.variations(photo, "blue", caption="red", amount=0, steps=80)
    change = pixels(found.images[0]) - pixels(photo)
    assert np.abs(change - (colour("blue") - colour("red"))).max() < 4 * LEVEL


# --- between


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
    way = pipe.between("red", seed=1, to_seed=2, num=5)
    for i, seed in ((0, 1), (-1, 2)):
        assert np.array_equal(way.images[i], pipe("red", seed=seed).images[0])
    steps = np.abs(np.diff(pixels(way.images), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < 1.2 * steps.min()
    assert way.metadata(1)["between"] == {"prompts": ["red", "red"], "seeds": [1, 2], "share": 0.25}


def test_between_prompts(pipe):
    way = pipe.between("red", "blue", num=5, seed=3)
    for i, prompt in ((0, "red"), (-1, "blue")):
        assert np.array_equal(way.images[i], pipe(prompt, seed=3).images[0])
    wanted = np.linspace(pixels(way.images[0]), pixels(way.images[-1]), 5)
    assert np.abs(pixels(way.images) - wanted).max() < 1.5 * LEVEL
    assert way.prompts[1] == "red -> blue" and way.numbers == (0,) * 5


def test_between_prompts_of_several_parts(pipe):
    way = pipe.between("red AND blue :0.5", "green", num=3, guidance_scale=1.0)
    ends = [pipe(p).images[0] for p in ("red AND blue :0.5", "green")]
    assert np.abs(pixels(way.images[0]) - pixels(ends[0])).max() < 1.5 * LEVEL
    assert np.abs(pixels(way.images[-1]) - pixels(ends[1])).max() < 1.5 * LEVEL


def test_the_noise_of_the_steps_is_the_same_on_the_way(pipe):
    way = pipe.between("red", num=3, sampler="ddpm")
    assert np.array_equal(way.images[0], way.images[1])
    alone = pipe("red", sampler="ddpm")
    assert np.array_equal(way.images[2], alone.images[0])


# --- what cannot be


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"strength": 0.5}, "strength is of an image"),
        ({"mask": np.ones((8, 8))}, "a mask is of an image"),
        ({"image": "photo"}, "needs a mask of the hole"),
        ({"image": "photo", "strength": 0.0}, "strength lies above 0"),
        ({"image": "photo", "strength": 1.5}, "strength lies above 0"),
        ({"repaint": (5, 2)}, "repaint fills a hole"),
        ({"image": "photo", "mask": "hole", "repaint": (0, 2)}, "at least 1"),
        ({"noise": np.zeros((4, 4, 3))}, r"noise is \(8, 8, 3\)"),
        ({"noise": np.zeros((2, 8, 8, 3))}, "one for each of 1"),
        ({"upsampler": {"steps": 3}}, "there is none"),
        ({"first": [1, 2]}, "first numbers 2 of 1"),
    ],
)
def test_what_does_not_go_together_is_said(pipe, photo, hole, call, says):
    named = {"photo": photo, "hole": hole}
    call = {k: named[v] if isinstance(v, str) else v for k, v in call.items()}
    with pytest.raises(glide.UsageError, match=says):
        pipe("red", **call)


def test_what_ways_and_variations_refuse(pipe, photo):
    for call, says in (
        (lambda: pipe.variations(photo, "red", amount=1.1), "from 0 to 1"),
        (lambda: pipe.variations(np.stack([photo] * 2), "red"), "2 pictures for 1"),
        (lambda: pipe.between("red", "blue", num=1), "at least 2"),
        (lambda: pipe.noise_of(photo, "red", strength=0.5), "knows no strength"),
        (lambda: painter("superres").noise_of(photo, "red"), "an upsampler"),
    ):
        with pytest.raises(glide.UsageError, match=says):
            call()
