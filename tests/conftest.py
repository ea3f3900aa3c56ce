"""Every test runs on the CPU unless told otherwise, with matrix products in full float32."""

import os

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def full_precision():
    """TPUs and GPUs would otherwise multiply in bfloat16 or TF32: 1e-2 away from the references."""
    jax.config.update("jax_default_matmul_precision", "highest")
