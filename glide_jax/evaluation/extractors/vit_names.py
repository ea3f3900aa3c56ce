"""Conversion of vision transformers and of CLIP's text encoders, under their authors' names."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from glide_jax.evaluation.extractors.vit import TextConfig, ViTConfig

Tensors = Mapping[str, np.ndarray]

# Name in `ViT` -> name in the file; dense layers and normalisations have a weight and a bias.
CLIP = {
    "patch": "visual.conv1",
    "norm_before": "visual.ln_pre",
    "norm": "visual.ln_post",
}
CLIP_BLOCK = {
    "norm_1": "ln_1",
    "out": "attn.out_proj",
    "norm_2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
TRANSFORMERS = {
    "patch": "vision_model.embeddings.patch_embedding",
    "norm_before": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
}
TRANSFORMERS_BLOCK = {
    "norm_1": "layer_norm1",
    "out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
DINOV2 = {"patch": "patch_embed.proj", "norm": "norm"}
DINOV2_BLOCK = {
    "norm_1": "norm1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "norm_2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}

# DINOv2's usual evaluation size. Its last training phase used 518 pixels, the size of its position
# embeddings.
DINOV2_SIDE = 224


def read_clip(tensors: Tensors) -> tuple[ViTConfig, dict[str, Any]]:
    """Read the image encoder from a state dict of openai/CLIP.

    Raises:
        KeyError: a name is missing.
    """
    position, blocks = tensors["visual.positional_embedding"], "visual.transformer.resblocks"
    projection = tensors["visual.proj"]
    config = _clip_config(tensors["visual.conv1.weight"], position, projection.shape[1])
    config = _deep(config, tensors, blocks)
    params = _common(tensors, CLIP, CLIP_BLOCK, blocks, config)
    params |= {
        "class": _row(tensors["visual.class_embedding"]),
        "position": _float(position),
        "projection/kernel": _float(projection),
    }
    return config, params | _joint_attention(tensors, blocks, config.layers)


def read_clip_text(tensors: Tensors) -> tuple[TextConfig, dict[str, Any]]:
    """Read the text encoder from a state dict of openai/CLIP.

    Raises:
        KeyError: a name is missing.
    """
    blocks, projection = "transformer.resblocks", _float(tensors["text_projection"])
    tokens, position = (
        _float(tensors[name]) for name in ("token_embedding.weight", "positional_embedding")
    )
    layers = _count(tensors, blocks)
    output = projection.shape[1]
    config = TextConfig(len(tokens), len(position), position.shape[1], layers, output)
    params = _common(tensors, {"norm": "ln_final"}, CLIP_BLOCK, blocks, config)
    params |= {"tokens": tokens, "position": position, "projection/kernel": projection}
    return config, params | _joint_attention(tensors, blocks, layers)


def read_transformers(tensors: Tensors) -> tuple[ViTConfig, dict[str, Any]]:
    """Read the image encoder from a state dict of transformers' CLIPModel.

    Raises:
        KeyError: a name is missing.
    """
    position = tensors["vision_model.embeddings.position_embedding.weight"]
    projection, blocks = tensors["visual_projection.weight"], "vision_model.encoder.layers"
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    config = _deep(_clip_config(patch, position, len(projection)), tensors, blocks)
    params = _common(tensors, TRANSFORMERS, TRANSFORMERS_BLOCK, blocks, config)
    params |= {
        "class": _row(tensors["vision_model.embeddings.class_embedding"]),
        "position": _float(position),
        "projection/kernel": _float(projection).T,
    }
    return config, params | _separate_attention(tensors, blocks, config.layers)


def read_transformers_text(tensors: Tensors) -> tuple[TextConfig, dict[str, Any]]:
    """Read the text encoder from a state dict of transformers' CLIPModel.

    Raises:
        KeyError: a name is missing.
    """
    blocks, projection = "text_model.encoder.layers", _float(tensors["text_projection.weight"])
    tokens, position = (
        _float(tensors[f"text_model.embeddings.{name}_embedding.weight"])
        for name in ("token", "position")
    )
    layers = _count(tensors, blocks)
    config = TextConfig(len(tokens), len(position), position.shape[1], layers, len(projection))
    text_norm = {"norm": "text_model.final_layer_norm"}
    params = _common(tensors, text_norm, TRANSFORMERS_BLOCK, blocks, config)
    params |= {"tokens": tokens, "position": position, "projection/kernel": projection.T}
    return config, params | _separate_attention(tensors, blocks, layers)


def _joint_attention(tensors: Tensors, blocks: str, layers: int) -> dict[str, Any]:
    params = {}
    for i in range(layers):
        name = f"{blocks}.{i}.attn.in_proj_"
        params[f"block_{i}/qkv/kernel"] = _float(tensors[f"{name}weight"]).T
        params[f"block_{i}/qkv/bias"] = _float(tensors[f"{name}bias"])
    return params


def _separate_attention(tensors: Tensors, blocks: str, layers: int) -> dict[str, Any]:
    params = {}
    for i in range(layers):
        parts = [f"{blocks}.{i}.self_attn.{part}_proj" for part in "qkv"]
        kernels = [_float(tensors[f"{part}.weight"]) for part in parts]
        params[f"block_{i}/qkv/kernel"] = np.concatenate(kernels).T
        biases = [_float(tensors[f"{part}.bias"]) for part in parts]
        params[f"block_{i}/qkv/bias"] = np.concatenate(biases)
    return params


def read_dinov2(tensors: Tensors) -> tuple[ViTConfig, dict[str, Any]]:
    """Read a state dict of facebookresearch/dinov2, with or without registers.

    Raises:
        KeyError: a name is missing.
    """
    width, _, _, patch = tensors["patch_embed.proj.weight"].shape
    registers = tensors.get("register_tokens")
    config = ViTConfig(
        kind="dinov2",
        side=DINOV2_SIDE,
        patch=patch,
        width=width,
        layers=0,
        output=width,
        registers=0 if registers is None else registers.shape[1],
    )
    config = _deep(config, tensors, "blocks")
    params = _common(tensors, DINOV2, DINOV2_BLOCK, "blocks", config)
    params["class"] = _float(tensors["cls_token"])[0]
    position = _float(tensors["pos_embed"])[0]
    params["position"] = scaled_positions(
        position, config.side // config.patch, filtered=bool(config.registers)
    )
    if registers is not None:
        params["registers"] = _float(registers)[0]
    for i in range(config.layers):
        for ours, theirs in (("scale_1", "ls1"), ("scale_2", "ls2")):
            params[f"block_{i}/{ours}"] = _float(tensors[f"blocks.{i}.{theirs}.gamma"])
    return config, params


def scaled_positions(position: np.ndarray, side: int, filtered: bool = False) -> np.ndarray:
    """Resize position embeddings to another number of patches, by bicubic interpolation.

    This is DINOv2's method. Without registers, 0.1 is added to the number of patches per side
    before the scale is computed (a guard against rounding on which its features depend), the
    parameter of the cubic is -0.75, and there is no filter. With registers, scale and filter are
    Pillow's.

    Args:
        position: `(1 + n^2, W)`, the class token first.
        side: patches per side.
        filtered: use the method for networks with registers.

    Returns:
        `(1 + side^2, W)`.
    """
    old = math.isqrt(len(position) - 1)
    if old == side:
        return position
    scale, a = (side / old, -0.5) if filtered else ((side + 0.1) / old, -0.75)
    weights = _cubic(old, side, scale, a, stretch=filtered)
    grid = position[1:].astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("ia,jb,abw->ijw", weights, weights, grid, optimize=True)
    return np.concatenate([position[:1], grid.reshape(side * side, -1).astype(np.float32)])


def _cubic(old: int, new: int, scale: float, a: float, *, stretch: bool) -> np.ndarray:
    """Return the weights `(new, old)` of Keys's cubic; `stretch`: widened where it shrinks."""
    wide = max(1 / scale, 1.0) if stretch else 1.0
    centre = (np.arange(new) + 0.5) / scale - 0.5
    reach = int(np.ceil(2 * wide))
    taps = np.floor(centre)[:, None] + np.arange(-reach, reach + 2)
    x = np.abs(taps - centre[:, None]) / wide
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    value = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if stretch:  # Pillow leaves out pixels beyond the border; DINOv2 repeats the border.
        value = np.where((taps >= 0) & (taps < old), value, 0.0)
    weights = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(weights, (rows, np.clip(taps, 0, old - 1).astype(int)), value)
    return weights / weights.sum(axis=1, keepdims=True)


def _clip_config(patch: np.ndarray, position: np.ndarray, output: int) -> ViTConfig:
    width, _, _, size = patch.shape
    side = math.isqrt(len(position) - 1) * size
    return ViTConfig("clip", side, size, width, 0, output)


def _deep(config: ViTConfig, tensors: Tensors, blocks: str) -> ViTConfig:
    """Return the config with as many layers as the file has blocks."""
    return replace(config, layers=_count(tensors, blocks))


def _count(tensors: Tensors, blocks: str) -> int:
    """Return how many blocks a file has."""
    skip = len(blocks.split("."))
    numbers = {name.split(".")[skip] for name in tensors if name.startswith(f"{blocks}.")}
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)


def _common(
    tensors: Tensors,
    whole: dict[str, str],
    block: dict[str, str],
    blocks: str,
    config: ViTConfig | TextConfig,
) -> dict[str, Any]:
    """Return the parameters whose layout is the same in all kinds of files."""
    names = dict(whole)
    for i in range(config.layers):
        names |= {f"block_{i}/{n}": f"{blocks}.{i}.{theirs}" for n, theirs in block.items()}
    params = {}
    for ours, theirs in names.items():
        weight = _float(tensors[f"{theirs}.weight"])
        if weight.ndim == 1:
            params[f"{ours}/scale"] = weight
        else:
            axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
            params[f"{ours}/kernel"] = weight.transpose(axes)
        if not (config.clip and ours == "patch"):
            params[f"{ours}/bias"] = _float(tensors[f"{theirs}.bias"])
    return params


def _float(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def _row(array: np.ndarray) -> np.ndarray:
    return _float(array).reshape(1, -1)
