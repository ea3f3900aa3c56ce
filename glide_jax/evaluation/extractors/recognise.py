"""Open a weight file as an extractor; names and shapes of its arrays tell which network it is."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen as nn

from glide_jax.errors import GlideError
from glide_jax.evaluation.extractors.extractor import Extractor, resized
from glide_jax.evaluation.extractors.inception import CLASSES, DIMENSIONS, Inception, from_torch
from glide_jax.evaluation.extractors.vit import HEAD, TextConfig, ViT, ViTConfig
from glide_jax.evaluation.extractors.vit_names import read_clip, read_dinov2, read_transformers
from glide_jax.folders import expand_home
from glide_jax.weights.store import CONFIG, flatten, map_arrays, read_config_json, unflatten
from glide_jax.weights.torch_file import read_torch_file

EXPECTED = (
    "the Inception of FID (pt_inception-2015-12-05-6726825d.pth), an image encoder of CLIP "
    "(ViT-B/32, B/16 or L/14, of openai/CLIP or transformers), or DINOv2 (ViT-S/14, B/14 or L/14, "
    "of facebookresearch/dinov2)"
)
# The weight files of a folder that transformers wrote.
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
LETTERS = {384: "S", 768: "B", 1024: "L"}
# An array name that only one kind of file has, and the function that reads this kind.
READERS = {
    "visual.class_embedding": read_clip,
    "vision_model.embeddings.class_embedding": read_transformers,
    "blocks.0.ls1.gamma": read_dinov2,
}
INCEPTION_MARK, CLASSIFIER = "Mixed_7c.branch_pool.conv.weight", "fc.weight"


def open_extractor(path: str | Path) -> Extractor:
    """Open a local weight file as a feature extractor; names and shapes tell its kind.

    Inception v3 resizes images to 299 pixels as pytorch-fid does (bilinear, unfiltered). CLIP and
    DINOv2 resize with Pillow's bicubic filter and crop the centre: DINOv2 to 224 pixels, CLIP to
    the size of its position embeddings. All run in float32.

    A file does not say how it was trained: another CLIP with the same names is read as OpenAI's,
    with OpenAI's activation `x sigmoid(1.702 x)` and heads of 64 channels. The `config.json` of a
    folder that transformers wrote does say it.

    Args:
        path: a `.pt`, `.pth` or `.bin` file of a state dict (no code in it is run), a
            `.safetensors` file, or a folder that transformers wrote.

    Raises:
        GlideError: the file does not exist, is broken, or holds no known network.
    """
    path, tensors, described = read_state(path)
    return recognise(path, tensors, described.get("vision_config"))


def read_state(path: str | Path) -> tuple[Path, Mapping[str, np.ndarray], dict[str, Any]]:
    """Return the weight file of a path, its state dict, and the `config.json` of a folder.

    Raises:
        GlideError: see `open_extractor`.
    """
    path, described = expand_home(path), {}
    if path.is_dir():
        files = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not files:
            raise GlideError(f"{path} holds none of {', '.join(IN_FOLDER)}")
        if (path / CONFIG).is_file():
            described = read_config_json(path / CONFIG)
        path = files[0]
    if path.suffix != ".safetensors":
        return path, read_torch_file(path), described
    if not path.is_file():
        raise GlideError(f"{path} does not exist: give the path of a weight file")
    tensors, _ = map_arrays(path)
    return path, tensors, described


C = TypeVar("C", ViTConfig, TextConfig)


def described_as(path: Path, config: C, described: Mapping[str, Any] | None) -> C:
    """Return a config with what `config.json` says of activation and heads.

    Raises:
        GlideError: the activation is none of CLIP's.
    """
    if not described or not config.clip:
        return config
    activation = described.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise GlideError(f"{path} has the activation {activation}, which no known CLIP has")
    heads = described.get("num_attention_heads", config.width // HEAD)
    if not isinstance(heads, int) or heads < 1 or config.width % heads:
        raise GlideError(f"{path}: {heads} heads do not divide a width of {config.width}")
    return replace(config, exact_gelu=activation == "gelu", head=config.width // heads)


def recognise(
    path: Path, tensors: Mapping[str, np.ndarray], described: Mapping[str, Any] | None = None
) -> Extractor:
    """Return the extractor of a state dict.

    Args:
        path: for messages.
        tensors: the state dict.
        described: the `vision_config` of the `config.json` beside it, if any.

    Raises:
        GlideError: see `open_extractor`.
    """
    try:
        if INCEPTION_MARK in tensors and CLASSIFIER in tensors:
            return _inception(path, tensors)
        for mark, read in READERS.items():
            if mark in tensors:
                config, params = read(tensors)
                return _vit(path, described_as(path, config, described), params)
    except KeyError as error:
        raise GlideError(f"{path} lacks {error.args[0]}: expected {EXPECTED}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise GlideError(f"{path} has the shapes of no known network ({error})") from None
    names = ", ".join(list(tensors)[:3])
    raise GlideError(f"{path} holds no known network ({names}, ...): expected {EXPECTED}")


def _inception(path: Path, tensors: Mapping[str, np.ndarray]) -> Extractor:
    if (classes := len(tensors[CLASSIFIER])) != CLASSES:
        raise GlideError(
            f"{path} is an Inception of {classes} classes; FID's has {CLASSES}: use "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    params, module = from_torch(tensors), Inception()
    return Extractor(
        name="Inception v3 (FID)",
        dimensions=DIMENSIONS,
        classes=CLASSES,
        module=module,
        params=checked(path, module, params, image_of(299)),
        prepare=_unchanged,
    )


def _vit(path: Path, config: ViTConfig, params: dict[str, Any]) -> Extractor:
    if not config.layers or config.width % config.head or config.side % config.patch:
        raise GlideError(
            f"{path} is a transformer of {config.layers} layers, width {config.width} and patches "
            f"of {config.patch}: expected {EXPECTED}"
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
        params=checked(path, module, params, image_of(config.side)),
        prepare=partial(resized, side=config.side),
    )


def _unchanged(images: np.ndarray) -> np.ndarray:
    return images


def image_of(side: int) -> jax.ShapeDtypeStruct:
    """Return the shape of a batch of one image."""
    return jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)


def checked(
    path: Path, module: nn.Module, params: dict[str, Any], like: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Return the parameters as a tree on the device, after a check of every name and shape.

    Raises:
        GlideError: parameters are missing, unexpected or of the wrong shape.
    """
    wanted = flatten(jax.eval_shape(module.init, jax.random.key(0), like)["params"])
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    own_shapes = {name: leaf.shape for name, leaf in params.items()}
    if wrong := sorted(
        name for name in shapes | own_shapes if shapes.get(name) != own_shapes.get(name)
    ):
        raise GlideError(
            f"{path}: {len(wrong)} parameters are missing, unexpected or of the wrong shape "
            f"({', '.join(wrong[:3])})"
        )
    # Copied to the device once, not with each batch.
    return jax.tree.map(jax.device_put, unflatten(params))
