"""A recipe whose weights could not be sampled is refused before it is trained."""

from dataclasses import replace

import pytest

from glide_jax.errors import UsageError
from glide_jax.training.config import TrainConfig
from tests.support.commands import RECIPE, TINY, one_line, run
from train import check_recipe, train

PLAIN = TrainConfig(name="x", model=TINY)
UPSAMPLER = replace(PLAIN, model=replace(TINY, variant="superres", image_size=64))
FIXED = replace(PLAIN, model=replace(TINY, out_channels=3))
FIELDS = "the sample_ fields of the recipe: "
NO_VARIANCE = (
    "sampler ddpm needs a network with learned variance, and this one predicts none: choose "
    "ddpm-small or ddpm-large"
)

# A recipe; its field; the message; and a value that is accepted.
WRONG = [
    (PLAIN, "sample_steps", 0, "sampling needs at least one step, not 0", 1),
    (PLAIN, "sample_steps", 2000, "cannot take 2000 steps: the process has 1000 timesteps", 1000),
    (PLAIN, "sample_steps", 2.5, "steps takes a whole number or text, not 2.5", 2),
    (
        replace(PLAIN, sample_spacing="optimised"), "sample_steps", 60,
        "spacing optimised takes 1 to 50 steps, not 60: choose spacing logsnr", 8,
    ),
    (
        replace(PLAIN, sample_sampler="plms"), "sample_steps", 2,
        "plms needs at least three levels, not 2", 5,
    ),
    (PLAIN, "diffusion_steps", 20, "cannot take 25 steps: the process has 20 timesteps", 25),
    (UPSAMPLER, "sample_strength", 5.0, "strength must be above 0 and at most 1, not 5.0", 0.5),
    (UPSAMPLER, "sample_strength", 0.0, "strength must be above 0 and at most 1, not 0.0", 1.0),
    (
        PLAIN, "sample_guidance_scale", "3",
        "guidance_scale cannot be '3', which is text", 3,
    ),
    (FIXED, "sample_sampler", "ddpm", NO_VARIANCE, "ddpm-small"),
]  # fmt: skip
PROMPTS = [
    (
        ("a cat AND",),
        "sample_prompts: AND and NOT stand between two captions: 'a cat AND' lacks one",
    ),
    (("a cat", 3), "sample_prompts: a prompt must be a string, not int: 3"),
    ("a red apple", "sample_prompts takes a list of prompts, not 'a red apple'"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "field", "wrong", "message", "right"), WRONG)
@pytest.mark.parametrize("every", [0, None])
def test_settings_that_cannot_be_sampled_are_refused(recipe, field, wrong, message, right, every):
    if every is not None:
        recipe = replace(recipe, sample_every=every)
    check_recipe(replace(recipe, **{field: right}))
    for check in (check_recipe, train):
        with pytest.raises(UsageError) as caught:
            check(replace(recipe, **{field: wrong}))
        assert str(caught.value) == FIELDS + message


@pytest.mark.parametrize(("prompts", "message"), PROMPTS)
@pytest.mark.parametrize("recipe", [PLAIN, UPSAMPLER])
def test_prompts_that_cannot_be_read_are_refused(recipe, prompts, message):
    with pytest.raises(UsageError) as caught:
        check_recipe(replace(recipe, sample_prompts=prompts))
    assert str(caught.value) == message
    check_recipe(replace(recipe, sample_prompts=("a cat AND a dog :0.5 NOT a leaf", "a cat")))


def test_one_step_of_ddpm_needs_no_variance():
    check_recipe(replace(FIXED, sample_sampler="ddpm", sample_steps=1))
    for sampler in ("", "ddpm-small", "ddpm-large", "ddim"):
        check_recipe(replace(FIXED, sample_sampler=sampler))


def test_the_command_ends_before_it_begins(tmp_path):
    folder = tmp_path / "run"
    result = run("train.py", "--config", RECIPE, "--out", folder, "--sample-steps", 2000)
    wanted = f"error: {FIELDS}cannot take 2000 steps: the process has 1000 timesteps"
    assert one_line(result, 2) == wanted
    assert not folder.exists()
