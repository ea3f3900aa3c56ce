"""Settings of a wrong type or length are refused by name; numbers of any library are settings."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.pipeline.settings import Settings, describe

SCHEDULE = glide.make_schedule("cosine")
RESTART = "restart takes 3 values (number, number, whole number), not "
REPAINT = "repaint takes 2 values (whole number, whole number), not "
INTERVAL = "guidance_interval takes 2 values (number, number), not "


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", [25], "steps takes a whole number or text, not [25]"),
        ("steps", 2.5, "steps takes a whole number or text, not 2.5"),
        ("steps", True, "steps takes a whole number or text, not True"),
        ("sampler", ["ddim"], "sampler takes text, not ['ddim']"),
        ("sampler", 3, "sampler takes text, not 3"),
        ("spacing", ("karras",), "spacing takes text, not ('karras',)"),
        ("guidance_method", {"cfg"}, "guidance_method takes text, not {'cfg'}"),
        ("negative_prompt", ["red"], "negative_prompt takes text, not ['red']"),
        ("eta", [0.5], "eta takes a number, not [0.5]"),
        ("temperature", np.ones(2), "temperature takes a number, not array([1., 1.])"),
        ("guidance_rescale", (0.5, 0.5), "guidance_rescale takes a number, not (0.5, 0.5)"),
        ("autoguidance_scale", [2.0], "autoguidance_scale takes a number, not [2.0]"),
        ("clip_guidance_scale", {}, "clip_guidance_scale takes a number, not {}"),
        ("dynamic_threshold", [0.9], "dynamic_threshold takes a number, not [0.9]"),
        ("strength", 1j, "strength takes a number, not 1j"),
        ("restart", (0.3, 2.0), RESTART + "(0.3, 2.0)"),
        ("restart", (0.3, 2.0, 2.5), RESTART + "(0.3, 2.0, 2.5)"),
        ("restart", 0.3, RESTART + "0.3"),
        ("restart", [0.3, "2", 3], RESTART + "[0.3, '2', 3]"),
        ("repaint", (2.5, 2), REPAINT + "(2.5, 2)"),
        ("repaint", ("5", "4"), REPAINT + "('5', '4')"),
        ("repaint", (5, 4, 3), REPAINT + "(5, 4, 3)"),
        ("guidance_interval", (1.0,), INTERVAL + "(1.0,)"),
        ("guidance_interval", 5.0, INTERVAL + "5.0"),
        (
            "guidance_scale", np.ones((1, 2)),
            "guidance_scale takes a number or a list of numbers, not array([[1., 1.]])",
        ),
        (
            "guidance_scale", [1.0, None],
            "guidance_scale takes a number or a list of numbers, not [1.0, None]",
        ),
        ("guidance", [{"a": 1}], "guidance takes a list of guidances, not [{'a': 1}]"),
        ("guidance", glide.clamp_x_0(), "guidance takes a list of guidances, not Guidance("),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_or_length_is_refused_by_name(name, value, message):
    with pytest.raises(glide.UsageError) as caught:
        Settings().changed(**{name: value})
    found = str(caught.value)
    assert found == message or (message.endswith("Guidance(") and found.startswith(message))
    assert found.isprintable() and len(found) < 150


def test_numbers_of_numpy_jax_and_json_are_settings():
    given = {
        "steps": np.int32(10),
        "temperature": np.float32(0.5),
        "clip_guidance_scale": jnp.asarray(2.0),
        "restart": [0.3, 2, 3.0],
        "guidance_scale": np.array([1.0, 2.0]),
    }
    rows = len(Settings(steps=10, restart=(0.3, 2.0, 3)).plan(SCHEDULE, ()))
    assert len(Settings().changed(**given).plan(SCHEDULE, ())) == rows
    made = Settings(steps=12, repaint=np.array([2.0, 3.0])).plan(SCHEDULE, ())
    assert len(made) == len(Settings(steps=12, repaint=(2, 3)).plan(SCHEDULE, ()))
    # They are plain in the metadata.
    made = json.loads(json.dumps(describe(Settings().changed(**given))))
    assert made["steps"] == 10 and made["temperature"] == 0.5 and made["clip_guidance_scale"] == 2.0
    assert made["restart"] == [0.3, 2, 3.0] and made["guidance_scale"] == [1.0, 2.0]
