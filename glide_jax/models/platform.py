"""The platform that programs are traced for, and the choices of the layers that depend on it."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

# Inside `with compile_for("cuda"):` programs are traced for that platform: "cpu", "cuda" or "tpu",
# or in the form that is the same for all: "any". Outside they are traced for the default device.
# jax traces a jitted function again for each value.
compile_for = jax.make_user_context(None)


def fused_attention_platform() -> str:
    """Return "cuda" or "tpu" if programs are traced for a device with fused attention, else "".

    Among GPUs, only NVIDIA's of compute capability 8.0 and above count.
    """
    if compile_for.value is not None:
        return compile_for.value if compile_for.value in ("cuda", "tpu") else ""
    device = _default_device()
    if device.platform == "tpu":
        return "tpu"
    # A GPU of AMD has a capability like "gfx90a".
    capability = str(getattr(device, "compute_capability", ""))
    fused = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8.0
    return "cuda" if fused else ""


def on_cpu() -> bool:
    """Whether programs are traced for a CPU."""
    return (compile_for.value or _default_device().platform) == "cpu"


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which to ask for a product of matrices; its operands are of `dtype`.

    Sums are float32 on all devices. XLA on a CPU has fast kernels (AMX) for bfloat16 operands only
    if the result is float32 too; elsewhere a result of `dtype` saves memory traffic.
    """
    return jnp.float32 if dtype == jnp.bfloat16 and on_cpu() else dtype


def split_axes() -> tuple[str, ...] | None:
    """Return the axes of the mesh over which XLA splits batches, none of them of length 1.

    Without a mesh and with several devices they are unknown: None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return None
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Auto and mesh.shape[axis] > 1)


def _default_device() -> jax.Device:
    """Return the device that programs run on unless they are told otherwise."""
    device = jax.config.values["jax_default_device"]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device
