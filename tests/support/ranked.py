"""A pipeline and a judge without networks, whose figures are known: every cell of concept and style
has a colour, its real picture shows it, and the judge reads it."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from glide_jax.data.data_config import DataConfig
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.settings import Settings, describe
from glide_jax.training.config import TrainConfig
from glide_jax.weights.registry import Model
from tests.support.commands import TINY

STYLES = ("flat style", "round style", "old style", "new style")
CONCEPTS = tuple(f"thing {i:02}" for i in range(30))
SIZE = 4


def colour(caption: str) -> np.ndarray:
    """`(3,)` uint8, of `"thing 07, flat style"`."""
    concept, style = caption.split(", ")
    number = CONCEPTS.index(concept)
    return np.array([number % 6 * 50, number // 6 * 60, STYLES.index(style) * 80], np.uint8)


def split_of(concept: int, style: int) -> str:
    """Of each concept one style is held out."""
    return "test_style" if concept % len(STYLES) == style else "train"


def picture(caption: str) -> np.ndarray:
    """The real picture of a caption."""
    return np.broadcast_to(colour(caption), (SIZE, SIZE, 3))


def make_npz(folder: Path) -> Path:
    """All cells, as an emoji64 file has them."""
    rows = [
        {"concept": concept, "caption": concept, "style": style, "split": split_of(i, j)}
        for i, concept in enumerate(CONCEPTS)
        for j, style in enumerate(STYLES)
    ]
    fields = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    images = [picture(f"{row['caption']}, {row['style']}") for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "cells.npz", image=np.stack(images), **fields)
    return folder / "cells.npz"


def recipe(npz: Path) -> TrainConfig:
    """A recipe that trains on them."""
    return TrainConfig(name="cells", model=TINY, data=DataConfig(source=str(npz)))


@dataclass(frozen=True)
class Painted:
    """Stands for a pipeline: paints what is asked for, but for some captions another.

    Images have noise of their own, of a size that `guidance_scale` divides; none at 100.

    Attributes:
        mistakes: what is painted instead, by caption.
        calls: the settings of each call so far.
        fail_at: the call that is interrupted.
    """

    mistakes: dict[str, str] = field(default_factory=dict)
    calls: list[dict] = field(default_factory=list)
    fail_at: int | None = None
    clip: SimpleNamespace | None = None
    upsampler: None = None
    settings: Settings = field(default_factory=Settings)

    @cached_property
    def model(self) -> Model:
        return Model("painted", replace(TINY, image_size=SIZE), {})

    @cached_property
    def schedule(self):
        return make_schedule("cosine", 1000)

    def __call__(self, prompts, *, seed, batch_size=None, **settings) -> Images:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(settings)
        mine = self.settings.changed(**settings)
        spread = 0 if mine.guidance_scale == 100 else 8 / mine.guidance_scale
        images = []
        for number, prompt in enumerate(prompts):
            noise = np.random.default_rng((seed, number)).normal(0, 1, (SIZE, SIZE, 3))
            clean = picture(self.mistakes.get(prompt, prompt)).astype(float)
            images.append(np.clip(np.round(clean + spread * noise), 0, 255).astype(np.uint8))
        numbers = tuple(range(len(images)))
        return Images(
            np.stack(images), tuple(prompts), seed, numbers, self.model.name, describe(mine)
        )


@dataclass(frozen=True)
class Judge:
    """Stands for the independent CLIP: compares colours.

    Attributes:
        blind: captions whose pictures it takes for something else.
    """

    name: str = "colours"
    checksum: str = "0"
    scale: float = 10.0
    views: int = 1
    clip: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="judge"))
    blind: tuple[str, ...] = ()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return sphere(images.reshape(len(images), -1, 3).mean(axis=1))

    def texts(self, captions) -> np.ndarray:
        colours = np.array([colour(c) for c in captions], float)
        hidden = np.array([c in self.blind for c in captions])
        return sphere(np.where(hidden[:, None], 255 - colours, colours))


def sphere(colours: np.ndarray) -> np.ndarray:
    """`(N, 3)` in 0..255 -> `(N, 4)` of length 1: equal colours have cosine 1, and no others."""
    x = colours / 512
    return np.concatenate([x, np.sqrt(1 - (x**2).sum(axis=1, keepdims=True))], axis=1)
