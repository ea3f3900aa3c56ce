"""Choices that depend on the machine: the dtype of the trunk and the compilation cache."""

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from glide_jax.errors import UsageError
from glide_jax.folders import cache_folder

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder: only the first run compiles.

    The commands and `glide_jax.load` call it.

    Does nothing where `JAX_COMPILATION_CACHE_DIR` is set, or where the folder cannot be created.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            # With a read-only home each run compiles; results are the same.
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # jax decides at its first compilation whether there is a cache; now it decides again.
        compilation_cache.reset_cache()
    # All programs: some sixty small ones take a second or two together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def trunk_dtype(name: str = "auto") -> jnp.dtype:
    """Return the dtype of a name; "auto" depends on the default device.

    "auto" is bfloat16 on TPUs and on GPUs of compute capability 8.0 or higher, float16 on older
    GPUs, float32 on CPUs.

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
