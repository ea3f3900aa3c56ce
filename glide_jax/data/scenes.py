"""Procedural scenes: coloured shapes whose captions can be checked exactly.

A scene has one shape, two to four equal ones, or two different ones in a relation, on a plain
background: 81,792 captions in all. A scene is generated from its number alone. So a data set of any
length needs no file, and every run and every machine has the same scenes.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 214, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (150, 150, 150), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Half the height of a shape, as a share of the height of the image.
SIZES = {"small": 0.1, "large": 0.17}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
SPLITS = ("train", "test")
# Rendered at this multiple of the size, then averaged: edges have 64 levels.
OVERSAMPLING = 8


@dataclass(frozen=True)
class SceneObject:
    """A shape of a scene.

    Attributes:
        x: centre, as a share of the width from the left.
        y: centre, as a share of the height from the top.
    """

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Scene:
    """The content of a caption, and the positions of the objects.

    Attributes:
        background: colour of the background.
        objects: one; several equal ones; or two different ones, if there is a `relation`.
        relation: where the first object is, seen from the second.
    """

    background: str
    objects: tuple[SceneObject, ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        """Text such as "a large red circle above a small blue star on a white background"."""
        first = self.objects[0]
        count = len(self.objects)
        if self.relation:
            subject = f"{_singular(first)} {self.relation} {_singular(self.objects[1])}"
        elif count > 1:
            subject = f"{NUMBERS[count]} {first.size} {first.colour} {_plural(first.shape)}"
        else:
            subject = _singular(first)
        return f"{subject} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether the scene has a combination that training never shows.

        These are a tenth of the (colour, shape) pairs, of the (shape, relation, shape) triples, and
        of the (four, colour) pairs.
        """
        keys = {f"{scene_object.colour} {scene_object.shape}" for scene_object in self.objects}
        if self.relation:
            keys.add(f"{self.objects[0].shape} {self.relation} {self.objects[1].shape}")
        elif len(self.objects) == 4:
            keys.add(f"four {self.objects[0].colour}")
        return any(_hash(key) % 10 == 0 for key in keys)


def _singular(scene_object: SceneObject) -> str:
    return f"a {scene_object.size} {scene_object.colour} {scene_object.shape}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def outline(shape: str) -> list[np.ndarray]:
    """Return the closed outlines `(N, 2)` of a shape of half-height 1; a second one is cut out."""

    def circle(radius: float) -> np.ndarray:
        angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)

    def polygon(corners: int, radii: tuple[float, ...]) -> np.ndarray:
        angle = 2 * np.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)

    a = 0.34
    plus = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
            (-1, a), (-1, -a), (-a, -a)]  # fmt: skip
    return {
        "circle": lambda: [circle(1.0)],
        "square": lambda: [np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])],
        "triangle": lambda: [polygon(3, (1.15,))],
        "star": lambda: [polygon(10, (1.15, 0.46))],
        "cross": lambda: [np.array(plus)],
        "ring": lambda: [circle(1.0), circle(0.55)],
    }[shape]()


def coverage(scene_object: SceneObject, size: int) -> np.ndarray:
    """Return how much of each pixel an object covers: `(size, size)` float32 in [0, 1]."""
    scale = size * OVERSAMPLING
    canvas = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(canvas)
    for line, fill in zip(outline(scene_object.shape), (255, 0), strict=False):
        points = (line * SIZES[scene_object.size] + (scene_object.x, scene_object.y)) * scale
        pen.polygon([tuple(p) for p in points], fill=fill)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Return the image of a scene, `(size, size, 3)` uint8."""
    background = np.asarray(BACKGROUNDS[scene.background], np.float32)
    image = np.broadcast_to(background, (size, size, 3))
    for scene_object in scene.objects:
        cover = coverage(scene_object, size)[..., None]
        image = image * (1 - cover) + np.asarray(COLOURS[scene_object.colour], np.float32) * cover
    return np.round(image).astype(np.uint8)


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Return a random scene of a split: one object, equal ones or a relation, a third each."""
    while True:
        kind = rng.integers(3)
        background = _choose(rng, BACKGROUNDS)
        if kind == 0:
            scene = Scene(background, (SceneObject(*_look(rng), *rng.uniform(0.25, 0.75, 2)),))
        elif kind == 1:
            scene = Scene(background, _equal(rng, int(rng.integers(2, 5))))
        else:
            scene = _related(rng, background)
        if scene.held_out == (split == "test"):
            return scene


def _choose(rng: np.random.Generator, names: Iterable[str]) -> str:
    names = list(names)
    return names[rng.integers(len(names))]


def _look(rng: np.random.Generator) -> tuple[str, str, str]:
    return _choose(rng, SHAPES), _choose(rng, COLOURS), _choose(rng, SIZES)


def _equal(rng: np.random.Generator, count: int) -> tuple[SceneObject, ...]:
    """Return equal objects in different quarters of the image."""
    look = _look(rng)
    quarters = rng.permutation(list(product((0.26, 0.74), repeat=2)))[:count]
    return tuple(SceneObject(*look, *(q + rng.uniform(-0.04, 0.04, 2))) for q in quarters)


def _related(rng: np.random.Generator, background: str) -> Scene:
    """Return a scene of two objects that differ in shape and colour, in a relation."""
    first, second = _look(rng), _look(rng)
    while first[0] == second[0] or first[1] == second[1]:
        second = _look(rng)
    relation = _choose(rng, RELATIONS)
    direction = np.array(RELATIONS[relation])
    centre = 0.5 + rng.uniform(-0.04, 0.04, 2)
    centres = [centre + sign * 0.24 * direction for sign in (1, -1)]
    objects = (SceneObject(*first, *centres[0]), SceneObject(*second, *centres[1]))
    return Scene(background, objects, relation)


@dataclass(frozen=True)
class ScenesSource:
    """Random access to scenes: records have `image` and `caption`.

    Attributes:
        length: number of scenes.
        size: height and width of the images.
        split: "train" or "test".
    """

    length: int
    size: int = 64
    split: str = "train"

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Return scene number `index` of the split."""
        return sample_scene(np.random.default_rng((SPLITS.index(self.split), index)), self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(int(index) % self.length)
        return {"image": render(scene, self.size), "caption": scene.caption}

    def image_size(self, _: int) -> tuple[int, int]:
        """Return width and height of a scene."""
        return self.size, self.size

    @property
    def fingerprint(self) -> str:
        """Text that is equal for sources with the same scenes."""
        return f"scenes {self.length} {self.size} {self.split}"
