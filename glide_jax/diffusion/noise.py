"""The fresh noise of a sampling run: an array, or one key per image."""

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.errors import UsageError


def noise_at(noise: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sample the noise `(B, H, W, C)` of row `index` from one key per image.

    An image's noise does not depend on the rest of its batch.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape[1:]))(noise)


def is_keys(noise: jax.Array) -> bool:
    """Whether noise is one key per image, rather than the noise of every row."""
    return jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


def check_noise(noise: jax.Array, rows: int, shape: tuple[int, ...]) -> None:
    """Check that noise has one key per image, or an array for each row.

    Args:
        noise: noise of a run.
        rows: number of rows N of its plan.
        shape: `(B, H, W, C)`, the shape of its images.

    Raises:
        UsageError: it does not. Keys of `jax.random.PRNGKey` are arrays of integers, not keys.
    """
    wanted = shape[:1] if is_keys(noise) else (rows, *shape)
    if np.shape(noise) != wanted:
        what = "keys" if is_keys(noise) else str(noise.dtype)
        raise UsageError(
            f"noise is {(rows, *shape)}, one array per row, or {shape[0]} keys of jax.random.key "
            f"(not PRNGKey), one per image; this one is {np.shape(noise)} {what}"
        )
