"""Models of other sizes than OpenAI's: their outputs are those of the original code.

They differ in depth, width, head count, levels, image size, caption length and switches. Weights
and inputs are random and made here; `variants.npz` holds the outputs of the original code for them.
"""

import zlib

import jax
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.weights.released import released_shapes
from tests.support.golden import assert_close, load, nhwc

SMALL = {"model_channels": 32, "num_res_blocks": 1, "num_head_channels": 16, "n_vocab": 61}
# Name -> config, and the height and width of the images.
VARIANTS = {
    "base": (
        glide.ModelConfig(
            **SMALL,
            channel_mult=(4, 2, 1),
            attention_ds=(1, 4),
            text_ctx=21,
            xf_width=40,
            xf_layers=3,
            xf_heads=5,
            xf_final_ln=False,
        ),
        (16, 24),
    ),
    "superres": (
        glide.ModelConfig(
            **SMALL | {"model_channels": 96, "num_head_channels": 48},
            variant="superres",
            channel_mult=(1, 2),
            attention_ds=(),
            text_ctx=3,
            xf_width=24,
            xf_layers=1,
            xf_heads=1,
            xf_padding=False,
        ),
        (24, 16),
    ),
    "inpaint": (
        glide.ModelConfig(
            **SMALL | {"num_res_blocks": 3},
            variant="inpaint",
            channel_mult=(2,),
            attention_ds=(1,),
            out_channels=3,
            xf_width=0,
        ),
        (10, 7),
    ),
    "superres_inpaint": (
        glide.ModelConfig(
            **SMALL | {"num_res_blocks": 2, "num_head_channels": -1},
            variant="superres_inpaint",
            channel_mult=(1, 2),
            attention_ds=(1, 2),
            num_heads=2,
            num_heads_upsample=8,
            use_scale_shift_norm=False,
            resblock_updown=False,
            text_ctx=9,
            xf_width=24,
            xf_layers=2,
            xf_heads=3,
        ),
        (12, 20),
    ),
}


def random_weights(name: str) -> dict[str, np.ndarray]:
    """Return a state dict in torch's layout without zeros; a new model has many."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    config, _ = VARIANTS[name]
    state_dict = {}
    for key, shape in sorted(released_shapes(glide.weights.abstract_params(config)).items()):
        z = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            state_dict[key] = z / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            state_dict[key] = 1 + z / 8 if key.endswith("weight") else z / 8
    return state_dict


def random_inputs(name: str) -> dict[str, np.ndarray]:
    """Return a batch of two in torch's layout; the second has no caption."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    config, (height, width) = VARIANTS[name]
    inputs = {
        "x": rng.standard_normal((2, 3, height, width), np.float32),
        "timesteps": np.array([980.0, 41.5], np.float32),
    }
    if config.xf_width:
        inputs["tokens"] = rng.integers(0, config.n_vocab, (2, config.text_ctx), np.int32)
        inputs["mask"] = (rng.random((2, config.text_ctx)) < 0.6) & np.array([[True], [False]])
    if config.upsamples:
        inputs["low_res"] = rng.standard_normal((2, 3, height // 4, width // 2), np.float32)
    if config.inpaints:
        inputs["inpaint_image"] = rng.standard_normal((2, 3, height, width), np.float32)
        inputs["inpaint_known"] = np.float32(rng.random((2, 1, height, width)) < 0.5)
    return inputs


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_of_any_size_equals_the_original(name):
    config, _ = VARIANTS[name]
    state_dict, inputs = random_weights(name), random_inputs(name)
    params = glide.weights.from_released(config, state_dict)
    back = glide.weights.to_released(params)
    assert back.keys() == state_dict.keys()
    assert all(np.array_equal(back[key], state_dict[key]) for key in back)

    model = glide.GLIDE(config)

    @jax.jit
    def run(params, x, timesteps, tokens=None, mask=None, **images):
        text = model.apply({"params": params}, tokens, mask, method="encode_text")
        return model.apply({"params": params}, x, timesteps, text, **images)

    channels_last = {k: nhwc(v) if v.ndim == 4 else v for k, v in inputs.items()}
    assert_close(run(params, **channels_last), nhwc(load("variants")[name]), 2e-5)
