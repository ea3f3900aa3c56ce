"""Several steps a call from data on the device equal single steps from the loader."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import train as script
from glide_jax.data.data_config import DataConfig
from glide_jax.data.records import Source
from glide_jax.devices.parallel import make_parallel
from glide_jax.training import clock as clocks
from glide_jax.training import feeding
from glide_jax.training.clock import Clock
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.feeding import (
    compile_steps,
    open_batches,
    steps_of_next_call,
    steps_per_call,
)
from glide_jax.training.initial import initial_state
from glide_jax.training.objectives import make_objective, make_tokenizer
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import restore_run
from glide_jax.training.step import Control, make_step
from tests.support.commands import RECIPE, TINY, make_images

CONFIG = TrainConfig(
    name="x",
    model=TINY,
    steps=4,
    save_every=2,
    batch_size=4,
    optimiser=OptimiserConfig(learning_rate=1e-3),
    data=DataConfig(on_device="yes", caption_templates=("{caption}", "a {caption}"), flip=True),
)


def source() -> Source:
    rng = np.random.default_rng(0)
    return Source(
        [
            {"image": rng.integers(0, 256, (16, 16, 3), np.uint8), "caption": f"apple {i}"}
            for i in range(6)
        ]
    )


def trained(config: TrainConfig, steps: int) -> tuple[Any, np.ndarray]:
    """Return the state and the loss of each step."""
    objective = make_objective(config)
    parallel = make_parallel(config.parallelism, config.batch_size)
    batches = open_batches(config, source(), make_tokenizer(config), process=(0, 1))
    run = compile_steps(config, make_step(config, objective), batches, parallel)
    state, losses, step = initial_state(config, objective, parallel), [], 0
    while step < steps:
        step += steps_of_next_call(batches, step)
        state, metrics = run(state, next(batches), Control(jax.random.key(1)))
        losses.extend(np.ravel(jax.device_get(parallel.gather(metrics))["loss"]))
    return jax.device_get(parallel.for_checkpoint(state)), np.array(losses)


@pytest.mark.parametrize("parallelism", ["pmap", "fsdp"])
def test_data_on_the_device_train_like_the_loader(parallelism, monkeypatch):
    config = replace(CONFIG, parallelism=parallelism)
    loader = replace(config, data=replace(config.data, on_device="no"))
    expected, losses = trained(loader, 4)
    monkeypatch.setattr(feeding, "steps_per_call", lambda config: 2)
    state, found = trained(config, 4)
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    # Rounding turns the sign of some of Adam's updates, where a gradient is almost zero.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        assert np.abs(a - b).mean() < 1e-4  # an update is 1e-3


def test_calls_end_where_something_is_due(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert steps_per_call(replace(CONFIG, steps=1000, save_every=100)) == 20
    assert steps_per_call(replace(CONFIG, steps=1000, save_every=100, sample_every=30)) == 10
    assert steps_per_call(replace(CONFIG, steps=997, save_every=100)) == 1


@pytest.mark.parametrize(
    ("first", "counts"),
    [(0, [20, 20, 20]), (40, [20, 20, 20]), (50, [10, 20, 20]), (7, [13, 20, 20]), (39, [1, 20])],
)
def test_only_the_first_call_of_a_run_stopped_between_calls_is_shorter(first, counts, monkeypatch):
    monkeypatch.setattr(feeding, "steps_per_call", lambda config: 20)
    batches = open_batches(CONFIG, source(), make_tokenizer(CONFIG), process=(0, 1))
    batches.set_state(batches.get_state() | {"position": 4 * first})
    step, found = first, []
    for _ in counts:
        found.append(steps_of_next_call(batches, step))
        assert next(batches).image.shape == (found[-1], 4)
        step += found[-1]
    assert found == counts
    assert batches.get_state()["position"] == 4 * step


def adding(state, batch, key, *_, axis):
    """A step that compiles at once: every number of the state depends on the order of the steps."""
    noise = jax.random.normal(jax.random.fold_in(key, state.step), batch.image.shape)
    seen = (noise * batch.image).mean() + (batch.tokens * batch.caption_mask).mean()
    state = replace(
        state,
        step=state.step + 1,
        params=jax.tree.map(lambda p: 0.9 * p + seen, state.params),
        ema=jax.tree.map(lambda p: 0.9 * p - seen, state.ema),
    )
    return state, dict.fromkeys(("loss", "bad", "grad_norm", "learning_rate"), 0 * seen)


def test_a_run_stopped_between_calls_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    data = DataConfig(source=str(make_images(tmp_path / "images")), on_device="yes")
    whole, parts = (
        replace(load_recipe(RECIPE), data=data, out=str(tmp_path / name), steps=9, sample_every=0)
        for name in ("whole", "parts")
    )
    lengths = []

    def measured(*call):
        lengths.append(steps_of_next_call(*call))
        return lengths[-1]

    monkeypatch.setattr(script, "steps_of_next_call", measured)
    monkeypatch.setattr(script, "make_step", lambda *_: adding)
    monkeypatch.setattr(feeding, "steps_per_call", lambda config: 3)
    script.train(whole)
    monkeypatch.setattr(feeding, "steps_per_call", lambda config: 2)
    script.train(replace(parts, steps=4))
    monkeypatch.setattr(feeding, "steps_per_call", lambda config: 3)
    script.train(parts)
    assert lengths == [3, 3, 3, 2, 2, 2, 3]
    states = [jax.tree.leaves(restore_run(run.folder)[1]) for run in (whole, parts)]
    assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))


def test_the_clock_decays_ends_and_is_resumed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now[0])
    config = replace(
        CONFIG, minutes=1, optimiser=OptimiserConfig(lr_decay="wsd", lr_decay_share=0.5)
    )
    clock = Clock(config)
    now[0] = 100.0  # compilation does not count
    assert clock.lr_factor() == 1 and not clock.over
    clock.started(np.zeros(1))
    now[0] += 45
    assert clock.lr_factor() == pytest.approx(0.5)
    resumed = Clock(config, clock.get_state())
    assert resumed.seconds == pytest.approx(45)
    now[0] += 16
    assert clock.over and clock.lr_factor() == 0
    assert Clock(replace(config, minutes=0)).lr_factor() is None


def test_the_clock_does_not_count_a_pause_but_the_step_that_still_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now[0])

    class Running:
        """Metrics of a step that takes five more seconds."""

        def block_until_ready(self):
            now[0] += 5

    clock = Clock(replace(CONFIG, minutes=1))
    with clock.paused():
        now[0] += 100
    assert clock.seconds == 0
    clock.started(np.zeros(1))
    now[0] += 10
    clock.started(Running())
    with clock.paused():
        now[0] += 100
        assert clock.seconds == 15
    now[0] += 2
    assert clock.get_state() == {"seconds": 17} and not clock.over


@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_the_teacher_steps_of_distillation_follow_the_clock(on_device):
    config = replace(
        CONFIG,
        objective="consistency",
        distillation=DistillationConfig(teacher_steps=(2, 16)),
        data=replace(CONFIG.data, on_device=on_device),
        minutes=1,
        steps=1000,
    )
    objective = make_objective(config)
    parallel = make_parallel("pmap", config.batch_size)
    batches = open_batches(config, source(), make_tokenizer(config), process=(0, 1))
    run = compile_steps(config, make_step(config, objective), batches, parallel)
    state, found = initial_state(config, objective, parallel), []
    for done in (0.0, 0.3, 0.9):  # two, four and sixteen steps: a quarter of the time each
        control = Control(jax.random.key(1), np.float32(1), np.float32(done))
        state, metrics = run(state, next(batches), control)
        found.append(float(parallel.gather(metrics)["teacher_steps"]))
    assert found == [2, 4, 16]
