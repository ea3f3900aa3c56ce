"""Does a picture show what its caption says? An exact answer, for procedural scenes.

Analysis by synthesis: the background is found at the border, things as connected parts that
differ from it, the colour of each by un-mixing, its shape and size as those whose own drawing
at that place comes closest.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from glide_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    coverage,
)

# Things cover at least this share of the area of the smallest drawn one.
SMALLEST = 0.4
LOOKS = tuple(product(SHAPES, SIZES))
# Of the distance between the background and a thing's colour, where a pixel counts as covered.
COVERED = 0.5


@dataclass(frozen=True)
class Score:
    """What a picture has right of a scene; `all` is everything at once."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    sizes: bool
    things: bool
    relation: bool

    @property
    def all(self) -> bool:
        """Whether the picture shows the caption."""
        return self.background and self.count and self.things and self.relation


def score(image: np.ndarray, scene: Scene) -> Score:
    """Compares a picture `(H, W, 3)` uint8 with what its caption says.

    Places count only where the caption speaks of them.
    """
    seen = look(image)

    def same(part) -> bool:
        return sorted(map(part, seen.things)) == sorted(map(part, scene.things))

    return Score(
        background=seen.background == scene.background,
        count=len(seen.things) == len(scene.things),
        colours=same(lambda thing: thing.colour),
        shapes=same(lambda thing: thing.shape),
        sizes=same(lambda thing: thing.size),
        things=same(lambda thing: (thing.colour, thing.shape, thing.size)),
        relation=not scene.relation or _stand(seen.things, scene),
    )


def look(image: np.ndarray) -> Scene:
    """The scene that a picture `(H, W, 3)` uint8 shows, without a relation.

    Raises:
        ValueError: it is no such picture.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"a picture must be (S, S, 3) uint8, not {image.shape} {image.dtype}")
    # scipy takes a while to import, and only evaluation needs it.
    from scipy import ndimage

    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    away = np.linalg.norm(pixels - ground, axis=-1)
    # Half of the way from the background to the nearest colour of a thing.
    least = min(np.linalg.norm(ground - np.float32(c)) for c in COLOURS.values())
    labels, count = ndimage.label(away > COVERED * least)
    things = [_thing(pixels, ground, labels == i + 1) for i in range(count)]
    return Scene(background, tuple(thing for thing in things if thing is not None))


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: np.linalg.norm(colour - np.float32(names[name])))


def _thing(pixels: np.ndarray, ground: np.ndarray, part: np.ndarray) -> Thing | None:
    """What a connected part is; None of a speck."""
    size = len(part)
    if part.sum() < SMALLEST * min(_template(*look)[1] for look in LOOKS) * size**2:
        return None
    # The part's inner pixels have its colour unmixed.
    away = np.linalg.norm(pixels - ground, axis=-1) * part
    inner = away >= np.quantile(away[part], 0.6)
    colour_name = _nearest(np.median(pixels[inner], axis=0), COLOURS)
    # Its cover of each pixel: how far that is on the way to the thing's colour.
    way = np.median(pixels[inner], axis=0) - ground
    near = _grown(part)
    cover = np.clip(((pixels - ground) @ way) / (way @ way), 0, 1) * near
    rows, columns = np.indices(cover.shape) + 0.5
    centre = np.array([(cover * columns).sum(), (cover * rows).sum()]) / cover.sum() / size

    def misfit(look: tuple[str, str]) -> float:
        return float(((coverage(_placed(look, centre, colour_name), size) - cover) ** 2).sum())

    return _placed(min(LOOKS, key=misfit), centre, colour_name)


@cache
def _template(shape: str, size: str) -> tuple[tuple[float, float], float]:
    """Where the centre of mass of a shape lies from its centre, and its area; in sides."""
    cover = coverage(Thing(shape, "red", size), 128)
    rows, columns = (np.indices(cover.shape) + 0.5) / 128 - 0.5
    mass = cover.sum()
    return ((cover * columns).sum() / mass, (cover * rows).sum() / mass), mass / 128**2


def _placed(look: tuple[str, str], centre: np.ndarray, colour: str) -> Thing:
    (dx, dy), _ = _template(*look)
    return Thing(look[0], colour, look[1], float(centre[0] - dx), float(centre[1] - dy))


def _grown(part: np.ndarray) -> np.ndarray:
    """A part and the pixels around it, where its soft edge lies."""
    from scipy import ndimage

    return ndimage.binary_dilation(part, iterations=2)


def _stand(seen: tuple[Thing, ...], scene: Scene) -> bool:
    """Whether two things stand to each other as the caption says."""
    wanted = [(thing.colour, thing.shape) for thing in scene.things]
    found = {(thing.colour, thing.shape): thing for thing in seen}
    if len(seen) != 2 or any(look not in found for look in wanted):
        return False
    first, second = (found[look] for look in wanted)
    across, down = first.x - second.x, first.y - second.y
    dx, dy = RELATIONS[scene.relation]
    # On the right side, and more along the relation than across it.
    along, aside = (across * dx, down) if dx else (down * dy, across)
    return along > abs(aside)


def rates(scores: list[Score]) -> dict[str, float]:
    """The share of pictures that have each field right."""
    names = (*Score.__dataclass_fields__, "all")
    return {name: float(np.mean([getattr(s, name) for s in scores])) for name in names}


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one word of its caption changed: what a scorer must refuse."""
    thing = scene.things[0]
    kinds = [("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)]
    field, names = kinds[rng.integers(len(kinds))]
    others = [name for name in names if name != getattr(thing, field)]
    changed = replace(thing, **{field: others[rng.integers(len(others))]})
    equal = not scene.relation
    things = tuple(
        replace(changed, x=t.x, y=t.y) if equal or i == 0 else t for i, t in enumerate(scene.things)
    )
    return replace(scene, things=things)
