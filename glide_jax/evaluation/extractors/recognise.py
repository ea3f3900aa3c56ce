"""From a weight file to an extractor: what it is, by its names and shapes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from glide_jax.errors import GlideError
from glide_jax.evaluation.extractors.extractor import Extractor, resized
from glide_jax.evaluation.extractors.inception import CLASSES, DIMENSIONS, Inception, from_torch
from glide_jax.evaluation.extractors.vit import HEAD, ViT, ViTConfig
from glide_jax.evaluation.extractors.vit_names import read_clip, read_dinov2, read_transformers
from glide_jax.weights.store import flatten, map_arrays, unflatten
from glide_jax.weights.torch_file import read_torch_file

EXPECTED = (
    "the Inception of FID (pt_inception-2015-12-05-6726825d.pth), an image encoder of CLIP "
    "(ViT-B/32, B/16 or L/14, of openai/CLIP or transformers), or DINOv2 (ViT-S/14, B/14 or L/14, "
    "of facebookresearch/dinov2)"
)
# Where a folder of transformers has its weights.
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
LETTERS = {384: "S", 768: "B", 1024: "L"}
# Names that give away what a file is, and what reads it.
READERS = {
    "visual.class_embedding": read_clip,
    "vision_model.embeddings.class_embedding": read_transformers,
    "blocks.0.ls1.gamma": read_dinov2,
}
INCEPTION_MARK, CLASSIFIER = "Mixed_7c.branch_pool.conv.weight", "fc.weight"


def open_extractor(path: str | Path) -> Extractor:
    """A feature extractor from a local weight file, whose kind is recognised by names and shapes.

    Inception v3 takes pictures of 0 to 1 to 299 pixels as pytorch-fid does (bilinear, unfiltered);
    CLIP's and DINOv2's are scaled by Pillow's bicubic filter, to 224 pixels or what the file's
    positions say (CLIP), cut to their middle where they are not square. All run in float32.

    What a file was trained for cannot be seen: a CLIP of others with the same names is taken for
    OpenAI's, whose activation is not everybody's.

    Args:
        path: a `.pt`, `.pth` or `.bin` file of a state dict (nothing in it is run), a
            `.safetensors` file, or a folder of transformers.

    Raises:
        GlideError: there is no such file, it is broken, or holds no network that is known.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise GlideError(f"{path} holds none of {', '.join(IN_FOLDER)}")
        path = found[0]
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise GlideError(f"{path} does not exist: give the path of a weight file")
        tensors, _ = map_arrays(path)
    else:
        tensors = read_torch_file(path)
    return recognise(path, tensors)


def recognise(path: Path, tensors: Mapping[str, np.ndarray]) -> Extractor:
    """The extractor of a state dict; `path` is for messages.

    Raises:
        GlideError: see `open_extractor`.
    """
    try:
        if INCEPTION_MARK in tensors and CLASSIFIER in tensors:
            return _inception(path, tensors)
        for mark, read in READERS.items():
            if mark in tensors:
                return _vit(path, *read(tensors))
    except KeyError as error:
        raise GlideError(f"{path} lacks {error.args[0]}: expected {EXPECTED}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise GlideError(f"{path} has shapes of no known network ({error})") from None
    some = ", ".join(list(tensors)[:3])
    raise GlideError(f"{path} holds no known network ({some}, ...): expected {EXPECTED}")


def _inception(path: Path, tensors: Mapping[str, np.ndarray]) -> Extractor:
    if (classes := len(tensors[CLASSIFIER])) != CLASSES:
        raise GlideError(
            f"{path} is an Inception of {classes} classes; FID's has {CLASSES}: "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    params, module = from_torch(tensors), Inception()
    return Extractor(
        name="Inception v3 (FID)",
        dimensions=DIMENSIONS,
        classes=CLASSES,
        module=module,
        params=_fitting(path, module, params, side=299),
        prepare=_as_it_is,
    )


def _vit(path: Path, config: ViTConfig, params: dict[str, Any]) -> Extractor:
    if not config.layers or config.width % HEAD or config.side % config.patch:
        raise GlideError(
            f"{path}: a transformer of {config.layers} layers, width {config.width} and patches "
            f"of {config.patch} is none of {EXPECTED}"
        )
    module = ViT(config)
    family = "CLIP" if config.clip else "DINOv2"
    letter = LETTERS.get(config.width, f"{config.width}")
    size = f", {config.side} pixels" if config.side != 224 else ""
    registers = f", {config.registers} registers" if config.registers else ""
    return Extractor(
        name=f"{family} ViT-{letter}/{config.patch}{size}{registers}",
        dimensions=config.output,
        classes=None,
        module=module,
        params=_fitting(path, module, params, side=config.side),
        prepare=partial(resized, side=config.side),
    )


def _as_it_is(images: np.ndarray) -> np.ndarray:
    return images


def _fitting(path: Path, module: nn.Module, params: dict[str, Any], side: int) -> dict[str, Any]:
    """Parameters as the network has them, checked name by name."""
    picture = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    wanted = flatten(jax.eval_shape(module.init, jax.random.key(0), picture)["params"])
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    found = {name: leaf.shape for name, leaf in params.items()}
    if wrong := sorted(name for name in shapes | found if shapes.get(name) != found.get(name)):
        raise GlideError(
            f"{path}: {len(wrong)} parameters are missing, unexpected or of the wrong shape "
            f"({', '.join(wrong[:3])})"
        )
    # Once, and not with each batch.
    return jax.tree.map(jax.device_put, unflatten(params))
