"""Where arrays lie on the devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from glide_jax.devices import placement, runtime
from glide_jax.devices.placement import OHWI, Placement
from glide_jax.devices.runtime import trunk_dtype
from tests.support.commands import run


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


DEFAULTS = """
import jax, numpy as np
from glide_jax.devices.placement import Placement, chosen_devices

first, second = jax.devices()
jax.config.update("jax_default_device", second)
one = Placement(1)
arrays = one.replicate(np.ones(2)), one.split(np.ones(2)), one.put_weights(np.ones(2))
assert {d for array in arrays for d in array.devices()} == set(one.mesh.devices.flat) == {second}
assert one.put_weights(arrays[0]) is arrays[0]
assert chosen_devices("all") == [second, first]
assert one.replicate(np.ones(2)).devices() == {second}
assert Placement("all").split(np.ones(2)).devices() == {first, second}
jax.config.update("jax_default_device", "cpu")
assert chosen_devices(1) == [first]
"""


def test_arrays_and_mesh_follow_the_default_device():
    result = run("-c", DEFAULTS, devices=2)
    assert result.returncode == 0, result.stderr


def test_the_dtype_and_the_platform_follow_the_default_device(monkeypatch):
    monkeypatch.delenv("GLIDE_JAX_DTYPE")
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    cpus = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: cpus if backend else [gpu])
    monkeypatch.setattr(runtime, "cpu_features", set)
    assert trunk_dtype() == jnp.bfloat16
    with jax.default_device(cpus[0]):
        assert trunk_dtype() == jnp.float32 and Placement().platform == "cpu"
