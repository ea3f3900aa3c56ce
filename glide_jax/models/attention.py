"""Attention, in its plain form or as the fused kernel of cuDNN."""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn

HALF = (jnp.bfloat16, jnp.float16)
# The limit of cuDNN on GPUs before Hopper.
MAX_HEAD = 128

# The platform that programs are traced for, "cpu", "cuda" or "tpu", in `with compile_for("cuda"):`.
# Elsewhere it is that of the default device. jax traces a jitted function again for each value.
compile_for = jax.make_user_context(None)


def has_fused_attention() -> bool:
    """Return whether traced programs are for a GPU with fused attention: CUDA from sm80 on."""
    if compile_for.value is not None:
        return compile_for.value == "cuda"
    device = jax.config.values["jax_default_device"]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    # A GPU of AMD has a capability like "gfx90a".
    capability = str(getattr(device, "compute_capability", ""))
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0


def is_fused(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """Return whether `attend` uses the fused kernel for these arguments."""
    lengths = query.shape[1], key.shape[1], query.shape[-1]
    return (
        query.dtype in HALF
        and mask is None
        and query.shape[-1] <= MAX_HEAD
        # cuDNN needs this of the head. Lengths of the UNet have it too; odd ones are left alone.
        and all(n % 8 == 0 for n in lengths)
        and has_fused_attention()
    )


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` with the softmax in float32.

    In bfloat16 and float16 on CUDA GPUs from sm80 on, without a mask, this is one kernel of cuDNN,
    which does not write the logits to memory (FlashAttention, 2205.14135). Both forms are equal up
    to rounding.

    Args:
        query: `(B, T, heads, d)`.
        key, value: `(B, S, heads, d)`.
        mask: boolean, broadcast to `(B, heads, T, S)`; False positions are ignored.

    Returns:
        `(B, T, heads * d)` in the dtype of `query`.
    """
    if is_fused(query, key, mask):
        out = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return out.reshape(*out.shape[:2], -1)
    # Scaling both sides by d^(-1/4) keeps the products inside the range of float16.
    scale = jnp.asarray(query.shape[-1] ** -0.25, query.dtype)
    logits = jnp.einsum("bthd,bshd->bhts", query * scale, key * scale)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e10)
    weights = nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("bhts,bshd->bthd", weights, value)
    return out.reshape(*out.shape[:2], -1)


def split_heads(x: jax.Array, heads: int, parts: int) -> list[jax.Array]:
    """Split a packed projection into query, key and value, or into key and value.

    `(B, L, heads * parts * d)` becomes `parts` arrays `(B, L, heads, d)`. The heads are the outer
    axis of the packing, as in OpenAI's weights.
    """
    x = x.reshape(*x.shape[:2], heads, parts, -1)
    return [x[:, :, :, i] for i in range(parts)]
