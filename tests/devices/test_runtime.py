"""Choices that depend on the machine."""

import os
import subprocess
import sys

from tests.support.commands import ROOT, environment

LOADED = """
import jax, jax.numpy as jnp
jnp.ones(3) + 1  # Before it, jax has decided that there is no cache.
import glide_jax as glide
glide.load("emoji64", upsampler="none")
jax.jit(lambda x: x * 3)(jnp.ones(5))
"""


def test_loading_a_pipeline_turns_the_compilation_cache_on(tmp_path):
    mine = tmp_path / "mine"
    for folder, extra in (
        (tmp_path / "home" / "xla", {}),
        (mine, {"JAX_COMPILATION_CACHE_DIR": str(mine)}),
    ):
        variables = environment() | {"GLIDE_JAX_CACHE": str(tmp_path / "home")} | extra
        subprocess.run([sys.executable, "-c", LOADED], env=variables, cwd=ROOT, check=True)
        assert any("lambda" in name for name in os.listdir(folder))
