"""What a resumed run says, and that one folder is one run at a time."""

import errno
import fcntl
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from glide_jax.data.data_config import DataConfig
from glide_jax.errors import GlideError, UsageError
from glide_jax.training import locking
from glide_jax.training.config import CLIPTrainConfig, TrainConfig, write_config
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.locking import lock_run
from glide_jax.training.optimiser_config import OptimiserConfig
from glide_jax.training.recipes import load_recipe
from glide_jax.training.resuming import changes, print_changes
from tests.support.commands import RECIPE, ROOT, environment, make_images, one_line, run


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    found = load_recipe(RECIPE)
    assert isinstance(found, TrainConfig)
    return replace(found, steps=100, out=str(tmp_path / "run"))


def of(config, **values):
    return replace(config, optimiser=replace(config.optimiser, **values))


def test_nothing_is_said_where_nothing_changed(config):
    for decay in ("constant", "cosine", "wsd"):
        same = of(config, lr_decay=decay)
        assert changes(same, same, 40) == []
    # A constant rate goes on, however long.
    assert changes(config, replace(config, steps=200), 100) == []


@pytest.mark.parametrize(
    ("decay", "steps", "done", "note"),
    [
        ("cosine", 200, 100,
         "the learning rate of step 101 is 0.00052, it was planned as 0 (cosine 0.001 over 200 "
         "steps, warm-up 5, before cosine 0.001 over 100 steps, warm-up 5)"),
        ("wsd", 200, 50,
         "the learning rate of step 62 is 0.001, it was planned as 0.000975 (wsd 0.001 over 200 "
         "steps, warm-up 5, before wsd 0.001 over 100 steps, warm-up 5)"),
        ("cosine", 60, 50,
         "the learning rate of step 51 is 7.94e-05, it was planned as 0.000541 (cosine 0.001 over "
         "60 steps, warm-up 5, before cosine 0.001 over 100 steps, warm-up 5)"),
    ],
)  # fmt: skip
def test_a_schedule_of_another_length_says_what_becomes_of_the_rate(
    decay, steps, done, note, config
):
    before = of(config, lr_decay=decay)
    assert changes(before, replace(before, steps=steps), done) == [note]


def test_another_rate_and_another_time_limit_are_said(config):
    (note,) = changes(config, of(config, learning_rate=2e-3), 40)
    assert note.startswith("the learning rate of step 41 is 0.002, it was planned as 0.001 (")
    timed = replace(of(config, lr_decay="wsd"), minutes=10.0)
    (note,) = changes(timed, replace(timed, minutes=20.0), 40, seconds=540.0)
    assert note.startswith("the learning rate of step 41 is 0.001, it was planned as 0.00025 (")
    assert "over 20 minutes" in note and "over 10 minutes" in note


def test_seed_first_weights_and_too_few_steps_are_said_in_the_first_process(config, capsys):
    write_config(config)
    print_changes(replace(config, seed=7, init_from="emoji64", steps=30), 40)
    assert capsys.readouterr().err.splitlines() == [
        "note: step 40 is done and --steps is 30: there is nothing to train",
        "note: the seed is 7, it was 0: the order of the data and the noise are others from step "
        "40 on",
        "note: the run resumes from step 40: --init-from emoji64 has no effect (it began with "
        "random weights); to start anew, choose another --out",
    ]


def hold(folder, ready):
    with lock_run(folder):
        ready.set()
        time.sleep(60)


def test_a_second_run_says_so_and_the_lock_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(GlideError) as error, lock_run(tmp_path / "run"):
            pass
        assert str(error.value).startswith(f"another process ({process.pid} on ")
        assert str(error.value).endswith(
            f") trains in {tmp_path / 'run'}: wait until it ends, or choose another --out"
        )
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    for _ in range(2):
        with lock_run(tmp_path / "run"):
            pass
    with lock_run(tmp_path / "new"):
        assert (tmp_path / "new" / "lock").is_file()
    # It was there before, or nothing was written.
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    with lock_run(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"note: {tmp_path} has no file locks: start no second run there\n"
    )


def test_train_py_refuses_a_folder_in_use(tmp_path):
    images = make_images(tmp_path / "images")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(
            "train.py", "--config", RECIPE, "--data.source", images, "--out", tmp_path / "run",
        )  # fmt: skip
    assert f"another process trains in {tmp_path / 'run'}: wait" in one_line(result, 1)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


def test_an_interrupt_while_workers_start_ends_in_one_line_and_leaves_nothing(tmp_path):
    images, out = make_images(tmp_path / "images"), tmp_path / "run"
    shared = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [
            sys.executable, "train.py", "--config", RECIPE, "--data.source", images, "--out", out,
            "--steps", "100000", "--data.workers", "2",
        ],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "logs").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # the workers are starting
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, error = process.communicate(timeout=120)
    lines = [line for part in error.splitlines() for line in part.split("\r")]
    assert [line for line in lines if line and "step" not in line.split(":")[-1]] == []
    assert lines.count("stopping after this step") == 1
    assert process.returncode == 0 and "of 100,000 steps done" in output
    assert [int(p.name) for p in (out / "checkpoints").iterdir()] >= [1]
    # Other tests share this folder, for a while.
    left, deadline = set(os.listdir("/dev/shm")) - shared, time.monotonic() + 60
    while left & set(os.listdir("/dev/shm")) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left & set(os.listdir("/dev/shm"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value, config):
    for make, name in (
        (lambda: OptimiserConfig(learning_rate=value), "learning_rate"),
        (lambda: OptimiserConfig(ema_widths=(0.05, value)), "ema_widths"),
        (lambda: replace(config, spike_factor=value), "spike_factor"),
        (lambda: replace(config, caption_dropout=value), "caption_dropout"),
        (lambda: replace(config, model=replace(config.model, dropout=value)), "model.dropout"),
        (lambda: DataConfig(min_crop=value), "min_crop"),
        (lambda: DistillationConfig(guidance_scales=(1.0, value)), "guidance_scales"),
    ):
        with pytest.raises(UsageError, match=rf"^{name} must be finite, not "):
            make()
    clip = load_recipe("emoji_clip64")
    assert isinstance(clip, CLIPTrainConfig)
    with pytest.raises(UsageError, match="^timestep_share must be finite"):
        replace(clip, timestep_share=value)


def test_the_command_line_refuses_them_too():
    result = run("train.py", "--config", RECIPE, "--optimiser.learning-rate", "nan")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "learning_rate must be finite, not nan" in " ".join(result.stderr.split())
