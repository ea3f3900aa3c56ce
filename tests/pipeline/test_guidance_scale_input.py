"""Models with distilled guidance: the scale is an input, and no empty prompt is evaluated."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.errors import UsageError
from tests.support.commands import TINY, make_weights
from tests.support.exact_model import EVALUATED, Oracle, exact_pipeline


@dataclass(frozen=True)
class Scaled(Oracle):
    """An oracle whose colour is the caption's times the scale."""

    def __call__(self, params, x, t, cond):
        scaled = cond["text"] * cond["guidance_scale"][:, None]
        return super().__call__(params, x, t, {"text": scaled})


@pytest.fixture(scope="module")
def pipe():
    made = exact_pipeline(oracle=Scaled("scaled", count=True), settings={"steps": 4})
    config = replace(made.model.config, guidance_scale_input=True)
    return replace(made, model=replace(made.model, config=config))


def evaluated(pipe, *prompts, **settings):
    """Return images, and how many evaluations of the network there were for each."""
    EVALUATED.clear()
    images = pipe(list(prompts), seed=3, progress=False, **settings).images.astype(float)
    jax.effects_barrier()
    return images, EVALUATED["scaled"] / len(images)


def test_the_scale_is_an_input_at_one_evaluation_a_step(pipe):
    (one, evaluations), (three, again) = (
        evaluated(pipe, "red", guidance_scale=scale) for scale in (1.0, 3.0)
    )
    assert evaluations == again == 4
    moved = (three - one).mean(axis=(0, 1, 2)) / 127.5
    np.testing.assert_allclose(moved, 2 * np.array([0.3, -0.2, -0.1]), atol=0.03)


def test_a_scale_per_image(pipe):
    """Also over several batches, and for models without the input."""
    scales = [1.0, 2.0, 3.0]
    for model in (pipe, exact_pipeline()):
        whole = model(["red"] * 3, seed=3, guidance_scale=scales, batch_size=2, progress=False)
        for i, scale in enumerate(scales):
            alone = model("red", seed=3, first_index=i, guidance_scale=scale, progress=False)
            assert np.abs(alone.images[0].astype(int) - whole.images[i]).max() <= 1
        assert [whole.metadata(i)["guidance_scale"] for i in range(3)] == scales
        assert "guidance scale 1 to 3" in whole.summary()
        with pytest.raises(UsageError, match="guidance_scale has 2 values for 3 images"):
            model(["red"] * 3, guidance_scale=[1.0, 2.0], progress=False)


def test_the_batch_size_decides_no_error():
    """A batch whose images all have scale 1 is sampled as the others are."""
    options = {"negative_prompt": "blue", "guidance_scale": [1.0, 1.0, 3.0, 3.0], "seed": 3}
    together, apart = (
        exact_pipeline()(["red"] * 4, batch_size=size, progress=False, **options) for size in (4, 2)
    )
    assert np.abs(together.images.astype(int) - apart.images).max() <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": [glide.classifier_free(2.0), glide.clamp_x_0()]},
        {"guidance_scale": 2.0, "negative_prompt": "blue"},
        {"guidance_scale": 2.0, "guidance_method": "apg"},
        {"guidance_scale": 2.0, "guidance_interval": (0.0, 1e9)},
    ],
)
def test_other_guidance_is_computed_from_branches_without_guidance(pipe, settings):
    """The input is then 1 in each branch, as for a model that has no such input."""
    found, evaluations = evaluated(pipe, "red", **settings)
    assert evaluations == 8
    plain = exact_pipeline(settings={"steps": 4})("red", seed=3, progress=False, **settings)
    assert np.abs(found - plain.images).max() <= 1


def test_prompts_joined_by_and(pipe):
    found, evaluations = evaluated(pipe, "red AND blue", guidance_scale=2.0)
    assert evaluations == 12
    plain = exact_pipeline(settings={"steps": 4})(
        "red AND blue", seed=3, guidance_scale=2.0, progress=False
    )
    assert np.abs(found - plain.images).max() <= 1


def test_weights_with_the_input_are_loaded_and_read_the_scale(tmp_path):
    folder = make_weights(tmp_path, replace(TINY, guidance_scale_input=True))
    pipe = glide.load(folder)
    one, two = (
        pipe(
            "red",
            guidance_scale=scale,
            sampler="consistency",
            spacing="trailing-capped",
            progress=False,
        )
        for scale in (1.0, 2.0)
    )
    assert not np.array_equal(one.images, two.images)
