"""From pictures to vectors: the independent CLIP that ships, or an extractor from local files."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from glide_jax.pipeline.batching import batches
from glide_jax.errors import UsageError
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.clip_guide import CLIP, load_clip
from glide_jax.pipeline.images import from_uint8

# Images or captions that are encoded at a time.
BATCH = 64
SCORER = "scorer"


class Extractor(Protocol):
    """A feature space, as `glide_jax.evaluation.extractors` has them.

    One that classifies has `classes`, how many, and `both(images)`: features, and probabilities
    `(N, classes)`.

    Attributes:
        name: what the features are, for every table and figure.
        checksum: of its weights.
    """

    name: str
    checksum: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`(N, H, W, 3)` uint8 -> `(N, D)` float32."""


@dataclass(frozen=True)
class Scorer:
    """A CLIP as a judge of clean pictures: its image features, and how well captions fit.

    Attributes:
        clip: one that has not guided what it judges.
        views: of each picture, whose embeddings are averaged: 10, see `ten_views`, or 1.
    """

    clip: CLIP
    views: int = 10

    @property
    def name(self) -> str:
        """Of the feature space."""
        return f"{self.clip.name} image embeddings"

    @cached_property
    def checksum(self) -> str:
        """Of its weights."""
        return checksum(self.clip.params)

    @cached_property
    def scale(self) -> float:
        """From cosine to logit, the s of GLIDE's CLIP score."""
        network = self.clip.network
        variables = {"params": network.params}
        return float(network.fn.model.apply(variables, method=NoisedCLIP.scale))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeddings of length 1, `(N, H, W, 3)` uint8 -> `(N, D)` float32, at noise level 0."""
        size, network = self.clip.config.image_size, self.clip.network
        total = np.float32(0)
        for view in ten_views(images) if self.views > 1 else (images,):
            view = fit(view, size)
            parts = [
                np.asarray(_encode_image(network.fn.model, network.params, from_uint8(view[index])))
                for index in batches(len(view), BATCH)
            ]
            total = total + np.concatenate(parts)[: len(view)]
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings of captions, `(M, D)` float32, of length 1."""
        parts = [
            np.asarray(self.clip.encode_text([captions[i] for i in index]))
            for index in batches(len(captions), BATCH)
        ]
        return np.concatenate(parts)[: len(captions)]


@partial(jax.jit, static_argnums=0)
def _encode_image(model: NoisedCLIP, params: Any, x: jax.Array) -> jax.Array:
    t = jax.numpy.zeros(len(x), jax.numpy.int32) if model.config.n_timestep else None
    return model.apply({"params": params}, x, t, method=NoisedCLIP.encode_image)


def ten_views(images: np.ndarray) -> Iterator[np.ndarray]:
    """Corners and middle of pictures, 7/8 of the side, and each mirrored.

    What a network finds in a picture depends on how it lies; the mean over these views does less
    (Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks",
    sec. 4.1, whose 224 of 256 pixels are these 7/8).

    Args:
        images: `(N, S, S, 3)`.
    """
    rest = images.shape[1] - round(7 / 8 * images.shape[1])
    side = images.shape[1] - rest
    for top, left in ((0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2)):
        view = images[:, top : top + side, left : left + side]
        yield view
        yield view[:, :, ::-1]


def fit(images: np.ndarray, size: int) -> np.ndarray:
    """Images of that side: reduced by averaging areas, enlarged bicubically."""
    side = images.shape[1]
    if side == size:
        return images
    kind = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), kind)) for i in images])


def similarity(
    scorer: Scorer, features: np.ndarray, choices: Sequence[Sequence[str]]
) -> np.ndarray:
    """How well each picture's own choice of captions fits it.

    Args:
        features: `(N, D)`, of the scorer.
        choices: of each picture, all of one length.

    Returns:
        Cosines `(N, M)`.
    """
    distinct = list(dict.fromkeys(caption for row in choices for caption in row))
    place = {caption: i for i, caption in enumerate(distinct)}
    index = np.array([[place[caption] for caption in row] for row in choices])
    return np.take_along_axis(features @ scorer.texts(distinct).T, index, axis=1)


def checksum(params: Any) -> str:
    """Of a tree of arrays."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = zlib.crc32(jax.tree_util.keystr(path).encode(), value)
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return f"{value:08x}"


def open_scorer(
    name: str | Path, *, guide: CLIP | None = None, views: int = Scorer.views, **where: Any
) -> Scorer:
    """The independent CLIP.

    Args:
        guide: the CLIP that guides, which must be another one.
        views: of each picture; see `Scorer`.

    Raises:
        UsageError: they are the same; or see `load_clip`.
    """
    scorer = Scorer(load_clip(name, **where), views)
    if guide is not None and scorer.checksum == checksum(guide.params):
        raise UsageError(f"{name} cannot score: it is the CLIP that guides")
    return scorer


def open_space(name: str, scorer: Scorer) -> Extractor:
    """A feature space: "scorer", the independent CLIP's, or an extractor's by name or path.

    Raises:
        UsageError, GlideError: see `glide_jax.evaluation.extractors.open_extractor`.
    """
    if name == SCORER:
        return scorer
    from glide_jax.evaluation.extractors import open_extractor

    return open_extractor(name)
