"""Choices that depend on the machine: devices, 32 bits, dtype of the trunk, compilation cache."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from glide_jax.errors import GlideError, UsageError, one_line
from glide_jax.folders import cache_folder

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# The variable that says what the dtype "auto" is, whatever the device.
AUTO_DTYPE = "GLIDE_JAX_DTYPE"


def prepare_process(*, dry_run: bool = False) -> None:
    """Prepare this process for a command: its devices, 32 bits, and the compilation cache.

    Args:
        dry_run: whether the command compiles for a TPU that is not there.

    Raises:
        GlideError: jax finds no device.
    """
    if jax.config.values["jax_enable_x64"]:
        jax.config.update("jax_enable_x64", False)
        print("note: JAX_ENABLE_X64 is ignored: glide-jax computes in 32 bits", file=sys.stderr)
    find_devices(dry_run=dry_run)
    enable_compilation_cache()


def find_devices(*, dry_run: bool = False) -> list[jax.Device]:
    """Return the devices of this process.

    Args:
        dry_run: whether the TPU compiler will be used without a TPU.

    Raises:
        GlideError: jax finds none.
    """
    if not dry_run and not os.environ.get("JAX_PLATFORMS") and not has_tpu():
        _leave_out_tpu()
    _add_threads()
    try:
        return jax.local_devices()
    # An AssertionError: a platform in JAX_PLATFORMS whose plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        wanted = f" for JAX_PLATFORMS={platforms}" if platforms else ""
        why = one_line(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        raise GlideError(
            f"jax finds no device{wanted}{f' ({why})' if why else ''}: unset JAX_PLATFORMS, set it "
            "to cpu, or install jax for the device"
        ) from None


def preferred_devices() -> list[jax.Device]:
    """Return the devices of this process on which images are generated, the default device first.

    The setting `jax_default_device`, a device or the name of a platform, chooses that device; the
    others are of the same platform. Without it they are all devices, in the order of jax.

    Raises:
        GlideError: jax finds none.
    """
    devices, default = find_devices(), jax.config.values["jax_default_device"]
    if default is None:
        return devices
    if isinstance(default, str):
        return jax.local_devices(backend=default)
    peers = jax.local_devices(backend=default.platform)
    return [default, *(device for device in peers if device != default)]


def has_tpu() -> bool:
    """Whether this machine has a TPU, or its environment names one."""
    named = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "TPU_NAME")
    if any(os.environ.get(name) for name in (*named, "CLOUD_TPU_TASK_ID", "COLAB_TPU_ADDR")):
        return True
    chips = (*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"))
    return bool(chips) or any(map(_is_google, Path("/sys/bus/pci/devices").glob("*/vendor")))


def _is_google(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == "0x1ae0"
    except OSError:
        return False


def _leave_out_tpu() -> None:
    """Keep jax from starting libtpu, which without a TPU fills the terminal with its errors.

    jax offers no other way that leaves the platforms of a GPU as they are. If
    jax drops this private attribute, libtpu's errors are printed and nothing else changes.
    """
    from jax._src import xla_bridge

    if not getattr(xla_bridge, "_backends", None):
        getattr(xla_bridge, "_backend_factories", {}).pop("tpu", None)


def in_32_bits(function: F) -> F:
    """Make a function, or a generator, compute in 32 bits whatever `jax_enable_x64` says.

    With x64 on, the random numbers differ, and a seed gives other images.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any, **named: Any) -> Iterator[Any]:
            inner = function(*arguments, **named)
            while True:
                with jax.enable_x64(False):
                    try:
                        value = next(inner)
                    except StopIteration:
                        return
                yield value

        return generator  # type: ignore[return-value]

    @functools.wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        with jax.enable_x64(False):
            return function(*arguments, **named)

    return plain  # type: ignore[return-value]


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


def _add_threads() -> None:
    """Give the CPU more threads than virtual devices, before jax starts it.

    In a collective each device occupies a thread until all have come. With as many threads as
    devices, any other task could take one, and the collective would wait forever.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if count := re.search(r"xla_force_host_platform_device_count=(\d+)", flags):
        os.environ.setdefault("PJRT_NPROC", str(2 * int(count[1])))


def trunk_dtype(name: str = "auto", device: jax.Device | None = None) -> jnp.dtype:
    """Return the dtype of a name; "auto" depends on the device.

    "auto" is the variable `GLIDE_JAX_DTYPE`, if set. Otherwise it is bfloat16 on TPUs, on GPUs
    with units for it (see `computes_bfloat16`), and on a CPU with them (AMX) as the only device,
    float16 on older GPUs, float32 on other CPUs.

    Args:
        device: by default the first of `preferred_devices`.

    Raises:
        UsageError: an unknown name.
        GlideError: jax finds no device.
    """
    if name == "auto" and (chosen := os.environ.get(AUTO_DTYPE) or "auto") != "auto":
        if chosen not in DTYPES:
            raise UsageError(f"{AUTO_DTYPE}={chosen}: choose auto, {', '.join(DTYPES)}")
        name = chosen
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    target = preferred_devices()[0] if device is None else device
    if target.platform == "tpu":
        return jnp.bfloat16
    if target.platform in ("gpu", "cuda", "rocm"):
        capability = str(getattr(target, "compute_capability", ""))
        return jnp.bfloat16 if computes_bfloat16(capability) else jnp.float16
    # A batch that is split over several devices gains nothing: see `models/cpu_products.py`.
    fast = "amx_bf16" in cpu_features() and jax.device_count() == 1
    return jnp.bfloat16 if fast else jnp.float32


def computes_bfloat16(capability: str) -> bool:
    """Whether a GPU has units for bfloat16, by its `compute_capability` in jax.

    NVIDIA GPUs from 8.0 on ("8.6"); AMD GPUs CDNA ("gfx908", "gfx90a", "gfx942", "gfx950") and from
    RDNA3 on ("gfx1100"). Unknown ones count as newer ones.
    """
    if amd := re.match(r"gfx(\d+)([0-9a-f])([0-9a-f])", capability):
        generation, model = int(amd[1]), amd[2] + amd[3]
        return generation >= 11 or (generation == 9 and (model in ("08", "0a") or model >= "40"))
    number = re.match(r"\d+", capability)
    return number is None or int(number[0]) >= 8


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return the features of this CPU, by their names in Linux; elsewhere none are known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def fast_compile_options() -> dict[str, Any] | None:
    """Return `compiler_options` for a program that runs once.

    A CPU takes far longer to compile the sampling of some hundred arrays well than to sample them.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
