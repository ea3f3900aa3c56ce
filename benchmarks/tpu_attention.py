"""What attention moves on a TPU, compiled without one: python -m benchmarks.tpu_attention

It compiles the attention of the 32x32 level of the released base model (1,024 pixels, 128 tokens of
text, 6 heads of 64, bfloat16) for 16 images and one chip, in the plain form and with the kernel of
`glide_jax.models.tpu_attention`, and prints the bytes that the compiler counts. Nothing runs. It
needs the TPU compiler: pip install '.[tpu]'.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from glide_jax.devices.hardware import parse_slice
from glide_jax.errors import one_line_errors
from glide_jax.models.attention import attend
from glide_jax.models.platform import compile_for
from glide_jax.training.dry_run import slice_devices

IMAGES, PIXELS, TOKENS, HEADS, HEAD = 16, 1024, 128, 6, 64


def moved(chip: jax.Device, kernel: bool) -> tuple[float, float]:
    """Return MiB read and written, and MiB of temporaries."""
    # Heads side by side, as the linear layers before it return them.
    query, key = (
        jax.ShapeDtypeStruct(
            (IMAGES, length, HEADS * HEAD), jnp.bfloat16, sharding=SingleDeviceSharding(chip)
        )
        for length in (PIXELS, PIXELS + TOKENS)
    )

    def attention(*arrays: jax.Array) -> jax.Array:
        return attend(*(a.reshape(*a.shape[:2], HEADS, HEAD) for a in arrays))

    with compile_for("tpu" if kernel else "cpu"):
        compiled = jax.jit(attention).lower(query, key, key).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return cost["bytes accessed"] / 2**20, memory.temp_size_in_bytes / 2**20


def main() -> None:
    """Print both forms for a TPU generation: v5e, or the one that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else "v5e"
    with one_line_errors("stopped"):
        chip = slice_devices(parse_slice(f"{name}:1x1"))[0]
        for kernel in (False, True):
            found, temporaries = moved(chip, kernel)
            form = "kernel" if kernel else "plain form"
            print(f"{name} {form}: {found:.0f} MiB moved, {temporaries:.0f} MiB of temporaries")


if __name__ == "__main__":
    main()
