"""A CLIP of images without noise, as OpenAI and OpenCLIP published them: images and captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.errors import GlideError
from glide_jax.evaluation.extractors.extractor import Extractor
from glide_jax.evaluation.extractors.recognise import (
    checked,
    described_as,
    read_state,
    recognise,
)
from glide_jax.evaluation.extractors.vit import CLIPText
from glide_jax.evaluation.extractors.vit_names import read_clip_text, read_transformers_text
from glide_jax.models.tokenizers import CLIPTokenizer

# An array that only one kind of file has, and the function that reads its text encoder.
READERS = {
    "token_embedding.weight": read_clip_text,
    "text_model.embeddings.token_embedding.weight": read_transformers_text,
}
SCALE = "logit_scale"


@dataclass(frozen=True, eq=False)
class CleanCLIP:
    """Both encoders of a CLIP; make one with `open_clean_clip`.

    Attributes:
        image: the image encoder, an extractor like others.
        module: the text encoder.
        params: its weights.
        scale: the factor from cosine to logit.
    """

    image: Extractor
    module: CLIPText = field(repr=False)
    params: dict[str, Any] = field(repr=False)
    scale: float

    @property
    def name(self) -> str:
        """The name of the network."""
        return self.image.name

    @property
    def checksum(self) -> str:
        """The checksum of the image encoder."""
        return self.image.checksum

    @property
    def views(self) -> int:
        """Views of each image: one, scaled and cropped as CLIP does."""
        return 1

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Return the embeddings of captions, `(M, D)` float32, of length 1.

        A caption that is longer than the context is cut, as with `clip.tokenize(truncate=True)`.
        """
        size = min(64, len(captions))
        parts = []
        for start in range(0, len(captions), size):
            batch = list(captions[start : start + size])
            # The last batch is filled up: another size would compile anew.
            filled = batch + batch[:1] * (size - len(batch))
            ids = CLIPTokenizer(self.module.config.context)(filled).ids
            parts.append(np.asarray(_encode(self.module, self.params, ids))[: len(batch)])
        features = np.concatenate(parts)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


@partial(jax.jit, static_argnums=0)
def _encode(module: CLIPText, params: Any, ids: jax.Array) -> jax.Array:
    # GPUs and TPUs would multiply in fewer bits.
    with jax.default_matmul_precision("highest"):
        features = module.apply({"params": params}, ids)
    assert isinstance(features, jax.Array)
    return features


def open_clean_clip(path: str | Path) -> CleanCLIP:
    """Open a CLIP: a folder that transformers wrote, or a file of a state dict.

    The names are those of transformers' CLIPModel or of openai/CLIP. `config.json` of a folder says
    the activation and the heads; without it they are OpenAI's. Captions are encoded with CLIP's own
    vocabulary, which is in this package.

    Raises:
        GlideError: the file does not exist, is broken, or is no CLIP with both encoders.
    """
    path, tensors, described = read_state(path)
    image = recognise(path, tensors, described.get("vision_config"))
    read = next((read for mark, read in READERS.items() if mark in tensors), None)
    if read is None or not image.name.startswith("CLIP"):
        raise GlideError(
            f"{path} has {image.name} and no text encoder: give a whole CLIP to --clip-score-model"
        )
    try:
        config, params = read(tensors)
        scale = float(np.exp(np.asarray(tensors[SCALE], np.float64)).reshape(()))
    except KeyError as error:
        raise GlideError(
            f"{path} lacks {error.args[0]}: give a whole CLIP to --clip-score-model"
        ) from None
    except (ValueError, IndexError, TypeError) as error:
        raise GlideError(f"{path} has the shapes of no known CLIP ({error})") from None
    config = described_as(path, config, described.get("text_config"))
    if config.vocabulary != CLIPTokenizer.vocab_size or config.width % config.head:
        raise GlideError(
            f"{path} has {config.vocabulary:,} token ids and a text width of {config.width}: only "
            f"CLIPs with OpenAI's {CLIPTokenizer.vocab_size:,} ids are read"
        )
    if config.output != image.dimensions:
        raise GlideError(f"{path}: image and text features differ in length")
    module = CLIPText(config)
    like = jax.ShapeDtypeStruct((1, config.context), np.int32)
    return CleanCLIP(image, module, checked(path, module, params, like), scale)
