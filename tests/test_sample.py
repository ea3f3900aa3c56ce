"""sample.py and the pipeline: files, metadata, sameness, recompilation, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

import glide_jax as glide
from glide_jax.diffusion.sampling import run_rows
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
        (("--sampler", "dpm++2n"), "did you mean 'dpm++2m'"),
        (("--steps", "0"), "at least one step"),
        (("--steps", "2000"), "at most 1000"),
        (("--steps", "ddim999"), "no whole stride"),
        (("--spacing", "even"), "choose logsnr or uniform"),
        (("--eta", "0.5"), "eta belongs to the sampler ddim"),
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
