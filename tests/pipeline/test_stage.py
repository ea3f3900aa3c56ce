"""One model of the cascade."""

import jax.numpy as jnp
import numpy as np
import pytest

from glide_jax.pipeline.stage import Stage
from glide_jax.weights.registry import load_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_the_trunk_have_its_dtype(dtype):
    model = load_model("emoji64")
    unet = Stage(model, dtype).network.params["unet"]
    assert unet["mid_attn"]["qkv"]["kernel"].dtype == jnp.dtype(dtype)
    assert unet["mid_attn"]["norm"]["norm"]["scale"].dtype == jnp.float32
    assert unet["head"]["kernel"].dtype == jnp.float32
    assert model.params["unet"]["mid_attn"]["qkv"]["kernel"].dtype == np.float32
