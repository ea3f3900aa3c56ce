"""Training from the command line: `train.py` trains, is killed, resumes, refuses bad input."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import train as script
from glide_jax.data.data_config import DataConfig
from glide_jax.training import clock
from glide_jax.training.export import export
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import load_run, restore_run
from glide_jax.weights import count_params
from glide_jax.weights.registry import load_model
from tests.support.commands import RECIPE, ROOT, environment, make_images, one_line, run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "data")


def arguments(images, out, steps, *more):
    return [
        "train.py", "--config", RECIPE, "--data.source", images, "--out", out,
        "--steps", steps, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(images, tmp_path_factory):
    """A run of 60 steps without interruption."""
    out = tmp_path_factory.mktemp("run") / "whole"
    # The grids of samples use no CLIP guidance, whatever the recipe recommends.
    more = (
        "--save-every",
        10,
        "--sample-every",
        30,
        "--log-every",
        10,
        "--sample-clip-guidance-scale",
        4,
    )
    result = run(*arguments(images, out, 60, *more))
    assert result.returncode == 0, result.stderr
    return out


def states_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_run_leaves_checkpoints_logs_samples_and_its_recipe(whole_run):
    config, state = restore_run(whole_run)
    assert int(state.step) == 60
    assert config.name == "tiny" and config.steps == 60
    kept = sorted(int(p.name) for p in (whole_run / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [40, 50, 60]
    assert sorted(p.name for p in (whole_run / "samples").iterdir()) == [
        "step_000030.png",
        "step_000060.png",
    ]
    assert any((whole_run / "logs").iterdir())


def test_training_changes_weights_and_ema(whole_run):
    _, state = restore_run(whole_run)
    head = state.params["unet"]["head"]["kernel"]
    assert np.abs(head).max() > 0
    assert not np.array_equal(head, state.ema["unet"]["head"]["kernel"])


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(whole_run, images, tmp_path):
    out = tmp_path / "killed"
    command = arguments(images, out, 60, "--save-every", 10, "--sample-every", 0)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / "20").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, state = restore_run(out)
    assert 20 <= int(state.step) < 60

    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert f"step {int(state.step)} of 60" in result.stdout
    assert states_equal(restore_run(out)[1], restore_run(whole_run)[1])


def test_two_devices_make_the_same_first_steps_as_one(images, tmp_path):
    """Without dropout: its random numbers depend on the device, all others on the record."""
    states = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        more = ("--model.dropout", 0, "--sample-every", 0)
        result = run(*arguments(images, out, 5, *more), devices=devices)
        assert result.returncode == 0, result.stderr
        states.append(restore_run(out)[1])
    for a, b in zip(*(jax.tree.leaves(s.ema) for s in states), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not states_equal(states[0].ema, states[0].opt_state[1][0].mu)


def test_a_run_is_exported_with_the_token_rows_that_it_saw(whole_run, tmp_path):
    count = export(whole_run, tmp_path / "weights")
    exported, run_model = load_model(tmp_path / "weights"), load_run(whole_run)
    assert exported.defaults == run_model.defaults and exported.defaults["clip_guidance_scale"] == 4
    table = exported.params["text"]["token_embedding"]
    assert table.shape == (50257, 8)
    # "red", "green", "blue", and one row for all others (padding has an embedding of its own).
    assert len(np.unique(table, axis=0)) == 4
    # Four rows of 50,257, and the ids of three of them.
    assert count == count_params(run_model.config) - (50257 - 4) * 8 + 3
    ours = run_model.params["unet"]["head"]["kernel"]
    np.testing.assert_allclose(exported.params["unet"]["head"]["kernel"], ours, rtol=1e-2)


def test_a_run_is_sampled_from(whole_run, tmp_path):
    result = run("sample.py", "red", "--weights", whole_run, "--out", tmp_path, "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in tmp_path.glob("*.png")] == ["00000_red.png"]


def test_a_run_is_not_resumed_with_another_model(whole_run, images):
    error = one_line(run(*arguments(images, whole_run, 61, "--model.xf-width", 16)), 2)
    assert "a run of another model" in error and "--out" in error


def test_a_recipe_without_data_names_the_option_for_it(tmp_path):
    error = one_line(run("train.py", "--config", "cfg64", "--out", tmp_path / "run"), 2)
    assert "coco_captions" in error and "--data.source" in error
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_names_those_that_exist():
    error = one_line(run("train.py", "--config", "configs/cfg46.py"), 2)
    assert "cfg64.py" in error and "emoji64.py" in error
    error = one_line(run("train.py", "--config", "cfg46"), 2)
    assert "did you mean 'cfg64'" in error and "emoji64" in error
    error = one_line(run("train.py"), 2)
    assert "name a recipe: python train.py --config emoji64" in error
    error = one_line(run("-m", "glide_jax", "train"), 2)
    assert "name a recipe: glide-jax train --config emoji64" in error


def test_an_unknown_field_names_the_nearest():
    result = run("train.py", "--config", RECIPE, "--optimiser.learning-rte", "1")
    assert result.returncode == 2
    assert "--optimiser.learning-rate" in result.stderr
    assert run("train.py", "--config", RECIPE, "--steps", "many").returncode == 2


def test_an_unreadable_image_is_skipped_and_named(tmp_path):
    data = make_images(tmp_path / "data")
    broken = data / "03.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (data / "bare.jfif").write_bytes(b"")
    result = run(*arguments(data, tmp_path / "run", 5, "--sample-every", 0))
    assert result.returncode == 0, result.stderr
    assert "skipped a record" in result.stderr and "03.png" in result.stderr
    start = f"{data}: left out 1 of 13: bare.jfif (no caption: 1); 1 of 12 records are broken"
    assert start in result.stderr
    (log,) = (tmp_path / "run").rglob("left_out.txt")
    assert log.read_text().splitlines() == [
        "left out: bare.jfif: no caption",
        "broken: 03.png: unreadable",
    ]


def test_a_run_can_start_from_other_weights(whole_run, images, tmp_path):
    out = tmp_path / "run"
    more = ("--init-from", whole_run, "--sample-every", 0, "--model.image-size", 8)
    result = run(*arguments(images, out, 1, *more, "--optimiser.learning-rate", 0))
    assert result.returncode == 0, result.stderr
    assert states_equal(restore_run(out)[1].params, restore_run(whole_run)[1].ema)
    error = one_line(run(*arguments(images, tmp_path / "b", 1, "--init-from", "emoji64")), 1)
    assert "cannot start this model" in error


def test_an_unwritable_folder_is_one_line(images, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = one_line(run(*arguments(images, tmp_path / "file" / "run", 5)), 1)
    assert "file" in error


def test_a_batch_that_does_not_divide_is_refused(images, tmp_path):
    result = run(*arguments(images, tmp_path / "run", 5, "--batch-size", 7), devices=2)
    assert "7 does not divide over 2 devices" in one_line(result, 2)


def test_a_time_limit_counts_steps_but_neither_samples_nor_validation(
    images, tmp_path, monkeypatch, capsys
):
    now, log_steps = [0.0], script.Logger.steps

    def slow_steps(*arguments):
        now[0] += 10
        log_steps(*arguments)

    def slow_samples(*_, **__):
        now[0] += 100
        return Image.new("RGB", (16, 16))

    class SlowValidation:
        def __init__(self, *_):
            pass

        def __call__(self, *_):
            now[0] += 1000
            return {}

    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(script.Logger, "steps", slow_steps)
    monkeypatch.setattr(script, "sample_grid", slow_samples)
    monkeypatch.setattr(script, "Validation", SlowValidation)
    out = tmp_path / "run"
    config = replace(
        load_recipe(RECIPE), data=DataConfig(source=str(images)), out=str(out), steps=50,
        sample_every=2, validate_every=3, minutes=1.0,
    )  # fmt: skip
    script.train(config)
    # The step that runs when the limit has passed is the last one, and is kept.
    assert "6 of 50 steps done" in capsys.readouterr().out
    assert int(restore_run(out)[1].step) == 6
