"""What a step costs."""

import math

import jax
import jax.numpy as jnp

from glide_jax.training.flops import count_flops


def product():
    return jax.jit(jnp.dot), jnp.ones((8, 16)), jnp.ones((16, 32))


def test_a_product_of_matrices_takes_a_multiplication_and_an_addition_each():
    assert count_flops(*product()) == 2 * 8 * 16 * 32


def test_what_lies_on_a_device_is_not_looked_at():
    function, a, b = product()
    a.delete()
    assert count_flops(function, a, b) == 2 * 8 * 16 * 32


def test_without_a_cpu_it_is_not_known(monkeypatch):
    def none(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    assert math.isnan(count_flops(*product()))
