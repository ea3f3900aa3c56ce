"""`glide-jax env`: what a bug report needs to know about this machine."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import jax

import glide_jax
from glide_jax.devices.runtime import AUTO_DTYPE, find_devices, trunk_dtype
from glide_jax.errors import GlideError, UsageError
from glide_jax.folders import cache_folder, package_version
from glide_jax.weights.registry import EMBEDDED, EMBEDDED_CLIPS

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
)
USAGE = """usage: glide-jax env [-h]

Print what a bug report needs: the versions of glide-jax, Python and the packages it uses; the
devices, and the dtype of the trunk on them; the cache folder; the embedded weights; and the
variables that change how jax works. It takes no other options."""
VARIABLES = (
    AUTO_DTYPE,
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_ENABLE_X64",
    "JAX_COMPILATION_CACHE_DIR",
)


def describe_environment() -> str:
    """Return versions, devices, cache folder and variables, one per line."""
    lines = {
        "glide-jax": f"{package_version()}, in {os.path.dirname(glide_jax.__file__)}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
    }
    lines |= {name: _version(name) for name in PACKAGES}
    try:
        find_devices()
        devices = jax.devices()
        kinds = sorted({f"{d.platform}: {d.device_kind}" for d in devices})
        lines["devices"] = f"{len(devices)} ({', '.join(kinds)})"
    except GlideError as error:
        lines["devices"] = f"none: {error}"
    else:
        try:
            lines["trunk dtype"] = f"{jax.numpy.dtype(trunk_dtype()).name} (auto)"
        except UsageError as error:
            lines["trunk dtype"] = f"none: {error}"
    lines["cache"] = str(cache_folder())
    lines["weights"] = ", ".join((*EMBEDDED, *EMBEDDED_CLIPS)) or "none are installed"
    lines |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return "\n".join(f"{name:20} {value}" for name, value in lines.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] = ()) -> None:
    """Print the environment, or the help; it takes no other options."""
    if not arguments:
        print(describe_environment())
    elif arguments[0] in ("-h", "--help"):
        print(USAGE)
    else:
        raise UsageError(f"glide-jax env takes no options, not {arguments[0]}")
