"""A pipeline and a scorer without networks, whose results are known.

Each concept-style pair has a colour, its real image shows this colour, and the scorer reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from glide_jax.data.data_config import DataConfig
from glide_jax.diffusion.schedule import make_schedule
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.settings import Settings, describe
from glide_jax.training.config import TrainConfig
from glide_jax.weights.registry import Model
from tests.support.commands import TINY

STYLES = ("flat style", "round style", "old style", "new style")
CONCEPTS = tuple(f"concept {i:02}" for i in range(30))
SIZE = 4


def colour(caption: str) -> np.ndarray:
    """Return the colour of a caption such as `"concept 07, flat style"`: `(3,)` uint8."""
    concept, style = caption.split(", ")
    number = CONCEPTS.index(concept)
    return np.array([number % 6 * 50, number // 6 * 60, STYLES.index(style) * 80], np.uint8)


def split_of(concept: int, style: int) -> str:
    """Return the split of a pair: one style of each concept is held out."""
    return "test_style" if concept % len(STYLES) == style else "train"


def real_image(caption: str) -> np.ndarray:
    """Return the real image of a caption."""
    return np.broadcast_to(colour(caption), (SIZE, SIZE, 3))


def make_npz(folder: Path) -> Path:
    """Write all pairs as an .npz file of the emoji data."""
    rows = [
        {"concept": concept, "caption": concept, "style": style, "split": split_of(i, j)}
        for i, concept in enumerate(CONCEPTS)
        for j, style in enumerate(STYLES)
    ]
    fields: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    images = [real_image(f"{row['caption']}, {row['style']}") for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pairs.npz", image=np.stack(images), **fields)
    return folder / "pairs.npz"


def recipe(npz: Path) -> TrainConfig:
    """Return a recipe that trains on them."""
    return TrainConfig(name="pairs", model=TINY, data=DataConfig(source=str(npz)))


@dataclass(frozen=True, eq=False)
class Painted:
    """Replaces a pipeline: paints the image of each prompt, or of another one for some prompts.

    Each image has noise with a standard deviation of 8 / `guidance_scale`; none at 100.

    Attributes:
        mistakes: by prompt, the caption that is painted instead.
        calls: the settings of each call so far.
        fail_at: the call that is interrupted.
    """

    mistakes: dict[str, str] = field(default_factory=dict)
    calls: list[dict] = field(default_factory=list)
    fail_at: int | None = None
    clip: SimpleNamespace | None = None
    upsampler: None = None
    weak_stage: None = None
    settings: Settings = field(default_factory=Settings)

    @cached_property
    def model(self) -> Model:
        return Model("painted", replace(TINY, image_size=SIZE), {})

    @cached_property
    def schedule(self):
        return make_schedule("cosine", 1000)

    def __call__(self, prompts: Sequence[str], *, seed, batch_size=None, **settings) -> Images:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(settings)
        chosen = self.settings.changed(**settings)
        deviation = 0 if chosen.guidance_scale == 100 else 8 / chosen.guidance_scale
        images = []
        for index, prompt in enumerate(prompts):
            noise = np.random.default_rng((seed, index)).normal(0, 1, (SIZE, SIZE, 3))
            clean = real_image(self.mistakes.get(prompt, prompt)).astype(float)
            images.append(np.clip(np.round(clean + deviation * noise), 0, 255).astype(np.uint8))
        indices = tuple(range(len(images)))
        return Images(
            np.stack(images), tuple(prompts), seed, indices, self.model.name, describe(chosen)
        )


@dataclass(frozen=True)
class ColourScorer:
    """Replaces the independent CLIP: compares colours.

    Attributes:
        blind: captions whose images it mistakes for something else.
    """

    name: str = "colours"
    checksum: str = "0"
    scale: float = 10.0
    views: int = 1
    clip: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="independent"))
    blind: tuple[str, ...] = ()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return sphere(images.reshape(len(images), -1, 3).mean(axis=1))

    def both(self, images: np.ndarray) -> tuple[np.ndarray, None]:
        return self(images), None

    def texts(self, captions) -> np.ndarray:
        colours = np.array([colour(c) for c in captions], float)
        hidden = np.array([c in self.blind for c in captions])
        return sphere(np.where(hidden[:, None], 255 - colours, colours))


def sphere(colours: np.ndarray) -> np.ndarray:
    """Map `(N, 3)` in 0..255 to `(N, 4)` of length 1: only equal colours have cosine 1."""
    x = colours / 512
    return np.concatenate([x, np.sqrt(1 - (x**2).sum(axis=1, keepdims=True))], axis=1)
