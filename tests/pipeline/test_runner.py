"""How images are generated: batches, devices, evaluations, compiled programs, previews."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.devices.placement import chosen_devices
from glide_jax.diffusion.sampling import run_rows
from glide_jax.errors import UsageError
from glide_jax.pipeline.batching import batches, default_batch_size, select_images
from tests.support.commands import make_weights, run
from tests.support.exact_model import EVALUATED, Oracle, exact_pipeline


@pytest.fixture(scope="module")
def pipe():
    return exact_pipeline()


# --- batches


@pytest.mark.parametrize(
    ("count", "size", "devices", "lengths"),
    [
        (1, 16, 1, [1]),
        (3, 16, 1, [1, 1, 1]),
        (5, 16, 1, [4, 1]),
        (13, 16, 1, [16]),
        (50, 16, 1, [16, 16, 16, 1, 1]),
        (16, 4, 1, [4] * 4),
        (10, 3, 1, [3, 3, 3, 1]),
        (10, 3, 4, [4, 4, 4]),
        (1, 1, 4, [4]),
    ],
)
def test_batches_have_few_lengths_and_hold_each_image(count, size, devices, lengths):
    found = batches(count, size, devices)
    assert [len(batch) for batch in found] == lengths
    indices = np.concatenate(found)
    assert indices[:count].tolist() == list(range(count)) and (indices[count:] == count - 1).all()


def test_the_usual_batch_is_smaller_for_larger_images():
    assert [default_batch_size(side) for side in (16, 64, 128, 256, 4096)] == [16, 16, 8, 4, 1]


def test_none_in_a_list_of_captions_is_the_caption_of_the_image(pipe):
    call = {"num": 2, "seed": 4, "progress": False}
    found, wanted = (
        pipe(
            "red", guidance=[glide.combine_prompts(prompts, [2.0, -0.5]), glide.clamp_x_0()], **call
        ).images
        for prompts in ([None, ["blue", None]], [None, ["blue", "red"]])
    )
    assert np.abs(found.astype(int) - wanted).max() <= 1
    with pytest.raises(UsageError) as caught:
        pipe("red", guidance=[glide.combine_prompts([[None, 5]], [1.0])], **call)
    assert str(caught.value) == "a caption of branch 'prompt 0' must be a string, not int"


def test_a_list_of_captions_in_a_guidance_is_split_into_batches(pipe):
    away = glide.combine_prompts([None, ["blue", "red", "blue"]], [1.5, -0.5])
    settings = {"num": 3, "seed": 4, "guidance": [away, glide.clamp_x_0()], "progress": False}
    whole = pipe("red", batch_size=4, **settings).images
    each = pipe("red", batch_size=1, **settings).images
    assert np.abs(each.astype(int) - whole).max() <= 1
    same = glide.combine_prompts([None, "blue"], [1.5, -0.5])
    same = pipe("red", batch_size=4, **settings | {"guidance": [same, glide.clamp_x_0()]}).images
    moved = np.abs(whole.astype(int) - same).max((1, 2, 3))
    assert moved[0] <= 1 and moved[1] > 1 and moved[2] <= 1
    short = glide.combine_prompts([None, ["blue", "red"]], [1.5, -0.5])
    with pytest.raises(UsageError, match="branch 'prompt 0' has 2 values for 3 images"):
        pipe("red", **settings | {"guidance": [short]})


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_an_image_is_the_same_in_any_batch(pipe, sampler):
    prompts = ["red", "blue"]
    settings = {"sampler": sampler, "guidance_scale": 2.0}
    whole = pipe(prompts, num=2, seed=4, **settings).images
    for size in (1, 2):
        found = pipe(prompts, num=2, seed=4, batch_size=size, **settings).images
        assert np.abs(found.astype(int) - whole).max() <= 1
    alone = pipe("blue", seed=4, first_index=3, **settings).images[0]
    assert np.abs(alone.astype(int) - whole[3]).max() <= 1
    chosen = pipe(["blue", "red"], seed=4, first_index=[2, 0], **settings)
    assert np.abs(chosen.images.astype(int) - whole[[2, 0]]).max() <= 1
    assert chosen.metadata(0)["index"] == 2


def test_images_masks_and_parameters_stay_with_their_image(pipe):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    masks = rng.random((5, 8, 8)) < 0.5
    scales = np.linspace(0, 4, 5)
    guidance = [glide.classifier_free(scale=scales), glide.clamp_x_0()]
    call = {"image": photos, "mask": masks, "guidance": guidance, "repaint": (3, 2)}
    whole = pipe(["red"] * 5, **call)
    split = pipe(["red"] * 5, batch_size=2, **call)
    assert np.abs(whole.images.astype(int) - split.images).max() <= 1
    for image, photo, mask in zip(split.images, photos, masks, strict=True):
        assert np.array_equal(image[~mask], photo[~mask])
    guidance = [glide.classifier_free(scale=scales[3]), glide.clamp_x_0()]
    call = {"image": photos[3], "mask": masks[3], "guidance": guidance, "repaint": (3, 2)}
    alone = pipe("red", first_index=3, **call)
    assert np.abs(alone.images[0].astype(int) - whole.images[3]).max() <= 1


def test_seeds_and_indices_are_not_cut_to_32_bits(pipe):
    last = 2**32 - 1
    found = [
        pipe("red", seed=seed, first_index=i).images for seed, i in ((0, 0), (last, 0), (0, last))
    ]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(found, 2))
    for wrong in ({"seed": -1}, {"seed": 2**32}, {"first_index": -1}, {"first_index": 2**32}):
        with pytest.raises(UsageError, match=r"between 0 and 2\^32"):
            pipe("red", **wrong)


def test_guidance_parameters_are_selected_by_image():
    network = glide.Network(lambda *_: None, np.ones(7))
    whole = [
        glide.compose(glide.classifier_free(scale=[1.0, 2.0, 3.0]), glide.clamp_x_0()),
        glide.classifier_guidance(
            log_prob=network, cond={"y": np.arange(3.0), "z": np.ones((1, 4))}, scale=2
        ),
    ]
    scale, clip, gradient = select_images(whole, np.array([2, 0]), 3)
    assert scale.args["scale"].tolist() == [3, 1] and clip.args == {"low": -1.0, "high": 1.0}
    assert gradient.args["cond"]["y"].tolist() == [2, 0]
    assert gradient.args["cond"]["z"].shape == (2, 4) and gradient.args["log_prob"] is network
    with pytest.raises(glide.UsageError, match="classifier_free has 3 values for 4 images"):
        select_images(whole, np.arange(4), 4)


# --- devices

FOUR = """
import sys
import numpy as np
import glide_jax as glide
from tests.support.exact_model import exact_pipeline

def differences(pipes, *prompts, **call):
    call |= {"seed": 2, "steps": 5, "progress": False}
    one, *others = [pipe(*prompts, **call).images.astype(int) for pipe in pipes]
    print(*(np.abs(one - other).max() for other in others))

pipes = [glide.load(sys.argv[1], devices=devices) for devices in (1, "all")]
head = pipes[1].network.params["unet"]["head"]["kernel"].sharding
assert head.is_fully_replicated and len(head.device_set) == 4
differences(pipes, ["red", "blue"], num=3, sampler="ddpm", batch_size=4)
pipes = [exact_pipeline(devices=devices) for devices in (1, "all")]
differences(pipes, ["red AND blue", "blue"], num=3, guidance_scale=2.0, sampler="sa")
photo, mask = np.full((8, 8, 3), 90, np.uint8), np.arange(8)[:, None] + np.zeros(8) > 3
def bowl(params, x, t, cond):
    return -params * ((x - cond[:, None, None]) ** 2).sum(axis=(1, 2, 3))

guidance = [
    glide.classifier_free(scale=[1, 2, 3]),
    glide.clamp_x_0(),
    glide.classifier_guidance(log_prob=glide.Network(bowl, np.ones(1)), cond=np.eye(3), scale=0.1),
]
differences(pipes, "red", num=3, image=photo, mask=mask, strength=0.9, guidance=guidance)
"""


def test_images_are_the_same_on_any_number_of_devices(tmp_path):
    result = run("-c", FOUR, make_weights(tmp_path / "tiny"), devices=4)
    assert result.returncode == 0, result.stderr
    differences = [int(word) for word in result.stdout.split()]
    assert len(differences) == 3 and max(differences) <= 1


def test_missing_devices_are_refused():
    assert chosen_devices("all") == jax.local_devices()
    assert chosen_devices(1) == chosen_devices("1") == jax.local_devices()[:1]
    for asked in (0, len(jax.local_devices()) + 1, "two", "-1"):
        with pytest.raises(glide.UsageError, match=f"cannot use {asked} devices"):
            chosen_devices(asked)


# --- evaluations


@pytest.fixture(scope="module")
def counting():
    """A pipeline with a weak model; both count the images that they evaluate."""
    weak = exact_pipeline(oracle=Oracle("weak", shift=0.05, count=True))
    return exact_pipeline(oracle=Oracle("main", count=True), weak_stage=weak)


PHOTO = {"image": np.full((8, 8, 3), 90, np.uint8)}
HALF = np.arange(8)[:, None] + np.zeros(8) > 3


@pytest.mark.parametrize(
    ("prompt", "call", "main", "weak"),
    [
        ("red", {}, 10, 0),
        ("red", {"guidance_scale": 3.0}, 20, 0),
        ("red", {"guidance_scale": 3.0, "num": 3, "batch_size": 3}, 60, 0),
        ("red", {"guidance_scale": 3.0, "negative_prompt": "blue"}, 20, 0),
        ("red", {"guidance_scale": 3.0, "guidance_method": "apg"}, 20, 0),
        ("red", {"guidance_scale": 0.5, "guidance_method": "cfg++", "sampler": "ddim"}, 20, 0),
        ("red", {"guidance_scale": 3.0, "guidance_rescale": 0.7, "dynamic_threshold": 0.99}, 20, 0),
        # Unguided steps take one evaluation: three of the half log-SNRs -5.1 ... 5.05 lie inside.
        ("red", {"guidance_scale": 3.0, "guidance_interval": (0.1, 3.5)}, 10 + 3, 0),
        ("red AND blue NOT green", {"guidance_scale": 3.0}, 40, 0),
        ("red", {"autoguidance_scale": 2.0}, 10, 10),
        ("red", {"guidance_scale": 3.0, "autoguidance_scale": 2.0}, 20, 10),
        ("red", {"sampler": "unipc3"}, 10, 0),
        ("red", {"sampler": "heun"}, 19, 0),
        ("red", {"strength": 0.5, **PHOTO}, 5, 0),
        ("red", {"mask": HALF, "repaint": (3, 4), **PHOTO}, 10 + 3 * 3 * 3, 0),
    ],
)
def test_the_number_of_evaluations(counting, prompt, call, main, weak):
    EVALUATED.clear()
    images = counting(prompt, **call)
    jax.effects_barrier()
    assert {"main": main, "weak": weak} == {"main": 0, "weak": 0} | EVALUATED
    # The metadata count the steps' evaluations, without the further branches of guidance.
    assert main % images.settings["evaluations"] == 0 or "guidance_interval" in call


def test_autoguidance_leads_away_from_the_weak_model():
    weak = exact_pipeline(oracle=Oracle("weak", shift=0.05))
    pipe = exact_pipeline(weak_stage=weak, settings={"sampler": "unipc3", "steps": 30})
    plain, guided = (
        pipe("red", num=4, autoguidance_scale=scale).images / 127.5 for scale in (1.0, 3.0)
    )
    assert np.abs((guided - plain) - 2 * -0.05).max() < 2 / 127.5
    with pytest.raises(glide.UsageError, match="load one as weak_model"):
        exact_pipeline()("red", autoguidance_scale=2.0)


# --- compiled programs


def test_no_setting_with_as_many_rows_compiles_again(pipe):
    def generate(**call):
        pipe(**{"prompts": "red", "guidance_scale": 3.0, "progress": False} | call)

    generate()
    before = run_rows._cache_size()
    for sampler in glide.SOLVERS:
        if sampler not in ("heun", "dpm++2s", "plms", "prk"):
            generate(sampler=sampler)
    for spacing in ("uniform", "karras", "trailing", "optimised"):
        generate(spacing=spacing)
    generate(sampler="ddim", eta=0.5)
    generate(guidance_scale=7.5, seed=3, first_index=2, temperature=0.9)
    generate(prompts="blue", negative_prompt="green")
    generate(strength=0.5, steps=20, **PHOTO)
    assert run_rows._cache_size() == before
    # An interval adds a program; its numbers do not.
    generate(guidance_interval=(0.3, 5.0))
    generate(prompts="red AND blue")
    generate(guidance_method="apg")
    generate(dynamic_threshold=0.9)
    between = run_rows._cache_size()
    assert between == before + 4
    generate(guidance_interval=(0.2, 2.0), guidance_scale=2.0)
    generate(prompts="green :0.3 NOT red :2", guidance_scale=5.0)
    generate(guidance_method="apg", guidance_scale=8.0, negative_prompt="blue")
    generate(dynamic_threshold=0.5)
    assert run_rows._cache_size() == between


def test_with_a_bar_one_compiled_row_serves_any_number_of_steps(pipe):
    pipe("red", steps=2)
    before = run_rows._cache_size()
    pipe("red", steps=7, sampler="heun")
    list(pipe.stream("red", steps=9, preview_every=2))
    assert run_rows._cache_size() == before


# --- previews


def test_the_last_images_of_a_stream_are_the_result(pipe):
    some = list(pipe.stream(["red", "blue"], seed=1, preview_every=3, batch_size=1))
    # After 3, 6, 9 and 10 evaluations of one image, and then of the other.
    assert len(some) == 8
    result = pipe(["red", "blue"], seed=1, batch_size=1)
    assert np.array_equal(some[-1].images, result.images)
    assert some[-1].metadata(1) == result.metadata(1)
    assert (some[3].images[1] == 127).all() and np.array_equal(some[3].images[0], result.images[0])
    # The first estimate is the mean of all possible images.
    early = [np.abs(p.images[0].astype(int) - result.images[0]).mean() for p in some[:4]]
    assert early == sorted(early, reverse=True) and early[3] == 0


def test_a_cascade_streams_small_images_then_large_ones():
    pipe = exact_pipeline(upsampler=exact_pipeline("superres", size=16))
    shapes = [
        p.images.shape[1] for p in pipe.stream("red", preview_every=5, upsampler={"steps": 4})
    ]
    assert shapes == [8, 8, 16]
    made = pipe("red", upsampler={"steps": 4, "sampler": "ddim"}).metadata(0)
    assert made["upsampler"]["steps"] == 4 and made["upsampler"]["sampler"] == "ddim"
    assert made["steps"] == 10


def test_a_preview_is_written_while_images_are_generated(pipe, tmp_path):
    seen = []

    def preview(images):
        with Image.open(images.save_preview(tmp_path)) as image:
            seen.append(np.array(image))

    result = pipe(["red", "blue"], preview=preview, batch_size=2)
    assert len(seen) == 2 and not np.array_equal(*seen)
    assert np.array_equal(seen[-1], np.asarray(result.grid()))
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    # The preview does not count among the images of the run.
    result.save(tmp_path)
    assert (tmp_path / "00000_red.png").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(glide.GlideError, match="cannot write"):
        result.save_preview(tmp_path / "file")
