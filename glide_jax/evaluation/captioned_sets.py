"""Captions of a folder of images, and how well they fit: the CLIP score."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glide_jax.errors import GlideError, UsageError
from glide_jax.evaluation.extractors.clean_clip import CleanCLIP
from glide_jax.evaluation.features import Scorer
from glide_jax.evaluation.image_sets import ImageSet
from glide_jax.pipeline.images import METADATA

# The word for captions that the files of the images bring themselves.
BESIDE = "beside"


def read_captions(where: str, images: ImageSet) -> list[str]:
    """Return the caption of each image.

    Args:
        where: a text file with a caption a line, in the order of the images; or "beside": cat.txt
            for cat.png (also in tar shards), else the prompt that `glide-jax sample` wrote into
            cat.png.

    Raises:
        GlideError: a file cannot be read, or an image has no caption.
        UsageError: there are more or fewer captions than images.
    """
    if where == BESIDE:
        if images.captions is not None:
            captions = images.captions()
            if "" in captions:
                raise GlideError(f"{images.path}: image {captions.index('')} has no caption")
            return captions
        if not images.names:
            raise UsageError(
                f"{images.path} is an .npz, which has no captions: give a text file to --captions"
            )
        return [_caption(Path(images.path) / name) for name in images.names]
    path = Path(where)
    lines = _text(path, f"give a text file with a caption a line, or {BESIDE}").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) != len(images):
        raise UsageError(
            f"{path} has {len(lines):,} captions, {images.path} has {len(images):,} images: one "
            "line is the caption of one image, in the order of file names"
        )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(f"{path}: line {number} is empty, so image {number} has no caption")
    return [line.strip() for line in lines]


def _text(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise GlideError(f"{path} is not UTF-8: save it as UTF-8 text") from None
    except OSError as error:
        raise GlideError(f"cannot read {path} ({error.strerror}): {advice}") from None


def _caption(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        lines = [line.strip() for line in _text(beside, "").splitlines() if line.strip()]
        caption = lines[0] if lines else ""
    else:
        caption = _prompt(path)
    if not caption:
        raise GlideError(
            f"{path} has no caption: write it into {beside.name}, or give a text file to --captions"
        )
    return caption


def _prompt(path: Path) -> str:
    """Return the prompt in the metadata of a PNG file of this project, else an empty text."""
    try:
        with Image.open(path) as image:
            return str(json.loads(image.info[METADATA])["prompt"]).strip()
    except Exception:  # not an image of this project
        return ""


def clip_score(
    scorer: Scorer | CleanCLIP, features: np.ndarray, captions: list[str]
) -> dict[str, Any]:
    """Return the CLIP score of images under its three usual definitions.

    `clip_score` is the mean of `k f(image) . g(caption)`, k the logit scale  (GLIDE, sec. 5.2);
    `clip_score_100` the mean of `100 max(cos, 0)`, as torchmetrics has it; `clip_s` the mean of
    `2.5 max(cos, 0)`  (CLIPScore, 2104.08718, eq. 1), without a prefix before the caption.

    Args:
        features: `(N, D)`, of the scorer.
        captions: of each image.
    """
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    texts = scorer.texts(list(distinct))[[distinct[caption] for caption in captions]]
    images = features.astype(np.float64)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    cosines = (images * texts).sum(axis=1)
    cosine, positive = float(cosines.mean()), float(np.maximum(cosines, 0).mean())
    return {
        "clip": scorer.name,
        "checksum": scorer.checksum,
        "views": scorer.views,
        "scale": scorer.scale,
        "cosine": cosine,
        "clip_score": scorer.scale * cosine,
        "clip_score_100": 100 * positive,
        "clip_s": 2.5 * positive,
    }
