"""Convolutions with fewer products, on a CPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glide_jax as glide
from glide_jax.models import winograd
from glide_jax.models.layers import Conv3x3
from glide_jax.models.unet import GLIDE, init_params
from tests.support.commands import TINY, first_weights, make_weights


def side_of(kernel):
    """Return the side of a kernel, or of the blocks that a transformed one computes."""
    return len(kernel.matrices) if isinstance(kernel, winograd.Kernel) else kernel.shape[0]


@pytest.mark.parametrize(("length", "tolerance"), [(4, 2e-6), (6, 3e-5)])
def test_transformed_kernels_give_the_same_convolution(length, tolerance):
    x = jax.random.normal(jax.random.key(0), (2, 16, 24, 40))
    layer = Conv3x3(48, jnp.float32)
    params = layer.init(jax.random.key(1), x)["params"]
    wanted = np.asarray(layer.apply({"params": params}, x))
    kernel = winograd.transform_kernel(params["kernel"], length)
    shapes = {u.shape for row in kernel.matrices for u in row}
    assert len(kernel.matrices) == length and shapes == {(40, 48)}
    found = np.asarray(layer.apply({"params": params | {"kernel": kernel}}, x))
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("side", "length"), [(64, 6), (66, 4), (62, 4), (68, 6), (5, 0), (1, 0)])
def test_blocks_cover_the_image(side, length):
    assert winograd.length_for(side) == length


def test_every_block_is_found_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(winograd, "F4_SIDE", 16)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 32)
    config = replace(TINY, channel_mult=(1, 2), num_res_blocks=2)
    model = GLIDE(config)
    params = first_weights(init_params, model, 0)
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params)
    changed = winograd.transform_kernels(moved, config)

    blocks = {name for name, block in moved["unet"].items() if "conv_1" in block}
    sides = {
        (name, layer): side_of(changed["unet"][name][layer]["kernel"])
        for name in blocks
        for layer in ("conv_1", "conv_2")
    }
    assert set(sides.values()) == {4, 6}
    assert sides["mid_res_1", "conv_1"] == 4 and sides["up_2_up", "conv_1"] == 6
    tokens = jnp.zeros((2, config.text_ctx), jnp.int32)
    text = model.apply({"params": moved}, tokens, tokens > 0, method=GLIDE.encode_text)
    x = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    t = jnp.array([3.0, 700.0])
    wanted, found = (np.asarray(model.apply({"params": p}, x, t, text)) for p in (moved, changed))
    assert 0 < np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_pipelines_use_them_in_float32_on_a_cpu_for_wide_networks(tmp_path, monkeypatch):
    folder = make_weights(tmp_path / "weights")
    for dtype, width, side in (("float32", 32, 4), ("float16", 32, 3), ("float32", 64, 3)):
        monkeypatch.setattr(winograd, "MIN_CHANNELS", width)
        pipe = glide.load(folder, dtype=dtype)
        assert side_of(pipe.network.params["unet"]["mid_res_1"]["conv_1"]["kernel"]) == side
        # What is exported and trained further stays as it is.
        assert side_of(pipe.model.params["unet"]["mid_res_1"]["conv_1"]["kernel"]) == 3
