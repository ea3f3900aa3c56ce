"""sample.py and the pipeline: files, metadata, reproducibility, recompilation, bad input."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import glide_jax as glide
import sample
from glide_jax.diffusion.sampling import run_rows
from glide_jax.pipeline.options import read_options
from glide_jax.weights.store import MODEL
from tests.support.commands import make_weights, one_line, run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompts-file", "nowhere.txt"],
            "cannot read the prompts in nowhere.txt: No such file or directory; check the path",
        ),
        (["a cat AND"], "AND and NOT stand between two captions: 'a cat AND' lacks one"),
    ],
)
def test_a_wrong_prompt_ends_the_command_before_the_weights_are_loaded(
    words, message, tmp_path, monkeypatch
):
    def load(**_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(glide, "load", load)
    with pytest.raises(glide.UsageError) as caught:
        sample.generate(read_options("", [*words, "--out", str(tmp_path)]))
    assert str(caught.value) == message


def test_sample_writes_images_and_a_grid_with_metadata(weights, tmp_path):
    out = tmp_path / "out"
    result = run(
        "sample.py", "red", "A blue one!", "--weights", weights, "--num", 2, "--seed", 7,
        "--out", out, "--sampler", "ddim", "--steps", 3, "--guidance-scale", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        "00000-00003_grid.png",
        "00000_red.png",
        "00001_red.png",
        "00002_a-blue-one.png",
        "00003_a-blue-one.png",
    ]
    for name in names:
        assert str(out / name) in result.stdout
    assert "ddim, 3 network evaluations, guidance scale 2" in result.stdout
    image = Image.open(out / "00003_a-blue-one.png")
    assert image.size == (16, 16)
    made = json.loads(image.text["glide_jax"])
    assert (
        made["prompt"] == "A blue one!"
        and made["seed"] == 7
        and made["index"] == 3
        and made["evaluations"] == 3
    )
    assert made["sampler"] == "ddim" and made["guidance_scale"] == 2.0


def test_metadata_reproduce_an_image_alone(pipe, tmp_path):
    four = pipe(["red", "a blue one"], num=2, seed=3, progress=False)
    made = four.metadata(2)
    again = pipe(
        made["prompt"], seed=made["seed"], first_index=made["index"], steps=made["steps"],
        sampler=made["sampler"], guidance_scale=made["guidance_scale"], progress=False,
    )  # fmt: skip
    difference = np.abs(again.images[0].astype(int) - four.images[2].astype(int))
    assert difference.max() <= 1  # another batch size may round differently
    assert not np.array_equal(four.images[2], four.images[3])


def test_nothing_is_overwritten(pipe, tmp_path):
    images = pipe("red", num=2, progress=False)
    first, second = images.save(tmp_path), images.save(tmp_path)
    assert not set(first) & set(second)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_streaming_and_compiled_runs_agree(pipe):
    a, b = (pipe("red", seed=1, progress=progress).images for progress in (True, False))
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_prompts_come_from_a_file_too(weights, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\n\n  green \n", encoding="utf-8")
    result = run(
        "sample.py", "--prompts-file", tmp_path / "prompts.txt", "--weights", weights,
        "--out", tmp_path / "out", "--steps", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "00001_green.png").is_file()


def test_without_a_prompt_the_prompts_of_the_weights_are_used(weights, tmp_path):
    result = run("sample.py", "--weights", weights, "--out", tmp_path, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "00001_a-blue-one.png").is_file()


def test_the_empty_prompt_and_a_long_one_work(weights, tmp_path):
    long = "a very long caption about nothing in particular that never ends"
    result = run("sample.py", "", long, "--weights", weights, "--out", tmp_path, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert "does not read the last" in result.stdout
    assert (tmp_path / "00000_empty.png").is_file()


def test_scale_seed_prompt_and_sampler_do_not_recompile(pipe):
    def generate(**settings):
        return pipe(**{"prompts": "red", "steps": 6, "progress": False} | settings)

    generate()
    before = run_rows._cache_size()
    generate(guidance_scale=5.0)
    generate(guidance_scale=2)
    generate(seed=9)
    generate(prompts="blue")
    generate(sampler="ddim")
    generate(sampler="ddim", eta=0.5)
    generate(sampler="dpm++2m", spacing="uniform")
    generate(steps=5)
    assert run_rows._cache_size() == before
    # The count does count: seven images at a time are another program.
    generate(num=7, batch_size=7)
    assert run_rows._cache_size() == before + 1


def test_streaming_does_not_recompile_for_another_number_of_steps(pipe):
    pipe("red", steps=2)
    before = run_rows._cache_size()
    pipe("red", steps=5)
    assert run_rows._cache_size() == before


def test_images_display_themselves_in_a_notebook(pipe):
    images = pipe("red", num=3, progress=False)
    assert images._repr_png_().startswith(b"\x89PNG")
    assert [p.size for p in images.pil()] == [(16, 16)] * 3
    assert images.grid(columns=3).size == (3 * 18 + 2, 20)
    assert images.grid().size == (2 * 18 + 2, 2 * 18 + 2)
    rows = pipe(["red", "blue"], num=3, steps=1, progress=False).grid()
    assert rows.size == (3 * 18 + 2, 2 * 18 + 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--sampler", "ddmp"), "did you mean 'ddpm'"),
        (("--steps", "0"), "at least one step"),
        (("--steps", "2000"), "the process has 1000 timesteps"),
        (("--steps", "ddim999"), "ddim999 does not exist for 1000 timesteps"),
        (("--spacing", "even"), "choose one of logsnr, uniform"),
        (("--eta", "0.5"), "eta is for dpm++2m-sde, sa, ddim"),
        (("--num", "0"), "at least 1"),
        (("--weights", "emoji65"), "did you mean 'emoji64'"),
        (("--dtype", "int8"), "unknown dtype"),
        (("--prompts-file", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_options_are_one_line(weights, tmp_path, arguments, message):
    out = tmp_path / "out"
    named = () if "--weights" in arguments else ("--weights", weights)
    error = one_line(run("sample.py", "red", *named, "--out", out, *arguments), 2)
    assert message in error
    assert not list(out.glob("*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--strength", "0.5"), "strength is for editing an image"),
        (("--mask", "mask.png"), "a mask belongs to an image"),
        (("--image", "photo.png"), "needs a mask of the region"),
        (("--image", "photo.png", "--mask", "nowhere.png"), "cannot read the mask"),
        (("--image", "nowhere.png", "--strength", "0.5"), "cannot read the image"),
        (("--image", "photo.png", "--strength", "2"), "strength must be above 0"),
        (("--variation", "0.5"), "give --image"),
        (("--image", "photo.png", "--variation", "0.5", "--mask", "mask.png"), "no --mask"),
        (("--image", "photo.png", "--variation", "3"), "between 0 and 1"),
        (("blue", "--image", "photo.png", "--variation", "0.5"), "one prompt"),
        (("--image-caption", "blue"), "for --variation"),
        (("--image", "photo.png", "--invert-mask"), "are for --mask"),
        (("--fit", "pad"), "for --image"),
        (("--interpolate",), "two prompts, or one and --to-seed"),
        (("blue", "--interpolate"), "at least 2"),
        *(
            (
                ("blue", "--interpolate", "--num", "4", option, file),
                "^--interpolate takes prompts: it has no --image or --mask$",
            )
            for option, file in (("--image", "photo.png"), ("--mask", "mask.png"))
        ),
        (("--to-seed", "3"), "for --interpolate"),
        (("--repaint", "2", "2"), "give a mask"),
        (("--autoguidance-scale", "2"), "load one as weak_model"),
        (("--clip-guidance-scale", "2"), "load one as clip_model"),
        (("--upsampler-steps", "2"), "there is none"),
        (("--batch-size", "0"), "at least one image"),
        (("--devices", "99"), "cannot use 99 devices"),
        (("--guidance-interval", "3", "1"), "an interval needs"),
        (("red AND",), "lacks one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(weights, editing, arguments, message):
    named = {"photo.png": editing / "photo.png", "mask.png": editing / "mask.png"}
    arguments = [str(named.get(argument, argument)) for argument in arguments]
    with pytest.raises(glide.GlideError, match=message) as caught:
        generate("red", *arguments, "--weights", weights, "--out", editing / "none")
    assert "\n" not in str(caught.value)
    assert not list((editing / "none").glob("*"))


@pytest.fixture(scope="module")
def editing(tmp_path_factory):
    """A folder with an image and a mask."""
    folder = tmp_path_factory.mktemp("editing")
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:10] = 255
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def generate(*arguments):
    """`python sample.py arguments`, in this process."""
    sample.generate(read_options("", [str(argument) for argument in arguments]))


def made(folder):
    """The images of a folder, without their grid, and their metadata."""
    files = sorted(path for path in folder.glob("*.png") if "grid" not in path.name)
    images = [Image.open(path) for path in files if path.name != "preview.png"]
    return [np.array(p) for p in images], [json.loads(p.text["glide_jax"]) for p in images]


def test_inpainting_from_the_command_line(weights, editing, tmp_path, capsys):
    files = ("--image", editing / "photo.png", "--mask", editing / "mask.png")
    generate("red", *files, "--weights", weights, "--out", tmp_path, "--repaint", 2, 2)
    said = f"note: the mask {editing / 'mask.png'} regenerates 12.5% of the image\n"
    error = capsys.readouterr().err
    assert said in error and error.count("note:") == 1
    (found,), (metadata,) = made(tmp_path)
    photo, mask = (np.array(Image.open(editing / n)) for n in ("photo.png", "mask.png"))
    assert np.array_equal(found[mask == 0], photo[mask == 0])
    assert not np.array_equal(found[mask > 0], photo[mask > 0])
    assert metadata["repaint"] == [2, 2] and metadata["mask"] == str(editing / "mask.png")


def test_img2img_from_the_command_line(weights, editing, tmp_path):
    image = ("--image", editing / "photo.png", "--weights", weights)
    for strength, name in ((0.25, "little"), (1.0, "all")):
        generate("red", *image, "--strength", strength, "--out", tmp_path / name)
    photo = np.array(Image.open(editing / "photo.png")).astype(int)
    little, much = (np.abs(made(tmp_path / n)[0][0] - photo).mean() for n in ("little", "all"))
    assert little < much / 2
    assert made(tmp_path / "all")[1][0]["strength"] == 1.0


def test_variations_from_the_command_line(weights, editing, tmp_path):
    image = ("--image", editing / "photo.png", "--weights", weights, "--out", tmp_path)
    generate(*image, "--variation", 0.4, "--num", 2, "--steps", 3, "--image-caption", "red")
    images, metadata = made(tmp_path)
    assert not np.array_equal(*images)
    assert metadata[1]["variation"] == 0.4 and metadata[1]["image_caption"] == "red"
    # Unconditional, not the prompts of the weights.
    assert metadata[1]["prompt"] == "" and metadata[1]["index"] == 1


def test_interpolation_from_the_command_line(weights, tmp_path):
    generate(
        "red", "blue", "--interpolate", "--num", 3, "--seed", 1, "--to-seed", 2,
        "--weights", weights, "--out", tmp_path, "--preview", "--batch-size", 2,
    )  # fmt: skip
    _, metadata = made(tmp_path)
    assert [m["interpolation"]["share"] for m in metadata] == [0, 0.5, 1]
    assert metadata[0]["interpolation"]["seeds"] == [1, 2]
    assert (tmp_path / "preview.png").is_file() and (tmp_path / "00000-00002_grid.png").is_file()


def test_every_flag_reaches_the_image(weights, tmp_path):
    generate(
        "red AND blue :0.5", "--weights", weights, "--weak-model", weights, "--out", tmp_path,
        "--steps", 6, "--sampler", "sa", "--spacing", "karras", "--eta", 0.5, "--temperature", 0.9,
        "--restart", 0.3, 3, 1, "--guidance-scale", 2, "--guidance-interval", 0.2, 9,
        "--guidance-rescale", 0.5, "--negative-prompt", "green", "--autoguidance-scale", 1.5,
        "--dynamic-threshold", 0.99, "--guidance-method", "cfg",
    )  # fmt: skip
    _, (metadata,) = made(tmp_path)
    wanted = {
        "prompt": "red AND blue :0.5", "steps": 6, "sampler": "sa", "spacing": "karras", "eta": 0.5,
        "temperature": 0.9, "restart": [0.3, 3.0, 1], "guidance_scale": 2.0,
        "guidance_interval": [0.2, 9.0], "guidance_rescale": 0.5, "negative_prompt": "green",
        "autoguidance_scale": 1.5, "dynamic_threshold": 0.99, "guidance_method": "cfg",
    }  # fmt: skip
    assert {name: metadata[name] for name in wanted} == wanted


def test_an_unknown_option_is_named():
    result = run("sample.py", "--guidance-scal", "3")
    assert result.returncode == 2
    assert "--guidance-scale" in result.stderr


def test_missing_truncated_and_foreign_weights_are_one_line(tmp_path):
    def generate(folder):
        return one_line(run("sample.py", "red", "--weights", folder, "--out", tmp_path / "o"), 1)

    (tmp_path / "empty").mkdir()
    assert "config.json" in generate(tmp_path / "empty")

    truncated = make_weights(tmp_path / "truncated")
    whole = (truncated / MODEL).read_bytes()
    (truncated / MODEL).write_bytes(whole[: len(whole) // 2])
    assert MODEL in generate(truncated)

    foreign = make_weights(tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["model"]["xf_layers"] = 2
    (foreign / "config.json").write_text(json.dumps(config))
    assert "config.json describes another network than when" in generate(foreign)
    arrays = load_file(foreign / MODEL)  # as another program writes them: without a checksum
    save_file(arrays, foreign / MODEL)
    assert "text/block_1" in generate(foreign)
    assert not list((tmp_path / "o").glob("*.png"))


def test_an_unwritable_folder_is_one_line_before_anything_is_generated(weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    error = one_line(run("sample.py", "red", "--weights", weights, "--out", out), 1)
    assert "cannot write" in error
    assert (tmp_path / "file").read_text() == "in the way"
