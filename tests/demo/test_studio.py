"""The machine behind the page: previews, stopping, one run at a time, what compiles."""

import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.demo.actions import Controls, edit, generate, interpolation
from glide_jax.demo.studio import Studio
from glide_jax.diffusion.sampling import run_rows
from glide_jax.pipeline.options import SampleModelOptions
from tests.support.commands import TINY, make_weights

CONTROLS = Controls(
    prompt="red", num=1, seed=0, steps=4, sampler="dpm++2m", guidance_scale=3.0,
    negative_prompt="", clip_guidance_scale=0.0, autoguidance_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), replace(TINY, variant="inpaint"))


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory):
    """A studio that has compiled the usual programs."""
    out = tmp_path_factory.mktemp("out")
    found = Studio(glide.load(weights), SampleModelOptions(weights=str(weights)), out)
    found.warm()
    assert found.ready.is_set()
    return found


@pytest.fixture
def compiled():
    """The programs that are compiled during a test."""
    found, jitted = [], "/jax/core/compile/backend_compile_duration"

    def listen(name: str, *_, **__) -> None:
        if name == jitted:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def run(studio, call):
    *_, last = studio.run(call)
    assert last.stage == "done"
    return last


def call(studio, **changed):
    controls = replace(CONTROLS, **changed)
    return generate(controls, studio.pipe.settings, **studio.more(controls.num))


def test_a_run_reports_its_steps_and_saves_its_result(studio):
    updates = list(studio.run(call(studio, seed=5)))
    assert {update.stage for update in updates[:-1]} <= {"running", "compiling"}
    done = updates[-1]
    assert (done.stage, done.step) == ("done", 4)
    (file,) = done.files
    direct = studio.pipe("red", seed=5, progress=False)
    assert np.array_equal(done.images.images, direct.images)
    assert np.array_equal(np.asarray(Image.open(file)), direct.images[0])


def test_no_slider_compiles(studio, compiled):
    settings = studio.pipe.settings
    image = str(studio.out / "image.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    mask = str(studio.out / "mask.png")
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    Image.fromarray(half).save(mask)
    run(studio, call(studio, num=2))
    run(studio, edit(CONTROLS, settings, "Img2img", image, None, 0.5))
    run(studio, edit(CONTROLS, settings, "Img2img", image, mask, 0.5))
    run(studio, call(studio, steps=12, low=0.5, high=3))
    compiled.clear()
    for changed in (
        {"seed": 7}, {"seed": 2**32 - 1}, {"guidance_scale": 1.1}, {"guidance_scale": 9.5},
        {"guidance_scale": 1}, {"sampler": "ddpm"}, {"sampler": "sa"},
        {"negative_prompt": "blue"}, {"prompt": "a green one"},
        {"steps": 12, "low": 0.3, "high": 8},
    ):  # fmt: skip
        run(studio, call(studio, **changed))
        assert not compiled, changed
    run(studio, edit(replace(CONTROLS, guidance_scale=5), settings, "Fill", image, mask, 0.6))
    assert not compiled
    # Other numbers of images and of steps compile keys and slices of a table, in milliseconds, and
    # no network.
    programs = run_rows._cache_size()
    for changed in ({"num": 3}, {"num": 5}, {"steps": 9}, {"steps": 30}, {"sampler": "heun"}):
        run(studio, call(studio, **changed))
    for amount in (0.25, 0.9):
        run(studio, edit(CONTROLS, settings, "Img2img", image, None, amount))
        run(studio, edit(CONTROLS, settings, "Img2img", image, mask, amount))
    assert run_rows._cache_size() == programs


def test_the_programs_that_are_prepared_are_those_of_the_page(studio):
    """The first image, the first filled mask, and scale 1 find their program compiled."""
    names = ("image", "mask")
    shapes = ((16, 16, 3), (16, 16))
    given = {n: np.full(s, 255, np.uint8) for n, s in zip(names, shapes, strict=True)}
    given["mask"][:8] = 0
    size = run_rows._cache_size()
    run(studio, call(studio, seed=3))
    run(studio, call(studio, guidance_scale=1))
    run(studio, interpolation(replace(CONTROLS, num=3), studio.pipe.settings, "blue", batch_size=1))
    studio.pipe("red", **given, preview_every=1, progress=True)
    assert run_rows._cache_size() == size


def test_a_run_is_stopped_between_two_steps(studio):
    studio.allow("visitor")
    seen = []
    for update in studio.run(call(studio, steps=1000), "visitor"):
        seen.append(update)
        if update.stage == "running":
            studio.stop("visitor")
    last = seen[-1]
    assert last.stage == "stopped" and not last.files and 0 < last.step < 900
    # The next run of the same visitor goes on to its end.
    studio.allow("visitor")
    assert list(studio.run(call(studio), "visitor"))[-1].stage == "done"


def test_a_run_that_was_stopped_while_it_waited_does_nothing(studio):
    studio.allow("visitor")
    studio.stop("visitor")
    (last,) = studio.run(call(studio), "visitor")
    assert last.stage == "stopped" and last.images is None


def test_a_run_whose_reader_leaves_ends(studio):
    before = threading.active_count()
    reports = studio.run(call(studio, steps=1000), "gone")
    assert next(reports).stage in ("running", "compiling")
    reports.close()
    assert threading.active_count() == before
    # The machine is free.
    run(studio, call(studio))


def test_one_run_at_a_time(studio):
    first = studio.run(call(studio, steps=50))
    next(first)
    second = threading.Thread(target=lambda: run(studio, call(studio)))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert list(first)[-1].stage == "done"
    second.join(60)
    assert not second.is_alive()


def test_errors_of_the_library_arrive_as_they_are(studio):
    with pytest.raises(glide.UsageError, match="unknown sampler 'nope'"):
        list(studio.run(call(studio, sampler="nope")))
    with pytest.raises(glide.UsageError, match="seed must be between 0 and"):
        list(studio.run(call(studio, seed=2**32)))


def test_one_image_at_a_time_on_a_cpu(studio):
    assert studio.more(1) == {}
    if jax.default_backend() == "cpu":
        assert studio.more(4) == {"batch_size": 1}
    model = SampleModelOptions(batch_size=8, upsampler_steps="4")
    other = replace(studio, model=model)
    assert other.more(1) == {"batch_size": 8, "upsampler": {"steps": "4"}}


def test_a_closed_studio_stops_what_runs(weights, tmp_path):
    studio = Studio(glide.load(weights), SampleModelOptions(), tmp_path)
    studio.ready.set()
    reports = studio.run(call(studio, steps=1000), "visitor")
    assert next(reports).stage in ("running", "compiling")
    closing = threading.Thread(target=studio.close)
    closing.start()
    assert list(reports)[-1].stage == "stopped"
    closing.join(20)
    assert not closing.is_alive()
    # Nothing is prepared any more.
    studio.warm()
