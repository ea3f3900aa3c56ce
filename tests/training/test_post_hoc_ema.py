"""Post-hoc EMA: profiles, fits, snapshots."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from glide_jax.errors import UsageError
from glide_jax.training.config import OptimiserConfig, TrainConfig, save_config
from glide_jax.training.post_hoc_ema import (
    Profile,
    fit,
    inner,
    reconstruct,
    save_ema_snapshots,
    snapshots,
    write_ema,
)
from glide_jax.training.step import power_rate
from glide_jax.weights.registry import load_model
from glide_jax.weights.store import flatten, unflatten
from tests.support.commands import TINY, make_weights, one_line, run

WIDTHS = (0.05, 0.10)


def track(values, width):
    """Return the EMA of a trajectory `(T, ...)` after each step, as training computes it."""

    def step(ema, now):
        t, value = now
        ema = ema + (1 - power_rate(t, width)) * (value - ema)
        return ema, ema

    return np.asarray(jax.lax.scan(step, values[0], (jnp.arange(1.0, len(values) + 1), values))[1])


def trajectory(steps):
    """Return a parameter that converges, and one that is a random walk."""
    t = np.arange(steps) / steps
    noise = np.random.default_rng(0).standard_normal(steps)
    return jnp.float32(np.stack([np.exp(-5 * t), np.cumsum(noise) / np.sqrt(steps)], axis=1))


# --- profiles


def test_an_ema_has_the_profile_of_its_width():
    """The EMA of 0, 0, ..., 1, 0, ... is the weight of the step with the 1."""
    steps, width = 400, 0.1
    weights = track(jnp.eye(steps), width)[-1]
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    s = np.arange(1, steps + 1) / steps
    mean = (weights * s).sum()
    deviation = np.sqrt((weights * (s - mean) ** 2).sum())
    assert deviation == pytest.approx(width, rel=0.02)
    gamma = Profile(steps, width).gamma
    np.testing.assert_allclose(weights, s**gamma * (gamma + 1) / steps, atol=2e-4)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Profile(100, 0.1), Profile(100, 0.1)),
        (Profile(60, 0.05), Profile(100, 0.2)),
        (Profile(100, 0.05), Profile(60, 0.2)),
    ],
)
def test_inner_products_are_the_integrals_of_the_profiles(a, b):
    def weight(profile, s):
        return (profile.gamma + 1) * s**profile.gamma / profile.step ** (profile.gamma + 1)

    wanted, _ = quad(lambda s: weight(a, s) * weight(b, s), 0, min(a.step, b.step))
    assert inner(a, b) == pytest.approx(wanted, rel=1e-9)
    assert inner(a, b) == inner(b, a)


# --- fits


@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15])
def test_an_ema_of_any_width_follows_from_two(width):
    steps, every = 4000, 100
    values = trajectory(steps)
    saved = [Profile(t, w) for t in range(every, steps + 1, every) for w in WIDTHS]
    kept = {w: track(values, w) for w in WIDTHS}
    coefficients, error = fit(saved, Profile(steps, width))
    found = sum(c * kept[p.width][p.step - 1] for c, p in zip(coefficients, saved, strict=True))
    assert coefficients.sum() == pytest.approx(1)
    assert error < 5e-3
    np.testing.assert_allclose(found, track(values, width)[-1], atol=1e-3)


def test_an_ema_at_an_earlier_step_follows_too():
    steps, every = 4000, 100
    values = trajectory(steps)
    kept = {w: track(values, w) for w in WIDTHS}
    saved = [Profile(t, w) for t in range(every, 2501, every) for w in WIDTHS]
    coefficients, _ = fit(saved, Profile(2450, 0.08))
    found = sum(c * kept[p.width][p.step - 1] for c, p in zip(coefficients, saved, strict=True))
    # Snapshots after this step help, up to the steps that the EMA does not include.
    np.testing.assert_allclose(found, track(values[:2450], 0.08)[-1], atol=5e-3)


def test_a_saved_profile_is_fitted_exactly():
    saved = [Profile(t, w) for t in (100, 200, 300) for w in WIDTHS]
    coefficients, error = fit(saved, Profile(300, 0.1))
    np.testing.assert_allclose(coefficients, [0, 0, 0, 0, 0, 1], atol=1e-6)
    assert error < 1e-6


def test_a_fit_returns_its_error():
    saved = [Profile(t, 0.1) for t in (50, 100, 150, 200)]
    _, near = fit(saved, Profile(200, 0.11))
    _, far = fit(saved, Profile(200, 0.02))
    assert 0 < near < 0.1 < 0.5 < far


# --- snapshots


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 35 steps whose parameters are `step * params`."""
    folder = tmp_path_factory.mktemp("run")
    params = load_model(make_weights(folder / "weights")).params
    optimiser = OptimiserConfig(ema_widths=WIDTHS, ema_snapshot_every=10)
    config = TrainConfig(
        name="grown", model=TINY, optimiser=optimiser, steps=35, out=str(folder / "run")
    )
    (folder / "run").mkdir()
    save_config(config, folder / "run" / "config.json")
    factors = {w: track(jnp.arange(1.0, 36.0), w) for w in WIDTHS}
    for step in range(1, 36):
        emas = (jax.tree.map(lambda x, f=factors[w][step - 1]: x * f, params) for w in WIDTHS)
        save_ema_snapshots(config, step, emas)
    return folder / "run", params


def test_snapshots_are_saved_at_multiples_of_ema_every_and_at_the_end(finished):
    folder, _ = finished
    names = sorted(p.name for p in (folder / "ema").iterdir())
    assert names == [f"{s:08}_{w:g}" for s in (10, 20, 30, 35) for w in WIDTHS]
    assert set(snapshots(folder)) == {Profile(s, w) for s in (10, 20, 30, 35) for w in WIDTHS}


def test_nothing_is_gathered_between_two_snapshots(finished):
    folder, _ = finished
    config = TrainConfig(name="x", model=TINY, optimiser=OptimiserConfig(ema_widths=WIDTHS))

    def emas():
        raise AssertionError("gathered for nothing")
        yield

    save_ema_snapshots(replace(config, out=str(folder)), 34, emas())


def test_a_snapshot_loads_like_any_weights(finished):
    folder, params = finished
    model = load_model(folder / "ema" / "00000020_0.1")
    factor = track(jnp.arange(1.0, 21.0), 0.1)[-1]
    assert model.config == TINY and model.prediction_type == "eps"
    for path, array in flatten(model.params).items():
        np.testing.assert_allclose(array, factor * flatten(params)[path], rtol=1e-3, atol=1e-6)


def test_another_width_is_made_from_the_command_line(finished, tmp_path):
    folder, params = finished
    out = tmp_path / "ema"
    command = ("-m", "glide_jax", "weights", "ema", folder, "--width", 0.08, "--out", out)
    result = run(*command)
    assert result.returncode == 0, result.stderr
    factor = track(jnp.arange(1.0, 36.0), 0.08)[-1]
    found = flatten(load_model(out).params)
    for path, array in flatten(params).items():
        np.testing.assert_allclose(found[path], factor * array, rtol=5e-3, atol=1e-5)
    assert "exists" in one_line(run(*command), 2)


def test_an_ema_that_cannot_be_made_is_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(UsageError, match=r"do not give one of 0\.01 at step 35"):
        reconstruct(folder, 0.01)
    with pytest.raises(UsageError, match="between 0 and 0.28"):
        write_ema(folder, tmp_path / "out", 0.3)
    with pytest.raises(UsageError, match="saved at step 10, after 5"):
        reconstruct(folder, 0.1, step=5)
    with pytest.raises(UsageError, match="saved no EMAs"):
        reconstruct(tmp_path, 0.1)
    assert not (tmp_path / "out").exists()


def test_an_array_beyond_the_range_of_float16_stays_float32(tmp_path):
    config = TrainConfig(
        name="large",
        model=TINY,
        optimiser=OptimiserConfig(ema_widths=(0.1,)),
        steps=1,
        out=str(tmp_path),
    )
    params = load_model(make_weights(tmp_path / "weights")).params
    flat = flatten(params)
    flat["unet/head/bias"] = np.full_like(flat["unet/head/bias"], 1e6)
    save_ema_snapshots(config, 1, [unflatten(flat)])
    loaded = load_model(Path(tmp_path) / "ema" / "00000001_0.1").params
    assert (loaded["unet"]["head"]["bias"] == 1e6).all()


def test_impossible_widths_are_refused():
    for widths in ((0.3,), (0.0,), (0.1, 0.1)):
        with pytest.raises(UsageError):
            OptimiserConfig(ema_widths=widths)
