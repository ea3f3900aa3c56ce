"""Tests run on the CPU unless JAX_PLATFORMS is set, in float32 where they do not say otherwise."""

import os

from tests.support.quick import QUICK

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Some CPUs have units for bfloat16: there, "auto" would be bfloat16.
os.environ.setdefault("GLIDE_JAX_DTYPE", "float32")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

import jax
import pytest

# Files that take minutes: begun first, or one process would be left alone with them at the end.
LONG = (
    "test_parallel", "test_train", "test_readme", "test_notebooks", "test_recipes", "test_losses",
    "test_runner", "test_family", "test_dry_run", "test_noise_loss", "test_examples", "test_wheel",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The order in which files are handed out (`--no-loadscope-reorder`)."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def full_precision():
    """TPUs and GPUs would otherwise multiply in bfloat16 or TF32: 1e-2 away from the references."""
    jax.config.update("jax_default_matmul_precision", "highest")
    # `glide_jax.load` would fill the user's cache.
    jax.config.update("jax_enable_compilation_cache", False)
