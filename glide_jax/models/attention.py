"""Attention, in its plain form or as the fused kernel of an accelerator."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from glide_jax.models import tpu_attention
from glide_jax.models.platform import fused_attention_platform, on_cpu, product_dtype

HALF_DTYPES = (jnp.bfloat16, jnp.float16)
# The widest head that cuDNN takes on GPUs before Hopper.
CUDNN_MAX_HEAD_WIDTH = 128
# Shorter sequences have small logits, and no kernel in some versions of cuDNN.
CUDNN_MIN_LENGTH = 64
# On a CPU, XLA of jax 0.11 and later computes attention in blocks that its caches hold.
SPLITS_ON_CPU = jax.__version_info__ < (0, 11)
# Before, it is faster head by head if one head has so many logits or more,
SPLIT_HEADS_LOGITS = 2**19
# and image by image if all heads of all images have so many.
SPLIT_IMAGES_LOGITS = 2**21


def fused_kernel(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> str:
    """Return which kernel `attend` uses for these arguments: "cudnn", "pallas", or "" for none."""
    if query.dtype not in HALF_DTYPES or mask is not None:
        return ""
    lengths, head_width = (query.shape[1], key.shape[1]), query.shape[-1]
    platform = fused_attention_platform()
    if platform == "tpu":
        return "pallas" if tpu_attention.is_supported(query, key) else ""
    # cuDNN needs a head width that is a multiple of 8. The lengths of the UNet are multiples of 8
    # too. Other lengths use the plain form.
    is_supported = head_width <= CUDNN_MAX_HEAD_WIDTH and min(lengths) >= CUDNN_MIN_LENGTH
    is_supported = is_supported and all(n % 8 == 0 for n in (*lengths, head_width))
    return "cudnn" if is_supported and platform == "cuda" else ""


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Return `softmax(q k^T / sqrt(d)) v` with the softmax in float32.

    In bfloat16 and float16, without a mask, this is a single fused kernel if `fused_kernel` names
    one for the sizes: cuDNN's on CUDA GPUs from sm80 on, our own on TPUs. A fused kernel does not
    write the logits to memory (FlashAttention, 2205.14135). All forms are equal up to rounding.

    Args:
        query: `(B, T, heads, d)`.
        key, value: `(B, S, heads, d)`.
        mask: boolean, broadcast to `(B, heads, T, S)`; False positions are ignored.

    Returns:
        `(B, T, heads * d)` in the dtype of `query`.
    """
    kernel = fused_kernel(query, key, mask)
    if kernel == "cudnn":
        out = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return out.reshape(*out.shape[:2], -1)
    if kernel == "pallas":
        return _tpu_attention(query, key, value)
    if SPLITS_ON_CPU and on_cpu() and mask is None:
        logits = query.shape[1] * key.shape[1]
        if logits >= SPLIT_HEADS_LOGITS:
            return _attend_head_by_head(query, key, value)
        if query.shape[0] * query.shape[2] * logits >= SPLIT_IMAGES_LOGITS:
            images = [x[:, None] for x in (query, key, value)]
            return jax.lax.map(lambda image: _plain_attention(*image), images)[:, 0]
    return _plain_attention(query, key, value, mask)


def _attend_head_by_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute the plain form for one head of one image at a time: its logits stay in the caches."""
    scale, dtype = jnp.asarray(query.shape[-1] ** -0.25, query.dtype), product_dtype(query.dtype)

    # In products of matrices: XLA would transpose the weights of the other form.
    def attend_head(head: list[jax.Array]) -> jax.Array:
        query, key, value = head
        logits = jnp.matmul(query * scale, (key * scale).T, preferred_element_type=dtype)
        weights = nn.softmax(logits.astype(jnp.float32), axis=-1).astype(query.dtype)
        return jnp.matmul(weights, value, preferred_element_type=dtype).astype(query.dtype)

    batch, length, heads, width = query.shape
    arrays = [x.swapaxes(1, 2).reshape(batch * heads, -1, width) for x in (query, key, value)]
    out = jax.lax.map(attend_head, arrays).reshape(batch, heads, length, width)
    return out.swapaxes(1, 2).reshape(batch, length, -1)


def _plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    # Scaling both sides by d^(-1/4) keeps the products inside the range of float16.
    scale = jnp.asarray(query.shape[-1] ** -0.25, query.dtype)
    dtype = product_dtype(query.dtype)
    query, key = query * scale, key * scale
    logits = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=dtype)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e10)
    weights = nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("bhts,bshd->bthd", weights, value, preferred_element_type=dtype)
    return out.astype(query.dtype).reshape(*out.shape[:2], -1)


@jax.custom_vjp
def _tpu_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return tpu_attention.attend(query, key, value)


# The backward pass computes the logits again, in the plain form: the forward pass keeps none.
_tpu_attention.defvjp(
    lambda *arrays: (_tpu_attention(*arrays), arrays),
    lambda arrays, gradient: jax.vjp(_plain_attention, *arrays)[1](gradient),
)


def split_heads(x: jax.Array, heads: int, parts: int) -> list[jax.Array]:
    """Split a packed projection into query, key and value, or into key and value.

    `(B, L, heads * parts * d)` becomes `parts` arrays `(B, L, heads, d)`. The heads are the outer
    axis of the packing, as in OpenAI's weights.
    """
    x = x.reshape(*x.shape[:2], heads, parts, -1)
    return [x[:, :, :, i] for i in range(parts)]
