"""An exact score for procedural scenes: which details of a caption does an image show correctly?

The method is analysis by synthesis. The border shows the background. Objects are the connected
components that differ from it. The colour of a component comes from its inner pixels; its shape and
size are those whose rendering at the same position is closest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from glide_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    coverage,
)

# An object covers at least this share of the area of the smallest rendered one.
SMALLEST = 0.4
LOOKS = tuple(product(SHAPES, SIZES))
# A pixel is covered from this share of the distance between background and object colour.
COVERED = 0.5


@dataclass(frozen=True)
class Score:
    """Which details of a scene an image shows correctly.

    Attributes:
        background: its colour.
        count: the number of objects.
        colours, shapes, sizes: each of them over all objects, whatever it is combined with.
        objects: the combination of colour, shape and size of every object.
        relation: the relative position of two objects; True if the caption names none.
    """

    background: bool
    count: bool
    colours: bool
    shapes: bool
    sizes: bool
    objects: bool
    relation: bool

    @property
    def all(self) -> bool:
        """Whether the image shows the whole caption."""
        return self.background and self.count and self.objects and self.relation


def score(image: np.ndarray, scene: Scene) -> Score:
    """Compare an image, `(S, S, 3)` uint8, with the caption of a scene.

    Positions count only if the caption names a relation.
    """
    seen = look(image)

    def all_agree(detail: Callable[[SceneObject], Any]) -> bool:
        return sorted(map(detail, seen.objects)) == sorted(map(detail, scene.objects))

    return Score(
        background=seen.background == scene.background,
        count=len(seen.objects) == len(scene.objects),
        colours=all_agree(lambda item: item.colour),
        shapes=all_agree(lambda item: item.shape),
        sizes=all_agree(lambda item: item.size),
        objects=all_agree(lambda item: (item.colour, item.shape, item.size)),
        relation=not scene.relation or _related(seen.objects, scene),
    )


def look(image: np.ndarray) -> Scene:
    """Return the scene that an image, `(S, S, 3)` uint8, shows, without a relation.

    Raises:
        ValueError: the image has another shape or dtype.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"an image must be (S, S, 3) uint8, not {image.shape} {image.dtype}")
    # scipy takes a while to import, and only evaluation needs it.
    from scipy import ndimage

    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    away = np.linalg.norm(pixels - ground, axis=-1)
    least = min(np.linalg.norm(ground - np.array(c, np.float32)) for c in COLOURS.values())
    # scipy declares one of several return types; without `output` it is this pair.
    components: Any = ndimage.label(away > COVERED * least)
    labels, count = components
    scene_objects = [_object(pixels, ground, labels == i + 1) for i in range(count)]
    return Scene(background, tuple(each for each in scene_objects if each is not None))


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: np.linalg.norm(colour - np.array(names[name], np.float32)))


def _object(pixels: np.ndarray, ground: np.ndarray, component: np.ndarray) -> SceneObject | None:
    """Return the object that a connected component shows; None for a speck."""
    size = len(component)
    if component.sum() < SMALLEST * min(_template(*look)[1] for look in LOOKS) * size**2:
        return None
    # Pixels at the edge mix with the background: only the inner ones have the object's colour.
    away = np.linalg.norm(pixels - ground, axis=-1) * component
    inner = away >= np.quantile(away[component], 0.6)
    colour_name = _nearest(np.median(pixels[inner], axis=0), COLOURS)
    # The covered share of a pixel: how far its colour is from the background towards the object's.
    way = np.median(pixels[inner], axis=0) - ground
    near = _dilated(component)
    cover = np.clip(((pixels - ground) @ way) / (way @ way), 0, 1) * near
    rows, columns = np.indices(cover.shape) + 0.5
    centre = np.array([(cover * columns).sum(), (cover * rows).sum()]) / cover.sum() / size

    def misfit(look: tuple[str, str]) -> float:
        return float(((coverage(_placed(look, centre, colour_name), size) - cover) ** 2).sum())

    return _placed(min(LOOKS, key=misfit), centre, colour_name)


@cache
def _template(shape: str, size: str) -> tuple[tuple[float, float], float]:
    """Return a shape's centre of mass, relative to its centre, and its area, in sides."""
    cover = coverage(SceneObject(shape, "red", size), 128)
    rows, columns = (np.indices(cover.shape) + 0.5) / 128 - 0.5
    mass = cover.sum()
    return ((cover * columns).sum() / mass, (cover * rows).sum() / mass), mass / 128**2


def _placed(look: tuple[str, str], centre: np.ndarray, colour: str) -> SceneObject:
    """Return an object of a shape and size, with its centre of mass at `centre`."""
    (dx, dy), _ = _template(*look)
    return SceneObject(look[0], colour, look[1], float(centre[0] - dx), float(centre[1] - dy))


def _dilated(component: np.ndarray) -> np.ndarray:
    """Return a component with the pixels around it, which hold its soft edge."""
    from scipy import ndimage

    return ndimage.binary_dilation(component, iterations=2)


def _related(seen: tuple[SceneObject, ...], scene: Scene) -> bool:
    """Whether two objects have the relation of the caption."""
    wanted = [(scene_object.colour, scene_object.shape) for scene_object in scene.objects]
    by_look = {(scene_object.colour, scene_object.shape): scene_object for scene_object in seen}
    if len(seen) != 2 or any(look not in by_look for look in wanted):
        return False
    first, second = (by_look[look] for look in wanted)
    across, down = first.x - second.x, first.y - second.y
    dx, dy = RELATIONS[scene.relation]
    # On the correct side, and further apart along the relation than across it.
    along, aside = (across * dx, down) if dx else (down * dy, across)
    return along > abs(aside)


def rates(scores: list[Score]) -> dict[str, float]:
    """Return the share of images that show each detail correctly."""
    names = (*Score.__dataclass_fields__, "all")
    return {name: float(np.mean([getattr(s, name) for s in scores])) for name in names}


def mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with one word of its caption changed, which a scorer must reject."""
    first = scene.objects[0]
    kinds = [("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)]
    field, names = kinds[rng.integers(len(kinds))]
    others = [name for name in names if name != getattr(first, field)]
    changed = replace(first, **{field: others[rng.integers(len(others))]})
    equal = not scene.relation
    objects = tuple(
        replace(changed, x=scene_object.x, y=scene_object.y) if equal or i == 0 else scene_object
        for i, scene_object in enumerate(scene.objects)
    )
    return replace(scene, objects=objects)
