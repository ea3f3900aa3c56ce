"""The examples run, and show what they say."""

import importlib.util

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.training.recipes import load_recipe
from glide_jax.weights import read_torch_file, to_released, write_torch_file
from glide_jax.weights.registry import load_model
from tests.support.commands import RECIPE, ROOT, make_images, make_weights, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_its_command(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name}" in text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny")


def test_the_plain_ddim_loop_equals_the_pipeline(weights):
    difference, levels = example("ddim_loop").main("red", weights, steps=10)
    assert difference < 1e-5 and levels <= 1


def test_more_of_ones_own_guidance_is_more_symmetric(weights, tmp_path):
    found = example("own_guidance").main("red", tmp_path, weights)
    assert found[0] > 1.5 * found[1] > 3 * found[2]
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_fine_tuning_on_a_folder_changes_the_weights(tmp_path):
    images = make_images(tmp_path / "images")
    weights = make_weights(tmp_path / "weights", load_recipe(RECIPE).model)
    out = tmp_path / "run"
    example("finetune_folder").finetune(str(images), str(out), 2, str(weights), str(RECIPE))
    before, after = load_model(weights).params, glide.load(out).model.params
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert any(jax.tree.leaves(changed))


def test_released_style_files_are_sampled(tmp_path):
    for name in ("emoji64", "emoji_upsample256"):
        write_torch_file(tmp_path / f"{name}.pt", to_released(load_model(name).params))
    assert read_torch_file(tmp_path / "emoji64.pt")["token_embedding.weight"].shape[0] == 50257
    settings = {"steps": 1, "upsampler": {"steps": 1}, "progress": False}
    paths = [str(tmp_path / f"{name}.pt") for name in ("emoji64", "emoji_upsample256")]
    (file,) = example("released_files").main("a corgi", *paths, out=tmp_path / "out", **settings)
    assert file.is_file()


def test_two_processes_train_one_run(tmp_path):
    images = make_images(tmp_path / "images")
    result = run(
        "examples/two_processes.py", "--config", RECIPE, "--data.source", images,
        "--out", tmp_path / "run", "--steps", 2, "--sample-every", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 of 2 steps done") == 1
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
