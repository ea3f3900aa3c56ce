"""From images to feature vectors, by an independent CLIP or by a network from a local file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from glide_jax.data.decoding import from_uint8
from glide_jax.errors import UsageError
from glide_jax.evaluation.extractors import Extractor, open_extractor
from glide_jax.evaluation.extractors.extractor import checksum
from glide_jax.models.clip import NoisedCLIP
from glide_jax.pipeline.batching import batches
from glide_jax.pipeline.clip_guide import CLIP, load_clip

# Images or captions that are encoded at a time.
BATCH = 64
SCORER = "scorer"


@dataclass(frozen=True, eq=False)
class Scorer:
    """A CLIP that scores clean images: image features, and how well captions fit.

    Attributes:
        clip: a CLIP that has not guided the images that it scores.
        views: views of each image whose embeddings are averaged: 10 (see `ten_views`) or 1.
    """

    clip: CLIP
    views: int = 10

    @property
    def name(self) -> str:
        """The name of the feature space."""
        return f"{self.clip.name} image embeddings"

    @cached_property
    def checksum(self) -> str:
        """The checksum of the weights."""
        return checksum(self.clip.params)

    @cached_property
    def scale(self) -> float:
        """The logit scale, k, the factor from cosine to logit (in GLIDE's CLIP score: s)."""
        network = self.clip.network
        variables = {"params": network.params}
        return float(network.fn.module.apply(variables, method=NoisedCLIP.scale))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return image embeddings of length 1 at noise level 0.

        Args:
            images: `(N, H, W, 3)` uint8.

        Returns:
            `(N, D)` float32.
        """
        size, network = self.clip.config.image_size, self.clip.network
        total = np.float32(0)
        for view in ten_views(images) if self.views > 1 else (images,):
            view = fit(view, size)
            encoded = [
                np.asarray(
                    _encode_image(network.fn.module, network.params, from_uint8(view[index]))
                )
                for index in batches(len(view), BATCH)
            ]
            total = total + np.concatenate(encoded)[: len(view)]
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def both(self, images: np.ndarray) -> tuple[np.ndarray, None]:
        """Return the features, and None: a CLIP has no classes; see `Extractor.both`."""
        return self(images), None

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Return the embeddings of captions, `(M, D)` float32, of length 1."""
        encoded = [
            np.asarray(self.clip.encode_captions([captions[int(i)] for i in index]))
            for index in batches(len(captions), BATCH)
        ]
        return np.concatenate(encoded)[: len(captions)]


# A function from images to features, with a name for tables and figures.
FeatureSpace = Scorer | Extractor


@partial(jax.jit, static_argnums=0)
def _encode_image(model: NoisedCLIP, params: Any, x: jax.Array) -> jax.Array:
    t = jax.numpy.zeros(len(x), jax.numpy.int32) if model.config.n_timestep else None
    features = model.apply({"params": params}, x, t, method=NoisedCLIP.encode_image)
    assert isinstance(features, jax.Array)
    return features


def ten_views(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield ten crops: the corners and the centre at 7/8 of the side, and their mirror images.

    The features of an image depend on how it is cropped and mirrored; their mean over these views
    depends on it less (Krizhevsky et al. 2012, "ImageNet classification with deep convolutional
    neural networks", sec. 4.1: 224 of 256 pixels are the same 7/8).

    Args:
        images: `(N, S, S, 3)`.
    """
    cut = images.shape[1] - round(7 / 8 * images.shape[1])
    side = images.shape[1] - cut
    corners = [(0, 0), (0, cut), (cut, 0), (cut, cut)]
    for top, left in (*corners, (cut // 2, cut // 2)):
        view = images[:, top : top + side, left : left + side]
        yield view
        yield view[:, :, ::-1]


def fit(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images to a side: reduced by area averaging, enlarged bicubically."""
    side = images.shape[1]
    if side == size:
        return images
    kind = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), kind)) for i in images])


def similarity(
    scorer: Scorer, features: np.ndarray, choices: Sequence[Sequence[str]]
) -> np.ndarray:
    """Return the cosine similarity of each image with each of its own captions.

    Args:
        features: `(N, D)`, of the scorer.
        choices: the captions of each image, the same number for all.

    Returns:
        Cosines `(N, M)`.
    """
    distinct = list(dict.fromkeys(caption for row in choices for caption in row))
    column = {caption: i for i, caption in enumerate(distinct)}
    index = np.array([[column[caption] for caption in row] for row in choices])
    return np.take_along_axis(features @ scorer.texts(distinct).T, index, axis=1)


def open_scorer(
    name: str | Path,
    *,
    guide: CLIP | None = None,
    views: int = 10,
    dtype: str = "auto",
    devices: int | str = 1,
) -> Scorer:
    """Load the scorer: a CLIP other than the one that guides.

    Args:
        name: a name, a folder of weights, or a run of `train.py`; see `load_clip`.
        guide: the CLIP that guides, if any.
        views: views of each image; see `Scorer`.
        dtype, devices: see `load_clip`.

    Raises:
        UsageError: the scorer is the CLIP that guides; or see `load_clip`.
    """
    scorer = Scorer(load_clip(name, dtype=dtype, devices=devices), views)
    if guide is not None and scorer.checksum == checksum(guide.params):
        raise UsageError(f"{name} cannot score: it is the CLIP that guides")
    return scorer


def open_space(name: str, scorer: Scorer) -> FeatureSpace:
    """Open a feature space: "scorer" for the embeddings of the scorer, else a weight file.

    Raises:
        GlideError: see `glide_jax.evaluation.extractors.open_extractor`.
    """
    return scorer if name == SCORER else open_extractor(name)
