"""sample.py and the pipeline: files, metadata, sameness, recompilation, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
import sample
from glide_jax.diffusion.sampling import run_rows
from glide_jax.options import read_options
from glide_jax.weights.store import MODEL
from tests.commands import make_weights, one_line, run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pipe(weights):
    return glide.load(weights)


def test_sample_writes_pictures_and_a_grid_that_say_how_they_were_made(weights, tmp_path):
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
    picture = Image.open(out / "00003_a-blue-one.png")
    assert picture.size == (16, 16)
    made = json.loads(picture.text["glide_jax"])
    assert made["prompt"] == "A blue one!" and made["seed"] == 7 and made["first"] == 3
    assert made["sampler"] == "ddim" and made["guidance_scale"] == 2.0


def test_metadata_make_the_picture_again_alone(pipe, tmp_path):
    four = pipe(["red", "a blue one"], num=2, seed=3, progress=False)
    made = four.metadata(2)
    again = pipe(
        made["prompt"], seed=made["seed"], first=made["first"], steps=made["steps"],
        sampler=made["sampler"], guidance_scale=made["guidance_scale"], progress=False,
    )  # fmt: skip
    difference = np.abs(again.images[0].astype(int) - four.images[2].astype(int))
    assert difference.max() <= 1  # a batch of another size may round otherwise
    assert not np.array_equal(four.images[2], four.images[3])


def test_nothing_is_overwritten(pipe, tmp_path):
    pictures = pipe("red", num=2, progress=False)
    first, second = pictures.save(tmp_path), pictures.save(tmp_path)
    assert not set(first) & set(second)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_streaming_and_compiled_draw_the_same(pipe):
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


def test_without_a_prompt_the_prompts_of_the_weights_are_drawn(weights, tmp_path):
    result = run("sample.py", "--weights", weights, "--out", tmp_path, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "00001_a-blue-one.png").is_file()


def test_the_empty_prompt_and_a_long_one_are_drawn(weights, tmp_path):
    long = "a very long caption about nothing in particular that never ends"
    result = run("sample.py", "", long, "--weights", weights, "--out", tmp_path, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert "beyond the model's reach" in result.stdout
    assert (tmp_path / "00000_empty.png").is_file()


def test_scale_seed_prompt_and_sampler_do_not_recompile(pipe):
    def draw(**settings):
        return pipe(**{"prompts": "red", "steps": 6, "progress": False} | settings)

    draw()
    before = run_rows._cache_size()
    draw(guidance_scale=5.0)
    draw(guidance_scale=2)
    draw(seed=9)
    draw(prompts="blue")
    draw(sampler="ddim")
    draw(sampler="ddim", eta=0.5)
    draw(sampler="dpm++2m", spacing="uniform")
    assert run_rows._cache_size() == before
    # The count does count: another number of rows is another program.
    draw(steps=5)
    assert run_rows._cache_size() == before + 1


def test_streaming_does_not_recompile_for_another_number_of_steps(pipe):
    pipe("red", steps=2)
    before = run_rows._cache_size()
    pipe("red", steps=5)
    assert run_rows._cache_size() == before


def test_pictures_show_themselves_in_a_notebook(pipe):
    pictures = pipe("red", num=3, progress=False)
    assert pictures._repr_png_().startswith(b"\x89PNG")
    assert [p.size for p in pictures.pil()] == [(16, 16)] * 3
    assert pictures.grid(columns=3).size == (3 * 18 + 2, 20)
    assert pictures.grid().size == (2 * 18 + 2, 2 * 18 + 2)
    rows = pipe(["red", "blue"], num=3, steps=1, progress=False).grid()
    assert rows.size == (3 * 18 + 2, 2 * 18 + 2)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--sampler", "ddmp"), "did you mean 'ddpm'"),
        (("--steps", "0"), "at least one step"),
        (("--steps", "2000"), "at most 1000"),
        (("--steps", "ddim999"), "no whole stride"),
        (("--spacing", "even"), "choose one of logsnr, uniform"),
        (("--eta", "0.5"), "eta belongs to dpm++2m-sde, sa, ddim"),
        (("--num", "0"), "at least 1"),
        (("--weights", "emoji65"), "did you mean 'emoji64'"),
        (("--dtype", "int8"), "unknown dtype"),
        (("--prompts-file", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_options_are_one_line(weights, tmp_path, arguments, says):
    out = tmp_path / "out"
    given = () if "--weights" in arguments else ("--weights", weights)
    error = one_line(run("sample.py", "red", *given, "--out", out, *arguments), 2)
    assert says in error
    assert not list(out.glob("*"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--strength", "0.5"), "strength is of an image"),
        (("--mask", "hole.png"), "a mask is of an image"),
        (("--init-image", "photo.png"), "needs a mask of the hole"),
        (("--init-image", "photo.png", "--mask", "nowhere.png"), "cannot read the mask"),
        (("--init-image", "nowhere.png", "--strength", "0.5"), "cannot read the picture"),
        (("--init-image", "photo.png", "--strength", "2"), "strength lies above 0"),
        (("--variation", "0.5"), "give --init-image"),
        (("--init-image", "photo.png", "--variation", "0.5", "--mask", "hole.png"), "no --mask"),
        (("--init-image", "photo.png", "--variation", "3"), "from 0 to 1"),
        (("blue", "--init-image", "photo.png", "--variation", "0.5"), "one prompt"),
        (("--init-caption", "blue"), "for --variation"),
        (("--between",), "two prompts, or one and --to-seed"),
        (("blue", "--between"), "at least 2"),
        (("blue", "--between", "--init-image", "photo.png"), "no --init-image"),
        (("--to-seed", "3"), "for --between"),
        (("--repaint", "2", "2"), "give a mask"),
        (("--autoguidance-scale", "2"), "load one with guide="),
        (("--clip-scale", "2"), "load one with clip="),
        (("--upsampler-steps", "2"), "there is none"),
        (("--batch-size", "0"), "at least one picture"),
        (("--devices", "99"), "cannot use 99 devices"),
        (("--guidance-span", "3", "1"), "a span needs"),
        (("red AND",), "lacks one"),
    ],
)
def test_options_that_do_not_go_together_are_said(weights, editing, arguments, says):
    named = {"photo.png": editing / "photo.png", "hole.png": editing / "hole.png"}
    arguments = [str(named.get(argument, argument)) for argument in arguments]
    with pytest.raises(glide.GlideError, match=says) as caught:
        draw("red", *arguments, "--weights", weights, "--out", editing / "none")
    assert "\n" not in str(caught.value)
    assert not list((editing / "none").glob("*"))


@pytest.fixture(scope="module")
def editing(tmp_path_factory):
    """A folder with a picture and a mask."""
    folder = tmp_path_factory.mktemp("editing")
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    hole = np.zeros((16, 16), np.uint8)
    hole[4:12, 6:10] = 255
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(hole).save(folder / "hole.png")
    return folder


def draw(*arguments):
    """`python sample.py arguments`, in this process."""
    sample.draw(read_options("", [str(argument) for argument in arguments]))


def made(folder):
    """The pictures of a folder, without their grid, and what they say of themselves."""
    files = sorted(path for path in folder.glob("*.png") if "grid" not in path.name)
    pictures = [Image.open(path) for path in files if path.name != "preview.png"]
    return [np.array(p) for p in pictures], [json.loads(p.text["glide_jax"]) for p in pictures]


def test_a_hole_is_filled_from_the_command_line(weights, editing, tmp_path):
    files = ("--init-image", editing / "photo.png", "--mask", editing / "hole.png")
    draw("red", *files, "--weights", weights, "--out", tmp_path, "--repaint", 2, 2)
    (found,), (metadata,) = made(tmp_path)
    photo, hole = (np.array(Image.open(editing / n)) for n in ("photo.png", "hole.png"))
    assert np.array_equal(found[hole == 0], photo[hole == 0])
    assert not np.array_equal(found[hole > 0], photo[hole > 0])
    assert metadata["repaint"] == [2, 2] and metadata["mask"] == str(editing / "hole.png")


def test_a_picture_is_redrawn_from_the_command_line(weights, editing, tmp_path):
    image = ("--init-image", editing / "photo.png", "--weights", weights)
    for strength, name in ((0.25, "little"), (1.0, "all")):
        draw("red", *image, "--strength", strength, "--out", tmp_path / name)
    photo = np.array(Image.open(editing / "photo.png")).astype(int)
    little, much = (np.abs(made(tmp_path / n)[0][0] - photo).mean() for n in ("little", "all"))
    assert little < much / 2
    assert made(tmp_path / "all")[1][0]["strength"] == 1.0


def test_variations_from_the_command_line(weights, editing, tmp_path):
    image = ("--init-image", editing / "photo.png", "--weights", weights, "--out", tmp_path)
    draw(*image, "--variation", 0.4, "--num", 2, "--steps", 3, "--init-caption", "red")
    images, metadata = made(tmp_path)
    assert not np.array_equal(*images)
    assert metadata[1]["variation"] == 0.4 and metadata[1]["caption"] == "red"
    # Unconditional, rather than what the weights show best.
    assert metadata[1]["prompt"] == "" and metadata[1]["first"] == 1


def test_the_way_between_from_the_command_line(weights, tmp_path):
    draw(
        "red", "blue", "--between", "--num", 3, "--seed", 1, "--to-seed", 2, "--weights", weights,
        "--out", tmp_path, "--preview", "--batch-size", 2,
    )  # fmt: skip
    _, metadata = made(tmp_path)
    assert [m["between"]["share"] for m in metadata] == [0, 0.5, 1]
    assert metadata[0]["between"]["seeds"] == [1, 2]
    assert (tmp_path / "preview.png").is_file() and (tmp_path / "00000-00002_grid.png").is_file()


def test_every_flag_reaches_the_picture(weights, tmp_path):
    draw(
        "red AND blue :0.5", "--weights", weights, "--guide", weights, "--out", tmp_path,
        "--steps", 6, "--sampler", "sa", "--spacing", "rho", "--eta", 0.5, "--temperature", 0.9,
        "--restart", 0.3, 3, 1, "--guidance-scale", 2, "--guidance-span", 0.2, 9,
        "--guidance-rescale", 0.5, "--negative-prompt", "green", "--autoguidance-scale", 1.5,
        "--threshold", 0.99, "--guidance-method", "cfg",
    )  # fmt: skip
    _, (metadata,) = made(tmp_path)
    wanted = {
        "prompt": "red AND blue :0.5", "steps": 6, "sampler": "sa", "spacing": "rho", "eta": 0.5,
        "temperature": 0.9, "restart": [0.3, 3.0, 1], "guidance_scale": 2.0,
        "guidance_span": [0.2, 9.0], "guidance_rescale": 0.5, "negative_prompt": "green",
        "autoguidance_scale": 1.5, "threshold": 0.99, "guidance_method": "cfg",
    }  # fmt: skip
    assert {name: metadata[name] for name in wanted} == wanted


def test_an_unknown_option_is_named():
    result = run("sample.py", "--guidance-scal", "3")
    assert result.returncode == 2
    assert "--guidance-scale" in result.stderr


def test_missing_truncated_and_foreign_weights_are_one_line(tmp_path):
    def draw(folder):
        return one_line(run("sample.py", "red", "--weights", folder, "--out", tmp_path / "o"), 1)

    (tmp_path / "empty").mkdir()
    assert "config.json" in draw(tmp_path / "empty")

    truncated = make_weights(tmp_path / "truncated")
    whole = (truncated / MODEL).read_bytes()
    (truncated / MODEL).write_bytes(whole[: len(whole) // 2])
    assert MODEL in draw(truncated)

    foreign = make_weights(tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config["model"]["xf_layers"] = 2
    (foreign / "config.json").write_text(json.dumps(config))
    assert "text/block_1" in draw(foreign)
    assert not list((tmp_path / "o").glob("*.png"))


def test_an_unwritable_folder_is_one_line_before_anything_is_drawn(weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    error = one_line(run("sample.py", "red", "--weights", weights, "--out", out), 1)
    assert "cannot write" in error
    assert (tmp_path / "file").read_text() == "in the way"
