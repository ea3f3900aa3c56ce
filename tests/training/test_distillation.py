"""Consistency distillation: noise levels, scales, and the teacher in the training step."""

import re
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.devices.parallel import make_parallel
from glide_jax.diffusion.losses import make_tables
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.diffusion.timesteps import make_timesteps
from glide_jax.errors import GlideError, UsageError
from glide_jax.pipeline.settings import Settings
from glide_jax.training import distillation, objectives
from glide_jax.training.config import RunConfig, TrainConfig
from glide_jax.training.distillation import (
    ConsistencyTerms,
    earlier_timestep,
    sample_scale,
    teacher_steps_at,
)
from glide_jax.training.distillation_config import DistillationConfig
from glide_jax.training.export import description
from glide_jax.training.flops import flops_per_image
from glide_jax.training.initial import initial_state, teacher_params
from glide_jax.training.objective_fields import DENOISING
from glide_jax.training.objectives import Batch, make_objective
from glide_jax.training.quartiles import named_metrics
from glide_jax.training.state import abstract_state
from glide_jax.training.step import Control, make_step, scan_steps
from glide_jax.weights.registry import load_model
from glide_jax.weights.store import flatten
from tests.support.commands import TINY, make_weights

SCHEDULE = make_schedule("cosine")
TABLES = make_tables(SCHEDULE)
LENGTH = 996  # timesteps up to a half log-SNR of -5.1


# --- noise levels, scales, settings


def test_the_number_of_teacher_steps_doubles_at_equal_intervals():
    found = [float(teacher_steps_at(step / 400, (8, 64))) for step in range(0, 400, 50)]
    assert found == [8, 8, 16, 16, 32, 32, 64, 64]
    assert float(teacher_steps_at(1.2, (8, 64))) == 64
    assert {float(teacher_steps_at(s / 9, (10, 10))) for s in range(9)} == {10}
    assert float(teacher_steps_at(8 / 9, (3, 20))) == 20


@pytest.mark.parametrize("student_steps", [1, 3, 4])
def test_an_earlier_timestep_stays_in_its_interval(student_steps):
    t = jnp.arange(LENGTH)
    r, end = (np.asarray(a) for a in earlier_timestep(t, 100, LENGTH, student_steps))
    # The levels of the spacing `trailing-capped` are the borders, down to the clean image.
    borders = [k * LENGTH // student_steps - 1 for k in range(student_steps)]
    assert np.unique(end).tolist() == borders
    assert (end < t).all() and (r == np.maximum(np.asarray(t) - 100, end)).all()
    levels = make_timesteps(SCHEDULE, student_steps, "trailing-capped")[1:][::-1]
    np.testing.assert_allclose(levels, borders[1:], atol=1)


def test_scales_are_uniform_besides_those_without_guidance():
    config = DistillationConfig(guidance_scales=(1.5, 4.0), unguided_share=0.2)
    keys = jax.random.split(jax.random.key(0), 5000)
    found = np.asarray(jax.vmap(partial(sample_scale, config=config))(keys))
    assert (found == 1).mean() == pytest.approx(0.2, abs=0.02)
    rest = (found[found != 1] - 1.5) / 2.5
    assert rest.min() >= 0 and rest.max() <= 1
    assert np.histogram(rest, 5, (0, 1))[0] / len(rest) == pytest.approx(0.2, abs=0.03)
    assert float(sample_scale(keys[0], DistillationConfig(guidance_scales=(3.0, 3.0)))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scales": (2.0, 1.0)}, "range of scales"),
        ({"teacher_steps": (8, 4)}, "teacher_steps grow"),
        ({"student_steps": 9}, "student_steps is from 1"),
        ({"timestep_share": 0.0}, "timestep_share must be above 0"),
        ({"unguided_share": 1.5}, "share from 0 to 1"),
        ({"huber_width": 0.0}, "huber_width must be above 0"),
    ],
)
def test_fields_that_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DistillationConfig(**options)


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [
        ("weighting", "v", "'none'"),
        ("snr_gamma", 4.0, "5.0"),
        ("huber_width", 0.05, "0.0"),
        ("timestep_distribution", "log-normal", "'uniform'"),
        ("timestep_distribution", "loss-aware", "'uniform'"),
        ("half_log_snr_mean", 1.0, "0.0"),
        ("half_log_snr_std", 2.0, "1.0"),
        ("uniform_timestep_share", 0.0, "0.1"),
    ],
)
def test_fields_of_the_denoising_loss_are_refused(field, value, default):
    assert getattr(replace(denoising_config(), **{field: value}), field) == value
    message = f"{field} is for objective denoising: choose that, or set it to {default}"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        replace(student_config(), **{field: value})


@pytest.mark.parametrize("field", [f.name for f in fields(DistillationConfig)])
def test_fields_of_distillation_are_refused_in_denoising(field):
    set_ = {"teacher": "runs/x", "guidance_scales": (2.0, 2.0), "teacher_steps": (4, 16),
            "student_steps": 2, "clamp_x_0": False}  # fmt: skip
    value, default = set_.get(field, 0.3), getattr(DistillationConfig(), field)
    message = (
        f"distillation.{field} is for objective consistency: choose that, or set it to {default!r}"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        replace(denoising_config(), distillation=DistillationConfig(**{field: value}))


def test_every_field_has_an_objective():
    """A new field of the loss is noticed here: sort it into those of one objective or of both."""
    loss = set(f.name for f in fields(TrainConfig)) - {f.name for f in fields(RunConfig)}
    of_both = {"prediction_type", "objective", "distillation", "lora", "caption_dropout"}
    of_both |= {"low_res_timestep_share", "mask_all_share", "train_image_size"}
    assert {name for name in loss - of_both if not name.startswith("sample_")} == set(DENOISING)


def test_a_range_of_scales_needs_the_input_and_a_teacher():
    with pytest.raises(UsageError, match=r"set model\.guidance_scale_input"):
        replace(student_config(), model=SMALL)
    config = student_config(teacher="")
    with pytest.raises(UsageError, match=r"set distillation\.teacher"):
        teacher_params(config, make_objective(config))
    with pytest.raises(UsageError, match="held-out loss"):
        replace(config, validate_every=5)


# --- the whole step

SMALL = replace(TINY, attention_ds=(), image_size=8, n_vocab=300, xf_width=0)


def student_config(teacher="teacher", **options):
    return TrainConfig(
        name="x",
        model=replace(SMALL, guidance_scale_input=True),
        objective="consistency",
        distillation=DistillationConfig(teacher=str(teacher), guidance_scales=(1.0, 4.0)),
        batch_size=4,
        caption_dropout=0.1,
        **options,
    )


def denoising_config(**options):
    return TrainConfig(name="x", model=SMALL, **options)


def batch_of(config):
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.side, config.side, 3)
    empty = np.zeros((config.batch_size, config.model.text_ctx))
    return Batch(
        rng.integers(0, 256, shape, dtype=np.uint8),
        empty.astype(np.int32),
        empty.astype(bool),
        np.arange(config.batch_size, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("teacher"), SMALL)


@pytest.mark.parametrize("kind", ["pmap", "fsdp"])
def test_the_teacher_is_a_frozen_part_of_the_state(kind, teacher):
    config = student_config(teacher, accumulate=2, parallelism=kind)
    objective, parallel = make_objective(config), make_parallel(kind, 2)
    state = initial_state(config, objective, parallel)
    first = jax.device_get(parallel.for_checkpoint(state))
    wanted = flatten(load_model(teacher).params)
    step = make_step(config, objective)
    if kind == "pmap":
        # Not a constant of the program.
        traced = jax.make_jaxpr(step)(first, batch_of(config), jax.random.key(0))
        assert max(np.size(c) for c in traced.consts) <= len(TABLES.alpha)
    compiled = parallel.compile(step)
    state, metrics = compiled(state, parallel.put_batch(batch_of(config)), jax.random.key(0))
    after = jax.device_get(parallel.for_checkpoint(state))
    for tree in (first.reference_params, after.reference_params):
        for path, array in flatten(tree).items():
            np.testing.assert_array_equal(array, wanted[path])
    # The student starts as its teacher, and has the layers of the scale besides.
    started = flatten(first.params)
    assert set(started) - set(wanted) == {
        f"unet/guidance_{i}/{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")
    }
    for path, array in wanted.items():
        np.testing.assert_array_equal(started[path], array)
    assert not np.array_equal(after.params["unet"]["head"]["kernel"], wanted["unet/head/kernel"])
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (after.params, after.opt_state)]
    assert sizes[1] < 2 * sizes[0] + 10
    metrics = named_metrics(jax.device_get(parallel.gather(metrics)))
    assert np.isfinite(metrics["loss"]) and metrics["teacher_steps"] == 8


def test_the_state_of_a_run_has_the_shapes_of_its_teacher(teacher):
    config = student_config(teacher)
    shapes = abstract_state(config, make_objective(config)).reference_params
    assert {p: x.shape for p, x in flatten(shapes).items()} == {
        p: x.shape for p, x in flatten(load_model(teacher).params).items()
    }
    denoising = replace(config, objective="denoising", distillation=DistillationConfig())
    assert flops_per_image(config) > flops_per_image(denoising)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_several_steps_in_one_program(dtype, teacher):
    config = student_config(teacher, dtype=dtype)
    objective, key = make_objective(config), jax.random.key(0)
    state = abstract_state(config, objective)
    items = jax.tree.map(lambda x: np.stack([x, x]), batch_of(config))
    steps = partial(scan_steps, step=make_step(config, objective), read=lambda _, item: item)
    for control in (Control(key), Control(key, np.float32(1), np.float32(0.5))):
        after, metrics = jax.eval_shape(steps, state, items, control)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert metrics["teacher_steps"].shape == (2,)


def test_the_number_of_teacher_steps_follows_the_nearer_limit(monkeypatch):
    config = replace(student_config(), steps=100)
    found = []

    def terms(*_, progress, **__):
        found.append(float(progress))
        return ConsistencyTerms(jnp.zeros(4), jnp.zeros(4)), jnp.float32(1)

    monkeypatch.setattr(objectives, "consistency_loss_at", terms)
    loss = make_objective(config).loss
    for step, time_share in ((25, None), (25, 0.1), (25, 0.5)):
        loss(
            {},
            batch_of(config),
            jax.random.key(0),
            teacher_params={},
            step=step,
            time_share=time_share,
        )
    assert found == [0.25, 0.25, 0.5]


def test_teacher_and_student_of_an_upsampler_see_the_same_noised_small_image(monkeypatch):
    seen = []

    class Recorder:
        config, dtype = SMALL, jnp.float32

        def __init__(self, *_):
            pass

        def apply(self, variables, *inputs, method=None, **given):
            if method is None:
                seen.append((variables["params"]["name"], given))
            return None if method else jnp.zeros_like(inputs[0])

    monkeypatch.setattr(distillation, "teacher_model", lambda _: Recorder())
    model = replace(SMALL, variant="superres", low_res_timestep=True)
    config = TrainConfig(
        name="x",
        model=model,
        prediction_type="x_0",
        objective="consistency",
        low_res_timestep_share=0.3,
        batch_size=4,
    )
    batch, key = batch_of(config), jax.random.key(0)
    objectives.distillation_loss(
        {"name": 1.0}, batch, key, model=Recorder(), tables=TABLES, config=config,
        teacher_params={"name": 2.0}, step=0,
    )  # fmt: skip
    # The teacher once, without a branch for the empty caption; the student at x_r and at x_t.
    assert [float(name) for name, _ in seen] == [2, 1, 1]
    for name in ("low_res", "low_res_timestep"):
        for _, given in seen:
            np.testing.assert_array_equal(given[name], seen[0][1][name])
    assert seen[0][1]["low_res"].shape == (4, 2, 2, 3)


def test_the_sampler_and_its_spacing_come_with_the_weights():
    config = student_config(
        sample_sampler="consistency", sample_spacing="trailing-capped", sample_steps=4
    )
    found = description(config, 10)["defaults"]
    assert found == {
        "steps": 4, "guidance_scale": 3.0, "sampler": "consistency", "spacing": "trailing-capped"
    }  # fmt: skip
    assert Settings().changed(**found).timesteps(SCHEDULE)[0] == pytest.approx(LENGTH - 1, abs=1)
    for name, value in (("sampler", "consistncy"), ("spacing", "fw")):
        with pytest.raises(UsageError, match=f"sample_{name} is .*, not '{value}'"):
            replace(config, **{f"sample_{name}": value})


def test_weights_that_cannot_be_the_teacher(teacher):
    for changes, message in (
        ({"prediction_type": "v"}, "its prediction_type is eps, not v"),
        ({"noise_schedule": "linear"}, "its noise_schedule is cosine, not linear"),
        (
            {"model": replace(SMALL, model_channels=64, guidance_scale_input=True)},
            "parameters are miss",
        ),
    ):
        config = replace(student_config(teacher), **changes)
        with pytest.raises(GlideError, match=message):
            teacher_params(config, make_objective(config))
