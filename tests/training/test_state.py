"""The loss scale of a run that is resumed in another dtype."""

from dataclasses import replace

import numpy as np
import pytest

from glide_jax.training.config import TrainConfig
from glide_jax.training.objectives import make_objective
from glide_jax.training.recipes import load_recipe
from glide_jax.training.runs import restore_run
from glide_jax.training.state import INITIAL_LOG2_LOSS_SCALE, TrainState, fit_loss_scale
from tests.support.commands import RECIPE, TINY, make_images
from train import train


def state_of(scale: float) -> TrainState:
    return TrainState(*(np.int32(3), {}, {}, (), (), np.float32(1), np.float32(scale)))


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("float16", 0.0, INITIAL_LOG2_LOSS_SCALE),
        ("float16", 7.25, 7.25),
        ("bfloat16", 7.25, 0.0),
        ("float32", 20.0, 0.0),
        ("float32", 0.0, 0.0),
    ],
)
def test_a_restored_loss_scale_is_that_of_the_dtype(dtype, before, after):
    objective = make_objective(TrainConfig(name="x", model=TINY, dtype=dtype))
    state = state_of(before)
    fitted = fit_loss_scale(state, objective)
    assert (
        fitted.log2_loss_scale == np.float32(after) and fitted.log2_loss_scale.dtype == np.float32
    )
    assert replace(fitted, log2_loss_scale=state.log2_loss_scale).step == 3


def test_a_run_goes_on_in_float16_with_a_loss_scale(tmp_path):
    config = load_recipe(RECIPE)
    data = replace(config.data, source=str(make_images(tmp_path / "images")))
    out = tmp_path / "run"
    config = replace(config, data=data, out=str(out), parallelism="fsdp", sample_every=0)
    train(replace(config, steps=1, dtype="float32"))
    train(replace(config, steps=2, dtype="float16"))
    scale = float(restore_run(out)[1].log2_loss_scale)
    # The first update either lets the scale grow or halves it, after an overflow.
    assert scale in (pytest.approx(INITIAL_LOG2_LOSS_SCALE + 1e-3), INITIAL_LOG2_LOSS_SCALE - 1)
