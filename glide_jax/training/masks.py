"""Which part of a picture an inpainting model is shown in training."""

import jax
import jax.numpy as jnp

# GLIDE (sec. 4.3) erases "random regions" and says no more: rectangles and brush strokes.
RECTANGLES, STROKES, POINTS = 3, 2, 4
# Of the masks, as many keep what others erase: so that a picture can be continued around an object.
OUTSIDE = 1 / 8


def random_mask(key: jax.Array, *, size: int, share_all: float = 0.0) -> jax.Array:
    """`(size, size, 1)` float32, 1 where the picture stays known.

    One to three rectangles, with sides from an eighth to three quarters of the picture, or one or
    two brush strokes of a few straight pieces are erased; or, at a chance of an eighth, all but
    these; at a chance of `share_all`, everything.
    """
    kind_key, box_key, stroke_key, outside_key, all_key = jax.random.split(key, 5)
    boxes = _rectangles(box_key, size)
    strokes = _strokes(stroke_key, size)
    erased = jnp.where(jax.random.bernoulli(kind_key), boxes, strokes)
    erased = erased ^ jax.random.bernoulli(outside_key, OUTSIDE)
    erased = erased | (jax.random.uniform(all_key) < share_all)
    return 1 - erased[..., None].astype(jnp.float32)


def _grid(size: int) -> jax.Array:
    """`(size, size, 2)`: centres of pixels, in [0, 1]."""
    centres = (jnp.arange(size) + 0.5) / size
    return jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), axis=-1)


def _rectangles(key: jax.Array, size: int) -> jax.Array:
    count_key, side_key, place_key = jax.random.split(key, 3)
    side = jax.random.uniform(side_key, (RECTANGLES, 2), minval=1 / 8, maxval=3 / 4)
    corner = jax.random.uniform(place_key, (RECTANGLES, 2)) * (1 - side)
    grid = _grid(size)[:, :, None]
    inside = ((grid >= corner) & (grid < corner + side)).all(axis=-1)
    drawn = jnp.arange(RECTANGLES) < jax.random.randint(count_key, (), 1, RECTANGLES + 1)
    return (inside & drawn).any(axis=-1)


def _strokes(key: jax.Array, size: int) -> jax.Array:
    count_key, point_key, width_key = jax.random.split(key, 3)
    points = jax.random.uniform(point_key, (STROKES, POINTS, 2))
    radius = jax.random.uniform(width_key, (STROKES,), minval=1 / 24, maxval=1 / 8)
    start, along = points[:, :-1], points[:, 1:] - points[:, :-1]
    to = _grid(size)[:, :, None, None] - start
    # The nearest place on each straight piece.
    where = (to * along).sum(-1) / jnp.maximum((along**2).sum(-1), 1e-6)
    distance = jnp.linalg.norm(to - jnp.clip(where, 0, 1)[..., None] * along, axis=-1)
    drawn = jnp.arange(STROKES) < jax.random.randint(count_key, (), 1, STROKES + 1)
    return ((distance < radius[:, None]).any(axis=-1) & drawn).any(axis=-1)
