"""Procedural scenes: coloured shapes whose captions can be checked exactly.

One shape, two to four equal ones, or two different ones in a relation, on a plain
background: 81,792 captions in all. A scene is drawn from its number alone, so that
a data set of any length needs no file, and every run and every machine sees the same one.
"""

from __future__ import annotations

import hashlib
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
# Half the height of a shape, as a share of the picture's side.
SIZES = {"small": 0.1, "large": 0.17}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
SPLITS = ("train", "test")
# Drawn so many times larger, then averaged: edges with 64 shades.
OVERSAMPLING = 8


@dataclass(frozen=True)
class Thing:
    """A shape; `x`, `y` its centre as shares of the side, from the top left."""

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Scene:
    """What a caption says, and where its things are.

    Attributes:
        things: one; several equal ones; or two, where `relation` says how the first stands to
            the second.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        """E.g. "a large red circle above a small blue star on a white background"."""
        first = self.things[0]
        if self.relation:
            what = f"{_one(first)} {self.relation} {_one(self.things[1])}"
        elif len(self.things) > 1:
            what = f"{NUMBERS[len(self.things)]} {first.size} {first.colour} {_plural(first.shape)}"
        else:
            what = _one(first)
        return f"{what} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether training never sees its combination: a tenth of (colour, shape) pairs, of
        (shape, relation, shape) triples, and of (four, colour) pairs."""
        keys = {f"{thing.colour} {thing.shape}" for thing in self.things}
        if self.relation:
            keys.add(f"{self.things[0].shape} {self.relation} {self.things[1].shape}")
        elif len(self.things) == 4:
            keys.add(f"four {self.things[0].colour}")
        return any(_hash(key) % 10 == 0 for key in keys)


def _one(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def outline(shape: str) -> list[np.ndarray]:
    """Closed outlines `(N, 2)` of a shape of half-height 1; a second one is a hole."""

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


def coverage(thing: Thing, size: int) -> np.ndarray:
    """`(size, size)` float32 in [0, 1]: how much of each pixel a thing covers."""
    scale = size * OVERSAMPLING
    canvas = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(canvas)
    for line, fill in zip(outline(thing.shape), (255, 0), strict=False):
        points = (line * SIZES[thing.size] + (thing.x, thing.y)) * scale
        pen.polygon([tuple(p) for p in points], fill=fill)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """`(size, size, 3)` uint8."""
    image = np.broadcast_to(np.float32(BACKGROUNDS[scene.background]), (size, size, 3))
    for thing in scene.things:
        cover = coverage(thing, size)[..., None]
        image = image * (1 - cover) + np.float32(COLOURS[thing.colour]) * cover
    return np.round(image).astype(np.uint8)


def draw_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene of a split: a third of each kind."""
    while True:
        kind = rng.integers(3)
        background = _any(rng, BACKGROUNDS)
        if kind == 0:
            scene = Scene(background, (Thing(*_look(rng), *rng.uniform(0.25, 0.75, 2)),))
        elif kind == 1:
            scene = Scene(background, _several(rng, int(rng.integers(2, 5))))
        else:
            scene = _pair(rng, background)
        if scene.held_out == (split == "test"):
            return scene


def _any(rng: np.random.Generator, names: Any) -> str:
    names = list(names)
    return names[rng.integers(len(names))]


def _look(rng: np.random.Generator) -> tuple[str, str, str]:
    return _any(rng, SHAPES), _any(rng, COLOURS), _any(rng, SIZES)


def _several(rng: np.random.Generator, count: int) -> tuple[Thing, ...]:
    """Equal things, in different quarters of the picture."""
    look = _look(rng)
    quarters = rng.permutation(list(product((0.26, 0.74), repeat=2)))[:count]
    return tuple(Thing(*look, *(q + rng.uniform(-0.04, 0.04, 2))) for q in quarters)


def _pair(rng: np.random.Generator, background: str) -> Scene:
    """Two things that differ in shape and colour, side by side or one above the other."""
    first, second = _look(rng), _look(rng)
    while first[0] == second[0] or first[1] == second[1]:
        second = _look(rng)
    relation = _any(rng, RELATIONS)
    direction = np.array(RELATIONS[relation])
    centre = 0.5 + rng.uniform(-0.04, 0.04, 2)
    places = [centre + sign * 0.24 * direction for sign in (1, -1)]
    things = (Thing(*first, *places[0]), Thing(*second, *places[1]))
    return Scene(background, things, relation)


@dataclass(frozen=True)
class ScenesSource:
    """Scenes by number: what grain takes as a source. Records hold image, caption and scene."""

    length: int
    size: int = 64
    split: str = "train"

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Scene number `index` of the split."""
        return draw_scene(np.random.default_rng((SPLITS.index(self.split), index)), self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(int(index) % self.length)
        return {"image": render(scene, self.size), "caption": scene.caption}

    @property
    def fingerprint(self) -> str:
        """Says whether two sources hold the same records."""
        return f"scenes {self.length} {self.size} {self.split}"
