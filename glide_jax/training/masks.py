"""Random masks for training an inpainting model."""

import jax
import jax.numpy as jnp

# GLIDE (sec. 4.3) erases "random regions" and states no shapes: rectangles and brush strokes here.
RECTANGLES, STROKES, POINTS = 3, 2, 4
# Share of inverted masks, so that an image can be continued around an object.
OUTSIDE = 1 / 8


def random_known(key: jax.Array, *, size: int, mask_all_share: float = 0.0) -> jax.Array:
    """Return a mask `(size, size, 1)` float32, 1 where the pixel is known.

    Unknown are one to three rectangles, with sides from an eighth to three quarters of the image,
    or one or two brush strokes of a few straight segments. An eighth of the masks are inverted, and
    a share `mask_all_share` knows no pixel.
    """
    kind_key, box_key, stroke_key, outside_key, all_key = jax.random.split(key, 5)
    boxes = _rectangles(box_key, size)
    strokes = _strokes(stroke_key, size)
    erased = jnp.where(jax.random.bernoulli(kind_key), boxes, strokes)
    erased = erased ^ jax.random.bernoulli(outside_key, OUTSIDE)
    erased = erased | (jax.random.uniform(all_key) < mask_all_share)
    return 1 - erased[..., None].astype(jnp.float32)


def _grid(size: int) -> jax.Array:
    """Return the centres of the pixels in [0, 1], `(size, size, 2)`."""
    centres = (jnp.arange(size) + 0.5) / size
    return jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), axis=-1)


def _rectangles(key: jax.Array, size: int) -> jax.Array:
    count_key, side_key, place_key = jax.random.split(key, 3)
    side = jax.random.uniform(side_key, (RECTANGLES, 2), minval=1 / 8, maxval=3 / 4)
    corner = jax.random.uniform(place_key, (RECTANGLES, 2)) * (1 - side)
    grid = _grid(size)[:, :, None]
    inside = ((grid >= corner) & (grid < corner + side)).all(axis=-1)
    used = jnp.arange(RECTANGLES) < jax.random.randint(count_key, (), 1, RECTANGLES + 1)
    return (inside & used).any(axis=-1)


def _strokes(key: jax.Array, size: int) -> jax.Array:
    count_key, point_key, width_key = jax.random.split(key, 3)
    points = jax.random.uniform(point_key, (STROKES, POINTS, 2))
    radius = jax.random.uniform(width_key, (STROKES,), minval=1 / 24, maxval=1 / 8)
    start, along = points[:, :-1], points[:, 1:] - points[:, :-1]
    to = _grid(size)[:, :, None, None] - start
    # Position of the nearest point on each segment, from 0 to 1.
    where = (to * along).sum(-1) / jnp.maximum((along**2).sum(-1), 1e-6)
    distance = jnp.linalg.norm(to - jnp.clip(where, 0, 1)[..., None] * along, axis=-1)
    used = jnp.arange(STROKES) < jax.random.randint(count_key, (), 1, STROKES + 1)
    return ((distance < radius[:, None]).any(axis=-1) & used).any(axis=-1)
