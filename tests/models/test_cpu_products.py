"""Layers in bfloat16 on a CPU, as products of matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import glide_jax as glide
from glide_jax.models import cpu_products
from glide_jax.models.layers import Conv3x3, dense
from glide_jax.models.platform import compile_for, split_axes
from glide_jax.models.precision import cast_trunk
from glide_jax.models.unet import GLIDE, init_params
from tests.support.commands import TINY, first_weights, make_weights

HALF = jnp.bfloat16
# The spacing of bfloat16 below 1: a result may be rounded once in each of two forms.
ROUNDING = 2.0**-8


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(HALF)


def plain_convolution(x, kernel):
    axes = ("NHWC", "HWIO", "NHWC")
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1),) * 2, dimension_numbers=axes)


def assert_rounded(found, wanted):
    """Compare with float32 results, up to the rounding of the largest."""
    assert found.dtype == HALF
    wanted = np.asarray(wanted)
    error = np.abs(np.asarray(found, np.float32) - wanted).max()
    assert error <= ROUNDING * np.abs(wanted).max()


# One block for the batch; for two images; for three rows of an image; for one row.
@pytest.mark.parametrize(
    ("rows_that_fit", "blocks"), [(10**6, 0), (2 * 8, 2), (5, 8), (1, 24)], ids=str
)
def test_blocks_of_images_or_rows_give_the_same_convolution(rows_that_fit, blocks, monkeypatch):
    x, kernel = random(0, 4, 6, 5, 32), random(1, 3, 3, 32, 40)
    monkeypatch.setattr(cpu_products, "BLOCK_BYTES", rows_that_fit * 4 * 9 * 40 * (5 + 2))
    convolve = jax.jit(lambda x, kernel: cpu_products.arrange_and_convolve(x, kernel))
    assert_rounded(convolve(x, kernel), plain_convolution(x, kernel))
    program = str(jax.make_jaxpr(lambda x, k: cpu_products.arrange_and_convolve(x, k))(x, kernel))
    assert ("scan" in program) == bool(blocks)
    assert not blocks or f"length={blocks}" in program


def test_gradients_are_those_of_float32():
    x, kernel, matrix = random(0, 2, 6, 5, 32), random(1, 3, 3, 32, 40), random(2, 32, 40)
    seed = random(3, 2, 6, 5, 40)

    def gradients(layer, *arrays):
        total = lambda *arrays: (layer(*arrays) * seed.astype(arrays[0].dtype)).sum()  # noqa: E731
        return jax.grad(total, (0, 1))(*arrays)

    for ours, plain, weights in (
        (cpu_products.arrange_and_convolve, plain_convolution, kernel),
        (cpu_products.matmul, jnp.matmul, matrix),
    ):
        found = gradients(ours, x, weights)
        wanted = gradients(plain, x.astype(jnp.float32), weights.astype(jnp.float32))
        for gradient, reference in zip(found, wanted, strict=True):
            assert_rounded(gradient, reference)


def test_layers_use_them_in_bfloat16_on_a_cpu_for_enough_channels(monkeypatch):
    used = []
    for name in ("arrange_and_convolve", "matmul"):
        function = getattr(cpu_products, name)
        spy = lambda *a, f=function, n=name: used.append(n) or f(*a)  # noqa: E731
        monkeypatch.setattr(cpu_products, name, spy)

    def run(layer, channels, platform="cpu"):
        used.clear()
        with compile_for(platform):
            x = jnp.ones((1, 4, 4, channels), layer.dtype)
            jax.eval_shape(layer.init, jax.random.key(0), x)
        return used

    assert run(Conv3x3(8, HALF), 32) == ["arrange_and_convolve"] and run(
        dense(8, HALF, "a"), 32
    ) == ["matmul"]
    assert not run(Conv3x3(8, HALF), 31) and not run(Conv3x3(8, HALF, stride=2), 32)
    assert not run(Conv3x3(8, jnp.float32), 32) and not run(dense(8, jnp.float32, "a"), 32)
    assert not run(Conv3x3(8, HALF), 32, "cuda") and not run(dense(8, HALF, "a"), 32, "tpu")


def test_a_batch_that_xla_splits_keeps_the_plain_form(monkeypatch):
    assert cpu_products.is_supported(random(0, 1, 32))
    mesh = jax.sharding.AbstractMesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert split_axes() == ("devices",) and not cpu_products.is_supported(random(0, 1, 32))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert split_axes() is None and not cpu_products.is_supported(random(0, 1, 32))


def test_arranged_kernels_give_the_same_outputs():
    config = replace(TINY, channel_mult=(1, 2), num_res_blocks=2)
    model = GLIDE(config, HALF)
    params = first_weights(init_params, model, 0)
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params)
    cast = cast_trunk(moved, HALF)
    arranged = cpu_products.arrange_kernels(cast)
    assert isinstance(arranged["unet"]["up_2_up"]["conv_1"]["kernel"], cpu_products.Kernel)
    tokens = jnp.zeros((2, config.text_ctx), jnp.int32)
    text = model.apply({"params": moved}, tokens, tokens > 0, method=GLIDE.encode_text)
    x, t = jax.random.normal(jax.random.key(2), (2, 16, 16, 3)), jnp.array([3.0, 700.0])
    plain, found = (np.asarray(model.apply({"params": p}, x, t, text)) for p in (cast, arranged))
    np.testing.assert_array_equal(found, plain)
    wanted = np.asarray(GLIDE(config).apply({"params": moved}, x, t, text))
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_pipelines_arrange_kernels_once(tmp_path):
    folder = make_weights(tmp_path / "weights")

    def kernel(params):
        return params["unet"]["mid_res_1"]["conv_1"]["kernel"]

    for dtype, kind in (("bfloat16", cpu_products.Kernel), ("float32", jax.Array)):
        pipe = glide.load(folder, dtype=dtype)
        assert isinstance(kernel(pipe.network.params), kind)
        # What is exported and trained further stays as it is.
        assert kernel(pipe.model.params).shape[:2] == (3, 3)
