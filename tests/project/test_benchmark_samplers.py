"""The comparison of samplers: its counts, its figure, and a small run."""

import json
import sys

import pytest

from benchmarks.samplers import Options, choices, curves, levels_for, measure, write_figure
from glide_jax.diffusion.optimised_timesteps import image_error
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.errors import UsageError

SCHEDULE = make_schedule("cosine")


@pytest.mark.parametrize(
    ("name", "evaluations", "levels"),
    [("dpm++2m", 10, 10), ("heun", 10, 5), ("heun", 1, 1), ("plms", 15, 8), ("plms", 3, None)],
)
def test_samplers_are_compared_by_evaluations(name, evaluations, levels):
    assert levels_for(SCHEDULE, SOLVERS[name], evaluations) == levels


def test_curves_have_the_actual_number_of_evaluations():
    found = curves(
        SCHEDULE,
        ("dpm++2m", "heun", "plms", "dpm++2m, optimised"),
        (3, 8),
        lambda timesteps, solver: image_error(SCHEDULE, timesteps, solver),
    )
    assert {name: list(points) for name, points in found.items()} == {
        "dpm++2m": [3, 8],
        "heun": [3, 7],
        "plms": [8],
        "dpm++2m, optimised": [3, 8],
    }
    assert found["dpm++2m, optimised"][8] < found["dpm++2m"][8] / 10


def test_the_figure_without_matplotlib_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"needs matplotlib: pip install '\.\[eval\]'"):
        write_figure({}, tmp_path / "samplers.png")


@pytest.mark.slow
def test_a_small_comparison():
    # With 5 evaluations the result of heun is NaN on the embedded model.
    options = Options(evaluations=(5,), model_evaluations=(8,), reference=6, images=1)
    found = measure(options)
    assert set(found["image statistics"]) == set(choices())
    assert all(0 < d < 10 for points in found["embedded model"].values() for d in points.values())
    assert "ddpm" not in found["embedded model"]
    assert json.loads(json.dumps(found))["settings"]["reference"] == 6
