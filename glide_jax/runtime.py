"""Choices that depend on the machine: dtype of the trunk, the compilation cache."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from glide_jax.errors import UsageError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def cache_folder() -> Path:
    """The user's cache folder of this package: `$GLIDE_JAX_CACHE`, or below `$XDG_CACHE_HOME`."""
    if explicit := os.environ.get("GLIDE_JAX_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glide_jax"


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that only the first run compiles.

    Left alone where `JAX_COMPILATION_CACHE_DIR` is set, and where the folder cannot be made.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            # A read-only home costs time, not results.
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def trunk_dtype(name: str = "auto") -> jnp.dtype:
    """The dtype that a name stands for; "auto" asks the default device.

    bfloat16 on TPUs and on GPUs that multiply it (compute capability 8.0 on), float16 on
    older GPUs, float32 on CPUs.

    Raises:
        UsageError: an unknown name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    device = jax.devices()[0]
    if device.platform == "tpu":
        return jnp.bfloat16
    if device.platform in ("gpu", "cuda"):
        capability = float(getattr(device, "compute_capability", 8.0))
        return jnp.bfloat16 if capability >= 8.0 else jnp.float16
    return jnp.float32
