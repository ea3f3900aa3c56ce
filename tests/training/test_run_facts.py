"""What a run has on record: its logs, also unfinished ones, and no path of this machine."""

import pytest
from tensorboardX import SummaryWriter

from glide_jax.training.config import save_config
from glide_jax.training.recipes import load_recipe
from glide_jax.training.run_facts import events, run_facts, shown
from tests.support.commands import RECIPE


@pytest.fixture
def run(tmp_path):
    (tmp_path / "logs").mkdir()
    save_config(load_recipe(str(RECIPE)), tmp_path / "config.json")
    return tmp_path


def write(run, losses, seconds):
    """Write a log; its first loss is at the time 1000, its last `seconds` later."""
    with SummaryWriter(str(run / "logs"), filename_suffix=f".{seconds}") as writer:
        for i, (step, loss) in enumerate(losses.items()):
            wall = 4e9 + seconds * i / max(len(losses) - 1, 1)
            writer.add_scalar("train/loss", 9.0, step, walltime=wall)
            writer.add_scalar("held_out/loss", loss, step, walltime=wall)


def test_the_loss_of_the_step_that_is_pushed(run):
    write(run, {10: 0.5, 20: 0.25, 30: 0.125}, 60)
    assert run_facts(run, 20)["held-out loss"] == "0.25 (step 20, `validation`)"
    assert run_facts(run, 40)["held-out loss"] == "0.125 (step 30, `validation`)"
    assert run_facts(run, 20)["planned steps"] == "100,000"


def test_without_logs_it_says_nothing_of_them(run):
    found = run_facts(run, 20)
    assert "held-out loss" not in found and "time by the log" not in found
    assert found["began with"] == "random weights" and found["batch size"] == "8"
    assert found["optimiser"] == "adamw, learning rate 0.001, constant"


def test_an_unfinished_log_is_read_up_to_its_end(run):
    write(run, {10: 0.5, 20: 0.25}, 60)
    (file,) = (run / "logs").iterdir()
    whole = len(list(events(file)))
    file.write_bytes(file.read_bytes()[:-3])
    assert len(list(events(file))) == whole - 1
    assert run_facts(run, 40)["held-out loss"] == "0.5 (step 10, `validation`)"
    file.write_bytes(b"\xff" * 100)
    assert "held-out loss" not in run_facts(run, 40)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("/home/someone/images", "images"),
        ("~/images/", "images"),
        ("../images", "images"),
        ("gs://bucket/shards/{0..9}.tar", "gs://bucket/shards/{0..9}.tar"),
        ("coco_captions/2014", "coco_captions/2014"),
        ("hf://user/name@v1", "hf://user/name@v1"),
        ("emoji64", "emoji64"),
    ],
)
def test_of_a_local_path_only_the_last_part_is_shown(source, text):
    assert shown(source) == text
