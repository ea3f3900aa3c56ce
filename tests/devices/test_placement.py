"""Where arrays lie on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from glide_jax.devices import placement
from glide_jax.devices.placement import OHWI, Placement


@pytest.fixture
def params():
    random = np.random.default_rng(0)
    kernel = random.standard_normal((3, 3, 8, 16), np.float32)
    return {"a": {"kernel": kernel.astype(jnp.bfloat16)}, "b": {"kernel": kernel}}


def test_other_devices_than_gpus_keep_their_kernels(params):
    params = Placement().replicate(params)
    assert Placement().lay_out_kernels(params) is params


def test_the_order_in_memory_of_kernels_in_16_bits(monkeypatch, params):
    """A CPU can have this order too: the numbers stay the same, and the program adapts."""
    monkeypatch.setattr(placement, "GPU_PLATFORMS", ("cpu",))
    before = Placement().replicate(params)
    after = Placement().lay_out_kernels(before)
    assert after["a"]["kernel"].format.layout.major_to_minor == OHWI.major_to_minor
    assert after["b"]["kernel"] is before["b"]["kernel"]
    np.testing.assert_array_equal(after["a"]["kernel"], params["a"]["kernel"])
    x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)

    @jax.jit
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    wanted = convolve(x, before["a"]["kernel"])
    np.testing.assert_array_equal(convolve(x, after["a"]["kernel"]), wanted)
