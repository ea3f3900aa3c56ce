"""Counting the floating-point operations of a step."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from glide_jax.training.config import TrainConfig
from glide_jax.training.flops import count_flops, flops_per_image
from tests.support.commands import TINY


def product():
    return jax.jit(jnp.dot), jnp.ones((8, 16)), jnp.ones((16, 32))


def test_a_product_of_matrices_counts_multiplications_and_additions():
    assert count_flops(*product()) == 2 * 8 * 16 * 32


def test_only_shapes_and_dtypes_are_used():
    function, a, b = product()
    a.delete()
    assert count_flops(function, a, b) == 2 * 8 * 16 * 32


def test_a_network_in_bfloat16_counts_as_many_as_in_float32():
    config = TrainConfig(name="x", model=TINY, diffusion_steps=4)
    wide = replace(TINY, image_size=128, model_channels=64)
    counts = [
        flops_per_image(replace(config, model=wide, dtype=d)) for d in ("float32", "bfloat16")
    ]
    # Casts count too.
    assert counts[0] < counts[1] < 1.03 * counts[0]


def test_without_a_cpu_backend_the_count_is_nan(monkeypatch):
    def none(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    assert math.isnan(count_flops(*product()))
