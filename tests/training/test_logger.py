"""What a run logs: throughput and learning rate, whatever else happens; the profiler's trace."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.training import logger
from glide_jax.training.config import OptimiserConfig, TrainConfig
from glide_jax.training.logger import Logger
from glide_jax.training.optimiser import learning_rate, make_optimiser
from glide_jax.training.state import new_state
from glide_jax.training.step import train_step
from tests.support.commands import TINY
from tests.training.test_step import KEY, make_batch, scaled


class Kept:
    """A writer that keeps curves by step."""

    def __init__(self):
        self.curves = {}

    def scalars(self, values, step):
        self.curves.setdefault(step, {}).update(values)

    def close(self):
        pass


@pytest.fixture
def kept(monkeypatch):
    writer = Kept()
    monkeypatch.setattr(logger, "open_writer", lambda *_, **__: writer)
    return writer


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    return now


def config(tmp_path, **fields):
    return TrainConfig(
        name="x", model=TINY, out=str(tmp_path), batch_size=8, log_every=2, steps=10, **fields
    )


def metrics(rate=0.5):
    return {"loss": np.float32(1), "bad": np.float32(0), "learning_rate": np.float32(rate)}


def test_throughput_is_right_where_validation_and_samples_coincide_with_a_log_line(
    tmp_path, kept, clock
):
    with Logger(config(tmp_path), 0, 8) as log:
        for step in range(1, 11):
            clock[0] += 2.0
            log.steps(step, 1, metrics())
            if step % 4 == 0:
                for pause in (100.0, 50.0):
                    with log.paused():
                        clock[0] += pause
    # Each window is read when the next step has been started, and all steps take 2 seconds.
    rates = {step: values["train/images_per_second"] for step, values in kept.curves.items()}
    assert set(rates) == {1, 2, 4, 6, 8, 10}
    assert [rates[step] for step in (2, 4, 6, 8)] == pytest.approx([4.0] * 4)


def test_the_learning_rate_is_that_of_the_last_step_of_a_window(tmp_path, kept):
    with Logger(config(tmp_path), 0, 8) as log:
        for step in range(1, 11):
            log.steps(step, 1, metrics(step / 10))
    assert kept.curves[4]["train/learning_rate"] == pytest.approx(0.4)
    assert kept.curves[10]["train/learning_rate"] == pytest.approx(1.0)


def test_a_run_that_is_stopped_records_its_last_steps(tmp_path, kept):
    with Logger(config(tmp_path), 0, 8) as log:
        for step in range(1, 6):
            log.steps(step, 1, metrics(step / 10))
        log.end(5, None)
    assert kept.curves[4]["train/learning_rate"] == pytest.approx(0.4)
    assert kept.curves[5]["train/learning_rate"] == pytest.approx(0.5)
    bad = metrics() | {"bad": np.float32(1), "grad_norm": np.float32(2)}
    with Logger(config(tmp_path, on_bad_step="stop"), 0, 8) as log:
        for step in range(1, 4):
            log.steps(step, 1, bad if step == 3 else metrics())
        with pytest.raises(GlideError, match="^step 3: loss 1, gradient norm 2; this update was"):
            log.end(3, 3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("freeze", [(), ("b",)])
def test_a_step_without_an_update_does_not_advance_the_learning_rate(kind, freeze):
    settings = OptimiserConfig(kind=kind, learning_rate=0.8, warmup=4, freeze=freeze)
    optimiser = make_optimiser(settings, 100)
    params = {"w": jnp.ones(3), "b": {"kernel": jnp.ones((2, 2))}}
    state = new_state(params, optimiser, settings)
    step = jax.jit(
        partial(
            train_step,
            loss=lambda params, *more, **options: scaled(jnp.nan)(params, *more, **options),
            optimiser=optimiser,
            config=settings,
            lr_schedule=learning_rate(settings, 100),
            lr_factor=np.float32(0.5),
        )
    )
    batch, rates = make_batch(), []
    for trouble in (0, 1, 1, 0, 0):
        images = batch._replace(image=batch.image * np.uint8(not trouble))
        state, found = step(state, images, KEY)
        rates.append(float(found["learning_rate"]))
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.3])


# --- the profiler


@pytest.fixture
def traces(monkeypatch):
    """What was traced: the calls of the profiler, and the steps that were done before them."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [
        (0, 1, [1, 2, 3, "start", 4, 5, 6, "stop", 7, 8, 9, 10]),
        # Resumed before the range, within it, at its end and after it.
        (2, 1, [3, "start", 4, 5, 6, "stop", 7, 8, 9, 10]),
        (4, 1, [5, "start", 6, "stop", 7, 8, 9, 10]),
        (5, 1, [6, 7, 8, 9, 10]),
        (8, 1, [9, 10]),
        # Two steps a call; five, of which the first call compiles.
        (0, 2, [2, "start", 4, 6, "stop", 8, 10]),
        (0, 5, [5, "start", 10, "stop"]),
        (0, 10, [10]),
    ],
)
def test_the_steps_of_a_range_are_traced_where_they_are_done(
    tmp_path, kept, traces, first, count, expected, capsys
):
    with Logger(config(tmp_path, profile="4:6"), first, 8) as log:
        for step in range(first + count, 11, count):
            traces.append(step)
            several = {k: np.broadcast_to(v, count) for k, v in metrics().items()}
            log.steps(step, count, metrics() if count == 1 else several)
    assert traces == expected
    notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert len(notes) == (0 if "start" in expected else 1)


def test_a_run_that_ends_within_the_range_ends_its_trace(tmp_path, kept, traces):
    with Logger(config(tmp_path, profile="4:60"), 0, 8) as log:
        for step in range(1, 11):
            log.steps(step, 1, metrics())
    assert traces == ["start", "stop"]


def test_the_count_of_operations_does_not_hold_up_training(tmp_path, kept, clock, monkeypatch):
    ready, counted = threading.Event(), threading.Event()

    def count(_):
        ready.wait(60)
        counted.set()
        return 5.0

    monkeypatch.setattr(logger, "flops_per_image", count)
    monkeypatch.setattr(logger, "peak_flops", lambda _: 100.0)
    with Logger(config(tmp_path), 0, 1) as log:
        for step in range(1, 5):
            clock[0] = float(step)
            log.steps(step, 1, metrics())
        ready.set()
        assert counted.wait(60)
        log._flops.result(60)
        for step in range(5, 9):
            clock[0] = float(step)
            log.steps(step, 1, metrics())
    used = {
        step: curves.get("train/model_flop_utilisation") for step, curves in kept.curves.items()
    }
    assert used[2] is None
    # 8 images a second of 5 operations each, of 100 for each device.
    assert used[6] == pytest.approx(8 * 5.0 / (100 * jax.device_count()))
